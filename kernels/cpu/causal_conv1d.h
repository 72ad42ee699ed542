#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

constexpr int64_t conv_block = 64;     // channels that one task works on
constexpr int64_t conv_max_width = 8;  // widest convolution with its window in registers

// Consecutive real tokens of one document.
struct ConvPiece {
  int64_t row, begin, end;
};

// Where an input of a window is: a position of the row, or one of these. Slot i of the state is state_slot - i.
constexpr int32_t conv_zero = -1, conv_state_slot = -2;

struct ConvArgs {
  const void *x, *state, *dy, *dfinal;
  void *y, *dx, *dstate;
  const float *weight, *bias;  // weight: (width, d)
  float* partial;              // (partitions, width + 1, d): gradients of weight and bias
  const ConvPiece* pieces;
  const int32_t* before;  // (pieces, width - 1): the inputs before each piece, oldest first
  const int32_t* after;   // (pieces, width - 1): the positions after it in its document, conv_zero for none
  const int32_t* last;    // (rows, width - 1): the inputs in the final state
  int64_t npieces, partitions, seqlen, d, width;
  int64_t x_row, x_step, dy_row, dy_step;  // strides
  bool bf16, silu;
};

// Task p * blocks + c: the pieces of partition p on channel block c. Partitions depend on shapes alone, so that sums over
// positions have one order whatever the number of threads.
SEQLIB_KERNEL(causal_conv1d_fwd, ConvArgs)
SEQLIB_KERNEL(causal_conv1d_bwd, ConvArgs)
// Rows, after the tasks: adds the gradient of the final state to the inputs that it holds.
SEQLIB_KERNEL(causal_conv1d_bwd_final, ConvArgs)

struct ConvStepArgs {
  const void *x, *weight, *bias;  // weight: (d, width)
  void *state, *y;
  int64_t batch, d, width, x_row;
  bool bf16, silu, weight_bf16, bias_bf16;
};

// Task: channel block of every row.
SEQLIB_KERNEL(causal_conv1d_step, ConvStepArgs)

}  // namespace seqlib

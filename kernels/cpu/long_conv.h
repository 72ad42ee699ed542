#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

// Rows of d neighbouring channels; `batch` and `row` are distances in elements.
struct ConvTensor {
  void* data;
  int64_t batch, row;
};

struct LongConvArgs {
  ConvTensor x, state, y, dx, dstate;  // y holds the gradient of the outputs in the backward pass
  const float *kernel, *skip, *reverse;
  float *dkernel, *dreverse;
  const float* tables;  // see `tables` in long_conv.cpp
  int64_t batch, seqlen, d, past, length, reverse_length;
  int64_t points;  // complex points of a transform, a power of two >= 16
  int64_t parts;   // the batch is cut in so many pieces
  bool bf16;
};

// Tasks are (block of channels, part of the batch); in the backward pass a task is a whole block of channels, so that the
// sum over the batch has one order.
SEQLIB_KERNEL(long_conv_fwd, LongConvArgs)
SEQLIB_KERNEL(long_conv_bwd, LongConvArgs)

// Channels in a block: the lanes of the instruction set in use.
inline int64_t long_conv_lanes() { return isa() >= Isa::avx512 ? 16 : isa() == Isa::avx2 ? 8 : 4; }

}  // namespace seqlib

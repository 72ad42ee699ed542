#pragma once

#include "view.h"

namespace seqlib {

constexpr int64_t conv_max_width = 8;  // widest convolution with its window in registers
constexpr int64_t conv_positions = 128, conv_channels = 128;  // of a block

struct ConvArgs {
  View x, dy;                    // one dtype for all but the sums
  const void *state, *dfinal;    // (batch, width - 1, d) or null
  void *y, *final, *dx, *dstate;  // dstate is null without a state
  const float *weight, *bias;    // (width, d), (d) or null
  float* partial;                // (batch * blocks of positions, width + 1, d): gradients of weight and bias
  const int32_t* links;          // of SequenceInfo, or null
  int64_t batch, seqlen, d;
  int32_t width;
  bool silu;
};

void start_causal_conv1d_fwd(const ConvArgs& args, Stream stream);
void start_causal_conv1d_bwd(const ConvArgs& args, Stream stream);

struct ConvStepArgs {
  View x, weight, bias;  // weight: (d, width); bias: (d) or null
  void *state, *y;       // (batch, width - 1, d), (batch, d), the dtype of x
  int64_t batch, d;
  int32_t width;
  bool silu;
};
void start_causal_conv1d_step(const ConvStepArgs& args, Stream stream);

}  // namespace seqlib

#pragma once

#include "view.h"

namespace seqlib {

constexpr int few_rows_most = 8;  // rows of x; FEW_ROWS of seqlib/ops/linear
constexpr int few_rows_taps = 4;  // the widest convolution

struct FewRowsArgs {
  const void* x;  // (batch, d_in), `x_stride` apart
  int64_t x_stride;
  const void* norm;    // null, or (d_in,): rms(x) * norm
  int64_t group_size;  // of the norm, a multiple of 4; 0 for none
  float eps;
  const void* gate;  // null, or with a norm (batch, d_in) of the weight's dtype, `gate_stride` apart: norm(x) * silu(gate)
  int64_t gate_stride;
  const void *weight, *bias;  // (d_out, d_in) and (d_out,), bias may be null
  const void* residual;       // null, or (batch, d_out) of y's dtype, `residual_stride` apart: added
  int64_t residual_stride;
  void* y;                    // (batch, d_out), `y_stride` apart
  int64_t y_stride;
  int64_t batch, d_in, d_out;
  Dtype x_dtype, dtype, y_dtype;  // dtype: of the weight, bias, norm, gate and convolution

  // The outputs [conv_first, conv_first + conv_channels) pass a causal convolution and silu.
  const void *conv_weight, *conv_bias;  // (channels, width) and (channels,) or null
  void* conv_state;                     // (batch, width - 1, channels), updated
  int64_t conv_first, conv_channels;
  int conv_width;

  int split;     // warps that share rows: 1, 2, 4 or 8
  int at_once;   // rows of x for which the weight is read once, as far as shared memory reaches
  bool overlap;  // may start while the kernel before it runs
};

// y = W x for up to few_rows_most rows, reading W once.
void start_few_rows(const FewRowsArgs& args, Stream stream);

// The number of warps that share rows, so that `multiprocessors` have something to do.
int few_rows_split(int64_t d_in, int64_t d_out, int64_t element_size, int64_t multiprocessors);

}  // namespace seqlib

#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

// y = v sigmoid(g), v, g = gelu(x) weight^T + bias, and its gradients.
struct GeluGluArgs {
  const float *x, *weight, *bias;  // (rows, d_in), (2 d_out, d_in), (2 d_out) or null
  float *y, *mixed;                // (rows, d_out); v and g (rows, 2 d_out), null if nobody wants them
  const float* dy;
  float *dx, *dweight, *dbias;     // of each part: (parts, 2 d_out, d_in) and (parts, 2 d_out)
  float* packed;                   // the weight in the order in which products read it
  int64_t rows, d_in, d_out;
  int64_t parts;  // the backward pass cuts the rows in so many, whatever the threads are, so sums have one order
};

SEQLIB_KERNEL(gelu_glu_pack_fwd, GeluGluArgs)  // panels of the weight: `gelu_glu_panels` of d_out
SEQLIB_KERNEL(gelu_glu_pack_bwd, GeluGluArgs)  // and of d_in
SEQLIB_KERNEL(gelu_glu_fwd, GeluGluArgs)       // blocks of gelu_glu_rows rows
SEQLIB_KERNEL(gelu_glu_bwd, GeluGluArgs)       // parts

constexpr int64_t gelu_glu_rows = 48;

// Panels are 64 numbers wide; in the forward pass half of them are values and half gates.
inline int64_t gelu_glu_panels(int64_t d_out) { return (d_out + 31) / 32; }
inline int64_t gelu_glu_panels_bwd(int64_t d_in) { return (d_in + 63) / 64; }

}  // namespace seqlib

#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

enum class Activation { silu, sigmoid, none };

struct NormArgs {
  const void *x, *gate, *dy;
  void *y, *dx, *dgate;
  const float* weight;
  float *rstd, *dweight;  // dweight: one row of `width` per partition
  int64_t rows, width, group, x_stride, gate_stride, dy_stride, partitions;
  float eps;
  bool bf16, norm_before_gate;
  Activation activation;  // of the gate; the backward pass knows silu
};

// Forward: rows [begin, end). Backward: partitions [begin, end) of the rows, so that sums over rows have a fixed order.
SEQLIB_KERNEL(rms_norm_fwd, NormArgs)
SEQLIB_KERNEL(rms_norm_bwd, NormArgs)

}  // namespace seqlib

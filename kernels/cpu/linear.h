#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

struct LinearArgs {
  const float* x;  // (rows, d_in)
  const void* weight;
  const float* bias;
  float* y;  // (rows, d_out), y_stride apart
  int64_t rows, d_in, d_out, y_stride;
  bool bf16;  // dtype of weight
};

SEQLIB_KERNEL(linear_fwd, LinearArgs)  // outputs [begin, end) of every row

}  // namespace seqlib

#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

// K[l] = Re sum_n weight_n exp(l log_decay_n) for d channels, and its gradients. Complex numbers are pairs.
struct DiagKernelArgs {
  const double* log_decay;  // (d, n)
  const float* weight;      // (d, c, n)
  float* kernel;            // (d, c, length)
  const float* dkernel;
  double* dlog_decay;
  float* dweight;
  int64_t c, n, length;
};

SEQLIB_KERNEL(diag_kernel_fwd, DiagKernelArgs)  // of the d in [begin, end)
SEQLIB_KERNEL(diag_kernel_bwd, DiagKernelArgs)

}  // namespace seqlib

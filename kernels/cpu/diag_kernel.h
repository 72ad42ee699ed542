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

// One position of the recurrence: h = decay h + B x, y = Re sum_n conj(C_n) h_n + D x. With `pairs` all but x, D and y
// are complex; m counts their real numbers.
struct DiagStepArgs {
  const float *x, *decay, *B, *C, *D;  // (batch, d), three of (d, m), (d)
  float *state, *y;                    // (batch, d, m), (batch, d)
  int64_t d, m;
  bool pairs;
};

SEQLIB_KERNEL(diag_step, DiagStepArgs)  // blocks of diag_step_block channels, of every row of the batch in turn

constexpr int64_t diag_step_block = 16;

}  // namespace seqlib

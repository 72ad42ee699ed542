#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

constexpr int64_t ssm_kernel_pad = 16;  // the tables are as long as a multiple of the widest vector

// Spectra of kernels of diagonal-plus-rank-one state spaces; see ssm_kernel_kernel.cpp for the sums.
struct SpectrumArgs {
  const float* weights;   // (d, n, 4 (c + 1)): for every state the numerators of all sums, Re v and Re(v conj alpha) in turn
  const float *square, *real;  // (d, n): |alpha|^2 and Re alpha, alpha = dt A
  const float* dt;             // (d)
  const float *sin, *cos;      // of theta = pi k / l_kernel for k < points; 1 and 0 up to a multiple of 16
  float* spectrum;             // (d, c, 2, points): real and imaginary parts
  const float* dspectrum;
  float *dweights, *dsquare, *dreal, *ddt;
  int64_t n, channels, points;
};

SEQLIB_KERNEL(dplr_spectrum_fwd, SpectrumArgs)  // of the d in [begin, end)
SEQLIB_KERNEL(dplr_spectrum_bwd, SpectrumArgs)

}  // namespace seqlib

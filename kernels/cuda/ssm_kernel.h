#pragma once

#include "view.h"

namespace seqlib {

// K[c, l] = Re sum_n weight[c, n] exp(l log_decay[n]), for each of d channels.
struct VandermondeArgs {
  const double* log_decay;  // (d, n) pairs
  const float* weight;      // (d, c, n) pairs
  float* kernel;            // (d, c, length)
  int64_t d, c, n, length;
};
void start_vandermonde(const VandermondeArgs& args, Stream stream);

// sums[m, :, k] = sum_n numerators[m, n] / z[n, k],  z = cos^2 |alpha|^2 - 4 sin^2 - 4i sin cos Re alpha  at pi k / l_kernel.
struct CauchyArgs {
  const float* numerators;  // (d, m, n)
  const float* alpha;       // (d, n) pairs
  float* sums;              // (d, m, 2, l_kernel / 2 + 1); backward: their gradient
  float* dnumerators;       // (d, m, n)
  float* dalpha;            // (parts of m, d, n) pairs
  int64_t d, m, n, l_kernel;
};
constexpr int64_t cauchy_rows = 8;  // numerators of a part
void start_cauchy(const CauchyArgs& args, Stream stream);
void start_cauchy_bwd(const CauchyArgs& args, Stream stream);

}  // namespace seqlib

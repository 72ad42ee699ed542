// Decoding steps that are parts of larger ones; each is also an op of its own.
#pragma once

#include "seqlib.h"

namespace seqlib {

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias);
Tensor causal_conv1d_step(const Tensor& x, const Tensor& weight, const OptTensor& bias, Tensor state, bool silu);
Tensor selective_scan_step(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                           Tensor state, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias,
                           bool dt_softplus);

}  // namespace seqlib

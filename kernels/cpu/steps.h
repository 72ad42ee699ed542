// Decoding steps that are parts of larger ones; each is also an op of its own.
#pragma once

#include <tuple>

#include "seqlib.h"

namespace seqlib {

// Columns [begin, end) of rows (batch, d).
inline Tensor columns(const Tensor& t, int64_t begin, int64_t end) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 1, begin, end - begin);
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias);
Tensor linears(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<OptTensor>& biases);
Tensor causal_conv1d_step(const Tensor& x, const Tensor& weight, const OptTensor& bias, Tensor state, bool silu);
Tensor selective_scan_step(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                           Tensor state, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias,
                           bool dt_softplus);
Tensor linear_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& log_decay,
                             Tensor state, double scale);
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const OptTensor& weight, const OptTensor& gate,
                                    bool norm_before_gate, int64_t group_size, double eps);

}  // namespace seqlib

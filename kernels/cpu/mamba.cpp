// A layer that decodes in one call: its parts are the steps of other ops, and what it saves is the way between them.
#include "steps.h"

namespace seqlib {
namespace {

Tensor mamba_step(const Tensor& x, const Tensor& in_proj, const OptTensor& in_bias, const Tensor& conv,
                  const OptTensor& conv_bias, const Tensor& x_proj, const Tensor& dt_proj, const Tensor& dt_bias,
                  const Tensor& A, const Tensor& D, const Tensor& out_proj, const OptTensor& out_bias,
                  Tensor conv_state, Tensor state) {
  const int64_t batch = x.size(0), inner = A.size(0), n = A.size(1), rank = dt_proj.size(1);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == in_proj.size(1), "x must be (batch, ", in_proj.size(1), ")");
  STD_TORCH_CHECK(conv_state.dim() == 3 && conv_state.size(0) == batch && conv_state.size(1) == conv.size(1) - 1 &&
                      conv_state.size(2) == inner && state.dim() == 3 && state.size(0) == batch &&
                      state.size(1) == inner && state.size(2) == n,
                  "the state is not one of this layer for ", batch, " rows");
  const Tensor both = linear(x, in_proj, in_bias);
  const Tensor seen = causal_conv1d_step(columns(both, 0, inner), conv, conv_bias, conv_state, true);
  const Tensor low = linear(seen, x_proj, {});
  const Tensor dt = linear(columns(low, 0, rank), dt_proj, {});
  const Tensor y = selective_scan_step(seen, dt, A, columns(low, rank, rank + n), columns(low, rank + n, rank + 2 * n),
                                       state, D, columns(both, inner, 2 * inner), dt_bias, true);
  return linear(y, out_proj, out_bias);
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) { m.impl("mamba_step", TORCH_BOX(&seqlib::mamba_step)); }

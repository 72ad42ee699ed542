#include "matrix_step.h"

#include "binding.h"

namespace seqlib {
namespace {

Tensor step(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& beta, const OptTensor& log_decay,
            const Tensor& state, double scale) {
  check_f32(state, "state");
  STD_TORCH_CHECK(q.scalar_type() == v.scalar_type() && k.scalar_type() == v.scalar_type(), "q, k, v must share a dtype");
  const OnDevice on(v);
  const Input qs(q, "bg", "q"), ks(k, "bg", "k"), vs(v, "bg", "v");
  const OptTensor betas = floats(beta), decays = floats(log_decay);
  MatrixStepArgs a{};
  a.batch = v.size(0);
  a.nheads = v.size(1);
  a.headdim = v.size(2);
  a.d_state = k.size(2);
  a.q = qs.seen;
  a.k = ks.seen;
  a.v = vs.seen;
  a.q.row = a.nheads / q.size(1);
  a.k.row = a.nheads / k.size(1);
  a.v.row = 1;
  a.beta = data<float>(betas);
  a.log_decay = data<float>(decays);
  if (decays) {
    const int64_t axes = decays->dim();
    a.decay_batch = axes > 1 ? decays->stride(0) : 0;
    a.decay_head = decays->stride(axes > 1 ? 1 : 0);
    a.decay_channel = axes > 2 ? 1 : 0;
  }
  a.state = data<float>(state);
  a.scale = static_cast<float>(scale);
  Tensor y = torch::stable::new_empty(v, {a.batch, a.nheads, a.headdim});
  a.y = y.data_ptr();
  start_matrix_step(a, on.stream());
  return y;
}

Tensor linear_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& log_decay, Tensor state,
                             double scale) {
  return step(q, k, v, std::nullopt, log_decay, state, scale);
}

Tensor delta_rule_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const OptTensor& log_decay,
                       Tensor state, double scale) {
  return step(q, k, v, beta, log_decay, state, scale);
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(SEQLIB_LIBRARY, SEQLIB_DEVICE_KEY, m) {
  m.impl("linear_attention_step", TORCH_BOX(&seqlib::linear_attention_step));
  m.impl("delta_rule_step", TORCH_BOX(&seqlib::delta_rule_step));
}

// What mixers with a matrix state do to one token after their projections: the state, a norm, a gate and the output map.
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <string>

#include "delta_rule.h"
#include "linear_attention.h"
#include "norm.h"
#include "parallel.h"
#include "steps.h"

namespace seqlib {
namespace {

using torch::headeronly::BFloat16;

// (batch, heads * width) or (batch, heads, width) as rows of heads side by side.
Tensor side_by_side(const Tensor& t) {
  const bool is = t.stride(-1) == 1 && (t.dim() == 2 || t.stride(1) == t.size(2));
  return is ? t : torch::stable::contiguous(t);
}

Tensor floats(const Tensor& t) {
  const Tensor wide = t.scalar_type() == Scalar::Float ? t : torch::stable::to(t, Scalar::Float);
  return wide.is_contiguous() ? wide : torch::stable::contiguous(wide);
}

OptTensor floats(const OptTensor& t) { return t ? OptTensor(floats(*t)) : std::nullopt; }

struct Sizes {
  int64_t batch, nheads, d_state, headdim;

  // Heads of `width` in t, which serve all nheads.
  int64_t heads(const Tensor& t, int64_t width, const char* name) const {
    const int64_t all = t.size(0) == batch && batch > 0 ? t.numel() / batch : 0, count = all / width;
    STD_TORCH_CHECK(count > 0 && count * width == all && nheads % count == 0, name, " must be (", batch,
                    " rows, heads dividing ", nheads, " of width ", width, ")");
    return count;
  }
};

void attend(const Sizes& s, const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& log_decay, Tensor state,
            double scale, Tensor y) {
  auto view = [&](const Tensor& t, int64_t width, const char* name) {
    return Heads{t.data_ptr(), t.stride(0), 0, width, s.nheads / s.heads(t, width, name), is_bf16(t)};
  };
  AttentionStepArgs a{};
  a.q = view(q, s.d_state, "q");
  a.k = view(k, s.d_state, "k");
  a.v = view(v, s.headdim, "v");
  a.y = view(y, s.headdim, "y");
  STD_TORCH_CHECK(a.v.shared == 1, "v must have ", s.nheads, " heads");
  if (log_decay) {
    const int64_t all = log_decay->numel();
    const bool constant = log_decay->dim() == 1, channels = !constant && all == s.batch * s.nheads * s.d_state;
    STD_TORCH_CHECK(channels || all == (constant ? 1 : s.batch) * s.nheads, "log_decay must be per head, token or channel");
    a.log_decay = data<float>(*log_decay);
    a.decay_head = channels ? s.d_state : 1;
    a.decay_batch = constant ? 0 : s.nheads * a.decay_head;
    a.decay_channel = channels;
  }
  a.state = data<float>(state);
  a.nheads = s.nheads;
  a.d_state = s.d_state;
  a.headdim = s.headdim;
  a.scale = static_cast<float>(scale);
  parallel(s.batch * s.nheads, std::max<int64_t>(1, 40000 / (s.d_state * s.headdim)),
           [&](int64_t begin, int64_t end) { linear_attention_step_for()(a, begin, end); });
}

void correct(const Sizes& s, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
             const OptTensor& log_decay, Tensor state, double scale, Tensor y) {
  auto view = [&](const Tensor& t, int64_t width, const char* name) {
    return DeltaInput{t.data_ptr(), t.stride(0), 0, width, s.nheads / s.heads(t, width, name)};
  };
  const int64_t gates = s.batch * s.nheads, decays = log_decay ? log_decay->numel() : 0;
  const bool channels = decays == gates * s.d_state;
  STD_TORCH_CHECK(beta.numel() == gates && (!log_decay || channels || decays == gates) && s.d_state <= delta_max_state,
                  "beta must be per token, log_decay per token or channel, and d_state at most ", delta_max_state);
  const DeltaStepArgs a{view(q, s.d_state, "q"),
                        view(k, s.d_state, "k"),
                        view(v, s.headdim, "v"),
                        data<float>(beta),
                        data<float>(log_decay),
                        data<float>(state),
                        y.data_ptr(),
                        s.nheads,
                        s.d_state,
                        s.headdim,
                        static_cast<float>(scale),
                        !log_decay ? Decay::none : channels ? Decay::channel : Decay::token,
                        is_bf16(v)};
  STD_TORCH_CHECK(a.v.group == 1, "v must have ", s.nheads, " heads");
  parallel(gates, std::max<int64_t>(1, 32768 / (s.d_state * s.headdim)),
           [&](int64_t begin, int64_t end) { delta_rule_step_for()(a, begin, end); });
}

// v with a column of ones behind each head, under which the state sums up its keys.
template <class T>
void with_ones(const Sizes& s, const Tensor& v, Tensor wider) {
  const int64_t width = s.headdim - 1;
  T* to = data<T>(wider);
  for (int64_t row = 0; row < s.batch; ++row) {
    const T* from = data<T>(v) + row * v.stride(0);
    for (int64_t h = 0; h < s.nheads; ++h, from += width, to += s.headdim) {
      std::copy(from, from + width, to);
      to[width] = static_cast<T>(1.0f);
    }
  }
}

// The columns of each head over the last one.
template <class T>
void divide(const Sizes& s, const Tensor& y, double eps, Tensor ratio) {
  const T* from = data<T>(y);
  T* to = data<T>(ratio);
  for (int64_t head = 0; head < s.batch * s.nheads; ++head, from += s.headdim) {
    const float scale = 1.0f / (static_cast<float>(from[s.headdim - 1]) + static_cast<float>(eps));
    for (int64_t i = 0; i < s.headdim - 1; ++i) *to++ = static_cast<T>(static_cast<float>(from[i]) * scale);
  }
}

// In place. Groups of features have a norm of their own: over all heads together, or within each if group_size is 0.
void normalise(const Sizes& s, Tensor y, const OptTensor& weight, const OptTensor& gate, Activation activation,
               int64_t group_size, double eps) {
  const int64_t inner = s.nheads * s.headdim, width = group_size ? inner : s.headdim, bytes = is_bf16(y) ? 2 : 4;
  NormArgs a{};
  a.rows = inner / width;
  a.width = a.x_stride = a.gate_stride = width;
  a.group = group_size ? group_size : width;
  STD_TORCH_CHECK(width % a.group == 0 && (!weight || weight->numel() == width), "norm_weight must be (", width, ",)");
  const std::vector<float> ones(weight ? 0 : width, 1.0f);
  std::vector<float> rstd(inner / a.group);
  a.weight = weight ? data<float>(*weight) : ones.data();
  a.rstd = rstd.data();
  a.eps = static_cast<float>(eps);
  a.bf16 = is_bf16(y);
  a.norm_before_gate = true;
  a.activation = activation;
  for (int64_t row = 0; row < s.batch; ++row) {
    a.x = a.y = data<char>(y) + row * inner * bytes;
    if (gate) a.gate = data<char>(*gate) + row * gate->stride(0) * bytes;
    rms_norm_fwd_for()(a, 0, a.rows);
  }
}

// Every head of t (batch, heads * width) over its length, as layers.norm.unit_length.
Tensor unit_length(const Tensor& t, int64_t width) {
  const std::vector<float> scale(width, 1.0f / std::sqrt(static_cast<float>(width)));
  std::vector<float> rstd(t.numel() / t.size(0) / width);
  Tensor unit = empty_as(t);
  NormArgs a{};
  a.rows = static_cast<int64_t>(rstd.size());
  a.width = a.x_stride = a.group = width;
  a.weight = scale.data();
  a.rstd = rstd.data();
  a.eps = 1e-6f / static_cast<float>(width);
  a.bf16 = is_bf16(t);
  for (int64_t row = 0, bytes = a.bf16 ? 2 : 4; row < t.size(0); ++row) {
    a.x = data<char>(t) + row * t.stride(0) * bytes;
    a.y = data<char>(unit) + row * a.rows * width * bytes;
    rms_norm_fwd_for()(a, 0, a.rows);
  }
  return unit;
}

Activation activation_of(const std::string& name) {
  STD_TORCH_CHECK(name == "silu" || name == "sigmoid" || name == "none", "activation must be silu, sigmoid or none, got ", name);
  return name == "silu" ? Activation::silu : name == "sigmoid" ? Activation::sigmoid : Activation::none;
}

// The delta rule with beta, linear attention without, of q and k brought to length 1 if `unit`; then norm "rms", or "ratio" to a last column that this adds to v.
Tensor matrix_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& beta, const OptTensor& log_decay,
                   Tensor state, double scale, bool unit, const std::string& norm, const OptTensor& norm_weight,
                   const OptTensor& gate, const std::string& activation, int64_t group_size, double eps,
                   const Tensor& weight, const OptTensor& bias) {
  check_f32(state, "state");
  check_float(v, "v");
  STD_TORCH_CHECK(q.scalar_type() == v.scalar_type() && k.scalar_type() == v.scalar_type() &&
                      (!gate || gate->scalar_type() == v.scalar_type()),
                  "q, k, v and the gate must share a dtype");
  STD_TORCH_CHECK(state.dim() == 4 && state.size(0) == v.size(0), "state must be (batch, nheads, d_state, headdim)");
  STD_TORCH_CHECK(norm == "rms" || norm == "ratio" || norm == "none", "norm must be rms, ratio or none, got ", norm);
  const bool ratio = norm == "ratio", bf16 = is_bf16(v);
  const Sizes s{state.size(0), state.size(1), state.size(2), state.size(3)};
  Tensor qs = side_by_side(q), ks = side_by_side(k);
  if (unit) {
    s.heads(qs, s.d_state, "q"), s.heads(ks, s.d_state, "k");
    qs = unit_length(qs, s.d_state), ks = unit_length(ks, s.d_state);
  }
  const OptTensor decays = floats(log_decay);
  Tensor vs = side_by_side(v);
  if (ratio) {
    STD_TORCH_CHECK(vs.numel() == s.batch * s.nheads * (s.headdim - 1), "v must have ", s.headdim - 1, " columns");
    Tensor wider = torch::stable::new_empty(v, {s.batch, s.nheads * s.headdim});
    (bf16 ? with_ones<BFloat16> : with_ones<float>)(s, vs, wider);
    vs = wider;
  }
  Tensor y = torch::stable::new_empty(v, {s.batch, s.nheads * s.headdim});
  if (beta) correct(s, qs, ks, vs, floats(*beta), decays, state, scale, y);
  else attend(s, qs, ks, vs, decays, state, scale, y);
  if (ratio) {
    Tensor divided = torch::stable::new_empty(v, {s.batch, s.nheads * (s.headdim - 1)});
    (bf16 ? divide<BFloat16> : divide<float>)(s, y, eps, divided);
    return linear(divided, weight, bias);
  }
  if (norm == "none") return linear(y, weight, bias);
  const OptTensor gates = gate ? OptTensor(side_by_side(*gate)) : std::nullopt;
  if (gates) STD_TORCH_CHECK(gates->size(0) == s.batch && gates->numel() == y.numel(), "gate must have the size of v");
  normalise(s, y, floats(norm_weight), gates, activation_of(activation), group_size, eps);
  return linear(y, weight, bias);
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) { m.impl("matrix_step", TORCH_BOX(&seqlib::matrix_step)); }

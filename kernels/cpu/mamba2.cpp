// Mamba-2's decoding step in one call: the steps of its parts, and between them what has one value per head or channel.
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cmath>

#include "steps.h"

namespace seqlib {
namespace {

Tensor floats(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, Scalar::Float)); }

float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::abs(x))); }

struct Between {
  int64_t batch, nheads, headdim, D_width;
  int64_t stride, seen_stride;  // between rows of z and dt, and of x
  const float *dt_bias, *A_log, *D;
  float dt_min, dt_max;
};

// v = delta x and the log-decay of each head.
template <class T>
void take(const Between& b, const T* dt, const T* x, T* v, float* log_decay) {
  for (int64_t row = 0; row < b.batch; ++row) {
    for (int64_t h = 0; h < b.nheads; ++h) {
      float delta = softplus(static_cast<float>(dt[row * b.stride + h]) + b.dt_bias[h]);
      if (delta < b.dt_min) delta = b.dt_min;  // comparisons let NaN pass
      if (delta > b.dt_max) delta = b.dt_max;
      log_decay[row * b.nheads + h] = -delta * std::exp(b.A_log[h]);
      for (int64_t i = h * b.headdim; i < (h + 1) * b.headdim; ++i)
        v[row * b.nheads * b.headdim + i] = static_cast<T>(delta * static_cast<float>(x[row * b.seen_stride + i]));
    }
  }
}

// y + D x, and where there is no norm to do it, the gate.
template <class T>
void skip(const Between& b, const T* x, const T* z, T* y) {
  const int64_t inner = b.nheads * b.headdim;
  for (int64_t row = 0; row < b.batch; ++row) {
    for (int64_t i = 0; i < inner; ++i) {
      const float D = b.D[b.D_width == 1 ? i / b.headdim : i];
      float sum = static_cast<float>(y[row * inner + i]) + D * static_cast<float>(x[row * b.seen_stride + i]);
      if (z) {
        const float gate = static_cast<float>(z[row * b.stride + i]);
        sum *= gate / (1.0f + std::exp(-gate));
      }
      y[row * inner + i] = static_cast<T>(sum);
    }
  }
}

template <class T>
Tensor between(const Between& b, const Tensor& both, const Tensor& seen, int64_t groups, bool gated, Tensor state) {
  const int64_t inner = b.nheads * b.headdim, channels = seen.size(1), width = groups * state.size(2);
  Tensor v = torch::stable::new_empty(seen, {b.batch, b.nheads, b.headdim});
  Tensor log_decay = empty_f32(seen, {b.batch, b.nheads});
  take<T>(b, data<T>(both) + inner + channels, data<T>(seen), data<T>(v), data<float>(log_decay));
  auto heads = [&](int64_t begin) {
    return torch::stable::view(columns(seen, begin, begin + width), {b.batch, groups, state.size(2)});
  };
  Tensor y = linear_attention_step(heads(inner + width), heads(inner), v, log_decay, state, 1.0);
  skip<T>(b, data<T>(seen), gated ? data<T>(both) : nullptr, data<T>(y));
  return torch::stable::view(y, {b.batch, inner});
}

// x + y in the dtype of x.
template <class T, class U>
void add(const Tensor& x, const Tensor& y, Tensor sum) {
  const int64_t rows = x.size(0), width = x.size(1), stride = x.stride(0);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; ++i)
      data<T>(sum)[row * width + i] =
          static_cast<T>(static_cast<float>(data<T>(x)[row * stride + i]) + static_cast<float>(data<U>(y)[row * width + i]));
}

// With `norm` x is the residual stream, and what comes is the stream after the layer.
Tensor mamba2_step(const Tensor& x, const OptTensor& norm, double norm_eps, const Tensor& in_proj, const OptTensor& in_bias,
                   const Tensor& conv, const OptTensor& conv_bias, const Tensor& dt_bias, const Tensor& A_log, const Tensor& D,
                   double dt_min, double dt_max, const OptTensor& gate_norm, double eps, bool norm_before_gate,
                   const Tensor& out_proj, const OptTensor& out_bias, Tensor conv_state, Tensor state) {
  STD_TORCH_CHECK(state.dim() == 4 && conv_state.dim() == 3 && x.dim() == 2, "x must be (batch, d_model)");
  check_float(x, "x");
  const int64_t batch = x.size(0), nheads = state.size(1), d_state = state.size(2), headdim = state.size(3);
  const int64_t inner = nheads * headdim, channels = conv.size(0), groups = (channels - inner) / (2 * d_state);
  STD_TORCH_CHECK(state.size(0) == batch && conv_state.size(0) == batch && conv_state.size(1) == conv.size(1) - 1 &&
                      conv_state.size(2) == channels && channels == inner + 2 * groups * d_state && groups > 0 &&
                      nheads % groups == 0 && in_proj.size(0) == inner + channels + nheads &&
                      out_proj.size(1) == inner && dt_bias.numel() == nheads && A_log.numel() == nheads &&
                      (D.numel() == nheads || D.numel() == inner),
                  "the state is not one of this layer for ", batch, " rows");
  Tensor u = x;
  if (norm) {
    u = std::get<0>(rms_norm(x, norm, {}, false, x.size(1), norm_eps));
    if (u.scalar_type() != in_proj.scalar_type()) u = torch::stable::to(u, in_proj.scalar_type());
  }
  STD_TORCH_CHECK(is_bf16(u) || !is_bf16(x), "x must be float32 or of the dtype of in_proj");
  const Tensor both = linear(u, in_proj, in_bias);
  const Tensor seen = causal_conv1d_step(columns(both, inner, inner + channels), conv, conv_bias, conv_state, true);

  const Tensor bias = floats(dt_bias), rate = floats(A_log), through = floats(D);
  const Between b{batch,           nheads,           headdim, D.numel() / nheads, both.size(1), channels,
                  data<float>(bias), data<float>(rate), data<float>(through),
                  static_cast<float>(dt_min), static_cast<float>(dt_max)};
  const auto run = is_bf16(u) ? between<torch::headeronly::BFloat16> : between<float>;
  Tensor y = run(b, both, seen, groups, !gate_norm, state);
  if (gate_norm)
    y = std::get<0>(rms_norm(y, gate_norm, columns(both, 0, inner), norm_before_gate, inner / groups, eps));
  const Tensor made = linear(y, out_proj, out_bias);
  if (!norm) return made;
  const Tensor sum = empty_as(x), stream = x.stride(1) == 1 ? x : torch::stable::contiguous(x);
  using torch::headeronly::BFloat16;
  const auto added = is_bf16(x) ? add<BFloat16, BFloat16> : is_bf16(made) ? add<float, BFloat16> : add<float, float>;
  added(stream, made, sum);
  return sum;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) { m.impl("mamba2_step", TORCH_BOX(&seqlib::mamba2_step)); }

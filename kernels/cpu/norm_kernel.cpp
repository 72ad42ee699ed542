// RMSNorm with an optional gate, one row at a time; the row stays in L1 between the two passes over it.
#include "norm.h"

#include <cmath>

#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

// Calls f(offset, lanes) over [0, n) in vectors, the last one possibly short.
template <class F>
inline void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class T>
inline vf get(const T* p, int lanes) {
  return lanes == W ? load(p) : load_n(p, lanes);
}

template <class T>
inline void put(T* p, vf v, int lanes) {
  lanes == W ? store(p, v) : store_n(p, v, lanes);
}

template <class T>
void forward(const NormArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = a.width / a.group;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const T* x = static_cast<const T*>(a.x) + row * a.x_stride + g * a.group;
      const T* z = a.gate ? static_cast<const T*>(a.gate) + row * a.gate_stride + g * a.group : nullptr;
      T* y = static_cast<T*>(a.y) + row * a.width + g * a.group;
      const float* w = a.weight ? a.weight + g * a.group : nullptr;
      const bool gate_first = z && !a.norm_before_gate;

      vf squares = {};
      each(a.group, [&](int64_t i, int lanes) {
        vf v = get(x + i, lanes);
        if (gate_first) v *= silu(get(z + i, lanes));
        squares += v * v;
      });
      const float rstd = 1.0f / std::sqrt(sum(squares) / a.group + a.eps);
      a.rstd[row * groups + g] = rstd;
      each(a.group, [&](int64_t i, int lanes) {
        vf v = get(x + i, lanes) * rstd;
        if (z) v *= silu(get(z + i, lanes));
        if (w) v *= get(w + i, lanes);
        put(y + i, v, lanes);
      });
    }
  }
}

template <class T>
void backward(const NormArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = a.width / a.group;
  for (int64_t part = begin; part < end; ++part) {
    float* dweight = a.dweight ? a.dweight + part * a.width : nullptr;
    for (int64_t row = a.rows * part / a.partitions; row < a.rows * (part + 1) / a.partitions; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = row * a.width + g * a.group;
        const T* x = static_cast<const T*>(a.x) + row * a.x_stride + g * a.group;
        const T* z = a.gate ? static_cast<const T*>(a.gate) + row * a.gate_stride + g * a.group : nullptr;
        const T* dy = static_cast<const T*>(a.dy) + row * a.dy_stride + g * a.group;
        const float* w = a.weight ? a.weight + g * a.group : nullptr;
        const float rstd = a.rstd[row * groups + g];
        const bool gate_first = z && !a.norm_before_gate;

        // xhat is the normalised value and dhat the gradient that reaches it.
        auto at_lane = [&](int64_t i, int lanes, vf& xhat, vf& dhat, vf& gate) {
          gate = z ? silu(get(z + i, lanes)) : splat(1.0f);
          xhat = get(x + i, lanes) * rstd;
          if (gate_first) xhat *= gate;
          dhat = get(dy + i, lanes);
          if (z && !gate_first) dhat *= gate;
        };
        vf dot = {};
        each(a.group, [&](int64_t i, int lanes) {
          vf xhat, dhat, gate;
          at_lane(i, lanes, xhat, dhat, gate);
          if (dweight) put(dweight + g * a.group + i, get(dweight + g * a.group + i, lanes) + dhat * xhat, lanes);
          if (w) dhat *= get(w + i, lanes);
          dot += dhat * xhat;
        });
        const float mean = sum(dot) / a.group;
        each(a.group, [&](int64_t i, int lanes) {
          vf xhat, dhat, gate;
          at_lane(i, lanes, xhat, dhat, gate);
          vf scale = w ? get(w + i, lanes) : splat(1.0f);
          vf du = rstd * (dhat * scale - xhat * mean);
          put(static_cast<T*>(a.dx) + at + i, gate_first ? du * gate : du, lanes);
          if (z) {
            vf zv = get(z + i, lanes), slope = silu_grad(zv, sigmoid(zv));
            vf dz = gate_first ? du * get(x + i, lanes) * slope : get(dy + i, lanes) * xhat * scale * slope;
            put(static_cast<T*>(a.dgate) + at + i, dz, lanes);
          }
        });
      }
    }
  }
}

}  // namespace

void rms_norm_fwd(const NormArgs& a, int64_t begin, int64_t end) {
  a.bf16 ? forward<bf16>(a, begin, end) : forward<float>(a, begin, end);
}

void rms_norm_bwd(const NormArgs& a, int64_t begin, int64_t end) {
  a.bf16 ? backward<bf16>(a, begin, end) : backward<float>(a, begin, end);
}

}  // namespace seqlib::SEQLIB_ISA

// RMSNorm with an optional gate, one row at a time; the row stays in L1 between the two passes over it, and so does what
// the first pass computed with an exp.
#include "norm.h"

#include <cmath>
#include <vector>

#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

enum class Gate { none, first, last };
constexpr int nsum = 4;  // running sums side by side, because one would wait for its own additions

// Calls f(offset, lanes, k) over [0, n) in vectors, k counting through them; the last vector may be short.
template <class F>
inline void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + nsum * W <= n; i += nsum * W) {
#pragma GCC unroll 4
    for (int k = 0; k < nsum; ++k) f(i + k * W, W, k);
  }
  for (; i + W <= n; i += W) f(i, W, 0);
  if (i < n) f(i, static_cast<int>(n - i), 0);
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
inline T* from(void* p, int64_t offset) {
  return p ? static_cast<T*>(p) + offset : nullptr;
}

template <class T>
inline const T* from(const void* p, int64_t offset) {
  return p ? static_cast<const T*>(p) + offset : nullptr;
}

inline float total(const vf* parts) { return sum((parts[0] + parts[1]) + (parts[2] + parts[3])); }

inline vf activated(Activation activation, vf z) {
  return activation == Activation::silu ? silu(z) : activation == Activation::sigmoid ? sigmoid(z) : z;
}

template <class T, Gate gate>
void forward(const NormArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = a.width / a.group;
  std::vector<float> gated(gate == Gate::first ? a.group : 0);  // x * silu(z)
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const T* x = from<T>(a.x, row * a.x_stride + g * a.group);
      const T* z = from<T>(a.gate, row * a.gate_stride + g * a.group);
      const float* w = a.weight + g * a.group;
      T* y = from<T>(a.y, row * a.width + g * a.group);
      float* kept = gated.data();

      vf squares[nsum] = {};
      each(a.group, [&](int64_t i, int lanes, int k) {
        vf v = get(x + i, lanes);
        if constexpr (gate == Gate::first) {
          v *= activated(a.activation, get(z + i, lanes));
          put(kept + i, v, lanes);
        }
        squares[k] += v * v;
      });
      const float rstd = 1.0f / std::sqrt(total(squares) / a.group + a.eps);
      a.rstd[row * groups + g] = rstd;
      each(a.group, [&](int64_t i, int lanes, int) {
        vf v = (gate == Gate::first ? get(kept + i, lanes) : get(x + i, lanes)) * rstd * get(w + i, lanes);
        if constexpr (gate == Gate::last) v *= activated(a.activation, get(z + i, lanes));
        put(y + i, v, lanes);
      });
    }
  }
}

template <class T, Gate gate>
void backward(const NormArgs& a, int64_t begin, int64_t end) {
  const int64_t groups = a.width / a.group;
  std::vector<float> sigmoids(gate == Gate::none ? 0 : a.group);
  for (int64_t part = begin; part < end; ++part) {
    for (int64_t row = a.rows * part / a.partitions; row < a.rows * (part + 1) / a.partitions; ++row) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t at = row * a.width + g * a.group;
        const T* x = from<T>(a.x, row * a.x_stride + g * a.group);
        const T* z = from<T>(a.gate, row * a.gate_stride + g * a.group);
        const T* dy = from<T>(a.dy, row * a.dy_stride + g * a.group);
        T *dx = from<T>(a.dx, at), *dz = from<T>(gate == Gate::none ? nullptr : a.dgate, at);
        const float* w = a.weight + g * a.group;
        float *dw = from<float>(a.dweight, part * a.width + g * a.group), *sigma = sigmoids.data();
        const float rstd = a.rstd[row * groups + g];

        // xhat is the normalised value and dhat the gradient that reaches weight * xhat.
        auto values = [&](int64_t i, int lanes, vf s, vf& xhat, vf& dhat) {
          xhat = get(x + i, lanes) * rstd;
          dhat = get(dy + i, lanes);
          if constexpr (gate != Gate::none) (gate == Gate::first ? xhat : dhat) *= get(z + i, lanes) * s;
        };
        vf dots[nsum] = {};
        each(a.group, [&](int64_t i, int lanes, int k) {
          vf s = {}, xhat, dhat;
          if constexpr (gate != Gate::none) {
            s = sigmoid(get(z + i, lanes));
            put(sigma + i, s, lanes);
          }
          values(i, lanes, s, xhat, dhat);
          const vf product = dhat * xhat;
          if (dw) put(dw + i, get(dw + i, lanes) + product, lanes);
          dots[k] += product * get(w + i, lanes);
        });
        const float mean = total(dots) / a.group;
        each(a.group, [&](int64_t i, int lanes, int) {
          const vf s = gate == Gate::none ? vf{} : get(sigma + i, lanes), scale = get(w + i, lanes);
          vf xhat, dhat;
          values(i, lanes, s, xhat, dhat);
          const vf du = rstd * (dhat * scale - xhat * mean);
          if constexpr (gate == Gate::none) {
            put(dx + i, du, lanes);
          } else {
            const vf zi = get(z + i, lanes), slope = silu_grad(zi, s);
            put(dx + i, gate == Gate::first ? du * zi * s : du, lanes);
            const vf through = gate == Gate::first ? du * get(x + i, lanes) : get(dy + i, lanes) * xhat * scale;
            put(dz + i, through * slope, lanes);
          }
        });
      }
    }
  }
}

template <class T>
void forward(const NormArgs& a, int64_t begin, int64_t end) {
  if (!a.gate) return forward<T, Gate::none>(a, begin, end);
  a.norm_before_gate ? forward<T, Gate::last>(a, begin, end) : forward<T, Gate::first>(a, begin, end);
}

template <class T>
void backward(const NormArgs& a, int64_t begin, int64_t end) {
  if (!a.gate) return backward<T, Gate::none>(a, begin, end);
  a.norm_before_gate ? backward<T, Gate::last>(a, begin, end) : backward<T, Gate::first>(a, begin, end);
}

}  // namespace

void rms_norm_fwd(const NormArgs& a, int64_t begin, int64_t end) {
  a.bf16 ? forward<bf16>(a, begin, end) : forward<float>(a, begin, end);
}

void rms_norm_bwd(const NormArgs& a, int64_t begin, int64_t end) {
  a.bf16 ? backward<bf16>(a, begin, end) : backward<float>(a, begin, end);
}

}  // namespace seqlib::SEQLIB_ISA

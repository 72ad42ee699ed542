// For every frequency, with t = cos + i sin of theta, e = cos dt, g_n = 1 / (cos^2 |alpha|^2 - 4 sin^2 - 4i sin cos Re alpha):
//   sigma = sum_n (4i sin Re v - 2 cos Re(v conj alpha)) g_n     for each product v of a left and a right vector
//   K = dt t (sigma_CB - e sigma_CP sigma_QB / (1 + e sigma_QP))
// Lanes are frequencies. The left vectors are the c readouts and Q = conj P, the right ones B and P.
#include "ssm_kernel.h"

#include <vector>

#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

struct vc {
  vf re, im;
};

inline vc zero() { return {vf{}, vf{}}; }

inline vc operator+(vc a, vc b) { return {a.re + b.re, a.im + b.im}; }
inline vc operator-(vc a, vc b) { return {a.re - b.re, a.im - b.im}; }
inline vc operator*(vc a, vc b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
inline vc operator*(vf a, vc b) { return {a * b.re, a * b.im}; }
inline vc conj(vc a) { return {a.re, -a.im}; }
inline vf dot(vc a, vc b) { return a.re * b.re + a.im * b.im; }  // Re(conj(a) b)

inline vc inverse(vc a) {
  const vf r = 1.0f / dot(a, a);
  return {a.re * r, -a.im * r};
}

// g_n of W frequencies.
struct Denominators {
  vf cos2, sin2, both;
  Denominators(vf sin, vf cos) : cos2(cos * cos), sin2(4.0f * sin * sin), both(-4.0f * sin * cos) {}
  vc at(float square, float real) const { return inverse({square * cos2 - sin2, real * both}); }
};

// What follows from the sums: sigma by left vector (the last is Q) and right vector, and the fraction.
template <int C>
struct Fraction {
  vc sigma[C + 1][2];
  vc u, one;  // sigma_QB / (1 + e sigma_QP) and 1 / (1 + e sigma_QP)

  Fraction(const vc (&sums)[4 * (C + 1)], vf sin, vf cos, vf e) {
    for (int l = 0; l <= C; ++l)
      for (int r = 0; r < 2; ++r) {
        const vc p = sums[4 * l + 2 * r], q = sums[4 * l + 2 * r + 1];
        sigma[l][r] = {-4.0f * sin * p.im - 2.0f * cos * q.re, 4.0f * sin * p.re - 2.0f * cos * q.im};
      }
    const vc m = e * sigma[C][1];
    one = inverse({1.0f + m.re, m.im});
    u = sigma[C][0] * one;
  }
  vc value(int c, vf e) const { return sigma[c][0] - e * (sigma[c][1] * u); }
};

template <int C>
void sums_of(const float* weights, const float* square, const float* real, int64_t n, vf sin, vf cos, vc* g,
             vc (&sums)[4 * (C + 1)]) {
  constexpr int J = 4 * (C + 1);
  const Denominators den(sin, cos);
  for (vc& s : sums) s = zero();
  for (int64_t i = 0; i < n; ++i) {
    const vc inv = den.at(square[i], real[i]);
    if (g) g[i] = inv;
    for (int j = 0; j < J; ++j) {
      sums[j].re += weights[i * J + j] * inv.re;
      sums[j].im += weights[i * J + j] * inv.im;
    }
  }
}

inline vf part(const float* p, int lanes) { return lanes == W ? load(p) : load_n(p, lanes); }

inline void put(float* p, vf v, int lanes) {
  if (lanes == W)
    store(p, v);
  else
    store_n(p, v, lanes);
}

template <int C>
void fwd(const SpectrumArgs& a, int64_t d) {
  constexpr int J = 4 * (C + 1);
  const vf dt = splat(a.dt[d]);
  float* out = a.spectrum + d * C * 2 * a.points;
  for (int64_t k = 0; k < a.points; k += W) {
    const int lanes = a.points - k < W ? static_cast<int>(a.points - k) : W;
    const vf sin = load(a.sin + k), cos = load(a.cos + k), e = cos * dt;
    vc sums[J];
    sums_of<C>(a.weights + d * a.n * J, a.square + d * a.n, a.real + d * a.n, a.n, sin, cos, nullptr, sums);
    const Fraction<C> f(sums, sin, cos, e);
    for (int c = 0; c < C; ++c) {
      const vc value = dt * (vc{cos, sin} * f.value(c, e));
      put(out + (2 * c) * a.points + k, value.re, lanes);
      put(out + (2 * c + 1) * a.points + k, value.im, lanes);
    }
  }
}

// Gradients of complex numbers are dL/dRe + i dL/dIm; through a product they pass with the conjugate of the factor.
template <int C>
void bwd(const SpectrumArgs& a, int64_t d, std::vector<vf>& memory) {
  constexpr int J = 4 * (C + 1);
  const vf dt = splat(a.dt[d]);
  const float *weights = a.weights + d * a.n * J, *square = a.square + d * a.n, *real = a.real + d * a.n;
  const float* in = a.dspectrum + d * C * 2 * a.points;
  memory.assign(a.n * (J + 4), vf{});
  vf *dw = memory.data(), *dsquare = dw + a.n * J, *dreal = dsquare + a.n;
  vc* g = reinterpret_cast<vc*>(dreal + a.n);
  vf ddt{};
  for (int64_t k = 0; k < a.points; k += W) {
    const int lanes = a.points - k < W ? static_cast<int>(a.points - k) : W;
    const vf sin = load(a.sin + k), cos = load(a.cos + k), e = cos * dt;
    vc sums[J];
    sums_of<C>(weights, square, real, a.n, sin, cos, g, sums);
    const Fraction<C> f(sums, sin, cos, e);
    vc dsigma[C + 1][2];
    for (auto& pair : dsigma) pair[0] = pair[1] = zero();
    for (int c = 0; c < C; ++c) {
      const vc turned = conj(vc{cos, sin}) * vc{part(in + (2 * c) * a.points + k, lanes),
                                                part(in + (2 * c + 1) * a.points + k, lanes)};
      const vc to_value = dt * turned, w = f.sigma[c][1] * f.one;
      ddt += dot(turned, f.value(c, e)) - cos * dot(to_value, w * f.u);
      dsigma[c][0] = to_value;
      dsigma[c][1] = -e * (to_value * conj(f.u));
      dsigma[C][0] = dsigma[C][0] - e * (to_value * conj(w));
      dsigma[C][1] = dsigma[C][1] + (e * e) * (to_value * conj(w * f.u));
    }
    vc dsums[J];
    for (int l = 0; l <= C; ++l)
      for (int r = 0; r < 2; ++r) {
        const vc s = dsigma[l][r];
        dsums[4 * l + 2 * r] = {4.0f * sin * s.im, -4.0f * sin * s.re};
        dsums[4 * l + 2 * r + 1] = {-2.0f * cos * s.re, -2.0f * cos * s.im};
      }
    const Denominators den(sin, cos);
    for (int64_t i = 0; i < a.n; ++i) {
      vc dg = zero();
      for (int j = 0; j < J; ++j) {
        dw[i * J + j] += dot(dsums[j], g[i]);
        dg = dg + splat(weights[i * J + j]) * dsums[j];
      }
      const vc dden = dg * conj(g[i] * g[i]);  // but for the sign
      dsquare[i] -= dden.re * den.cos2;
      dreal[i] -= dden.im * den.both;
    }
  }
  for (int64_t i = 0; i < a.n * J; ++i) a.dweights[d * a.n * J + i] = sum(dw[i]);
  for (int64_t i = 0; i < a.n; ++i) {
    a.dsquare[d * a.n + i] = sum(dsquare[i]);
    a.dreal[d * a.n + i] = sum(dreal[i]);
  }
  a.ddt[d] = sum(ddt);
}

}  // namespace

void dplr_spectrum_fwd(const SpectrumArgs& a, int64_t begin, int64_t end) {
  for (int64_t d = begin; d < end; ++d) a.channels == 1 ? fwd<1>(a, d) : fwd<2>(a, d);
}

void dplr_spectrum_bwd(const SpectrumArgs& a, int64_t begin, int64_t end) {
  std::vector<vf> memory;
  for (int64_t d = begin; d < end; ++d) a.channels == 1 ? bwd<1>(a, d, memory) : bwd<2>(a, d, memory);
}

}  // namespace seqlib::SEQLIB_ISA

// Convolution by Fourier transforms whose lanes are channels: no shuffles, no bit reversal, no transposes of the inputs.
//
// Polynomials modulo t^2N + 1 instead of t^2N - 1: with t^N = i, a real sequence of 2N samples is one of N complex ones,
// low half + i * high half, and the product modulo t^N - i is an ordinary cyclic one after sample j has been turned by
// exp(i pi j / 2N). So every real sequence costs a transform of half its padded length, whatever the batch is.
// Transforms leave their frequencies in digit-reversed order; the spectrum of the kernel comes in the same order, and the
// way back starts from it. The recursion is depth first, so that small pieces go forth and back within the cache.
#include "long_conv.h"

#include <bit>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

struct Complex {
  vf re, im;
};

inline Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
inline Complex times_i(Complex a) { return {-a.im, a.re}; }
inline Complex turn(Complex a, float c, float s) { return {a.re * c - a.im * s, a.re * s + a.im * c}; }
inline Complex turn_back(Complex a, float c, float s) { return {a.re * c + a.im * s, a.im * c - a.re * s}; }
inline Complex times(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
inline Complex times_conj(Complex a, Complex b) { return {a.re * b.re + a.im * b.im, a.im * b.re - a.re * b.im}; }

constexpr int64_t P = 2 * W;  // floats of a point: real parts of all lanes, then imaginary parts

inline Complex get(const float* p) { return {load(p), load(p + W)}; }
inline void put(float* p, Complex a) {
  store(p, a.re);
  store(p + W, a.im);
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Points = std::unique_ptr<float[], Free>;
inline Points points(int64_t n) {
  void* p = std::aligned_alloc(64, n * P * sizeof(float));  // n >= 16, so a multiple of 64
  if (!p) throw std::bad_alloc();
  return Points(static_cast<float*>(p));
}

inline void fft4(Complex& a, Complex& b, Complex& c, Complex& d) {
  const Complex t0 = a + c, t1 = a - c, t2 = b + d, t3 = times_i(b - d);
  a = t0 + t2;
  b = t1 - t3;
  c = t0 - t2;
  d = t1 + t3;
}

inline void ifft4(Complex& a, Complex& b, Complex& c, Complex& d) {
  const Complex t0 = a + c, t1 = a - c, t2 = b + d, t3 = times_i(b - d);
  a = t0 + t2;
  b = t1 + t3;
  c = t0 - t2;
  d = t1 - t3;
}

// One stage forth, of m points: from(j) gives the inputs, results go to p.
template <class From>
inline void dif(float* p, int64_t m, const float* w, From&& from) {
  const int64_t q = m / 4;
  for (int64_t j = 0; j < q; ++j, w += 6) {
    Complex a = from(j), b = from(j + q), c = from(j + 2 * q), d = from(j + 3 * q);
    fft4(a, b, c, d);
    put(p + j * P, a);
    put(p + (j + q) * P, turn(b, w[0], w[1]));
    put(p + (j + 2 * q) * P, turn(c, w[2], w[3]));
    put(p + (j + 3 * q) * P, turn(d, w[4], w[5]));
  }
}

// One stage back: inputs from p, results to to(j, value).
template <class To>
inline void dit(const float* p, int64_t m, const float* w, To&& to) {
  const int64_t q = m / 4;
  for (int64_t j = 0; j < q; ++j, w += 6) {
    Complex a = get(p + j * P);
    Complex b = turn_back(get(p + (j + q) * P), w[0], w[1]);
    Complex c = turn_back(get(p + (j + 2 * q) * P), w[2], w[3]);
    Complex d = turn_back(get(p + (j + 3 * q) * P), w[4], w[5]);
    ifft4(a, b, c, d);
    to(j, a);
    to(j + q, b);
    to(j + 2 * q, c);
    to(j + 3 * q, d);
  }
}

inline void dif(float* p, int64_t m, const float* w) {
  dif(p, m, w, [p](int64_t j) { return get(p + j * P); });
}
inline void dit(float* p, int64_t m, const float* w) {
  dit(p, m, w, [p](int64_t j, Complex a) { put(p + j * P, a); });
}

// The last stages in registers, of 4 or of 8 points.
template <int M>
struct Leaf {
  Complex a[M];

  explicit Leaf(const float* p) {
    for (int i = 0; i < M; ++i) a[i] = get(p + i * P);
  }
  void write(float* p) const {
    for (int i = 0; i < M; ++i) put(p + i * P, a[i]);
  }
  static constexpr float h = 0.70710678118654752f;
  void forth() {
    if constexpr (M == 8) {
      Complex t[4];
      for (int i = 0; i < 4; ++i) {
        t[i] = a[i] - a[i + 4];
        a[i] = a[i] + a[i + 4];
      }
      a[4] = t[0];
      a[5] = turn(t[1], h, -h);
      a[6] = {t[2].im, -t[2].re};
      a[7] = turn(t[3], -h, -h);
      fft4(a[4], a[5], a[6], a[7]);
    }
    fft4(a[0], a[1], a[2], a[3]);
  }
  void back() {
    ifft4(a[0], a[1], a[2], a[3]);
    if constexpr (M == 8) {
      ifft4(a[4], a[5], a[6], a[7]);
      const Complex t[4] = {a[4], turn_back(a[5], h, -h), times_i(a[6]), turn_back(a[7], -h, -h)};
      for (int i = 0; i < 4; ++i) {
        a[i + 4] = a[i] - t[i];
        a[i] = a[i] + t[i];
      }
    }
  }
};

// Twiddles of every stage, and the turn of every sample; laid out in long_conv.cpp.
struct Tables {
  const float *turns, *stages[48];

  Tables(const float* p, int64_t n) : turns(p) {
    p += 2 * n;
    for (int64_t m = n; m > 8; m /= 4) {
      stages[std::countr_zero(static_cast<uint64_t>(m))] = p;
      p += 6 * (m / 4);
    }
  }
  const float* of(int64_t m) const { return stages[std::countr_zero(static_cast<uint64_t>(m))]; }
};

// Runs `leaf` on every leaf below m points between one stage forth and, if it comes back, one stage back.
template <bool Back, class OnLeaf>
void walk(const Tables& tables, float* p, int64_t m, int64_t at, OnLeaf&& leaf) {
  if (m <= 8) return leaf(m, at);
  const float* w = tables.of(m);
  dif(p + at * P, m, w);
  for (int64_t i = 0; i < 4; ++i) walk<Back>(tables, p, m / 4, at + i * (m / 4), leaf);
  if constexpr (Back) dit(p + at * P, m, w);
}

template <class OnLeaf>
inline void either(int64_t m, OnLeaf&& leaf) {
  m == 4 ? leaf(std::integral_constant<int, 4>{}) : leaf(std::integral_constant<int, 8>{});
}

// x := inverse(spectrum * transform(x)), the outermost stages apart.
void product(const Tables& tables, float* x, const float* spectrum, int64_t m, int64_t at) {
  walk<true>(tables, x, m, at, [=](int64_t size, int64_t i) {
    either(size, [=](auto M) {
      Leaf<M> u(x + i * P);
      u.forth();
      for (int k = 0; k < M; ++k) u.a[k] = times(u.a[k], get(spectrum + (i + k) * P));
      u.back();
      u.write(x + i * P);
    });
  });
}

void transform(const Tables& tables, float* x, int64_t m, int64_t at) {
  walk<false>(tables, x, m, at, [=](int64_t size, int64_t i) {
    either(size, [=](auto M) {
      Leaf<M> u(x + i * P);
      u.forth();
      u.write(x + i * P);
    });
  });
}

void inverse(const Tables& tables, float* x, int64_t m, int64_t at) {
  if (m <= 8)
    return either(m, [=](auto M) {
      Leaf<M> u(x + at * P);
      u.back();
      u.write(x + at * P);
    });
  for (int64_t i = 0; i < 4; ++i) inverse(tables, x, m / 4, at + i * (m / 4));
  dit(x + at * P, m, tables.of(m));
}

// sum += transform(g) conj(transform(x)); g := inverse(transform(g) conj(spectrum)); the outermost stages apart.
void products(const Tables& tables, float* g, float* x, const float* spectrum, float* sum, int64_t m, int64_t at) {
  if (m <= 8)
    return either(m, [=](auto M) {
      Leaf<M> u(g + at * P);
      u.forth();
      {
        Leaf<M> v(x + at * P);
        v.forth();
        for (int k = 0; k < M; ++k) {
          float* s = sum + (at + k) * P;
          put(s, get(s) + times_conj(u.a[k], v.a[k]));
        }
      }
      for (int k = 0; k < M; ++k) u.a[k] = times_conj(u.a[k], get(spectrum + (at + k) * P));
      u.back();
      u.write(g + at * P);
    });
  const float* w = tables.of(m);
  dif(g + at * P, m, w);
  dif(x + at * P, m, w);
  for (int64_t i = 0; i < 4; ++i) products(tables, g, x, spectrum, sum, m / 4, at + i * (m / 4));
  dit(g + at * P, m, w);
}

// One block of channels: `lanes` of them from `channel` on.
template <class T, bool Full>
struct Block {
  const LongConvArgs& a;
  const Tables& tables;
  int64_t channel;
  int lanes;

  vf read(const T* p) const { return Full ? load(p) : load_n(p, lanes); }
  void write(T* p, vf v) const { Full ? store(p, v) : store_n(p, v, lanes); }

  // Rows are too far apart for the hardware to fetch them ahead of time.
  static constexpr int64_t ahead = 16;

  T* at(const ConvTensor& t, int64_t b) const { return static_cast<T*>(t.data) + b * t.batch + channel; }

  // The samples of a row, those of the state first, turned.
  void enter(const ConvTensor& before, const ConvTensor& rows, int64_t b, float* p) const {
    const int64_t n = a.points, past = a.past, end = past + a.seqlen;
    const T *head = before.data ? at(before, b) : nullptr, *body = at(rows, b);
    auto sample = [&](int64_t i) {
      if (i >= past) {
        const T* row = body + (i - past) * rows.row;
        __builtin_prefetch(row + ahead * rows.row);
        return read(row);
      }
      return head ? read(head + i * before.row) : vf{};
    };
    dif(p, n, tables.of(n), [&](int64_t j) -> Complex {
      const float c = tables.turns[2 * j], s = tables.turns[2 * j + 1];
      if (j >= end) return {vf{}, vf{}};
      const vf low = sample(j);
      if (j + n >= end) return {low * c, low * s};
      return turn({low, sample(j + n)}, c, s);
    });
  }

  // The way out: samples of the state, if anybody wants them, and of the row.
  void leave(const float* p, const ConvTensor& before, const ConvTensor& rows, int64_t b) const {
    const int64_t n = a.points, past = a.past, end = past + a.seqlen;
    T *head = before.data ? at(before, b) : nullptr, *body = at(rows, b);
    auto sample = [&](int64_t i, vf v) {
      if (i >= past) {
        T* row = body + (i - past) * rows.row;
        __builtin_prefetch(row + ahead * rows.row, 1);
        return write(row, v);
      }
      if (head) write(head + i * before.row, v);
    };
    dit(p, n, tables.of(n), [&](int64_t j, Complex z) {
      if (j >= end) return;
      z = turn_back(z, tables.turns[2 * j], tables.turns[2 * j + 1]);
      sample(j, z.re);
      if (j + n < end) sample(j + n, z.im);
    });
  }

  // The spectrum of the kernel, divided by the number of points. Lags before the present lie at the end, negative
  // because t^2N = -1.
  void spectrum(float* p) const {
    const int64_t n = a.points;
    const float scale = 1.0f / static_cast<float>(n);
    std::memset(p, 0, n * P * sizeof(float));
    for (int lane = 0; lane < lanes; ++lane) {
      const float* k = a.kernel + (channel + lane) * a.length;
      auto tap = [&](int64_t j) -> float& { return p[j < n ? j * P + lane : (j - n) * P + W + lane]; };
      for (int64_t j = 0; j < a.length; ++j) tap(j) = scale * k[j];
      if (a.skip) tap(0) += scale * a.skip[channel + lane];
      const float* r = a.reverse ? a.reverse + (channel + lane) * a.reverse_length : nullptr;
      for (int64_t j = 0; r && j < a.reverse_length; ++j) tap(2 * n - 1 - j) = -scale * r[j];
    }
    dif(p, n, tables.of(n), [&](int64_t j) { return turn(get(p + j * P), tables.turns[2 * j], tables.turns[2 * j + 1]); });
    for (int64_t i = 0; i < 4; ++i) transform(tables, p, n / 4, i * (n / 4));
  }

  // The gradient of the kernel from the summed products of spectra.
  void taps(float* p) const {
    const int64_t n = a.points;
    const float scale = 1.0f / static_cast<float>(n);
    for (int64_t i = 0; i < 4; ++i) inverse(tables, p, n / 4, i * (n / 4));
    dit(p, n, tables.of(n), [&](int64_t j, Complex z) {
      put(p + j * P, turn_back(z, scale * tables.turns[2 * j], scale * tables.turns[2 * j + 1]));
    });
    for (int lane = 0; lane < lanes; ++lane) {
      auto tap = [&](int64_t j) { return p[j < n ? j * P + lane : (j - n) * P + W + lane]; };
      float* k = a.dkernel + (channel + lane) * a.length;
      for (int64_t j = 0; j < a.length; ++j) k[j] = tap(j);
      float* r = a.reverse ? a.dreverse + (channel + lane) * a.reverse_length : nullptr;
      for (int64_t j = 0; r && j < a.reverse_length; ++j) r[j] = -tap(2 * n - 1 - j);
    }
  }

  void forward(int64_t part, float* x, float* k) const {
    const int64_t n = a.points;
    spectrum(k);
    for (int64_t b = a.batch * part / a.parts; b < a.batch * (part + 1) / a.parts; ++b) {
      enter(a.state, a.x, b, x);
      for (int64_t i = 0; i < 4; ++i) product(tables, x, k, n / 4, i * (n / 4));
      leave(x, {}, a.y, b);
    }
  }

  void backward(float* g, float* x, float* k, float* sum) const {
    const int64_t n = a.points;
    spectrum(k);
    std::memset(sum, 0, n * P * sizeof(float));
    for (int64_t b = 0; b < a.batch; ++b) {
      enter({}, a.y, b, g);
      enter(a.state, a.x, b, x);
      for (int64_t i = 0; i < 4; ++i) products(tables, g, x, k, sum, n / 4, i * (n / 4));
      leave(g, a.dstate, a.dx, b);
    }
    taps(sum);
  }
};

template <class F>
void with_block(const LongConvArgs& a, const Tables& tables, int64_t block, F&& f) {
  const int64_t channel = block * W;
  const int lanes = static_cast<int>(a.d - channel < W ? a.d - channel : W);
  auto typed = [&]<class T>(T) {
    lanes == W ? f(Block<T, true>{a, tables, channel, lanes}) : f(Block<T, false>{a, tables, channel, lanes});
  };
  a.bf16 ? typed(bf16{}) : typed(float{});
}

}  // namespace

void long_conv_fwd(const LongConvArgs& a, int64_t begin, int64_t end) {
  const Tables tables(a.tables, a.points);
  const Points x = points(a.points), k = points(a.points);
  for (int64_t task = begin; task < end; ++task)
    with_block(a, tables, task / a.parts, [&](auto block) { block.forward(task % a.parts, x.get(), k.get()); });
}

void long_conv_bwd(const LongConvArgs& a, int64_t begin, int64_t end) {
  const Tables tables(a.tables, a.points);
  const Points g = points(a.points), x = points(a.points), k = points(a.points), sum = points(a.points);
  for (int64_t task = begin; task < end; ++task)
    with_block(a, tables, task, [&](auto block) { block.backward(g.get(), x.get(), k.get(), sum.get()); });
}

}  // namespace seqlib::SEQLIB_ISA

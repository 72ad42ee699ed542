// With l = a T + b, decay^l = (decay^T)^a decay^b: for every channel a table of coarse powers meets one of fine powers,
// both made by products in float64, so that angles of 10^5 radians keep their digits.
#include "diag_kernel.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "gemm.h"

namespace seqlib::SEQLIB_ISA {
namespace {

struct Sizes {
  int64_t fine, count, rows, n;  // fine powers, coarse ones, the same padded, and states padded

  explicit Sizes(const DiagKernelArgs& a) : fine(64) {
    while (fine * fine < a.length) fine *= 2;
    count = (a.length + fine - 1) / fine;
    rows = round_up(count, kRows);
    n = padded(a.n);
  }
};

// decay^(step k), k < count: row k of the table holds the real parts of n states and, `part` further on, the imaginary
// ones.
class Powers {
 public:
  explicit Powers(int64_t n) : n_(n), numbers_(4 * n) {}

  void operator()(const double* log_decay, int64_t step, int64_t count, float* table, int64_t row, int64_t part) {
    double *re = numbers_.data(), *im = re + n_, *by_re = im + n_, *by_im = by_re + n_;
    for (int64_t i = 0; i < n_; ++i) {
      const double size = std::exp(step * log_decay[2 * i]), angle = step * log_decay[2 * i + 1];
      re[i] = 1, im[i] = 0;
      by_re[i] = size * std::cos(angle), by_im[i] = size * std::sin(angle);
    }
    for (int64_t k = 0; k < count; ++k, table += row) {
#pragma GCC ivdep
      for (int64_t i = 0; i < n_; ++i) {
        const double x = re[i], y = im[i];
        table[i] = static_cast<float>(x);
        table[part + i] = static_cast<float>(y);
        re[i] = x * by_re[i] - y * by_im[i];
        im[i] = x * by_im[i] + y * by_re[i];
      }
    }
  }

 private:
  int64_t n_;
  std::vector<double> numbers_;
};

// out = A B, out and B with `columns` columns.
inline void product(const float* a, int64_t rows, int64_t steps, const float* b, int64_t columns, float* out) {
  tiles(rows, columns / W, [=]<int R, int V>(int64_t i, int64_t column) {
    Tile<R, V> t{};
    add_product(t, a + i * steps, steps, 1, b + column, columns, steps);
    each(t, [=](vf v, int r, int k) { store(out + (i + r) * columns + column + k * W, v); });
  });
}

}  // namespace

void diag_kernel_fwd(const DiagKernelArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const Sizes s(a);
  const int64_t row = 2 * s.n;
  Scratch scratch((2 * s.fine + 2 * s.rows) * row + s.rows * s.fine);
  float *fine = scratch.take(s.fine, row), *across = scratch.take(row, s.fine);
  float *coarse = scratch.take(s.rows, row), *left = scratch.take(s.rows, row), *out = scratch.take(s.rows, s.fine);
  Powers powers(a.n);
  for (int64_t d = begin; d < end; ++d) {
    const double* log_decay = a.log_decay + 2 * d * a.n;
    powers(log_decay, 1, s.fine, fine, row, s.n);
    pack_transposed(fine, row, s.fine, row, across, s.fine, s.fine);
    powers(log_decay, s.fine, s.count, coarse, row, s.n);
    for (int64_t c = d * a.c; c < (d + 1) * a.c; ++c) {
      const float* w = a.weight + 2 * c * a.n;
      for (int64_t k = 0; k < s.count; ++k) {
        const float *re = coarse + k * row, *im = re + s.n;
        float* to = left + k * row;
        for (int64_t i = 0; i < a.n; ++i) {
          to[i] = w[2 * i] * re[i] - w[2 * i + 1] * im[i];
          to[s.n + i] = -w[2 * i] * im[i] - w[2 * i + 1] * re[i];
        }
      }
      product(left, s.rows, row, across, s.fine, out);
      std::memcpy(a.kernel + c * a.length, out, a.length * sizeof(float));
    }
  }
}

// With S = sum_l dK_l decay^l and S' = sum_l l dK_l decay^l: dweight = conj S and dlog_decay = conj(weight S').
void diag_kernel_bwd(const DiagKernelArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const Sizes s(a);
  const int64_t row = 2 * s.n, wide = 4 * s.n;
  Scratch scratch(s.fine * wide + s.rows * (row + wide + s.fine) + wide);
  float *fine = scratch.take(s.fine, wide), *coarse = scratch.take(s.rows, row), *sums = scratch.take(s.rows, wide);
  float *given = scratch.take(s.rows, s.fine), *total = scratch.take(1, wide);
  Powers powers(a.n);
  for (int64_t d = begin; d < end; ++d) {
    const double* log_decay = a.log_decay + 2 * d * a.n;
    powers(log_decay, 1, s.fine, fine, wide, s.n);
    for (int64_t b = 0; b < s.fine; ++b)
      for (int64_t i = 0; i < row; i += W)
        store(fine + b * wide + row + i, load(fine + b * wide + i) * static_cast<float>(b));
    powers(log_decay, s.fine, s.count, coarse, row, s.n);
    double* dlog_decay = a.dlog_decay + 2 * d * a.n;
    std::memset(dlog_decay, 0, 2 * a.n * sizeof(double));
    for (int64_t c = d * a.c; c < (d + 1) * a.c; ++c) {
      std::memcpy(given, a.dkernel + c * a.length, a.length * sizeof(float));
      product(given, s.rows, s.fine, fine, wide, sums);
      for (int64_t i = 0; i < s.n; i += W) {
        vf re{}, im{}, at_re{}, at_im{};
        for (int64_t k = 0; k < s.count; ++k) {
          const float *p = coarse + k * row + i, *q = sums + k * wide + i;
          const float from = static_cast<float>(k * s.fine);
          const vf x = load(p), y = load(p + s.n), u = load(q), v = load(q + s.n);
          const vf at_u = load(q + row) + from * u, at_v = load(q + row + s.n) + from * v;
          re += x * u - y * v, im += x * v + y * u;
          at_re += x * at_u - y * at_v, at_im += x * at_v + y * at_u;
        }
        store(total + i, re), store(total + s.n + i, im);
        store(total + row + i, at_re), store(total + row + s.n + i, at_im);
      }
      const float* w = a.weight + 2 * c * a.n;
      for (int64_t i = 0; i < a.n; ++i) {
        const double x = total[row + i], y = total[row + s.n + i];
        a.dweight[2 * (c * a.n + i)] = total[i];
        a.dweight[2 * (c * a.n + i) + 1] = -total[s.n + i];
        dlog_decay[2 * i] += w[2 * i] * x - w[2 * i + 1] * y;
        dlog_decay[2 * i + 1] -= w[2 * i] * y + w[2 * i + 1] * x;
      }
    }
  }
}

namespace {

template <size_t... I>
inline vf swap_pairs(vf a, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, a, (I ^ 1)...);
}

// Both lanes of a pair hold its real part, or minus and plus its imaginary part.
template <size_t... I>
inline vf real_twice(vf a, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, a, (I & ~size_t{1})...);
}
template <size_t... I>
inline vf imag_twice(vf a, std::index_sequence<I...>) {
  return __builtin_shufflevector(-a, a, (I % 2 == 0 ? I + 1 : I + W)...);
}

template <bool Pairs>
inline void advance(const DiagStepArgs& a, int64_t row, int64_t block) {
  constexpr std::make_index_sequence<W> all;
  for (int64_t first = block * diag_step_block; first < std::min(a.d, (block + 1) * diag_step_block); first += W) {
    vf y[W] = {};
    const int64_t channels = std::min<int64_t>(W, a.d - first);
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t channel = first + i;
      const float *decay = a.decay + channel * a.m, *B = a.B + channel * a.m, *C = a.C + channel * a.m;
      float* state = a.state + (row * a.d + channel) * a.m;
      const float x = a.x[row * a.d + channel];
      for (int64_t j = 0; j < a.m; j += W) {
        const int64_t lanes = a.m - j;
        const vf h = get(state + j, lanes), by = get(decay + j, lanes);
        vf next = get(B + j, lanes) * x;
        if constexpr (Pairs)
          next += real_twice(by, all) * h + imag_twice(by, all) * swap_pairs(h, all);
        else
          next += by * h;
        put(state + j, next, lanes);
        y[i] += get(C + j, lanes) * next;
      }
    }
    const vf x = get(a.x + row * a.d + first, channels), D = get(a.D + first, channels);
    put(a.y + row * a.d + first, lane_sums(y) + D * x, channels);
  }
}

}  // namespace

void diag_step(const DiagStepArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t blocks = (a.d + diag_step_block - 1) / diag_step_block;
  for (int64_t task = begin; task < end; ++task)
    a.pairs ? advance<true>(a, task / blocks, task % blocks) : advance<false>(a, task / blocks, task % blocks);
}

}  // namespace seqlib::SEQLIB_ISA

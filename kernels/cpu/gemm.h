// Products of small packed matrices, the blocks that chunked forms are made of. Kernel files only, like vec.h.
//
// A packed matrix has rows at a fixed distance that is a multiple of 8 and of W, and zeros where it is padded. Products
// read the left factor one number at a time, through any two strides, and the right factor in whole vectors.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <utility>

#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

// Vectors of the widest tile. Four rows of three make 12 sums, 3 vectors of the right factor and one number of the left:
// all 16 registers of AVX2. With 32 registers, four rows of four.
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 3;
#endif
constexpr int kRows = 8;  // rows of products come in multiples of this

// Rows of a tile of V vectors: enough sums to hide the latency of an FMA, few enough to stay in registers.
template <int V>
constexpr int rows_of = V <= kTileVectors / 2 ? 8 : 4;

// How wide the next tile is: a last tile of one vector would load a number of the left factor for every FMA.
constexpr int64_t tile_width(int64_t vectors) {
  if (vectors == kTileVectors + 1) return (vectors + 1) / 2;
  return std::min<int64_t>(vectors, kTileVectors);
}

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t padded(int64_t n) { return round_up(n, std::max(W, kRows)); }

template <int R, int V>
using Tile = vf[R][V];

// c += A B over `count` steps. A starts at the tile's first row: row stride a_row, step stride a_step.
template <int R, int V>
inline __attribute__((always_inline)) void add_product(Tile<R, V>& c, const float* a, int64_t a_row, int64_t a_step,
                                                       const float* b, int64_t b_row, int64_t count) {
  for (int64_t k = 0; k < count; ++k, a += a_step, b += b_row) {
    vf x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) x[v] = load(b + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf s = splat(a[r * a_row]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] += s * x[v];
    }
  }
}

template <int R, int V, class F>
inline __attribute__((always_inline)) void each(Tile<R, V>& c, F&& f) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) f(c[r][v], r, v);
}

// A function of its own: inlined, its sums would compete for registers with all that is alive around it.
template <int V, class F>
__attribute__((noinline)) void down_rows(int64_t rows, int64_t column, F& f) {
  constexpr int R = rows_of<V>;
  for (int64_t i = 0; i < rows; i += R) f.template operator()<R, V>(i, column);
}

template <int V = kTileVectors, class F>
inline void down_rows_of(int64_t width, int64_t rows, int64_t column, F& f) {
  if constexpr (V > 1)
    if (width < V) return down_rows_of<V - 1>(width, rows, column, f);
  down_rows<V>(rows, column, f);
}

// Calls f<R, V>(first row, first column) for tiles that cover `rows` (a multiple of kRows) by `vectors` vectors.
template <class F>
inline void tiles(int64_t rows, int64_t vectors, F&& f) {
  for (int64_t column = 0; vectors > 0;) {
    const int64_t width = tile_width(vectors);
    down_rows_of(width, rows, column, f);
    column += width * W;
    vectors -= width;
  }
}

template <int S, size_t... L>
inline void swap_runs(vf& a, vf& b, std::index_sequence<L...>) {
  const vf low = __builtin_shufflevector(a, b, (L & S ? W + L - S : L)...);
  b = __builtin_shufflevector(a, b, (L & S ? W + L : L + S)...);
  a = low;
}

template <int S = 1>
inline void transpose(vf (&r)[W]) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & S)) swap_runs<S>(r[i], r[i + S], std::make_index_sequence<W>{});
    transpose<S * 2>(r);
  }
}

template <class T>
inline vf get(const T* p, int64_t lanes) {
  return lanes >= W ? load(p) : load_n(p, static_cast<int>(lanes));
}

template <class T>
inline void put(T* p, vf v, int64_t lanes) {
  lanes >= W ? store(p, v) : store_n(p, v, static_cast<int>(lanes));
}

// `count` rows of `width` numbers to packed rows, f(vector, row) applied; rows up to `rows` become zero.
template <class T, class F>
inline void pack(const T* from, int64_t stride, int64_t count, int64_t width, float* to, int64_t to_row, int64_t rows,
                 F&& f) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; j += W) store(to + i * to_row + j, f(get(from + i * stride + j, width - j), i));
  for (int64_t i = count; i < rows; ++i)
    for (int64_t j = 0; j < width; j += W) store(to + i * to_row + j, vf{});
}

// The same transposed: column i of `to` is row i of `from`, columns up to `columns` become zero.
template <class T>
inline void pack_transposed(const T* from, int64_t stride, int64_t count, int64_t width, float* to, int64_t to_row,
                            int64_t columns) {
  for (int64_t i = 0; i < columns; i += W)
    for (int64_t j = 0; j < width; j += W) {
      vf r[W];
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) r[k] = i + k < count ? get(from + (i + k) * stride + j, width - j) : vf{};
      transpose(r);
#pragma GCC unroll 16
      for (int k = 0; k < W; ++k) store(to + (j + k) * to_row + i, r[k]);
    }
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};

// Scratch memory of one thread, zeroed, handed out in pieces.
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : memory_(static_cast<float*>(std::aligned_alloc(64, round_up(count * 4, 64)))), next_(memory_.get()) {
    std::fill(next_, next_ + count, 0.0f);
  }
  float* take(int64_t rows, int64_t row) {
    float* piece = next_;
    next_ += rows * row;
    return piece;
  }

 private:
  std::unique_ptr<float, Free> memory_;
  float* next_;
};

}  // namespace
}  // namespace seqlib::SEQLIB_ISA

// Products of blocks of rows that stay in the cache; what is elementwise is done while a block is there. The weight is
// packed into panels of 64 columns, the left factor is read one number at a time; six rows of sums hide the latency of
// an FMA and leave room for the next vectors of a panel.
#include "gelu_glu.h"

#include <algorithm>
#include <cstring>

#include "gemm.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int64_t kPanel = 64, kRowsBack = 96;
constexpr int V = kTileVectors, R = 6;

// Phi(x) = (1 + erf(x / sqrt 2)) / 2, and the density at x. Abramowitz & Stegun 7.1.26, 1e-7 of Phi.
struct Normal {
  vf below, density;

  explicit Normal(vf x) {
    const vf size = max(x, -x), t = 1.0f / (1.0f + 0.23164189f * size), bell = exp(-0.5f * x * x);
    vf p = t * 1.061405429f - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const vf tail = 0.5f * p * t * bell;
    below = x < 0.0f ? tail : 1.0f - tail;
    density = 0.3989422804f * bell;
  }
};

inline vf gelu(vf x) { return x * Normal(x).below; }
inline vf gelu_grad(vf x) {
  const Normal n(x);
  return n.below + x * n.density;
}

// Rows of x from `first` on, f applied, packed at a distance of `to_row`; zeros below them.
template <class F>
void rows_of_x(const GeluGluArgs& a, int64_t first, int64_t count, int64_t rows, float* to, int64_t to_row, F&& f) {
  pack(a.x + first * a.d_in, a.d_in, count, a.d_in, to, to_row, rows, f);
}

}  // namespace

void gelu_glu_pack_fwd(const GeluGluArgs& a, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    float* to = a.packed + p * a.d_in * kPanel;
    for (int64_t j = 0; j < kPanel; ++j) {
      // V / 2 vectors of values and as many of gates take turns, so that a tile holds both of a channel.
      const int64_t half = V / 2 * W, tile = j / (2 * half), within = j % (2 * half);
      const int64_t channel = p * kPanel / 2 + tile * half + within % half;
      const float* from = a.weight + (channel + (within < half ? 0 : a.d_out)) * a.d_in;
      for (int64_t k = 0; k < a.d_in; ++k) to[k * kPanel + j] = channel < a.d_out ? from[k] : 0.0f;
    }
  }
}

void gelu_glu_pack_bwd(const GeluGluArgs& a, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    float* to = a.packed + p * 2 * a.d_out * kPanel;
    const int64_t width = std::min(kPanel, a.d_in - p * kPanel);
    for (int64_t i = 0; i < 2 * a.d_out; ++i) {
      std::memcpy(to + i * kPanel, a.weight + i * a.d_in + p * kPanel, width * sizeof(float));
      std::fill(to + i * kPanel + width, to + (i + 1) * kPanel, 0.0f);
    }
  }
}

void gelu_glu_fwd(const GeluGluArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  constexpr int64_t half = V / 2 * W;
  const int64_t row = round_up(a.d_in, W) + W;
  Scratch scratch(gelu_glu_rows * row);
  float* block = scratch.take(gelu_glu_rows, row);
  for (int64_t first = begin * gelu_glu_rows; first < std::min(a.rows, end * gelu_glu_rows); first += gelu_glu_rows) {
    const int64_t count = std::min(gelu_glu_rows, a.rows - first);
    rows_of_x(a, first, count, gelu_glu_rows, block, row, [](vf x, int64_t) { return gelu(x); });
    for (int64_t at = 0; at < a.d_out; at += half) {
      const float* panel = a.packed + at / 32 * a.d_in * kPanel + 2 * (at % 32);
      vf bias[V];
      for (int v = 0; v < V; ++v) {
        const int64_t channel = at + v % (V / 2) * W, lanes = a.d_out - channel;
        bias[v] = a.bias && lanes > 0 ? get(a.bias + channel + (v < V / 2 ? 0 : a.d_out), lanes) : vf{};
      }
      for (int64_t i = 0; i < count; i += R) {
        Tile<R, V> t;
        each(t, [&](vf& sum, int, int v) { sum = bias[v]; });
        add_product(t, block + i * row, row, 1, panel, kPanel, a.d_in);
        for (int64_t r = 0; r < std::min<int64_t>(R, count - i); ++r)
          for (int v = 0; v < V / 2; ++v) {
            const int64_t channel = at + v * W, lanes = a.d_out - channel;
            if (lanes <= 0) break;
            const vf value = t[r][v], gate = t[r][v + V / 2];
            put(a.y + (first + i + r) * a.d_out + channel, value * sigmoid(gate), lanes);
            if (!a.mixed) continue;
            float* mixed = a.mixed + (first + i + r) * 2 * a.d_out + channel;
            put(mixed, value, lanes);
            put(mixed + a.d_out, gate, lanes);
          }
      }
    }
  }
}

// dm = (dy s, dy v s (1 - s)), s = sigmoid(g):  dx = gelu'(x) dm weight,  dweight = dm^T gelu(x),  dbias = sum dm.
void gelu_glu_bwd(const GeluGluArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t d = 2 * a.d_out, d_rows = round_up(d, R), columns = round_up(a.d_in, kPanel);
  // Distances that are no power of two, so that a column does not fall on a few lines of the cache.
  const int64_t row = round_up(d_rows, 16) + 16, x_row = columns + 16;
  Scratch scratch(kRowsBack * (row + x_row) + d_rows * columns + round_up(d, W));
  float *dm = scratch.take(kRowsBack, row), *block = scratch.take(kRowsBack, x_row);
  float *dweight = scratch.take(d_rows, columns), *dbias = scratch.take(1, round_up(d, W));
  for (int64_t part = begin; part < end; ++part) {
    std::fill(dweight, dweight + d_rows * columns, 0.0f);
    std::fill(dbias, dbias + d, 0.0f);
    const int64_t last = a.rows * (part + 1) / a.parts;
    for (int64_t first = a.rows * part / a.parts; first < last; first += kRowsBack) {
      const int64_t count = std::min(kRowsBack, last - first);
      for (int64_t i = 0; i < count; ++i) {
        const float *dy = a.dy + (first + i) * a.d_out, *mixed = a.mixed + (first + i) * d;
        float* to = dm + i * row;
        for (int64_t j = 0; j < a.d_out; j += W) {
          const int64_t lanes = a.d_out - j;
          const vf s = sigmoid(get(mixed + a.d_out + j, lanes)), dv = get(dy + j, lanes) * s;
          const vf dg = dv * get(mixed + j, lanes) * (1.0f - s);
          put(to + j, dv, lanes), put(to + a.d_out + j, dg, lanes);
          put(dbias + j, get(dbias + j, lanes) + dv, lanes);
          put(dbias + a.d_out + j, get(dbias + a.d_out + j, lanes) + dg, lanes);
        }
      }
      const int64_t filled = round_up(count, R);
      for (int64_t i = count; i < filled; ++i) std::fill(dm + i * row, dm + i * row + d, 0.0f);
      rows_of_x(a, first, count, count, block, x_row, [](vf x, int64_t) { return gelu(x); });
      for (int64_t at = 0; at < columns; at += V * W) {
        const float* panel = a.packed + at / kPanel * d * kPanel + at % kPanel;
        for (int64_t i = 0; i < count; i += R) {
          Tile<R, V> t{};
          add_product(t, dm + i * row, row, 1, panel, kPanel, d);
          for (int64_t r = 0; r < std::min<int64_t>(R, count - i); ++r)
            for (int v = 0; v < V; ++v) {
              const int64_t channel = at + v * W, lanes = a.d_in - channel, place = (first + i + r) * a.d_in + channel;
              if (lanes > 0) put(a.dx + place, t[r][v] * gelu_grad(get(a.x + place, lanes)), lanes);
            }
        }
        for (int64_t i = 0; i < d; i += R) {
          float* sums = dweight + i * columns + at;
          Tile<R, V> t;
          each(t, [=](vf& sum, int r, int v) { sum = load(sums + r * columns + v * W); });
          add_product(t, dm + i, 1, row, block + at, x_row, count);
          each(t, [=](vf sum, int r, int v) { store(sums + r * columns + v * W, sum); });
        }
      }
    }
    for (int64_t i = 0; i < d; ++i)
      std::memcpy(a.dweight + (part * d + i) * a.d_in, dweight + i * columns, a.d_in * sizeof(float));
    std::memcpy(a.dbias + part * d, dbias, d * sizeof(float));
  }
}

}  // namespace seqlib::SEQLIB_ISA

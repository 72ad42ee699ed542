// Four tokens of one head at a time. With E_t the decay from before the tile to token t, P_ts that from s to t and S the
// state before the tile (lanes are its columns):
//
//     e_t = v_t - (E_t k_t) S - sum_{s<t} (k_t P_ts k_s) u_s        u_t = beta_t e_t
//     y_t = (E_t q_t) S + sum_{s<=t} (q_t P_ts k_s) u_s             S' = E_3 S + sum_s (P_3s k_s) u_s^T
//
// Four tokens share each load of S and cost 13 multiply-adds per entry of S instead of 16; more would need more registers
// than there are for little less work.
#pragma once

#include <cstdlib>

#include "delta_rule.h"
#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int C = 4;                    // tokens of a tile
constexpr int NC = W == 16 ? 2 : 1;     // vectors of columns worked on together: 2 C NC sums stay in registers
constexpr int64_t columns = NC * W;
constexpr int64_t width = delta_max_state + 16;  // an odd number of lines, so that streams do not share cache sets

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

class Scratch {
  void* memory;

 public:
  explicit Scratch(int64_t floats) : memory(std::aligned_alloc(64, round_up(floats * 4 + 64, 64))) {}
  ~Scratch() { std::free(memory); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* get() const { return static_cast<float*>(memory); }
};

template <class T>
inline vf get(const T* p, int64_t lanes) {
  return lanes >= W ? load(p) : lanes > 0 ? load_n(p, static_cast<int>(lanes)) : vf{};
}

template <class T>
inline void put(T* p, vf v, int64_t lanes) {
  if (lanes >= W)
    store(p, v);
  else if (lanes > 0)
    store_n(p, v, static_cast<int>(lanes));
}

// One head of one row of the batch.
struct Head {
  int64_t b, h;
};

struct alignas(64) Tile {
  float in[2 * C][width];                // E_t k_t, then scale E_t q_t
  float out[C][width], whole[width];     // P_3t k_t; E_3
  float kk[C][C], qk[C][C];              // k_t P_ts k_s for s < t; scale q_t P_ts k_s for s <= t
  float beta[C];
};

// Lane l of the result is the sum over the lanes of v[l], for any number of vectors.
template <int N>
inline void sums_of(const vf (&v)[N], float* out) {
  static_assert(N % W == 0);
  for (int i = 0; i < N; i += W) {
    vf some[W];
    for (int j = 0; j < W; ++j) some[j] = v[i + j];
    store(out + i, lane_sums(some));
  }
}

// The decay of token t for lanes of d_state from n on.
template <Decay D>
inline vf decay_at(const DeltaArgs& a, const Head& at, int64_t t, int64_t n) {
  const int64_t token = (at.b * a.seqlen + t) * a.nheads + at.h;
  if constexpr (D == Decay::channel) return exp(get(a.log_decay + token * a.d_state + n, a.d_state - n));
  if constexpr (D == Decay::token) return exp(splat(a.log_decay[token]));
  return splat(1.0f);
}

// Everything about tokens [begin, begin + count) that does not depend on the state; absent tokens change nothing.
template <class T, Decay D>
inline void prepare(const DeltaArgs& a, const Head& at, int64_t begin, int64_t count, Tile& tile) {
  constexpr int pairs = C * C;
  vf sum[pairs] = {};
  vf decay[C];
  for (int t = 0; t < C; ++t) {
    decay[t] = D == Decay::token && t < count ? decay_at<D>(a, at, begin + t, 0) : splat(1.0f);
    tile.beta[t] = t < count ? a.beta[(at.b * a.seqlen + begin + t) * a.nheads + at.h] : 0.0f;
  }
  for (int64_t n = 0; n < a.d_state; n += W) {
    vf in = splat(1.0f), carried[C];
#pragma GCC unroll 4
    for (int t = 0; t < C; ++t) {
      vf k = {}, q = {};
      if (t < count) {
        k = get(a.k.at<T>(at.b, begin + t, at.h) + n, a.d_state - n);
        q = get(a.q.at<T>(at.b, begin + t, at.h) + n, a.d_state - n) * a.scale;
        if constexpr (D == Decay::channel) decay[t] = decay_at<D>(a, at, begin + t, n);
      }
      if constexpr (D != Decay::none) in *= decay[t];
#pragma GCC unroll 4
      for (int s = 0; s < C; ++s) {
        if (s > t) continue;
        if constexpr (D != Decay::none)
          if (s < t) carried[s] *= decay[t];
        if (s == t) carried[s] = k;
        // kk[t][s] and qk[t][s] for s < t, and qk[t][t], share 16 places: the first uses those above the diagonal.
        if (s < t) sum[s * C + t] += k * carried[s];
        sum[t * C + s] += q * carried[s];
      }
      store(tile.in[t] + n, D == Decay::none ? k : k * in);
      store(tile.in[C + t] + n, D == Decay::none ? q : q * in);
    }
    for (int t = 0; t < C; ++t) store(tile.out[t] + n, carried[t]);
    if constexpr (D != Decay::none) store(tile.whole + n, in);
  }
  float scores[pairs];
  sums_of(sum, scores);
  for (int t = 0; t < C; ++t)
    for (int s = 0; s <= t; ++s) {
      tile.kk[t][s] = scores[s * C + t];
      tile.qk[t][s] = scores[t * C + s];
    }
}

// What R rows over d_state read from a block of columns of the state, stored as (d_state, columns).
template <int R>
inline void read(const float* S, const float (*rows)[width], int64_t d_state, vf (&found)[R][NC]) {
  vf sum[R][NC] = {};
  for (int64_t n = 0; n < d_state; ++n) {
    vf s[NC];
    for (int i = 0; i < NC; ++i) s[i] = load(S + n * columns + i * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < NC; ++i) sum[r][i] += s[i] * rows[r][n];
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NC; ++i) found[r][i] = sum[r][i];
}

// Blocks whose columns all exist have code of their own: a partial load calls memcpy, and where that might happen vectors
// do not stay in registers.
template <bool Whole, class T>
inline vf get_block(const T* p, int64_t lanes) {
  if constexpr (Whole) return load(p);
  return get(p, lanes);
}

template <bool Whole, class T>
inline void put_block(T* p, vf v, int64_t lanes) {
  if constexpr (Whole)
    store(p, v);
  else
    put(p, v, lanes);
}

// e_t for a block of columns from c on, given what the keys read.
template <class T, bool Whole, int R>
inline void errors(const DeltaArgs& a, const Head& at, int64_t begin, int64_t count, int64_t c, const Tile& tile,
                   const vf (&found)[R][NC], vf (&e)[C][NC]) {
#pragma GCC unroll 4
  for (int t = 0; t < C; ++t) {
    const T* v = t < count ? a.v.at<T>(at.b, begin + t, at.h) + c : nullptr;
    for (int i = 0; i < NC; ++i) {
      vf x = (v ? get_block<Whole>(v + i * W, a.headdim - c - i * W) : vf{}) - found[t][i];
      for (int s = 0; s < t; ++s) x -= e[s][i] * (tile.kk[t][s] * tile.beta[s]);
      e[t][i] = x;
    }
  }
}

// to = E_3 from + out^T u, for a block of columns; `to` may be `from`.
template <Decay D>
inline void write(const float* from, float* to, const Tile& tile, int64_t d_state, const vf (&u)[C][NC]) {
  for (int64_t n = 0; n < d_state; ++n)
    for (int i = 0; i < NC; ++i) {
      vf s = load(from + n * columns + i * W);
      if constexpr (D != Decay::none) s *= tile.whole[n];
#pragma GCC unroll 4
      for (int t = 0; t < C; ++t) s += u[t][i] * tile.out[t][n];
      store(to + n * columns + i * W, s);
    }
}

// Columns [c, c + columns) of a (d_state, headdim) state into the blocked layout of the scratch, and back.
inline void gather(const float* state, float* S, int64_t d_state, int64_t headdim, int64_t c) {
  for (int64_t n = 0; n < d_state; ++n)
    for (int i = 0; i < NC; ++i) store(S + n * columns + i * W, get(state + n * headdim + c + i * W, headdim - c - i * W));
}

inline void scatter(const float* S, float* state, int64_t d_state, int64_t headdim, int64_t c) {
  for (int64_t n = 0; n < d_state; ++n)
    for (int i = 0; i < NC; ++i) put(state + n * headdim + c + i * W, load(S + n * columns + i * W), headdim - c - i * W);
}

inline void clear(float* S, int64_t floats) {
  for (int64_t i = 0; i < floats; i += W) store(S + i, vf{});
}

}  // namespace
}  // namespace seqlib::SEQLIB_ISA

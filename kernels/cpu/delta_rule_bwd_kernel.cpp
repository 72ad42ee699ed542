// The delta rule, backward: pieces from last to first. In a piece the states before each tile are computed again from the
// saved one; then tiles go from last to first with G, the gradient of the state after the tile (d stands for gradient):
//
//     du_t = G^T out_t + sum_{s>=t} qk_st dy_s - sum_{s>t} kk_st de_s      de_t = dv_t = beta_t du_t
//     dout_t = G u_t     d(E q)_t = S dy_t     d(E k)_t = -S de_t     dE_3 = rows of G * S
//     dqk_ts = dy_t . u_s     dkk_ts = -de_t . u_s     G' = E_3 G + sum_t (E q)_t dy_t^T - (E k)_t de_t^T
//
// What multiplies decays is then taken apart per entry of d_state, where the gradient of a log decay is the sum of
// everything that it scales, and of nothing else: taken from larger sums, what strong decays leave would be rounded away.
#include "delta_rule_tile.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int tiles = delta_piece / C;
constexpr int dots = 3 * C + 1;  // dout, d(E k), d(E q), dE_3
constexpr int scalars = 32;      // dkk above and dqk on and below the diagonal (16), dbeta (4), padded

struct alignas(64) Gradients {
  float dot[dots][width];
  vf partial[dots][W];  // of W rows of the state, before the sum over lanes
  vf scalar[scalars];
};

// One tile's corrections and gradients of columns, each (C, padded headdim).
struct Columns {
  float *e, *u, *de, *dy;
  int64_t padded;
};

template <class T, Decay D>
struct Backward {
  const DeltaGradArgs& g;
  const DeltaArgs& a = g.forward;
  const int64_t blocks = (a.headdim + columns - 1) / columns, block_size = a.d_state * columns;
  const int64_t size = blocks * block_size, padded = blocks * columns;
  Scratch scratch{(tiles + 2) * size + (tiles + 3) * C * padded};
  float* states = scratch.get();
  float* G = states + (tiles + 1) * size;
  float* errors_of = G + size;  // (tiles, C, padded)
  float* rest = errors_of + tiles * C * padded;
  Tile tile;
  Gradients made;
  Head at{};

  template <class F>
  void each_block(F&& f) {
    for (int64_t i = 0; i < blocks; ++i) f(i * block_size, i * columns);
  }

  void head(int64_t task) {
    at = {task / a.nheads, task % a.nheads};
    const int64_t state_size = a.d_state * a.headdim;
    if (g.dfinal)
      each_block([&](int64_t i, int64_t c) {
        gather(g.dfinal + task * state_size, G + i, a.d_state, a.headdim, c);
      });
    else
      clear(G, size);
    for (int64_t p = a.first_piece[at.b + 1]; p-- > a.first_piece[at.b];) {
      const DeltaPiece& piece = a.pieces[p];
      if (piece.saved == delta_fresh)
        clear(states, size);
      else
        each_block([&](int64_t i, int64_t c) {
          gather(a.saved + (piece.saved * a.nheads + at.h) * state_size, states + i, a.d_state, a.headdim, c);
        });
      const int64_t count = (piece.end - piece.begin + C - 1) / C;
      for (int64_t i = 0; i < count; ++i) again(piece, i, i + 1 < count);
      for (int64_t i = count; i-- > 0;) reverse(piece, i);
      if (piece.saved == delta_fresh) clear(G, size);
    }
    if (g.dstate)
      each_block([&](int64_t i, int64_t c) {
        scatter(G + i, g.dstate + task * state_size, a.d_state, a.headdim, c);
      });
  }

  // Forward over tile i: its errors, and the state before the next tile.
  void again(const DeltaPiece& piece, int64_t i, bool more) {
    const int64_t begin = piece.begin + i * C, count = piece.end - begin < C ? piece.end - begin : C;
    prepare<T, D>(a, at, begin, count, tile);
    each_block([&](int64_t block, int64_t c) {
      float* S = states + i * size + block;
      float* next = more ? S + size : nullptr;
      float* e = errors_of + i * C * padded + c;
      a.headdim - c >= columns ? again_block<true>(begin, count, c, S, next, e)
                               : again_block<false>(begin, count, c, S, next, e);
    });
  }

  template <bool Whole>
  void again_block(int64_t begin, int64_t count, int64_t c, const float* S, float* next, float* e_of) {
    vf found[C][NC], e[C][NC];
    read<C>(S, tile.in, a.d_state, found);
    errors<T, Whole>(a, at, begin, count, c, tile, found, e);
#pragma GCC unroll 4
    for (int t = 0; t < C; ++t)
      for (int j = 0; j < NC; ++j) {
        store(e_of + t * padded + j * W, e[t][j]);
        e[t][j] *= tile.beta[t];
      }
    if (next) write<D>(S, next, tile, a.d_state, e);
  }

  void reverse(const DeltaPiece& piece, int64_t i) {
    const int64_t begin = piece.begin + i * C, count = piece.end - begin < C ? piece.end - begin : C;
    prepare<T, D>(a, at, begin, count, tile);
    const Columns x{errors_of + i * C * padded, rest, rest + C * padded, rest + 2 * C * padded, padded};
    for (vf& sum : made.scalar) sum = vf{};
    each_block([&](int64_t block, int64_t c) {
      a.headdim - c >= columns ? values<true>(begin, count, G + block, c, x)
                               : values<false>(begin, count, G + block, c, x);
    });
    rows(states + i * size, x);
    keys(begin, count);
  }

  // Gradients of the values in columns from c on, and the sums over columns that the scores and beta need.
  template <bool Whole>
  void values(int64_t begin, int64_t count, const float* block, int64_t c, const Columns& x) {
    vf du[C][NC], u[C][NC], de[C][NC], dy[C][NC];
    read<C>(block, tile.out, a.d_state, du);
#pragma GCC unroll 4
    for (int t = C - 1; t >= 0; --t) {
      const bool real = t < count;
      const T* given = real ? g.dy.at<T>(at.b, begin + t, at.h) + c : nullptr;
      float* dv = real ? g.dv + (((at.b * a.seqlen) + begin + t) * a.nheads + at.h) * a.headdim + c : nullptr;
      for (int j = 0; j < NC; ++j) {
        const int64_t left = a.headdim - c - j * W;
        dy[t][j] = real ? get_block<Whole>(given + j * W, left) : vf{};
        vf d = du[t][j];
        for (int s = t; s < C; ++s) d += dy[s][j] * tile.qk[s][t];
        for (int s = t + 1; s < C; ++s) d -= de[s][j] * tile.kk[s][t];
        const vf e = load(x.e + t * padded + c + j * W);
        made.scalar[C * C + t] += e * d;
        de[t][j] = d * tile.beta[t];
        u[t][j] = e * tile.beta[t];
        if (real) put_block<Whole>(dv + j * W, de[t][j], left);
        store(x.u + t * padded + c + j * W, u[t][j]);
        store(x.de + t * padded + c + j * W, de[t][j]);
        store(x.dy + t * padded + c + j * W, dy[t][j]);
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < C; ++t)
      for (int s = 0; s <= t; ++s)
        for (int j = 0; j < NC; ++j) {
          made.scalar[t * C + s] += dy[t][j] * u[s][j];
          if (s < t) made.scalar[s * C + t] -= de[t][j] * u[s][j];
        }
  }

  // Rows of the state: their sums over columns, and G one tile back.
  void rows(const float* S, const Columns& x) {
    for (int64_t n = 0; n < a.d_state; n += W) {
      for (int64_t r = 0; r < W; ++r)
        if (n + r < a.d_state)
          row(S + (n + r) * columns, G + (n + r) * columns, n + r, r, x);
        else
          for (int i = 0; i < dots; ++i) made.partial[i][r] = vf{};
      for (int i = 0; i < dots; ++i) store(made.dot[i] + n, lane_sums(made.partial[i]));
    }
  }

  void row(const float* S, float* grads, int64_t n, int64_t r, const Columns& columns_of) {
    const Columns x = columns_of;  // stores below might change what a reference refers to
    vf sum[dots], k_in[C], q_in[C], whole = splat(tile.whole[n]);
#pragma GCC unroll 16
    for (vf& s : sum) s = vf{};
#pragma GCC unroll 4
    for (int t = 0; t < C; ++t) {
      k_in[t] = splat(tile.in[t][n]);
      q_in[t] = splat(tile.in[C + t][n]);
    }
    for (int64_t c = 0; c < padded; c += columns, S += block_size, grads += block_size)
      for (int j = 0; j < NC; ++j) {
        const vf s = load(S + j * W), grad = load(grads + j * W);
        vf next = D == Decay::none ? grad : grad * whole;
#pragma GCC unroll 4
        for (int t = 0; t < C; ++t) {
          const vf de = load(x.de + t * x.padded + c + j * W), dy = load(x.dy + t * x.padded + c + j * W);
          sum[t] += grad * load(x.u + t * x.padded + c + j * W);
          sum[C + t] -= s * de;
          sum[2 * C + t] += s * dy;
          next += dy * q_in[t];
          next -= de * k_in[t];
        }
        if constexpr (D != Decay::none) sum[3 * C] += grad * s;
        store(grads + j * W, next);
      }
#pragma GCC unroll 16
    for (int i = 0; i < dots; ++i) made.partial[i][r] = sum[i];
  }

  // From gradients of what was prepared for the tile to those of q, k, beta and the log decays.
  void keys(int64_t begin, int64_t count) {
    float total[scalars], dkk[C][C], dqk[C][C];
    sums_of(made.scalar, total);
    for (int t = 0; t < C; ++t)
      for (int s = 0; s <= t; ++s) {
        dkk[t][s] = total[s * C + t];
        dqk[t][s] = total[t * C + s] * a.scale;
      }
    const int64_t token = (at.b * a.seqlen + begin) * a.nheads + at.h;
    for (int t = 0; t < count; ++t) g.dbeta[token + t * a.nheads] = total[C * C + t];

    vf decay[C], dlog[C] = {};
    for (int t = 0; t < C; ++t)
      decay[t] = D == Decay::token && t < count ? decay_at<D>(a, at, begin + t, 0) : splat(1.0f);
    for (int64_t n = 0; n < a.d_state; n += W) {
      const int64_t left = a.d_state - n;
      vf k[C], q[C], dk[C], dq[C], carried[C], in = splat(1.0f);
      vf scaled[C] = {};  // what decay t scales: reads of the state from t on, writes before t, pairs on both sides
#pragma GCC unroll 4
      for (int t = 0; t < C; ++t) {
        k[t] = t < count ? get(a.k.at<T>(at.b, begin + t, at.h) + n, left) : vf{};
        q[t] = t < count ? get(a.q.at<T>(at.b, begin + t, at.h) + n, left) : vf{};
        if (D == Decay::channel && t < count) decay[t] = decay_at<D>(a, at, begin + t, n);
        in *= decay[t];
        dk[t] = load(made.dot[C + t] + n) * in;
        dq[t] = load(made.dot[2 * C + t] + n) * in * a.scale;
        vf since = k[t] * dk[t] + q[t] * dq[t];
        for (int s = 0; s < t; ++s) {
          scaled[s] += since;
          carried[s] *= decay[t];
          const vf key = carried[s] * dkk[t][s], query = carried[s] * dqk[t][s];
          dk[t] += key;
          dq[t] += query;
          since += k[t] * key + q[t] * query;
        }
        scaled[t] += since;
        carried[t] = k[t];
        dq[t] += k[t] * dqk[t][t];
      }
      vf before = load(made.dot[3 * C] + n) * in;
#pragma GCC unroll 4
      for (int t = 0; t < C; ++t) {
        if constexpr (D != Decay::none) {
          scaled[t] += before;
          before += carried[t] * load(made.dot[t] + n);
        }
        vf written = load(made.dot[t] + n);
        for (int r = C - 1; r > t; --r) written = (written + k[r] * dkk[r][t] + q[r] * dqk[r][t]) * decay[r];
        dk[t] += written + q[t] * dqk[t][t];
        if (t >= count) continue;
        const int64_t to = (token + t * a.nheads) * a.d_state + n;
        put(g.dk + to, dk[t], left);
        put(g.dq + to, dq[t], left);
        if constexpr (D == Decay::channel) put(g.dlog_decay + to, scaled[t], left);
        if constexpr (D == Decay::token) dlog[t] += scaled[t];
      }
    }
    if constexpr (D == Decay::token)
      for (int t = 0; t < count; ++t) g.dlog_decay[token + t * a.nheads] = sum(dlog[t]);
  }
};

template <class T, Decay D>
void backward(const DeltaGradArgs& g, int64_t begin, int64_t end) {
  FlushDenormals flush;
  Backward<T, D> run{g};
  for (int64_t task = begin; task < end; ++task) run.head(task);
}

template <class T>
void run(const DeltaGradArgs& g, int64_t begin, int64_t end) {
  switch (g.forward.decay) {
    case Decay::none: return backward<T, Decay::none>(g, begin, end);
    case Decay::token: return backward<T, Decay::token>(g, begin, end);
    case Decay::channel: return backward<T, Decay::channel>(g, begin, end);
  }
}

}  // namespace

void delta_rule_bwd(const DeltaGradArgs& g, int64_t begin, int64_t end) {
  g.forward.bf16 ? run<bf16>(g, begin, end) : run<float>(g, begin, end);
}

}  // namespace seqlib::SEQLIB_ISA

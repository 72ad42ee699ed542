// Linear attention forward, chunk by chunk: scores of a chunk's own positions, and the state for all earlier ones.
#include "linear_attention_chunk.h"

namespace seqlib::SEQLIB_ISA {
namespace {

struct Buffers {
  int64_t n, p;  // padded d_state and padded width of this part of the heads
  Scratch scratch;
  float *q, *kt, *v, *v_left, *scores, *state;
  ChunkDecay decay;
  Ahead ahead;

  explicit Buffers(const AttentionArgs& a)
      : n(padded(a.d_state)), p(padded(a.part_width)), scratch(C * (2 * n + 2 * p) + 16 * C + n * p) {
    q = scratch.take(C, n);
    kt = scratch.take(n, C);
    v = scratch.take(C, p);
    v_left = scratch.take(C, p);
    scores = scratch.take(16, C);
    state = scratch.take(n, p);
  }
};

void chunk(const AttentionArgs& a, Buffers& b, const Place& place) {
  const auto [row, head, column, width, begin, count] = place;
  const ChunkDecay& decay = b.decay;
  b.decay.fill(a, row, head, begin, count);
  const int64_t rows = round_up(count, kRows), n = b.n, p = b.p;
  HeadRows(a.q, row, begin, head).pack(count, a.d_state, b.q, n, rows, [&](vf x, int64_t) { return x * a.scale; });
  HeadRows(a.k, row, begin, head).pack_transposed(count, a.d_state, b.kt, C, padded(count));
  HeadRows(a.v, row, begin, head, column).pack(count, width, b.v, p, rows, same);
  pack(b.v, p, count, p, b.v_left, p, count, [&](vf x, int64_t i) { return x * decay.left[i]; });

  const HeadRows y(a.y, row, begin, head, column);
  for (int64_t block = 0; block < rows; block += 16) {
    // Scores of sixteen positions, kept in L1 while their outputs are made.
    const int64_t end = std::min<int64_t>(block + 16, rows);
    for (int64_t i = block; i < end; i += kRows)
      tiles(kRows, round_up(i + kRows, W) / W, [&]<int R, int V>(int64_t r0, int64_t j) {
        b.ahead.fetch();
        Tile<R, V> c = {};
        add_product(c, b.q + (i + r0) * n, n, 1, b.kt + j, C, a.d_state);
        each(c, [&](vf& x, int r, int u) {
          store(b.scores + (i + r0 + r - block) * C + j + u * W, x * decay.between(i + r0 + r, j + u * W));
        });
      });
    tiles(end - block, p / W, [&]<int R, int V>(int64_t r0, int64_t j) {
      b.ahead.fetch();
      const int64_t i = block + r0;
      Tile<R, V> c = {};
      add_product(c, b.q + i * n, n, 1, b.state + j, p, a.d_state);
      each(c, [&](vf& x, int r, int) { x *= decay.seen[i + r]; });
      add_product(c, b.scores + r0 * C, C, 1, b.v + j, p, i + R);
      each(c, [&](vf& x, int r, int u) {
        if (i + r < count) y.put(i + r, j + u * W, width, x);
      });
    });
  }
  tiles(n, p / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c;
    each(c, [&](vf& x, int r, int u) { x = decay.passed * load(b.state + (i + r) * p + j + u * W); });
    add_product(c, b.kt + i * C, C, 1, b.v_left + j, p, count);
    each(c, [&](vf& x, int r, int u) { store(b.state + (i + r) * p + j + u * W, x); });
  });
}

void forward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  Buffers b(a);
  walk<C>(a, b, begin, end, [&](const Place& place) { chunk(a, b, place); });
}

// Columns [j, j + V vectors) of one head's state and output; `lanes` of them if V is 1.
template <int V>
void step_columns(const AttentionStepArgs& a, int64_t row, int64_t head, int64_t j, int lanes) {
  const HeadRows q(a.q, row, 0, head), k(a.k, row, 0, head), v(a.v, row, 0, head), y(a.y, row, 0, head);
  const float* g = a.log_decay ? a.log_decay + row * a.decay_batch + head * a.decay_head : nullptr;
  float* state = a.state + (row * a.nheads + head) * a.d_state * a.headdim + j;
  vf x[V], sum[V] = {};
  for (int u = 0; u < V; ++u) x[u] = v.get(0, j + u * W, a.headdim);
  float qs[C], ks[C], decays[C];
  for (int64_t first = 0; first < a.d_state; first += C) {
    const int64_t count = std::min<int64_t>(C, a.d_state - first);
    for (int64_t i = 0; i < count; i += W) {
      store(qs + i, q.get(0, first + i, a.d_state));
      store(ks + i, k.get(0, first + i, a.d_state));
      const vf log_decay = !g ? vf{} : a.decay_channel ? get(g + first + i, count - i) : splat(*g);
      store(decays + i, exp(log_decay));
    }
    for (int64_t i = 0; i < count; ++i, state += a.headdim)
#pragma GCC unroll 4
      for (int u = 0; u < V; ++u) {
        const vf now = decays[i] * get(state + u * W, lanes) + ks[i] * x[u];
        put(state + u * W, now, lanes);
        sum[u] += qs[i] * now;
      }
  }
  for (int u = 0; u < V; ++u) y.put(0, j + u * W, a.headdim, sum[u] * a.scale);
}

void step(const AttentionStepArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / a.nheads, head = task % a.nheads;
    int64_t j = 0;
    for (; j + 4 * W <= a.headdim; j += 4 * W) step_columns<4>(a, row, head, j, W);
    for (; j + W <= a.headdim; j += W) step_columns<1>(a, row, head, j, W);
    if (j < a.headdim) step_columns<1>(a, row, head, j, static_cast<int>(a.headdim - j));
  }
}

}  // namespace

void linear_attention_fwd(const AttentionArgs& a, int64_t begin, int64_t end) { forward(a, begin, end); }
void linear_attention_step(const AttentionStepArgs& a, int64_t begin, int64_t end) { step(a, begin, end); }

}  // namespace seqlib::SEQLIB_ISA

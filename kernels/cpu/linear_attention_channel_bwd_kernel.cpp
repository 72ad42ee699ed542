// Linear attention backward with a decay per key channel: chunks from last to first, as without channels.
//
// With w(i, j) what position i sees of j, S the state that enters, D the gradient of the one that leaves:
//   dq_i = seen_i dy_i S' + sum_j (dy_i v_j) w(i, j) k_j       dk_j = left_j v_j D' + sum_i (dy_i v_j) w(i, j) q_i
// The gradient of log_decay has the four parts that it has without channels, each by channel. Those of the pairs are
// differences of q dq and k dk; what a position gives itself and what states give stay out of them, since no decay
// between positions scales those, and of what strong decays leave only the rounding of larger numbers would remain.
#include "linear_attention_channel.h"

namespace seqlib::SEQLIB_ISA {
namespace {

struct Buffers {
  int64_t n, p;
  Scratch scratch;
  ChannelChunk keys;
  float *q, *q_seen, *v, *vt, *dy, *dyt;
  float *dscores, *dq, *dk, *product;  // product: n x T
  float *terms, *out_of;               // of the gradient of log_decay: sums over later and over earlier positions
  float* dstate;
  float* states;  // that enter the chunks since a checkpoint
  Ahead ahead;

  explicit Buffers(const AttentionArgs& a)
      : n(padded(a.d_state)), p(padded(a.headdim)),
        scratch(ChannelChunk::size(n) + T * (7 * n + 4 * p + T) + (1 + a.every) * n * p), keys(n, scratch),
        q(scratch.take(T, n)), q_seen(scratch.take(T, n)), v(scratch.take(T, p)), vt(scratch.take(p, T)),
        dy(scratch.take(T, p)), dyt(scratch.take(p, T)), dscores(scratch.take(T, T)), dq(scratch.take(T, n)),
        dk(scratch.take(T, n)), product(scratch.take(n, T)), terms(scratch.take(T, n)),
        out_of(scratch.take(T, n)), dstate(scratch.take(n, p)), states(scratch.take(a.every * n, p)) {}
  float* state(int64_t i) const { return states + i * n * p; }
};

// The state after full chunk i since the checkpoint, from the one before it.
void advance(const AttentionArgs& a, Buffers& b, int64_t row, int64_t head, int64_t begin, int64_t i) {
  const ChannelChunk& keys = b.keys;
  b.keys.fill(a, row, head, begin, T);
  b.keys.leave(T);
  HeadRows(a.v, row, begin, head).pack(T, a.headdim, b.v, b.p, T, same);
  const float* state = b.state(i);
  float* next = b.state(i + 1);
  tiles(b.n, b.p / W, [&]<int R, int V>(int64_t r0, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c;
    each(c, [&](vf& x, int r, int u) { x = keys.passed[r0 + r] * load(state + (r0 + r) * b.p + j + u * W); });
    add_product(c, keys.k_left + r0, 1, b.n, b.v + j, b.p, T);
    each(c, [&](vf& x, int r, int u) { store(next + (r0 + r) * b.p + j + u * W, x); });
  });
}

// to = (state rows')' for `rows` packed as columns: what each row makes of the state, by channel.
void through(Buffers& b, const float* state, const float* columns, int64_t width, float* to) {
  tiles(b.n, T / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c = {};
    add_product(c, state + i * b.p, b.p, 1, columns + j, T, width);
    each(c, [&](vf& x, int r, int u) { store(b.product + (i + r) * T + j + u * W, x); });
  });
  pack_transposed(b.product, T, b.n, T, to, b.n, b.n);
}

// Gradients of q and k: what the states give, then what the pairs of the chunk give.
void gradients(const AttentionArgs& a, Buffers& b, const float* state, int64_t count) {
  const ChannelChunk& keys = b.keys;
  const int64_t n = b.n;
  through(b, state, b.dyt, a.headdim, b.dq);
  through(b, b.dstate, b.vt, a.headdim, b.dk);
  strips(n, [&]<int V>(int64_t channel) {
    auto at = [&](const float* rows, int64_t i, int v) { return load(rows + i * n + channel + v * W); };
    for (int64_t i = 0; i < count; ++i) {
      vf sum[V] = {};
      for (int64_t j = 0; j < i; ++j) {
        const vf d = splat(b.dscores[i * T + j]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[v] = sum[v] * at(keys.decay, j, v) + d * at(keys.k, j, v);
      }
      const vf own = splat(b.dscores[i * T + i]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const vf others = sum[v] * at(keys.decay, i, v) + at(keys.seen, i, v) * at(b.dq, i, v);
        const int64_t to = i * n + channel + v * W;
        store(b.terms + to, at(b.q, i, v) * others);
        store(b.dq + to, others + own * at(keys.k, i, v));
      }
    }
    vf left[V];
    for (int v = 0; v < V; ++v) left[v] = splat(1.0f);
    for (int64_t j = count; j-- > 0;) {
      vf sum[V] = {};
      for (int64_t i = count - 1; i > j; --i) {
        const vf d = splat(b.dscores[i * T + j]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[v] = (sum[v] + d * at(b.q, i, v)) * at(keys.decay, i, v);
      }
      const vf own = splat(b.dscores[j * T + j]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const vf k = at(keys.k, j, v), at_end = left[v] * at(b.dk, j, v);
        const int64_t to = j * n + channel + v * W;
        store(b.terms + to, at(b.terms, j, v) - k * sum[v]);
        store(b.out_of + to, k * at_end);
        store(b.dk + to, sum[v] + at_end + own * at(b.q, j, v));
        left[v] *= at(keys.decay, j, v);
      }
    }
  });
}

void decay_gradient(const AttentionBackArgs& g, const Buffers& b, int64_t row, int64_t head, int64_t begin,
                    int64_t count, const float* state, bool fresh) {
  const AttentionArgs& a = g.of;
  const Heads shape{g.dlog_decay, a.seqlen * a.nheads * a.d_state, a.nheads * a.d_state, a.d_state, 1, false};
  const HeadRows to(shape, row, begin, head);
  for (int64_t j = 0; j < b.n; j += W) {
    vf kept[W] = {};
    for (int r = 0; r < W; ++r)
      for (int64_t e = (j + r) * b.p; e < (j + r + 1) * b.p; e += W) kept[r] += load(state + e) * load(b.dstate + e);
    vf before[T], after = {};
    before[0] = lane_sums(kept) * load(b.keys.passed + j);
    for (int64_t i = 1; i < count; ++i) before[i] = before[i - 1] + load(b.out_of + (i - 1) * b.n + j);
    for (int64_t i = count; i-- > 0;) {
      after += load(b.terms + i * b.n + j);
      // What a document start forgets does not matter.
      to.put(i, j, a.d_state, fresh && i == 0 ? vf{} : before[i] + after);
    }
  }
}

void chunk(const AttentionBackArgs& g, Buffers& b, int64_t row, int64_t head, int64_t begin, int64_t count,
           const float* state, bool fresh) {
  const AttentionArgs& a = g.of;
  const ChannelChunk& keys = b.keys;
  const int64_t n = b.n, p = b.p, rows = round_up(count, kRows);
  b.keys.fill(a, row, head, begin, count);
  HeadRows(a.q, row, begin, head).pack(count, a.d_state, b.q, n, rows, [&](vf x, int64_t) { return x * a.scale; });
  for (int64_t i = 0; i < rows * n; i += W) store(b.q_seen + i, load(b.q + i) * load(keys.seen + i));
  HeadRows(g.dy, row, begin, head).pack(count, a.headdim, b.dy, p, rows, same);
  HeadRows(a.v, row, begin, head).pack_transposed(count, a.headdim, b.vt, T, T);
  pack_transposed(b.dy, p, count, p, b.dyt, T, T);
  b.keys.score(b.q, count);
  tiles(rows, T / W, [&]<int R, int V>(int64_t i, int64_t j) {
    Tile<R, V> c = {};
    add_product(c, b.dy + i * p, p, 1, b.vt + j, T, a.headdim);
    each(c, [&](vf& x, int r, int u) { store(b.dscores + (i + r) * T + j + u * W, x); });
  });
  gradients(a, b, state, count);
  const HeadRows dq(g.dq, row, begin, head), dk(g.dk, row, begin, head), dv(g.dv, row, begin, head);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < a.d_state; j += W) {
      dq.put(i, j, a.d_state, load(b.dq + i * n + j) * a.scale);
      dk.put(i, j, a.d_state, load(b.dk + i * n + j));
    }
  if (g.dlog_decay) decay_gradient(g, b, row, head, begin, count, state, fresh);
  tiles(rows, p / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c = {};
    add_product(c, keys.k_left + i * n, n, 1, b.dstate + j, p, a.d_state);
    add_product(c, keys.scores + i * T + i, 1, T, b.dy + i * p + j, p, rows - i);
    each(c, [&](vf& x, int r, int u) {
      if (i + r < count) dv.put(i + r, j + u * W, a.headdim, x);
    });
  });
  tiles(n, p / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c;
    each(c, [&](vf& x, int r, int u) { x = keys.passed[i + r] * load(b.dstate + (i + r) * p + j + u * W); });
    add_product(c, b.q_seen + i, 1, n, b.dy + j, p, count);
    each(c, [&](vf& x, int r, int u) { store(b.dstate + (i + r) * p + j + u * W, x); });
  });
}

void span_backward(const AttentionBackArgs& g, Buffers& b, int64_t row, int64_t head, const AttentionSpan& span) {
  const AttentionArgs& a = g.of;
  const int64_t chunks = (span.end - span.begin + T - 1) / T;
  auto begin = [&](int64_t i) { return span.begin + i * T; };
  auto count = [&](int64_t i) { return i < 0 || i >= chunks ? 0 : std::min<int64_t>(T, span.end - begin(i)); };
  auto fetch = [&](const Heads& h, int64_t i, int64_t width) {
    b.ahead.add(HeadRows(h, row, begin(i), head), count(i), width);
  };
  for (int64_t first = (chunks - 1) / a.every * a.every; first >= 0; first -= a.every) {
    const int64_t here = std::min(a.every, chunks - first);
    const int64_t slot = (span.checkpoint + first / a.every) * a.nheads + head;
    load_state(a.checkpoints + slot * a.d_state * a.headdim, a.headdim, a.d_state, a.headdim, b.states, b.n, b.p);
    for (int64_t i = 0; i + 1 < here; ++i) {
      b.ahead.clear();
      fetch(a.k, first + i + 1, a.d_state);
      fetch(a.v, first + i + 1, a.headdim);
      fetch(decays(a), first + i + 1, a.d_state);
      advance(a, b, row, head, begin(first + i), i);
    }
    for (int64_t i = here; i-- > 0;) {
      const int64_t at = first + i;
      b.ahead.clear();
      fetch(g.dq, at, a.d_state);
      fetch(g.dk, at, a.d_state);
      fetch(g.dv, at, a.headdim);
      fetch(a.q, at - 1, a.d_state);
      fetch(g.dy, at - 1, a.headdim);
      chunk(g, b, row, head, begin(at), count(at), b.state(i), span.fresh && at == 0);
    }
  }
}

void backward(const AttentionBackArgs& g, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const AttentionArgs& a = g.of;
  Buffers b(a);
  const int64_t size = a.d_state * a.headdim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / a.nheads, head = task % a.nheads;
    load_state(g.dfinal ? g.dfinal + task * size : nullptr, a.headdim, a.d_state, a.headdim, b.dstate, b.n, b.p);
    for (int64_t s = a.first_span[row + 1]; s-- > a.first_span[row];) {
      span_backward(g, b, row, head, a.spans[s]);
      if (a.spans[s].fresh) std::fill(b.dstate, b.dstate + b.n * b.p, 0.0f);
    }
    store_state(b.dstate, b.p, a.d_state, a.headdim, g.dinitial + task * size, a.headdim);
  }
}

}  // namespace

void linear_attention_channel_bwd(const AttentionBackArgs& g, int64_t begin, int64_t end) { backward(g, begin, end); }

}  // namespace seqlib::SEQLIB_ISA

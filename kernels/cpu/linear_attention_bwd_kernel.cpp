// Linear attention backward: chunks from last to first, the states that enter them made again from checkpoints.
//
// With S the state that enters a chunk, D the gradient of the one that leaves it, P the scores and dP theirs:
//   dq = dP k + seen dy S'    dk = dP' q + left v D'    dv = P' dy + left k D    D <- passed D + (seen q)' dy
// The decay of position i scales what passes from before i to i and later, so its gradient is a sum of four parts:
//   passed <S, D> + sum_{t >= i} q_t (seen dy S')_t + sum_{s < i} k_s (left v D')_s + sum_{t >= i > s} (P dP)_ts
// Differences of q dq and k dk would need no (P dP), but what strong decays leave is lost in their rounding.
#include "linear_attention_chunk.h"

namespace seqlib::SEQLIB_ISA {
namespace {

struct Buffers {
  int64_t n, p;
  Scratch scratch;
  float *q, *kt, *k_left, *dy, *dy_seen, *scores, *dscores;
  float *within, *into, *out_of;  // parts of the gradient of log_decay: P dP; lanes of sums by t; by s
  float *dstate, *dstate_t;    // d_state x headdim, and transposed
  // Of each chunk since a checkpoint: k, v transposed, and the state that enters it, transposed.
  float *keys, *values, *states;
  ChunkDecay decay;
  Ahead ahead;

  explicit Buffers(const AttentionArgs& a)
      : n(padded(a.d_state)), p(padded(a.headdim)),
        scratch(C * (3 * n + 2 * p) + 3 * C * C + 2 * C * W + 2 * n * p + a.every * (C * (n + p) + n * p)) {
    q = scratch.take(C, n);
    kt = scratch.take(n, C);
    k_left = scratch.take(C, n);
    dy = scratch.take(C, p);
    dy_seen = scratch.take(C, p);
    scores = scratch.take(C, C);
    dscores = scratch.take(C, C);
    within = scratch.take(C, C);
    into = scratch.take(C, W);
    out_of = scratch.take(C, W);
    dstate = scratch.take(n, p);
    dstate_t = scratch.take(p, n);
    keys = scratch.take(a.every * C, n);
    values = scratch.take(a.every * p, C);
    states = scratch.take(a.every * p, n);
  }
  float* k(int64_t i) const { return keys + i * C * n; }
  float* vt(int64_t i) const { return values + i * p * C; }
  float* state(int64_t i) const { return states + i * p * n; }
};

// The state after chunk i since the checkpoint, a full one, from the state before it.
void advance(const AttentionArgs& a, Buffers& b, int64_t row, int64_t head, int64_t begin, int64_t i) {
  b.decay.fill(a, row, head, begin, C);
  pack(b.k(i), b.n, C, b.n, b.k_left, b.n, C, [&](vf x, int64_t j) { return x * b.decay.left[j]; });
  const float *state = b.state(i), *vt = b.vt(i);
  float* next = b.state(i + 1);
  tiles(b.p, b.n / W, [&]<int R, int V>(int64_t r0, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c;
    each(c, [&](vf& x, int r, int u) { x = b.decay.passed * load(state + (r0 + r) * b.n + j + u * W); });
    add_product(c, vt + r0 * C, C, 1, b.k_left + j, b.n, C);
    each(c, [&](vf& x, int r, int u) { store(next + (r0 + r) * b.n + j + u * W, x); });
  });
}

// scores and dscores of all pairs of a chunk, decays applied to both, and to their product once.
void pairs(const AttentionArgs& a, Buffers& b, const float* vt, int64_t rows) {
  for (int64_t i = 0; i < rows; i += kRows)
    tiles(kRows, round_up(i + kRows, W) / W, [&]<int R, int V>(int64_t r0, int64_t j) {
      const int64_t first = i + r0;
      float *score = b.scores + first * C + j, *dscore = b.dscores + first * C + j, *within = b.within + first * C + j;
      b.ahead.fetch();
      Tile<R, V> c = {};
      add_product(c, b.q + first * b.n, b.n, 1, b.kt + j, C, a.d_state);
      each(c, [&](vf& x, int r, int u) {
        const vf w = b.decay.between(first + r, j + u * W);
        store(score + r * C + u * W, x * w);
        store(dscore + r * C + u * W, w);
        x = vf{};
      });
      add_product(c, b.dy + first * b.p, b.p, 1, vt + j, C, a.headdim);
      each(c, [&](vf& x, int r, int u) {
        const int64_t at = r * C + u * W;
        store(within + at, x * load(score + at));
        store(dscore + at, x * load(dscore + at));
      });
    });
}

// Sums over the lanes of each of `count` vectors.
void sums_of(const float* lanes, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += W) {
    vf v[W];
    for (int r = 0; r < W; ++r) v[r] = load(lanes + (i + r) * W);
    store(out + i, lane_sums(v));
  }
}

// What passes from before each position of a chunk to it and later ones.
void decay_gradient(const AttentionBackArgs& g, Buffers& b, int64_t row, int64_t head, int64_t begin, int64_t count,
                    const float* state, bool fresh) {
  const AttentionArgs& a = g.of;
  vf through = {};
  for (int64_t i = 0; i < a.headdim * b.n; i += W) through += load(state + i) * load(b.dstate_t + i);
  float into[C], out_of[C];
  sums_of(b.into, count, into);
  sums_of(b.out_of, count, out_of);
  double before[C + 1] = {b.decay.passed * static_cast<double>(sum(through))};
  for (int64_t i = 0; i < count; ++i) before[i + 1] = before[i] + out_of[i];
  vi place;
  for (int lane = 0; lane < W; ++lane) place[lane] = lane;
  vf later[C / W] = {};  // of every s, the sum of P dP over t >= i
  double after = 0, total = 0;
  for (int64_t i = count - 1; i >= 0; --i) {
    vf within = {};
    for (int64_t s = 0; s < i; s += W) {
      vf& sum = later[s / W];
      sum += load(b.within + i * C + s);
      within += place < static_cast<int32_t>(i - s) ? sum : vf{};
    }
    after += into[i];
    // What a document start forgets does not matter.
    const double gradient = fresh && i == 0 ? 0.0 : before[i] + after + sum(within);
    total += gradient;
    if (!g.constant) g.dlog_decay[(row * a.seqlen + begin + i) * a.nheads + head] = static_cast<float>(gradient);
  }
  if (g.constant) g.dlog_decay[row * a.nheads + head] += static_cast<float>(total);
}

void chunk(const AttentionBackArgs& g, Buffers& b, int64_t row, int64_t head, int64_t begin, int64_t count,
           const float* k, const float* vt, const float* state, bool fresh) {
  const AttentionArgs& a = g.of;
  const ChunkDecay& decay = b.decay;
  const int64_t n = b.n, p = b.p, rows = round_up(count, kRows);
  b.decay.fill(a, row, head, begin, count);
  HeadRows(a.q, row, begin, head).pack(count, a.d_state, b.q, n, rows, [&](vf x, int64_t) { return x * a.scale; });
  HeadRows(g.dy, row, begin, head).pack(count, a.headdim, b.dy, p, rows, same);
  pack(b.dy, p, count, p, b.dy_seen, p, count, [&](vf x, int64_t i) { return x * decay.seen[i]; });
  pack_transposed(k, n, count, n, b.kt, C, padded(count));
  pack_transposed(b.dstate, p, n, p, b.dstate_t, n, n);
  pairs(a, b, vt, rows);

  const HeadRows dq(g.dq, row, begin, head), dk(g.dk, row, begin, head), dv(g.dv, row, begin, head);
  std::fill(b.into, b.into + C * W, 0.0f);
  std::fill(b.out_of, b.out_of + C * W, 0.0f);
  auto add = [](float* to, vf x) { store(to, load(to) + x); };
  tiles(rows, n / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c = {};
    add_product(c, b.dy + i * p, p, 1, state + j, n, a.headdim);
    each(c, [&](vf& x, int r, int u) {
      x *= decay.seen[i + r];
      add(b.into + (i + r) * W, x * load(b.q + (i + r) * n + j + u * W));
    });
    add_product(c, b.dscores + i * C, C, 1, k + j, n, i + R);
    each(c, [&](vf& x, int r, int u) {
      if (i + r < count) dq.put(i + r, j + u * W, a.d_state, x * a.scale);
    });
  });
  tiles(rows, n / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c = {};
    add_product(c, vt + i, 1, C, b.dstate_t + j, n, a.headdim);
    each(c, [&](vf& x, int r, int u) {
      x *= decay.left[i + r];
      add(b.out_of + (i + r) * W, x * load(k + (i + r) * n + j + u * W));
    });
    add_product(c, b.dscores + i * C + i, 1, C, b.q + i * n + j, n, rows - i);
    each(c, [&](vf& x, int r, int u) {
      if (i + r < count) dk.put(i + r, j + u * W, a.d_state, x);
    });
  });
  tiles(rows, p / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c = {};
    add_product(c, k + i * n, n, 1, b.dstate + j, p, a.d_state);
    each(c, [&](vf& x, int r, int) { x *= decay.left[i + r]; });
    add_product(c, b.scores + i * C + i, 1, C, b.dy + i * p + j, p, rows - i);
    each(c, [&](vf& x, int r, int u) {
      if (i + r < count) dv.put(i + r, j + u * W, a.headdim, x);
    });
  });

  if (g.dlog_decay) decay_gradient(g, b, row, head, begin, count, state, fresh);
  tiles(n, p / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c;
    each(c, [&](vf& x, int r, int u) { x = decay.passed * load(b.dstate + (i + r) * p + j + u * W); });
    add_product(c, b.q + i, 1, n, b.dy_seen + j, p, count);
    each(c, [&](vf& x, int r, int u) { store(b.dstate + (i + r) * p + j + u * W, x); });
  });
}

void span_backward(const AttentionBackArgs& g, Buffers& b, int64_t row, int64_t head, const AttentionSpan& span) {
  const AttentionArgs& a = g.of;
  const int64_t chunks = (span.end - span.begin + C - 1) / C;
  auto begin = [&](int64_t i) { return span.begin + i * C; };
  auto count = [&](int64_t i) { return i < 0 || i >= chunks ? 0 : std::min<int64_t>(C, span.end - begin(i)); };
  auto fetch = [&](const Heads& h, int64_t i, int64_t width) {
    b.ahead.add(HeadRows(h, row, begin(i), head), count(i), width);
  };
  for (int64_t first = (chunks - 1) / a.every * a.every; first >= 0; first -= a.every) {
    const int64_t here = std::min(a.every, chunks - first);
    const int64_t slot = (span.checkpoint + first / a.every) * a.nheads + head;
    pack_transposed(a.checkpoints + slot * a.d_state * a.headdim, a.headdim, a.d_state, a.headdim, b.states, b.n, b.n);
    for (int64_t i = 0; i < here; ++i) {
      const int64_t at = first + i, rows = round_up(count(at), kRows);
      b.ahead.clear();
      fetch(a.k, at + 1, a.d_state);
      fetch(a.v, at + 1, a.headdim);
      if (i + 2 == here) {
        fetch(a.q, at + 1, a.d_state);
        fetch(g.dy, at + 1, a.headdim);
      }
      HeadRows(a.k, row, begin(at), head).pack(count(at), a.d_state, b.k(i), b.n, rows, same);
      HeadRows(a.v, row, begin(at), head).pack_transposed(count(at), a.headdim, b.vt(i), C, padded(count(at)));
      if (i + 1 < here) advance(a, b, row, head, begin(at), i);
    }
    for (int64_t i = here; i-- > 0;) {
      const int64_t at = first + i;
      b.ahead.clear();
      fetch(g.dq, at, a.d_state);
      fetch(g.dk, at, a.d_state);
      fetch(g.dv, at, a.headdim);
      fetch(i ? a.q : a.k, i ? at - 1 : first - a.every, a.d_state);
      fetch(i ? g.dy : a.v, i ? at - 1 : first - a.every, a.headdim);
      chunk(g, b, row, head, begin(at), count(at), b.k(i), b.vt(i), b.state(i), span.fresh && at == 0);
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
    std::fill(b.dstate, b.dstate + b.n * b.p, 0.0f);
    if (g.dfinal) pack(g.dfinal + task * size, a.headdim, a.d_state, a.headdim, b.dstate, b.p, b.n, same);
    for (int64_t s = a.first_span[row + 1]; s-- > a.first_span[row];) {
      span_backward(g, b, row, head, a.spans[s]);
      if (a.spans[s].fresh) std::fill(b.dstate, b.dstate + b.n * b.p, 0.0f);
    }
    for (int64_t i = 0; i < a.d_state; ++i)
      std::copy(b.dstate + i * b.p, b.dstate + i * b.p + a.headdim, g.dinitial + task * size + i * a.headdim);
  }
}

}  // namespace

void linear_attention_bwd(const AttentionBackArgs& g, int64_t begin, int64_t end) { backward(g, begin, end); }

}  // namespace seqlib::SEQLIB_ISA

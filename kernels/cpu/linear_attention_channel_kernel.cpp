// Linear attention forward with a decay per key channel.
#include "linear_attention_channel.h"

namespace seqlib::SEQLIB_ISA {
namespace {

struct Buffers {
  int64_t n, p;  // padded d_state and padded width of this part of the heads
  Scratch scratch;
  ChannelChunk keys;
  float *q, *q_seen, *v, *state;
  Ahead ahead;

  explicit Buffers(const AttentionArgs& a)
      : n(padded(a.d_state)), p(padded(a.part_width)), scratch(ChannelChunk::size(n) + T * (2 * n + p) + n * p),
        keys(n, scratch), q(scratch.take(T, n)), q_seen(scratch.take(T, n)), v(scratch.take(T, p)),
        state(scratch.take(n, p)) {}
};

void chunk(const AttentionArgs& a, Buffers& b, const Place& at) {
  const int64_t n = b.n, p = b.p, count = at.count, rows = round_up(count, kRows);
  const ChannelChunk& keys = b.keys;
  b.keys.fill(a, at.row, at.head, at.begin, count);
  HeadRows(a.q, at.row, at.begin, at.head).pack(count, a.d_state, b.q, n, rows, [&](vf x, int64_t) {
    return x * a.scale;
  });
  HeadRows(a.v, at.row, at.begin, at.head, at.column).pack(count, at.width, b.v, p, rows, same);
  for (int64_t i = 0; i < rows * n; i += W) store(b.q_seen + i, load(b.q + i) * load(keys.seen + i));
  b.keys.score(b.q, count);

  const HeadRows y(a.y, at.row, at.begin, at.head, at.column);
  tiles(rows, p / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c = {};
    add_product(c, b.q_seen + i * n, n, 1, b.state + j, p, a.d_state);
    add_product(c, keys.scores + i * T, T, 1, b.v + j, p, i + R);
    each(c, [&](vf& x, int r, int u) {
      if (i + r < count) y.put(i + r, j + u * W, at.width, x);
    });
  });
  tiles(n, p / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c;
    each(c, [&](vf& x, int r, int u) { x = keys.passed[i + r] * load(b.state + (i + r) * p + j + u * W); });
    add_product(c, keys.k_left + i, 1, n, b.v + j, p, count);
    each(c, [&](vf& x, int r, int u) { store(b.state + (i + r) * p + j + u * W, x); });
  });
}

void forward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  Buffers b(a);
  walk<T>(a, b, begin, end, [&](const Place& place) { chunk(a, b, place); });
}

}  // namespace

void linear_attention_channel_fwd(const AttentionArgs& a, int64_t begin, int64_t end) { forward(a, begin, end); }

}  // namespace seqlib::SEQLIB_ISA

// What the forward and the backward kernel of linear attention share. Kernel files only, like vec.h.
#pragma once

#include "gemm.h"
#include "linear_attention.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int C = kAttentionChunk;

// Decays of one chunk. Sums are kept as pairs of floats, so that differences of large sums do not lose small decays.
struct ChunkDecay {
  float high[C], low[C];  // sum of log2 decays from the chunk's first position up to each
  float seen[C];          // how much of the incoming state each position sees
  float left[C];          // how much of each position is left at the end
  float passed;           // how much of the incoming state is left at the end

  void fill(const AttentionArgs& a, int64_t row, int64_t head, int64_t begin, int64_t count) {
    const float* g = a.log_decay;
    if (g) g += row * a.decay_batch + begin * a.decay_row + head * a.decay_head;
    double sum = 0;
    for (int64_t i = 0; i < C; ++i) {
      // Below -1000 everything is forgotten; the bound keeps sums finite and precise.
      if (g && i < count) sum += std::max(g[i * a.decay_row], -1000.0f) * 1.4426950408889634;
      high[i] = static_cast<float>(sum);
      low[i] = static_cast<float>(sum - high[i]);
    }
    for (int i = 0; i < C; i += W) {
      store(seen + i, exp2(load(high + i)));
      store(left + i, exp2((high[C - 1] - load(high + i)) + (low[C - 1] - load(low + i))));
    }
    passed = seen[count - 1];
  }

  // What position i sees of positions j to j + W - 1: zero where they are later.
  vf between(int64_t i, int64_t j) const {
    vi place;
    for (int lane = 0; lane < W; ++lane) place[lane] = lane;
    const vf w = exp2((high[i] - load(high + j)) + (low[i] - load(low + j)));
    return place <= static_cast<int32_t>(i - j) ? w : vf{};
  }
};

// The rows of one head from one position on.
struct HeadRows {
  void* data;
  int64_t row;
  bool bf16;

  HeadRows(const Heads& h, int64_t batch, int64_t position, int64_t head, int64_t column = 0)
      : row(h.row), bf16(h.bf16) {
    const int64_t offset = batch * h.batch + position * h.row + head / h.shared * h.head + column;
    data = static_cast<char*>(h.data) + offset * (h.bf16 ? 2 : 4);
  }
  template <class F>
  void with(F&& f) const {
    bf16 ? f(static_cast<seqlib::SEQLIB_ISA::bf16*>(data)) : f(static_cast<float*>(data));
  }
  template <class F>
  void pack(int64_t count, int64_t width, float* to, int64_t to_row, int64_t rows, F&& f) const {
    with([&](auto* from) { SEQLIB_ISA::pack(from, row, count, width, to, to_row, rows, f); });
  }
  void pack_transposed(int64_t count, int64_t width, float* to, int64_t to_row, int64_t columns) const {
    with([&](auto* from) { SEQLIB_ISA::pack_transposed(from, row, count, width, to, to_row, columns); });
  }
  vf get(int64_t i, int64_t j, int64_t width) const {
    vf x;
    with([&](auto* from) { x = SEQLIB_ISA::get(from + i * row + j, width - j); });
    return x;
  }
  void put(int64_t i, int64_t j, int64_t width, vf x) const {
    if (j < width) with([&](auto* to) { SEQLIB_ISA::put(to + i * row + j, x, width - j); });
  }
};

// Log-decays per channel in the form of heads; read only.
inline Heads decays(const AttentionArgs& a) {
  return {const_cast<float*>(a.log_decay), a.decay_batch, a.decay_row, a.decay_head, 1, false};
}

// The rows that come next, brought towards the cache a few lines at a time between tiles: they lie far apart, so the
// hardware does not guess them, and asked for all at once they would wait for each other.
class Ahead {
 public:
  void clear() { count_ = next_ = 0; }
  void add(const HeadRows& rows, int64_t count, int64_t width) {
    const int64_t size = rows.bf16 ? 2 : 4;
    if (count > 0) regions_[count_++] = {static_cast<const char*>(rows.data), rows.row * size, count, width * size, 0};
  }
  void fetch() {
    for (int lines = 32; lines > 0 && next_ < count_;) {
      Region& r = regions_[next_];
      __builtin_prefetch(r.row + r.column, 0, 2);
      --lines;
      if ((r.column += 64) < r.bytes) continue;
      r.column = 0;
      r.row += r.stride;
      if (--r.rows == 0) ++next_;
    }
  }

 private:
  struct Region {
    const char* row;
    int64_t stride, rows, bytes, column;
  };
  Region regions_[6];
  int count_ = 0, next_ = 0;
};

inline vf same(vf v, int64_t) { return v; }

// A head's state, or a part of its columns, between its packed form and memory; null is zero.
inline void load_state(const float* from, int64_t stride, int64_t n, int64_t width, float* to, int64_t rows,
                       int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += W)
      store(to + i * columns + j, from && i < n && j < width ? get(from + i * stride + j, width - j) : vf{});
}

inline void store_state(const float* from, int64_t columns, int64_t n, int64_t width, float* to, int64_t stride) {
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < width; j += W) put(to + i * stride + j, load(from + i * columns + j), width - j);
}

// Where a chunk of the forward pass stands: a head of a row, columns of its values, and positions.
struct Place {
  int64_t row, head, column, width, begin, count;
};

// Walks the chunks of tasks begin to end, states and checkpoints on the way: chunk(place) does the rest, with the state
// in b.state. What is written now and what is read next is brought towards the cache meanwhile.
template <int Size, class Buffers, class F>
inline void walk(const AttentionArgs& a, Buffers& b, int64_t begin, int64_t end, F&& chunk) {
  const int64_t size = a.d_state * a.headdim;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t part = task % a.parts, head = task / a.parts % a.nheads, row = task / a.parts / a.nheads;
    const int64_t column = part * a.part_width, width = std::min(a.part_width, a.headdim - column);
    const int64_t first = (row * a.nheads + head) * size + column;
    load_state(a.initial ? a.initial + first : nullptr, a.headdim, a.d_state, width, b.state, b.n, b.p);
    for (int64_t s = a.first_span[row]; s < a.first_span[row + 1]; ++s) {
      const AttentionSpan& span = a.spans[s];
      if (span.fresh) load_state(nullptr, 0, 0, 0, b.state, b.n, b.p);
      int64_t number = 0;
      for (int64_t at = span.begin; at < span.end; at += Size, ++number) {
        if (a.checkpoints && number % a.every == 0) {
          const int64_t slot = (span.checkpoint + number / a.every) * a.nheads + head;
          store_state(b.state, b.p, a.d_state, width, a.checkpoints + slot * size + column, a.headdim);
        }
        const int64_t count = std::min<int64_t>(Size, span.end - at);
        const int64_t next = std::min<int64_t>(Size, span.end - at - count);
        b.ahead.clear();
        b.ahead.add(HeadRows(a.y, row, at, head, column), count, width);
        b.ahead.add(HeadRows(a.q, row, at + Size, head), next, a.d_state);
        b.ahead.add(HeadRows(a.k, row, at + Size, head), next, a.d_state);
        b.ahead.add(HeadRows(a.v, row, at + Size, head, column), next, width);
        if (Size == kChannelChunk) b.ahead.add(HeadRows(decays(a), row, at + Size, head), next, a.d_state);
        chunk(Place{row, head, column, width, at, count});
      }
    }
    store_state(b.state, b.p, a.d_state, width, a.final + first, a.headdim);
  }
}

}  // namespace
}  // namespace seqlib::SEQLIB_ISA

// Chunks of linear attention with a decay per key channel. Kernel files only, like vec.h.
//
// What position i sees of position j differs from channel to channel, so scores are no product of matrices, and decays
// split into a factor for i and one for j overflow. Here decays of single tokens are multiplied up pair by pair, in
// chunks so short that this costs less than the products with the state.
#pragma once

#include "linear_attention_chunk.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int T = kChannelChunk;

// Calls f<V>(first channel) for runs of V vectors that cover n channels; four hide the latency of a chain of products.
template <int V = 4, class F>
inline void strips(int64_t n, F&& f, int64_t channel = 0) {
  if constexpr (V > 0) {
    for (; n - channel >= V * W; channel += V * W) f.template operator()<V>(channel);
    strips<V - 1>(n, f, channel);
  }
}

// Keys and decays of a chunk: rows of n channels.
struct ChannelChunk {
  int64_t n;
  float *k, *k_left;     // keys, and what is left of them at the end
  float *decay, *seen;   // decay of each token, and how much of the incoming state it sees
  float* passed;         // how much of the incoming state is left at the end
  float *sums, *scores;  // T x T, and the vectors of sums that they are made of

  static int64_t size(int64_t n) { return (4 * T + 1) * n + T * T * (W + 1); }
  ChannelChunk(int64_t n, Scratch& scratch)
      : n(n), k(scratch.take(T, n)), k_left(scratch.take(T, n)), decay(scratch.take(T, n)), seen(scratch.take(T, n)),
        passed(scratch.take(1, n)), sums(scratch.take(T * T, W)), scores(scratch.take(T, T)) {}

  void fill(const AttentionArgs& a, int64_t row, int64_t head, int64_t begin, int64_t count) {
    HeadRows(a.k, row, begin, head).pack(count, a.d_state, k, n, round_up(count, kRows), same);
    const HeadRows log_decay(decays(a), row, begin, head);
    for (int64_t j = 0; j < a.d_state; j += W) {
      vf sum = {}, product = splat(1.0f);
      for (int64_t i = 0; i < count; ++i) {
        const vf g = max(log_decay.get(i, j, a.d_state), splat(-1000.0f)), w = exp(g);
        sum += g;
        product *= w;
        store(decay + i * n + j, w);
        store(seen + i * n + j, product);
      }
      store(passed + j, exp(sum));  // not the product, whose error would grow with the number of tokens
    }
  }

  void leave(int64_t count) {
    for (int64_t j = 0; j < n; j += W) {
      vf left = splat(1.0f);
      for (int64_t i = count; i-- > 0; left *= load(decay + i * n + j))
        store(k_left + i * n + j, left * load(k + i * n + j));
    }
  }

  // Scores of all pairs, and k_left on the way. Rows up to the next multiple of kRows become zero, whatever an earlier
  // chunk, which may have been another document's, left there.
  void score(const float* q, int64_t count) {
    strips(n, [&, n = n, k = k, decay = decay, sums = sums]<int V>(int64_t channel) {
      for (int64_t j = 0; j < count; ++j) {
        vf left[V];
        for (int v = 0; v < V; ++v) left[v] = load(k + j * n + channel + v * W);
        for (int64_t i = j; i < count; ++i) {
          vf sum = channel ? load(sums + (i * T + j) * W) : vf{};
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            if (i > j) left[v] *= load(decay + i * n + channel + v * W);
            sum += left[v] * load(q + i * n + channel + v * W);
          }
          store(sums + (i * T + j) * W, sum);
        }
        for (int v = 0; v < V; ++v) store(k_left + j * n + channel + v * W, left[v]);
      }
    });
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j <= i; j += W) {
        vf t[W];
        for (int lane = 0; lane < W; ++lane) t[lane] = load(sums + (i * T + j + lane) * W);  // zero where later than i
        store(scores + i * T + j, lane_sums(t));
      }
    std::fill(scores + count * T, scores + round_up(count, kRows) * T, 0.0f);
  }
};

}  // namespace
}  // namespace seqlib::SEQLIB_ISA

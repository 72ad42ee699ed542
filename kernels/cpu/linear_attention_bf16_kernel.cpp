// Linear attention forward on bfloat16 inputs, for machines that multiply pairs of them: products of 16-bit numbers summed
// in float32. Scores, and the state as queries read it, are rounded to 16 bits. What the state takes in is not: gradients
// of decays are small differences of products with it.
//
// A word holds two numbers that are neighbours along the summed axis.
#include "linear_attention_chunk.h"

namespace seqlib::SEQLIB_ISA {
namespace {

// c += A B over `count` words, as add_product does over numbers.
template <int R, int V>
inline __attribute__((always_inline)) void add_pairs(Tile<R, V>& c, const float* a, int64_t a_row, int64_t a_step,
                                                     const float* b, int64_t b_row, int64_t count) {
  for (int64_t k = 0; k < count; ++k, a += a_step, b += b_row) {
    __m512bh x[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) std::memcpy(&x[v], b + v * W, sizeof x[v]);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t word;
      std::memcpy(&word, a + r * a_row, sizeof word);
      const __m512bh s = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) c[r][v] = _mm512_dpbf16_ps(c[r][v], s, x[v]);
    }
  }
}

inline __m256i rounded(vf x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }

inline void store_pair(float* to, vf first, vf second) {
  const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(second)), 16);
  _mm512_storeu_si512(to, _mm512_or_si512(high, _mm512_cvtepu16_epi32(rounded(first))));
}

// Pairs of rows: row i of `to` holds rows 2i and 2i + 1; rows from `count` on are zero.
inline void pack_pairs(const HeadRows& from, int64_t count, int64_t width, float* to, int64_t to_row, int64_t rows) {
  for (int64_t i = 0; i < rows; i += 2)
    for (int64_t j = 0; j < width; j += W)
      store_pair(to + i / 2 * to_row + j, i < count ? from.get(i, j, width) : vf{},
                 i + 1 < count ? from.get(i + 1, j, width) : vf{});
}

// Rows as they are.
inline void copy_words(const HeadRows& from, int64_t count, int64_t width, float* to, int64_t to_row, int64_t rows) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(to + i * to_row, static_cast<const bf16*>(from.data) + i * from.row, width * sizeof(bf16));
  std::fill(to + count * to_row, to + rows * to_row, 0.0f);
}

struct Buffers {
  int64_t n, p, words;  // padded d_state, padded width of this part of the heads, padded words of a row of q
  Scratch scratch;
  float *q, *k, *kt, *k_wide, *v, *v_left, *scores, *state_pairs, *state;
  ChunkDecay decay;
  Ahead ahead;

  explicit Buffers(const AttentionArgs& a)
      : n(padded(a.d_state)), p(padded(a.part_width)), words(round_up(n / 2, W)),
        scratch(C * (3 * words + n + p / 2 + p) + 8 * C + n / 2 * p + n * p), q(scratch.take(C, words)),
        k(scratch.take(C, words)), kt(scratch.take(words, C)), k_wide(scratch.take(C, n)), v(scratch.take(C / 2, p)),
        v_left(scratch.take(C, p)), scores(scratch.take(16, C / 2)),
        state_pairs(scratch.take(n / 2, p)), state(scratch.take(n, p)) {}
};

void chunk(const AttentionArgs& a, Buffers& b, const Place& at) {
  const ChunkDecay& decay = b.decay;
  const int64_t count = at.count, rows = round_up(count, kRows), n = b.n, p = b.p;
  const HeadRows k(a.k, at.row, at.begin, at.head), v(a.v, at.row, at.begin, at.head, at.column);
  b.decay.fill(a, at.row, at.head, at.begin, count);
  copy_words(HeadRows(a.q, at.row, at.begin, at.head), count, a.d_state, b.q, b.words, rows);
  copy_words(k, count, a.d_state, b.k, b.words, rows);
  pack_transposed(b.k, b.words, count, b.words, b.kt, C, padded(count));
  k.pack(count, a.d_state, b.k_wide, n, count, same);
  v.pack(count, at.width, b.v_left, p, count, [&](vf x, int64_t i) { return x * decay.left[i]; });
  pack_pairs(v, count, at.width, b.v, p, rows);
  for (int64_t i = 0; i < n; i += 2)
    for (int64_t j = 0; j < p; j += W)
      store_pair(b.state_pairs + i / 2 * p + j, load(b.state + i * p + j), load(b.state + (i + 1) * p + j));

  const HeadRows y(a.y, at.row, at.begin, at.head, at.column);
  for (int64_t block = 0; block < rows; block += 16) {
    const int64_t end = std::min<int64_t>(block + 16, rows);
    for (int64_t i = block; i < end; i += kRows)
      tiles(kRows, round_up(i + kRows, W) / W, [&]<int R, int V>(int64_t r0, int64_t j) {
        b.ahead.fetch();
        Tile<R, V> c = {};
        add_pairs(c, b.q + (i + r0) * b.words, b.words, 1, b.kt + j, C, n / 2);
        each(c, [&](vf& x, int r, int u) {
          const __m256i score = rounded(x * decay.between(i + r0 + r, j + u * W));
          std::memcpy(b.scores + ((i + r0 + r - block) * C + j + u * W) / 2, &score, sizeof score);
        });
      });
    tiles(end - block, p / W, [&]<int R, int V>(int64_t r0, int64_t j) {
      b.ahead.fetch();
      const int64_t i = block + r0;
      Tile<R, V> c = {};
      add_pairs(c, b.q + i * b.words, b.words, 1, b.state_pairs + j, p, n / 2);
      each(c, [&](vf& x, int r, int) { x *= decay.seen[i + r]; });
      add_pairs(c, b.scores + r0 * C / 2, C / 2, 1, b.v + j, p, (i + R) / 2);
      each(c, [&](vf& x, int r, int u) {
        if (i + r < count) y.put(i + r, j + u * W, at.width, x * a.scale);
      });
    });
  }
  tiles(n, p / W, [&]<int R, int V>(int64_t i, int64_t j) {
    b.ahead.fetch();
    Tile<R, V> c;
    each(c, [&](vf& x, int r, int u) { x = decay.passed * load(b.state + (i + r) * p + j + u * W); });
    add_product(c, b.k_wide + i, 1, n, b.v_left + j, p, count);
    each(c, [&](vf& x, int r, int u) { store(b.state + (i + r) * p + j + u * W, x); });
  });
}

void forward(const AttentionArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  Buffers b(a);
  walk<C>(a, b, begin, end, [&](const Place& place) { chunk(a, b, place); });
}

}  // namespace

void linear_attention_fwd(const AttentionArgs& a, int64_t begin, int64_t end) { forward(a, begin, end); }

}  // namespace seqlib::SEQLIB_ISA

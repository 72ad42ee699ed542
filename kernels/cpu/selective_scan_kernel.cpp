// Selective scan forward. Lanes are channels, so nothing is summed across lanes. Blocks of channels walk through time
// together in tiles small enough for L1: what depends on (step, channel) is prepared once per tile and block, then two
// states at a time sweep the tile with their values in registers.
#include "selective_scan_tile.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int V = kScanBlock / W;  // vectors of a full block
#if defined(__AVX512F__)
constexpr int kUnroll = 4;  // vectors swept together; bounded by the registers
#else
constexpr int kUnroll = 2;
#endif

// One record per step and vector: interleaved, so that the three never fall on the same cache set.
struct Record {
  vf delta, input, y;
};

template <bool Grows, int S, int U>
inline void sweep(Record* records, const float* B, const float* C, int steps, float* h_at, const float* A_at,
                  Ahead::Two ahead) {
  vf h[S][U];
  for (int s = 0; s < S; ++s)
    for (int u = 0; u < U; ++u) h[s][u] = load(h_at + s * kScanBlock + u * W);
  for (int t = 0; t < steps; ++t, records += V, B += N, C += N) {
    ahead.fetch();
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const vf delta = records[u].delta, input = records[u].input;
      vf y = records[u].y;
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) {
        const vf A = load(A_at + s * kScanBlock + u * W);  // not held: the registers are for h
        h[s][u] = exp2<Grows>(delta * A) * h[s][u] + input * B[s];
        y += h[s][u] * C[s];
      }
      records[u].y = y;
    }
  }
  for (int s = 0; s < S; ++s)
    for (int u = 0; u < U; ++u) store(h_at + s * kScanBlock + u * W, h[s][u]);
}

template <bool Grows, int S>
inline void sweep_block(Record (*records)[V], const float* B, const float* C, int steps, int vectors, float* h,
                        const float* A, Ahead::Two ahead) {
  const Ahead::Two idle = Ahead().pair(0);
  int v = 0;
  for (; v + kUnroll <= vectors; v += kUnroll)
    sweep<Grows, S, kUnroll>(records[0] + v, B, C, steps, h + v * W, A + v * W, v ? idle : ahead);
  for (; v < vectors; ++v) sweep<Grows, S, 1>(records[0] + v, B, C, steps, h + v * W, A + v * W, v ? idle : ahead);
}

// Blocks of one group of one row that walk through time together.
template <class E>
class Walk {
 public:
  Walk(const ScanArgs& a, int64_t most)
      : a_(a), n_(a.d_state), per_group_(a.d_inner / a.groups), size_(n_ * kScanBlock),
        memory_(allocate(2 * most * size_ + 2 * round_up(n_, N) * T)), grows_(new bool[most]) {
    h_ = memory_.get();
    A_ = h_ + most * size_;
    B_ = A_ + most * size_;
    C_ = B_ + round_up(n_, N) * T;
  }

  void run(int64_t row, int64_t group, int64_t begin, int64_t end) {
    row_ = row;
    for (int64_t b = begin; b < end; ++b) enter(first(group, b), width(group, b), b - begin);
    for (int64_t i = a_.first_tile[row]; i < a_.first_tile[row + 1]; ++i) {
      const ScanTile& tile = a_.tiles[i];
      copy_states(a_.B, row, group, tile, n_, B_);
      copy_states(a_.C, row, group, tile, n_, C_);
      for (int64_t b = begin; b < end; ++b) {
        Ahead ahead;
        if (b + 1 < end)
          expect(ahead, tile.begin, first(group, b + 1), width(group, b + 1));
        else if (i + 1 < a_.first_tile[row + 1])
          expect(ahead, a_.tiles[i + 1].begin, first(group, begin), width(group, begin));
        block(tile, first(group, b), width(group, b), b - begin, ahead);
      }
    }
    for (int64_t b = begin; b < end; ++b) leave(first(group, b), width(group, b), b - begin);
  }

 private:
  int64_t first(int64_t group, int64_t b) const { return group * per_group_ + b * a_.block; }
  int width(int64_t group, int64_t b) const {
    return static_cast<int>(std::min(a_.block, (group + 1) * per_group_ - first(group, b)));
  }
  const E* at(const ScanInput& t, int64_t step, int64_t channel) const {
    return static_cast<const E*>(t.data) + row_ * t.batch + step * t.row + channel;
  }
  E* y_at(int64_t step, int64_t channel) const {
    return static_cast<E*>(a_.y) + (row_ * a_.seqlen + step) * a_.d_inner + channel;
  }

  void enter(int64_t first, int width, int64_t slot) {
    float *h = h_ + slot * size_, *A = A_ + slot * size_;
    std::fill_n(h, size_, 0.0f);
    std::fill_n(A, size_, 0.0f);
    grows_[slot] = !a_.softplus;
    for (int64_t s = 0; s < n_; ++s)
      for (int c = 0; c < width; ++c) {
        A[s * kScanBlock + c] = a_.A[(first + c) * n_ + s] * log2e;
        grows_[slot] |= A[s * kScanBlock + c] > 0;
        if (a_.initial) h[s * kScanBlock + c] = a_.initial[(row_ * a_.d_inner + first + c) * n_ + s];
      }
  }

  void leave(int64_t first, int width, int64_t slot) {
    for (int c = 0; c < width; ++c)
      for (int64_t s = 0; s < n_; ++s)
        a_.final[(row_ * a_.d_inner + first + c) * n_ + s] = h_[slot * size_ + s * kScanBlock + c];
  }

  void expect(Ahead& ahead, int64_t step, int64_t channel, int width) const {
    const int64_t bytes = width * sizeof(E);
    for (const ScanInput* t : {&a_.x, &a_.dt, &a_.z})
      if (t->data) ahead.add(at(*t, step, channel), t->row * sizeof(E), bytes);
    ahead.add(y_at(step, channel), a_.d_inner * sizeof(E), bytes);
  }

  void block(const ScanTile& tile, int64_t first, int width, int64_t slot, const Ahead& ahead) {
    float *h = h_ + slot * size_, *A = A_ + slot * size_;
    const int steps = tile.length, vectors = (width + W - 1) / W;
    if (tile.fresh) std::fill_n(h, size_, 0.0f);
    if (a_.checkpoints && tile.checkpoint >= 0)
      for (int64_t s = 0; s < n_; ++s)
        std::copy_n(h + s * kScanBlock, width, a_.checkpoints + (tile.checkpoint * n_ + s) * a_.d_inner + first);

    Record records[T][V];
    for (int v = 0; v < vectors; ++v) {
      const int lanes = std::min(width - v * W, W);
      const int64_t c = first + v * W;
      const vf D = a_.D ? get(a_.D + c, lanes) : vf{}, bias = a_.dt_bias ? get(a_.dt_bias + c, lanes) : vf{};
      for (int t = 0; t < steps; ++t) {
        const vf x = get(at(a_.x, tile.begin + t, c), lanes);
        vf delta = get(at(a_.dt, tile.begin + t, c), lanes) + bias;
        if (a_.softplus) delta = softplus(delta);
        records[t][v] = {delta, delta * x, D * x};
      }
    }

    grows_[slot] ? sweep_all<true>(records, steps, vectors, h, A, ahead)
                 : sweep_all<false>(records, steps, vectors, h, A, ahead);

    for (int v = 0; v < vectors; ++v) {
      const int lanes = std::min(width - v * W, W);
      const int64_t c = first + v * W;
      for (int t = 0; t < steps; ++t) {
        vf y = records[t][v].y;
        if (a_.z.data) y *= silu(get(at(a_.z, tile.begin + t, c), lanes));
        put(y_at(tile.begin + t, c), y, lanes);
      }
    }
  }

  template <bool Grows>
  void sweep_all(Record (*records)[V], int steps, int vectors, float* h, const float* A, const Ahead& ahead) {
    for (int64_t s = 0; s < n_; s += 2) {
      const float *B = B_ + s / N * T * N + s % N, *C = C_ + s / N * T * N + s % N;
      float* h_s = h + s * kScanBlock;
      const float* A_s = A + s * kScanBlock;
      if (s + 1 < n_)
        sweep_block<Grows, 2>(records, B, C, steps, vectors, h_s, A_s, ahead.pair(s / 2));
      else
        sweep_block<Grows, 1>(records, B, C, steps, vectors, h_s, A_s, ahead.pair(s / 2));
    }
  }

  const ScanArgs& a_;
  const int64_t n_, per_group_, size_;
  Floats memory_;
  std::unique_ptr<bool[]> grows_;  // of each slot: whether a decay may exceed 1
  float *h_, *A_, *B_, *C_;
  int64_t row_ = 0;
};

template <class E>
void forward(const ScanArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  // Together, blocks share the pages of their rows and the copy of B and C, as long as their states stay in L2.
  const int64_t together = std::clamp<int64_t>(65536 / (a.d_state * kScanBlock), 1, a.blocks);
  Walk<E> walk(a, together);
  while (begin < end) {
    const int64_t group = begin / a.blocks, block = begin % a.blocks;
    const int64_t count = std::min({end - begin, a.blocks - block, together});
    walk.run(group / a.groups, group % a.groups, block, block + count);
    begin += count;
  }
}

}  // namespace

void selective_scan_fwd(const ScanArgs& a, int64_t begin, int64_t end) {
  a.x.bf16 ? forward<bf16>(a, begin, end) : forward<float>(a, begin, end);
}

}  // namespace seqlib::SEQLIB_ISA

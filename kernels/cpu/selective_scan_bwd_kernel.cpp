// Selective scan backward. Tiles go from the last to the first. Each begins from the state that the forward pass kept,
// runs forward to get decays and states again, then backward. Equations, with q the gradient of h and p = decay * h_prev:
//   q_t = C g_t + decay_{t+1} q_{t+1},  g = dy silu(z);  ddelta = x sum_n q B + sum_n q p A;  dA = sum_t q p delta
//   dx = D g + delta sum_n q B;  dB = sum over channels of q delta x;  dC = sum over channels of g h
#include "selective_scan_tile.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int K = kScanBackBlock;
constexpr int V = K / W;  // vectors of a full block
constexpr int kUnroll = 2;

// All that one (step, vector) needs, side by side: separate arrays would share cache sets.
struct Record {
  vf delta, input, y, g, s, dd;
  vf decay[2], p[2];
};

// One or two states of U vectors over a tile. h: states before the tile. q: gradient of the states after it, replaced by
// the one before it. dB, dC: rows of T sums over channels.
template <int S, int U>
inline void sweep(Record* records, const float* B, const float* C, int steps, const float* h_at, const float* A_at,
                  float* q_at, float* dA_at, float (*dB)[T], float (*dC)[T], Ahead::Two ahead) {
  vf h[S][U], A[S][U];
  for (int s = 0; s < S; ++s)
    for (int u = 0; u < U; ++u) {
      h[s][u] = load(h_at + s * K + u * W);
      A[s][u] = load(A_at + s * K + u * W);
    }
  for (int t = 0; t < steps; ++t) {
    ahead.fetch();
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      Record& r = records[t * V + u];
      const vf delta = r.delta, input = r.input;
      vf y = r.y;
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) {
        const vf decay = exp2(delta * A[s][u]), p = decay * h[s][u];
        h[s][u] = p + input * B[t * N + s];
        y += h[s][u] * C[t * N + s];
        r.decay[s] = decay;
        r.p[s] = p;
      }
      r.y = y;
    }
  }

  vf q[S][U], dA[S][U];
  for (int s = 0; s < S; ++s)
    for (int u = 0; u < U; ++u) {
      q[s][u] = load(q_at + s * K + u * W);
      dA[s][u] = load(dA_at + s * K + u * W);
    }
  for (int end = steps; end > 0;) {
    const int begin = (end - 1) / W * W;
    vf sum_B[S][W], sum_C[S][W];
    for (int s = 0; s < S; ++s)
      for (int t = end - begin; t < W; ++t) sum_B[s][t] = sum_C[s][t] = vf{};
    for (int t = end - 1; t >= begin; --t) {
      vf to_B[S], to_C[S];
#pragma GCC unroll 2
      for (int u = 0; u < U; ++u) {
        Record& r = records[t * V + u];
        const vf delta = r.delta, input = r.input, g = r.g;
        vf sum = r.s, dd = r.dd;
#pragma GCC unroll 2
        for (int s = 0; s < S; ++s) {
          const float b = B[t * N + s];
          const vf p = r.p[s], grad = g * C[t * N + s] + q[s][u], gp = grad * p;
          sum += grad * b;
          dd += gp * A[s][u];
          dA[s][u] += gp * delta;
          const vf h_now = p + input * b;
          to_B[s] = u ? to_B[s] + grad * input : grad * input;
          to_C[s] = u ? to_C[s] + g * h_now : g * h_now;
          q[s][u] = r.decay[s] * grad;
        }
        r.s = sum;
        r.dd = dd;
      }
      for (int s = 0; s < S; ++s) {
        sum_B[s][t - begin] = to_B[s];
        sum_C[s][t - begin] = to_C[s];
      }
    }
    for (int s = 0; s < S; ++s) {
      store(dB[s] + begin, load(dB[s] + begin) + lane_sums(sum_B[s]));
      store(dC[s] + begin, load(dC[s] + begin) + lane_sums(sum_C[s]));
    }
    end = begin;
  }
  for (int s = 0; s < S; ++s)
    for (int u = 0; u < U; ++u) {
      store(q_at + s * K + u * W, q[s][u]);
      store(dA_at + s * K + u * W, dA[s][u]);
    }
}

// Blocks of some parts of one group of one row that walk back through time together.
template <class E>
class Walk {
 public:
  Walk(const ScanBackArgs& g, int64_t most)
      : g_(g), a_(g.of), n_(a_.d_state), per_group_(a_.d_inner / a_.groups), size_(n_ * K),
        memory_(allocate(3 * most * size_ + 2 * most * K + size_ + 4 * round_up(n_, N) * T)) {
    A_ = memory_.get();
    q_ = A_ + most * size_;
    dA_ = q_ + most * size_;
    dD_ = dA_ + most * size_;
    dbias_ = dD_ + most * K;
    h_ = dbias_ + most * K;
    B_ = h_ + size_;
    C_ = B_ + round_up(n_, N) * T;
    dB_ = reinterpret_cast<float(*)[T]>(C_ + round_up(n_, N) * T);
    dC_ = dB_ + round_up(n_, N);
  }

  void run(int64_t row, int64_t group, int64_t begin, int64_t end) {
    row_ = row;
    group_ = group;
    const int64_t zero = first_block(begin), last = first_block(end);
    for (int64_t b = zero; b < last; ++b) enter(b, b - zero);
    for (int64_t i = a_.first_tile[row + 1]; i-- > a_.first_tile[row];) {
      const ScanTile& tile = a_.tiles[i];
      copy_states(a_.B, row, group, tile, n_, B_);
      copy_states(a_.C, row, group, tile, n_, C_);
      for (int64_t part = begin; part < end; ++part) {
        std::fill_n(dB_[0], 2 * round_up(n_, N) * T, 0.0f);
        for (int64_t b = first_block(part); b < first_block(part + 1); ++b) {
          Ahead ahead;
          if (b + 1 < last)
            expect(ahead, tile.begin, b + 1);
          else if (i > a_.first_tile[row])
            expect(ahead, a_.tiles[i - 1].begin, zero);
          block(tile, b, b - zero, ahead);
        }
        write(g_.dB, dB_, part, tile);
        write(g_.dC, dC_, part, tile);
      }
    }
    for (int64_t b = zero; b < last; ++b) leave(b, b - zero);
  }

  int64_t first_block(int64_t part) const { return (per_group_ + K - 1) / K * part / g_.parts; }

 private:
  int64_t first(int64_t b) const { return group_ * per_group_ + b * K; }
  int width(int64_t b) const { return static_cast<int>(std::min<int64_t>(K, per_group_ - b * K)); }
  const E* at(const ScanInput& t, int64_t step, int64_t channel) const {
    return static_cast<const E*>(t.data) + row_ * t.batch + step * t.row + channel;
  }
  E* at(void* t, int64_t step, int64_t channel) const {
    return static_cast<E*>(t) + (row_ * a_.seqlen + step) * a_.d_inner + channel;
  }

  void enter(int64_t b, int64_t slot) {
    float *A = A_ + slot * size_, *q = q_ + slot * size_;
    std::fill_n(A, size_, 0.0f);
    std::fill_n(q, size_, 0.0f);
    std::fill_n(dA_ + slot * size_, size_, 0.0f);
    std::fill_n(dD_ + slot * K, K, 0.0f);
    std::fill_n(dbias_ + slot * K, K, 0.0f);
    for (int64_t s = 0; s < n_; ++s)
      for (int c = 0; c < width(b); ++c) {
        A[s * K + c] = a_.A[(first(b) + c) * n_ + s] * log2e;
        if (g_.dfinal) q[s * K + c] = g_.dfinal[(row_ * a_.d_inner + first(b) + c) * n_ + s];
      }
  }

  void leave(int64_t b, int64_t slot) {
    for (int c = 0; c < width(b); ++c) {
      const int64_t channel = row_ * a_.d_inner + first(b) + c;
      for (int64_t s = 0; s < n_; ++s) {
        g_.dA[channel * n_ + s] = dA_[slot * size_ + s * K + c];
        g_.dinitial[channel * n_ + s] = q_[slot * size_ + s * K + c];
      }
      g_.dD[channel] = dD_[slot * K + c];
      g_.dbias[channel] = dbias_[slot * K + c];
    }
  }

  void expect(Ahead& ahead, int64_t step, int64_t b) const {
    const int64_t bytes = width(b) * sizeof(E);
    for (const ScanInput* t : {&a_.x, &a_.dt, &a_.z, &g_.dy})
      if (t->data) ahead.add(at(*t, step, first(b)), t->row * sizeof(E), bytes);
    for (void* t : {g_.dx, g_.ddt, g_.dz})
      if (t) ahead.add(at(t, step, first(b)), a_.d_inner * sizeof(E), bytes);
  }

  // The state before a tile.
  void restore(const ScanTile& tile, int64_t first, int width) {
    std::fill_n(h_, size_, 0.0f);
    if (tile.checkpoint >= 0) {
      for (int64_t s = 0; s < n_; ++s)
        std::copy_n(a_.checkpoints + (tile.checkpoint * n_ + s) * a_.d_inner + first, width, h_ + s * K);
    } else if (!tile.fresh && a_.initial) {
      for (int64_t s = 0; s < n_; ++s)
        for (int c = 0; c < width; ++c) h_[s * K + c] = a_.initial[(row_ * a_.d_inner + first + c) * n_ + s];
    }
  }

  void block(const ScanTile& tile, int64_t b, int64_t slot, const Ahead& ahead) {
    const int steps = tile.length, vectors = (width(b) + W - 1) / W;
    restore(tile, first(b), width(b));
    Record records[T * V];
    for (int v = 0; v < vectors; ++v) {
      const int lanes = std::min(width(b) - v * W, W);
      const int64_t c = first(b) + v * W;
      const vf D = a_.D ? get(a_.D + c, lanes) : vf{}, bias = a_.dt_bias ? get(a_.dt_bias + c, lanes) : vf{};
      for (int t = 0; t < steps; ++t) {
        Record& r = records[t * V + v];
        const int64_t step = tile.begin + t;
        const vf x = get(at(a_.x, step, c), lanes), dy = get(at(g_.dy, step, c), lanes);
        vf delta = get(at(a_.dt, step, c), lanes) + bias;
        if (a_.softplus) delta = softplus(delta);
        r.delta = delta;
        r.input = delta * x;
        r.y = D * x;
        r.g = a_.z.data ? dy * silu(get(at(a_.z, step, c), lanes)) : dy;
        r.s = r.dd = vf{};
      }
    }

    float *A = A_ + slot * size_, *q = q_ + slot * size_, *dA = dA_ + slot * size_;
    for (int64_t s = 0; s < n_; s += 2) {
      const int64_t from = s / N * T * N + s % N;
      for (int v = 0; v < vectors;) {
        const int64_t o = s * K + v * W;
        const Ahead::Two fetch = v ? Ahead().pair(0) : ahead.pair(s / 2);
        auto run = [&](auto sweep) {
          sweep(records + v, B_ + from, C_ + from, steps, h_ + o, A + o, q + o, dA + o, dB_ + s, dC_ + s, fetch);
        };
        const bool two = s + 1 < n_, wide = v + kUnroll <= vectors;
        two ? wide ? run(sweep<2, kUnroll>) : run(sweep<2, 1>) : wide ? run(sweep<1, kUnroll>) : run(sweep<1, 1>);
        v += wide ? kUnroll : 1;
      }
    }
    if (tile.fresh) std::fill_n(q, size_, 0.0f);

    for (int v = 0; v < vectors; ++v) {
      const int lanes = std::min(width(b) - v * W, W);
      const int64_t c = first(b) + v * W;
      const vf D = a_.D ? get(a_.D + c, lanes) : vf{}, bias = a_.dt_bias ? get(a_.dt_bias + c, lanes) : vf{};
      vf dD = load(dD_ + slot * K + v * W), dbias = load(dbias_ + slot * K + v * W);
      for (int t = 0; t < steps; ++t) {
        const Record& r = records[t * V + v];
        const int64_t step = tile.begin + t;
        const vf x = get(at(a_.x, step, c), lanes);
        vf ddelta = x * r.s + r.dd * ln2;
        if (a_.softplus) ddelta *= sigmoid(get(at(a_.dt, step, c), lanes) + bias);
        put(at(g_.dx, step, c), D * r.g + r.delta * r.s, lanes);
        put(at(g_.ddt, step, c), ddelta, lanes);
        if (a_.z.data) {
          const vf z = get(at(a_.z, step, c), lanes), dy = get(at(g_.dy, step, c), lanes);
          put(at(g_.dz, step, c), dy * r.y * silu_grad(z, sigmoid(z)), lanes);
        }
        dD += r.g * x;
        dbias += ddelta;
      }
      store(dD_ + slot * K + v * W, dD);
      store(dbias_ + slot * K + v * W, dbias);
    }
  }

  void write(float* to, const float (*from)[T], int64_t part, const ScanTile& tile) const {
    to += (((row_ * a_.groups + group_) * g_.parts + part) * a_.seqlen + tile.begin) * n_;
    for (int t = 0; t < tile.length; ++t)
      for (int64_t s = 0; s < n_; ++s) to[t * n_ + s] = from[s][t];
  }

  const ScanBackArgs& g_;
  const ScanArgs& a_;
  const int64_t n_, per_group_, size_;
  Floats memory_;
  float *A_, *q_, *dA_, *dD_, *dbias_, *h_, *B_, *C_;
  float (*dB_)[T], (*dC_)[T];
  int64_t row_ = 0, group_ = 0;
};

template <class E>
void backward(const ScanBackArgs& g, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t blocks = (g.of.d_inner / g.of.groups + K - 1) / K;
  const int64_t per_part = (blocks + g.parts - 1) / g.parts;
  // Parts go together as long as their states stay in L2.
  const int64_t together = std::clamp<int64_t>(65536 / (g.of.d_state * K * per_part), 1, g.parts);
  Walk<E> walk(g, together * per_part);
  while (begin < end) {
    const int64_t group = begin / g.parts, part = begin % g.parts;
    const int64_t count = std::min({end - begin, g.parts - part, together});
    walk.run(group / g.of.groups, group % g.of.groups, part, part + count);
    begin += count;
  }
}

}  // namespace

void selective_scan_bwd(const ScanBackArgs& g, int64_t begin, int64_t end) {
  g.of.x.bf16 ? backward<bf16>(g, begin, end) : backward<float>(g, begin, end);
}

}  // namespace seqlib::SEQLIB_ISA

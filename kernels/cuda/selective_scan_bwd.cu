// The gradient of the selective scan: tiles of 32 steps from right to left, each from the state that the forward pass kept.
//
// With g = dy silu(z) and q the gradient of a state, from right to left:
//   q = C g + aq;  s += q B;  aq = a q;  m = aq h_before;  dA += m delta;  ddelta += m A;  dB += q delta x;  dC += g h
// Lanes are (channel, group of states) as in the forward pass. A warp works on `rounds` groups of channels in turn for a
// few steps at a time, adding up dB and dC in registers, before lanes and warps are summed: no atomics, one order.
#include "launch.h"
#include "selective_scan_tile.cuh"

namespace seqlib {
namespace {

constexpr int kWarps = kScanThreads / 32, kTile = kScanCheckpoint;

template <int S, int G, int K>
struct Backward {
  static constexpr int N = S * G, steps = 32 / S, pieces = kTile / steps;  // steps of a piece
  static constexpr int per_warp = 32 / G, per_round = kWarps * per_warp, channels = K * per_round;
  static constexpr int sums = 2 * steps * S;          // of dB and dC in a lane
  static constexpr int kept = sums / per_warp;        // of those after the sum over the channels of a warp
  static_assert(channels % kScanVector == 0 && sums % per_warp == 0);

  struct Tile {
    float delta[kTile][channels], x[kTile][channels], g[kTile][channels];  // then ddt, dx, and y before the gate
    float B[kTile][N], C[kTile][N];
    float h[K][pieces][kScanThreads][S];     // the state before each piece
    float part[kWarps][2][steps][N];         // dB and dC of each warp
  };

  using Place = Spread<channels, kTile>;

  static SEQLIB_DEVICE void prepare(const ScanBackArgs& b, const ScanTask& task, const Whole& whole, int64_t t, uint32_t real, Tile& tile) {
    const ScanArgs& a = b.of;
    Rows<N, kTile> B, C;
    const auto settle = [&](const auto& dt, const auto& x_, const auto& dy, const auto& z_) {
      Place::each_vector([&](int j, int step, int channel) {
        const int valid = task.channels - channel;
        float delta[kScanVector] = {}, x[kScanVector] = {}, g[kScanVector] = {};
        if (real >> step & 1 && valid > 0) {
          unpack_delta(a, dt[j], task.first + channel, valid, delta);
          unpack(x_[j], a.x.dtype, x);
          unpack(dy[j], b.dy.dtype, g);
          if (a.z.data) {
            float z[kScanVector];
            unpack(z_[j], a.z.dtype, z);
            SEQLIB_UNROLL
            for (int i = 0; i < kScanVector; ++i) g[i] *= silu(z[i]);
          }
        }
        store_tile(&tile.delta[step][channel], delta);
        store_tile(&tile.x[step][channel], x);
        store_tile(&tile.g[step][channel], g);
      });
    };
    const auto from = [&](const View& v) { return at(v, task.row, t, task.first); };
    const int64_t rows = a.seqlen - t;
    with_access(whole.tokens && in_vectors<kScanVector>(b.dy), a.x.dtype, [&](auto as) {
      constexpr Access how = decltype(as)::how;
      typename Place::Fetched dt, x, dy, z;
      Place::template fetch<how>(dt, a.dt, from(a.dt), rows, task.channels);
      Place::template fetch<how>(x, a.x, from(a.x), rows, task.channels);
      Place::template fetch<how>(dy, b.dy, from(b.dy), rows, task.channels);
      if (a.z.data) Place::template fetch<how>(z, a.z, from(a.z), rows, task.channels);
      if constexpr (N <= 32) {
        B.fetch(a, a.B, task, t, whole.B);
        C.fetch(a, a.C, task, t, whole.C);
      }
      settle(dt, x, dy, z);
    });
    if constexpr (N > 32) B.fetch(a, a.B, task, t, whole.B);
    B.settle(a.B.dtype, real, tile.B[0]);
    if constexpr (N > 32) C.fetch(a, a.C, task, t, whole.C);
    C.settle(a.C.dtype, real, tile.C[0]);
  }

  static SEQLIB_DEVICE void write(const ScanBackArgs& b, const ScanTask& task, const Whole& whole, int64_t t, uint32_t real, const Tile& tile) {
    const ScanArgs& a = b.of;
    const auto place = [&](int step, int channel) { return (task.row * a.seqlen + t + step) * a.d_inner + task.first + channel; };
    const auto inside = [&](int step, int channel) { return t + step < task.end ? task.channels - channel : 0; };
    if (b.dz) {
      with_access(whole.tokens && in_vectors<kScanVector>(b.dy), a.x.dtype, [&](auto as) {
        constexpr Access how = decltype(as)::how;
        typename Place::Fetched dys, zs;
        Place::template fetch<how>(dys, b.dy, at(b.dy, task.row, t, task.first), a.seqlen - t, task.channels);
        Place::template fetch<how>(zs, a.z, at(a.z, task.row, t, task.first), a.seqlen - t, task.channels);
        Place::each_vector([&](int j, int step, int channel) {
          float dz[kScanVector] = {}, dy[kScanVector], z[kScanVector];
          if (real >> step & 1) {
            unpack(zs[j], a.z.dtype, z);
            unpack(dys[j], b.dy.dtype, dy);
            SEQLIB_UNROLL
            for (int i = 0; i < kScanVector; ++i) {
              const float gate = sigmoid(z[i]);
              dz[i] = z[i] < -80.0f ? 0.0f : dy[i] * tile.g[step][channel + i] * gate * (1.0f + z[i] * (1.0f - gate));
            }
          }
          store<kScanVector>(b.dz, a.x.dtype, place(step, channel), inside(step, channel), dz);
        });
      });
    }
    Place::each_vector([&](int, int step, int channel) {
      float v[kScanVector];
      load_tile(&tile.x[step][channel], v);
      store<kScanVector>(b.dx, a.x.dtype, place(step, channel), inside(step, channel), v);
      load_tile(&tile.delta[step][channel], v);
      store<kScanVector>(b.ddt, a.x.dtype, place(step, channel), inside(step, channel), v);
    });
  }
};

// A lane's place: its states and, for each round, its channel.
template <int S, int G, int K>
struct Lane {
  using W = Backward<S, G, K>;
  int warp = thread_index() / 32, lane = thread_index() % 32, group = lane % G, n = group * S;

  SEQLIB_DEVICE int channel(int round) const { return warp * (K * W::per_warp) + round * W::per_warp + lane / G; }
};

template <int S, int G, int K>
SEQLIB_GLOBAL(kScanThreads, 2) scan_backward(const ScanBackArgs b) {
  using W = Backward<S, G, K>;
  constexpr int steps = W::steps;
  const ScanArgs& a = b.of;
  auto& tile = *shared_memory<typename W::Tile>();
  const ScanTask task(a, W::channels);
  const Whole whole(a, task);
  const Lane<S, G, K> me;
  const int64_t width = a.d_inner * a.d_state, place = task.row * a.segments + task.segment;
  const int64_t parts = b.parts, part = (task.first - task.group * (a.d_inner / a.groups)) / W::channels;
  const int64_t checkpoints = (a.seqlen + kScanCheckpoint - 1) / kScanCheckpoint;

  float A[K][S] = {}, aq[K][S] = {}, dA[K][S] = {}, D[K] = {}, dD[K] = {}, dbias[K] = {};
  const float* entry = a.segments > 1 ? a.entries + place * width : b.dfinal ? b.dfinal + task.row * width : nullptr;
  SEQLIB_UNROLL
  for (int k = 0; k < K; ++k) {
    const int64_t c = task.first + me.channel(k);
    if (me.channel(k) < task.channels) {
      load_states(a.A + c * a.d_state, a.d_state, me.n, A[k]);
      if (entry) load_states(entry + c * a.d_state, a.d_state, me.n, aq[k]);
      if (a.D) D[k] = a.D[c];
    }
    SEQLIB_UNROLL
    for (int s = 0; s < S; ++s) A[k][s] = base_two(A[k][s]);
  }

  for (int64_t t = task.begin + (task.end - 1 - task.begin) / kTile * kTile; t >= task.begin; t -= kTile) {
    const Marks marks(a, task.row, t, kTile);
    float kept[K][S] = {};
    SEQLIB_UNROLL
    for (int k = 0; k < K; ++k) {
      if (me.channel(k) < task.channels)
        load_states(a.checkpoints + (task.row * checkpoints + t / kTile) * width + (task.first + me.channel(k)) * a.d_state,
                    a.d_state, me.n, kept[k]);
    }
    W::prepare(b, task, whole, t, marks.real, tile);
    sync_block();
    SEQLIB_UNROLL
    for (int k = 0; k < K; ++k) {  // the states before each piece
      const int channel = me.channel(k);
      float(&h)[S] = kept[k];
      for (int piece = 0; piece < W::pieces; ++piece) {
        store_tile(tile.h[k][piece][thread_index()], h);
        SEQLIB_UNROLL
        for (int j = 0; j < steps; ++j) {
          const int step = piece * steps + j;
          const float delta = tile.delta[step][channel], input = delta * tile.x[step][channel];
          const float forget = marks.fresh >> step & 1 ? -INFINITY : 0.0f;
          float B[S];
          load_tile(&tile.B[step][me.n], B);
          SEQLIB_UNROLL
          for (int s = 0; s < S; ++s) h[s] = exp2_fast(delta * A[k][s] + forget) * h[s] + input * B[s];
        }
      }
    }
    for (int piece = W::pieces - 1; piece >= 0; --piece) {
      float sums[W::sums] = {};  // dB[steps][S], dC[steps][S]
      SEQLIB_UNROLL
      for (int k = 0; k < K; ++k) {
        const int channel = me.channel(k);
        float h[steps + 1][S], decay[steps][S], y[steps], s_sum[steps], m_sum[steps];
        load_tile(tile.h[k][piece][thread_index()], h[0]);
        SEQLIB_UNROLL
        for (int j = 0; j < steps; ++j) {
          const int step = piece * steps + j;
          const float delta = tile.delta[step][channel], input = delta * tile.x[step][channel];
          const float forget = marks.fresh >> step & 1 ? -INFINITY : 0.0f;
          float B[S];
          load_tile(&tile.B[step][me.n], B);
          SEQLIB_UNROLL
          for (int s = 0; s < S; ++s) {
            decay[j][s] = exp2_fast(delta * A[k][s] + forget);
            h[j + 1][s] = decay[j][s] * h[j][s] + input * B[s];
          }
        }
        SEQLIB_UNROLL
        for (int j = steps - 1; j >= 0; --j) {
          const int step = piece * steps + j;
          const float delta = tile.delta[step][channel], input = delta * tile.x[step][channel], g = tile.g[step][channel];
          float B[S], C[S];
          load_tile(&tile.B[step][me.n], B);
          load_tile(&tile.C[step][me.n], C);
          y[j] = s_sum[j] = m_sum[j] = 0.0f;
          SEQLIB_UNROLL
          for (int s = 0; s < S; ++s) {
            const float q = C[s] * g + aq[k][s];
            y[j] += C[s] * h[j + 1][s];
            s_sum[j] += q * B[s];
            aq[k][s] = decay[j][s] * q;
            const float m = aq[k][s] * h[j][s];
            dA[k][s] += m * delta;
            m_sum[j] += m * A[k][s];
            sums[j * S + s] += q * input;
            sums[(steps + j) * S + s] += g * h[j + 1][s];
          }
        }
        // Over the lanes of a channel: each ends with its share of the steps, or several lanes with the same step.
        constexpr int lanes = smaller(G, steps), same = G / lanes, share = steps / lanes;
        transposed_sum<lanes, same, steps>(y);
        transposed_sum<lanes, same, steps>(s_sum);
        transposed_sum<lanes, same, steps>(m_sum);
        sync_warp();  // all have read what is now replaced
        SEQLIB_UNROLL
        for (int j = 0; j < share; ++j) {
          const int step = piece * steps + me.group / same * share + j;
          const float all_y = lane_sum<same, 1>(y[j]), all_s = lane_sum<same, 1>(s_sum[j]), all_m = lane_sum<same, 1>(m_sum[j]);
          if (me.group % same == 0) {
            float &delta = tile.delta[step][channel], &x = tile.x[step][channel], &g = tile.g[step][channel];
            const float slope = a.softplus ? -expm1f(-delta) : 1.0f;
            const float ddt = marks.real >> step & 1 ? (x * all_s + kLn2 * all_m) * slope : 0.0f;
            const float dx = D[k] * g + delta * all_s, before_gate = all_y + D[k] * x;
            dD[k] += g * x;
            dbias[k] += ddt;
            delta = ddt;
            x = dx;
            g = before_gate;
          }
        }
      }
      transposed_sum<W::per_warp, G, W::sums>(sums);
      SEQLIB_UNROLL
      for (int i = 0; i < W::kept; ++i) {
        const int from = me.lane / G * W::kept + i, which = from / (steps * S), j = from / S % steps;
        tile.part[me.warp][which][j][me.n + from % S] = sums[i];
      }
      sync_block();
      for (int i = thread_index(); i < 2 * steps * W::N; i += kScanThreads) {
        const int which = i / (steps * W::N), j = i / W::N % steps, n = i % W::N;
        const int64_t at_step = t + piece * steps + j;
        float sum = 0.0f;
        SEQLIB_UNROLL
        for (int w = 0; w < kWarps; ++w) sum += tile.part[w][which][j][n];
        if (n < a.d_state && at_step < task.end)
          (which ? b.dC : b.dB)[(((task.row * a.groups + task.group) * parts + part) * a.seqlen + at_step) * a.d_state + n] = sum;
      }
      sync_block();
    }
    W::write(b, task, whole, t, marks.real, tile);
    sync_block();
  }
  SEQLIB_UNROLL
  for (int k = 0; k < K; ++k) {
    const int64_t c = task.first + me.channel(k);
    const float all_D = lane_sum<G, 1>(dD[k]), all_bias = lane_sum<G, 1>(dbias[k]);
    if (me.channel(k) < task.channels) {
      store_states(b.dA + place * width + c * a.d_state, a.d_state, me.n, dA[k]);
      if (task.begin == 0) store_states(b.dinitial + task.row * width + c * a.d_state, a.d_state, me.n, aq[k]);
      if (me.group == 0) {
        b.dD[place * a.d_inner + c] = all_D;
        b.dbias[place * a.d_inner + c] = all_bias;
      }
    }
  }
}

// What a segment does to the gradient of the state after it, from right to left.
template <int S, int G, int K>
SEQLIB_GLOBAL(kScanThreads, 2) scan_summarize_back(const ScanBackArgs b) {
  using W = Backward<S, G, K>;
  const ScanArgs& a = b.of;
  auto& tile = *shared_memory<typename W::Tile>();
  const ScanTask task(a, W::channels);
  const Whole whole(a, task);
  const Lane<S, G, K> me;
  const int64_t place = task.row * a.segments + task.segment;
  float A[K][S] = {}, aq[K][S] = {}, sum[K] = {};
  SEQLIB_UNROLL
  for (int k = 0; k < K; ++k) {
    if (me.channel(k) < task.channels) load_states(a.A + (task.first + me.channel(k)) * a.d_state, a.d_state, me.n, A[k]);
    SEQLIB_UNROLL
    for (int s = 0; s < S; ++s) A[k][s] = base_two(A[k][s]);
  }
  for (int64_t t = task.begin + (task.end - 1 - task.begin) / kTile * kTile; t >= task.begin; t -= kTile) {
    const Marks marks(a, task.row, t, kTile);
    W::prepare(b, task, whole, t, marks.real, tile);
    sync_block();
    for (int step = kTile - 1; step >= 0; --step) {
      const bool fresh = marks.fresh >> step & 1;
      float C[S];
      load_tile(&tile.C[step][me.n], C);
      SEQLIB_UNROLL
      for (int k = 0; k < K; ++k) {
        const float delta = tile.delta[step][me.channel(k)], g = tile.g[step][me.channel(k)];
        sum[k] += fresh ? INFINITY : delta;
        SEQLIB_UNROLL
        for (int s = 0; s < S; ++s)
          aq[k][s] = exp2_fast(delta * A[k][s] + (fresh ? -INFINITY : 0.0f)) * (C[s] * g + aq[k][s]);
      }
    }
    sync_block();
  }
  SEQLIB_UNROLL
  for (int k = 0; k < K; ++k) {
    const int64_t c = place * a.d_inner + task.first + me.channel(k);
    if (me.channel(k) < task.channels) {
      store_states(a.entries + c * a.d_state, a.d_state, me.n, aq[k]);
      if (me.group == 0) a.sums[c] = sum[k];
    }
  }
}

template <int S, int G, int K>
void run(const ScanBackArgs& b, Stream stream) {
  using W = Backward<S, G, K>;
  const ScanArgs& a = b.of;
  const int64_t blocks = a.batch * a.segments * a.groups * b.parts;
  if (a.segments > 1) {
    launch(scan_summarize_back<S, G, K>, blocks, kScanThreads, sizeof(typename W::Tile), stream, b);
    const int64_t states = a.batch * a.d_inner * a.d_state;
    launch(scan_combine, (states + kScanThreads - 1) / kScanThreads, kScanThreads, 0, stream, CombineArgs{a, b.dfinal, true});
  }
  launch(scan_backward<S, G, K>, blocks, kScanThreads, sizeof(typename W::Tile), stream, b);
}

// Calls f with the kernel for states of this size.
template <class F>
auto choose(int64_t d_state, F&& f) {
  if (d_state <= 8) return f(Backward<4, 2, 1>{});
  if (d_state <= 16) return f(Backward<4, 4, 2>{});
  if (d_state <= 32) return f(Backward<4, 8, 2>{});
  if (d_state <= 64) return f(Backward<4, 16, 2>{});
  if (d_state <= 128) return f(Backward<4, 32, 2>{});
  return f(Backward<8, 32, 1>{});
}

template <int S, int G, int K>
void run_as(Backward<S, G, K>, const ScanBackArgs& b, Stream stream) {
  run<S, G, K>(b, stream);
}

}  // namespace

int64_t scan_back_block_channels(int64_t d_state) {
  return choose(d_state, [](auto kind) -> int64_t { return decltype(kind)::channels; });
}

void start_selective_scan_bwd(const ScanBackArgs& b, Stream stream) {
  choose(b.of.d_state, [&](auto kind) { run_as(kind, b, stream); });
}

}  // namespace seqlib

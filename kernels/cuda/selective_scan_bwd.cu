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

  static SEQLIB_DEVICE void prepare(const ScanBackArgs& b, const ScanTask& task, int64_t t, uint32_t real, Tile& tile) {
    const ScanArgs& a = b.of;
    each_vector<channels, kTile>(task, [&](int step, int channel, int valid) {
      float delta[kScanVector] = {}, x[kScanVector] = {}, g[kScanVector] = {};
      if (real >> step & 1 && valid > 0) {
        const int64_t c = task.first + channel;
        float z[kScanVector];
        load_delta(a, at(a.dt, task.row, t + step, c), c, valid, delta);
        load<kScanVector>(a.x.data, a.x.dtype, at(a.x, task.row, t + step, c), valid, x);
        load<kScanVector>(b.dy.data, b.dy.dtype, at(b.dy, task.row, t + step, c), valid, g);
        if (a.z.data) {
          load<kScanVector>(a.z.data, a.z.dtype, at(a.z, task.row, t + step, c), valid, z);
          SEQLIB_UNROLL
          for (int i = 0; i < kScanVector; ++i) g[i] *= silu(z[i]);
        }
      }
      store<kScanVector>(&tile.delta[step][channel], kScanVector, delta);
      store<kScanVector>(&tile.x[step][channel], kScanVector, x);
      store<kScanVector>(&tile.g[step][channel], kScanVector, g);
    });
    stage<N, kTile>(a, a.B, task, t, real, tile.B[0]);
    stage<N, kTile>(a, a.C, task, t, real, tile.C[0]);
  }

  static SEQLIB_DEVICE void write(const ScanBackArgs& b, const ScanTask& task, int64_t t, uint32_t real, const Tile& tile) {
    const ScanArgs& a = b.of;
    each_vector<channels, kTile>(task, [&](int step, int channel, int valid) {
      if (t + step < task.end && valid > 0) {
        const int64_t c = task.first + channel, to = (task.row * a.seqlen + t + step) * a.d_inner + c;
        float v[kScanVector];
        load<kScanVector>(&tile.x[step][channel], kScanVector, v);
        store<kScanVector>(b.dx, a.x.dtype, to, valid, v);
        load<kScanVector>(&tile.delta[step][channel], kScanVector, v);
        store<kScanVector>(b.ddt, a.x.dtype, to, valid, v);
        if (b.dz) {
          float z[kScanVector] = {}, dy[kScanVector] = {};
          if (real >> step & 1) {
            load<kScanVector>(a.z.data, a.z.dtype, at(a.z, task.row, t + step, c), valid, z);
            load<kScanVector>(b.dy.data, b.dy.dtype, at(b.dy, task.row, t + step, c), valid, dy);
          }
          SEQLIB_UNROLL
          for (int i = 0; i < kScanVector; ++i) {
            const float gate = sigmoid(z[i]);
            v[i] = z[i] < -80.0f ? 0.0f : dy[i] * tile.g[step][channel + i] * gate * (1.0f + z[i] * (1.0f - gate));
          }
          store<kScanVector>(b.dz, a.x.dtype, to, valid, v);
        }
      }
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
    for (int s = 0; s < S; ++s) A[k][s] *= kLog2e;
  }

  for (int64_t t = task.begin + (task.end - 1 - task.begin) / kTile * kTile; t >= task.begin; t -= kTile) {
    const Marks marks(a, task.row, t, kTile);
    W::prepare(b, task, t, marks.real, tile);
    sync_block();
    SEQLIB_UNROLL
    for (int k = 0; k < K; ++k) {  // the states before each piece
      const int channel = me.channel(k);
      float h[S] = {};
      if (channel < task.channels)
        load_states(a.checkpoints + (task.row * checkpoints + t / kTile) * width + (task.first + channel) * a.d_state,
                    a.d_state, me.n, h);
      for (int piece = 0; piece < W::pieces; ++piece) {
        store<S>(tile.h[k][piece][thread_index()], S, h);
        SEQLIB_UNROLL
        for (int j = 0; j < steps; ++j) {
          const int step = piece * steps + j;
          const float delta = tile.delta[step][channel], input = delta * tile.x[step][channel];
          const float forget = marks.fresh >> step & 1 ? -INFINITY : 0.0f;
          float B[S];
          load<S>(&tile.B[step][me.n], S, B);
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
        load<S>(tile.h[k][piece][thread_index()], S, h[0]);
        SEQLIB_UNROLL
        for (int j = 0; j < steps; ++j) {
          const int step = piece * steps + j;
          const float delta = tile.delta[step][channel], input = delta * tile.x[step][channel];
          const float forget = marks.fresh >> step & 1 ? -INFINITY : 0.0f;
          float B[S];
          load<S>(&tile.B[step][me.n], S, B);
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
          load<S>(&tile.B[step][me.n], S, B);
          load<S>(&tile.C[step][me.n], S, C);
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
    W::write(b, task, t, marks.real, tile);
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
  const Lane<S, G, K> me;
  const int64_t place = task.row * a.segments + task.segment;
  float A[K][S] = {}, aq[K][S] = {}, sum[K] = {};
  SEQLIB_UNROLL
  for (int k = 0; k < K; ++k) {
    if (me.channel(k) < task.channels) load_states(a.A + (task.first + me.channel(k)) * a.d_state, a.d_state, me.n, A[k]);
    SEQLIB_UNROLL
    for (int s = 0; s < S; ++s) A[k][s] *= kLog2e;
  }
  for (int64_t t = task.begin + (task.end - 1 - task.begin) / kTile * kTile; t >= task.begin; t -= kTile) {
    const Marks marks(a, task.row, t, kTile);
    W::prepare(b, task, t, marks.real, tile);
    sync_block();
    for (int step = kTile - 1; step >= 0; --step) {
      const bool fresh = marks.fresh >> step & 1;
      float C[S];
      load<S>(&tile.C[step][me.n], S, C);
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

// The selective scan forward: lanes are (channel, group of states), states stay in registers, time runs in a loop.
//
// A tile of positions is prepared once per channel (softplus, silu, skip) and staged in shared memory. Lanes that share a
// channel add up their parts of y for as many positions at a time as there are lanes, one position for each lane.
#include "launch.h"
#include "selective_scan_tile.cuh"

namespace seqlib {
namespace {

template <int S, int G>
struct Forward {
  static constexpr int N = S * G, channels = kScanThreads / G, steps = N == 128 ? 16 : 32;
  static constexpr bool ahead = N <= 128;  // rows of B and C fit into registers beside the rest
  using Place = Spread<channels, steps>;

  struct Tile {
    float in[steps][channels][2];   // delta, delta * x
    float out[steps][channels][2];  // gate, skip; then y
    float B[steps][N], C[steps][N];
  };

  // What comes from memory for a tile, on its way while the tile before is worked on.
  typename Place::Fetched dt, x, z;
  Rows<N, steps> B, C;

  SEQLIB_DEVICE void fetch(const ScanArgs& a, const ScanTask& task, const Whole& whole, int64_t t) {
    with_access(whole.tokens, a.x.dtype, [&](auto as) {
      constexpr Access how = decltype(as)::how;
      const int64_t rows = a.seqlen - t;
      Place::template fetch<how>(dt, a.dt, at(a.dt, task.row, t, task.first), rows, task.channels);
      Place::template fetch<how>(x, a.x, at(a.x, task.row, t, task.first), rows, task.channels);
      if (a.z.data) Place::template fetch<how>(z, a.z, at(a.z, task.row, t, task.first), rows, task.channels);
    });
    if constexpr (ahead) {
      B.fetch(a, a.B, task, t, whole.B);
      C.fetch(a, a.C, task, t, whole.C);
    }
  }

  SEQLIB_DEVICE void settle(const ScanArgs& a, const ScanTask& task, const Whole& whole, int64_t t, uint32_t real, Tile& tile) {
    Place::each_vector([&](int j, int step, int channel) {
      const int valid = task.channels - channel;
      float in[2 * kScanVector] = {}, out[2 * kScanVector] = {};
      if (real >> step & 1 && valid > 0) {
        const int64_t c = task.first + channel;
        float delta[kScanVector], x_[kScanVector], z_[kScanVector];
        unpack_delta(a, dt[j], c, valid, delta);
        unpack(x[j], a.x.dtype, x_);
        if (a.z.data) unpack(z[j], a.z.dtype, z_);
        SEQLIB_UNROLL
        for (int i = 0; i < kScanVector; ++i) {
          const float gate = a.z.data ? silu(z_[i]) : 1.0f;
          in[2 * i] = delta[i];
          in[2 * i + 1] = delta[i] * x_[i];
          out[2 * i] = gate;
          out[2 * i + 1] = a.D && i < valid ? a.D[c + i] * x_[i] * gate : 0.0f;
        }
      }
      store_tile(tile.in[step][channel], in);
      store_tile(tile.out[step][channel], out);
    });
    if constexpr (!ahead) B.fetch(a, a.B, task, t, whole.B);
    B.settle(a.B.dtype, real, tile.B[0]);
    if constexpr (!ahead) C.fetch(a, a.C, task, t, whole.C);
    C.settle(a.C.dtype, real, tile.C[0]);
  }

  static SEQLIB_DEVICE void write(const ScanArgs& a, const ScanTask& task, int64_t t, const Tile& tile) {
    Place::each_vector([&](int, int step, int channel) {
      const int valid = task.channels - channel;
      if (t + step < task.end && valid > 0) {
        float y[kScanVector];
        SEQLIB_UNROLL
        for (int i = 0; i < kScanVector; ++i) y[i] = tile.out[step][channel + i][0];
        store<kScanVector>(a.y, a.x.dtype, (task.row * a.seqlen + t + step) * a.d_inner + task.first + channel, valid, y);
      }
    });
  }

  // G positions from `first` on, one y for each lane of a channel. `fresh`: bits of those that begin a document.
  template <bool Fresh>
  static SEQLIB_DEVICE void advance(Tile& tile, int first, int channel, int lane, uint32_t fresh, const float (&A)[S], float (&h)[S]) {
    float y[G];
    SEQLIB_UNROLL
    for (int j = 0; j < G; ++j) {
      const int step = first + j;
      float in[2], B[S], C[S];
      load_tile(tile.in[step][channel], in);
      load_tile(&tile.B[step][lane * S], B);
      load_tile(&tile.C[step][lane * S], C);
      y[j] = 0.0f;
      SEQLIB_UNROLL
      for (int s = 0; s < S; ++s) {
        const float decay = exp2_fast(in[0] * A[s]);
        h[s] = (Fresh && fresh >> j & 1 ? 0.0f : decay * h[s]) + in[1] * B[s];
        y[j] += h[s] * C[s];
      }
    }
    transposed_sum<G, 1, G>(y);
    float out[2];
    load_tile(tile.out[first + lane][channel], out);
    tile.out[first + lane][channel][0] = y[0] * out[0] + out[1];
  }
};

template <int S, int G>
SEQLIB_GLOBAL(kScanThreads, S <= 4 ? 4 : G < 32 ? 3 : 2) scan_forward(const ScanArgs a) {
  using F = Forward<S, G>;
  auto& tile = *shared_memory<typename F::Tile>();
  const ScanTask task(a, F::channels);
  const Whole whole(a, task);
  const int lane = thread_index() % G, channel = thread_index() / G, n = lane * S;
  const bool valid = channel < task.channels;
  const int64_t c = task.first + channel, width = a.d_inner * a.d_state;
  F next;
  next.fetch(a, task, whole, task.begin);

  float A[S] = {}, h[S] = {};
  const float* entry = a.segments > 1 ? a.entries + (task.row * a.segments + task.segment) * width
                       : a.initial    ? a.initial + task.row * width
                                      : nullptr;
  if (valid) {
    load_states(a.A + c * a.d_state, a.d_state, n, A);
    if (entry) load_states(entry + c * a.d_state, a.d_state, n, h);
  }
  SEQLIB_UNROLL
  for (int s = 0; s < S; ++s) A[s] = base_two(A[s]);

  const int64_t kept = (a.seqlen + kScanCheckpoint - 1) / kScanCheckpoint;
  for (int64_t t = task.begin; t < task.end; t += F::steps) {
    const Marks marks(a, task.row, t, F::steps);
    if (valid && a.checkpoints && t % kScanCheckpoint == 0)
      store_states(a.checkpoints + (task.row * kept + t / kScanCheckpoint) * width + c * a.d_state, a.d_state, n, h);
    next.settle(a, task, whole, t, marks.real, tile);
    if (t + F::steps < task.end) next.fetch(a, task, whole, t + F::steps);
    sync_block();
    for (int first = 0; first < F::steps; first += G) {
      if (marks.fresh) F::template advance<true>(tile, first, channel, lane, marks.fresh >> first, A, h);
      else F::template advance<false>(tile, first, channel, lane, 0, A, h);
    }
    sync_block();
    F::write(a, task, t, tile);
  }
  if (valid && task.end == a.seqlen) store_states(a.final + task.row * width + c * a.d_state, a.d_state, n, h);
}

// What a segment does to the state that enters it: the sum of delta and the state that it leaves behind from zero.
template <int S, int G>
SEQLIB_GLOBAL(kScanThreads, 2) scan_summarize(const ScanArgs a) {
  using F = Forward<S, G>;
  auto& tile = *shared_memory<typename F::Tile>();
  const ScanTask task(a, F::channels);
  const Whole whole(a, task);
  const int lane = thread_index() % G, channel = thread_index() / G, n = lane * S;
  const bool valid = channel < task.channels;
  const int64_t c = task.first + channel, place = task.row * a.segments + task.segment;
  F next;
  next.fetch(a, task, whole, task.begin);

  float A[S] = {}, h[S] = {}, sum = 0.0f;
  if (valid) load_states(a.A + c * a.d_state, a.d_state, n, A);
  SEQLIB_UNROLL
  for (int s = 0; s < S; ++s) A[s] = base_two(A[s]);
  for (int64_t t = task.begin; t < task.end; t += F::steps) {
    const Marks marks(a, task.row, t, F::steps);
    next.settle(a, task, whole, t, marks.real, tile);
    if (t + F::steps < task.end) next.fetch(a, task, whole, t + F::steps);
    sync_block();
    SEQLIB_UNROLL_BY(4)
    for (int step = 0; step < F::steps; ++step) {
      const bool fresh = marks.fresh >> step & 1;
      float in[2], B[S];
      load_tile(tile.in[step][channel], in);
      load_tile(&tile.B[step][n], B);
      sum += fresh ? INFINITY : in[0];
      SEQLIB_UNROLL
      for (int s = 0; s < S; ++s) h[s] = (fresh ? 0.0f : exp2_fast(in[0] * A[s]) * h[s]) + in[1] * B[s];
    }
    sync_block();
  }
  if (valid) {
    store_states(a.entries + (place * a.d_inner + c) * a.d_state, a.d_state, n, h);
    if (lane == 0) a.sums[place * a.d_inner + c] = sum;
  }
}

template <int S, int G>
void run(const ScanArgs& a, Stream stream) {
  using F = Forward<S, G>;
  const int64_t per_group = a.d_inner / a.groups, parts = (per_group + F::channels - 1) / F::channels;
  const int64_t blocks = a.batch * a.segments * a.groups * parts;
  if (a.segments > 1) {
    launch(scan_summarize<S, G>, blocks, kScanThreads, sizeof(typename F::Tile), stream, a);
    const int64_t states = a.batch * a.d_inner * a.d_state;
    launch(scan_combine, (states + kScanThreads - 1) / kScanThreads, kScanThreads, 0, stream, CombineArgs{a, a.initial, false});
  }
  launch(scan_forward<S, G>, blocks, kScanThreads, sizeof(typename F::Tile), stream, a);
}

}  // namespace

int32_t scan_lanes(int64_t d_state, int64_t wanted) {
  if (d_state <= 8) return 2;
  if (d_state <= 16) return wanted <= 2 ? 2 : wanted <= 4 ? 4 : wanted <= 8 ? 8 : 16;
  return d_state <= 32 ? 8 : d_state <= 128 ? 16 : 32;
}

int64_t scan_block_channels(int32_t lanes) { return kScanThreads / lanes; }

void start_selective_scan_fwd(const ScanArgs& a, Stream stream) {
  if (a.d_state <= 8) return run<4, 2>(a, stream);
  if (a.d_state <= 16) {
    switch (a.lanes) {
      case 2: return run<8, 2>(a, stream);
      case 4: return run<4, 4>(a, stream);
      case 8: return run<2, 8>(a, stream);
      default: return run<1, 16>(a, stream);
    }
  }
  if (a.d_state <= 32) return run<4, 8>(a, stream);
  if (a.d_state <= 64) return run<4, 16>(a, stream);
  if (a.d_state <= 128) return run<8, 16>(a, stream);
  return run<8, 32>(a, stream);
}

}  // namespace seqlib

// One token of a matrix state: a block holds 32 columns of a head, eight lanes with four columns each in 16 slices of rows.
#include "matrix_step.h"

#include "launch.h"

namespace seqlib {
namespace {

constexpr int V = 4, kLanes = 8, kSlices = 16, kThreads = kLanes * kSlices, kWarps = kThreads / 32, kColumns = kLanes * V;

// v summed over all slices, in every thread. `room` is free again after the next barrier.
SEQLIB_DEVICE void sum_slices(float (&v)[V], float (*room)[kColumns]) {
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) v[i] = lane_sum<32 / kLanes, kLanes>(v[i]);
  const int lane = thread_index() % kLanes;
  if (thread_index() % 32 < kLanes) store<V>(&room[thread_index() / 32][lane * V], V, v);
  sync_block();
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) {
    v[i] = 0.0f;
    SEQLIB_UNROLL
    for (int w = 0; w < kWarps; ++w) v[i] += room[w][lane * V + i];
  }
}

SEQLIB_DEVICE int64_t at(const View& t, int64_t row, int64_t head) { return row * t.batch + head / t.row * t.group; }

template <bool Delta>
SEQLIB_GLOBAL(kThreads, 4) matrix_step(const MatrixStepArgs a) {
  const int64_t parts = (a.headdim + kColumns - 1) / kColumns;
  const int64_t row = block_index() / parts / a.nheads, head = block_index() / parts % a.nheads;
  const int64_t column = block_index() % parts * kColumns + thread_index() % kLanes * V, left = a.headdim - column;
  const int valid = left < 0 ? 0 : left < V ? static_cast<int>(left) : V, slice = thread_index() / kLanes;
  auto* room = shared_memory<float[kColumns]>();  // of the sums: two of them, kWarps rows each; then decayed states
  float* state = a.state + (row * a.nheads + head) * a.d_state * a.headdim + column;

  const float* decays = a.log_decay ? a.log_decay + row * a.decay_batch + head * a.decay_head : nullptr;
  float added[V];  // what the key takes in
  load<V>(a.v.data, a.v.dtype, at(a.v, row, head) + column, valid, added);
  if constexpr (Delta) {
    float found[V] = {};
    for (int64_t n = slice; n < a.d_state; n += kSlices) {
      const float decay = decays ? exp2_fast(kLog2e * decays[n * a.decay_channel]) : 1.0f;
      const float k = load_one(a.k.data, a.k.dtype, at(a.k, row, head) + n);
      float s[V];
      load<V>(state + n * a.headdim, valid, s);
      SEQLIB_UNROLL
      for (int i = 0; i < V; ++i) {
        s[i] *= decay;
        found[i] += k * s[i];
      }
      store<V>(&room[2 * kWarps + n][thread_index() % kLanes * V], V, s);
    }
    sum_slices(found, room);
    const float beta = a.beta[row * a.nheads + head];
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) added[i] = beta * (added[i] - found[i]);
  }
  float y[V] = {};
  for (int64_t n = slice; n < a.d_state; n += kSlices) {
    const float k = load_one(a.k.data, a.k.dtype, at(a.k, row, head) + n);
    const float q = load_one(a.q.data, a.q.dtype, at(a.q, row, head) + n);
    float s[V], decay = 1.0f;
    if constexpr (Delta) {
      load<V>(&room[2 * kWarps + n][thread_index() % kLanes * V], V, s);
    } else {
      load<V>(state + n * a.headdim, valid, s);
      if (decays) decay = exp2_fast(kLog2e * decays[n * a.decay_channel]);
    }
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) {
      s[i] = decay * s[i] + k * added[i];
      y[i] += q * s[i];
    }
    store<V>(state + n * a.headdim, valid, s);
  }
  sum_slices(y, room + kWarps);
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) y[i] *= a.scale;
  if (slice == 0) store<V>(a.y, a.v.dtype, (row * a.nheads + head) * a.headdim + column, valid, y);
}

}  // namespace

void start_matrix_step(const MatrixStepArgs& a, Stream stream) {
  const int64_t blocks = a.batch * a.nheads * ((a.headdim + kColumns - 1) / kColumns), row = kColumns * sizeof(float);
  if (a.beta) return launch(matrix_step<true>, blocks, kThreads, (2 * kWarps + a.d_state) * row, stream, a);
  launch(matrix_step<false>, blocks, kThreads, 2 * kWarps * row, stream, a);
}

}  // namespace seqlib

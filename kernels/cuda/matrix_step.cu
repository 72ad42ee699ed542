// One token of linear attention and of the delta rule.
#include "matrix_step.h"

#include "launch.h"
#include "matrix_tile.cuh"

namespace seqlib {
namespace {

SEQLIB_DEVICE int64_t at(const View& t, int64_t row, int head) {
  return row * t.batch + head / static_cast<int>(t.row) * t.group;
}

template <bool Delta>
SEQLIB_GLOBAL(kThreads, 4) matrix_step(const MatrixStepArgs a) {
  const int64_t parts = (a.headdim + kColumns - 1) / kColumns;
  const int64_t row = block_index() / parts / a.nheads;
  const int head = static_cast<int>(block_index() / parts % a.nheads);
  const int64_t q_at = at(a.q, row, head), k_at = at(a.k, row, head), v_at = at(a.v, row, head);
  const int column = static_cast<int>(block_index() % parts) * kColumns + thread_index() % kLanes * V;
  const int headdim = static_cast<int>(a.headdim), d_state = static_cast<int>(a.d_state), slice = thread_index() / kLanes;
  const int left = headdim - column, valid = left < 0 ? 0 : smaller(V, left);
  float* state = a.state + (row * a.nheads + head) * a.d_state * headdim + column;
  auto* room = shared_memory<float[kColumns]>();  // of the sums, two of them; then what all columns share; then states
  float *keys = room[2 * kWarps], *queries = keys + d_state, *factors = queries + d_state;
  float* mine = room[2 * kWarps + (3 * d_state + kColumns - 1) / kColumns] + thread_index() % kLanes * V;

  Tile tile;
  tile.ask(state, headdim, 0, d_state, valid);
  const float* decays = a.log_decay ? a.log_decay + row * a.decay_batch + head * a.decay_head : nullptr;
  Word v[V];
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) v[i] = fetch_one(a.v, v_at + column + i, valid - i);
  for (int n = thread_index(); n < d_state; n += kThreads) {
    const Word k = fetch_one(a.k, k_at + n, 1), q = fetch_one(a.q, q_at + n, 1);
    const float log_decay = decays ? decays[n * a.decay_channel] : 0.0f;
    keys[n] = k;
    queries[n] = q;
    factors[n] = exp2_fast(kLog2e * log_decay);
  }
  float added[V];  // what the key takes in
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) added[i] = v[i];
  sync_block();
  if constexpr (Delta) {
    const float beta = a.beta[row * a.nheads + head];
    float found[V] = {};
    for (int first = 0; first < d_state; first += kTile) {
      if (first > 0) tile.ask(state, headdim, first, d_state, valid);
      SEQLIB_UNROLL
      for (int j = 0; j < kSteps; ++j) {
        const int n = first + j * kSlices + slice;
        if (n >= d_state) continue;
        SEQLIB_UNROLL
        for (int i = 0; i < V; ++i) {
          tile.v[j][i] *= factors[n];
          found[i] += keys[n] * tile.v[j][i];
        }
        if (d_state > kTile) store<V>(mine + n * kColumns, V, tile.v[j]);
      }
    }
    sum_slices(found, room);
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) added[i] = beta * (added[i] - found[i]);
  }
  float y[V] = {};
  for (int first = 0; first < d_state; first += kTile) {
    if (!Delta && first > 0) tile.ask(state, headdim, first, d_state, valid);
    SEQLIB_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      const int n = first + j * kSlices + slice;
      if (n >= d_state) continue;
      if (Delta && d_state > kTile) load<V>(mine + n * kColumns, V, tile.v[j]);
      SEQLIB_UNROLL
      for (int i = 0; i < V; ++i) {
        tile.v[j][i] = (Delta ? 1.0f : factors[n]) * tile.v[j][i] + keys[n] * added[i];
        y[i] += queries[n] * tile.v[j][i];
      }
    }
    tile.keep(state, headdim, first, d_state, valid);
  }
  sum_slices(y, room + kWarps);
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) y[i] *= a.scale;
  if (slice == 0) store<V>(a.y, a.v.dtype, (row * a.nheads + head) * a.headdim + column, valid, y);
}

}  // namespace

void start_matrix_step(const MatrixStepArgs& a, Stream stream) {
  const int64_t blocks = a.batch * a.nheads * ((a.headdim + kColumns - 1) / kColumns);
  const int64_t shared = (3 * a.d_state + kColumns - 1) / kColumns, states = a.beta && a.d_state > kTile ? a.d_state : 0;
  const int64_t bytes = (2 * kWarps + shared + states) * kColumns * sizeof(float);
  if (a.beta) return launch(matrix_step<true>, blocks, kThreads, bytes, stream, a);
  launch(matrix_step<false>, blocks, kThreads, bytes, stream, a);
}

}  // namespace seqlib

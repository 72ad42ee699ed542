// Mamba-2's state and one token: step size, decay, update, output, skip and gate.
#include "mamba2_step.h"

#include "matrix_tile.cuh"
#include "overlap.h"

namespace seqlib {
namespace {

template <Access how>
SEQLIB_GLOBAL(kThreads, 4) mamba2_step(const Mamba2StepArgs a) {
  const int headdim = static_cast<int>(a.headdim), d_state = static_cast<int>(a.d_state);
  const int parts = (headdim + kColumns - 1) / kColumns, nheads = static_cast<int>(a.nheads);
  const int64_t row = block_index() / parts / nheads;
  const int head = static_cast<int>(block_index() / parts % nheads), part = static_cast<int>(block_index() % parts);
  const int column = part * kColumns + thread_index() % kLanes * V, slice = thread_index() / kLanes;
  const int d_inner = nheads * headdim, width = static_cast<int>(a.ngroups) * d_state;
  const int valid = smaller(V, headdim - column);  // V or not positive
  float* state = a.state + (row * nheads + head) * d_state * headdim + column;
  const int64_t z = row * a.stride + head * headdim + column, x = z + d_inner;
  const int64_t B = row * a.stride + 2 * d_inner + head / (nheads / static_cast<int>(a.ngroups)) * d_state, C = B + width;
  const int64_t dt = row * a.stride + 2 * (d_inner + width) + head;
  float* keys = shared_memory<float>();  // B, then C
  auto* room = reinterpret_cast<float(*)[kColumns]>(keys + (2 * d_state + 3) / 4 * 4);

  if (thread_index() == 0) {  // every part brings its share of the head's rows
    const int share = (d_state + parts - 1) / parts, rows = smaller(share, d_state - part * share);
    const int64_t first = (row * nheads + head) * d_state + part * share;
    if (rows > 0) bring_near(a.state + first * headdim, static_cast<int64_t>(rows) * headdim * sizeof(float));
  }
  for (const Parameter& p : {a.dt_bias, a.A_log}) touch(p.data, p.dtype, head);
  touch(a.D.data, a.D.dtype, head * a.D_width);
  wait_for_previous();
  let_next_start();

  const Parameter inputs = {a.inputs, a.dtype};
  Tile tile;
  tile.ask(state, headdim, 0, d_state, valid);
  const Bits<V> x_bits = fetch<how, V>(a.inputs, a.dtype, x, valid);
  const Bits<V> z_bits = fetch<how, V>(a.inputs, a.dtype, z, a.gate ? valid : 0);
  const Word step = fetch_one(inputs, dt), bias = fetch_one(a.dt_bias, head), A_log = fetch_one(a.A_log, head);
  Word D[V];
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) D[i] = fetch_one(a.D, head * a.D_width + (a.D_width > 1 ? column + i : 0), valid);
  for (int n = thread_index(); n < d_state; n += kThreads) {
    const Word b = fetch_one(inputs, B + n), c = fetch_one(inputs, C + n);
    keys[n] = b;
    keys[d_state + n] = c;
  }
  float now[V], delta = softplus(step + bias);
  unpack(x_bits, a.dtype, now);
  if (delta < a.dt_min) delta = a.dt_min;  // comparisons let NaN pass
  if (delta > a.dt_max) delta = a.dt_max;
  const float decay = exp_fast(-delta * expf(A_log));
  float y[V] = {};
  sync_block();
  for (int first = 0; first < d_state; first += kTile) {
    if (first > 0) tile.ask(state, headdim, first, d_state, valid);
    SEQLIB_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      const int n = first + j * kSlices + slice;
      const float b = n < d_state ? keys[n] : 0.0f, c = n < d_state ? keys[d_state + n] : 0.0f;
      SEQLIB_UNROLL
      for (int i = 0; i < V; ++i) {
        tile.v[j][i] = decay * tile.v[j][i] + b * (delta * now[i]);
        y[i] += c * tile.v[j][i];
      }
    }
    tile.keep(state, headdim, first, d_state, valid);
  }
  sum_slices(y, room);
  if (slice > 0 || valid <= 0) return;
  float gate[V];
  unpack(z_bits, a.dtype, gate);
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) {
    y[i] += D[i] * now[i];
    if (a.gate) y[i] *= silu(gate[i]);
  }
  store<V>(a.y + (row * nheads + head) * headdim + column, V, y);
}

}  // namespace

void start_mamba2_step(const Mamba2StepArgs& a, Stream stream) {
  const int64_t blocks = a.batch * a.nheads * ((a.headdim + kColumns - 1) / kColumns);
  const int64_t bytes = ((2 * a.d_state + 3) / 4 * 4 + kWarps * kColumns) * sizeof(float);
  const auto kernel = a.dtype == Dtype::f32 ? mamba2_step<Access::four> : mamba2_step<Access::two>;
  launch_next(kernel, blocks, kThreads, bytes, a.overlap, stream, a);
}

}  // namespace seqlib

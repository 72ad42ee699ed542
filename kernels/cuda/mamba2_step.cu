// Mamba-2's state and one token: step size, decay, update, output, skip and gate.
#include "mamba2_step.h"

#include "matrix_tile.cuh"
#include "overlap.h"
#include "raw.h"

namespace seqlib {
namespace {

template <class T>
SEQLIB_GLOBAL(kThreads, 4) mamba2_step(const Mamba2StepArgs a) {
  const int headdim = static_cast<int>(a.headdim), d_state = static_cast<int>(a.d_state);
  const int parts = (headdim + kColumns - 1) / kColumns, nheads = static_cast<int>(a.nheads);
  const int64_t row = block_index() / parts / nheads;
  const int head = static_cast<int>(block_index() / parts % nheads), part = static_cast<int>(block_index() % parts);
  const int column = part * kColumns + thread_index() % kLanes * V, slice = thread_index() / kLanes;
  const int d_inner = nheads * headdim, width = static_cast<int>(a.ngroups) * d_state;
  const int valid = smaller(V, headdim - column);  // V or not positive
  float* state = a.state + (row * nheads + head) * d_state * headdim + column;
  const T* z = static_cast<const T*>(a.inputs) + row * a.stride + head * headdim + column;
  const T* B = static_cast<const T*>(a.inputs) + row * a.stride + 2 * d_inner +
               static_cast<int64_t>(head / (nheads / static_cast<int>(a.ngroups))) * d_state;
  float* keys = shared_memory<float>();  // B, then C
  auto* room = reinterpret_cast<float(*)[kColumns]>(keys + (2 * d_state + 3) / 4 * 4);

  if (thread_index() == 0) {  // every part brings its share of the head's rows
    const int share = (d_state + parts - 1) / parts, rows = smaller(share, d_state - part * share);
    const int64_t first = (row * nheads + head) * d_state + part * share;
    if (rows > 0) bring_near(a.state + first * headdim, static_cast<int64_t>(rows) * headdim * sizeof(float));
  }
  wait_for_previous();
  let_next_start();

  Tile tile;
  tile.ask(state, headdim, 0, d_state, valid);
  const Raw<T, V> raw_x = fetch<V>(z + d_inner, valid > 0), raw_z = fetch<V>(z, valid > 0 && a.gate);
  const T dt = (static_cast<const T*>(a.inputs) + row * a.stride + 2 * (d_inner + width))[head];
  for (int n = thread_index(); n < d_state; n += kThreads) {
    const T b = B[n], c = B[width + n];
    keys[n] = to_float(b);
    keys[d_state + n] = to_float(c);
  }
  float delta = softplus(to_float(dt) + load_one(a.dt_bias.data, a.dt_bias.dtype, head));
  if (delta < a.dt_min) delta = a.dt_min;  // comparisons let NaN pass
  if (delta > a.dt_max) delta = a.dt_max;
  const float decay = exp_fast(-delta * expf(load_one(a.A_log.data, a.A_log.dtype, head)));
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
        tile.v[j][i] = decay * tile.v[j][i] + b * (delta * raw_x[i]);
        y[i] += c * tile.v[j][i];
      }
    }
    tile.keep(state, headdim, first, d_state, valid);
  }
  sum_slices(y, room);
  if (slice > 0 || valid <= 0) return;
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) {
    y[i] += load_one(a.D.data, a.D.dtype, head * a.D_width + (a.D_width > 1 ? column + i : 0)) * raw_x[i];
    if (a.gate) y[i] *= silu(raw_z[i]);
  }
  store<V>(a.y + (row * nheads + head) * headdim + column, V, y);
}

template <class T>
void run(const Mamba2StepArgs& a, Stream stream) {
  const int64_t blocks = a.batch * a.nheads * ((a.headdim + kColumns - 1) / kColumns);
  const int64_t floats = (2 * a.d_state + 3) / 4 * 4 + kWarps * kColumns;
  launch_next(mamba2_step<T>, blocks, kThreads, floats * sizeof(float), a.overlap, stream, a);
}

}  // namespace

void start_mamba2_step(const Mamba2StepArgs& a, Stream stream) {
  switch (a.dtype) {
    case Dtype::f32: return run<float>(a, stream);
    case Dtype::bf16: return run<bf16>(a, stream);
    default: return run<f16>(a, stream);
  }
}

}  // namespace seqlib

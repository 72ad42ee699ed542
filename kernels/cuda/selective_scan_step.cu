// One token of the selective scan. Lanes share a channel as long as each has four neighbouring states.
#include "launch.h"
#include "selective_scan.h"

namespace seqlib {
namespace {

constexpr int kThreads = 128, kStates = 4;

template <int Lanes>
SEQLIB_GLOBAL(kThreads, 8) scan_step(const ScanStepArgs a) {
  const int64_t i = block_index() * (kThreads / Lanes) + thread_index() / Lanes;
  const bool valid = i < a.batch * a.d_inner;
  const int lane = thread_index() % Lanes;
  const int64_t row = valid ? i / a.d_inner : 0, c = valid ? i % a.d_inner : 0, group = c / (a.d_inner / a.groups);
  const float x = load_one(a.x.data, a.x.dtype, row * a.x.batch + c);
  float delta = load_one(a.dt.data, a.dt.dtype, row * a.dt.batch + c) + (a.dt_bias ? a.dt_bias[c] : 0.0f);
  if (a.softplus) delta = softplus(delta);
  float y = 0.0f;
  for (int64_t n = lane * kStates; n < a.d_state; n += Lanes * kStates) {
    const int left = static_cast<int>(a.d_state - n);
    float h[kStates], A[kStates], B[kStates], C[kStates];
    float* state = a.state + (row * a.d_inner + c) * a.d_state + n;
    load<kStates>(state, left, h);
    load<kStates>(a.A + c * a.d_state + n, left, A);
    load<kStates>(a.B.data, a.B.dtype, row * a.B.batch + group * a.B.group + n, left, B);
    load<kStates>(a.C.data, a.C.dtype, row * a.C.batch + group * a.C.group + n, left, C);
    SEQLIB_UNROLL
    for (int s = 0; s < kStates; ++s) {
      h[s] = exp2_fast(delta * base_two(A[s])) * h[s] + delta * x * B[s];
      y += C[s] * h[s];
    }
    if (valid) store<kStates>(state, left, h);
  }
  y = lane_sum<Lanes, 1>(y);
  if (valid && lane == 0) {
    if (a.D) y += a.D[c] * x;
    if (a.z.data) y *= silu(load_one(a.z.data, a.z.dtype, row * a.z.batch + c));
    store_one(a.y, a.x.dtype, i, y);
  }
}

template <int Lanes>
void run(const ScanStepArgs& a, Stream stream) {
  constexpr int channels = kThreads / Lanes;
  launch(scan_step<Lanes>, (a.batch * a.d_inner + channels - 1) / channels, kThreads, 0, stream, a);
}

}  // namespace

void start_selective_scan_step(const ScanStepArgs& a, Stream stream) {
  if (a.d_state <= 4 * kStates) return run<4>(a, stream);
  if (a.d_state <= 16 * kStates) return run<16>(a, stream);
  return run<32>(a, stream);
}

}  // namespace seqlib

// One token of the selective scan, for decoding. The state keeps its public layout, so lanes are states; the sums over
// them are formed for W channels at once.
#include "selective_scan_tile.h"

namespace seqlib::SEQLIB_ISA {
namespace {

template <class E>
void step(const ScanStepArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const int64_t n = a.d_state, per_group = a.d_inner / a.groups;
  const Floats memory = allocate(2 * round_up(n, N));
  float *B = memory.get(), *C = B + round_up(n, N);
  int64_t held = -1;  // batch * groups + group of the B and C at hand
  for (int64_t i = begin; i < end;) {
    const int64_t row = i / a.d_inner, channel = i % a.d_inner, group = channel / per_group;
    const int lanes = static_cast<int>(std::min({end - i, (group + 1) * per_group - channel, int64_t{W}}));
    if (held != row * a.groups + group) {
      const ScanTile now{0, 1, 0, 0};
      held = row * a.groups + group;
      copy_states(a.B, row, group, now, n, B, 1);
      copy_states(a.C, row, group, now, n, C, 1);
    }
    auto at = [&](const ScanInput& t) { return get(static_cast<const E*>(t.data) + row * t.batch + channel, lanes); };
    const vf x = at(a.x);
    vf delta = at(a.dt);
    if (a.dt_bias) delta += get(a.dt_bias + channel, lanes);
    if (a.softplus) delta = softplus(delta);
    const vf input = delta * x;

    float rates[W], inputs[W];
    store(rates, delta * log2e);
    store(inputs, input);
    vf dots[W] = {};
    for (int c = 0; c < lanes; ++c) {
      float* h = a.state + (i + c) * n;
      const float* A = a.A + (channel + c) * n;
      auto states = [&](int64_t s, int some) {
        const vf next = exp2(get(A + s, some) * rates[c]) * get(h + s, some) + load(B + s) * inputs[c];
        put(h + s, next, some);
        dots[c] += next * load(C + s);
      };
      int64_t s = 0;
      for (; s + W <= n; s += W) states(s, W);
      if (s < n) states(s, static_cast<int>(n - s));
    }
    vf y = lane_sums(dots);
    if (a.D) y += get(a.D + channel, lanes) * x;
    if (a.z.data) y *= silu(at(a.z));
    put(static_cast<E*>(a.y) + i, y, lanes);
    i += lanes;
  }
}

}  // namespace

void selective_scan_step(const ScanStepArgs& a, int64_t begin, int64_t end) {
  a.x.bf16 ? step<bf16>(a, begin, end) : step<float>(a, begin, end);
}

void exp_floor(const ExpArgs& a, int64_t begin, int64_t end) {
  for (int64_t repeat = begin; repeat < end; ++repeat) {
    for (int64_t i = 0; i + 4 * W <= a.count; i += 4 * W) {
      const vf e0 = exp2(load(a.from + i)), e1 = exp2(load(a.from + i + W));
      const vf e2 = exp2(load(a.from + i + 2 * W)), e3 = exp2(load(a.from + i + 3 * W));
      store(a.to + i, e0);
      store(a.to + i + W, e1);
      store(a.to + i + 2 * W, e2);
      store(a.to + i + 3 * W, e3);
    }
    asm volatile("" : : "r"(a.from), "r"(a.to) : "memory");  // every pass is made
  }
}

}  // namespace seqlib::SEQLIB_ISA

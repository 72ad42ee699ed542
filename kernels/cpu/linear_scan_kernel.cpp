// The elementwise recurrence, bound by memory: rows are streamed step by step, the states of a block wait in L1.
#include "linear_scan.h"

#include <algorithm>

#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

template <size_t... I>
inline vf even(vf v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I / 2 * 2)...);
}
template <size_t... I>
inline vf odd(vf v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I / 2 * 2 + 1)...);
}
template <size_t... I>
inline vf swap(vf v, std::index_sequence<I...>) {
  return __builtin_shufflevector(v, v, (I ^ 1)...);
}
template <size_t... I>
inline vf alternate(float first, std::index_sequence<I...>) {
  return vf{(I % 2 ? -first : first)...};
}
constexpr auto lanes_of = std::make_index_sequence<W>();

// a * b, or conj(a) * b.
template <bool Complex>
inline vf times(vf a, vf b, bool conjugate = false) {
  if constexpr (!Complex) return a * b;
  const vf sign = alternate(conjugate ? 1.0f : -1.0f, lanes_of);
  return even(a, lanes_of) * b + odd(a, lanes_of) * sign * swap(b, lanes_of);
}

template <class E>
inline vf get(const E* p, int lanes) {
  return lanes == W ? load(p) : load_n(p, lanes);
}

template <class E>
inline void put(E* p, vf v, int lanes) {
  lanes == W ? store(p, v) : store_n(p, v, lanes);
}

template <class F>
inline void each(int64_t n, F&& f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) f(i, W);
  if (i < n) f(i, static_cast<int>(n - i));
}

// One task: a row and a range of its floats.
struct Task {
  int64_t row, first, count;

  Task(const LinearArgs& a, int64_t task)
      : row(task / a.blocks), first(task % a.blocks * a.block), count(std::min(a.block, a.width - first)) {}

  template <class E>
  const E* at(const LinearInput& t, int64_t step) const {
    return static_cast<const E*>(t.data) + row * t.batch + step * t.row + first;
  }
  int64_t offset(const LinearArgs& a, int64_t step) const { return (row * a.seqlen + step) * a.width + first; }
};

template <bool Complex, class EA, class EB>
void forward(const LinearArgs& a, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  float h[linear_scan_block];
  for (int64_t i = begin; i < end; ++i) {
    const Task task(a, i);
    const int64_t out = task.row * a.width + task.first;
    if (a.initial)
      std::copy_n(a.initial + out, task.count, h);
    else
      std::fill_n(h, task.count, 0.0f);
    for (int64_t r = a.first_run[task.row]; r < a.first_run[task.row + 1]; ++r) {
      const LinearRun run = a.runs[r];
      if (run.fresh) std::fill_n(h, task.count, 0.0f);
      for (int64_t k = 0; k < run.end - run.begin; ++k) {
        const int64_t t = a.reverse ? run.end - 1 - k : run.begin + k;
        const EA* a_t = task.at<EA>(a.a, t);
        const EB* b_t = task.at<EB>(a.b, t);
        EB* h_t = static_cast<EB*>(a.h) + task.offset(a, t);
        each(task.count, [&](int64_t c, int lanes) {
          const vf next = times<Complex>(get(a_t + c, lanes), get(h + c, lanes)) + get(b_t + c, lanes);
          put(h + c, next, lanes);
          put(h_t + c, next, lanes);
        });
      }
    }
    std::copy_n(h, task.count, a.final + out);
  }
}

// With g the gradient of h: g_t = dh_t + conj(a_next) g_next, db = g, da = g conj(h_before).
template <bool Complex, class EA, class EB>
void backward(const LinearBackArgs& g, int64_t begin, int64_t end) {
  const FlushDenormals flush;
  const LinearArgs& a = g.of;
  float carry[linear_scan_block];  // conj(a_next) g_next
  const bool constant = a.a.row == 0 && a.seqlen > 1;
  for (int64_t i = begin; i < end; ++i) {
    const Task task(a, i);
    const int64_t out = task.row * a.width + task.first;
    if (g.dfinal)
      std::copy_n(g.dfinal + out, task.count, carry);
    else
      std::fill_n(carry, task.count, 0.0f);
    if (constant) std::fill_n(g.da + out, task.count, 0.0f);
    for (int64_t r = a.first_run[task.row + 1]; r-- > a.first_run[task.row];) {
      const LinearRun run = a.runs[r];
      for (int64_t k = run.end - run.begin; k-- > 0;) {
        const int64_t t = a.reverse ? run.end - 1 - k : run.begin + k;
        const EA* a_t = task.at<EA>(a.a, t);
        const EB* dh_t = task.at<EB>(g.dh, t);
        EB* db_t = static_cast<EB*>(g.db) + task.offset(a, t);
        float* da_t = g.da + (constant ? out : task.offset(a, t));
        // The state before: of the step before in the scan, of the run before, the initial one, or none.
        const EB* before = nullptr;
        const float* initial = nullptr;
        if (k > 0) {
          before = static_cast<const EB*>(a.h) + task.offset(a, a.reverse ? t + 1 : t - 1);
        } else if (!run.fresh && r > a.first_run[task.row]) {
          before = static_cast<const EB*>(a.h) + task.offset(a, a.reverse ? a.runs[r - 1].begin : a.runs[r - 1].end - 1);
        } else if (!run.fresh && a.initial) {
          initial = a.initial + out;
        }
        each(task.count, [&](int64_t c, int lanes) {
          const vf grad = get(dh_t + c, lanes) + get(carry + c, lanes);
          const vf h = before ? get(before + c, lanes) : initial ? get(initial + c, lanes) : vf{};
          const vf da = times<Complex>(h, grad, true);
          put(db_t + c, grad, lanes);
          put(da_t + c, constant ? get(da_t + c, lanes) + da : da, lanes);
          put(carry + c, times<Complex>(get(a_t + c, lanes), grad, true), lanes);
        });
      }
      if (run.fresh) std::fill_n(carry, task.count, 0.0f);
    }
    std::copy_n(carry, task.count, g.dinitial + out);
  }
}

}  // namespace

void linear_scan_fwd(const LinearArgs& a, int64_t begin, int64_t end) {
  if (a.complex)
    forward<true, float, float>(a, begin, end);
  else if (a.a.bf16)
    a.b.bf16 ? forward<false, bf16, bf16>(a, begin, end) : forward<false, bf16, float>(a, begin, end);
  else
    a.b.bf16 ? forward<false, float, bf16>(a, begin, end) : forward<false, float, float>(a, begin, end);
}

void linear_scan_bwd(const LinearBackArgs& g, int64_t begin, int64_t end) {
  if (g.of.complex)
    backward<true, float, float>(g, begin, end);
  else if (g.of.a.bf16)
    g.dh.bf16 ? backward<false, bf16, bf16>(g, begin, end) : backward<false, bf16, float>(g, begin, end);
  else
    g.dh.bf16 ? backward<false, float, bf16>(g, begin, end) : backward<false, float, float>(g, begin, end);
}

}  // namespace seqlib::SEQLIB_ISA

#include "long_conv.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <tuple>

#include "parallel.h"
#include "seqlib.h"

namespace seqlib {
namespace {

// exp(i pi j / 2n) for every sample j, then for each stage of m = n, n/4, ... > 8 points the powers 1, 2, 3 of
// exp(-2 pi i j / m), j < m/4. Kept for every size that was used; they are as long as one or two sequences.
const float* tables(int64_t n) {
  static std::mutex mutex;
  static std::map<int64_t, std::vector<float>> made;
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<float>& table = made[n];
  if (table.empty()) {
    auto add = [&](double angle) {
      table.push_back(static_cast<float>(std::cos(angle)));
      table.push_back(static_cast<float>(std::sin(angle)));
    };
    const double pi = 3.14159265358979323846;
    for (int64_t j = 0; j < n; ++j) add(pi * j / (2 * n));
    for (int64_t m = n; m > 8; m /= 4)
      for (int64_t j = 0; j < m / 4; ++j)
        for (int64_t k = 1; k < 4; ++k) add(-2 * pi * (j * k) / m);
  }
  return table.data();
}

// (batch, length, d) with neighbouring channels.
Tensor rows(const Tensor& t) { return t.stride(2) == 1 || t.size(2) == 1 ? t : torch::stable::contiguous(t); }

ConvTensor view(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1)}; }

int64_t blocks(int64_t d) { return (d + long_conv_lanes() - 1) / long_conv_lanes(); }

struct Call {
  Tensor x;
  OptTensor state;
  LongConvArgs args{};

  Call(const Tensor& x_, const Tensor& kernel, const OptTensor& skip, const OptTensor& reverse, const OptTensor& state_)
      : x(rows(x_)), state(state_ ? OptTensor(rows(*state_)) : std::nullopt) {
    check_float(x, "x");
    check_f32(kernel, "kernel");
    if (skip) check_f32(*skip, "D");
    if (reverse) check_f32(*reverse, "reverse_kernel");
    LongConvArgs& a = args;
    a.batch = x.size(0), a.seqlen = x.size(1), a.d = x.size(2);
    a.past = state ? state->size(1) : 0;
    a.length = kernel.size(1);
    a.reverse_length = reverse ? reverse->size(1) : 0;
    a.x = view(x);
    if (state) a.state = view(*state);
    a.kernel = data<float>(kernel), a.skip = data<float>(skip), a.reverse = data<float>(reverse);
    a.bf16 = is_bf16(x);
    // What the product wraps round must fall on zeros, or on the outputs of the state, which nobody wants.
    const int64_t wanted = state ? a.past + a.seqlen : a.seqlen + std::max(a.length - 1, a.reverse_length);
    a.points = 16;
    while (2 * a.points < wanted) a.points *= 2;
    a.tables = tables(a.points);
  }
};

Tensor long_conv(const Tensor& x, const Tensor& kernel, const OptTensor& skip, const OptTensor& reverse,
                 const OptTensor& state) {
  Call call(x, kernel, skip, reverse, state);
  LongConvArgs& a = call.args;
  Tensor y = torch::stable::new_empty(x, {a.batch, a.seqlen, a.d});
  a.y = view(y);
  // Each part transforms the kernel again, so the batch is cut only where there are fewer blocks than threads.
  const int64_t threads = torch::stable::get_num_threads();
  a.parts = std::min(a.batch, (threads + blocks(a.d) - 1) / blocks(a.d));
  parallel(blocks(a.d) * a.parts, 1, [&](int64_t begin, int64_t end) { long_conv_fwd_for()(a, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> long_conv_bwd(const Tensor& dy_, const Tensor& x, const Tensor& kernel,
                                                         const OptTensor& skip, const OptTensor& reverse,
                                                         const OptTensor& state) {
  Call call(x, kernel, skip, reverse, state);
  LongConvArgs& a = call.args;
  const Tensor dy = rows(dy_);
  a.y = view(dy);
  Tensor dx = torch::stable::new_empty(x, {a.batch, a.seqlen, a.d});
  Tensor dstate = torch::stable::new_empty(x, {state ? a.batch : 0, a.past, a.d});
  Tensor dkernel = empty_f32(kernel, {a.d, a.length}), dreverse = empty_f32(kernel, {a.d, a.reverse_length});
  a.dx = view(dx);
  if (state) a.dstate = view(dstate);
  a.dkernel = data<float>(dkernel), a.dreverse = data<float>(dreverse);
  parallel(blocks(a.d), 1, [&](int64_t begin, int64_t end) { long_conv_bwd_for()(a, begin, end); });
  return {dx, dkernel, dreverse, dstate};
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("long_conv", TORCH_BOX(&seqlib::long_conv));
  m.impl("long_conv_bwd", TORCH_BOX(&seqlib::long_conv_bwd));
}

#include "linear.h"

#include <algorithm>

#include "seqlib.h"

namespace seqlib {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  check_float(x, "x");
  check_float(weight, "weight");
  const Tensor xs = torch::stable::contiguous(is_bf16(x) ? torch::stable::to(x, Scalar::Float) : x);
  const Tensor w = torch::stable::contiguous(weight);
  const OptTensor b = bias ? OptTensor(torch::stable::contiguous(torch::stable::to(*bias, Scalar::Float))) : std::nullopt;
  LinearArgs a{};
  a.d_out = w.size(0);
  a.d_in = w.size(1);
  a.rows = xs.numel() / a.d_in;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = a.d_out;
  Tensor y = empty_f32(x, shape);
  a.x = data<float>(xs);
  a.weight = w.data_ptr();
  a.bias = data<float>(b);
  a.y = data<float>(y);
  a.bf16 = is_bf16(w);
  const int64_t grain = std::max<int64_t>(16, 65536 / a.d_in);  // less than this is done before a thread wakes up
  torch::stable::parallel_for(0, a.d_out, grain, [&](int64_t begin, int64_t end) { linear_fwd_for()(a, begin, end); });
  return is_bf16(x) ? torch::stable::to(y, Scalar::BFloat16) : y;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) { m.impl("linear", TORCH_BOX(&seqlib::linear)); }

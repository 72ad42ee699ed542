#include "norm.h"

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "steps.h"

namespace seqlib {
namespace {

NormArgs arguments(const Rows& x, const std::optional<Rows>& gate, const Tensor& weight, bool norm_before_gate,
                   int64_t group) {
  NormArgs a{};
  a.x = x.tensor.data_ptr();
  a.rows = x.count;
  a.width = x.width;
  a.x_stride = x.stride;
  if (gate) {
    a.gate = gate->tensor.data_ptr();
    a.gate_stride = gate->stride;
  }
  a.weight = data<float>(weight);
  a.group = group;
  a.bf16 = is_bf16(x.tensor);
  a.norm_before_gate = norm_before_gate;
  return a;
}

// The weight in float32; ones where there is none, so that the loops need no second form.
Tensor scale(const OptTensor& weight, const Tensor& x) {
  if (weight) return torch::stable::contiguous(torch::stable::to(*weight, Scalar::Float));
  Tensor ones = empty_f32(x, {x.size(-1)});
  return torch::stable::fill_(ones, 1.0);
}

}  // namespace

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const OptTensor& weight, const OptTensor& gate,
                                    bool norm_before_gate, int64_t group_size, double eps) {
  check_float(x, "x");
  const Rows rows(x);
  const std::optional<Rows> gates = gate ? std::optional<Rows>(Rows(*gate)) : std::nullopt;
  const Tensor w = scale(weight, x);
  NormArgs a = arguments(rows, gates, w, norm_before_gate, group_size);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() /= group_size;
  Tensor y = empty_as(x), rstd = empty_f32(x, shape);
  a.y = y.data_ptr();
  a.rstd = data<float>(rstd);
  a.eps = static_cast<float>(eps);
  const int64_t grain = std::max<int64_t>(1, 32768 / a.width);
  parallel(a.rows, grain, [&](int64_t begin, int64_t end) { rms_norm_fwd_for()(a, begin, end); });
  return {y, rstd};
}

namespace {

std::tuple<Tensor, Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const OptTensor& weight,
                                                const OptTensor& gate, const Tensor& rstd, bool norm_before_gate,
                                                int64_t group_size, bool needs_weight) {
  const Rows rows(x), dys(dy);
  const std::optional<Rows> gates = gate ? std::optional<Rows>(Rows(*gate)) : std::nullopt;
  const Tensor w = scale(weight, x);
  NormArgs a = arguments(rows, gates, w, norm_before_gate, group_size);
  a.dy = dys.tensor.data_ptr();
  a.dy_stride = dys.stride;
  a.rstd = data<float>(rstd);
  a.partitions = std::clamp<int64_t>(a.rows * a.width / 16384, 1, 64);
  Tensor dx = empty_as(x), dgate = gate ? empty_as(*gate) : torch::stable::new_empty(x, {0});
  Tensor dweights = torch::stable::new_zeros(x, {needs_weight ? a.partitions : 0, a.width}, Scalar::Float);
  a.dx = dx.data_ptr();
  a.dgate = dgate.data_ptr();
  a.dweight = needs_weight ? data<float>(dweights) : nullptr;
  parallel(a.partitions, 1, [&](int64_t begin, int64_t end) { rms_norm_bwd_for()(a, begin, end); });
  std::vector<int64_t> over{0};
  Tensor dweight = needs_weight ? torch::stable::sum(dweights, over) : empty_f32(x, {0});
  return {dx, dgate, dweight};
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&seqlib::rms_norm));
  m.impl("rms_norm_bwd", TORCH_BOX(&seqlib::rms_norm_bwd));
}

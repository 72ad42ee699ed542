#include "gelu_glu.h"

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "seqlib.h"

namespace seqlib {
namespace {

Tensor dense(const Tensor& t) { return torch::stable::contiguous(t); }

struct Call {
  Tensor x, weight, packed;
  OptTensor bias;
  GeluGluArgs args{};

  Call(const Tensor& x_, const Tensor& weight_, const OptTensor& bias_)
      : x(dense(x_)), weight(dense(weight_)), bias(bias_ ? OptTensor(dense(*bias_)) : std::nullopt) {
    check_f32(x, "x"), check_f32(weight, "weight");
    if (bias) check_f32(*bias, "bias");
    GeluGluArgs& a = args;
    a.d_in = weight.size(1), a.d_out = weight.size(0) / 2;
    STD_TORCH_CHECK(weight.size(0) % 2 == 0 && x.size(-1) == a.d_in, "weight must be (2 d_out, ", x.size(-1), ")");
    a.rows = x.numel() / a.d_in;
    a.x = data<float>(x), a.weight = data<float>(weight), a.bias = data<float>(bias);
  }

  template <class Kernel>
  void pack(int64_t panels, int64_t depth, Kernel kernel) {
    packed = empty_f32(weight, {panels, depth, 64});
    args.packed = data<float>(packed);
    parallel(panels, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
};

std::tuple<Tensor, Tensor> gelu_glu(const Tensor& x, const Tensor& weight, const OptTensor& bias, bool keep) {
  Call call(x, weight, bias);
  GeluGluArgs& a = call.args;
  call.pack(gelu_glu_panels(a.d_out), a.d_in, gelu_glu_pack_fwd_for());
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = a.d_out;
  Tensor y = empty_f32(x, shape), mixed = empty_f32(x, {keep ? a.rows : 0, 2 * a.d_out});
  a.y = data<float>(y), a.mixed = keep ? data<float>(mixed) : nullptr;
  parallel((a.rows + gelu_glu_rows - 1) / gelu_glu_rows, 1,
           [&](int64_t begin, int64_t end) { gelu_glu_fwd_for()(a, begin, end); });
  return {y, mixed};
}

std::tuple<Tensor, Tensor, Tensor> gelu_glu_bwd(const Tensor& dy_, const Tensor& x, const Tensor& weight,
                                                const Tensor& mixed) {
  Call call(x, weight, {});
  GeluGluArgs& a = call.args;
  const Tensor dy = dense(dy_);
  check_f32(dy, "dy"), check_f32(mixed, "mixed");
  call.pack(gelu_glu_panels_bwd(a.d_in), 2 * a.d_out, gelu_glu_pack_bwd_for());
  a.parts = std::clamp<int64_t>(a.rows / 2048, 1, 64);
  Tensor dx = empty_as(call.x), dweight = empty_f32(x, {a.parts, 2 * a.d_out, a.d_in});
  Tensor dbias = empty_f32(x, {a.parts, 2 * a.d_out});
  a.dy = data<float>(dy), a.mixed = data<float>(mixed);
  a.dx = data<float>(dx), a.dweight = data<float>(dweight), a.dbias = data<float>(dbias);
  parallel(a.parts, 1, [&](int64_t begin, int64_t end) { gelu_glu_bwd_for()(a, begin, end); });
  std::vector<int64_t> over{0};
  return {dx, torch::stable::sum(dweight, over), torch::stable::sum(dbias, over)};
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("gelu_glu", TORCH_BOX(&seqlib::gelu_glu));
  m.impl("gelu_glu_bwd", TORCH_BOX(&seqlib::gelu_glu_bwd));
}

#include "causal_conv1d.h"

#include <tuple>

#include "binding.h"

namespace seqlib {
namespace {

// (d, width) in any dtype to (width, d) in float32.
Tensor taps(const Tensor& weight) {
  const Tensor wide = torch::stable::to(weight, Scalar::Float);
  return torch::stable::contiguous(torch::stable::transpose(wide, 0, 1));
}

OptTensor contiguous(const OptTensor& t) { return t ? OptTensor(torch::stable::contiguous(*t)) : std::nullopt; }

// The tensors that the arguments point into live as long as this.
struct Call {
  OnDevice on;
  Input x;
  Tensor weight;
  OptTensor bias, state;
  ConvArgs args{};

  Call(const Tensor& x_, const Tensor& weight_, const OptTensor& bias_, const OptTensor& state_, const OptTensor& links,
       bool silu)
      : on(x_), x(x_, "bl", "x"), weight(taps(weight_)), bias(floats(bias_)), state(contiguous(state_)) {
    args.x = x.seen;
    args.weight = data<float>(weight);
    args.bias = data<float>(bias);
    args.state = data<char>(state);
    args.batch = x_.size(0);
    args.seqlen = x_.size(1);
    args.d = x_.size(2);
    args.width = static_cast<int32_t>(weight.size(0));
    args.links = links_of(links, args.batch, args.seqlen);
    args.silu = silu;
    STD_TORCH_CHECK(args.width >= 1 && args.width <= conv_max_width, "d_conv must be 1 to ", conv_max_width);
    STD_TORCH_CHECK(!state || state->scalar_type() == x_.scalar_type(), "the state must have the dtype of x");
  }

  Tensor output() const { return torch::stable::new_empty(x.tensor, {args.batch, args.seqlen, args.d}); }
};

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                         const OptTensor& state, const OptTensor& links, bool silu) {
  Call call(x, weight, bias, state, links, silu);
  ConvArgs& a = call.args;
  Tensor y = call.output(), final = torch::stable::new_empty(x, {a.batch, a.width - 1, a.d});
  a.y = y.data_ptr();
  a.final = final.data_ptr();
  start_causal_conv1d_fwd(a, call.on.stream());
  return {y, final};
}

// Returns dx, the gradients of weight and bias as (width + 1, d) float32, and dstate (empty without a state).
std::tuple<Tensor, Tensor, Tensor> causal_conv1d_bwd(const Tensor& dy, const OptTensor& dfinal, const Tensor& x,
                                                     const Tensor& weight, const OptTensor& bias, const OptTensor& state,
                                                     const OptTensor& links, bool silu) {
  Call call(x, weight, bias, state, links, silu);
  ConvArgs& a = call.args;
  const Input dys(dy, "bl", "dy");
  STD_TORCH_CHECK(dys.seen.dtype == a.x.dtype, "dy must have the dtype of x");
  const OptTensor dfinals = contiguous(dfinal);
  Tensor dx = call.output(), dstate = torch::stable::new_zeros(x, {state ? a.batch : 0, a.width - 1, a.d});
  const int64_t along = (a.seqlen + conv_positions - 1) / conv_positions;
  Tensor partial = empty_f32(x, {a.batch * along, a.width + 1, a.d});
  a.dy = dys.seen;
  a.dfinal = data<char>(dfinals);
  a.dx = dx.data_ptr();
  a.dstate = state ? dstate.data_ptr() : nullptr;
  a.partial = data<float>(partial);
  start_causal_conv1d_bwd(a, call.on.stream());
  return {dx, torch::stable::sum(partial, std::vector<int64_t>{0}), dstate};
}

Tensor causal_conv1d_step(const Tensor& x, const Tensor& weight, const OptTensor& bias, Tensor state, bool silu) {
  STD_TORCH_CHECK(state.is_contiguous() && state.scalar_type() == x.scalar_type(), "state must be contiguous, like x");
  STD_TORCH_CHECK(weight.size(1) <= conv_max_width, "d_conv must be 1 to ", conv_max_width);
  const OnDevice on(x);
  const Input xs(x, "b", "x");
  const Input w(torch::stable::contiguous(weight), "b", "weight");
  const std::optional<Input> b = bias ? std::optional<Input>(Input(*bias, "", "bias")) : std::nullopt;
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  start_causal_conv1d_step({xs.seen, w.seen, b ? b->seen : View{}, state.data_ptr(), y.data_ptr(), x.size(0), x.size(1),
                            static_cast<int32_t>(weight.size(1)), silu},
                           on.stream());
  return y;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(SEQLIB_LIBRARY, SEQLIB_DEVICE_KEY, m) {
  m.impl("causal_conv1d", TORCH_BOX(&seqlib::causal_conv1d));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&seqlib::causal_conv1d_bwd));
  m.impl("causal_conv1d_step", TORCH_BOX(&seqlib::causal_conv1d_step));
}

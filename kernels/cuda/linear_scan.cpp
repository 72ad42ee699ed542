#include "linear_scan.h"

#include <tuple>

#include "binding.h"

namespace seqlib {
namespace {

bool is_complex(const Tensor& t) { return t.scalar_type() == Scalar::ComplexFloat; }

View seen(const Tensor& t, int64_t batch) {
  return {t.data_ptr(), t.size(0) == batch && batch > 1 ? t.stride(0) : 0, t.size(1) > 1 ? t.stride(1) : 0, 0,
          is_complex(t) ? Dtype::f32 : dtype_of(t, "a and b, if not complex64,")};
}

OptTensor contiguous(const OptTensor& t) { return t ? OptTensor(torch::stable::contiguous(*t)) : std::nullopt; }

// The tensors that the arguments point into live as long as this.
struct Call {
  OnDevice on;
  Tensor a, b;  // b: the inputs, or in the backward pass the gradient of h, which has their shape and dtype
  OptTensor initial, maps;
  LinearArgs args{};

  Call(const Tensor& a_, const Tensor& b_, const OptTensor& initial_, const OptTensor& links, bool reverse)
      : on(b_), a(unit_stride(a_)), b(unit_stride(b_)), initial(contiguous(initial_)) {
    STD_TORCH_CHECK(is_complex(a) == is_complex(b), "a and b must both be real or both be complex");
    args.batch = b.size(0);
    args.seqlen = b.size(1);
    args.width = b.size(2);
    args.a = seen(a, args.batch);
    args.b = seen(b, args.batch);
    args.initial = data<char>(initial);
    args.links = links_of(links, args.batch, args.seqlen);
    args.reverse = reverse;
    args.complex = is_complex(b);
    const int64_t blocks = args.batch * ((args.width + linear_scan_channels - 1) / linear_scan_channels);
    const int64_t full = on.multiprocessors();
    args.segment = segment_length("linear_scan.segments", args.seqlen, blocks, blocks < full ? 2 * full : 1, linear_scan_tile);
    args.segments = (args.seqlen + args.segment - 1) / args.segment;
    if (args.segments > 1) maps = torch::stable::new_empty(b, {args.batch, args.segments, args.width, 2}, wide());
    args.maps = data<char>(maps);
  }

  Scalar wide() const { return args.complex ? Scalar::ComplexFloat : Scalar::Float; }
  Tensor state() const { return torch::stable::new_empty(b, {args.batch, args.width}, wide()); }
};

// a: (batch or 1, seqlen or 1, width); b: (batch, seqlen, width); initial_state: (batch, width).
std::tuple<Tensor, Tensor> linear_scan(const Tensor& a, const Tensor& b, const OptTensor& initial_state,
                                       const OptTensor& links, bool reverse) {
  Call call(a, b, initial_state, links, reverse);
  Tensor h = torch::stable::new_empty(b, {call.args.batch, call.args.seqlen, call.args.width}), final = call.state();
  call.args.out = h.data_ptr();
  call.args.final = final.data_ptr();
  start_linear_scan_fwd(call.args, call.on.stream());
  return {h, final};
}

// The gradient of a has its seqlen axis, and the batch axis of b.
std::tuple<Tensor, Tensor, Tensor> linear_scan_bwd(const Tensor& dh, const OptTensor& dfinal, const Tensor& a,
                                                   const Tensor& h, const OptTensor& initial_state,
                                                   const OptTensor& links, bool reverse) {
  Call call(a, dh, dfinal, links, reverse);
  LinearArgs& args = call.args;
  const Tensor kept = torch::stable::contiguous(h);
  const OptTensor before = contiguous(initial_state);
  const bool constant = a.size(1) == 1 && args.seqlen > 1;
  Tensor da = torch::stable::new_empty(dh, {args.batch, constant ? args.segments : args.seqlen, args.width}, call.wide());
  Tensor db = torch::stable::new_empty(dh, {args.batch, args.seqlen, args.width}), dinitial = call.state();
  args.h = kept.data_ptr();
  args.da = da.data_ptr();
  args.out = db.data_ptr();
  args.final = dinitial.data_ptr();
  start_linear_scan_bwd(args, data<char>(before), call.on.stream());
  if (constant) da = torch::stable::sum(da, std::vector<int64_t>{1}, true);
  return {da, db, dinitial};
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(SEQLIB_LIBRARY, SEQLIB_DEVICE_KEY, m) {
  m.impl("linear_scan", TORCH_BOX(&seqlib::linear_scan));
  m.impl("linear_scan_bwd", TORCH_BOX(&seqlib::linear_scan_bwd));
}

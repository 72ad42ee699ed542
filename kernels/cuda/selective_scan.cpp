#include "selective_scan.h"

#include <tuple>

#include "binding.h"

namespace seqlib {
namespace {

// The tensors that the arguments point into live as long as this.
struct Call {
  OnDevice on;
  Input x, dt, B, C;
  std::optional<Input> z;
  Tensor A;
  OptTensor D, dt_bias, initial, entries, sums;
  ScanArgs args{};

  Call(const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_, const OptTensor& D_,
       const OptTensor& z_, const OptTensor& dt_bias_, const OptTensor& initial_, const OptTensor& links, bool softplus)
      : on(x_), x(x_, "bl", "x"), dt(dt_, "bl", "dt"), B(B_, "blg", "B"), C(C_, "blg", "C"), A(floats(A_)),
        D(floats(D_)), dt_bias(floats(dt_bias_)), initial(floats(initial_)) {
    if (z_) z.emplace(*z_, "bl", "z");
    args.x = x.seen;
    args.dt = dt.seen;
    args.B = B.seen;
    args.C = C.seen;
    if (z) args.z = z->seen;
    STD_TORCH_CHECK(args.dt.dtype == args.x.dtype && (!z || args.z.dtype == args.x.dtype), "x, dt, z must share a dtype");
    args.A = data<float>(A);
    args.D = data<float>(D);
    args.dt_bias = data<float>(dt_bias);
    args.initial = data<float>(initial);
    args.batch = x_.size(0);
    args.seqlen = x_.size(1);
    args.d_inner = x_.size(2);
    args.d_state = A.size(1);
    args.groups = B_.dim() == 4 ? B_.size(2) : 1;
    STD_TORCH_CHECK((C_.dim() == 4 ? C_.size(2) : 1) == args.groups, "B and C must have the same number of groups");
    STD_TORCH_CHECK(args.d_state <= 256, "d_state must be at most 256");
    args.links = links_of(links, args.batch, args.seqlen);
    args.softplus = softplus;
  }

  int64_t parts(int64_t channels) const { return (args.d_inner / args.groups + channels - 1) / channels; }

  // Splits the sequence where the blocks of whole sequences are fewer than the multiprocessors, into `each` for every one.
  void split(const char* key, int64_t blocks, int64_t each) {
    const int64_t full = on.multiprocessors();
    args.segment = segment_length(key, args.seqlen, blocks, blocks < full ? each * full : 1, kScanCheckpoint);
    args.segments = (args.seqlen + args.segment - 1) / args.segment;
    if (args.segments == 1) return;
    entries = empty_f32(A, {args.batch, args.segments, args.d_inner, args.d_state});
    sums = empty_f32(A, {args.batch, args.segments, args.d_inner});
    args.entries = data<float>(entries);
    args.sums = data<float>(sums);
  }

  int64_t checkpoints() const { return args.batch * ((args.seqlen + kScanCheckpoint - 1) / kScanCheckpoint); }
  Tensor output() const { return torch::stable::new_empty(x.tensor, {args.batch, args.seqlen, args.d_inner}); }
  Tensor states(int64_t count) const { return empty_f32(A, {count, args.d_inner, args.d_state}); }
};

std::tuple<Tensor, Tensor, Tensor> selective_scan(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D,
    const OptTensor& z, const OptTensor& dt_bias, const OptTensor& initial_state, const OptTensor& links,
    bool dt_softplus, bool keep) {
  Call call(x, dt, A, B, C, D, z, dt_bias, initial_state, links, dt_softplus);
  ScanArgs& a = call.args;
  Tensor y = call.output(), final = call.states(a.batch), checkpoints = call.states(keep ? call.checkpoints() : 0);
  a.y = y.data_ptr();
  a.final = data<float>(final);
  a.checkpoints = keep ? data<float>(checkpoints) : nullptr;
  // More lanes for a channel where there are few channels, up to about 12 warps for each multiprocessor; beyond 8 lanes
  // segments are faster.
  const int64_t wanted = std::min<int64_t>(8, 12 * 32 * call.on.multiprocessors() / std::max<int64_t>(a.batch * a.d_inner, 1));
  a.lanes = scan_lanes(a.d_state, tuned("selective_scan.lanes", wanted));
  call.split("selective_scan.segments", a.batch * a.groups * call.parts(scan_block_channels(a.lanes)), 3);
  start_selective_scan_fwd(a, call.on.stream());
  return {y, final, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_bwd(
    const Tensor& dy, const OptTensor& dfinal, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
    const Tensor& C, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, const OptTensor& initial_state,
    const OptTensor& links, const Tensor& checkpoints, bool dt_softplus) {
  Call call(x, dt, A, B, C, D, z, dt_bias, initial_state, links, dt_softplus);
  check_f32(checkpoints, "checkpoints");
  STD_TORCH_CHECK(checkpoints.size(0) == call.checkpoints(), "checkpoints are not those of the forward call; keep them");
  const Input dys(dy, "bl", "dy");
  STD_TORCH_CHECK(dys.seen.dtype == call.args.x.dtype, "dy must have the dtype of x");
  const OptTensor dlast = floats(dfinal);
  ScanBackArgs g{};
  call.args.checkpoints = data<float>(checkpoints);
  g.parts = call.parts(scan_back_block_channels(call.args.d_state));
  call.split("selective_scan_bwd.segments", call.args.batch * call.args.groups * g.parts, 2);
  const ScanArgs& a = g.of = call.args;
  g.dy = dys.seen;
  g.dfinal = data<float>(dlast);

  Tensor dx = call.output(), ddt = call.output(), dz = z ? call.output() : torch::stable::new_empty(x, {0});
  Tensor dA = call.states(a.batch * a.segments), dinitial = call.states(a.batch);
  Tensor dD = empty_f32(x, {a.batch * a.segments, a.d_inner}), dbias = empty_f32(x, {a.batch * a.segments, a.d_inner});
  const std::vector<int64_t> shape{a.batch, a.groups, g.parts, a.seqlen, a.d_state};
  Tensor dB = empty_f32(x, shape), dC = empty_f32(x, shape);
  g.dx = dx.data_ptr();
  g.ddt = ddt.data_ptr();
  g.dz = z ? dz.data_ptr() : nullptr;
  g.dA = data<float>(dA);
  g.dinitial = data<float>(dinitial);
  g.dD = data<float>(dD);
  g.dbias = data<float>(dbias);
  g.dB = data<float>(dB);
  g.dC = data<float>(dC);
  start_selective_scan_bwd(g, call.on.stream());
  auto over = [](const Tensor& t, int64_t axis) { return torch::stable::sum(t, std::vector<int64_t>{axis}); };
  return {dx, ddt, over(dA, 0), over(dB, 2), over(dC, 2), over(dD, 0), dz, over(dbias, 0), dinitial};
}

Tensor selective_scan_step(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                           Tensor state, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias,
                           bool dt_softplus) {
  check_f32(state, "state");
  const OnDevice on(x);
  const Input xs(x, "b", "x"), dts(dt, "b", "dt"), Bs(B, "bg", "B"), Cs(C, "bg", "C");
  const std::optional<Input> zs = z ? std::optional<Input>(Input(*z, "b", "z")) : std::nullopt;
  const Tensor As = floats(A);
  const OptTensor Ds = floats(D), biases = floats(dt_bias);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const ScanStepArgs a{xs.seen, dts.seen, zs ? zs->seen : View{}, Bs.seen, Cs.seen, data<float>(As), data<float>(Ds),
                       data<float>(biases), y.data_ptr(), data<float>(state), x.size(0), x.size(1), A.size(1),
                       B.dim() == 3 ? B.size(1) : 1, dt_softplus};
  STD_TORCH_CHECK(a.dt.dtype == a.x.dtype && (!zs || a.z.dtype == a.x.dtype), "x, dt, z must share a dtype");
  STD_TORCH_CHECK((C.dim() == 3 ? C.size(1) : 1) == a.groups, "B and C must have the same number of groups");
  start_selective_scan_step(a, on.stream());
  return y;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(SEQLIB_LIBRARY, SEQLIB_DEVICE_KEY, m) {
  m.impl("selective_scan", TORCH_BOX(&seqlib::selective_scan));
  m.impl("selective_scan_bwd", TORCH_BOX(&seqlib::selective_scan_bwd));
  m.impl("selective_scan_step", TORCH_BOX(&seqlib::selective_scan_step));
}

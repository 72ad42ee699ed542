#include "selective_scan.h"

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "steps.h"

namespace seqlib {
namespace {

// The real tokens of a batch cut into tiles, and the slots for the states between them.
struct Plan {
  std::vector<ScanTile> tiles;
  std::vector<int64_t> first_tile{0};
  int32_t slots = 0;
  bool covers = true;  // every position is a real token

  Plan(int64_t batch, int64_t seqlen, const OptTensor& spans) {
    int64_t count = batch, real = 0, i = 0;
    const int32_t* span = nullptr;
    if (spans) {
      STD_TORCH_CHECK(spans->scalar_type() == Scalar::Int && spans->dim() == 2 && spans->size(1) == 4 &&
                          spans->is_contiguous(),
                      "spans must be the int32 list of SequenceInfo.spans");
      count = spans->size(0);
      span = data<const int32_t>(*spans);
    }
    for (int64_t row = 0; row < batch; ++row) {
      for (; i < count && (span ? span[4 * i] : i) == row; ++i) {
        const int64_t begin = span ? span[4 * i + 1] : 0, end = span ? span[4 * i + 2] : seqlen;
        STD_TORCH_CHECK(0 <= begin && begin < end && end <= seqlen, "span out of range");
        for (int64_t t = begin; t < end; t += kScanTile) {
          const int32_t fresh = t == begin && span && span[4 * i + 3];
          const bool first = static_cast<int64_t>(tiles.size()) == first_tile.back();
          const auto length = static_cast<int32_t>(std::min<int64_t>(end - t, kScanTile));
          tiles.push_back({static_cast<int32_t>(t), length, fresh, fresh || first ? -1 : slots++});
        }
        real += end - begin;
      }
      first_tile.push_back(static_cast<int64_t>(tiles.size()));
    }
    STD_TORCH_CHECK(i == count, "spans must be ordered by row, each below ", batch);
    covers = real == batch * seqlen;
  }
};

OptTensor floats(const OptTensor& t) {
  if (t && t->scalar_type() == Scalar::Float && t->is_contiguous()) return t;
  return t ? OptTensor(torch::stable::contiguous(torch::stable::to(*t, Scalar::Float))) : std::nullopt;
}

// A tensor with unit stride along its last axis, and how the kernel sees it.
struct Input {
  Tensor tensor;
  ScanInput seen{};

  // axes: those before the last one, in order: 'b' batch, 'l' seqlen, 'g' group.
  Input(const Tensor& t, const char* axes, const char* name)
      : tensor(t.stride(-1) == 1 || t.size(-1) == 1 ? t : torch::stable::contiguous(t)) {
    check_float(tensor, name);
    seen.data = tensor.data_ptr();
    seen.bf16 = is_bf16(tensor);
    for (int64_t axis = 0; axis < tensor.dim() - 1; ++axis)
      (axes[axis] == 'b' ? seen.batch : axes[axis] == 'l' ? seen.row : seen.group) = tensor.stride(axis);
  }
};

// The tensors that the arguments point into live as long as this.
struct Call {
  Input x, dt, B, C;
  std::optional<Input> z;
  Tensor A;
  OptTensor D, dt_bias, initial;
  Plan plan;
  ScanArgs args{};

  Call(const Tensor& x_, const Tensor& dt_, const Tensor& A_, const Tensor& B_, const Tensor& C_, const OptTensor& D_,
       const OptTensor& z_, const OptTensor& dt_bias_, const OptTensor& initial_, const OptTensor& spans, bool softplus)
      : x(x_, "bl", "x"), dt(dt_, "bl", "dt"), B(B_, "blg", "B"), C(C_, "blg", "C"), A(*floats(A_)), D(floats(D_)),
        dt_bias(floats(dt_bias_)), initial(floats(initial_)), plan(x_.size(0), x_.size(1), spans) {
    if (z_) z.emplace(*z_, "bl", "z");
    args.x = x.seen;
    args.dt = dt.seen;
    args.B = B.seen;
    args.C = C.seen;
    if (z) args.z = z->seen;
    STD_TORCH_CHECK(args.dt.bf16 == args.x.bf16 && (!z || args.z.bf16 == args.x.bf16), "x, dt, z must share a dtype");
    args.A = data<float>(A);
    args.D = data<float>(D);
    args.dt_bias = data<float>(dt_bias);
    args.initial = data<float>(initial);
    args.tiles = plan.tiles.data();
    args.first_tile = plan.first_tile.data();
    args.batch = x_.size(0);
    args.seqlen = x_.size(1);
    args.d_inner = x_.size(2);
    args.d_state = A.size(1);
    args.groups = B_.dim() == 4 ? B_.size(2) : 1;
    STD_TORCH_CHECK((C_.dim() == 4 ? C_.size(2) : 1) == args.groups, "B and C must have the same number of groups");
    args.softplus = softplus;
  }

  Tensor output(const Tensor& like) const {
    std::vector<int64_t> shape{args.batch, args.seqlen, args.d_inner};
    return plan.covers ? torch::stable::new_empty(like, shape) : torch::stable::new_zeros(like, shape);
  }
  Tensor states(int64_t count) const { return empty_f32(A, {count, args.d_inner, args.d_state}); }
};

std::tuple<Tensor, Tensor, Tensor> selective_scan(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptTensor& D,
    const OptTensor& z, const OptTensor& dt_bias, const OptTensor& initial_state, const OptTensor& spans,
    bool dt_softplus, bool keep) {
  Call call(x, dt, A, B, C, D, z, dt_bias, initial_state, spans, dt_softplus);
  ScanArgs& a = call.args;
  Tensor y = call.output(x), final = call.states(a.batch);
  Tensor checkpoints = empty_f32(x, {keep ? call.plan.slots : 0, a.d_state, a.d_inner});
  a.y = y.data_ptr();
  a.final = data<float>(final);
  a.checkpoints = keep ? data<float>(checkpoints) : nullptr;
  // Blocks are independent, so their size may follow the number of threads.
  const int64_t per_group = a.d_inner / a.groups, threads = torch::stable::get_num_threads();
  auto blocks = [&](int64_t block) { return (per_group + block - 1) / block; };
  a.block = kScanBlock;
  while (a.block > 16 && a.batch * a.groups * blocks(a.block) < threads) a.block /= 2;
  a.blocks = blocks(a.block);
  const int64_t work = a.seqlen * std::min(a.block, per_group) * (a.d_state + 4);
  parallel(a.batch * a.groups * a.blocks, std::max<int64_t>(1, 40000 / work),
           [&](int64_t begin, int64_t end) { selective_scan_fwd_for()(a, begin, end); });
  return {y, final, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> selective_scan_bwd(
    const Tensor& dy, const OptTensor& dfinal, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
    const Tensor& C, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias, const OptTensor& initial_state,
    const OptTensor& spans, const Tensor& checkpoints, bool dt_softplus) {
  Call call(x, dt, A, B, C, D, z, dt_bias, initial_state, spans, dt_softplus);
  check_f32(checkpoints, "checkpoints");
  STD_TORCH_CHECK(checkpoints.size(0) == call.plan.slots, "checkpoints are not those of the forward call; keep them");
  const Input dys(dy, "bl", "dy");
  STD_TORCH_CHECK(dys.seen.bf16 == call.args.x.bf16, "dy must have the dtype of x");
  const OptTensor dlast = floats(dfinal);
  ScanBackArgs g{};
  g.of = call.args;
  g.of.checkpoints = data<float>(checkpoints);
  g.dy = dys.seen;
  g.dfinal = data<float>(dlast);
  const ScanArgs& a = g.of;
  const int64_t blocks = (a.d_inner / a.groups + kScanBackBlock - 1) / kScanBackBlock;
  g.parts = std::clamp<int64_t>(16 / std::max<int64_t>(1, a.batch * a.groups), 1, blocks);

  Tensor dx = call.output(x), ddt = call.output(x), dz = z ? call.output(x) : torch::stable::new_empty(x, {0});
  Tensor dA = call.states(a.batch), dinitial = call.states(a.batch);
  Tensor dD = empty_f32(x, {a.batch, a.d_inner}), dbias = empty_f32(x, {a.batch, a.d_inner});
  std::vector<int64_t> shape{a.batch, a.groups, g.parts, a.seqlen, a.d_state};
  Tensor dB = torch::stable::new_zeros(x, shape, Scalar::Float);
  Tensor dC = torch::stable::new_zeros(x, shape, Scalar::Float);
  g.dx = dx.data_ptr();
  g.ddt = ddt.data_ptr();
  g.dz = z ? dz.data_ptr() : nullptr;
  g.dA = data<float>(dA);
  g.dinitial = data<float>(dinitial);
  g.dD = data<float>(dD);
  g.dbias = data<float>(dbias);
  g.dB = data<float>(dB);
  g.dC = data<float>(dC);
  const int64_t work = a.seqlen * (a.d_inner / a.groups / g.parts + 1) * (a.d_state + 4);
  parallel(a.batch * a.groups * g.parts, std::max<int64_t>(1, 10000 / work),
           [&](int64_t begin, int64_t end) { selective_scan_bwd_for()(g, begin, end); });
  auto over = [](const Tensor& t, int64_t axis) { return torch::stable::sum(t, std::vector<int64_t>{axis}); };
  return {dx, ddt, over(dA, 0), over(dB, 2), over(dC, 2), over(dD, 0), dz, over(dbias, 0), dinitial};
}

// A measurement for benchmarks: 2^x of every element of x, `repeats` times over, on one thread.
Tensor exp_floor(const Tensor& x, int64_t repeats) {
  check_f32(x, "x");
  STD_TORCH_CHECK(x.numel() % 64 == 0, "exp_floor needs a multiple of 64 elements");
  Tensor y = empty_as(x);
  exp_floor_for()({data<float>(x), data<float>(y), x.numel()}, 0, repeats);
  return y;
}

}  // namespace

Tensor selective_scan_step(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                           Tensor state, const OptTensor& D, const OptTensor& z, const OptTensor& dt_bias,
                           bool dt_softplus) {
  check_f32(state, "state");
  const Input xs(x, "b", "x"), dts(dt, "b", "dt"), Bs(B, "bg", "B"), Cs(C, "bg", "C");
  const std::optional<Input> zs = z ? std::optional<Input>(Input(*z, "b", "z")) : std::nullopt;
  const Tensor As = *floats(A);
  const OptTensor Ds = floats(D), biases = floats(dt_bias);
  ScanStepArgs a{};
  a.x = xs.seen;
  a.dt = dts.seen;
  a.B = Bs.seen;
  a.C = Cs.seen;
  if (zs) a.z = zs->seen;
  STD_TORCH_CHECK(a.dt.bf16 == a.x.bf16 && (!zs || a.z.bf16 == a.x.bf16), "x, dt, z must share a dtype");
  a.A = data<float>(As);
  a.D = data<float>(Ds);
  a.dt_bias = data<float>(biases);
  a.state = data<float>(state);
  a.d_inner = x.size(1);
  a.d_state = A.size(1);
  a.groups = B.dim() == 3 ? B.size(1) : 1;
  a.softplus = dt_softplus;
  STD_TORCH_CHECK((C.dim() == 3 ? C.size(1) : 1) == a.groups, "B and C must have the same number of groups");
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  a.y = y.data_ptr();
  parallel(x.size(0) * a.d_inner, std::max<int64_t>(64, 40000 / a.d_state),
           [&](int64_t begin, int64_t end) { selective_scan_step_for()(a, begin, end); });
  return y;
}

}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("selective_scan", TORCH_BOX(&seqlib::selective_scan));
  m.impl("selective_scan_bwd", TORCH_BOX(&seqlib::selective_scan_bwd));
  m.impl("selective_scan_step", TORCH_BOX(&seqlib::selective_scan_step));
  m.impl("exp_floor", TORCH_BOX(&seqlib::exp_floor));
}

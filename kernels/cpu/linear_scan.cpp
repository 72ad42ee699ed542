#include "linear_scan.h"

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "seqlib.h"

namespace seqlib {
namespace {

bool is_complex(const Tensor& t) { return t.scalar_type() == Scalar::ComplexFloat; }

LinearInput seen(const Tensor& t, int64_t batch) {
  STD_TORCH_CHECK(t.scalar_type() == Scalar::Float || is_bf16(t) || is_complex(t),
                  "linear_scan takes float32, bfloat16 and complex64");
  const int64_t floats = is_complex(t) ? 2 : 1;
  return {t.data_ptr(), t.size(0) == batch && batch > 1 ? t.stride(0) * floats : 0,
          t.size(1) > 1 ? t.stride(1) * floats : 0, is_bf16(t)};
}

Tensor unit_stride(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : torch::stable::contiguous(t);
}

OptTensor contiguous(const OptTensor& t) { return t ? OptTensor(torch::stable::contiguous(*t)) : std::nullopt; }

// The tensors that the arguments point into live as long as this.
struct Call {
  Tensor a, b;  // b: the inputs, or in the backward pass the gradient of h, which has their shape and dtype
  OptTensor initial;
  std::vector<LinearRun> runs;
  std::vector<int64_t> first_run{0};
  bool covers = true;  // every position is a real token
  int64_t batch, floats;
  LinearArgs args{};

  Call(const Tensor& a_, const Tensor& b_, const OptTensor& initial_, const OptTensor& spans, bool reverse)
      : a(unit_stride(a_)), b(unit_stride(b_)), initial(contiguous(initial_)), batch(b.size(0)),
        floats(is_complex(b) ? 2 : 1) {
    STD_TORCH_CHECK(is_complex(a) == is_complex(b), "a and b must both be real or both be complex");
    args.a = seen(a, batch);
    args.b = seen(b, batch);
    args.initial = data<float>(initial);
    args.seqlen = b.size(1);
    args.width = b.size(2) * floats;
    args.reverse = reverse;
    args.complex = is_complex(b);
    order(spans);
    args.runs = runs.data();
    args.first_run = first_run.data();
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads() / std::max<int64_t>(batch, 1));
    const int64_t even = (args.width + threads - 1) / threads;
    args.block = std::clamp<int64_t>((even + 63) / 64 * 64, 64, linear_scan_block);
    args.blocks = (args.width + args.block - 1) / args.block;
  }

  // The runs of every row in the order of the scan. Backwards, a run is fresh if the one after it begins a document.
  void order(const OptTensor& spans) {
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
        const int64_t begin = span ? span[4 * i + 1] : 0, end = span ? span[4 * i + 2] : args.seqlen;
        STD_TORCH_CHECK(0 <= begin && begin < end && end <= args.seqlen, "span out of range");
        runs.push_back({begin, end, span && span[4 * i + 3]});
        real += end - begin;
      }
      if (args.reverse) {
        const auto first = runs.begin() + first_run.back();
        for (auto run = first; run != runs.end(); ++run) run->fresh = run + 1 != runs.end() && (run + 1)->fresh;
        std::reverse(first, runs.end());
      }
      first_run.push_back(static_cast<int64_t>(runs.size()));
    }
    STD_TORCH_CHECK(i == count, "spans must be ordered by row, each below ", batch);
    covers = real == batch * args.seqlen;
  }

  Tensor full(Scalar dtype) const {
    std::vector<int64_t> shape{batch, args.seqlen, b.size(2)};
    return covers ? torch::stable::new_empty(b, shape, dtype) : torch::stable::new_zeros(b, shape, dtype);
  }
  Scalar state_dtype() const { return args.complex ? Scalar::ComplexFloat : Scalar::Float; }
  Tensor state() const { return torch::stable::new_empty(b, {batch, b.size(2)}, state_dtype()); }

  template <class Kernel, class Args>
  void run(Kernel kernel, const Args& args_) const {
    const int64_t grain = std::max<int64_t>(1, 32768 / (args.block * args.seqlen));
    parallel(batch * args.blocks, grain, [&](int64_t begin, int64_t end) { kernel(args_, begin, end); });
  }
};

// a: (batch or 1, seqlen or 1, width); b: (batch, seqlen, width); initial_state: (batch, width).
std::tuple<Tensor, Tensor> linear_scan(const Tensor& a, const Tensor& b, const OptTensor& initial_state,
                                       const OptTensor& spans, bool reverse) {
  Call call(a, b, initial_state, spans, reverse);
  Tensor h = call.full(b.scalar_type()), final = call.state();
  call.args.h = h.data_ptr();
  call.args.final = data<float>(final);
  call.run(linear_scan_fwd_for(), call.args);
  return {h, final};
}

// The gradient of a has its seqlen axis, and the batch axis of b.
std::tuple<Tensor, Tensor, Tensor> linear_scan_bwd(const Tensor& dh, const OptTensor& dfinal, const Tensor& a,
                                                   const Tensor& h, const OptTensor& initial_state,
                                                   const OptTensor& spans, bool reverse) {
  Call call(a, dh, initial_state, spans, reverse);
  const Tensor kept = torch::stable::contiguous(h);
  const OptTensor dlast = contiguous(dfinal);
  call.args.h = kept.data_ptr();
  LinearBackArgs g{};
  g.of = call.args;
  g.dh = call.args.b;
  g.dfinal = data<float>(dlast);
  const bool constant = a.size(1) == 1 && call.args.seqlen > 1;
  Tensor da = constant ? torch::stable::new_empty(a, {call.batch, 1, a.size(2)}, call.state_dtype())
                       : call.full(call.state_dtype());
  Tensor db = call.full(dh.scalar_type()), dinitial = call.state();
  g.da = data<float>(da);
  g.db = db.data_ptr();
  g.dinitial = data<float>(dinitial);
  call.run(linear_scan_bwd_for(), g);
  return {da, db, dinitial};
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("linear_scan", TORCH_BOX(&seqlib::linear_scan));
  m.impl("linear_scan_bwd", TORCH_BOX(&seqlib::linear_scan_bwd));
}

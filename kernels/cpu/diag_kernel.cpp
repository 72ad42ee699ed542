#include "diag_kernel.h"

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "seqlib.h"

namespace seqlib {
namespace {

void check(const Tensor& t, Scalar dtype, int64_t axes, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == axes && t.is_contiguous(), what);
}

DiagKernelArgs arguments(const Tensor& log_decay, const Tensor& weight, int64_t length) {
  check(log_decay, Scalar::ComplexDouble, 2, "log_decay must be complex128 (d, n) and contiguous");
  check(weight, Scalar::ComplexFloat, 3, "weight must be complex64 (d, c, n) and contiguous");
  DiagKernelArgs a{};
  a.log_decay = data<double>(log_decay), a.weight = data<float>(weight);
  a.c = weight.size(1), a.n = weight.size(2), a.length = length;
  return a;
}

int64_t grain(const DiagKernelArgs& a) {
  const int64_t work = a.n * a.c * a.length;
  return (1 << 18) / std::max<int64_t>(1, work) + 1;
}

Tensor diag_kernel(const Tensor& log_decay, const Tensor& weight, int64_t length) {
  DiagKernelArgs a = arguments(log_decay, weight, length);
  Tensor kernel = empty_f32(weight, {weight.size(0), a.c, length});
  a.kernel = data<float>(kernel);
  parallel(weight.size(0), grain(a), [&](int64_t begin, int64_t end) { diag_kernel_fwd_for()(a, begin, end); });
  return kernel;
}

std::tuple<Tensor, Tensor> diag_kernel_bwd(const Tensor& dkernel_, const Tensor& log_decay, const Tensor& weight) {
  const Tensor dkernel = torch::stable::contiguous(dkernel_);
  check_f32(dkernel, "dkernel");
  DiagKernelArgs a = arguments(log_decay, weight, dkernel.size(2));
  a.dkernel = data<float>(dkernel);
  Tensor dlog_decay = empty_as(log_decay), dweight = empty_as(weight);
  a.dlog_decay = data<double>(dlog_decay), a.dweight = data<float>(dweight);
  parallel(weight.size(0), grain(a), [&](int64_t begin, int64_t end) { diag_kernel_bwd_for()(a, begin, end); });
  return {dlog_decay, dweight};
}

Tensor diag_step(const Tensor& x, const Tensor& decay, const Tensor& B, const Tensor& C, const Tensor& D,
                 Tensor state) {
  check_f32(x, "x"), check_f32(B, "B"), check_f32(C, "C"), check_f32(D, "D");
  DiagStepArgs a{};
  a.d = B.size(0), a.m = B.size(1), a.pairs = decay.scalar_type() == Scalar::ComplexFloat;
  const Scalar dtype = a.pairs ? Scalar::ComplexFloat : Scalar::Float;
  const int64_t n = a.pairs ? a.m / 2 : a.m;
  check(decay, dtype, 2, "decay must be complex64 or float32 (d, n) and contiguous");
  check(state, dtype, 3, "state must be of the dtype of decay, (batch, d, n) and contiguous");
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == a.d, "x must be (batch, ", a.d, ")");
  STD_TORCH_CHECK(state.size(0) == x.size(0) && state.size(1) == a.d && state.size(2) == n,
                  "the state is not one of this layer for ", x.size(0), " rows");
  Tensor y = empty_as(x);
  a.x = data<float>(x), a.decay = data<float>(decay), a.B = data<float>(B), a.C = data<float>(C), a.D = data<float>(D);
  a.state = data<float>(state), a.y = data<float>(y);
  const int64_t blocks = (a.d + diag_step_block - 1) / diag_step_block;
  parallel(x.size(0) * blocks, std::max<int64_t>(1, 65536 / (diag_step_block * a.m)),
           [&](int64_t begin, int64_t end) { diag_step_for()(a, begin, end); });
  return y;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("diag_kernel", TORCH_BOX(&seqlib::diag_kernel));
  m.impl("diag_kernel_bwd", TORCH_BOX(&seqlib::diag_kernel_bwd));
  m.impl("diag_step", TORCH_BOX(&seqlib::diag_step));
}

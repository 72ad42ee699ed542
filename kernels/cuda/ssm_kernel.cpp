#include "ssm_kernel.h"

#include <tuple>

#include "binding.h"

namespace seqlib {
namespace {

void check(const Tensor& t, Scalar dtype, int64_t axes, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == axes && t.is_contiguous(), what);
}

// log_decay (d, n) complex128, weight (d, c, n) complex64 -> (d, c, length) float32.
Tensor vandermonde(const Tensor& log_decay, const Tensor& weight, int64_t length) {
  check(log_decay, Scalar::ComplexDouble, 2, "log_decay must be complex128 (d, n) and contiguous");
  check(weight, Scalar::ComplexFloat, 3, "weight must be complex64 (d, c, n) and contiguous");
  const OnDevice on(weight);
  VandermondeArgs a{data<const double>(log_decay), data<const float>(weight), nullptr, weight.size(0), weight.size(1),
                    weight.size(2), length};
  Tensor kernel = empty_f32(weight, {a.d, a.c, length});
  a.kernel = data<float>(kernel);
  start_vandermonde(a, on.stream());
  return kernel;
}

CauchyArgs cauchy_args(const Tensor& numerators, const Tensor& alpha, int64_t l_kernel) {
  check(numerators, Scalar::Float, 3, "numerators must be float32 (d, m, n) and contiguous");
  check(alpha, Scalar::ComplexFloat, 2, "alpha must be complex64 (d, n) and contiguous");
  CauchyArgs a{};
  a.numerators = data<const float>(numerators);
  a.alpha = data<const float>(alpha);
  a.d = numerators.size(0);
  a.m = numerators.size(1);
  a.n = numerators.size(2);
  a.l_kernel = l_kernel;
  return a;
}

Tensor cauchy(const Tensor& numerators, const Tensor& alpha, int64_t l_kernel) {
  const OnDevice on(numerators);
  CauchyArgs a = cauchy_args(numerators, alpha, l_kernel);
  Tensor sums = empty_f32(numerators, {a.d, a.m, 2, l_kernel / 2 + 1});
  a.sums = data<float>(sums);
  start_cauchy(a, on.stream());
  return sums;
}

// The gradients of numerators, and of alpha as pairs (d, n, 2).
std::tuple<Tensor, Tensor> cauchy_bwd(const Tensor& dsums, const Tensor& numerators, const Tensor& alpha, int64_t l_kernel) {
  const OnDevice on(numerators);
  CauchyArgs a = cauchy_args(numerators, alpha, l_kernel);
  const Tensor given = floats(dsums);
  Tensor dnumerators = empty_f32(numerators, {a.d, a.m, a.n});
  Tensor dalpha = empty_f32(numerators, {(a.m + cauchy_rows - 1) / cauchy_rows, a.d, a.n, 2});
  a.sums = data<float>(given);
  a.dnumerators = data<float>(dnumerators);
  a.dalpha = data<float>(dalpha);
  start_cauchy_bwd(a, on.stream());
  return {dnumerators, torch::stable::sum(dalpha, std::vector<int64_t>{0})};
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(SEQLIB_LIBRARY, SEQLIB_DEVICE_KEY, m) {
  m.impl("vandermonde", TORCH_BOX(&seqlib::vandermonde));
  m.impl("cauchy", TORCH_BOX(&seqlib::cauchy));
  m.impl("cauchy_bwd", TORCH_BOX(&seqlib::cauchy_bwd));
}

#include "ssm_kernel.h"

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "seqlib.h"

namespace seqlib {
namespace {

SpectrumArgs arguments(const Tensor& weights, const Tensor& square, const Tensor& real, const Tensor& dt,
                       const Tensor& sin, const Tensor& cos, int64_t points) {
  check_f32(weights, "weights"), check_f32(square, "square"), check_f32(real, "real"), check_f32(dt, "dt");
  check_f32(sin, "sin"), check_f32(cos, "cos");
  SpectrumArgs a{};
  a.n = weights.size(1), a.channels = weights.size(2) / 4 - 1, a.points = points;
  STD_TORCH_CHECK(a.channels == 1 || a.channels == 2, "one or two readouts, got ", a.channels);
  const int64_t padded = (points + ssm_kernel_pad - 1) / ssm_kernel_pad * ssm_kernel_pad;
  STD_TORCH_CHECK(sin.size(0) == padded && cos.size(0) == padded, "tables must be padded to a multiple of 16");
  a.weights = data<float>(weights), a.square = data<float>(square), a.real = data<float>(real);
  a.dt = data<float>(dt), a.sin = data<float>(sin), a.cos = data<float>(cos);
  return a;
}

int64_t grain(const SpectrumArgs& a) { return std::max<int64_t>(1, 65536 / (a.n * a.points)); }

Tensor dplr_spectrum(const Tensor& weights, const Tensor& square, const Tensor& real, const Tensor& dt,
                     const Tensor& sin, const Tensor& cos, int64_t points) {
  SpectrumArgs a = arguments(weights, square, real, dt, sin, cos, points);
  Tensor spectrum = empty_f32(weights, {weights.size(0), a.channels, 2, points});
  a.spectrum = data<float>(spectrum);
  parallel(weights.size(0), grain(a), [&](int64_t begin, int64_t end) { dplr_spectrum_fwd_for()(a, begin, end); });
  return spectrum;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dplr_spectrum_bwd(const Tensor& dspectrum_, const Tensor& weights,
                                                             const Tensor& square, const Tensor& real,
                                                             const Tensor& dt, const Tensor& sin, const Tensor& cos) {
  const Tensor dspectrum = torch::stable::contiguous(dspectrum_);
  SpectrumArgs a = arguments(weights, square, real, dt, sin, cos, dspectrum.size(3));
  a.dspectrum = data<float>(dspectrum);
  Tensor dweights = empty_as(weights), dsquare = empty_as(square), dreal = empty_as(real), ddt = empty_as(dt);
  a.dweights = data<float>(dweights), a.dsquare = data<float>(dsquare), a.dreal = data<float>(dreal);
  a.ddt = data<float>(ddt);
  parallel(weights.size(0), grain(a), [&](int64_t begin, int64_t end) { dplr_spectrum_bwd_for()(a, begin, end); });
  return {dweights, dsquare, dreal, ddt};
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("dplr_spectrum", TORCH_BOX(&seqlib::dplr_spectrum));
  m.impl("dplr_spectrum_bwd", TORCH_BOX(&seqlib::dplr_spectrum_bwd));
}

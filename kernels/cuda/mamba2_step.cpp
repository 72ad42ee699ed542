// A layer that decodes in three kernels: norm, in_proj and convolution; the state; gated norm, out_proj and the sum.
#include "mamba2_step.h"

#include <cmath>

#include "linear_binding.h"

namespace seqlib {
namespace {

Parameter parameter(const Tensor& t, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous() && t.numel() == size, name, " must have ", size, " elements in order");
  return {t.data_ptr(), dtype_of(t, name)};
}

// With `norm` x is the residual stream, and what comes is the stream after the layer.
Tensor mamba2_step(const Tensor& x, const OptTensor& norm, double norm_eps, const Tensor& in_proj, const OptTensor& in_bias,
                   const Tensor& conv, const OptTensor& conv_bias, const Tensor& dt_bias, const Tensor& A_log, const Tensor& D,
                   double dt_min, double dt_max, const OptTensor& gate_norm, double eps, bool norm_before_gate,
                   const Tensor& out_proj, const OptTensor& out_bias, Tensor conv_state, Tensor state) {
  STD_TORCH_CHECK(state.dim() == 4 && conv_state.dim() == 3 && x.dim() == 2, "x must be (batch, d_model)");
  check_f32(state, "state");
  const int64_t batch = x.size(0), nheads = state.size(1), d_state = state.size(2), headdim = state.size(3);
  const int64_t inner = nheads * headdim, channels = conv.size(0), width = conv.size(1), groups = (channels - inner) / (2 * d_state);
  STD_TORCH_CHECK(state.size(0) == batch && conv_state.size(0) == batch && conv_state.size(1) == width - 1 &&
                      conv_state.size(2) == channels && channels == inner + 2 * groups * d_state &&
                      in_proj.size(0) == inner + channels + nheads && out_proj.size(1) == inner && headdim % 4 == 0 &&
                      groups > 0 && nheads % groups == 0 && width <= few_rows_taps,
                  "the state is not one of this layer for ", batch, " rows, or the layer not one of the kernel's");
  const OnDevice on(x);
  const Rows rows(x);

  FewRowsArgs into = few_rows_of(rows, in_proj, in_bias, on);
  into.norm = same_dtype(norm, in_proj, into.d_in, "norm");
  into.group_size = norm ? into.d_in : 0;
  into.eps = static_cast<float>(norm_eps);
  into.y_stride = (into.d_out + 7) / 8 * 8;
  into.y_dtype = into.dtype;
  const Tensor inputs = torch::stable::new_empty(in_proj, {batch, into.y_stride});
  into.y = inputs.data_ptr();
  into.conv_weight = same_dtype(conv, in_proj, channels * width, "conv");
  into.conv_bias = same_dtype(conv_bias, in_proj, channels, "conv_bias");
  into.conv_state = const_cast<void*>(same_dtype(conv_state, in_proj, batch * (width - 1) * channels, "conv_state"));
  into.conv_first = inner;
  into.conv_channels = channels;
  into.conv_width = static_cast<int>(width);

  Mamba2StepArgs a{};
  a.inputs = inputs.data_ptr();
  a.stride = into.y_stride;
  a.dt_bias = parameter(dt_bias, nheads, "dt_bias");
  a.A_log = parameter(A_log, nheads, "A_log");
  a.D_width = D.numel() / nheads;
  a.D = parameter(D, nheads * a.D_width, "D");
  STD_TORCH_CHECK(a.D_width == 1 || a.D_width == headdim, "D must have one value per head or per channel");
  a.state = data<float>(state);
  const Tensor y = empty_f32(state, {batch, inner});
  a.y = data<float>(y);
  a.batch = batch;
  a.nheads = nheads;
  a.ngroups = groups;
  a.d_state = d_state;
  a.headdim = headdim;
  a.dt_min = static_cast<float>(dt_min);
  a.dt_max = static_cast<float>(dt_max);
  a.gate = !gate_norm || !norm_before_gate;
  a.overlap = overlaps();
  a.dtype = into.dtype;

  FewRowsArgs out = few_rows_of(Rows(y), out_proj, out_bias, on);
  STD_TORCH_CHECK(out.dtype == into.dtype && out.d_out == x.size(1), "out_proj must lead back to x in in_proj's dtype");
  out.norm = same_dtype(gate_norm, out_proj, inner, "gate_norm");
  out.group_size = gate_norm ? inner / groups : 0;
  out.eps = static_cast<float>(eps);
  if (!a.gate) {
    out.gate = inputs.data_ptr();
    out.gate_stride = a.stride;
  }
  const Tensor made = torch::stable::new_empty(x, {batch, out.d_out});
  if (norm) {
    out.residual = rows.tensor.data_ptr();
    out.residual_stride = rows.stride;
  }
  out.y = made.data_ptr();
  out.y_stride = out.d_out;
  out.y_dtype = into.x_dtype;

  start_few_rows(into, on.stream());
  start_mamba2_step(a, on.stream());
  start_few_rows(out, on.stream());
  return made;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(SEQLIB_LIBRARY, SEQLIB_DEVICE_KEY, m) {
  m.impl("mamba2_step", TORCH_BOX(&seqlib::mamba2_step));
}

// Schemas of every native op, once for all devices. cpu/ and cuda/ implement them.
// spans: on the CPU SequenceInfo.spans, on CUDA SequenceInfo.links.
#include <torch/csrc/stable/library.h>

#ifndef SEQLIB_LIBRARY  // the emulation of the CUDA kernels has ops of its own
#define SEQLIB_LIBRARY seqlib
#endif

STABLE_TORCH_LIBRARY_FRAGMENT(SEQLIB_LIBRARY, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linears(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor");
  m.def("rotary_step(Tensor[] heads, Tensor positions, Tensor frequencies, bool interleaved) -> Tensor[]");
  m.def("isa(str? name) -> str");
  m.def("cuda_tune(str key, int value) -> int");
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? spans, bool silu) -> (Tensor, Tensor)");
  m.def("causal_conv1d_bwd(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? spans, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def("causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu) -> Tensor");
  m.def("linear_scan(Tensor a, Tensor b, Tensor? initial_state, Tensor? spans, bool reverse) -> (Tensor, Tensor)");
  m.def("linear_scan_bwd(Tensor dh, Tensor? dfinal, Tensor a, Tensor h, Tensor? initial_state, Tensor? spans, bool reverse) -> (Tensor, Tensor, Tensor)");
  m.def("delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? initial_state, Tensor? spans, float scale, bool save) -> (Tensor, Tensor, Tensor)");
  m.def("delta_rule_bwd(Tensor dy, Tensor? dfinal, Tensor saved, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? initial_state, Tensor? spans, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor(a!) state, float scale) -> Tensor");
  m.def("long_conv(Tensor x, Tensor kernel, Tensor? D, Tensor? reverse_kernel, Tensor? state) -> Tensor");
  m.def("long_conv_bwd(Tensor dy, Tensor x, Tensor kernel, Tensor? D, Tensor? reverse_kernel, Tensor? state) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_attention(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? spans, float scale, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("linear_attention_bwd(Tensor dy, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? initial_state, Tensor? spans, Tensor checkpoints, float scale, bool needs_decay) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor(a!) state, float scale) -> Tensor");
  m.def("mamba_step(Tensor x, Tensor in_proj, Tensor? in_bias, Tensor conv, Tensor? conv_bias, Tensor x_proj, Tensor dt_proj, Tensor dt_bias, Tensor A, Tensor D, Tensor out_proj, Tensor? out_bias, Tensor(a!) conv_state, Tensor(b!) state) -> Tensor");
  m.def("matrix_step(Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? log_decay, Tensor(a!) state, float scale, bool unit, str norm, Tensor? norm_weight, Tensor? gate, str activation, int group_size, float eps, Tensor weight, Tensor? bias) -> Tensor");
  m.def("mamba2_step(Tensor x, Tensor? norm, float norm_eps, Tensor in_proj, Tensor? in_bias, Tensor conv, Tensor? conv_bias, Tensor dt_bias, Tensor A_log, Tensor D, float dt_min, float dt_max, Tensor? gate_norm, float eps, bool norm_before_gate, Tensor out_proj, Tensor? out_bias, Tensor(a!) conv_state, Tensor(b!) state) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor? weight, Tensor? gate, bool norm_before_gate, int group_size, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? gate, Tensor rstd, bool norm_before_gate, int group_size, bool needs_weight) -> (Tensor, Tensor, Tensor)");
  m.def("selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, Tensor? spans, bool dt_softplus, bool keep) -> (Tensor, Tensor, Tensor)");
  m.def("selective_scan_bwd(Tensor dy, Tensor? dfinal, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, Tensor? initial_state, Tensor? spans, Tensor checkpoints, bool dt_softplus) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("selective_scan_step(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor(a!) state, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus) -> Tensor");
  m.def("vandermonde(Tensor log_decay, Tensor weight, int length) -> Tensor");
  m.def("cauchy(Tensor numerators, Tensor alpha, int l_kernel) -> Tensor");
  m.def("cauchy_bwd(Tensor dsums, Tensor numerators, Tensor alpha, int l_kernel) -> (Tensor, Tensor)");
  m.def("diag_kernel(Tensor log_decay, Tensor weight, int length) -> Tensor");
  m.def("diag_kernel_bwd(Tensor dkernel, Tensor log_decay, Tensor weight) -> (Tensor, Tensor)");
  m.def("diag_step(Tensor x, Tensor decay, Tensor B, Tensor C, Tensor D, Tensor(a!) state) -> Tensor");
  m.def("gelu_glu(Tensor x, Tensor weight, Tensor? bias, bool keep) -> (Tensor, Tensor)");
  m.def("gelu_glu_bwd(Tensor dy, Tensor x, Tensor weight, Tensor mixed) -> (Tensor, Tensor, Tensor)");
  m.def("dplr_spectrum(Tensor weights, Tensor square, Tensor real, Tensor dt, Tensor sin, Tensor cos, int points) -> Tensor");
  m.def("dplr_spectrum_bwd(Tensor dspectrum, Tensor weights, Tensor square, Tensor real, Tensor dt, Tensor sin, Tensor cos) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("exp_floor(Tensor x, int repeats) -> Tensor");
}

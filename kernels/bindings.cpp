// Schemas of every native op, once for all devices. cpu/ and cuda/ implement them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(seqlib, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("isa(str? name) -> str");
  m.def("causal_conv1d(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? spans, bool silu) -> (Tensor, Tensor)");
  m.def("causal_conv1d_bwd(Tensor dy, Tensor? dfinal, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? spans, bool silu) -> (Tensor, Tensor, Tensor)");
  m.def("causal_conv1d_step(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) state, bool silu) -> Tensor");
  m.def("delta_rule(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? initial_state, Tensor? spans, float scale, bool save) -> (Tensor, Tensor, Tensor)");
  m.def("delta_rule_bwd(Tensor dy, Tensor? dfinal, Tensor saved, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor? initial_state, Tensor? spans, float scale) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("delta_rule_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_decay, Tensor(a!) state, float scale) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor? weight, Tensor? gate, bool norm_before_gate, int group_size, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? gate, Tensor rstd, bool norm_before_gate, int group_size, bool needs_weight) -> (Tensor, Tensor, Tensor)");
}

// Schemas of every native op, once for all devices. cpu/ and cuda/ implement them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(seqlib, m) {
  m.def("isa(str? name) -> str");
  m.def("long_conv(Tensor x, Tensor kernel, Tensor? D, Tensor? reverse_kernel, Tensor? state) -> Tensor");
  m.def("long_conv_bwd(Tensor dy, Tensor x, Tensor kernel, Tensor? D, Tensor? reverse_kernel, Tensor? state) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rms_norm(Tensor x, Tensor? weight, Tensor? gate, bool norm_before_gate, int group_size, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor? gate, Tensor rstd, bool norm_before_gate, int group_size, bool needs_weight) -> (Tensor, Tensor, Tensor)");
}

#include "linear_binding.h"

namespace seqlib {
namespace {

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  const OnDevice on(x);
  const Rows rows(x);
  const Tensor whole = torch::stable::contiguous(weight);
  const OptTensor added =
      bias ? OptTensor(torch::stable::contiguous(torch::stable::to(*bias, whole.scalar_type()))) : std::nullopt;
  FewRowsArgs a = few_rows_of(rows, whole, added, on);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = a.d_out;
  const Tensor y = torch::stable::new_empty(x, shape);
  a.y = y.data_ptr();
  a.y_stride = a.d_out;
  a.y_dtype = a.x_dtype;
  start_few_rows(a, on.stream());
  return y;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(SEQLIB_LIBRARY, SEQLIB_DEVICE_KEY, m) { m.impl("linear", TORCH_BOX(&seqlib::linear)); }

// A linear map of a few rows as a part of larger steps.
#pragma once

#include "binding.h"
#include "linear.h"

namespace seqlib {

// Whether the kernels of a chain may overlap; `cuda_tune` says 2 for no.
inline bool overlaps() { return tuned("overlap", 1) == 1; }

inline const void* same_dtype(const OptTensor& t, const Tensor& weight, int64_t size, const char* name) {
  STD_TORCH_CHECK(!t || (t->scalar_type() == weight.scalar_type() && t->is_contiguous() && t->numel() == size), name,
                  " must have the dtype of its weight and ", size, " elements in order");
  return t ? t->data_ptr() : nullptr;
}

// The arguments but for y and what is done besides.
inline FewRowsArgs few_rows_of(const Rows& x, const Tensor& weight, const OptTensor& bias, const OnDevice& on) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && x.width == weight.size(1) && x.count <= few_rows_most,
                  "x must be rows, ", few_rows_most, " at most, of as many features as the contiguous weight takes");
  STD_TORCH_CHECK(weight.get_device_index() == x.tensor.get_device_index(), "x and the weight are on different devices");
  FewRowsArgs a{};
  a.batch = x.count;
  a.d_out = weight.size(0);
  a.d_in = weight.size(1);
  a.x = x.tensor.data_ptr();
  a.x_stride = x.stride;
  a.x_dtype = dtype_of(x.tensor, "x");
  a.weight = weight.data_ptr();
  a.dtype = dtype_of(weight, "weight");
  STD_TORCH_CHECK(a.x_dtype == Dtype::f32 || a.x_dtype == a.dtype, "x must be float32 or have the dtype of the weight");
  a.bias = same_dtype(bias, weight, a.d_out, "bias");
  const int64_t rule = few_rows_split(a.d_in, a.d_out, weight.element_size(), on.multiprocessors());
  a.split = static_cast<int>(tuned("linear.split", rule));
  a.at_once = static_cast<int>(tuned("linear.rows", few_rows_most));
  a.overlap = overlaps();
  return a;
}

}  // namespace seqlib

// What every binding shares: optional tensors, dtype checks and strided rows. Kernels themselves never see torch.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace seqlib {

using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Scalar = torch::headeronly::ScalarType;

inline bool is_bf16(const Tensor& t) { return t.scalar_type() == Scalar::BFloat16; }

// A kernel argument that may be float32 or bfloat16: the kernel is instantiated for both and told which.
inline void check_float(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == Scalar::Float || is_bf16(t), name, " must be float32 or bfloat16");
}

inline void check_f32(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == Scalar::Float && t.is_contiguous(), name, " must be float32 and contiguous");
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data(const OptTensor& t) {
  return t ? data<T>(*t) : nullptr;
}

// A tensor (..., d) seen as rows of d contiguous elements at one distance; copied only if its layout is not of that kind.
struct Rows {
  Tensor tensor;
  int64_t count, width, stride;

  explicit Rows(const Tensor& t) : tensor(t), count(1), width(t.size(-1)), stride(0) {
    const int64_t axes = t.dim() - 1;
    bool regular = t.stride(-1) == 1;
    int64_t expected = 0;
    for (int64_t axis = axes - 1; axis >= 0; --axis) {
      const int64_t size = t.size(axis);
      count *= size;
      if (size == 1) continue;
      if (expected == 0) {
        stride = expected = t.stride(axis);
      }
      regular = regular && t.stride(axis) == expected;
      expected *= size;
    }
    if (stride == 0) stride = width;
    if (!regular) {
      tensor = torch::stable::contiguous(t);
      stride = width;
    }
  }
};

inline Tensor empty_f32(const Tensor& like, std::vector<int64_t> shape) {
  return torch::stable::new_empty(like, shape, Scalar::Float);
}

inline Tensor empty_as(const Tensor& like) {
  std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
  return torch::stable::new_empty(like, shape);
}

}  // namespace seqlib

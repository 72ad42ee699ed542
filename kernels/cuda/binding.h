// What the CUDA bindings share: the stream, dtypes, views of tensors, and how many blocks fill the device.
#pragma once

#include <algorithm>
#include <atomic>
#include <string>

#include "seqlib.h"
#include "view.h"

#ifdef SEQLIB_EMULATED
#define SEQLIB_DEVICE_KEY CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define SEQLIB_LIBRARY seqlib
#define SEQLIB_DEVICE_KEY CUDA
#endif

namespace seqlib {

int multiprocessors(int device);  // of device.cu

// A number that replaces a rule of a launch plan, 0 for none; see `cuda_tune`.
int64_t tuned(const std::string& key, int64_t rule);

// The device of a tensor made current, and its stream.
class OnDevice {
 public:
#ifdef SEQLIB_EMULATED
  explicit OnDevice(const Tensor&) : index_(0) {}
#else
  explicit OnDevice(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }
#endif
  Stream stream() const { return stream_; }
  int64_t multiprocessors() const { return seqlib::multiprocessors(index_); }

 private:
  int32_t index_;
#ifndef SEQLIB_EMULATED
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_ = nullptr;
};

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case Scalar::Float: return Dtype::f32;
    case Scalar::BFloat16: return Dtype::bf16;
    case Scalar::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

inline Tensor unit_stride(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : torch::stable::contiguous(t);
}

inline Tensor floats(const Tensor& t) {
  return t.scalar_type() == Scalar::Float && t.is_contiguous()
             ? t
             : torch::stable::contiguous(torch::stable::to(t, Scalar::Float));
}
inline OptTensor floats(const OptTensor& t) { return t ? OptTensor(floats(*t)) : std::nullopt; }

// A tensor with unit stride along its last axis, and how a kernel sees it.
// axes: those before the last one, in order: 'b' batch, 'l' seqlen, 'g' group or head.
struct Input {
  Tensor tensor;
  View seen{};

  Input(const Tensor& t, const char* axes, const char* name) : tensor(unit_stride(t)) {
    seen.data = tensor.data_ptr();
    seen.dtype = dtype_of(tensor, name);
    for (int64_t axis = 0; axis < tensor.dim() - 1; ++axis)
      (axes[axis] == 'b' ? seen.batch : axes[axis] == 'l' ? seen.row : seen.group) = tensor.stride(axis);
  }
};

// SequenceInfo.links: (2, batch, seqlen + 1) int32 on the device.
inline const int32_t* links_of(const OptTensor& links, int64_t batch, int64_t seqlen) {
  STD_TORCH_CHECK(!links || (links->scalar_type() == Scalar::Int && links->dim() == 3 && links->size(0) == 2 &&
                             links->size(1) == batch && links->size(2) == seqlen + 1 && links->is_contiguous()),
                  "spans must be SequenceInfo.links on the device of the inputs");
  return data<const int32_t>(links);
}

// Positions of a segment, a multiple of `unit`, so that `blocks` independent blocks become about `wanted` of them.
inline int64_t segment_length(const char* key, int64_t seqlen, int64_t blocks, int64_t wanted, int64_t unit) {
  const int64_t rule = std::clamp<int64_t>(wanted / std::max<int64_t>(blocks, 1), 1, std::max<int64_t>(seqlen / 256, 1));
  const int64_t count = tuned(key, rule);
  return std::max<int64_t>((seqlen + count - 1) / count + unit - 1, unit) / unit * unit;
}

}  // namespace seqlib

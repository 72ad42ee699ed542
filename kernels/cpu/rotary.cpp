// Rotary positions of a few tokens: what torch does in a dozen calls, most of them longer than the work.
#include <torch/headeronly/util/BFloat16.h>

#include <cmath>

#include "seqlib.h"

namespace seqlib {
namespace {

template <class T>
void rotate(const T* x, T* y, int64_t nheads, int64_t headdim, const std::vector<float>& cos, const std::vector<float>& sin,
            bool interleaved) {
  const int64_t half = static_cast<int64_t>(cos.size()), to_next = interleaved ? 1 : half, step = interleaved ? 2 : 1;
  for (int64_t h = 0; h < nheads; ++h, x += headdim, y += headdim) {
    for (int64_t i = 0; i < half; ++i) {
      const float a = static_cast<float>(x[i * step]), b = static_cast<float>(x[i * step + to_next]);
      y[i * step] = static_cast<T>(a * cos[i] - b * sin[i]);
      y[i * step + to_next] = static_cast<T>(b * cos[i] + a * sin[i]);
    }
    for (int64_t i = 2 * half; i < headdim; ++i) y[i] = x[i];
  }
}

// heads (rows..., nheads, headdim), with a position for each row.
std::vector<Tensor> rotary_step(const std::vector<Tensor>& heads, const Tensor& positions, const Tensor& frequencies,
                                bool interleaved) {
  check_f32(frequencies, "frequencies");
  STD_TORCH_CHECK(positions.scalar_type() == Scalar::Long && positions.is_contiguous(), "positions must be int64");
  const int64_t rows = positions.numel(), half = frequencies.numel();
  std::vector<Tensor> dense, turned;
  for (const Tensor& x : heads) {
    check_float(x, "heads");
    STD_TORCH_CHECK(x.dim() >= 3 && x.size(-1) >= 2 * half && x.numel() == rows * x.size(-2) * x.size(-1),
                    "heads must be (", rows, " rows, nheads, at least ", 2 * half, ")");
    dense.push_back(x.is_contiguous() ? x : torch::stable::contiguous(x));
    turned.push_back(empty_as(x));
  }
  std::vector<float> cos(half), sin(half);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < half; ++i) {
      const float angle = static_cast<float>(data<int64_t>(positions)[row]) * data<float>(frequencies)[i];
      cos[i] = std::cos(angle);
      sin[i] = std::sin(angle);
    }
    for (size_t k = 0; k < heads.size(); ++k) {
      const int64_t nheads = dense[k].size(-2), headdim = dense[k].size(-1), at = row * nheads * headdim;
      auto run = [&](auto* x, auto* y) { rotate(x + at, y + at, nheads, headdim, cos, sin, interleaved); };
      using torch::headeronly::BFloat16;
      if (is_bf16(dense[k])) run(data<BFloat16>(dense[k]), data<BFloat16>(turned[k]));
      else run(data<float>(dense[k]), data<float>(turned[k]));
    }
  }
  return turned;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) { m.impl("rotary_step", TORCH_BOX(&seqlib::rotary_step)); }

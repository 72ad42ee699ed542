#include "linear.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "parallel.h"
#include "steps.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace seqlib {
namespace {

// Asks the system to back a weight with 2 MB pages, once per weight. A stream through 4 KB pages spends most of its time
// in page walks: 7 GB/s instead of 30 on a virtual machine. It is advice on memory, not a change of it, so a refusal
// needs no answer.
void prefer_large_pages(const void* p, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t page = 2u << 20;
  constexpr int collapse = 25;  // MADV_COLLAPSE of Linux 6.1: now, for pages that exist already
  if (bytes < page) return;
  static std::mutex guard;
  static std::unordered_map<uintptr_t, size_t> known;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  {
    std::lock_guard<std::mutex> lock(guard);
    size_t& size = known[begin];
    if (size == bytes) return;
    size = bytes;
  }
  const uintptr_t low = begin / page * page, high = (begin + bytes + page - 1) / page * page;
  madvise(reinterpret_cast<void*>(low), high - low, MADV_HUGEPAGE);
  for (uintptr_t at = low; at < high; at += page) madvise(reinterpret_cast<void*>(at), page, collapse);
#else
  (void)p, (void)bytes;
#endif
}

}  // namespace

// Outputs of all maps side by side.
Tensor linears(const Tensor& x, const std::vector<Tensor>& weights, const std::vector<OptTensor>& biases) {
  check_float(x, "x");
  STD_TORCH_CHECK(weights.size() == biases.size(), "every weight needs its bias, or none in its place");
  // Asking costs less than a call that has nothing to do.
  auto dense = [](const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); };
  const Tensor xs = dense(is_bf16(x) ? torch::stable::to(x, Scalar::Float) : x);
  const int64_t d_in = xs.size(-1), rows = xs.numel() / d_in;
  std::vector<Tensor> held;  // what the arguments point into
  std::vector<LinearArgs> maps;
  int64_t d_out = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor w = dense(weights[i]);
    check_float(w, "weight");
    STD_TORCH_CHECK(w.dim() == 2 && w.size(1) == d_in, "weight must be (d_out, ", d_in, ")");
    prefer_large_pages(w.data_ptr(), w.numel() * w.element_size());
    held.push_back(w);
    const float* bias = nullptr;
    if (biases[i]) {
      held.push_back(torch::stable::contiguous(torch::stable::to(*biases[i], Scalar::Float)));
      STD_TORCH_CHECK(held.back().numel() == w.size(0), "bias must be (", w.size(0), ",)");
      bias = data<float>(held.back());
    }
    maps.push_back({data<float>(xs), w.data_ptr(), bias, nullptr, rows, d_in, w.size(0), 0, is_bf16(w)});
    d_out += w.size(0);
  }
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = d_out;
  Tensor y = empty_f32(x, shape);
  float* at = data<float>(y);
  for (LinearArgs& a : maps) {
    a.y = at;
    a.y_stride = d_out;
    at += a.d_out;
  }
  const int64_t grain = std::max<int64_t>(16, 262144 / d_in);  // 1 MB: less is done before a thread wakes up
  parallel(d_out, grain, [&](int64_t begin, int64_t end) {
    for (const LinearArgs& a : maps) {
      if (begin < a.d_out && end > 0) linear_fwd_for()(a, std::max<int64_t>(begin, 0), std::min(end, a.d_out));
      begin -= a.d_out;
      end -= a.d_out;
    }
  });
  return is_bf16(x) ? torch::stable::to(y, Scalar::BFloat16) : y;
}

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) { return linears(x, {weight}, {bias}); }

}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("linear", TORCH_BOX(&seqlib::linear));
  m.impl("linears", TORCH_BOX(&seqlib::linears));
}

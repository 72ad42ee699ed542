#include "linear.h"

#include <algorithm>
#include <mutex>
#include <unordered_map>

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

Tensor linear(const Tensor& x, const Tensor& weight, const OptTensor& bias) {
  check_float(x, "x");
  check_float(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2 && x.size(-1) == weight.size(1), "weight must be (d_out, ", x.size(-1), ")");
  // Asking costs less than a call that has nothing to do.
  auto dense = [](const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); };
  const Tensor xs = dense(is_bf16(x) ? torch::stable::to(x, Scalar::Float) : x), w = dense(weight);
  const OptTensor b = bias ? OptTensor(torch::stable::contiguous(torch::stable::to(*bias, Scalar::Float))) : std::nullopt;
  prefer_large_pages(w.data_ptr(), w.numel() * w.element_size());
  LinearArgs a{};
  a.d_out = w.size(0);
  a.d_in = w.size(1);
  a.rows = xs.numel() / a.d_in;
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = a.d_out;
  Tensor y = empty_f32(x, shape);
  a.x = data<float>(xs);
  a.weight = w.data_ptr();
  a.bias = data<float>(b);
  a.y = data<float>(y);
  a.bf16 = is_bf16(w);
  const int64_t grain = std::max<int64_t>(16, 262144 / a.d_in);  // 1 MB: less is done before a thread wakes up
  torch::stable::parallel_for(0, a.d_out, grain, [&](int64_t begin, int64_t end) { linear_fwd_for()(a, begin, end); });
  return is_bf16(x) ? torch::stable::to(y, Scalar::BFloat16) : y;
}

}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) { m.impl("linear", TORCH_BOX(&seqlib::linear)); }

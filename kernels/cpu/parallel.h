// Work over threads in tickets: whoever is free takes the next one. A thread that waits for its core, because other
// programs run too, then holds up the ticket in its hands and not a share of everything.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <torch/csrc/stable/ops.h>

namespace seqlib {

constexpr int64_t tickets_per_thread = 4;
constexpr int64_t ticket_step = 16;  // tickets of fine work begin at multiples of it, so that vectors are complete

// Calls f(begin, end) until [0, count) is done, each with at least `grain` of it but the last. Less than two grains are
// done by the caller: to wake a thread costs more. What f writes may not depend on where tickets begin and end.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  const int64_t most = (count + grain - 1) / grain;
  const int64_t threads = most > 1 ? std::min<int64_t>(torch::stable::get_num_threads(), most) : 1;
  if (threads <= 1) return f(0, count);
  int64_t size = std::max(grain, (count + tickets_per_thread * threads - 1) / (tickets_per_thread * threads));
  if (grain >= ticket_step) size = (size + ticket_step - 1) / ticket_step * ticket_step;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(size, std::memory_order_relaxed)) < count;)
      f(begin, std::min(begin + size, count));
  });
}

}  // namespace seqlib

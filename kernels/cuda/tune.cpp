// Launch plans by name, so that benchmarks can try others and tests can force each of them.
#include <map>
#include <mutex>

#include "binding.h"

namespace seqlib {

void set_emulation_order(bool backwards);  // of device.cu

namespace {

std::mutex guard;
std::map<std::string, int64_t> values;

// Sets a number of the launch plans, 0 for the rule, and returns what it was.
//   selective_scan.lanes      lanes of a channel: 2, 4, 8 or 16 (d_state 9 to 16)
//   selective_scan.segments, selective_scan_bwd.segments, linear_scan.segments   parts of the sequence
//   emulation.backwards       1: the emulation runs blocks, warps and lanes in the opposite order
int64_t cuda_tune(std::string key, int64_t value) {
  const std::lock_guard<std::mutex> lock(guard);
  const int64_t before = values[key];
  values[key] = value;
  if (key == "emulation.backwards") set_emulation_order(value != 0);
  return before;
}

}  // namespace

int64_t tuned(const std::string& key, int64_t rule) {
  const std::lock_guard<std::mutex> lock(guard);
  const auto found = values.find(key);
  return found != values.end() && found->second ? found->second : rule;
}

}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(SEQLIB_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_tune", TORCH_BOX(&seqlib::cuda_tune));
}

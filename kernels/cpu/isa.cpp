#include "isa.h"

#include <atomic>
#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

namespace seqlib {
namespace {

Isa best() {
#if defined(__x86_64__) || defined(_M_X64)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return __builtin_cpu_supports("avx512bf16") ? Isa::avx512bf16 : Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::portable;
}

std::atomic<Isa> chosen{best()};
constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512bf16"};

// Returns the instruction set in use; given a name, switches to it first. The tests use it to run every variant.
std::string set_isa(std::optional<std::string> name) {
  if (name) {
    int wanted = -1;
    for (int i = 0; i < 4; ++i)
      if (*name == names[i]) wanted = i;
    STD_TORCH_CHECK(wanted >= 0, "unknown instruction set ", *name, "; known: portable, avx2, avx512, avx512bf16");
    STD_TORCH_CHECK(wanted <= static_cast<int>(best()), "this machine has no ", *name, "; its best is ",
                    names[static_cast<int>(best())]);
    chosen = static_cast<Isa>(wanted);
  }
  return names[static_cast<int>(chosen.load())];
}

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&seqlib::set_isa)); }

#include "isa.h"

#include <atomic>
#include <optional>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "linear_attention.h"
#include "norm.h"

namespace seqlib {
namespace {

constexpr const char* names[] = {"portable", "avx2", "avx512", "avx512bf16"};

bool supported(Isa set) {
#if defined(__x86_64__) || defined(_M_X64)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (set == Isa::avx512bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
  if (set == Isa::avx512) return avx512;
  if (set == Isa::avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return set == Isa::portable;
}

// Whether this library was built with the loops of a set: one kernel stands for all.
bool compiled(Isa set) {
#if defined(__x86_64__) || defined(_M_X64)
  if (set == Isa::avx512bf16) return avx512bf16::linear_attention_fwd && avx512::rms_norm_fwd;
  if (set == Isa::avx512) return avx512::rms_norm_fwd;
  if (set == Isa::avx2) return avx2::rms_norm_fwd;
#endif
  return set == Isa::portable && portable::rms_norm_fwd;
}

// seqlib/native.py takes no library without the set that is best here.
Isa best() {
  for (int i = 3; i > 0; --i)
    if (supported(static_cast<Isa>(i)) && compiled(static_cast<Isa>(i))) return static_cast<Isa>(i);
  return Isa::portable;
}

std::atomic<Isa> chosen{best()};

// Returns the instruction set in use; given a name, switches to it first. The tests use it to run every variant.
std::string set_isa(std::optional<std::string> name) {
  if (name) {
    int wanted = -1;
    for (int i = 0; i < 4; ++i)
      if (*name == names[i]) wanted = i;
    STD_TORCH_CHECK(wanted >= 0, "unknown instruction set ", *name, "; known: portable, avx2, avx512, avx512bf16");
    const Isa set = static_cast<Isa>(wanted);
    STD_TORCH_CHECK(supported(set), "this machine has no ", *name, "; its best is ", names[static_cast<int>(best())]);
    STD_TORCH_CHECK(compiled(set), "the library was built without ", *name,
                    "; run `python -m seqlib.native build`, or set SEQLIB_ISA=all");
    chosen = set;
  }
  return names[static_cast<int>(chosen.load())];
}

}  // namespace

Isa isa() { return chosen.load(std::memory_order_relaxed); }

}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&seqlib::set_isa)); }

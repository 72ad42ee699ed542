// The same loops are compiled for several instruction sets; this picks the set at run time.
#pragma once

namespace seqlib {

enum class Isa { portable, avx2, avx512, avx512bf16 };

Isa isa();

}  // namespace seqlib

// Declares `void name(const Args&, int64_t begin, int64_t end)` in the namespace of each instruction set, and a
// function name##_for() that returns the one of this machine. Few kernels have a form of their own in avx512bf16; the
// others run their avx512 form there. Weak: a library holds the sets that it was built for, the others have no address.
#define SEQLIB_WEAK __attribute__((weak))
#if defined(__x86_64__) || defined(_M_X64)
#define SEQLIB_KERNEL(name, Args)                                                                  \
  namespace avx512 { SEQLIB_WEAK void name(const Args&, int64_t, int64_t); }                       \
  namespace avx2 { SEQLIB_WEAK void name(const Args&, int64_t, int64_t); }                         \
  namespace portable { SEQLIB_WEAK void name(const Args&, int64_t, int64_t); }                     \
  inline auto name##_for() {                                                                       \
    return isa() >= Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : portable::name; \
  }
#else
#define SEQLIB_KERNEL(name, Args)                                              \
  namespace portable { SEQLIB_WEAK void name(const Args&, int64_t, int64_t); } \
  inline auto name##_for() { return portable::name; }
#endif

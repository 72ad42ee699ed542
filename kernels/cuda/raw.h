// Elements as they lie in memory: asked for by the dozen, and looked at only when they are there.
#pragma once

#include "device.h"

namespace seqlib {
namespace {

template <class T>
SEQLIB_DEVICE float half_of_word(uint32_t word, int upper);
template <>
SEQLIB_DEVICE float half_of_word<bf16>(uint32_t word, int upper) {
  return bits_float(upper ? word & 0xffff0000u : word << 16);
}
template <>
SEQLIB_DEVICE float half_of_word<f16>(uint32_t word, int upper) {
  return f16_to_float(static_cast<uint16_t>(upper ? word >> 16 : word));
}

template <class T, int V>
struct Raw {
  static constexpr int words = V * sizeof(T) < 4 ? 1 : V * sizeof(T) / 4;
  uint32_t word[words];

  SEQLIB_DEVICE float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return bits_float(word[i]);
    else return half_of_word<T>(word[i / 2], i % 2);
  }
};

// p[0 .. V-1] in one access, of memory aligned to it; zeros unless `wanted`.
template <int V, class T>
SEQLIB_DEVICE Raw<T, V> fetch(const T* p, bool wanted) {
  using Words = Pack<uint32_t, Raw<T, V>::words>;
  Raw<T, V> raw{};
  if constexpr (V * sizeof(T) < 4) {
    if (wanted) raw.word[0] = reinterpret_cast<const uint16_t*>(p)[0];
  } else if (wanted) {
    const Words words = *reinterpret_cast<const Words*>(p);
    SEQLIB_UNROLL
    for (int i = 0; i < Raw<T, V>::words; ++i) raw.word[i] = words.v[i];
  }
  return raw;
}

}  // namespace
}  // namespace seqlib

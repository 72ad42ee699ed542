// A vector of floats as wide as the instruction set being compiled, and the few functions that plain C lacks.
// Only kernel files include this; they are compiled once per instruction set with SEQLIB_ISA naming its namespace, and
// everything here has internal linkage so that no wide instruction leaks into code for a narrower machine.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace seqlib::SEQLIB_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vh __attribute__((vector_size(2 * W)));

struct bf16 {
  uint16_t bits;
};

inline vf splat(float x) { return x - vf{}; }

template <class T>
inline vf load(const T* p) {
  if constexpr (sizeof(T) == 4) {
    vf v;
    std::memcpy(&v, p, sizeof v);
    return v;
  } else {
    vh h;
    std::memcpy(&h, p, sizeof h);
#if defined(__AVX512F__)
    return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(h)), 16));
#else
    return reinterpret_cast<vf>(__builtin_convertvector(h, vu) << 16);
#endif
  }
}

// Round to nearest even; NaN stays NaN.
inline vh to_bf16(vf v) {
  vu u = reinterpret_cast<vu>(v);
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu quiet = (u >> 16) | 0x40u;
  vu kept = v == v ? rounded : quiet;
#if defined(__AVX512F__)
  return reinterpret_cast<vh>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(kept)));
#else
  return __builtin_convertvector(kept, vh);
#endif
}

template <class T>
inline void store(T* p, vf v) {
  if constexpr (sizeof(T) == 4) {
    std::memcpy(p, &v, sizeof v);
  } else {
    vh h = to_bf16(v);
    std::memcpy(p, &h, sizeof h);
  }
}

// The first n lanes, n < W; the others read as zero and are not written.
template <class T>
inline vf load_n(const T* p, int n) {
#if defined(__AVX512F__)
  const auto first = static_cast<__mmask16>((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) return _mm512_maskz_loadu_ps(first, p);
  else return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, p)), 16));
#else
  T lanes[W] = {};
  std::memcpy(lanes, p, n * sizeof(T));
  return load(lanes);
#endif
}

template <class T>
inline void store_n(T* p, vf v, int n) {
#if defined(__AVX512F__)
  const auto first = static_cast<__mmask16>((1u << n) - 1u);
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, first, v);
  else _mm256_mask_storeu_epi16(p, first, reinterpret_cast<__m256i>(to_bf16(v)));
#else
  T lanes[W];
  store(lanes, v);
  std::memcpy(p, lanes, n * sizeof(T));
#endif
}

inline float sum(vf v) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += v[i];
  return s;
}

// Sums of neighbouring runs of H lanes, those of a and of b in turn: H = 1 gives a0+a1, b0+b1, a2+a3, b2+b3, ...
template <int H, size_t... I>
inline vf add_runs(vf a, vf b, std::index_sequence<I...>) {
  const vf low = __builtin_shufflevector(a, b, (I % (2 * H) < H ? I : I - H + W)...);
  const vf high = __builtin_shufflevector(a, b, (I % (2 * H) < H ? I + H : I + W)...);
  return low + high;
}

// Lane i is the sum over the lanes of v[i].
template <int H = 1>
inline vf lane_sums(const vf (&v)[W / H]) {
  if constexpr (H == W) {
    return v[0];
  } else {
    vf next[W / (2 * H)];
    for (int i = 0; i < W / (2 * H); ++i)
      next[i] = add_runs<H>(v[2 * i], v[2 * i + 1], std::make_index_sequence<W>());
    return lane_sums<2 * H>(next);
  }
}

// One instruction where there is one; compilers make a comparison and a blend of the conditional.
#if defined(__AVX512F__)
inline vf min(vf a, vf b) { return _mm512_min_ps(a, b); }
inline vf max(vf a, vf b) { return _mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline vf min(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf max(vf a, vf b) { return _mm256_max_ps(a, b); }
#else
inline vf min(vf a, vf b) { return a < b ? a : b; }
inline vf max(vf a, vf b) { return a > b ? a : b; }
#endif

// 2^t, 2 ulp. Minimax polynomial of degree 5 on [-1/2, 1/2]. Without avx512's scalef the ends are clamped: at -127 the
// result is exactly 0, at 128 infinite, and NaN passes, being what min and max return of a pair with NaN second.
// Positive = false leaves out what only t > 128 needs.
template <bool Positive = true>
inline vf exp2(vf t) {
#if defined(__AVX512F__)
  vf n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  t = max(splat(-127.0f), t);
  if constexpr (Positive) t = min(splat(128.0f), t);
  vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
#if defined(__AVX2__)
  asm("" : "+x"(magic));  // one register: compilers turn a difference of constants into a sum with another constant
#endif
  vf shifted = t + magic;
  vf n = shifted - magic;
#endif
  vf r = t - n;
  vf p = r * 0.001326472731307149f + 0.009671512991189957f;
  p = p * r + 0.05550733581185341f;
  p = p * r + 0.24022242426872253f;
  p = p * r + 0.6931470036506653f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, n);
#else
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
#endif
}

constexpr float log2e = 1.4426950408889634f;
constexpr float ln2 = 0.6931471805599453f;

inline vf exp(vf x) { return exp2(x * log2e); }
inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }
inline vf silu(vf x) { return x / (1.0f + exp(-x)); }

// d silu / dx, given s = sigmoid(x).
inline vf silu_grad(vf x, vf s) { return s * (1.0f + x * (1.0f - s)); }

// max(x, 0) + log1p(exp(-|x|)); log1p(e) = 2 atanh(e / (2 + e)), odd polynomial of degree 9.
inline vf softplus(vf x) {
  vf e = exp(x < 0.0f ? x : -x);
  vf s = e / (2.0f + e);
  vf z = s * s;
  vf p = z * 0.1408916711807251f + 0.13980300724506378f;
  p = p * z + 0.20012454688549042f;
  p = p * z + 0.3333315849304199f;
  p = p * z + 1.0f;
  return max(x, splat(0.0f)) + 2.0f * s * p;
}

// Decaying states become denormal, which is slow on many CPUs; results below 1e-38 are zero inside kernels.
class FlushDenormals {
#if defined(__x86_64__) || defined(_M_X64)
  unsigned saved = _mm_getcsr();

 public:
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#else
 public:
  FlushDenormals() {}
#endif
};

}  // namespace
}  // namespace seqlib::SEQLIB_ISA

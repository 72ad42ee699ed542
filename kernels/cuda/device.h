// What kernels are written in: one vocabulary for the device and for its emulation on the host (emulate.h). Kernel files
// see no torch header, so that they compile quickly and for any torch.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef SEQLIB_EMULATED
#include "emulate.h"
#define SEQLIB_DEVICE inline
#define SEQLIB_GLOBAL(threads, blocks_per_sm) void
#define SEQLIB_UNROLL
#define SEQLIB_UNROLL_BY(count)
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define SEQLIB_DEVICE __device__ __forceinline__
#define SEQLIB_GLOBAL(threads, blocks_per_sm) __global__ void __launch_bounds__(threads, blocks_per_sm)
#define SEQLIB_UNROLL _Pragma("unroll")
#define SEQLIB_PRAGMA(words) _Pragma(#words)
#define SEQLIB_UNROLL_BY(count) SEQLIB_PRAGMA(unroll count)
#endif

#include "view.h"

namespace seqlib {
namespace {  // every file has its own, so that inlining needs no linker

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

#ifdef SEQLIB_EMULATED

SEQLIB_DEVICE int64_t block_index() { return emulation::machine().block; }
SEQLIB_DEVICE int64_t block_count() { return emulation::machine().blocks; }
SEQLIB_DEVICE int thread_index() { return emulation::machine().thread; }
SEQLIB_DEVICE void sync_block() { emulation::machine().wait(emulation::Wait::block); }
SEQLIB_DEVICE void sync_warp() { emulation::machine().wait(emulation::Wait::warp); }
template <class T>
SEQLIB_DEVICE T shuffle_xor(T v, int mask) {
  return emulation::machine().exchange(v, (thread_index() % 32) ^ mask);
}
template <class T>
SEQLIB_DEVICE T shuffle_up(T v, int distance) {
  const int lane = thread_index() % 32;
  return emulation::machine().exchange(v, lane < distance ? lane : lane - distance);
}
SEQLIB_DEVICE uint32_t ballot(bool set) {
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(shuffle_xor<int>(set, lane)) << ((thread_index() % 32) ^ lane);
  return bits;
}
template <class T>
SEQLIB_DEVICE T* shared_memory() {
  return reinterpret_cast<T*>(emulation::machine().shared);
}
SEQLIB_DEVICE float exp2_fast(float x) { return exp2f(x); }
SEQLIB_DEVICE float exp_fast(float x) { return expf(x); }
SEQLIB_DEVICE float divide_fast(float a, float b) { return a / b; }
SEQLIB_DEVICE float inverse_fast(float x) { return 1.0f / x; }
SEQLIB_DEVICE void sincos_half_turns(float x, float& sin, float& cos) {
  sin = static_cast<float>(std::sin(M_PI * x));
  cos = static_cast<float>(std::cos(M_PI * x));
}
SEQLIB_DEVICE float f16_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
  const float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
                     : exponent     ? ldexpf(static_cast<float>(1024 + mantissa), exponent - 25)
                                    : ldexpf(static_cast<float>(mantissa), -24);
  return bits >> 15 ? -size : size;
}
SEQLIB_DEVICE uint16_t float_to_f16(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = fabsf(x);
  if (size != size) return 0x7e00;
  if (size == 0.0f) return sign;
  if (size >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(size, &exponent);  // size in [2^(exponent-1), 2^exponent)
  exponent = exponent < -13 ? -13 : exponent;
  const auto steps = static_cast<int>(nearbyintf(ldexpf(size, 11 - exponent)));  // carries into the exponent by itself
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + steps);
}
SEQLIB_DEVICE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
SEQLIB_DEVICE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
SEQLIB_DEVICE uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  return static_cast<uint16_t>(x == x ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fc0u);
}

#else

SEQLIB_DEVICE int64_t block_index() { return blockIdx.x; }
SEQLIB_DEVICE int64_t block_count() { return gridDim.x; }
SEQLIB_DEVICE int thread_index() { return threadIdx.x; }
SEQLIB_DEVICE void sync_block() { __syncthreads(); }
SEQLIB_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
SEQLIB_DEVICE T shuffle_xor(T v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
template <class T>
SEQLIB_DEVICE T shuffle_up(T v, int distance) {
  return __shfl_up_sync(0xffffffffu, v, distance);
}
SEQLIB_DEVICE uint32_t ballot(bool set) { return __ballot_sync(0xffffffffu, set); }
template <class T>
SEQLIB_DEVICE T* shared_memory() {
  extern __shared__ float4 seqlib_shared[];
  return reinterpret_cast<T*>(seqlib_shared);
}
SEQLIB_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEQLIB_DEVICE float exp_fast(float x) { return __expf(x); }
SEQLIB_DEVICE float divide_fast(float a, float b) { return __fdividef(a, b); }
SEQLIB_DEVICE float inverse_fast(float x) {  // of infinity: 0
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
SEQLIB_DEVICE void sincos_half_turns(float x, float& sin, float& cos) { sincospif(x, &sin, &cos); }
SEQLIB_DEVICE float f16_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
SEQLIB_DEVICE uint16_t float_to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }
SEQLIB_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
SEQLIB_DEVICE uint16_t float_to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
SEQLIB_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }

#endif

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

SEQLIB_DEVICE float to_float(float x) { return x; }
SEQLIB_DEVICE float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
SEQLIB_DEVICE float to_float(f16 x) { return f16_to_float(x.bits); }
template <class T>
SEQLIB_DEVICE T from_float(float x);
template <>
SEQLIB_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
SEQLIB_DEVICE bf16 from_float<bf16>(float x) {
  return {float_to_bf16(x)};
}
template <>
SEQLIB_DEVICE f16 from_float<f16>(float x) {
  return {float_to_f16(x)};
}

constexpr SEQLIB_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// V neighbouring elements in one access of at most 16 bytes each.
template <class T, int V>
struct alignas(sizeof(T) * V > 16 ? 16 : sizeof(T) * V) Pack {
  T v[V];
};

template <int V, class T>
SEQLIB_DEVICE bool packed(const T* p, int valid) {
  return valid >= V && reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, V>) == 0;
}

// v = p[0 .. V-1], zero from `valid` on.
template <int V, class T>
SEQLIB_DEVICE void load(const T* p, int valid, float (&v)[V]) {
  if (packed<V>(p, valid)) {
    const auto pack = *reinterpret_cast<const Pack<T, V>*>(p);
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) v[i] = to_float(pack.v[i]);
  } else {
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) v[i] = i < valid ? to_float(p[i]) : 0.0f;
  }
}

template <int V, class T>
SEQLIB_DEVICE void store(T* p, int valid, const float (&v)[V]) {
  if (packed<V>(p, valid)) {
    Pack<T, V> pack;
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) pack.v[i] = from_float<T>(v[i]);
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
  } else {
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) {
      if (i < valid) p[i] = from_float<T>(v[i]);
    }
  }
}

// V floats where one access is known to do, such as in a tile in shared memory.
template <int V>
SEQLIB_DEVICE void load_tile(const float* p, float (&v)[V]) {
  const auto pack = *reinterpret_cast<const Pack<float, V>*>(p);
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) v[i] = pack.v[i];
}

template <int V>
SEQLIB_DEVICE void store_tile(float* p, const float (&v)[V]) {
  Pack<float, V> pack;
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) pack.v[i] = v[i];
  *reinterpret_cast<Pack<float, V>*>(p) = pack;
}

// The bits of V elements. What is fetched one after another is under way together; unpacking waits for it.
template <int V>
struct Bits {
  uint32_t word[V];
};

// How they may be fetched: in one access, of elements of 4 or 2 bytes, or one by one.
enum class Access { four, two, single };
template <Access how_>
struct As {
  static constexpr Access how = how_;
};

// Calls f(As<how>{}), the same for all threads.
template <class F>
SEQLIB_DEVICE void with_access(bool whole, Dtype dtype, F&& f) {
  if (!whole) f(As<Access::single>{});
  else if (dtype == Dtype::f32) f(As<Access::four>{});
  else f(As<Access::two>{});
}

// Whether all vectors of V elements that begin at multiples of V along the last axis may be fetched in one access.
template <int V>
SEQLIB_DEVICE bool in_vectors(const View& v) {
  const int64_t size = v.dtype == Dtype::f32 ? 4 : 2, steps = v.batch | v.row | v.group;
  return ((static_cast<int64_t>(reinterpret_cast<uintptr_t>(v.data)) | steps * size) & (V * size - 1)) == 0;
}

template <Access how, int V>
SEQLIB_DEVICE Bits<V> fetch(const void* data, Dtype dtype, int64_t at, int valid) {
  Bits<V> bits = {};
  if (valid > 0) {
    if constexpr (how == Access::single) {
      SEQLIB_UNROLL
      for (int i = 0; i < V; ++i) {
        if (i < valid) {
          if (dtype == Dtype::f32) bits.word[i] = static_cast<const uint32_t*>(data)[at + i];
          else bits.word[i / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(data)[at + i]) << 16 * (i % 2);
        }
      }
    } else {
      constexpr int words = how == Access::four ? V : V / 2;
      using Whole = Pack<uint32_t, words>;
      const auto* from = static_cast<const char*>(data) + at * (how == Access::four ? 4 : 2);
      const Whole pack = *reinterpret_cast<const Whole*>(from);
      SEQLIB_UNROLL
      for (int i = 0; i < words; ++i) bits.word[i] = pack.v[i];
    }
  }
  return bits;
}

SEQLIB_DEVICE uint32_t bf16_pair(float low, float high) {
#ifdef SEQLIB_EMULATED
  return float_to_bf16(low) | static_cast<uint32_t>(float_to_bf16(high)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// Writes v as `fetch` reads it.
template <Access how, int V>
SEQLIB_DEVICE void put(void* data, Dtype dtype, int64_t at, int valid, const float (&v)[V]) {
  if (valid <= 0) return;
  if constexpr (how == Access::single) {
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) {
      if (i >= valid) break;
      if (dtype == Dtype::f32) static_cast<float*>(data)[at + i] = v[i];
      else static_cast<uint16_t*>(data)[at + i] = dtype == Dtype::bf16 ? float_to_bf16(v[i]) : float_to_f16(v[i]);
    }
  } else {
    constexpr int words = how == Access::four ? V : V / 2;
    Pack<uint32_t, words> pack;
    SEQLIB_UNROLL
    for (int i = 0; i < words; ++i) {
      if constexpr (how == Access::four) pack.v[i] = float_bits(v[i]);
      else if (dtype == Dtype::bf16) pack.v[i] = bf16_pair(v[2 * i], v[2 * i + 1]);
      else pack.v[i] = float_to_f16(v[2 * i]) | static_cast<uint32_t>(float_to_f16(v[2 * i + 1])) << 16;
    }
    *reinterpret_cast<Pack<uint32_t, words>*>(static_cast<char*>(data) + at * (how == Access::four ? 4 : 2)) = pack;
  }
}

template <int V>
SEQLIB_DEVICE void unpack(const Bits<V>& bits, Dtype dtype, float (&v)[V]) {
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) {
    const uint32_t pair = bits.word[i / 2];
    if (dtype == Dtype::f32) v[i] = bits_float(bits.word[i]);
    else if (dtype == Dtype::bf16) v[i] = bits_float(i % 2 ? pair & 0xffff0000u : pair << 16);
    else v[i] = f16_to_float(static_cast<uint16_t>(i % 2 ? pair >> 16 : pair & 0xffffu));
  }
}

// The same for a tensor whose dtype is known when it runs: the choice is one for all threads.
template <int V>
SEQLIB_DEVICE void load(const void* data, Dtype dtype, int64_t at, int valid, float (&v)[V]) {
  switch (dtype) {
    case Dtype::f32: return load<V>(static_cast<const float*>(data) + at, valid, v);
    case Dtype::bf16: return load<V>(static_cast<const bf16*>(data) + at, valid, v);
    default: return load<V>(static_cast<const f16*>(data) + at, valid, v);
  }
}

template <int V>
SEQLIB_DEVICE void store(void* data, Dtype dtype, int64_t at, int valid, const float (&v)[V]) {
  switch (dtype) {
    case Dtype::f32: return store<V>(static_cast<float*>(data) + at, valid, v);
    case Dtype::bf16: return store<V>(static_cast<bf16*>(data) + at, valid, v);
    default: return store<V>(static_cast<f16*>(data) + at, valid, v);
  }
}

SEQLIB_DEVICE float load_one(const void* data, Dtype dtype, int64_t at) {
  float v[1];
  load<1>(data, dtype, at, 1, v);
  return v[0];
}

SEQLIB_DEVICE void store_one(void* data, Dtype dtype, int64_t at, float value) {
  const float v[1] = {value};
  store<1>(data, dtype, at, 1, v);
}

// A rate for exp2. Minus infinity would make NaN of a step of no size, and -1e30 forgets as well.
SEQLIB_DEVICE float base_two(float rate) {
  const float x = kLog2e * rate;
  return x < -1e30f ? -1e30f : x;
}
SEQLIB_DEVICE float sigmoid(float x) { return inverse_fast(1.0f + exp2_fast(-kLog2e * x)); }
SEQLIB_DEVICE float silu(float x) { return x * sigmoid(x); }
// max(x, 0) + log(1 + e), e = exp(-|x|), by the series of 2 atanh(e / (2 + e)), whose terms fall by a factor of nine.
SEQLIB_DEVICE float softplus(float x) {
  const float e = exp_fast(-fabsf(x)), s = divide_fast(e, 2.0f + e), s2 = s * s;
  float series = 1.0f / 13.0f;
  SEQLIB_UNROLL
  for (int k = 11; k > 0; k -= 2) series = series * s2 + 1.0f / static_cast<float>(k);
  return fmaxf(x, 0.0f) + 2.0f * s * series;
}

// Sums every v[i] over the `Lanes` lanes whose numbers differ in the bits Stride, 2 Stride, ... Lanes / 2 * Stride, half of
// the values moving at each step. A lane keeps Count / Lanes sums: those of the elements
// [place * Count / Lanes, (place + 1) * Count / Lanes), place = lane / Stride % Lanes, at v[0 ..].
template <int Lanes, int Stride, int Count>
SEQLIB_DEVICE void transposed_sum(float* v) {
  static_assert(Count % Lanes == 0);
  if constexpr (Lanes > 1) {
    const bool upper = thread_index() & (Lanes / 2 * Stride);
    SEQLIB_UNROLL
    for (int i = 0; i < Count / 2; ++i) {
      const float kept = upper ? v[i + Count / 2] : v[i], given = upper ? v[i] : v[i + Count / 2];
      v[i] = kept + shuffle_xor(given, Lanes / 2 * Stride);
    }
    transposed_sum<Lanes / 2, Stride, Count / 2>(v);
  }
}

// The sum over the lanes that differ in those bits, in all of them.
template <int Lanes, int Stride>
SEQLIB_DEVICE float lane_sum(float v) {
  SEQLIB_UNROLL
  for (int step = Lanes / 2; step > 0; step /= 2) v += shuffle_xor(v, step * Stride);
  return v;
}

}  // namespace
}  // namespace seqlib

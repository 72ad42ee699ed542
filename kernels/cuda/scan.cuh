// Affine maps h -> a h + b of real or complex numbers, and their composition along the warps of a block.
#pragma once

#include "device.h"

namespace seqlib {
namespace {

struct Real {
  float re;
  static SEQLIB_DEVICE Real zero() { return {0.0f}; }
  static SEQLIB_DEVICE Real one() { return {1.0f}; }
};
struct Complex {
  float re, im;
  static SEQLIB_DEVICE Complex zero() { return {0.0f, 0.0f}; }
  static SEQLIB_DEVICE Complex one() { return {1.0f, 0.0f}; }
};

SEQLIB_DEVICE Real operator*(Real x, Real y) { return {x.re * y.re}; }
SEQLIB_DEVICE Real operator+(Real x, Real y) { return {x.re + y.re}; }
SEQLIB_DEVICE Real conj(Real x) { return x; }
SEQLIB_DEVICE Complex operator*(Complex x, Complex y) { return {x.re * y.re - x.im * y.im, x.re * y.im + x.im * y.re}; }
SEQLIB_DEVICE Complex operator+(Complex x, Complex y) { return {x.re + y.re, x.im + y.im}; }
SEQLIB_DEVICE Complex conj(Complex x) { return {x.re, -x.im}; }

// One number of a tensor. Complex ones are pairs of float32.
template <class N>
SEQLIB_DEVICE N load_number(const void* data, Dtype dtype, int64_t at) {
  if constexpr (sizeof(N) == sizeof(Real)) return {load_one(data, dtype, at)};
  else return static_cast<const N*>(data)[at];
}
template <class N>
SEQLIB_DEVICE void store_number(void* data, Dtype dtype, int64_t at, N value) {
  if constexpr (sizeof(N) == sizeof(Real)) store_one(data, dtype, at, value.re);
  else static_cast<N*>(data)[at] = value;
}

template <class N>
struct Affine {
  N a, b;
  static SEQLIB_DEVICE Affine identity() { return {N::one(), N::zero()}; }
  // This map, and then the next one. Associative.
  SEQLIB_DEVICE Affine then(Affine next) const { return {next.a * a, next.a * b + next.b}; }
  SEQLIB_DEVICE N operator()(N h) const { return a * h + b; }
};

template <class N>
struct Composed {
  Affine<N> before, all;
};

// Lane by lane, the composition of the maps of the warps before this one, and of all `Warps`. `room` is shared memory for
// 32 maps of each warp; the caller has it free again after its next barrier.
template <int Warps, class N>
SEQLIB_DEVICE Composed<N> compose_warps(Affine<N> mine, Affine<N>* room) {
  const int warp = thread_index() / 32, lane = thread_index() % 32;
  room[thread_index()] = mine;
  sync_block();
  Composed<N> made{Affine<N>::identity(), Affine<N>::identity()};
  SEQLIB_UNROLL
  for (int w = 0; w < Warps; ++w) {
    if (w == warp) made.before = made.all;
    made.all = made.all.then(room[w * 32 + lane]);
  }
  return made;
}

}  // namespace
}  // namespace seqlib

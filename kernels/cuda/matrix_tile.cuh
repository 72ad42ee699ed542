// One token of a matrix state (d_state, headdim), float32: a block holds 32 columns, eight lanes with four columns each in
// 16 slices of rows, and takes 128 rows at a time. A tile is asked for as a whole before any of it is used.
#pragma once

#include "device.h"

namespace seqlib {
namespace {

constexpr int V = 4, kLanes = 8, kSlices = 16, kThreads = kLanes * kSlices, kWarps = kThreads / 32, kColumns = kLanes * V;
constexpr int kSteps = 8, kTile = kSteps * kSlices;  // rows of a tile: kSteps of every slice

// One element, asked for as the word that it lies in: two loads of which one happens, one after another into the same
// register, would wait for each other.
struct Word {
  uint32_t bits;
  Dtype dtype;
  bool upper;

  SEQLIB_DEVICE operator float() const {
    float v[1];
    unpack(Bits<1>{upper ? bits >> 16 : bits}, dtype, v);
    return v[0];
  }
};

// t: what has `data` and `dtype`.
template <class T>
SEQLIB_DEVICE Word fetch_one(const T& t, int64_t at, int valid = 1) {
  const auto* place = static_cast<const char*>(t.data) + at * (t.dtype == Dtype::f32 ? 4 : 2);
  const auto beyond = static_cast<int>(reinterpret_cast<uintptr_t>(place) % 4);
  return {valid > 0 ? *reinterpret_cast<const uint32_t*>(place - beyond) : 0, t.dtype, beyond != 0};
}

struct Tile {
  float v[kSteps][V];

  // Rows slice, slice + kSlices, ... from `first` on, of those that are there; `state` begins at this lane's columns.
  SEQLIB_DEVICE void ask(const float* state, int headdim, int first, int d_state, int valid) {
    const int slice = thread_index() / kLanes;
    if (headdim % V == 0) {
      SEQLIB_UNROLL
      for (int j = 0; j < kSteps; ++j) {
        const int n = first + j * kSlices + slice;
        Pack<float, V> raw{};
        if (n < d_state && valid > 0) raw = *reinterpret_cast<const Pack<float, V>*>(state + static_cast<int64_t>(n) * headdim);
        SEQLIB_UNROLL
        for (int i = 0; i < V; ++i) v[j][i] = raw.v[i];
      }
    } else {
      SEQLIB_UNROLL
      for (int j = 0; j < kSteps; ++j) {
        const int n = first + j * kSlices + slice;
        SEQLIB_UNROLL
        for (int i = 0; i < V; ++i) v[j][i] = n < d_state && i < valid ? state[static_cast<int64_t>(n) * headdim + i] : 0.0f;
      }
    }
  }

  SEQLIB_DEVICE void keep(float* state, int headdim, int first, int d_state, int valid) const {
    SEQLIB_UNROLL
    for (int j = 0; j < kSteps; ++j) {
      const int n = first + j * kSlices + thread_index() / kLanes;
      if (n < d_state) store<V>(state + static_cast<int64_t>(n) * headdim, valid, v[j]);
    }
  }
};

// v summed over all slices, in every thread. `room` is free again after the next barrier.
SEQLIB_DEVICE void sum_slices(float (&v)[V], float (*room)[kColumns]) {
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) v[i] = lane_sum<32 / kLanes, kLanes>(v[i]);
  const int lane = thread_index() % kLanes;
  if (thread_index() % 32 < kLanes) store<V>(&room[thread_index() / 32][lane * V], V, v);
  sync_block();
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) {
    v[i] = 0.0f;
    SEQLIB_UNROLL
    for (int w = 0; w < kWarps; ++w) v[i] += room[w][lane * V + i];
  }
}

}  // namespace
}  // namespace seqlib

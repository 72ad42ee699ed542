// What the forward and the backward kernel of the selective scan share. Kernel files only, like vec.h.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "selective_scan.h"
#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int T = kScanTile;
constexpr int N = 16;  // states whose B, or C, of one step stand side by side

template <class E>
inline vf get(const E* p, int lanes) {
  return lanes == W ? load(p) : load_n(p, lanes);
}

template <class E>
inline void put(E* p, vf v, int lanes) {
  lanes == W ? store(p, v) : store_n(p, v, lanes);
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

inline Floats allocate(int64_t count) {
  return Floats(static_cast<float*>(std::aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64)));
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class E>
inline void copy_states(const E* from, int64_t stride, int steps, int64_t n, int rows, float* to) {
  for (int t = 0; t < steps; ++t)
    for (int64_t i = 0; i < n; i += W)
      store(to + (i / N * rows + t) * N + i % N, get(from + t * stride + i, static_cast<int>(std::min<int64_t>(n - i, W))));
}

// B or C of one group over a tile, as floats [d_state / N][rows][N], d_state rounded up.
inline void copy_states(const ScanInput& from, int64_t row, int64_t group, const ScanTile& tile, int64_t n, float* to,
                        int rows = T) {
  const int64_t offset = row * from.batch + tile.begin * from.row + group * from.group;
  if (from.bf16)
    copy_states(static_cast<const bf16*>(from.data) + offset, from.row, tile.length, n, rows, to);
  else
    copy_states(static_cast<const float*>(from.data) + offset, from.row, tile.length, n, rows, to);
}

// Columns of lines that the next block will touch, one line per step. They are asked for one step at a time, two columns
// with every pair of states: in bursts they would wait for each other.
class Ahead {
 public:
  struct Two {
    const char *a, *b;
    int64_t a_stride, b_stride;
    void fetch() {
      __builtin_prefetch(a);
      __builtin_prefetch(b);
      a += a_stride;
      b += b_stride;
    }
  };

  void add(const void* first, int64_t stride, int64_t bytes) {
    for (int64_t i = 0; i < bytes && count_ < kMost; i += 64)
      columns_[count_++] = {static_cast<const char*>(first) + i, stride};
  }
  Two pair(int64_t i) const {
    const Column a = 2 * i < count_ ? columns_[2 * i] : idle(), b = 2 * i + 1 < count_ ? columns_[2 * i + 1] : idle();
    return {a.first, b.first, a.stride, b.stride};
  }

 private:
  struct Column {
    const char* first;
    int64_t stride;
  };
  static constexpr int kMost = 32;
  Column idle() const { return {reinterpret_cast<const char*>(this), 0}; }
  Column columns_[kMost];
  int count_ = 0;
};

}  // namespace
}  // namespace seqlib::SEQLIB_ISA

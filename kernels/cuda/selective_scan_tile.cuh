// What the passes of the selective scan share: which block works on what, and the tile of inputs in shared memory.
#pragma once

#include "device.h"
#include "selective_scan.h"

namespace seqlib {
namespace {

constexpr int kScanThreads = 128, kScanVector = 4;

// One block: a row, a segment of it and channels of one group.
struct ScanTask {
  int64_t row, segment, group, first, begin, end;  // first channel; positions
  int channels;

  SEQLIB_DEVICE ScanTask(const ScanArgs& a, int width) {
    const int64_t per_group = a.d_inner / a.groups, parts = (per_group + width - 1) / width;
    int64_t rest = block_index();
    const int64_t part = rest % parts;
    rest /= parts;
    group = rest % a.groups;
    rest /= a.groups;
    segment = rest % a.segments;
    row = rest / a.segments;
    first = group * per_group + part * width;
    channels = static_cast<int>(per_group - part * width < width ? per_group - part * width : width);
    begin = segment * a.segment;
    end = begin + a.segment < a.seqlen ? begin + a.segment : a.seqlen;
  }
};

// Bits of up to 32 positions from t on: real tokens, and those that begin a document.
struct Marks {
  uint32_t real, fresh;

  SEQLIB_DEVICE Marks(const ScanArgs& a, int64_t row, int64_t t, int steps) {
    const int lane = thread_index() % 32;
    const bool inside = lane < steps && t + lane < a.seqlen;
    int32_t link = 0;
    if (inside && a.links) link = a.links[row * (a.seqlen + 1) + t + lane];
    real = ballot(inside && link != link_pad);
    fresh = ballot(inside && link == link_fresh);
  }
};

SEQLIB_DEVICE int64_t at(const View& v, int64_t row, int64_t t, int64_t channel) {
  return row * v.batch + t * v.row + channel;
}

// Vectors of four elements in a tile of rows, as they are spread over the threads of a block.
template <int Width, int Steps>
struct Spread {
  static constexpr int per_row = Width / kScanVector, all = Steps * per_row, each = (all + kScanThreads - 1) / kScanThreads;
  using Fetched = Bits<kScanVector>[each];

  // Calls f(number, step, first element) for those of this thread.
  template <class F>
  static SEQLIB_DEVICE void each_vector(F&& f) {
    SEQLIB_UNROLL
    for (int j = 0; j < each; ++j) {
      const int i = thread_index() + j * kScanThreads;
      if (all % kScanThreads == 0 || i < all) f(j, i / per_row, i % per_row * kScanVector);
    }
  }

  // Rows of a tensor from `from` on, of which `rows` are inside the sequence and have `valid` elements.
  template <Access how>
  static SEQLIB_DEVICE void fetch(Fetched& to, const View& v, int64_t from, int64_t rows, int64_t valid) {
    each_vector([&](int j, int step, int i) {
      to[j] = seqlib::fetch<how, kScanVector>(v.data, v.dtype, from + step * v.row + i, step < rows ? static_cast<int>(valid - i) : 0);
    });
  }
};

// Which tensors of a call can be read by vectors.
struct Whole {
  bool tokens, B, C;

  SEQLIB_DEVICE Whole(const ScanArgs& a, const ScanTask& task)
      : tokens((task.first | task.channels) % kScanVector == 0 && in_vectors<kScanVector>(a.x) &&
               in_vectors<kScanVector>(a.dt) && in_vectors<kScanVector>(a.z)),
        B(a.d_state % kScanVector == 0 && in_vectors<kScanVector>(a.B)),
        C(a.d_state % kScanVector == 0 && in_vectors<kScanVector>(a.C)) {}
};

// delta of four channels at a real token.
SEQLIB_DEVICE void unpack_delta(const ScanArgs& a, const Bits<kScanVector>& bits, int64_t channel, int valid, float (&delta)[kScanVector]) {
  unpack(bits, a.dt.dtype, delta);
  SEQLIB_UNROLL
  for (int i = 0; i < kScanVector; ++i) {
    if (a.dt_bias) delta[i] += i < valid ? a.dt_bias[channel + i] : 0.0f;
    if (a.softplus) delta[i] = softplus(delta[i]);
  }
}

// Rows of B or C of a tile.
template <int N, int Steps>
struct Rows {
  using Place = Spread<N, Steps>;
  typename Place::Fetched bits;

  SEQLIB_DEVICE void fetch(const ScanArgs& a, const View& v, const ScanTask& task, int64_t t, bool whole) {
    with_access(whole, v.dtype, [&](auto as) {
      const int64_t from = task.row * v.batch + t * v.row + task.group * v.group;
      Place::template fetch<decltype(as)::how>(bits, v, from, a.seqlen - t, a.d_state);
    });
  }
  // As float32, zero beyond d_state and where there is no token.
  SEQLIB_DEVICE void settle(Dtype dtype, uint32_t real, float* to) const {
    Place::each_vector([&](int j, int step, int n) {
      float v[kScanVector] = {};
      if (real >> step & 1) unpack(bits[j], dtype, v);
      store_tile(to + step * N + n, v);
    });
  }
};

// The S states of a lane in a tensor (..., d_inner, d_state) of float32.
template <int S>
SEQLIB_DEVICE void load_states(const float* from, int64_t d_state, int n, float (&v)[S]) {
  const int64_t valid = d_state - n;
  load<S>(from + n, static_cast<int>(valid < 0 ? 0 : valid), v);
}
template <int S>
SEQLIB_DEVICE void store_states(float* to, int64_t d_state, int n, const float (&v)[S]) {
  const int64_t valid = d_state - n;
  store<S>(to + n, static_cast<int>(valid < 0 ? 0 : valid), v);
}

// The state after a segment from the one before: entries hold what the segment adds, and then the state that enters it.
struct CombineArgs {
  const ScanArgs of;
  const float* before;  // (batch, d_inner, d_state) or null
  bool reverse;
};

SEQLIB_GLOBAL(kScanThreads, 1) scan_combine(const CombineArgs c) {
  const ScanArgs& a = c.of;
  const int64_t width = a.d_inner * a.d_state, i = block_index() * kScanThreads + thread_index();
  if (i < a.batch * width) {
    const int64_t row = i / width, place = i % width;
    const float A = base_two(a.A[place]);
    float state = c.before ? c.before[i] : 0.0f;
    for (int64_t k = 0; k < a.segments; ++k) {
      const int64_t s = row * a.segments + (c.reverse ? a.segments - 1 - k : k);
      const float added = a.entries[s * width + place], sum = a.sums[s * a.d_inner + place / a.d_state];
      a.entries[s * width + place] = state;
      state = (sum == INFINITY ? 0.0f : exp2_fast(A * sum)) * state + added;
    }
  }
}

}  // namespace
}  // namespace seqlib

// What the passes of the short convolution share: a warp walks 32 positions of 128 channels with its window in registers.
#pragma once

#include "causal_conv1d.h"
#include "device.h"

namespace seqlib {
namespace {

constexpr int kConvThreads = 128, kConvWarps = kConvThreads / 32, V = 4;  // neighbouring channels of a lane
constexpr int kSteps = conv_positions / kConvWarps;

// A warp: a row, positions [begin, end) and the channels of this lane.
struct Walk {
  int64_t row, block, begin, end, channel;
  int valid;

  template <class Args>
  SEQLIB_DEVICE explicit Walk(const Args& a) {
    const int64_t across = (a.d + conv_channels - 1) / conv_channels, along = (a.seqlen + conv_positions - 1) / conv_positions;
    channel = block_index() % across * conv_channels + thread_index() % 32 * V;
    block = block_index() / across;
    row = block / along;
    begin = block % along * conv_positions + thread_index() / 32 * kSteps;
    end = begin + kSteps < a.seqlen ? begin + kSteps : a.seqlen;
    const int64_t left = a.d - channel;
    valid = left < 0 ? 0 : left < V ? static_cast<int>(left) : V;
  }
};

SEQLIB_DEVICE int32_t before(const ConvArgs& a, int64_t row, int64_t t) {
  return a.links ? a.links[row * (a.seqlen + 1) + t] : static_cast<int32_t>(t) - 1;
}
// The first real token of a walk, or its end; the end of the row for walks beyond it.
SEQLIB_DEVICE int64_t first_real(const ConvArgs& a, const Walk& w) {
  int64_t t = w.begin < a.seqlen ? w.begin : a.seqlen;
  while (t < w.end && before(a, w.row, t) == link_pad) ++t;
  return t;
}
SEQLIB_DEVICE int64_t at(const View& v, const Walk& w, int64_t t) { return w.row * v.batch + t * v.row + w.channel; }

SEQLIB_DEVICE void clear(float (&v)[V]) {
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) v[i] = 0.0f;
}

template <int W>
SEQLIB_DEVICE void shift(float (&window)[W][V], const float (&newest)[V]) {
  SEQLIB_UNROLL
  for (int k = 0; k + 1 < W; ++k) {
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) window[k][i] = window[k + 1][i];
  }
  SEQLIB_UNROLL
  for (int i = 0; i < V; ++i) window[W - 1][i] = newest[i];
}

// Slot of the initial state as a place in a window, beside positions and the links that name no place.
constexpr int32_t kNowhere = link_pad, kSlots = -16;

// The places of the W inputs before the real token t, or before the end of the row, oldest first.
template <int W>
SEQLIB_DEVICE void places_before(const ConvArgs& a, int64_t row, int64_t t, int32_t (&place)[W]) {
  int32_t link = before(a, row, t);
  int slot = a.width - 2;
  SEQLIB_UNROLL
  for (int k = W - 1; k >= 0; --k) {
    place[k] = link >= 0 ? link : link == link_none && slot >= 0 ? kSlots - slot : kNowhere;
    if (link >= 0) link = before(a, row, link);
    else --slot;
  }
}

template <Access how>
SEQLIB_DEVICE Bits<V> fetch_place(const ConvArgs& a, const Walk& w, int32_t place) {
  const bool in_state = place <= kSlots && a.state;
  const int64_t from = in_state ? (w.row * (a.width - 1) + (kSlots - place)) * a.d + w.channel : at(a.x, w, place);
  return fetch<how, V>(in_state ? a.state : a.x.data, a.x.dtype, from, in_state || place >= 0 ? w.valid : 0);
}

// The inputs before a token: all on their way before the first is looked at.
template <Access how, int W>
SEQLIB_DEVICE void load_places(const ConvArgs& a, const Walk& w, const int32_t (&place)[W], float (&past)[W][V]) {
  Bits<V> bits[W];
  SEQLIB_UNROLL
  for (int k = 0; k < W; ++k) bits[k] = fetch_place<how>(a, w, place[k]);
  SEQLIB_UNROLL
  for (int k = 0; k < W; ++k) unpack(bits[k], a.x.dtype, past[k]);
}

SEQLIB_DEVICE bool whole(const ConvArgs& a) {
  const int64_t size = a.x.dtype == Dtype::f32 ? 4 : 2;
  const auto state = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.state));
  return a.d % V == 0 && in_vectors<V>(a.x) && in_vectors<V>(a.dy) && state % (V * size) == 0;
}

// Taps with zeros in front where the kernel is narrower than W.
template <int W, class Args>
SEQLIB_DEVICE void load_taps(const Args& a, const Walk& w, float (&tap)[W][V], float (&bias)[V]) {
  SEQLIB_UNROLL
  for (int k = 0; k < W; ++k) {
    clear(tap[k]);
    if (k >= W - a.width) load<V>(a.weight + (k - (W - a.width)) * a.d + w.channel, w.valid, tap[k]);
  }
  clear(bias);
  if (a.bias) load<V>(a.bias + w.channel, w.valid, bias);
}

// bias + sum of taps times the window, the newest input apart. Inputs that no tap reaches may be infinite; there are some
// where W is not the width.
template <int W>
SEQLIB_DEVICE float sum_taps(const float (&tap)[W][V], const float (&past)[W - 1][V], float newest, float bias, int i, int width) {
  float sum = bias + tap[W - 1][i] * newest;
  SEQLIB_UNROLL
  for (int k = 0; k + 1 < W; ++k) sum += W < conv_max_width || k >= W - width ? tap[k][i] * past[k][i] : 0.0f;
  return sum;
}

inline int64_t conv_blocks(const ConvArgs& a) {
  return a.batch * ((a.seqlen + conv_positions - 1) / conv_positions) * ((a.d + conv_channels - 1) / conv_channels);
}

}  // namespace
}  // namespace seqlib

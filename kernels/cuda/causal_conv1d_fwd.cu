// The short convolution forward, without shared memory, and its step for one token.
#include "causal_conv1d_tile.cuh"
#include "launch.h"

namespace seqlib {
namespace {

template <int W, Access how>
SEQLIB_DEVICE void walk_forward(const ConvArgs& a, const Walk& w) {
  constexpr int batch = 8;  // inputs on their way together
  float tap[W][V], bias[V], past[W - 1][V];
  int32_t place[W - 1];
  places_before(a, w.row, first_real(a, w), place);
  load_taps<W>(a, w, tap, bias);
  load_places<how>(a, w, place, past);
  Bits<V> next[batch];
  const auto fetch_from = [&](int64_t first) {
    SEQLIB_UNROLL
    for (int j = 0; j < batch; ++j)
      next[j] = fetch<how, V>(a.x.data, a.x.dtype, at(a.x, w, first + j), first + j < w.end ? w.valid : 0);
  };
  fetch_from(w.begin);
  for (int64_t first = w.begin; first < w.end; first += batch) {
    float x[batch][V];
    SEQLIB_UNROLL
    for (int j = 0; j < batch; ++j) unpack(next[j], a.x.dtype, x[j]);
    fetch_from(first + batch);
    const auto write = [&](int j, const float(&y)[V]) {
      const int64_t t = first + j;
      put<how>(a.y, a.x.dtype, (w.row * a.seqlen + t) * a.d + w.channel, t < w.end ? w.valid : 0, y);
    };
    const auto take = [&](int j, float(&y)[V]) {
      SEQLIB_UNROLL
      for (int i = 0; i < V; ++i) y[i] = sum_taps<W>(tap, past, x[j][i], bias[i], i, a.width);
      if (a.silu) {
        SEQLIB_UNROLL
        for (int i = 0; i < V; ++i) y[i] = silu(y[i]);
      }
      shift(past, x[j]);
    };
    if (!a.links && first + batch <= w.end) {  // nothing to ask of any token
      float y[batch][V];
      SEQLIB_UNROLL
      for (int j = 0; j < batch; ++j) take(j, y[j]);
      SEQLIB_UNROLL
      for (int j = 0; j < batch; ++j) write(j, y[j]);
      continue;
    }
    int32_t link[batch];
    SEQLIB_UNROLL
    for (int j = 0; j < batch; ++j) link[j] = first + j < w.end ? before(a, w.row, first + j) : link_pad;
    SEQLIB_UNROLL
    for (int j = 0; j < batch; ++j) {
      float y[V] = {};
      if (link[j] != link_pad) {
        if (link[j] == link_fresh) {
          SEQLIB_UNROLL
          for (int k = 0; k + 1 < W; ++k) clear(past[k]);
        }
        take(j, y);
      }
      write(j, y);
    }
  }
  if (w.begin < a.seqlen && w.end == a.seqlen) {
    places_before(a, w.row, a.seqlen, place);
    load_places<how>(a, w, place, past);
    SEQLIB_UNROLL
    for (int k = 0; k + 1 < W; ++k) {
      const int slot = k - (W - a.width);
      if (slot >= 0) store<V>(a.final, a.x.dtype, (w.row * (a.width - 1) + slot) * a.d + w.channel, w.valid, past[k]);
    }
  }
}

template <int W>
SEQLIB_GLOBAL(kConvThreads, W <= 4 ? 3 : 2) conv_forward(const ConvArgs a) {
  const Walk w(a);
  with_access(whole(a), a.x.dtype, [&](auto as) { walk_forward<W, decltype(as)::how>(a, w); });
}

template <int W>
SEQLIB_GLOBAL(kConvThreads, 4) conv_step(const ConvStepArgs a) {
  const int64_t across = (a.d + V - 1) / V, i = block_index() * kConvThreads + thread_index();
  const int64_t row = i / across, channel = i % across * V;
  const int valid = row < a.batch ? static_cast<int>(a.d - channel < V ? a.d - channel : V) : 0;
  if (valid) {
    float x[V], y[V], v[V];
    load<V>(a.x.data, a.x.dtype, row * a.x.batch + channel, valid, x);
    clear(y);
    if (a.bias.data) load<V>(a.bias.data, a.bias.dtype, channel, valid, y);
    SEQLIB_UNROLL
    for (int k = 0; k < W; ++k) {
      if (k < a.width) {
        const int64_t to = (row * (a.width - 1) + k) * a.d + channel;
        SEQLIB_UNROLL
        for (int j = 0; j < V; ++j) v[j] = x[j];
        if (k + 1 < a.width) load<V>(a.state, a.x.dtype, to, valid, v);
        if (k > 0) store<V>(a.state, a.x.dtype, to - a.d, valid, v);
        SEQLIB_UNROLL
        for (int j = 0; j < V; ++j) {
          if (j < valid) y[j] += load_one(a.weight.data, a.weight.dtype, (channel + j) * a.width + k) * v[j];
        }
      }
    }
    SEQLIB_UNROLL
    for (int j = 0; j < V; ++j) y[j] = a.silu ? silu(y[j]) : y[j];
    store<V>(a.y, a.x.dtype, row * a.d + channel, valid, y);
  }
}

template <int W>
void forward(const ConvArgs& a, int64_t blocks, Stream stream) {
  launch(conv_forward<W>, blocks, kConvThreads, 0, stream, a);
}

}  // namespace

void start_causal_conv1d_fwd(const ConvArgs& a, Stream stream) {
  switch (a.width) {
    case 3: return forward<3>(a, conv_blocks(a), stream);
    case 4: return forward<4>(a, conv_blocks(a), stream);
    default: return forward<conv_max_width>(a, conv_blocks(a), stream);
  }
}

void start_causal_conv1d_step(const ConvStepArgs& a, Stream stream) {
  const int64_t vectors = a.batch * ((a.d + V - 1) / V);
  launch(conv_step<conv_max_width>, (vectors + kConvThreads - 1) / kConvThreads, kConvThreads, 0, stream, a);
}

}  // namespace seqlib

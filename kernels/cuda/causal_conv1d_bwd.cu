// The short convolution backward: the gradients of the inputs in the window wait in registers until the last output that
// they reach is done, which for the end of the walk takes width - 1 further tokens of the document.
#include "causal_conv1d_tile.cuh"
#include "launch.h"

namespace seqlib {
namespace {

SEQLIB_DEVICE int32_t after(const ConvArgs& a, int64_t row, int64_t t) {
  if (a.links) return a.links[(a.batch + row) * (a.seqlen + 1) + t];
  return t + 1 < a.seqlen ? static_cast<int32_t>(t) + 1 : link_none;
}

template <int W, Access how>
struct Gradient {
  float tap[W][V], bias[V], past[W - 1][V], waiting[W - 1][V], dtap[W + 1][V];
  int32_t place[W - 1];  // of the inputs whose gradients wait; kNowhere if another warp writes them

  SEQLIB_DEVICE void release(const ConvArgs& a, const Walk& w, int32_t to, const float (&v)[V]) {
    put<how>(a.dx, a.x.dtype, (w.row * a.seqlen + to) * a.d + w.channel, to >= 0 ? w.valid : 0, v);
    if (to <= kSlots && a.dstate)
      store<V>(a.dstate, a.x.dtype, (w.row * (a.width - 1) + (kSlots - to)) * a.d + w.channel, w.valid, v);
  }

  SEQLIB_DEVICE void release_all(const ConvArgs& a, const Walk& w) {
    SEQLIB_UNROLL
    for (int k = 0; k + 1 < W; ++k) {
      release(a, w, place[k], waiting[k]);
      clear(past[k]);
      clear(waiting[k]);
      place[k] = kNowhere;
    }
  }

  SEQLIB_DEVICE void begin(const ConvArgs& a, const Walk& w, int64_t t) {
    places_before(a, w.row, t, place);
    load_places<how>(a, w, place, past);
    SEQLIB_UNROLL
    for (int k = 0; k + 1 < W; ++k) {
      clear(waiting[k]);
      // Inputs before this walk are another warp's, and the initial state is of the one with the row's first token.
      if (place[k] >= 0 || before(a, w.row, t) != link_none) place[k] = kNowhere;
    }
  }

  // One real token; `own` is false beyond the end of the walk, where only gradients of earlier inputs are completed.
  SEQLIB_DEVICE void step(const ConvArgs& a, const Walk& w, int64_t t, const float (&x)[V], const float (&dy)[V], bool own) {
    float newest[V];
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) {
      const float sum = sum_taps<W>(tap, past, x[i], bias[i], i, a.width);
      const float gate = sigmoid(sum), slope = sum < -80.0f ? 0.0f : gate * (1.0f + sum * (1.0f - gate));
      const float d = a.silu ? dy[i] * slope : dy[i];
      SEQLIB_UNROLL
      for (int k = 0; k + 1 < W; ++k) {
        waiting[k][i] += tap[k][i] * d;
        dtap[k][i] += own && (W < conv_max_width || k >= W - a.width) ? past[k][i] * d : 0.0f;
      }
      dtap[W - 1][i] += own ? x[i] * d : 0.0f;
      dtap[W][i] += own ? d : 0.0f;
      newest[i] = tap[W - 1][i] * d;
    }
    release(a, w, place[0], waiting[0]);
    shift(past, x);
    shift(waiting, newest);
    SEQLIB_UNROLL
    for (int k = 0; k + 2 < W; ++k) place[k] = place[k + 1];
    place[W - 2] = own ? static_cast<int32_t>(t) : kNowhere;
  }
};

template <int W, Access how>
SEQLIB_DEVICE void walk_backward(const ConvArgs& a, const Walk& w, float (&dtap)[W + 1][V]) {
  constexpr int batch = W <= 4 ? 4 : 2;  // inputs and gradients on their way together
  Gradient<W, how> g;
  load_taps<W>(a, w, g.tap, g.bias);
  SEQLIB_UNROLL
  for (int k = 0; k <= W; ++k) clear(g.dtap[k]);
  Bits<V> next_x[batch], next_dy[batch];
  const auto fetch_from = [&](int64_t first) {
    SEQLIB_UNROLL
    for (int j = 0; j < batch; ++j) {
      const int valid = first + j < w.end ? w.valid : 0;
      next_x[j] = fetch<how, V>(a.x.data, a.x.dtype, at(a.x, w, first + j), valid);
      next_dy[j] = fetch<how, V>(a.dy.data, a.dy.dtype, at(a.dy, w, first + j), valid);
    }
  };
  fetch_from(w.begin);
  int64_t last = first_real(a, w);
  if (last < w.end) g.begin(a, w, last);
  for (int64_t first = w.begin; first < w.end; first += batch) {
    float x[batch][V], dy[batch][V];
    int32_t link[batch];
    SEQLIB_UNROLL
    for (int j = 0; j < batch; ++j) link[j] = first + j < w.end ? before(a, w.row, first + j) : link_pad;
    SEQLIB_UNROLL
    for (int j = 0; j < batch; ++j) {
      unpack(next_x[j], a.x.dtype, x[j]);
      unpack(next_dy[j], a.dy.dtype, dy[j]);
    }
    fetch_from(first + batch);
    SEQLIB_UNROLL
    for (int j = 0; j < batch; ++j) {
      const int64_t t = first + j;
      if (link[j] != link_pad) {
        if (link[j] == link_fresh) g.release_all(a, w);
        g.step(a, w, t, x[j], dy[j], true);
        last = t;
      } else if (t < w.end) {
        const float zero[V] = {};
        put<how>(a.dx, a.x.dtype, (w.row * a.seqlen + t) * a.d + w.channel, w.valid, zero);
      }
    }
  }
  if (last < w.end) {
    int32_t t = after(a, w.row, last);
    for (int k = 1; k < a.width && t >= 0; ++k) {
      float x[V], dy[V];
      const Bits<V> x_bits = fetch<how, V>(a.x.data, a.x.dtype, at(a.x, w, t), w.valid);
      const Bits<V> dy_bits = fetch<how, V>(a.dy.data, a.dy.dtype, at(a.dy, w, t), w.valid);
      unpack(x_bits, a.x.dtype, x);
      unpack(dy_bits, a.dy.dtype, dy);
      g.step(a, w, t, x, dy, false);
      t = after(a, w.row, t);
    }
    g.release_all(a, w);
  }
  SEQLIB_UNROLL
  for (int k = 0; k <= W; ++k) {
    SEQLIB_UNROLL
    for (int i = 0; i < V; ++i) dtap[k][i] = g.dtap[k][i];
  }
}

template <int W>
SEQLIB_GLOBAL(kConvThreads, W <= 4 ? 3 : 2) conv_backward(const ConvArgs a) {
  const Walk w(a);
  float dtap[W + 1][V];
  with_access(whole(a), a.x.dtype, [&](auto as) { walk_backward<W, decltype(as)::how>(a, w, dtap); });
  auto sums = shared_memory<float[W + 1][conv_channels]>();  // of each warp
  SEQLIB_UNROLL
  for (int k = 0; k <= W; ++k) store<V>(&sums[thread_index() / 32][k][thread_index() % 32 * V], V, dtap[k]);
  sync_block();
  const int64_t channel = w.channel - thread_index() % 32 * V + thread_index();
  SEQLIB_UNROLL
  for (int k = 0; k <= W; ++k) {
    const int row = k - (W - a.width);
    float sum = 0.0f;
    SEQLIB_UNROLL
    for (int warp = 0; warp < kConvWarps; ++warp) sum += sums[warp][k][thread_index()];
    if (row >= 0 && channel < a.d) a.partial[(w.block * (a.width + 1) + row) * a.d + channel] = sum;
  }
}

// Adds the gradient of the final state to the inputs that it holds; one thread for four channels of a row.
template <int W>
SEQLIB_GLOBAL(32, 1) conv_backward_final(const ConvArgs a) {
  const int64_t across = (a.d + conv_channels - 1) / conv_channels;
  Walk w(a);
  w.row = block_index() / across;
  int32_t place[W - 1];
  places_before(a, w.row, a.seqlen, place);
  SEQLIB_UNROLL
  for (int k = 0; k + 1 < W; ++k) {
    const int slot = k - (W - a.width);
    if (slot >= 0 && (place[k] >= 0 || (place[k] <= kSlots && a.dstate))) {
      void* to = place[k] >= 0 ? a.dx : a.dstate;
      const int64_t row = place[k] >= 0 ? w.row * a.seqlen + place[k] : w.row * (a.width - 1) + (kSlots - place[k]);
      float d[V], v[V];
      load<V>(a.dfinal, a.x.dtype, (w.row * (a.width - 1) + slot) * a.d + w.channel, w.valid, d);
      load<V>(to, a.x.dtype, row * a.d + w.channel, w.valid, v);
      SEQLIB_UNROLL
      for (int i = 0; i < V; ++i) v[i] += d[i];
      store<V>(to, a.x.dtype, row * a.d + w.channel, w.valid, v);
    }
  }
}

template <int W>
void backward(const ConvArgs& a, int64_t blocks, Stream stream) {
  launch(conv_backward<W>, blocks, kConvThreads, sizeof(float[kConvWarps][W + 1][conv_channels]), stream, a);
  const int64_t across = (a.d + conv_channels - 1) / conv_channels;
  if (a.dfinal && a.width > 1) launch(conv_backward_final<W>, a.batch * across, 32, 0, stream, a);
}

}  // namespace

void start_causal_conv1d_bwd(const ConvArgs& a, Stream stream) {
  switch (a.width) {
    case 3: return backward<3>(a, conv_blocks(a), stream);
    case 4: return backward<4>(a, conv_blocks(a), stream);
    default: return backward<conv_max_width>(a, conv_blocks(a), stream);
  }
}

}  // namespace seqlib

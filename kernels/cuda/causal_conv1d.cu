// The short convolution: a warp walks 32 positions of 128 channels with its window in registers; no shared memory forward.
//
// Backward it walks the same way: the gradients of the inputs in the window wait in registers until the last output that
// they reach is done, which for the end of the walk takes width - 1 further tokens of the document.
#include "causal_conv1d.h"

#include "launch.h"

namespace seqlib {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, V = 4;  // neighbouring channels of a lane
constexpr int kSteps = conv_positions / kWarps;

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
SEQLIB_DEVICE int32_t after(const ConvArgs& a, int64_t row, int64_t t) {
  if (a.links) return a.links[(a.batch + row) * (a.seqlen + 1) + t];
  return t + 1 < a.seqlen ? static_cast<int32_t>(t) + 1 : link_none;
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
SEQLIB_GLOBAL(kThreads, W <= 4 ? 3 : 2) conv_forward(const ConvArgs a) {
  const Walk w(a);
  with_access(whole(a), a.x.dtype, [&](auto as) { walk_forward<W, decltype(as)::how>(a, w); });
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
SEQLIB_GLOBAL(kThreads, W <= 4 ? 3 : 2) conv_backward(const ConvArgs a) {
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
    for (int warp = 0; warp < kWarps; ++warp) sum += sums[warp][k][thread_index()];
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
SEQLIB_GLOBAL(kThreads, 4) conv_step(const ConvStepArgs a) {
  const int64_t across = (a.d + V - 1) / V, i = block_index() * kThreads + thread_index();
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
  launch(conv_forward<W>, blocks, kThreads, 0, stream, a);
}

template <int W>
void backward(const ConvArgs& a, int64_t blocks, Stream stream) {
  launch(conv_backward<W>, blocks, kThreads, sizeof(float[kWarps][W + 1][conv_channels]), stream, a);
  const int64_t across = (a.d + conv_channels - 1) / conv_channels;
  if (a.dfinal && a.width > 1) launch(conv_backward_final<W>, a.batch * across, 32, 0, stream, a);
}

int64_t blocks(const ConvArgs& a) {
  return a.batch * ((a.seqlen + conv_positions - 1) / conv_positions) * ((a.d + conv_channels - 1) / conv_channels);
}

}  // namespace

void start_causal_conv1d_fwd(const ConvArgs& a, Stream stream) {
  switch (a.width) {
    case 3: return forward<3>(a, blocks(a), stream);
    case 4: return forward<4>(a, blocks(a), stream);
    default: return forward<conv_max_width>(a, blocks(a), stream);
  }
}

void start_causal_conv1d_bwd(const ConvArgs& a, Stream stream) {
  switch (a.width) {
    case 3: return backward<3>(a, blocks(a), stream);
    case 4: return backward<4>(a, blocks(a), stream);
    default: return backward<conv_max_width>(a, blocks(a), stream);
  }
}

void start_causal_conv1d_step(const ConvStepArgs& a, Stream stream) {
  const int64_t vectors = a.batch * ((a.d + V - 1) / V);
  launch(conv_step<conv_max_width>, (vectors + kThreads - 1) / kThreads, kThreads, 0, stream, a);
}

}  // namespace seqlib

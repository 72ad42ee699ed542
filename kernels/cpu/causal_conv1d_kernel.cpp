// Short causal convolution. A task walks its channels in time with the window of inputs in registers; time is cut into
// tiles so that the cache lines of a block stay in L1 while its vectors take turns.
#include "causal_conv1d.h"

#include <algorithm>

#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int64_t tile = 32;

// Lanes: Whole vectors, or an int for the channels that do not fill one. Two types, because the call behind a partial
// load would spill every register of the whole-vector loop.
struct Whole {};

template <class T>
inline vf get(const T* p, Whole) {
  return load(p);
}

template <class T>
inline vf get(const T* p, int lanes) {
  return load_n(p, lanes);
}

template <class T>
inline void put(T* p, vf v, Whole) {
  store(p, v);
}

template <class T>
inline void put(T* p, vf v, int lanes) {
  store_n(p, v, lanes);
}

// Rows of a tile lie far apart, so the hardware does not see the next block coming.
template <class T>
inline void fetch_next_block(const T* p) {
  __builtin_prefetch(p + conv_block);
}

template <class T>
struct Inputs {
  const T *x, *state;
  const int32_t* before;
  int64_t step, d, begin;

  Inputs(const ConvArgs& a, int64_t piece)
      : x(static_cast<const T*>(a.x) + a.pieces[piece].row * a.x_row),
        state(a.state ? static_cast<const T*>(a.state) + a.pieces[piece].row * (a.width - 1) * a.d : nullptr),
        before(a.before + piece * (a.width - 1)),
        step(a.x_step),
        d(a.d),
        begin(a.pieces[piece].begin) {}

  // The input `back` places before the piece's first position.
  template <class Lanes>
  vf earlier(int64_t width, int64_t back, int64_t c, Lanes lanes) const {
    const int32_t at = before[width - 1 - back];
    if (at == conv_zero) return vf{};
    return at >= 0 ? get(x + at * step + c, lanes) : get(state + (conv_state_slot - at) * d + c, lanes);
  }

  // The inputs before position t of the piece, oldest first.
  template <int WIDTH, class Lanes>
  void window(int64_t t, int64_t c, Lanes lanes, vf* past) const {
    for (int k = 0; k < WIDTH - 1; ++k) {
      const int64_t at = t - (WIDTH - 1) + k;
      past[k] = at >= begin ? get(x + at * step + c, lanes) : earlier(WIDTH, begin - at, c, lanes);
    }
  }
};

template <int WIDTH>
struct Taps {
  vf weight[WIDTH], bias;

  template <class Lanes>
  Taps(const ConvArgs& a, int64_t c, Lanes lanes) {
    for (int k = 0; k < WIDTH; ++k) weight[k] = get(a.weight + k * a.d + c, lanes);
    bias = a.bias ? get(a.bias + c, lanes) : vf{};
  }

  vf apply(const vf* past, vf now) const {
    vf sum = bias + weight[WIDTH - 1] * now;
    for (int k = 0; k < WIDTH - 1; ++k) sum += weight[k] * past[k];
    return sum;
  }
};

template <int WIDTH>
inline void shift(vf* past, vf now) {
  for (int k = 0; k + 2 < WIDTH; ++k) past[k] = past[k + 1];
  if constexpr (WIDTH > 1) past[WIDTH - 2] = now;
}

template <class T, int WIDTH, class Lanes>
inline void forward_tile(const ConvArgs& a, const Inputs<T>& in, T* y, int64_t begin, int64_t end, int64_t c,
                         Lanes lanes) {
  const Taps<WIDTH> taps(a, c, lanes);
  vf past[WIDTH];
  in.template window<WIDTH>(begin, c, lanes, past);
  for (int64_t t = begin; t < end; ++t) {
    const T* p = in.x + t * in.step + c;
    fetch_next_block(p);
    const vf now = get(p, lanes);
    const vf pre = taps.apply(past, now);
    put(y + t * a.d + c, a.silu ? silu(pre) : pre, lanes);
    shift<WIDTH>(past, now);
  }
}

// Gradients of one tile. dpre is the gradient of the value before the activation; the last WIDTH - 1 of them wait in
// registers until dx of the oldest input in the window is complete, which takes up to WIDTH - 1 positions after the tile.
template <class T, int WIDTH, class Lanes>
inline void backward_tile(const ConvArgs& a, const Inputs<T>& in, int64_t p, int64_t begin, int64_t end, int64_t c,
                          Lanes lanes, vf* sums) {
  const ConvPiece& piece = a.pieces[p];
  const T* dy = static_cast<const T*>(a.dy) + piece.row * a.dy_row;
  T* dx = static_cast<T*>(a.dx) + piece.row * a.seqlen * a.d;
  T* dstate = nullptr;
  if (WIDTH > 1 && a.dstate && begin == piece.begin && in.before[0] == conv_state_slot)
    dstate = static_cast<T*>(a.dstate) + piece.row * (WIDTH - 1) * a.d;
  const int32_t* after = a.after + p * (WIDTH - 1);

  const Taps<WIDTH> taps(a, c, lanes);
  vf past[WIDTH], grads[WIDTH] = {}, total[WIDTH + 1];
  in.template window<WIDTH>(begin, c, lanes, past);
  for (int k = 0; k <= WIDTH; ++k) total[k] = sums[k];

  auto slope = [&](vf pre, vf grad) { return a.silu ? grad * silu_grad(pre, sigmoid(pre)) : grad; };
  // dpre at t completes the gradient of the oldest input that t sees.
  auto emit = [&](int64_t t, vf dpre) {
    const int64_t oldest = t - (WIDTH - 1);
    T* to = oldest >= begin ? dx + oldest * a.d : dstate ? dstate + (t - begin) * a.d : nullptr;
    if (!to) return;
    vf sum = taps.weight[0] * dpre;
    for (int k = 1; k < WIDTH; ++k) sum += taps.weight[k] * grads[WIDTH - 1 - k];
    put(to + c, sum, lanes);
  };
  for (int64_t t = begin; t < end; ++t) {
    const T *p = in.x + t * in.step + c, *g = dy + t * a.dy_step + c;
    fetch_next_block(p);
    fetch_next_block(g);
    const vf now = get(p, lanes);
    const vf dpre = slope(taps.apply(past, now), get(g, lanes));
    for (int k = 0; k < WIDTH - 1; ++k) total[k] += dpre * past[k];
    total[WIDTH - 1] += dpre * now;
    total[WIDTH] += dpre;
    emit(t, dpre);
    shift<WIDTH>(past, now);
    shift<WIDTH>(grads, dpre);
  }
  for (int64_t j = 0; j < WIDTH - 1; ++j) {
    const int64_t at = end + j < piece.end ? end + j : after[end + j - piece.end];
    vf now = {}, dpre = {};
    if (at >= 0) {
      now = get(in.x + at * in.step + c, lanes);
      dpre = slope(taps.apply(past, now), get(dy + at * a.dy_step + c, lanes));
    }
    emit(end + j, dpre);
    shift<WIDTH>(past, now);
    shift<WIDTH>(grads, dpre);
  }
  for (int k = 0; k <= WIDTH; ++k) sums[k] = total[k];
}

// Calls f(piece, begin, end, c, lanes) for the vectors of a block, tile after tile.
template <class F>
inline void walk(const ConvArgs& a, int64_t task, F&& f) {
  const int64_t blocks = (a.d + conv_block - 1) / conv_block;
  const int64_t part = task / blocks, first = task % blocks * conv_block, last = std::min(a.d, first + conv_block);
  for (int64_t p = a.npieces * part / a.partitions; p < a.npieces * (part + 1) / a.partitions; ++p) {
    for (int64_t t = a.pieces[p].begin; t < a.pieces[p].end; t += tile) {
      const int64_t end = std::min(a.pieces[p].end, t + tile);
      int64_t c = first;
      for (; c + W <= last; c += W) f(p, t, end, c, Whole{});
      if (c < last) f(p, t, end, c, static_cast<int>(last - c));
    }
  }
}

template <class T, int WIDTH>
void forward(const ConvArgs& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task)
    walk(a, task, [&](int64_t p, int64_t from, int64_t to, int64_t c, auto lanes) {
      const Inputs<T> in(a, p);
      T* y = static_cast<T*>(a.y) + a.pieces[p].row * a.seqlen * a.d;
      forward_tile<T, WIDTH>(a, in, y, from, to, c, lanes);
    });
}

template <class T, int WIDTH>
void backward(const ConvArgs& a, int64_t begin, int64_t end) {
  const int64_t blocks = (a.d + conv_block - 1) / conv_block;
  for (int64_t task = begin; task < end; ++task) {
    vf sums[conv_block / W][WIDTH + 1] = {};
    const int64_t first = task % blocks * conv_block;
    walk(a, task, [&](int64_t p, int64_t from, int64_t to, int64_t c, auto lanes) {
      backward_tile<T, WIDTH>(a, Inputs<T>(a, p), p, from, to, c, lanes, sums[(c - first) / W]);
    });
    float* partial = a.partial + task / blocks * (WIDTH + 1) * a.d;
    for (int64_t c = first; c < std::min(a.d, first + conv_block); c += W)
      for (int k = 0; k <= WIDTH; ++k)
        put(partial + k * a.d + c, sums[(c - first) / W][k], static_cast<int>(std::min<int64_t>(W, a.d - c)));
  }
}

template <class T>
void backward_final(const ConvArgs& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t k = 0; k < a.width - 1; ++k) {
      const int32_t at = a.last[row * (a.width - 1) + k];
      if (at == conv_zero || (at < 0 && !a.dstate)) continue;
      const T* from = static_cast<const T*>(a.dfinal) + (row * (a.width - 1) + k) * a.d;
      T* to = at >= 0 ? static_cast<T*>(a.dx) + (row * a.seqlen + at) * a.d
                      : static_cast<T*>(a.dstate) + (row * (a.width - 1) + conv_state_slot - at) * a.d;
      for (int64_t c = 0; c < a.d; c += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, a.d - c));
        put(to + c, get(to + c, lanes) + get(from + c, lanes), lanes);
      }
    }
  }
}

template <class T>
inline float scalar(const void* p, int64_t i) {
  return get(static_cast<const T*>(p) + i, 1)[0];
}

template <class T>
void step(const ConvStepArgs& a, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * conv_block, count = std::min(conv_block, a.d - first);
    float weight[conv_max_width][conv_block] = {}, bias[conv_block] = {};
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = 0; k < a.width; ++k) {
        const int64_t at = (first + i) * a.width + k;
        weight[k][i] = a.weight_bf16 ? scalar<bf16>(a.weight, at) : static_cast<const float*>(a.weight)[at];
      }
      if (a.bias)
        bias[i] = a.bias_bf16 ? scalar<bf16>(a.bias, first + i) : static_cast<const float*>(a.bias)[first + i];
    }
    for (int64_t row = 0; row < a.batch; ++row) {
      T* state = static_cast<T*>(a.state) + row * (a.width - 1) * a.d + first;
      for (int64_t c = 0; c < count; c += W) {
        const int lanes = static_cast<int>(std::min<int64_t>(W, count - c));
        const vf now = get(static_cast<const T*>(a.x) + row * a.x_row + first + c, lanes);
        vf sum = load(bias + c) + load(weight[a.width - 1] + c) * now;
        for (int64_t k = 0; k < a.width - 1; ++k) {
          T* slot = state + k * a.d + c;
          sum += load(weight[k] + c) * get(slot, lanes);
          put(slot, k + 2 < a.width ? get(slot + a.d, lanes) : now, lanes);
        }
        put(static_cast<T*>(a.y) + row * a.d + first + c, a.silu ? silu(sum) : sum, lanes);
      }
    }
  }
}

using Range = void (*)(const ConvArgs&, int64_t, int64_t);

template <class T>
constexpr Range forwards[] = {forward<T, 1>, forward<T, 2>, forward<T, 3>, forward<T, 4>,
                              forward<T, 5>, forward<T, 6>, forward<T, 7>, forward<T, 8>};
template <class T>
constexpr Range backwards[] = {backward<T, 1>, backward<T, 2>, backward<T, 3>, backward<T, 4>,
                               backward<T, 5>, backward<T, 6>, backward<T, 7>, backward<T, 8>};

}  // namespace

void causal_conv1d_fwd(const ConvArgs& a, int64_t begin, int64_t end) {
  (a.bf16 ? forwards<bf16> : forwards<float>)[a.width - 1](a, begin, end);
}

void causal_conv1d_bwd(const ConvArgs& a, int64_t begin, int64_t end) {
  (a.bf16 ? backwards<bf16> : backwards<float>)[a.width - 1](a, begin, end);
}

void causal_conv1d_bwd_final(const ConvArgs& a, int64_t begin, int64_t end) {
  a.bf16 ? backward_final<bf16>(a, begin, end) : backward_final<float>(a, begin, end);
}

void causal_conv1d_step(const ConvStepArgs& a, int64_t begin, int64_t end) {
  a.bf16 ? step<bf16>(a, begin, end) : step<float>(a, begin, end);
}

}  // namespace seqlib::SEQLIB_ISA

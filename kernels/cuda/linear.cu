// A linear map of a few rows: reading the weight is all the work. A warp has four neighbouring rows of it, or shares them
// with others that take other columns, and asks for what comes two rounds later before it multiplies. Rows of x wait in
// shared memory as float32, normed and gated once per block.
#include "linear.h"

#include "overlap.h"
#include "raw.h"

namespace seqlib {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kRows = 4, kAhead = 2, kTaps = few_rows_taps;

// Elements of one row that a warp takes at once, V of them by each lane.
template <int V>
constexpr int kRound = 32 * V;

// Where four neighbouring elements of x are kept, in fours: lanes that read theirs hit different banks.
template <int V>
SEQLIB_DEVICE int place(int four) {
  constexpr int parts = V < 4 ? 1 : V / 4;
  return four / (32 * parts) * (32 * parts) + four % parts * 32 + four / parts % 32;
}

SEQLIB_DEVICE Pack<float, 4>& four_at(float* row, int four) { return reinterpret_cast<Pack<float, 4>*>(row)[four]; }

// Four of the elements of a row that are left. Rows begin at multiples of 16 bytes unless V is 1.
template <class X, int V>
struct Four {
  static constexpr int each = V == 1 ? 1 : 4;
  Raw<X, each> raw[4 / each];

  SEQLIB_DEVICE Four(const X* p, int left) {
    SEQLIB_UNROLL
    for (int i = 0; i < 4 / each; ++i) raw[i] = fetch<each>(p + i, i < left);
  }
  SEQLIB_DEVICE float operator[](int i) const { return raw[i / each][i % each]; }
};

// Rows of x, times the weight of the norm and silu(gate), into shared memory, zero beyond them. With a norm the sums of
// squares of every row, group and warp come to `sums`.
template <class T, class X, int B, int V>
SEQLIB_DEVICE void stage(const FewRowsArgs& a, float* room, int width, float* sums) {
  const auto* x = static_cast<const X*>(a.x);
  const auto* gate = static_cast<const T*>(a.gate);
  const auto* norm = static_cast<const T*>(a.norm);
  const int d_in = static_cast<int>(a.d_in);
  const int group_fours = a.group_size ? static_cast<int>(a.group_size / 4) : width / 4;
  const int groups = a.group_size ? static_cast<int>(a.d_in / a.group_size) : 1;
  for (int b = 0; b < B; ++b) {
    for (int g = 0; g < groups; ++g) {
      float squares = 0.0f;
      for (int begin = thread_index(); begin < group_fours; begin += kAhead * kThreads) {
        const int four[kAhead] = {begin, begin + kThreads};
        int at[kAhead], left[kAhead];
        SEQLIB_UNROLL
        for (int j = 0; j < kAhead; ++j) {
          at[j] = 4 * (g * group_fours + four[j]);
          left[j] = b < a.batch && four[j] < group_fours ? d_in - at[j] : 0;
        }
        const Four<X, V> raw[kAhead] = {{x + b * a.x_stride + at[0], left[0]}, {x + b * a.x_stride + at[1], left[1]}};
        const Four<T, V> scale[kAhead] = {{norm + at[0], norm ? left[0] : 0}, {norm + at[1], norm ? left[1] : 0}};
        const Four<T, V> gated[kAhead] = {{gate + b * a.gate_stride + at[0], gate ? left[0] : 0},
                                          {gate + b * a.gate_stride + at[1], gate ? left[1] : 0}};
        SEQLIB_UNROLL
        for (int j = 0; j < kAhead; ++j) {
          Pack<float, 4> made;
          SEQLIB_UNROLL
          for (int i = 0; i < 4; ++i) {
            const float v = raw[j][i];
            squares += v * v;
            made.v[i] = v * (norm ? scale[j][i] : 1.0f) * (gate ? silu(gated[j][i]) : 1.0f);
          }
          if (four[j] < group_fours) four_at(room + b * width, place<V>(at[j] / 4)) = made;
        }
      }
      if (a.group_size) {
        squares = lane_sum<32, 1>(squares);
        if (thread_index() % 32 == 0) sums[(b * groups + g) * kWarps + thread_index() / 32] = squares;
      }
    }
    for (int four = groups * group_fours + thread_index(); a.group_size && four < width / 4; four += kThreads)
      four_at(room + b * width, place<V>(four)) = Pack<float, 4>{};
  }
  sync_block();
  if (!a.group_size) return;
  for (int b = 0; b < B; ++b) {
    for (int g = 0; g < groups; ++g) {
      float square = 0.0f;
      SEQLIB_UNROLL
      for (int w = 0; w < kWarps; ++w) square += sums[(b * groups + g) * kWarps + w];
      const float scale = 1.0f / sqrtf(square / static_cast<float>(a.group_size) + a.eps);
      for (int four = thread_index(); four < group_fours; four += kThreads) {
        Pack<float, 4>& mine = four_at(room + b * width, place<V>(g * group_fours + four));
        SEQLIB_UNROLL
        for (int i = 0; i < 4; ++i) mine.v[i] *= scale;
      }
    }
  }
  sync_block();
}

// What one thread makes of one output; all that it needs is asked for early, and looked at when the sums are there.
template <class T>
struct Finish {
  const FewRowsArgs& a;
  int row, batch, channel;
  bool valid, convolved;
  float residual = 0.0f;
  T residual16{}, bias{}, conv_bias{}, tap[kTaps] = {}, before[kTaps - 1] = {};

  SEQLIB_DEVICE Finish(const FewRowsArgs& a_, int row_, int batch_, bool mine)
      : a(a_), row(row_), batch(batch_), channel(row_ - static_cast<int>(a_.conv_first)),
        valid(mine && row_ < a_.d_out && batch_ < a_.batch),
        convolved(valid && a_.conv_weight && channel >= 0 && channel < a_.conv_channels) {
    const int64_t at = batch * a.residual_stride + row;
    if (valid && a.residual && a.y_dtype == Dtype::f32) residual = static_cast<const float*>(a.residual)[at];
    if (valid && a.residual && a.y_dtype != Dtype::f32) residual16 = static_cast<const T*>(a.residual)[at];
    if (valid && a.bias) bias = static_cast<const T*>(a.bias)[row];
    if (convolved && a.conv_bias) conv_bias = static_cast<const T*>(a.conv_bias)[channel];
    SEQLIB_UNROLL
    for (int j = 0; j < kTaps; ++j) {
      if (convolved && j < a.conv_width) tap[j] = static_cast<const T*>(a.conv_weight)[channel * a.conv_width + j];
    }
    SEQLIB_UNROLL
    for (int j = 0; j < kTaps - 1; ++j) {
      if (convolved && j < a.conv_width - 1) before[j] = state(j);
    }
  }

  SEQLIB_DEVICE T& state(int j) const {
    return static_cast<T*>(a.conv_state)[(batch * (a.conv_width - 1) + j) * a.conv_channels + channel];
  }

  SEQLIB_DEVICE void operator()(float value) const {
    value += to_float(bias) + (residual + to_float(residual16));
    if (convolved) {
      const T now = from_float<T>(value);
      value = to_float(conv_bias);
      SEQLIB_UNROLL
      for (int j = 0; j < kTaps; ++j) {
        if (j >= a.conv_width) continue;
        const T seen = j < kTaps - 1 && j < a.conv_width - 1 ? before[j] : now;
        value += to_float(tap[j]) * to_float(seen);
        if (j > 0) state(j - 1) = seen;
      }
      value = silu(value);
    }
    if (valid) store_one(a.y, a.y_dtype, batch * a.y_stride + row, value);
  }
};

template <class T, int V>
struct Weights {
  const T* at;  // this lane's first elements of the first row
  int next[kRows];
  int left;  // elements from there to the end of a row

  SEQLIB_DEVICE void ask(int round, Raw<T, V> (&raw)[kRows]) const {
    SEQLIB_UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = fetch<V>(at + next[r] + round * kRound<V>, round * kRound<V> < left);
  }
};

template <class T, int B, int V>
SEQLIB_DEVICE void multiply(const Raw<T, V> (&raw)[kRows], const float* x, int width, float (&sum)[kRows * B]) {
  constexpr int N = V < 4 ? 1 : 4;
  SEQLIB_UNROLL
  for (int part = 0; part < V / N; ++part) {
    float w[kRows][N];
    SEQLIB_UNROLL
    for (int r = 0; r < kRows; ++r) {
      SEQLIB_UNROLL
      for (int i = 0; i < N; ++i) w[r][i] = raw[r][part * N + i];
    }
    SEQLIB_UNROLL
    for (int b = 0; b < B; ++b) {
      const auto seen = reinterpret_cast<const Pack<float, N>*>(x + b * width)[part * 32 + thread_index() % 32];
      SEQLIB_UNROLL
      for (int r = 0; r < kRows; ++r) {
        SEQLIB_UNROLL
        for (int i = 0; i < N; ++i) sum[r * B + b] += w[r][i] * seen.v[i];
      }
    }
  }
}

template <class T, int B, int V>
SEQLIB_GLOBAL(kThreads, B == 1 ? 3 : 2) few_rows(const FewRowsArgs a) {
  constexpr int kSums = kRows * B;
  const int warp = thread_index() / 32, lane = thread_index() % 32, part = warp % a.split, groups = kWarps / a.split;
  const int block = static_cast<int>(block_index()) * groups, first = (block + warp / a.split) * kRows;
  const int d_in = static_cast<int>(a.d_in), width = (d_in + kRound<V> - 1) / kRound<V> * kRound<V>;
  auto* x = shared_memory<float>();
  float* sums = x + B * width;

  const auto* weight = static_cast<const T*>(a.weight);
  if (V > 1 && part == 0 && lane < kRows && first + lane < a.d_out) {
    const int near = kAhead * a.split * kRound<V>;
    bring_near(weight + static_cast<int64_t>(first + lane) * d_in, (near < d_in ? near : d_in) * static_cast<int64_t>(sizeof(T)));
  }
  wait_for_previous();
  let_next_start();

  Weights<T, V> weights;
  weights.at = weight + static_cast<int64_t>(first < a.d_out ? first : 0) * d_in + lane * V;
  weights.left = d_in - lane * V;
  SEQLIB_UNROLL
  for (int r = 0; r < kRows; ++r) weights.next[r] = first + r < a.d_out ? r * d_in : 0;
  Raw<T, V> raw[kAhead][kRows];
  SEQLIB_UNROLL
  for (int u = 0; u < kAhead; ++u) weights.ask(part + u * a.split, raw[u]);

  if (a.x_dtype == Dtype::f32) stage<T, float, B, V>(a, x, width, sums);
  else stage<T, T, B, V>(a, x, width, sums);
  const int mine = thread_index() % kSums, set = thread_index() / kSums;
  const Finish<T> finish(a, (block + set) * kRows + mine / B, mine % B, set < groups);

  float sum[kSums] = {};
  for (int round = part; round * kRound<V> < d_in; round += kAhead * a.split) {
    SEQLIB_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      const int now = round + u * a.split;
      if (now * kRound<V> < d_in) multiply<T, B, V>(raw[u], x + now * kRound<V>, width, sum);
      weights.ask(now + kAhead * a.split, raw[u]);
    }
  }
  transposed_sum<kSums, 1, kSums>(sum);
  const float all = lane_sum<32 / kSums, kSums>(sum[0]);
  if (lane < kSums) sums[warp * kSums + lane] = all;
  sync_block();
  float value = 0.0f;
  for (int p = 0; p < a.split && set < groups; ++p) value += sums[(set * a.split + p) * kSums + mine];
  finish(value);
}

template <class T, int B, int V>
void run(const FewRowsArgs& a, Stream stream) {
  const int64_t width = (a.d_in + kRound<V> - 1) / kRound<V> * kRound<V>;
  const int64_t norms = a.group_size ? B * (a.d_in / a.group_size) : 0;
  const int64_t shared = (B * width + kWarps * (norms > kRows * B ? norms : kRows * B)) * sizeof(float);
  const int64_t rows = kRows * (kWarps / a.split);
  launch_next(few_rows<T, B, V>, (a.d_out + rows - 1) / rows, kThreads, shared, a.overlap, stream, a);
}

template <class T>
void run(const FewRowsArgs& a, Stream stream) {
  constexpr int V = 16 / sizeof(T);
  const auto even = [](const void* p, int64_t stride) { return !p || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 4 == 0); };
  if (a.d_in % V || !even(a.weight, 0) || !even(a.x, a.x_stride) || !even(a.gate, a.gate_stride) || !even(a.norm, 0))
    return run<T, few_rows_most, 1>(a, stream);
  if (a.batch == 1) return run<T, 1, V>(a, stream);
  if (a.batch == 2) return run<T, 2, V>(a, stream);
  if (a.batch <= 4) return run<T, 4, V>(a, stream);
  return run<T, few_rows_most, V>(a, stream);
}

}  // namespace

int few_rows_split(int64_t d_in, int64_t d_out, int64_t element_size, int64_t multiprocessors) {
  const int64_t rounds = (d_in * element_size + 511) / 512, groups = (d_out + kRows - 1) / kRows;
  int split = 1;
  while (split < kWarps && 2 * split * kAhead <= rounds && groups * split < 2 * kWarps * multiprocessors * 9 / 10) split *= 2;
  return split;
}

void start_few_rows(const FewRowsArgs& a, Stream stream) {
  switch (a.dtype) {
    case Dtype::f32: return run<float>(a, stream);
    case Dtype::bf16: return run<bf16>(a, stream);
    default: return run<f16>(a, stream);
  }
}

}  // namespace seqlib

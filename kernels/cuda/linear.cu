// A linear map of a few rows: reading the weight is all the work. A warp has four neighbouring rows of it, or shares them
// with others that take other columns, and asks for what comes two rounds later before it multiplies. Rows of x wait in
// shared memory as float32, normed and gated once per block.
#include "linear.h"

#include "overlap.h"

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

template <class T>
constexpr Dtype kDtype = Dtype::f32;
template <>
constexpr Dtype kDtype<bf16> = Dtype::bf16;
template <>
constexpr Dtype kDtype<f16> = Dtype::f16;

// Rows begin at multiples of 16 bytes unless V is 1.
template <class T, int V>
constexpr Access kAccess = V == 1 ? Access::single : sizeof(T) == 4 ? Access::four : Access::two;

// Rows of x into shared memory, zero beyond them, normed by groups where there is a norm. `sums`: B * groups * kWarps.
template <class T, class X, int B, int V>
SEQLIB_DEVICE void stage(const FewRowsArgs& a, float* room, int width, float* sums) {
  constexpr int kBeside = B > 1 ? 2 : 1, kFours = 4 / kBeside;  // rows, and fours of each, that a thread has under way
  const int d_in = static_cast<int>(a.d_in);
  const int group_fours = a.group_size ? static_cast<int>(a.group_size / 4) : width / 4;
  const int groups = a.group_size ? d_in / static_cast<int>(a.group_size) : 1;
  for (int b = 0; b < B; b += kBeside) {
    for (int g = 0; g < groups; ++g) {
      float squares[kBeside] = {};
      for (int begin = thread_index(); begin < group_fours; begin += kFours * kThreads) {
        Bits<4> raw[kBeside][kFours], factors[kFours];
        SEQLIB_UNROLL
        for (int j = 0; j < kFours; ++j) {
          const int four = begin + j * kThreads, at = 4 * (g * group_fours + four), left = four < group_fours ? d_in - at : 0;
          SEQLIB_UNROLL
          for (int i = 0; i < kBeside; ++i)
            raw[i][j] = fetch<kAccess<X, V>, 4>(a.x, kDtype<X>, (b + i) * a.x_stride + at, b + i < a.batch ? left : 0);
          factors[j] = fetch<kAccess<T, V>, 4>(a.norm, kDtype<T>, at, a.norm ? left : 0);
        }
        SEQLIB_UNROLL
        for (int j = 0; j < kFours; ++j) {
          const int four = begin + j * kThreads;
          float factor[4];
          unpack(factors[j], kDtype<T>, factor);
          SEQLIB_UNROLL
          for (int i = 0; i < kBeside; ++i) {
            float made[4];
            unpack(raw[i][j], kDtype<X>, made);
            SEQLIB_UNROLL
            for (float& v : made) squares[i] += v * v;
            SEQLIB_UNROLL
            for (int e = 0; e < 4; ++e) made[e] *= a.norm ? factor[e] : 1.0f;
            if (four < group_fours) store_tile<4>(&room[(b + i) * width + 4 * place<V>(g * group_fours + four)], made);
          }
        }
      }
      SEQLIB_UNROLL
      for (int i = 0; i < kBeside; ++i) {
        if (!a.group_size) break;
        squares[i] = lane_sum<32, 1>(squares[i]);
        if (thread_index() % 32 == 0) sums[((b + i) * groups + g) * kWarps + thread_index() / 32] = squares[i];
      }
    }
    for (int i = 0; i < kBeside; ++i) {
      for (int four = groups * group_fours + thread_index(); four < width / 4; four += kThreads)
        store_tile<4>(&room[(b + i) * width + 4 * place<V>(four)], {});
    }
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
        const int at = 4 * (g * group_fours + four);
        float *mine = &room[b * width + 4 * place<V>(at / 4)], v[4], z[4];
        if (a.gate) unpack(fetch<kAccess<T, V>, 4>(a.gate, kDtype<T>, b * a.gate_stride + at, b < a.batch ? 4 : 0), kDtype<T>, z);
        load_tile<4>(mine, v);
        SEQLIB_UNROLL
        for (int i = 0; i < 4; ++i) v[i] *= a.gate ? scale * silu(z[i]) : scale;
        store_tile<4>(mine, v);
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

  SEQLIB_DEVICE void ask(int round, Bits<V> (&raw)[kRows]) const {
    const int from = round * kRound<V>;
    SEQLIB_UNROLL
    for (int r = 0; r < kRows; ++r) raw[r] = fetch<kAccess<T, V>, V>(at, kDtype<T>, next[r] + from, left - from);
  }
};

template <class T, int B, int V>
SEQLIB_DEVICE void multiply(const Bits<V> (&raw)[kRows], const float* x, int width, float (&sum)[kRows * B]) {
  constexpr int N = V < 4 ? 1 : 4;
  float w[kRows][V];
  SEQLIB_UNROLL
  for (int r = 0; r < kRows; ++r) unpack(raw[r], kDtype<T>, w[r]);
  SEQLIB_UNROLL
  for (int part = 0; part < V / N; ++part) {
    SEQLIB_UNROLL
    for (int b = 0; b < B; ++b) {
      float seen[N];
      load_tile<N>(&x[b * width + (part * 32 + thread_index() % 32) * N], seen);
      SEQLIB_UNROLL
      for (int r = 0; r < kRows; ++r) {
        SEQLIB_UNROLL
        for (int i = 0; i < N; ++i) sum[r * B + b] += w[r][part * N + i] * seen[i];
      }
    }
  }
}

// Asks for the parameters beside the weight that a block will want.
SEQLIB_DEVICE void warm(const FewRowsArgs& a, int first, int rows) {
  for (int i = thread_index() * 32; a.norm && i < a.d_in; i += kThreads * 32) touch(a.norm, a.dtype, i);
  const int64_t row = first + thread_index(), channel = row - a.conv_first;
  if (thread_index() >= rows || row >= a.d_out) return;
  if (a.bias) touch(a.bias, a.dtype, row);
  if (!a.conv_weight || channel < 0 || channel >= a.conv_channels) return;
  touch(a.conv_weight, a.dtype, channel * a.conv_width);
  if (a.conv_bias) touch(a.conv_bias, a.dtype, channel);
  for (int64_t j = 0; j < a.batch * (a.conv_width - 1); ++j) touch(a.conv_state, a.dtype, j * a.conv_channels + channel);
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
  warm(a, block * kRows, groups * kRows);
  wait_for_previous();
  let_next_start();

  Weights<T, V> weights;
  weights.at = weight + static_cast<int64_t>(first < a.d_out ? first : 0) * d_in + lane * V;
  weights.left = d_in - lane * V;
  SEQLIB_UNROLL
  for (int r = 0; r < kRows; ++r) weights.next[r] = first + r < a.d_out ? r * d_in : 0;
  Bits<V> raw[kAhead][kRows];
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

template <int B, int V>
int64_t shared_bytes(const FewRowsArgs& a) {
  const int64_t width = (a.d_in + kRound<V> - 1) / kRound<V> * kRound<V>;
  const int64_t norms = a.group_size ? B * (a.d_in / a.group_size) : 0;
  return (B * width + kWarps * (norms > kRows * B ? norms : kRows * B)) * sizeof(float);
}

int64_t most_shared() {
#ifdef SEQLIB_EMULATED
  return 227 * 1024;
#else
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
#endif
}

// Rows [first, first + B) of x.
FewRowsArgs rows_from(FewRowsArgs a, int64_t first, int64_t count) {
  const auto ahead = [first](const void* p, Dtype dtype, int64_t stride) {
    return p ? static_cast<const char*>(p) + first * stride * (dtype == Dtype::f32 ? 4 : 2) : nullptr;
  };
  a.x = ahead(a.x, a.x_dtype, a.x_stride);
  a.gate = ahead(a.gate, a.dtype, a.gate_stride);
  a.residual = ahead(a.residual, a.y_dtype, a.residual_stride);
  a.y = const_cast<char*>(ahead(a.y, a.y_dtype, a.y_stride));
  a.conv_state = const_cast<char*>(ahead(a.conv_state, a.dtype, (a.conv_width - 1) * a.conv_channels));
  a.batch = a.batch - first < count ? a.batch - first : count;
  return a;
}

template <class T, int B, int V>
void run(const FewRowsArgs& a, Stream stream) {
  if constexpr (B > 1) {
    if (a.batch <= B / 2 || B > a.at_once || shared_bytes<B, V>(a) > most_shared()) return run<T, B / 2, V>(a, stream);
  }
  const int64_t rows = kRows * (kWarps / a.split);
  for (int64_t first = 0; first < a.batch; first += B)
    launch_next(few_rows<T, B, V>, (a.d_out + rows - 1) / rows, kThreads, shared_bytes<B, V>(a), a.overlap, stream,
                rows_from(a, first, B));
}

template <class T>
void run(const FewRowsArgs& a, Stream stream) {
  constexpr int V = 16 / sizeof(T);
  const auto even = [](const void* p, int64_t stride) {
    return !p || (reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % 4 == 0);
  };
  if (a.d_in % V == 0 && even(a.weight, 0) && even(a.x, a.x_stride) && even(a.gate, a.gate_stride) && even(a.norm, 0))
    return run<T, few_rows_most, V>(a, stream);
  run<T, 1, 1>(a, stream);
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

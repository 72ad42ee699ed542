// Kernels of state spaces. Vandermonde: with l = 128 a + b, exp(l x) = exp(128 a x) exp(b x), so that two short tables and a
// real matrix product make all powers. Cauchy: frequencies are lanes, all sums share one reciprocal.
#include "ssm_kernel.h"

#include "launch.h"

namespace seqlib {
namespace {

constexpr int kThreads = 256, kStates = 16;             // states of a table at a time
constexpr int kFine = 128, kCoarse = 64;                // columns (b) and rows (c, a) of a block
constexpr int kAcross = 16, V = kFine / kAcross, U = kCoarse / (kThreads / kAcross);  // results of a thread: U x V

struct Tables {
  float coarse[kStates][2][kCoarse], fine[kStates][2][kFine];  // re, im
};

// exp(at * x). Angles are reduced to one turn in double: at 10^4 radians float has three digits left.
SEQLIB_DEVICE void power(const double* x, double at, float& re, float& im) {
  const double turns = at * x[1] * 0.15915494309189535;
  float sin, cos;
  sincos_half_turns(static_cast<float>(2.0 * (turns - rint(turns))), sin, cos);
  const float size = expf(static_cast<float>(at * x[0]));
  re = size * cos;
  im = size * sin;
}

SEQLIB_GLOBAL(kThreads, 2) vandermonde(const VandermondeArgs a) {
  auto& t = *shared_memory<Tables>();
  const int64_t steps = (a.length + kFine - 1) / kFine, tiles = (a.c * steps + kCoarse - 1) / kCoarse;
  const int64_t d = block_index() / tiles, first = block_index() % tiles * kCoarse;
  const int across = thread_index() % kAcross, down = thread_index() / kAcross;
  float sum[U][V] = {};
  for (int64_t n0 = 0; n0 < a.n; n0 += kStates) {
    for (int i = thread_index(); i < kStates * (kFine + kCoarse); i += kThreads) {
      const int n = i / (kFine + kCoarse), column = i % (kFine + kCoarse);
      const bool fine = column < kFine;
      const int64_t row = first + column - kFine;
      const bool valid = n0 + n < a.n && (fine || row < a.c * steps);
      float re = 0.0f, im = 0.0f;
      if (valid) power(a.log_decay + 2 * (d * a.n + n0 + n), fine ? column : static_cast<double>(row % steps) * kFine, re, im);
      if (fine) {
        t.fine[n][0][column] = re;
        t.fine[n][1][column] = im;
      } else {
        const float* w = a.weight + 2 * ((d * a.c + row / steps) * a.n + n0 + n);
        t.coarse[n][0][column - kFine] = valid ? w[0] * re - w[1] * im : 0.0f;
        t.coarse[n][1][column - kFine] = valid ? w[0] * im + w[1] * re : 0.0f;
      }
    }
    sync_block();
    for (int n = 0; n < kStates; ++n) {
      float x[2][U], y[2][V];
      SEQLIB_UNROLL
      for (int part = 0; part < 2; ++part) {
        load<U>(&t.coarse[n][part][down * U], U, x[part]);
        SEQLIB_UNROLL
        for (int v = 0; v < V; ++v) y[part][v] = t.fine[n][part][v * kAcross + across];
      }
      SEQLIB_UNROLL
      for (int u = 0; u < U; ++u) {
        SEQLIB_UNROLL
        for (int v = 0; v < V; ++v) sum[u][v] += x[0][u] * y[0][v] - x[1][u] * y[1][v];
      }
    }
    sync_block();
  }
  SEQLIB_UNROLL
  for (int u = 0; u < U; ++u) {
    const int64_t row = first + down * U + u;
    SEQLIB_UNROLL
    for (int v = 0; v < V; ++v) {
      const int64_t l = row % steps * kFine + v * kAcross + across;
      if (row < a.c * steps && l < a.length) a.kernel[(d * a.c + row / steps) * a.length + l] = sum[u][v];
    }
  }
}

// 1 / z of one state at one frequency, and what z depends on.
struct Reciprocal {
  float re, im;

  SEQLIB_DEVICE Reciprocal(float alpha_re, float alpha_im, float sin, float cos) {
    const float z_re = (alpha_re * alpha_re + alpha_im * alpha_im) * (cos * cos) - 4.0f * (sin * sin);
    const float z_im = -4.0f * alpha_re * (sin * cos), norm = 1.0f / (z_re * z_re + z_im * z_im);
    re = z_re * norm;
    im = -z_im * norm;
  }
};

// Each with all its digits where it is small: there z is a small difference.
SEQLIB_DEVICE void angle(const CauchyArgs& a, int64_t k, float& sin, float& cos) {
  const double at = static_cast<double>(k) / static_cast<double>(a.l_kernel);
  float rest;
  sincos_half_turns(static_cast<float>(0.5 - at), cos, rest);
  sincos_half_turns(static_cast<float>(at), sin, rest);
}

SEQLIB_GLOBAL(kThreads, 2) cauchy(const CauchyArgs a) {
  constexpr int M = cauchy_rows, width = M + 2;
  auto* state = shared_memory<float[width]>();  // numerators and alpha of kThreads states
  const int64_t count = a.l_kernel / 2 + 1, tiles = (count + kThreads - 1) / kThreads, parts = (a.m + M - 1) / M;
  const int64_t k = block_index() % tiles * kThreads + thread_index(), m0 = block_index() / tiles % parts * M;
  const int64_t d = block_index() / tiles / parts;
  float sin, cos, sum[M][2] = {};
  angle(a, k < count ? k : 0, sin, cos);
  for (int64_t n0 = 0; n0 < a.n; n0 += kThreads) {
    const int64_t n = n0 + thread_index();
    if (n < a.n) {
      SEQLIB_UNROLL
      for (int m = 0; m < M; ++m)
        state[thread_index()][m] = m0 + m < a.m ? a.numerators[(d * a.m + m0 + m) * a.n + n] : 0.0f;
      state[thread_index()][M] = a.alpha[2 * (d * a.n + n)];
      state[thread_index()][M + 1] = a.alpha[2 * (d * a.n + n) + 1];
    }
    sync_block();
    for (int64_t i = 0; i < kThreads && n0 + i < a.n; ++i) {
      const Reciprocal r(state[i][M], state[i][M + 1], sin, cos);
      SEQLIB_UNROLL
      for (int m = 0; m < M; ++m) {
        sum[m][0] += state[i][m] * r.re;
        sum[m][1] += state[i][m] * r.im;
      }
    }
    sync_block();
  }
  SEQLIB_UNROLL
  for (int m = 0; m < M; ++m) {
    if (k < count && m0 + m < a.m) {
      a.sums[((d * a.m + m0 + m) * 2) * count + k] = sum[m][0];
      a.sums[((d * a.m + m0 + m) * 2 + 1) * count + k] = sum[m][1];
    }
  }
}

// With u = 1 / z and g the gradient of u: dz = -conj(u^2) g, and z is a polynomial of alpha.
SEQLIB_GLOBAL(kThreads, 2) cauchy_backward(const CauchyArgs a) {
  constexpr int M = cauchy_rows, width = M + 2, warps = kThreads / 32;
  auto* room = shared_memory<float[width]>();
  const int64_t count = a.l_kernel / 2 + 1, parts = (a.m + M - 1) / M;
  const int64_t n = block_index() % a.n, part = block_index() / a.n % parts, d = block_index() / a.n / parts, m0 = part * M;
  const float alpha_re = a.alpha[2 * (d * a.n + n)], alpha_im = a.alpha[2 * (d * a.n + n) + 1];
  float numerator[M], sum[width] = {};
  SEQLIB_UNROLL
  for (int m = 0; m < M; ++m) numerator[m] = m0 + m < a.m ? a.numerators[(d * a.m + m0 + m) * a.n + n] : 0.0f;
  for (int64_t k = thread_index(); k < count; k += kThreads) {
    float sin, cos, g_re = 0.0f, g_im = 0.0f;
    angle(a, k, sin, cos);
    const Reciprocal u(alpha_re, alpha_im, sin, cos);
    SEQLIB_UNROLL
    for (int m = 0; m < M; ++m) {
      if (m0 + m < a.m) {
        const float s_re = a.sums[((d * a.m + m0 + m) * 2) * count + k], s_im = a.sums[((d * a.m + m0 + m) * 2 + 1) * count + k];
        sum[m] += s_re * u.re + s_im * u.im;
        g_re += numerator[m] * s_re;
        g_im += numerator[m] * s_im;
      }
    }
    const float square_re = u.re * u.re - u.im * u.im, square_im = 2.0f * u.re * u.im;
    const float z_re = -(square_re * g_re + square_im * g_im), z_im = -(square_re * g_im - square_im * g_re);
    sum[M] += 2.0f * alpha_re * cos * cos * z_re - 4.0f * sin * cos * z_im;
    sum[M + 1] += 2.0f * alpha_im * cos * cos * z_re;
  }
  SEQLIB_UNROLL
  for (int i = 0; i < width; ++i) {
    sum[i] = lane_sum<32, 1>(sum[i]);
    if (thread_index() % 32 == 0) room[thread_index() / 32][i] = sum[i];
  }
  sync_block();
  if (thread_index() < width) {
    float all = 0.0f;
    SEQLIB_UNROLL
    for (int w = 0; w < warps; ++w) all += room[w][thread_index()];
    const int m = thread_index();
    if (m < M && m0 + m < a.m) a.dnumerators[(d * a.m + m0 + m) * a.n + n] = all;
    if (m >= M) a.dalpha[2 * ((part * a.d + d) * a.n + n) + m - M] = all;
  }
}

}  // namespace

void start_vandermonde(const VandermondeArgs& a, Stream stream) {
  const int64_t rows = a.c * ((a.length + kFine - 1) / kFine);
  launch(vandermonde, a.d * ((rows + kCoarse - 1) / kCoarse), kThreads, sizeof(Tables), stream, a);
}

void start_cauchy(const CauchyArgs& a, Stream stream) {
  const int64_t tiles = (a.l_kernel / 2 + kThreads) / kThreads, parts = (a.m + cauchy_rows - 1) / cauchy_rows;
  launch(cauchy, a.d * parts * tiles, kThreads, sizeof(float[kThreads][cauchy_rows + 2]), stream, a);
}

void start_cauchy_bwd(const CauchyArgs& a, Stream stream) {
  const int64_t parts = (a.m + cauchy_rows - 1) / cauchy_rows;
  launch(cauchy_backward, a.d * parts * a.n, kThreads, sizeof(float[kThreads / 32][cauchy_rows + 2]), stream, a);
}

}  // namespace seqlib

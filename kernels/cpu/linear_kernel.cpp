// A few rows times a weight as stored. The weight is one sequential stream, which hardware reads fastest with a hint some
// lines ahead; everything else stays in registers.
#include "linear.h"

#include "vec.h"

namespace seqlib::SEQLIB_ISA {
namespace {

constexpr int kAhead = 512;  // bytes: past the reach of the hardware prefetcher at the end of a page

// Rows R at a time, so that the weight vector just loaded serves them all.
template <int R, class T>
void rows(const LinearArgs& a, int64_t first, int64_t begin, int64_t end) {
  constexpr int U = R == 1 ? 4 : R < 8 ? 8 / R : 1;  // eight independent sums hide the latency of the multiply-add
  const float* x = a.x + first * a.d_in;
  for (int64_t o = begin; o < end; ++o) {
    const T* w = static_cast<const T*>(a.weight) + o * a.d_in;
    vf sums[R][U] = {};
    int64_t i = 0;
    for (; i + U * W <= a.d_in; i += U * W) {
#pragma GCC unroll 4
      for (size_t line = 0; line < U * W * sizeof(T); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(w + i) + kAhead + line);
      for (int u = 0; u < U; ++u) {
        vf wv = load(w + i + u * W);
        for (int r = 0; r < R; ++r) sums[r][u] += wv * load(x + r * a.d_in + i + u * W);
      }
    }
    for (; i < a.d_in; i += W) {
      const int lanes = a.d_in - i < W ? static_cast<int>(a.d_in - i) : W;
      vf wv = lanes == W ? load(w + i) : load_n(w + i, lanes);
      for (int r = 0; r < R; ++r) {
        const float* xr = x + r * a.d_in + i;
        sums[r][0] += wv * (lanes == W ? load(xr) : load_n(xr, lanes));
      }
    }
    for (int r = 0; r < R; ++r) {
      vf s = sums[r][0];
      for (int u = 1; u < U; ++u) s += sums[r][u];
      a.y[(first + r) * a.y_stride + o] = sum(s) + (a.bias ? a.bias[o] : 0.0f);
    }
  }
}

template <class T>
void run(const LinearArgs& a, int64_t begin, int64_t end) {
  int64_t r = 0;
  for (; r + 8 <= a.rows; r += 8) rows<8, T>(a, r, begin, end);
  for (; r + 4 <= a.rows; r += 4) rows<4, T>(a, r, begin, end);
  for (; r + 2 <= a.rows; r += 2) rows<2, T>(a, r, begin, end);
  for (; r < a.rows; ++r) rows<1, T>(a, r, begin, end);
}

}  // namespace

void linear_fwd(const LinearArgs& a, int64_t begin, int64_t end) {
  // Blocks of outputs small enough that several groups of rows find the weight in L2.
  constexpr int64_t block = 64;
  for (int64_t o = begin; o < end; o += block) {
    const int64_t stop = o + block < end ? o + block : end;
    a.bf16 ? run<bf16>(a, o, stop) : run<float>(a, o, stop);
  }
}

}  // namespace seqlib::SEQLIB_ISA

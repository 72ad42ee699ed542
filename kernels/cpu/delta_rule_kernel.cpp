// The delta rule, forward: each task walks all tokens of a head with its columns of the state in scratch.
#include "delta_rule_tile.h"

namespace seqlib::SEQLIB_ISA {
namespace {

template <class T, Decay D, bool Whole>
inline void block(const DeltaArgs& a, const Head& at, int64_t begin, int64_t count, int64_t c, const Tile& tile, float* S) {
  vf found[2 * C][NC], u[C][NC];
  read<2 * C>(S, tile.in, a.d_state, found);
  errors<T, Whole>(a, at, begin, count, c, tile, found, u);
  T* y = static_cast<T*>(a.y) + ((at.b * a.seqlen + begin) * a.nheads + at.h) * a.headdim + c;
#pragma GCC unroll 4
  for (int t = 0; t < C; ++t)
    for (int i = 0; i < NC; ++i) {
      u[t][i] *= tile.beta[t];
      vf sum = found[C + t][i];
      for (int s = 0; s <= t; ++s) sum += u[s][i] * tile.qk[t][s];
      if (t < count) put_block<Whole>(y + t * a.nheads * a.headdim + i * W, sum, a.headdim - c - i * W);
    }
  write<D>(S, S, tile, a.d_state, u);
}

template <class T, Decay D>
void forward(const DeltaArgs& a, int64_t begin, int64_t end) {
  FlushDenormals flush;
  const int64_t blocks = (a.headdim + columns - 1) / columns, block_size = a.d_state * columns;
  const int64_t state_size = a.d_state * a.headdim;
  Scratch scratch(blocks * block_size);
  float* S = scratch.get();
  Tile tile;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t head = task / a.parts, part = task % a.parts;
    const Head at{head / a.nheads, head % a.nheads};
    const int64_t first = blocks * part / a.parts, stop = blocks * (part + 1) / a.parts;
    auto each_block = [&](auto&& f) {
      for (int64_t i = first; i < stop; ++i) f(S + (i - first) * block_size, i * columns);
    };
    if (a.initial_state)
      each_block([&](float* s, int64_t c) {
        gather(a.initial_state + head * state_size, s, a.d_state, a.headdim, c);
      });
    else
      clear(S, (stop - first) * block_size);
    for (int64_t p = a.first_piece[at.b]; p < a.first_piece[at.b + 1]; ++p) {
      const DeltaPiece& piece = a.pieces[p];
      if (piece.saved == delta_fresh)
        clear(S, (stop - first) * block_size);
      else if (a.saved)
        each_block([&](float* s, int64_t c) {
          scatter(s, a.saved + (piece.saved * a.nheads + at.h) * state_size, a.d_state, a.headdim, c);
        });
      for (int64_t t = piece.begin; t < piece.end; t += C) {
        const int64_t count = piece.end - t < C ? piece.end - t : C;
        prepare<T, D>(a, at, t, count, tile);
        each_block([&](float* s, int64_t c) {
          a.headdim - c >= columns ? block<T, D, true>(a, at, t, count, c, tile, s)
                                   : block<T, D, false>(a, at, t, count, c, tile, s);
        });
      }
    }
    each_block([&](float* s, int64_t c) { scatter(s, a.final_state + head * state_size, a.d_state, a.headdim, c); });
  }
}

template <class T>
void run(const DeltaArgs& a, int64_t begin, int64_t end) {
  switch (a.decay) {
    case Decay::none: return forward<T, Decay::none>(a, begin, end);
    case Decay::token: return forward<T, Decay::token>(a, begin, end);
    case Decay::channel: return forward<T, Decay::channel>(a, begin, end);
  }
}

// N vectors of columns of one token's state.
template <class T, int N>
inline void step_columns(float* S, const float (&k)[width], const float (&q)[width], const float (&decay)[width],
                         const T* v, T* y, float beta, int64_t d_state, int64_t headdim, int64_t left) {
  vf u[N] = {}, out[N] = {};
  for (int64_t n = 0; n < d_state; ++n)
    for (int i = 0; i < N; ++i) u[i] += get(S + n * headdim + i * W, left - i * W) * (k[n] * decay[n]);
  for (int i = 0; i < N; ++i) u[i] = (get(v + i * W, left - i * W) - u[i]) * beta;
  for (int64_t n = 0; n < d_state; ++n)
    for (int i = 0; i < N; ++i) {
      vf s = get(S + n * headdim + i * W, left - i * W) * decay[n] + u[i] * k[n];
      out[i] += s * q[n];
      put(S + n * headdim + i * W, s, left - i * W);
    }
  for (int i = 0; i < N; ++i) put(y + i * W, out[i], left - i * W);
}

template <class T>
void step(const DeltaStepArgs& a, int64_t begin, int64_t end) {
  FlushDenormals flush;
  alignas(64) float k[width], q[width], decay[width];
  for (int64_t task = begin; task < end; ++task) {
    const int64_t b = task / a.nheads, h = task % a.nheads;
    for (int64_t n = 0; n < a.d_state; n += W) {
      const int64_t left = a.d_state - n;
      store(k + n, get(a.k.at<T>(b, 0, h) + n, left));
      store(q + n, get(a.q.at<T>(b, 0, h) + n, left) * a.scale);
      vf g = {};
      if (a.decay == Decay::token) g = splat(a.log_decay[task]);
      if (a.decay == Decay::channel) g = get(a.log_decay + task * a.d_state + n, left);
      store(decay + n, exp(g));
    }
    float* S = a.state + task * a.d_state * a.headdim;
    const T* v = a.v.at<T>(b, 0, h);
    T* y = static_cast<T*>(a.y) + task * a.headdim;
    int64_t c = 0;
    for (; c + 4 * W <= a.headdim; c += 4 * W)
      step_columns<T, 4>(S + c, k, q, decay, v + c, y + c, a.beta[task], a.d_state, a.headdim, 4 * W);
    for (; c < a.headdim; c += W)
      step_columns<T, 1>(S + c, k, q, decay, v + c, y + c, a.beta[task], a.d_state, a.headdim, a.headdim - c);
  }
}

}  // namespace

void delta_rule_fwd(const DeltaArgs& a, int64_t begin, int64_t end) {
  a.bf16 ? run<bf16>(a, begin, end) : run<float>(a, begin, end);
}

void delta_rule_step(const DeltaStepArgs& a, int64_t begin, int64_t end) {
  a.bf16 ? step<bf16>(a, begin, end) : step<float>(a, begin, end);
}

}  // namespace seqlib::SEQLIB_ISA

#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

constexpr int64_t delta_max_state = 256;  // widest d_state with its tile in fixed scratch
constexpr int64_t delta_piece = 64;       // tokens between two saved states

// Consecutive real tokens of one document; `saved`: the place among the saved states of the one before them, or this.
constexpr int64_t delta_fresh = -1;  // the document starts here, from a state of zero
struct DeltaPiece {
  int64_t begin, end, saved;
};

enum class Decay { none, token, channel };

// A (batch, seqlen, heads, width) tensor with unit stride in its last axis; `group` value heads share one of its heads.
struct DeltaInput {
  const void* data;
  int64_t row, step, head, group;

  template <class T>
  const T* at(int64_t b, int64_t t, int64_t h) const {
    return static_cast<const T*>(data) + b * row + t * step + h / group * head;
  }
};

struct DeltaArgs {
  DeltaInput q, k, v;
  const float *beta, *log_decay;  // (batch, seqlen, nheads) and, per channel, d_state more
  const float* initial_state;     // (batch, nheads, d_state, headdim)
  float* final_state;
  void* y;       // (batch, seqlen, nheads, headdim)
  float* saved;  // (saved, nheads, d_state, headdim), or null
  const DeltaPiece* pieces;
  const int64_t* first_piece;  // of each row, and their number
  int64_t batch, seqlen, nheads, d_state, headdim, parts;
  float scale;
  Decay decay;
  bool bf16;
};

// Task (b * nheads + h) * parts + part: all tokens of one head, a part of its columns.
SEQLIB_KERNEL(delta_rule_fwd, DeltaArgs)

struct DeltaGradArgs {
  DeltaArgs forward;  // y and final_state unused
  DeltaInput dy;
  const float* dfinal;  // as final_state, or null
  // Gradients, all of float32 and per value head: dq and dk (batch, seqlen, nheads, d_state), the others as their inputs.
  float *dq, *dk, *dv, *dbeta, *dlog_decay, *dstate;
};

// Task b * nheads + h.
SEQLIB_KERNEL(delta_rule_bwd, DeltaGradArgs)

struct DeltaStepArgs {
  DeltaInput q, k, v;             // step unused
  const float *beta, *log_decay;  // (batch, nheads [, d_state])
  float* state;                   // (batch, nheads, d_state, headdim)
  void* y;                        // (batch, nheads, headdim)
  int64_t nheads, d_state, headdim;
  float scale;
  Decay decay;
  bool bf16;
};

// Task b * nheads + h.
SEQLIB_KERNEL(delta_rule_step, DeltaStepArgs)

}  // namespace seqlib

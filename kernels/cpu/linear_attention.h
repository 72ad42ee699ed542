#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

constexpr int kAttentionChunk = 64;
constexpr int kChannelChunk = 16;  // with a decay per key channel

// Heads (batch, seqlen, heads, width) with unit stride along the last axis.
struct Heads {
  void* data;
  int64_t batch, row, head;
  int64_t shared;  // value heads served by one head
  bool bf16;
};

// A run of tokens of one document.
struct AttentionSpan {
  int64_t begin, end;
  int64_t checkpoint;  // number of its first checkpoint
  bool fresh;
};

struct AttentionArgs {
  Heads q, k, v;
  const float* log_decay;  // null for none; strides as heads, channels next to each other
  int64_t decay_batch, decay_row, decay_head;
  const float* initial;  // (batch, nheads, d_state, headdim), null for zero
  const AttentionSpan* spans;
  const int64_t* first_span;  // batch + 1
  Heads y;
  float *final, *checkpoints;
  int64_t batch, seqlen, nheads, d_state, headdim;
  int64_t parts, part_width;  // split of headdim
  int64_t every;              // chunks per checkpoint
  float scale;
};

struct AttentionBackArgs {
  AttentionArgs of;
  Heads dy;
  const float* dfinal;
  Heads dq, dk, dv;
  float* dlog_decay;   // (batch, seqlen, nheads[, d_state]), or (batch, nheads) if constant; may be null
  float* dinitial;
  bool constant;
};

struct AttentionStepArgs {
  Heads q, k, v;
  const float* log_decay;
  int64_t decay_batch, decay_head, decay_channel;
  float* state;
  Heads y;
  int64_t nheads, d_state, headdim;
  float scale;
};

// Forward: task = (row, head, part of headdim). Backward and step: task = (row, head).
SEQLIB_KERNEL(linear_attention_fwd, AttentionArgs)
SEQLIB_KERNEL(linear_attention_bwd, AttentionBackArgs)
SEQLIB_KERNEL(linear_attention_channel_fwd, AttentionArgs)
SEQLIB_KERNEL(linear_attention_channel_bwd, AttentionBackArgs)
SEQLIB_KERNEL(linear_attention_step, AttentionStepArgs)

#if defined(__x86_64__) || defined(_M_X64)
namespace avx512bf16 { SEQLIB_WEAK void linear_attention_fwd(const AttentionArgs&, int64_t, int64_t); }
#endif

}  // namespace seqlib

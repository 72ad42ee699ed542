#pragma once

#include "view.h"

namespace seqlib {

struct MatrixStepArgs {
  View q, k, v;  // (batch, heads, width); row is the number of value heads that share a head
  const float *beta, *log_decay;  // (batch, nheads) with the delta rule; null without a decay
  int64_t decay_batch, decay_head, decay_channel;  // strides
  float* state;  // (batch, nheads, d_state, headdim), updated
  void* y;       // (batch, nheads, headdim), the dtype of v
  int64_t batch, nheads, d_state, headdim;
  float scale;
};

// One token of linear attention, or with beta of the delta rule.
void start_matrix_step(const MatrixStepArgs& args, Stream stream);

}  // namespace seqlib

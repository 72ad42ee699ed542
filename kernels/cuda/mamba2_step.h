#pragma once

#include "view.h"

namespace seqlib {

struct Parameter {
  const void* data;
  Dtype dtype;
};

struct Mamba2StepArgs {
  const void* inputs;  // (batch, z | x | B | C | dt), `stride` apart, a multiple of 4; x, B, C are convolved
  int64_t stride;
  Parameter dt_bias, A_log, D;  // (nheads,), and D (nheads, D_width)
  int64_t D_width;              // 1 or headdim
  float* state;                 // (batch, nheads, d_state, headdim), updated
  float* y;                     // (batch, nheads, headdim)
  int64_t batch, nheads, ngroups, d_state, headdim;
  float dt_min, dt_max;
  bool gate;     // y * silu(z)
  bool overlap;  // may start while the kernel before it runs
  Dtype dtype;   // of the inputs
};

// What Mamba-2 does to one token between its projections, the convolution and the norm apart.
void start_mamba2_step(const Mamba2StepArgs& args, Stream stream);

}  // namespace seqlib

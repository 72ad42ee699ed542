#pragma once

#include "view.h"

namespace seqlib {

constexpr int kScanCheckpoint = 32;  // steps between two saved states

struct ScanArgs {
  View x, dt, z, B, C;                  // x, dt, z share one dtype; z.data may be null
  const float *A, *D, *dt_bias;         // (d_inner, d_state), (d_inner), (d_inner); the last two may be null
  const float* initial;                 // (batch, d_inner, d_state) or null
  const int32_t* links;                 // of SequenceInfo, or null
  void* y;                              // (batch, seqlen, d_inner), the dtype of x
  float* final;                         // (batch, d_inner, d_state)
  float* checkpoints;                   // (batch, ceil(seqlen / kScanCheckpoint), d_inner, d_state) or null
  float* entries;                       // (batch, segments, d_inner, d_state): summaries, then the states between segments
  float* sums;                          // (batch, segments, d_inner): sum of delta, inf where a document begins
  int64_t batch, seqlen, d_inner, d_state, groups;
  int64_t segment, segments;            // positions of a segment, a multiple of kScanCheckpoint; their number
  int32_t lanes;                        // that share a channel
  bool softplus;
};

struct ScanBackArgs {
  ScanArgs of;                   // the forward call; y, final and initial are not used
  View dy;                       // the dtype of x
  const float* dfinal;           // (batch, d_inner, d_state) or null
  void *dx, *ddt, *dz;           // (batch, seqlen, d_inner), the dtype of x; dz is null without z
  float *dA;                     // (batch * segments, d_inner, d_state)
  float* dinitial;               // (batch, d_inner, d_state)
  float *dD, *dbias;             // (batch * segments, d_inner)
  float *dB, *dC;                // (batch, groups, parts, seqlen, d_state)
  int64_t parts;                 // blocks of channels in a group
};

// How many lanes share a channel, and channels of a block, for states of this size; `wanted` lanes where there is a choice.
int32_t scan_lanes(int64_t d_state, int64_t wanted);
int64_t scan_block_channels(int32_t lanes);
int64_t scan_back_block_channels(int64_t d_state);

// With several segments: what each does to the state, then the states between them, then the outputs.
void start_selective_scan_fwd(const ScanArgs& args, Stream stream);
void start_selective_scan_bwd(const ScanBackArgs& args, Stream stream);

struct ScanStepArgs {
  View x, dt, z, B, C;  // one token: row is not used
  const float *A, *D, *dt_bias;
  void* y;       // (batch, d_inner)
  float* state;  // (batch, d_inner, d_state), updated
  int64_t batch, d_inner, d_state, groups;
  bool softplus;
};
void start_selective_scan_step(const ScanStepArgs& args, Stream stream);

}  // namespace seqlib

#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

constexpr int kScanTile = 32;   // steps that are worked on at a time, and the distance of checkpoints
constexpr int kScanBlock = 64;  // most channels of one task

// Steps [begin, begin + length) of a row. Fresh: the state before them is zero. Otherwise `checkpoint` is the number of
// the slot that holds the state before them, -1 if none is kept.
struct ScanTile {
  int32_t begin, length, fresh, checkpoint;
};

// A tensor (batch, seqlen, [groups,] width) of float32 or bfloat16 with unit stride along its last axis.
struct ScanInput {
  const void* data;
  int64_t batch, row, group;  // strides in elements
  bool bf16;
};

struct ScanArgs {
  ScanInput x, dt, z, B, C;         // x, dt, z share one dtype; z.data may be null
  const float *A, *D, *dt_bias;     // (d_inner, d_state), (d_inner), (d_inner); the last two may be null
  const float* initial;             // (batch, d_inner, d_state) or null
  void* y;                          // (batch, seqlen, d_inner), the dtype of x
  float* final;                     // (batch, d_inner, d_state)
  float* checkpoints;               // (slots, d_state, d_inner) or null
  const ScanTile* tiles;            // of row b: tiles[first_tile[b]] up to tiles[first_tile[b + 1]]
  const int64_t* first_tile;
  int64_t batch, seqlen, d_inner, d_state, groups;
  int64_t block, blocks;            // channels per task, tasks per group
  bool softplus;
};

// Tasks [begin, end) of batch * groups * blocks.
SEQLIB_KERNEL(selective_scan_fwd, ScanArgs)

struct ScanBackArgs {
  ScanArgs of;                  // the forward call; y and final are not used
  ScanInput dy;                 // the dtype of x
  const float* dfinal;          // (batch, d_inner, d_state) or null
  void *dx, *ddt, *dz;          // (batch, seqlen, d_inner), the dtype of x; dz is null without z
  float *dA, *dinitial;         // (batch, d_inner, d_state)
  float *dD, *dbias;            // (batch, d_inner)
  float *dB, *dC;               // (batch, groups, parts, seqlen, d_state), zero where no token is
  int64_t parts;                // of the channels of a group; fixed by the sizes so that sums have one order
};

// Tasks [begin, end) of batch * groups * parts. Channels go in blocks of kScanBackBlock.
constexpr int kScanBackBlock = 32;
SEQLIB_KERNEL(selective_scan_bwd, ScanBackArgs)

struct ScanStepArgs {
  ScanInput x, dt, z, B, C;  // as above, with one token per row; `row` is not used
  const float *A, *D, *dt_bias;
  void* y;       // (batch, d_inner)
  float* state;  // (batch, d_inner, d_state), updated
  int64_t d_inner, d_state, groups;
  bool softplus;
};

// Channels [begin, end) of batch * d_inner.
SEQLIB_KERNEL(selective_scan_step, ScanStepArgs)

// How long exponentials alone take: `repeats` passes over `count` numbers that fit L1, each replaced by 2^x.
struct ExpArgs {
  const float* from;
  float* to;
  int64_t count;
};
SEQLIB_KERNEL(exp_floor, ExpArgs)

}  // namespace seqlib

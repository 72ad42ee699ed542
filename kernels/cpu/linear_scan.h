#pragma once

#include <cstdint>

#include "isa.h"

namespace seqlib {

constexpr int64_t linear_scan_block = 2048;  // most floats of one task; their states stay in L1

// Positions [begin, end) of a row that follow each other, in the order of the scan. Fresh: from a zero state.
struct LinearRun {
  int64_t begin, end;
  bool fresh;
};

// A tensor (batch, seqlen, width) with unit stride along its last axis; strides are in elements, 0 where it is broadcast.
struct LinearInput {
  const void* data;
  int64_t batch, row;
  bool bf16;
};

// Complex numbers count as two neighbouring floats everywhere, in `width` too.
struct LinearArgs {
  LinearInput a, b;
  const float* initial;        // (batch, width) or null
  void* h;                     // (batch, seqlen, width), the dtype of b
  float* final;                // (batch, width)
  const LinearRun* runs;       // of row i: runs[first_run[i]] up to runs[first_run[i + 1]]
  const int64_t* first_run;
  int64_t seqlen, width, block, blocks;  // floats per task, tasks per row
  bool reverse, complex;
};

struct LinearBackArgs {
  LinearArgs of;          // the forward call with its h; b and final are not used
  LinearInput dh;         // the dtype of b
  const float* dfinal;    // (batch, width) or null
  float* da;              // (batch, seqlen, width), or (batch, width) if a is the same at every step
  void* db;               // (batch, seqlen, width), the dtype of b
  float* dinitial;        // (batch, width)
};

// Tasks [begin, end) of batch * blocks.
SEQLIB_KERNEL(linear_scan_fwd, LinearArgs)
SEQLIB_KERNEL(linear_scan_bwd, LinearBackArgs)

}  // namespace seqlib

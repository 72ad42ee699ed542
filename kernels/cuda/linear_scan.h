#pragma once

#include "view.h"

namespace seqlib {

constexpr int64_t linear_scan_tile = 128, linear_scan_channels = 32;  // positions and channels of a block at a time

struct LinearArgs {
  View a, b;                  // (batch or 1, seqlen or 1, width), (batch, seqlen, width); a stride is 0 where a is constant
  const void *initial, *h;    // (batch, width); of the backward pass: the output of the forward one
  void *out, *final;          // (batch, seqlen, width), the dtype of b; (batch, width)
  void* da;                   // backward: the shape of a with batch, or (batch * segments, width) sums for a constant a
  const int32_t* links;       // of SequenceInfo, or null
  void* maps;                 // (batch, segments, width) affine maps; then the states that enter the segments
  int64_t batch, seqlen, width;
  int64_t segment, segments;  // positions of a segment in the order of the scan, a multiple of the tile; their number
  bool reverse, complex;
};

// Forward: out = h, final = the last state. Backward: b = dh, initial = the gradient of the final state, out = db,
// final = the gradient of the state before the span (`before`, which the forward call took); the scan runs against `reverse`.
void start_linear_scan_fwd(const LinearArgs& args, Stream stream);
void start_linear_scan_bwd(const LinearArgs& args, const void* before, Stream stream);

}  // namespace seqlib

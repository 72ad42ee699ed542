// What bindings and kernels share: tensors as plain pointers, and how a kernel is started.
#pragma once

#include <cstdint>

namespace seqlib {

enum class Dtype : int32_t { f32, bf16, f16 };

// A tensor (batch, seqlen, [groups,] width) with unit stride along its last axis; strides in elements.
struct View {
  const void* data;
  int64_t batch, row, group;
  Dtype dtype;
};

// Where the real tokens around each token are: (2, batch, seqlen + 1), of SequenceInfo.links. [0]: the real token before
// it, or one of these; the last column stands after the row. [1]: the same from right to left.
constexpr int32_t link_none = -1;   // nothing there: before the first token is the initial state
constexpr int32_t link_fresh = -2;  // it is of another document
constexpr int32_t link_pad = -3;    // is padding

using Stream = void*;

}  // namespace seqlib

// Starting a kernel, on a stream or in the emulation. Only .cu files include this.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"

namespace seqlib {
namespace {

template <class Args>
void launch(void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes, Stream stream, const Args& args) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("the call needs more than 2^31 - 1 blocks; split its batch");
#ifdef SEQLIB_EMULATED
  (void)stream;
  emulation::machine().run(blocks, threads, shared_bytes, [&] { kernel(args); });
#else
  const auto check = [](cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
  };
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)));
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
  check(cudaGetLastError());
#endif
}

}  // namespace
}  // namespace seqlib

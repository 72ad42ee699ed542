// Kernels of one chain, each started while the one before still runs (sm_90 and later; elsewhere they run in turn).
//
// Until wait_for_previous() a kernel may only bring memory into the L2 cache, which sees every write. All of its threads
// wait before they read or write anything, so that who waits for it waits for the whole chain. Only .cu files include this.
#pragma once

#include "launch.h"

namespace seqlib {
namespace {

#if !defined(SEQLIB_EMULATED) && __CUDA_ARCH__ >= 900

SEQLIB_DEVICE void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
SEQLIB_DEVICE void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
// A span whose ends are multiples of 16 bytes, by one thread; and the line of one element.
SEQLIB_DEVICE void bring_near(const void* data, int64_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(data)),
               "r"(static_cast<uint32_t>(bytes))
               : "memory");
}
SEQLIB_DEVICE void touch(const void* data, Dtype dtype, int64_t at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(
      __cvta_generic_to_global(static_cast<const char*>(data) + at * (dtype == Dtype::f32 ? 4 : 2))));
}

#else

SEQLIB_DEVICE void wait_for_previous() {}
SEQLIB_DEVICE void let_next_start() {}
SEQLIB_DEVICE void bring_near(const void*, int64_t) {}
SEQLIB_DEVICE void touch(const void*, Dtype, int64_t) {}

#endif

// As launch(), for a kernel that calls wait_for_previous().
template <class Args>
void launch_next(void (*kernel)(Args), int64_t blocks, int threads, int64_t shared_bytes, bool overlap, Stream stream,
                 const Args& args) {
#ifdef SEQLIB_EMULATED
  (void)overlap;
#else
  int device = 0, major = 0;
  if (overlap && blocks > 0 && cudaGetDevice(&device) == cudaSuccess &&
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess && major >= 9) {
    allow_shared(kernel, shared_bytes);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &attribute;
    config.numAttrs = 1;
    return check_cuda(cudaLaunchKernelEx(&config, kernel, args));
  }
#endif
  launch(kernel, blocks, threads, shared_bytes, stream, args);
}

}  // namespace
}  // namespace seqlib

// Facts of the device.
#include <stdexcept>

#include "device.h"

namespace seqlib {

int multiprocessors(int device) {
#ifdef SEQLIB_EMULATED
  (void)device;
  return 1;
#else
  int count = 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    throw std::runtime_error("CUDA: the device does not tell its number of multiprocessors");
  return count;
#endif
}

void set_emulation_order(bool backwards) {
#ifdef SEQLIB_EMULATED
  emulation::machine().backwards = backwards;
#else
  (void)backwards;
#endif
}

}  // namespace seqlib

// CUDA on the host, for proofs without a GPU: the threads of a block are fibers that take turns at barriers.
//
// A warp runs until all of its lanes wait at the same point, a block until all of its warps do; anything else is reported
// as a divergent barrier. Fresh shared memory holds NaN. With `backwards` blocks, warps and lanes run in the opposite order:
// a result that changes by a single bit is a race.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include <ucontext.h>

namespace seqlib::emulation {

enum class Wait { nothing, warp, block, end };

class Fiber {
 public:
  // Runs the body until it waits or ends; returns what it waits for.
  Wait resume() {
    if (_setjmp(outside_) == 0) {
      if (started_) _longjmp(inside_, 1);
      started_ = true;
      setcontext(&context_);
    }
    return wait_;
  }

  void wait(Wait what) {
    wait_ = what;
    if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
  }

  void start(const std::function<void()>* body) {
    body_ = body;
    started_ = false;
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = stack_size;
    const auto self = reinterpret_cast<uintptr_t>(this);
    makecontext(&context_, reinterpret_cast<void (*)()>(&enter), 2, static_cast<unsigned>(self >> 32),
                static_cast<unsigned>(self));
  }

 private:
  static constexpr size_t stack_size = 128 * 1024;

  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low);
    (*self->body_)();
    self->wait(Wait::end);
  }

  std::unique_ptr<char[]> stack_{new char[stack_size]};
  const std::function<void()>* body_ = nullptr;
  ucontext_t context_{};
  jmp_buf inside_, outside_;
  Wait wait_ = Wait::nothing;
  bool started_ = false;
};

struct Machine {
  static constexpr int lanes = 32;

  bool backwards = false;
  int64_t block = 0, blocks = 0;
  int thread = 0, threads = 0;
  float* shared = nullptr;

  // The value that lane `from` of this warp gives to the same exchange. Two sets of slots, so that a lane that is ahead
  // cannot overwrite what another has still to read.
  template <class T>
  T exchange(T mine, int from) {
    uint64_t& turn = turns_[thread];
    std::vector<uint32_t>& slots = slots_[turn++ % 2];
    static_assert(sizeof(T) == 4);
    std::memcpy(&slots[thread], &mine, 4);
    wait(Wait::warp);
    T theirs;
    std::memcpy(&theirs, &slots[thread / lanes * lanes + from], 4);
    return theirs;
  }

  void wait(Wait what) {
    const int me = thread;
    fibers_[me]->wait(what);
    thread = me;
  }

  void run(int64_t grid, int block_threads, int64_t shared_bytes, const std::function<void()>& body) {
    if (block_threads % lanes) throw std::runtime_error("a block must be whole warps");
    blocks = grid;
    threads = block_threads;
    while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (int64_t i = 0; i < grid; ++i) {
      block = backwards ? grid - 1 - i : i;
      memory_.assign(shared_bytes / 4 + 8, std::numeric_limits<float>::quiet_NaN());
      shared = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_.data()) + 15) / 16 * 16);
      run_block(body);
    }
  }

 private:
  void run_block(const std::function<void()>& body) {
    turns_.assign(threads, 0);
    for (auto& slots : slots_) slots.assign(threads, 0);
    for (int t = 0; t < threads; ++t) fibers_[t]->start(&body);
    const int warps = threads / lanes;
    for (Wait all = Wait::block; all != Wait::end;) {
      Wait first = Wait::nothing;
      for (int w = 0; w < warps; ++w) {
        const Wait reached = run_warp(backwards ? warps - 1 - w : w);
        if (first == Wait::nothing) first = reached;
        if (reached != first) throw std::runtime_error("some warps of a block ended while others wait at a barrier");
      }
      all = first;
    }
  }

  Wait run_warp(int warp) {
    for (;;) {
      Wait all = Wait::nothing;
      for (int i = 0; i < lanes; ++i) {
        thread = warp * lanes + (backwards ? lanes - 1 - i : i);
        const Wait reached = fibers_[thread]->resume();
        if (all == Wait::nothing) all = reached;
        if (reached != all) throw std::runtime_error("lanes of a warp wait at different barriers");
      }
      if (all != Wait::warp) return all;
    }
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<uint64_t> turns_;
  std::vector<uint32_t> slots_[2];
  std::vector<float> memory_;
};

inline Machine& machine() {
  static Machine only;
  return only;
}

}  // namespace seqlib::emulation

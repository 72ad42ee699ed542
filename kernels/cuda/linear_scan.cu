// The elementwise recurrence: a block scans tiles of 128 positions by 32 channels, 16 positions in the registers of each
// thread; the warps' maps are composed in shared memory, and the state goes on to the next tile. One pass over memory.
//
// The gradient is the same scan in the other direction, with the decays shifted by one position and conjugated.
#include "linear_scan.h"

#include "launch.h"
#include "scan.cuh"

namespace seqlib {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kSteps = linear_scan_tile / kWarps;

struct PassArgs {
  LinearArgs of;
  const void* before;  // backward: the state before the span
};

// One block: a row, a segment and channels; places are counted in the order of the scan.
template <class N, bool Back>
struct Task {
  const LinearArgs& a;
  int64_t row, segment, channel, begin, end;
  bool valid, from_right;

  SEQLIB_DEVICE explicit Task(const LinearArgs& a_) : a(a_) {
    const int64_t across = (a.width + linear_scan_channels - 1) / linear_scan_channels;
    channel = block_index() % across * linear_scan_channels + thread_index() % 32;
    segment = block_index() / across % a.segments;
    row = block_index() / across / a.segments;
    begin = segment * a.segment;
    end = begin + a.segment < a.seqlen ? begin + a.segment : a.seqlen;
    valid = channel < a.width;
    from_right = a.reverse != Back;
  }

  SEQLIB_DEVICE int64_t position(int64_t place) const { return from_right ? a.seqlen - 1 - place : place; }
  // The token that the forward scan took before the one at position t.
  SEQLIB_DEVICE int32_t link(int64_t t) const {
    if (a.links) return a.links[((a.reverse ? a.batch : 0) + row) * (a.seqlen + 1) + t];
    const int64_t from = a.reverse ? t + 1 : t - 1;
    return from < 0 || from == a.seqlen ? link_none : static_cast<int32_t>(from);
  }
  SEQLIB_DEVICE N decay(int64_t t, int32_t link) const {
    if (link == link_pad) return N::one();
    if (link == link_fresh) return N::zero();
    return load_number<N>(a.a.data, a.a.dtype, row * a.a.batch + t * a.a.row + channel);
  }
  SEQLIB_DEVICE int64_t at(int64_t t) const { return (row * a.seqlen + t) * a.width + channel; }

  // The map of one place, and the link of its token. Places beyond the end do nothing, as padding does.
  SEQLIB_DEVICE Affine<N> map(int64_t place, int32_t& linked) const {
    linked = link_pad;
    if (!valid || place >= end) return Affine<N>::identity();
    const int64_t t = position(place);
    linked = link(t);
    Affine<N> made = Affine<N>::identity();
    if (!Back) made.a = decay(t, linked);
    else if (place > 0) made.a = conj(decay(position(place - 1), link(position(place - 1))));
    if (linked != link_pad) made.b = load_number<N>(a.b.data, a.b.dtype, row * a.b.batch + t * a.b.row + channel);
    return made;
  }
};

// Summarize: only the map of the whole segment.
template <class N, bool Back, bool Summarize>
SEQLIB_GLOBAL(kThreads, 2) scan(const PassArgs p) {
  const LinearArgs& a = p.of;
  const Task<N, Back> task(a);
  auto* room = shared_memory<Affine<N>>();
  const int warp = thread_index() / 32;
  const int64_t state = task.row * a.width + task.channel, entry = (task.row * a.segments + task.segment) * a.width + task.channel;
  const bool constant = a.a.row == 0 && a.seqlen > 1;
  auto* maps = static_cast<Affine<N>*>(a.maps);

  Affine<N> all = Affine<N>::identity();
  N h = N::zero(), da_sum = N::zero();
  if (!Summarize && task.valid) {
    if (a.segments > 1) h = maps[entry].b;
    else if (a.initial) h = static_cast<const N*>(a.initial)[state];
  }
  for (int64_t tile = task.begin; tile < task.end; tile += linear_scan_tile) {
    Affine<N> map[kSteps], mine = Affine<N>::identity();
    int32_t link[kSteps];
    const int64_t first = tile + warp * kSteps;
    SEQLIB_UNROLL
    for (int j = 0; j < kSteps; ++j) map[j] = task.map(first + j, link[j]);
    SEQLIB_UNROLL
    for (int j = 0; j < kSteps; ++j) mine = mine.then(map[j]);
    const Composed<N> made = compose_warps<kWarps>(mine, room);
    if constexpr (Summarize) {
      all = all.then(made.all);
    } else {
      N now = made.before(h);
      h = made.all(h);
      SEQLIB_UNROLL
      for (int j = 0; j < kSteps; ++j) {
        now = map[j](now);
        if (task.valid && first + j < task.end) {
          const int64_t t = task.position(first + j);
          const bool real = link[j] != link_pad;
          store_number<N>(a.out, a.b.dtype, task.at(t), real ? now : N::zero());
          if constexpr (Back) {
            N earlier = N::zero();  // the state before this token
            if (link[j] >= 0) earlier = load_number<N>(a.h, a.b.dtype, task.at(link[j]));
            if (link[j] == link_none && p.before) earlier = static_cast<const N*>(p.before)[state];
            const N da = real ? now * conj(earlier) : N::zero();
            if (constant) da_sum = da_sum + da;
            else static_cast<N*>(a.da)[task.at(t)] = da;
          }
        }
      }
    }
    sync_block();
  }
  if constexpr (Summarize) {
    if (task.valid && warp == 0) maps[entry] = all;
  } else {
    if (task.valid && warp == 0 && task.end == a.seqlen) {
      if constexpr (Back) {
        const int64_t t = task.position(a.seqlen - 1);
        h = conj(task.decay(t, task.link(t))) * h;
      }
      static_cast<N*>(a.final)[state] = h;
    }
    if constexpr (Back) {
      if (constant) {
        auto* sums = reinterpret_cast<N*>(room);
        sums[thread_index()] = da_sum;
        sync_block();
        if (task.valid && warp == 0) {
          N sum = N::zero();
          SEQLIB_UNROLL
          for (int w = 0; w < kWarps; ++w) sum = sum + sums[w * 32 + thread_index()];
          static_cast<N*>(a.da)[entry] = sum;
        }
      }
    }
  }
}

// From the maps of the segments, the state that enters each of them: a block-wide scan, each warp with its share.
template <class N>
SEQLIB_GLOBAL(kThreads, 1) combine(const LinearArgs a) {
  const int64_t across = (a.width + linear_scan_channels - 1) / linear_scan_channels;
  const int64_t row = block_index() / across, channel = block_index() % across * linear_scan_channels + thread_index() % 32;
  const int64_t share = (a.segments + kWarps - 1) / kWarps, first = thread_index() / 32 * share;
  const bool valid = channel < a.width;
  auto* maps = static_cast<Affine<N>*>(a.maps) + row * a.segments * a.width + channel;
  Affine<N> mine = Affine<N>::identity();
  for (int64_t s = first; s < first + share && s < a.segments; ++s) {
    if (valid) mine = mine.then(maps[s * a.width]);
  }
  const Composed<N> made = compose_warps<kWarps>(mine, shared_memory<Affine<N>>());
  N h = a.initial && valid ? static_cast<const N*>(a.initial)[row * a.width + channel] : N::zero();
  h = made.before(h);
  for (int64_t s = first; s < first + share && s < a.segments; ++s) {
    if (valid) {
      const Affine<N> map = maps[s * a.width];
      maps[s * a.width].b = h;
      h = map(h);
    }
  }
}

template <class N, bool Back>
void run(const PassArgs& p, Stream stream) {
  const LinearArgs& a = p.of;
  const int64_t across = (a.width + linear_scan_channels - 1) / linear_scan_channels;
  constexpr int64_t room = kThreads * sizeof(Affine<N>);
  if (a.segments > 1) {
    launch(scan<N, Back, true>, a.batch * a.segments * across, kThreads, room, stream, p);
    launch(combine<N>, a.batch * across, kThreads, room, stream, a);
  }
  launch(scan<N, Back, false>, a.batch * a.segments * across, kThreads, room, stream, p);
}

}  // namespace

void start_linear_scan_fwd(const LinearArgs& a, Stream stream) {
  return a.complex ? run<Complex, false>({a, nullptr}, stream) : run<Real, false>({a, nullptr}, stream);
}

void start_linear_scan_bwd(const LinearArgs& a, const void* before, Stream stream) {
  return a.complex ? run<Complex, true>({a, before}, stream) : run<Real, true>({a, before}, stream);
}

}  // namespace seqlib

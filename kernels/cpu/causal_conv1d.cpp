#include "causal_conv1d.h"

#include <algorithm>
#include <cstring>
#include <tuple>

#include "parallel.h"
#include "steps.h"

namespace seqlib {
namespace {

constexpr int64_t piece_length = 128;

// Which tokens follow each other: the spans cut into pieces, and the inputs around each piece.
struct Plan {
  std::vector<ConvPiece> pieces;
  std::vector<int32_t> before, after, last;
  bool covers = true;  // every position is a real token

  Plan(int64_t batch, int64_t seqlen, int64_t past, bool has_state, const OptTensor& spans) {
    int64_t count = batch, real = 0;
    const int32_t* span = nullptr;
    if (spans) {
      STD_TORCH_CHECK(spans->scalar_type() == Scalar::Int && spans->dim() == 2 && spans->size(1) == 4 &&
                          spans->is_contiguous(),
                      "spans must be the int32 list of SequenceInfo.spans");
      count = spans->size(0);
      span = data<const int32_t>(*spans);
    }
    std::vector<int32_t> window(past);
    int64_t i = 0;
    for (int64_t row = 0; row < batch; ++row) {
      for (int64_t k = 0; k < past; ++k) window[k] = has_state ? conv_state_slot - static_cast<int32_t>(k) : conv_zero;
      const size_t first = pieces.size();
      for (; i < count && (span ? span[4 * i] : i) == row; ++i) {
        const int64_t begin = span ? span[4 * i + 1] : 0, end = span ? span[4 * i + 2] : seqlen;
        STD_TORCH_CHECK(0 <= begin && begin < end && end <= seqlen, "span out of range");
        if (span && span[4 * i + 3]) window.assign(past, conv_zero);
        for (int64_t t = begin; t < end; t += piece_length) {
          const ConvPiece piece{row, t, std::min(end, t + piece_length)};
          pieces.push_back(piece);
          before.insert(before.end(), window.begin(), window.end());
          for (int64_t at = std::max(piece.begin, piece.end - past); past && at < piece.end; ++at) {
            window.erase(window.begin());
            window.push_back(static_cast<int32_t>(at));
          }
        }
        real += end - begin;
      }
      last.insert(last.end(), window.begin(), window.end());
      follow(first, past);
    }
    STD_TORCH_CHECK(i == count, "spans must be ordered by row, each below ", batch);
    covers = real == batch * seqlen;
  }

  // Fills `after` for the pieces of one row, from the last to the first: `before` tells which of them go on.
  void follow(size_t first, int64_t past) {
    after.resize(pieces.size() * past, conv_zero);
    for (size_t p = pieces.size(); p-- > first + 1 && past;) {
      if (before[(p + 1) * past - 1] != static_cast<int32_t>(pieces[p - 1].end - 1)) continue;
      const ConvPiece& next = pieces[p];
      int32_t* mine = &after[(p - 1) * past];
      const int64_t own = std::min(past, next.end - next.begin);
      for (int64_t k = 0; k < own; ++k) mine[k] = static_cast<int32_t>(next.begin + k);
      for (int64_t k = own; k < past; ++k) mine[k] = after[p * past + k - own];
    }
  }
};

Tensor rows_of_channels(const Tensor& t) { return t.stride(-1) == 1 ? t : torch::stable::contiguous(t); }

// (d, width) in any dtype to (width, d) in float32.
Tensor taps(const Tensor& weight) {
  const Tensor wide = torch::stable::to(weight, Scalar::Float);
  return torch::stable::contiguous(torch::stable::transpose(wide, 0, 1));
}

OptTensor contiguous(const OptTensor& t, std::optional<Scalar> dtype = std::nullopt) {
  if (!t) return std::nullopt;
  return torch::stable::contiguous(dtype ? torch::stable::to(*t, *dtype) : *t);
}

// The tensors that the arguments point into live as long as this.
struct Call {
  Tensor x, weight;
  OptTensor bias, state;
  Plan plan;
  ConvArgs args{};

  Call(const Tensor& x_, const Tensor& weight_, const OptTensor& bias_, const OptTensor& state_, const OptTensor& spans,
       bool silu)
      : x(rows_of_channels(x_)),
        weight(taps(weight_)),
        bias(contiguous(bias_, Scalar::Float)),
        state(contiguous(state_)),
        plan(x.size(0), x.size(1), weight.size(0) - 1, state.has_value(), spans) {
    check_float(x, "x");
    args.x = x.data_ptr();
    args.weight = data<float>(weight);
    args.bias = data<float>(bias);
    args.state = data<char>(state);
    args.pieces = plan.pieces.data();
    args.before = plan.before.data();
    args.after = plan.after.data();
    args.last = plan.last.data();
    args.npieces = static_cast<int64_t>(plan.pieces.size());
    args.partitions = std::min<int64_t>(args.npieces, 32);
    args.seqlen = x.size(1);
    args.d = x.size(2);
    args.width = weight.size(0);
    args.x_row = x.stride(0);
    args.x_step = x.stride(1);
    args.bf16 = is_bf16(x);
    args.silu = silu;
    STD_TORCH_CHECK(args.width >= 1 && args.width <= conv_max_width, "d_conv must be 1 to ", conv_max_width);
  }

  template <class Kernel>
  void run(Kernel kernel) const {
    const int64_t blocks = (args.d + conv_block - 1) / conv_block, tasks = args.partitions * blocks;
    const int64_t work = tasks ? x.numel() / tasks : 1;
    parallel(tasks, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)),
             [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }

  // Padded positions are no one's task and stay zero.
  Tensor output() const {
    return plan.covers ? empty_as(x) : torch::stable::new_zeros(x, {x.size(0), x.size(1), x.size(2)});
  }
};

std::tuple<Tensor, Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const OptTensor& bias,
                                         const OptTensor& state, const OptTensor& spans, bool silu) {
  Call call(x, weight, bias, state, spans, silu);
  ConvArgs& a = call.args;
  Tensor y = call.output();
  a.y = y.data_ptr();
  call.run(causal_conv1d_fwd_for());

  const int64_t batch = x.size(0), past = a.width - 1, bytes = a.bf16 ? 2 : 4;
  Tensor final_state = torch::stable::new_empty(x, {batch, past, a.d});
  for (int64_t i = 0; i < batch * past; ++i) {
    const int64_t at = a.last[i], row = i / past;
    char* to = data<char>(final_state) + i * a.d * bytes;
    if (at == conv_zero)
      std::memset(to, 0, a.d * bytes);
    else if (at >= 0)
      std::memcpy(to, static_cast<const char*>(a.x) + (row * a.x_row + at * a.x_step) * bytes, a.d * bytes);
    else
      std::memcpy(to, static_cast<const char*>(a.state) + (row * past + conv_state_slot - at) * a.d * bytes, a.d * bytes);
  }
  return {y, final_state};
}

// Returns dx, the gradients of weight and bias as (width + 1, d) float32, and dstate (empty without a state).
std::tuple<Tensor, Tensor, Tensor> causal_conv1d_bwd(const Tensor& dy, const OptTensor& dfinal, const Tensor& x,
                                                     const Tensor& weight, const OptTensor& bias, const OptTensor& state,
                                                     const OptTensor& spans, bool silu) {
  Call call(x, weight, bias, state, spans, silu);
  ConvArgs& a = call.args;
  const Tensor dys = rows_of_channels(dy);
  const OptTensor dfinals = contiguous(dfinal);
  Tensor dx = call.output(), dstate = torch::stable::new_zeros(x, {state ? x.size(0) : 0, a.width - 1, a.d});
  Tensor partial = torch::stable::new_empty(x, {a.partitions, a.width + 1, a.d}, Scalar::Float);
  a.dy = dys.data_ptr();
  a.dy_row = dys.stride(0);
  a.dy_step = dys.stride(1);
  a.dfinal = data<char>(dfinals);
  a.dx = dx.data_ptr();
  a.dstate = state ? dstate.data_ptr() : nullptr;
  a.partial = data<float>(partial);
  call.run(causal_conv1d_bwd_for());
  if (dfinals) causal_conv1d_bwd_final_for()(a, 0, x.size(0));
  std::vector<int64_t> over{0};
  return {dx, torch::stable::sum(partial, over), dstate};
}

}  // namespace

Tensor causal_conv1d_step(const Tensor& x, const Tensor& weight, const OptTensor& bias, Tensor state, bool silu) {
  check_float(x, "x");
  STD_TORCH_CHECK(state.is_contiguous() && state.scalar_type() == x.scalar_type(), "state must be contiguous, like x");
  const Tensor xs = rows_of_channels(x), w = torch::stable::contiguous(weight);
  const OptTensor b = contiguous(bias);
  check_float(w, "weight");
  if (b) check_float(*b, "bias");
  STD_TORCH_CHECK(w.size(1) <= conv_max_width, "d_conv must be 1 to ", conv_max_width);
  Tensor y = empty_as(x);
  const ConvStepArgs a{xs.data_ptr(), w.data_ptr(), data<char>(b), state.data_ptr(), y.data_ptr(), x.size(0), x.size(1),
                       w.size(1), xs.stride(0), is_bf16(x), silu, is_bf16(w), b && is_bf16(*b)};
  const int64_t blocks = (a.d + conv_block - 1) / conv_block;
  parallel(blocks, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, a.batch * conv_block)),
           [&](int64_t begin, int64_t end) { causal_conv1d_step_for()(a, begin, end); });
  return y;
}

}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("causal_conv1d", TORCH_BOX(&seqlib::causal_conv1d));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&seqlib::causal_conv1d_bwd));
  m.impl("causal_conv1d_step", TORCH_BOX(&seqlib::causal_conv1d_step));
}

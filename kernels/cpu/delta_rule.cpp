#include "delta_rule.h"

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "seqlib.h"

namespace seqlib {
namespace {

Tensor unit_last(const Tensor& t) { return t.stride(-1) == 1 ? t : torch::stable::contiguous(t); }

Tensor to_f32(const Tensor& t) { return torch::stable::contiguous(torch::stable::to(t, Scalar::Float)); }

OptTensor to_f32(const OptTensor& t) { return t ? OptTensor(to_f32(*t)) : std::nullopt; }

// t is (batch, seqlen, heads, width) or, for one token, (batch, heads, width).
DeltaInput input(const Tensor& t, int64_t nheads) {
  const bool steps = t.dim() == 4;
  return {t.data_ptr(), t.stride(0), steps ? t.stride(1) : 0, t.stride(-2), nheads / t.size(-2)};
}

Decay decay_of(const OptTensor& log_decay, const Tensor& beta) {
  return !log_decay ? Decay::none : log_decay->dim() == beta.dim() ? Decay::token : Decay::channel;
}

void check(const Tensor& q, const Tensor& k, const Tensor& v) {
  check_float(v, "v");
  STD_TORCH_CHECK(q.scalar_type() == v.scalar_type() && k.scalar_type() == v.scalar_type(), "q, k and v differ in dtype");
  STD_TORCH_CHECK(k.size(-1) == q.size(-1) && k.size(-1) <= delta_max_state, "d_state must be at most ", delta_max_state);
}

// The spans cut into pieces.
struct Plan {
  std::vector<DeltaPiece> pieces;
  std::vector<int64_t> first;
  int64_t saved = 0;

  Plan(int64_t batch, int64_t seqlen, const OptTensor& spans) {
    int64_t count = batch, i = 0;
    const int32_t* span = nullptr;
    if (spans) {
      STD_TORCH_CHECK(spans->scalar_type() == Scalar::Int && spans->dim() == 2 && spans->size(1) == 4 &&
                          spans->is_contiguous(),
                      "spans must be the int32 list of SequenceInfo.spans");
      count = spans->size(0);
      span = data<const int32_t>(*spans);
    }
    for (int64_t row = 0; row < batch; ++row) {
      first.push_back(static_cast<int64_t>(pieces.size()));
      for (; i < count && (span ? span[4 * i] : i) == row; ++i) {
        const int64_t begin = span ? span[4 * i + 1] : 0, end = span ? span[4 * i + 2] : seqlen;
        STD_TORCH_CHECK(0 <= begin && begin < end && end <= seqlen, "span out of range");
        bool fresh = span && span[4 * i + 3];
        for (int64_t t = begin; t < end; t += delta_piece, fresh = false)
          pieces.push_back({t, std::min(end, t + delta_piece), fresh ? delta_fresh : saved++});
      }
    }
    STD_TORCH_CHECK(i == count, "spans must be ordered by row, each below ", batch);
    first.push_back(static_cast<int64_t>(pieces.size()));
  }
};

// The tensors that the arguments point into live as long as this.
struct Call {
  Tensor q, k, v, beta;
  OptTensor log_decay, state;
  Plan plan;
  DeltaArgs args{};

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const Tensor& beta_, const OptTensor& log_decay_,
       const OptTensor& state_, const OptTensor& spans, double scale)
      : q(unit_last(q_)),
        k(unit_last(k_)),
        v(unit_last(v_)),
        beta(to_f32(beta_)),
        log_decay(to_f32(log_decay_)),
        state(to_f32(state_)),
        plan(v.size(0), v.size(1), spans) {
    check(q, k, v);
    args.batch = v.size(0);
    args.seqlen = v.size(1);
    args.nheads = v.size(2);
    args.headdim = v.size(3);
    args.d_state = k.size(3);
    args.q = input(q, args.nheads);
    args.k = input(k, args.nheads);
    args.v = input(v, args.nheads);
    args.beta = data<float>(beta);
    args.log_decay = data<float>(log_decay);
    args.initial_state = data<float>(state);
    args.pieces = plan.pieces.data();
    args.first_piece = plan.first.data();
    args.parts = 1;
    args.scale = static_cast<float>(scale);
    args.decay = decay_of(log_decay, beta);
    args.bf16 = is_bf16(v);
  }

  std::vector<int64_t> state_shape(int64_t first) const { return {first, args.nheads, args.d_state, args.headdim}; }
};

std::tuple<Tensor, Tensor, Tensor> delta_rule(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta,
                                              const OptTensor& log_decay, const OptTensor& initial_state,
                                              const OptTensor& spans, double scale, bool save) {
  Call call(q, k, v, beta, log_decay, initial_state, spans, scale);
  DeltaArgs& a = call.args;
  // Padded positions are no one's task and stay zero.
  const std::vector<int64_t> shape{a.batch, a.seqlen, a.nheads, a.headdim};
  Tensor y = spans ? torch::stable::new_zeros(v, shape) : torch::stable::new_empty(v, shape);
  Tensor final_state = empty_f32(v, call.state_shape(a.batch));
  Tensor saved = empty_f32(v, call.state_shape(save ? call.plan.saved : 0));
  a.y = y.data_ptr();
  a.final_state = data<float>(final_state);
  a.saved = save ? data<float>(saved) : nullptr;
  // Columns are independent: with fewer heads than threads, threads share the columns of a head.
  const int64_t heads = a.batch * a.nheads, threads = torch::stable::get_num_threads();
  if (0 < heads && heads < threads) a.parts = std::clamp<int64_t>(a.headdim / 32, 1, (threads + heads - 1) / heads);
  const int64_t work = std::max<int64_t>(1, a.seqlen * a.d_state * a.headdim / a.parts);
  parallel(heads * a.parts, std::max<int64_t>(1, 65536 / work),
           [&](int64_t begin, int64_t end) { delta_rule_fwd_for()(a, begin, end); });
  return {y, final_state, saved};
}

// Gradients of q and k (per value head), v, beta, log_decay and the initial state, in float32; empty where there is none.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> delta_rule_bwd(
    const Tensor& dy, const OptTensor& dfinal, const Tensor& saved, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& beta, const OptTensor& log_decay, const OptTensor& initial_state, const OptTensor& spans,
    double scale) {
  Call call(q, k, v, beta, log_decay, initial_state, spans, scale);
  DeltaArgs& a = call.args;
  check_f32(saved, "saved");
  STD_TORCH_CHECK(dy.scalar_type() == v.scalar_type(), "dy must have the dtype of v");
  STD_TORCH_CHECK(saved.size(0) == call.plan.saved, "saved must be what the forward pass returned");
  a.saved = data<float>(saved);
  const Tensor dys = unit_last(dy);
  const OptTensor dfinals = to_f32(dfinal);
  // Positions in no span keep a gradient of zero.
  auto made = [&](std::vector<int64_t> shape) {
    return spans ? torch::stable::new_zeros(v, shape, Scalar::Float) : empty_f32(v, shape);
  };
  Tensor dq = made({a.batch, a.seqlen, a.nheads, a.d_state}), dk = made({a.batch, a.seqlen, a.nheads, a.d_state});
  Tensor dv = made({a.batch, a.seqlen, a.nheads, a.headdim}), dbeta = made({a.batch, a.seqlen, a.nheads});
  Tensor dlog = made(log_decay ? std::vector<int64_t>(log_decay->sizes().begin(), log_decay->sizes().end())
                               : std::vector<int64_t>{0});
  Tensor dstate = empty_f32(v, call.state_shape(initial_state ? a.batch : 0));
  const DeltaGradArgs g{a,
                        input(dys, a.nheads),
                        data<float>(dfinals),
                        data<float>(dq),
                        data<float>(dk),
                        data<float>(dv),
                        data<float>(dbeta),
                        data<float>(dlog),
                        initial_state ? data<float>(dstate) : nullptr};
  const int64_t work = std::max<int64_t>(1, a.seqlen * a.d_state * a.headdim);
  parallel(a.batch * a.nheads, std::max<int64_t>(1, 16384 / work),
           [&](int64_t begin, int64_t end) { delta_rule_bwd_for()(g, begin, end); });
  return {dq, dk, dv, dbeta, dlog, dstate};
}

Tensor delta_rule_step(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& beta, const OptTensor& log_decay,
                       Tensor state, double scale) {
  check(q, k, v);
  check_f32(state, "state");
  const Tensor qs = unit_last(q), ks = unit_last(k), vs = unit_last(v), betas = to_f32(beta);
  const OptTensor decays = to_f32(log_decay);
  const int64_t nheads = v.size(1);
  Tensor y = torch::stable::new_empty(v, {v.size(0), nheads, v.size(2)});
  const DeltaStepArgs a{input(qs, nheads),     input(ks, nheads),   input(vs, nheads),
                        data<float>(betas),    data<float>(decays), data<float>(state),
                        y.data_ptr(),          nheads,              k.size(2),
                        v.size(2),             static_cast<float>(scale),
                        decay_of(decays, betas), is_bf16(v)};
  parallel(v.size(0) * nheads, std::max<int64_t>(1, 32768 / (a.d_state * a.headdim)),
           [&](int64_t begin, int64_t end) { delta_rule_step_for()(a, begin, end); });
  return y;
}

}  // namespace
}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("delta_rule", TORCH_BOX(&seqlib::delta_rule));
  m.impl("delta_rule_bwd", TORCH_BOX(&seqlib::delta_rule_bwd));
  m.impl("delta_rule_step", TORCH_BOX(&seqlib::delta_rule_step));
}

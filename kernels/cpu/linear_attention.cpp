#include "linear_attention.h"

#include <algorithm>
#include <tuple>

#include "parallel.h"
#include "steps.h"

namespace seqlib {
namespace {

// The real tokens of a batch as spans, and the checkpoints that each of them needs, one every `run` tokens.
struct Plan {
  std::vector<AttentionSpan> spans;
  std::vector<int64_t> first_span{0};
  int64_t checkpoints = 0;
  bool covers = true;  // every position is a real token

  Plan(int64_t batch, int64_t seqlen, int64_t run, const OptTensor& given) {
    int64_t count = batch, real = 0, i = 0;
    const int32_t* span = nullptr;
    if (given) {
      STD_TORCH_CHECK(given->scalar_type() == Scalar::Int && given->dim() == 2 && given->size(1) == 4 &&
                          given->is_contiguous(),
                      "spans must be the int32 list of SequenceInfo.spans");
      count = given->size(0);
      span = data<const int32_t>(*given);
    }
    for (int64_t row = 0; row < batch; ++row) {
      for (; i < count && (span ? span[4 * i] : i) == row; ++i) {
        const int64_t begin = span ? span[4 * i + 1] : 0, end = span ? span[4 * i + 2] : seqlen;
        STD_TORCH_CHECK(0 <= begin && begin < end && end <= seqlen, "span out of range");
        spans.push_back({begin, end, checkpoints, span && span[4 * i + 3]});
        checkpoints += (end - begin + run - 1) / run;
        real += end - begin;
      }
      first_span.push_back(static_cast<int64_t>(spans.size()));
    }
    STD_TORCH_CHECK(i == count, "spans must be ordered by row, each below ", batch);
    covers = real == batch * seqlen;
  }
};

OptTensor floats(const OptTensor& t) {
  return t ? OptTensor(torch::stable::contiguous(torch::stable::to(*t, Scalar::Float))) : std::nullopt;
}

Tensor unit_stride(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) == 1 ? t : torch::stable::contiguous(t);
}

// (batch, [seqlen,] heads, width) as the kernel sees it.
Heads heads(const Tensor& t, int64_t nheads) {
  const int64_t axes = t.dim();
  return {t.data_ptr(), t.stride(0),           axes == 4 ? t.stride(1) : 0, t.stride(axes - 2),
          nheads / t.size(axes - 2), is_bf16(t)};
}

// The tensors that the arguments point into live as long as this.
struct Call {
  Tensor q, k, v;
  OptTensor log_decay, initial;
  bool per_channel;
  int64_t chunk, every;
  Plan plan;
  AttentionArgs args{};

  Call(const Tensor& q_, const Tensor& k_, const Tensor& v_, const OptTensor& log_decay_, const OptTensor& initial_,
       const OptTensor& spans, double scale)
      : q(unit_stride(q_)), k(unit_stride(k_)), v(unit_stride(v_)), log_decay(floats(log_decay_)),
        initial(floats(initial_)), per_channel(log_decay && log_decay->dim() == 4),
        chunk(per_channel ? kChannelChunk : kAttentionChunk),
        // States between checkpoints are made again in the backward pass and should fit the cache.
        every(std::clamp<int64_t>(32768 / (k_.size(3) * v_.size(3)), 1, 8)),
        plan(v_.size(0), v_.size(1), every * chunk, spans) {
    check_float(v, "v");
    STD_TORCH_CHECK(q.scalar_type() == v.scalar_type() && k.scalar_type() == v.scalar_type(),
                    "q, k, v must share a dtype");
    AttentionArgs& a = args;
    a.batch = v.size(0);
    a.seqlen = v.size(1);
    a.nheads = v.size(2);
    a.headdim = v.size(3);
    a.d_state = k.size(3);
    a.q = heads(q, a.nheads);
    a.k = heads(k, a.nheads);
    a.v = heads(v, a.nheads);
    a.log_decay = data<float>(log_decay);
    if (log_decay && log_decay->dim() == 1) {
      a.decay_head = 1;
    } else if (log_decay) {
      a.decay_batch = log_decay->stride(0);
      a.decay_row = log_decay->stride(1);
      a.decay_head = log_decay->stride(2);
    }
    a.initial = data<float>(initial);
    a.spans = plan.spans.data();
    a.first_span = plan.first_span.data();
    a.parts = 1;
    a.part_width = a.headdim;
    a.every = every;
    a.scale = static_cast<float>(scale);
  }

  Tensor output(const Tensor& like, std::vector<int64_t> shape, bool wide = false) const {
    const auto dtype = wide ? Scalar::Float : like.scalar_type();
    return plan.covers ? torch::stable::new_empty(like, shape, dtype) : torch::stable::new_zeros(like, shape, dtype);
  }
  Tensor states(int64_t count) const { return empty_f32(v, {count, args.nheads, args.d_state, args.headdim}); }
  // Multiply-adds of one task.
  int64_t work(int64_t width) const {
    return args.seqlen * (chunk * (args.d_state + width) / 2 + args.d_state * width * 2);
  }
};

std::tuple<Tensor, Tensor, Tensor> linear_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const OptTensor& log_decay, const OptTensor& initial_state,
                                                    const OptTensor& spans, double scale, bool keep) {
  Call call(q, k, v, log_decay, initial_state, spans, scale);
  AttentionArgs& a = call.args;
  Tensor y = call.output(v, {a.batch, a.seqlen, a.nheads, a.headdim}), final = call.states(a.batch);
  Tensor checkpoints = call.states(keep ? call.plan.checkpoints : 0);
  a.y = heads(y, a.nheads);
  a.final = data<float>(final);
  a.checkpoints = keep ? data<float>(checkpoints) : nullptr;
  // Columns of v are independent: parts repeat the scores and nothing else, and give the same numbers.
  const int64_t tasks = a.batch * a.nheads, threads = torch::stable::get_num_threads();
  if (0 < tasks && tasks < threads) {
    const int64_t wanted = std::min((threads + tasks - 1) / tasks, (a.headdim + 31) / 32);
    a.part_width = ((a.headdim + wanted - 1) / wanted + 15) / 16 * 16;
    a.parts = (a.headdim + a.part_width - 1) / a.part_width;
  }
  const int64_t grain = std::max<int64_t>(1, 40000 / call.work(a.part_width));
  auto kernel = call.per_channel ? linear_attention_channel_fwd_for() : linear_attention_fwd_for();
#if defined(__x86_64__) || defined(_M_X64)
  if (isa() == Isa::avx512bf16 && a.v.bf16 && !call.per_channel) kernel = avx512bf16::linear_attention_fwd;
#endif
  parallel(tasks * a.parts, grain, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
  return {y, final, checkpoints};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_attention_bwd(
    const Tensor& dy, const OptTensor& dfinal, const Tensor& q, const Tensor& k, const Tensor& v,
    const OptTensor& log_decay, const OptTensor& initial_state, const OptTensor& spans,
    const Tensor& checkpoints, double scale, bool needs_decay) {
  Call call(q, k, v, log_decay, initial_state, spans, scale);
  check_f32(checkpoints, "checkpoints");
  STD_TORCH_CHECK(checkpoints.size(0) == call.plan.checkpoints, "checkpoints are not those of the forward call");
  const Tensor dys = unit_stride(dy);
  STD_TORCH_CHECK(dys.scalar_type() == v.scalar_type(), "dy must have the dtype of v");
  const OptTensor dlast = floats(dfinal);
  AttentionBackArgs g{};
  g.of = call.args;
  AttentionArgs& a = g.of;
  a.checkpoints = data<float>(checkpoints);
  g.dy = heads(dys, a.nheads);
  g.dfinal = data<float>(dlast);
  g.constant = log_decay && log_decay->dim() == 1;
  // Gradients of shared heads are summed afterwards, so they stay in float32 until then.
  std::vector<int64_t> keys{a.batch, a.seqlen, a.nheads, a.d_state};
  Tensor dq = call.output(q, keys, a.q.shared > 1), dk = call.output(k, keys, a.k.shared > 1);
  Tensor dv = call.output(v, {a.batch, a.seqlen, a.nheads, a.headdim});
  Tensor dinitial = call.states(a.batch);
  std::vector<int64_t> decays{a.batch, a.seqlen, a.nheads};
  if (call.per_channel) decays.push_back(a.d_state);
  if (!needs_decay) decays = {0};
  if (g.constant && needs_decay) decays = {a.batch, a.nheads};
  Tensor dlog_decay = torch::stable::new_zeros(v, decays, Scalar::Float);
  g.dq = heads(dq, a.nheads);
  g.dk = heads(dk, a.nheads);
  g.dv = heads(dv, a.nheads);
  g.dlog_decay = needs_decay ? data<float>(dlog_decay) : nullptr;
  g.dinitial = data<float>(dinitial);
  const int64_t grain = std::max<int64_t>(1, 20000 / call.work(a.headdim));
  const auto kernel = call.per_channel ? linear_attention_channel_bwd_for() : linear_attention_bwd_for();
  parallel(a.batch * a.nheads, grain, [&](int64_t begin, int64_t end) { kernel(g, begin, end); });
  auto over = [](const Tensor& t, int64_t axis) { return torch::stable::sum(t, std::vector<int64_t>{axis}); };
  auto per_head = [&](const Tensor& t, int64_t shared) {
    return shared == 1 ? t : over(torch::stable::view(t, {a.batch, a.seqlen, a.nheads / shared, shared, a.d_state}), 3);
  };
  return {per_head(dq, a.q.shared), per_head(dk, a.k.shared), dv,
          g.constant && needs_decay ? over(dlog_decay, 0) : dlog_decay, dinitial};
}

}  // namespace

Tensor linear_attention_step(const Tensor& q, const Tensor& k, const Tensor& v, const OptTensor& log_decay,
                             Tensor state, double scale) {
  check_f32(state, "state");
  check_float(v, "v");
  STD_TORCH_CHECK(q.scalar_type() == v.scalar_type() && k.scalar_type() == v.scalar_type(),
                  "q, k, v must share a dtype");
  const Tensor qs = unit_stride(q), ks = unit_stride(k), vs = unit_stride(v);
  const OptTensor decays = floats(log_decay);
  AttentionStepArgs a{};
  a.nheads = v.size(1);
  a.headdim = v.size(2);
  a.d_state = k.size(2);
  a.q = heads(qs, a.nheads);
  a.k = heads(ks, a.nheads);
  a.v = heads(vs, a.nheads);
  a.log_decay = data<float>(decays);
  if (decays) {
    const int64_t axes = decays->dim();
    a.decay_batch = axes > 1 ? decays->stride(0) : 0;
    a.decay_head = decays->stride(axes > 1 ? 1 : 0);
    a.decay_channel = axes > 2 ? 1 : 0;
  }
  a.state = data<float>(state);
  a.scale = static_cast<float>(scale);
  Tensor y = torch::stable::new_empty(v, {v.size(0), a.nheads, a.headdim});
  a.y = heads(y, a.nheads);
  parallel(v.size(0) * a.nheads, std::max<int64_t>(1, 40000 / (a.d_state * a.headdim)),
           [&](int64_t begin, int64_t end) { linear_attention_step_for()(a, begin, end); });
  return y;
}

}  // namespace seqlib

STABLE_TORCH_LIBRARY_IMPL(seqlib, CPU, m) {
  m.impl("linear_attention", TORCH_BOX(&seqlib::linear_attention));
  m.impl("linear_attention_bwd", TORCH_BOX(&seqlib::linear_attention_bwd));
  m.impl("linear_attention_step", TORCH_BOX(&seqlib::linear_attention_step));
}

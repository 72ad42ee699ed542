"""Our ops behind the signatures of the functions that transformers' own recurrent models call.

Each maker takes the original and returns a function for the same arguments. Whatever our op does not take (tensors off
the CPU, an activation it does not know, gradients through a step) goes to the original.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqlib.hf.names import given_cache
from seqlib.layers.linear import takes_few_rows
from seqlib.mixers.base import wide
from seqlib.ops import causal_conv1d, delta_rule, linear_attention, linear_scan, selective_scan
from seqlib.ops.delta_rule import step as delta_step
from seqlib.ops.linear import linear
from seqlib.ops.linear_attention import step as attention_step
from seqlib.ops.norm import unit_length
from seqlib.ops.selective_scan import step as scan_step
from seqlib.sequence import SequenceInfo

__all__ = ["FUNCTIONS", "METHODS", "few_rows"]

Function = Callable[..., Any]
_ACTIVATIONS = {None: None, "silu": "silu", "swish": "silu"}


def few_rows(original: Function) -> Function:
    """`torch.nn.Linear.forward`: for a few rows without gradients the weight is read once, by all threads."""

    @wraps(original)
    def forward(self: torch.nn.Linear, input: Tensor) -> Tensor:
        if _here(input, self.weight) and takes_few_rows(self, input):
            return linear(input, self.weight, self.bias)
        return original(self, input)

    return forward


def conv_fn(original: Function) -> Function:
    @wraps(original)
    def causal_conv1d_fn(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **kwargs: Any
    ) -> Tensor:
        if not _here(hidden_states) or activation not in _ACTIVATIONS or hidden_states.dtype != weight.dtype:
            return original(hidden_states, weight, bias, activation, **kwargs)
        x = hidden_states.transpose(1, 2)
        y, _ = causal_conv1d(x, weight, bias, activation=_ACTIVATIONS[activation], seq=_documents(kwargs))
        return y.transpose(1, 2)

    return causal_conv1d_fn


def conv_update(original: Function) -> Function:
    @wraps(original)
    def causal_conv1d_update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        one = hidden_states.shape[-1] == 1 and conv_state.shape[-1] == weight.shape[-1]
        plain = hidden_states.dtype == conv_state.dtype == weight.dtype and activation in _ACTIVATIONS
        if not (one and plain and _here(hidden_states)) or torch.is_grad_enabled():
            return original(hidden_states, conv_state, weight, bias, activation)
        conv_state.copy_(torch.cat([conv_state[..., 1:], hidden_states], -1))
        y = (conv_state * weight).sum(-1)
        y = y if bias is None else y + bias
        return (y if activation is None else F.silu(y)).unsqueeze(-1)

    return causal_conv1d_update


def mamba_scan(original: Function) -> Function:
    @wraps(original)
    def mamba_selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not _here(hidden_states):
            return original(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **kwargs)
        x, dt, B, C = (t.transpose(1, 2).to(hidden_states.dtype) for t in (hidden_states, dt, B, C))
        z = None if z is None else z.transpose(1, 2).to(x.dtype)
        y, state = selective_scan(
            x, dt, A, B, C, D=_wide(D), z=z, dt_bias=_wide(delta_bias), dt_softplus=delta_softplus,
            seq=_documents(kwargs),
        )  # fmt: skip
        y = y.transpose(1, 2)
        return (y, state) if return_last_state else y

    return mamba_selective_scan


def mamba_update(original: Function) -> Function:
    @wraps(original)
    def mamba_selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if torch.is_grad_enabled() or not _here(state, hidden_states) or not _writable(state):
            return original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs)
        dt, B, C = (t.to(hidden_states.dtype) for t in (dt, B, C))
        z = None if z is None else z.to(hidden_states.dtype)
        return scan_step(
            hidden_states, dt, A, B, C, state, D=_wide(D), z=z, dt_bias=_wide(dt_bias), dt_softplus=dt_softplus
        )

    return mamba_selective_state_update


def mamba2_scan(original: Function) -> Function:
    @wraps(original)
    def mamba2_chunk_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not _here(hidden_states) or kwargs.get("z") is not None:
            return original(
                hidden_states, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus, dt_limit,
                return_final_states, **kwargs,
            )  # fmt: skip
        x, B, C = (_wide(t) for t in (hidden_states, B, C))
        dt = _step_size(dt, dt_bias, dt_softplus).clamp(*dt_limit)
        # The original keeps its states as (headdim, d_state).
        before = None if initial_states is None else initial_states.transpose(-1, -2)
        y, state = linear_attention(
            C, B, x * dt[..., None], _wide(A) * dt, initial_state=before, seq=_documents(kwargs)
        )
        y = y if D is None else y + x * (D if D.dim() == 2 else D[:, None])
        return (y, state.transpose(-1, -2)) if return_final_states else y

    return mamba2_chunk_scan


def mamba2_update(original: Function) -> Function:
    @wraps(original)
    def mamba2_selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        # One dt and one A per head, spread over its channels without memory of their own.
        shared = (
            dt.stride(-1) == 0 and A.stride(-1) == A.stride(-2) == 0 and (dt_bias is None or dt_bias.stride(-1) == 0)
        )
        held = state.transpose(-1, -2)
        if torch.is_grad_enabled() or not _here(state, hidden_states) or not shared or state.dtype != torch.float32:
            return original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs)
        step_size = _step_size(dt[..., 0], None if dt_bias is None else dt_bias[:, 0], dt_softplus)
        x = _wide(hidden_states)
        matrix = held.contiguous()  # no copy where the prompt was read by our op
        y = attention_step(_wide(C), _wide(B), x * step_size[..., None], _wide(A[:, 0, 0]) * step_size, matrix)
        if matrix is not held:
            held.copy_(matrix)
        y = y if D is None else y + x * D
        return (y if z is None else y * F.silu(z)).to(hidden_states.dtype)

    return mamba2_selective_state_update


def delta(original: Function) -> Function:
    """The gated delta rule, decaying per head or per key channel, over a span or one token."""

    @wraps(original)
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        *args: Any,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if args or not _here(query):
            return original(
                query, key, value, g, beta, *args, initial_state=initial_state, output_final_state=output_final_state,
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
            )  # fmt: skip
        q, k, v = _wide(query), _wide(key), _wide(value)
        if use_qk_l2norm_in_kernel:
            q, k = unit_length(q), unit_length(k)
        scale = q.shape[-1] ** -0.5
        seq = _documents(kwargs)
        if q.shape[1] == 1 and initial_state is not None and seq is None and not torch.is_grad_enabled():
            state = initial_state.to(q.dtype, copy=True).contiguous()
            y = delta_step(q[:, 0], k[:, 0], v[:, 0], beta[:, 0], g[:, 0], state, scale=scale).unsqueeze(1)
        else:
            y, state = delta_rule(q, k, v, beta, g, scale=scale, initial_state=initial_state, seq=seq)
        return y.to(query.dtype), state if output_final_state else None

    return attend


def lightning(original: Function) -> Function:
    """MiniMax's linear attention, the whole module: its scan is not a function of its own."""

    @wraps(original)
    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any,
        attention_mask: Tensor | None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        cache = given_cache(cache, past_key_values)
        if not _here(hidden_states):
            return original(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
        qkv = self.act_fn(self.qkv_proj(hidden_states))
        if attention_mask is not None:
            qkv = qkv * attention_mask[..., None].to(qkv.dtype)
        q, k, v = qkv.unflatten(-1, (self.num_attention_heads, -1)).chunk(3, -1)
        before = None if cache is None else cache.get_linear_cache(self.layer_idx)
        y, state = linear_attention(q, k, v, -self.slope_rate.flatten(), initial_state=before)
        y = torch.sigmoid(self.output_gate(hidden_states)) * self.norm(y.flatten(2))
        if cache is not None:
            cache.set_linear_cache(self.layer_idx, state)
        return self.out_proj(y), state

    return forward


def rg_lru(original: Function) -> Function:
    """The recurrence of RecurrentGemma."""

    @wraps(original)
    def _rnn_scan(
        self: Any,
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        if not _here(hidden_states) or hidden_states.shape[1] == 1:
            return original(self, hidden_states, recurrent_gate, reset, recurrent_states, acc_dtype)
        decay = (recurrent_gate * ~reset).to(acc_dtype)
        y, state = linear_scan(decay, hidden_states.to(acc_dtype), initial_state=recurrent_states)
        return y.to(hidden_states.dtype), state

    return _rnn_scan


def fused(original: Function) -> Function:
    """A path for kernels that take a whole layer: None, as transformers has it, leads to the functions above."""

    @wraps(original)
    def layer(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return None if _here(x) else original(x, *args, **kwargs)

    return layer


FUNCTIONS: dict[str, Callable[[Function], Function]] = {
    "causal_conv1d_fn": conv_fn,
    "causal_conv1d_update": conv_update,
    "mamba_selective_scan": mamba_scan,
    "mamba_selective_state_update": mamba_update,
    "mamba2_chunk_scan": mamba2_scan,
    "mamba2_selective_state_update": mamba2_update,
    "mamba_inner_fn": fused,
    "mamba2_split_conv1d_scan_combined": fused,
    "torch_chunk_gated_delta_rule": delta,
    "torch_recurrent_gated_delta_rule": delta,
    "chunk_kimi_delta_attention": delta,
    "recurrent_kimi_delta_attention": delta,
}
"""By the name that transformers gives the function in each of its modules."""

METHODS: dict[str, Callable[[Function], Function]] = {
    "MiniMaxLightningAttention.forward": lightning,
    "RecurrentGemmaRglru._rnn_scan": rg_lru,
}


def _here(*tensors: Tensor) -> bool:
    """On the CPU, in a dtype of ours: elsewhere transformers may have kernels of its own."""
    return all(t.device.type == "cpu" and t.is_floating_point() for t in tensors)


def _wide(t: Any) -> Any:
    return None if t is None else wide(t)


def _step_size(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    dt = _wide(dt) if bias is None else _wide(dt) + bias
    return F.softplus(dt) if softplus else dt


def _writable(state: Tensor) -> bool:
    return state.is_contiguous() and state.dtype in (torch.float32, torch.float64)


def _documents(kwargs: dict[str, Any]) -> SequenceInfo | None:
    """Packed documents, which the originals refuse."""
    if kwargs.get("seq_idx") is not None:
        return SequenceInfo.from_seq_ids(kwargs["seq_idx"])
    lengths = kwargs.get("cu_seqlens", kwargs.get("cu_seq_lens_q"))
    return None if lengths is None else SequenceInfo.from_cu_seqlens(lengths)

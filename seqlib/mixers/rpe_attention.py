"""Kernelized attention with a learned bias of the distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.feature_maps import FEATURE_MAPS, feature_size, positive_random, random_directions_
from seqlib.layers.init import fill_, linear_
from seqlib.layers.kept import Kept
from seqlib.layers.linear import Linear
from seqlib.layers.steps import project
from seqlib.mixers.base import Mixer, MixerConfig, positive, wide, wide_dtype
from seqlib.mixers.matrix import divide
from seqlib.ops import rpe_attention
from seqlib.ops.attention import KVState
from seqlib.ops.rpe_attention import Exponentials, ExponentialState, WindowState, fit_exponentials
from seqlib.ops.rpe_attention import step as rpe_step
from seqlib.ops.rpe_attention.exponentials import exponential_count
from seqlib.sequence import SequenceInfo

__all__ = ["RPEAttention", "RPEAttentionConfig"]


@dataclass(frozen=True, kw_only=True)
class RPEAttentionConfig(MixerConfig):
    """Hyperparameters of `RPEAttention`."""

    kind: str = "rpe_attention"
    nheads: int = 8
    feature_map: str = "nprf"
    """"nprf" (normalised positive random features), "elu1" or "taylor"."""
    n_features: int | None = None
    """Number of random features; None is the width of a head. The other maps have a number of their own."""
    window: int = 512
    """Distances that have a bias; tokens further away are not seen."""
    causal: bool = True
    """False sees both sides; such a layer has no state to go on from."""
    decode: str = "window"
    """What is carried from span to span: "window", the last tokens, which is exact; or "exponentials", sums of fixed
    size under exponentials fitted to the trained bias, which is approximate (see `RPEAttention.fitted`)."""
    n_exponentials: int = 16
    bias: bool = False
    """Biases of the projections."""

    def __post_init__(self) -> None:
        positive(self, "nheads", "n_features", "window", "n_exponentials")
        if self.feature_map not in ("nprf", "elu1", "taylor"):
            raise ConfigError(
                f"{self.kind}: feature_map must be 'nprf', 'elu1' or 'taylor', whose products are positive, "
                f"got {self.feature_map!r}"
            )
        if self.decode not in ("window", "exponentials"):
            raise ConfigError(f"{self.kind}: decode must be 'window' or 'exponentials', got {self.decode!r}")
        if self.decode == "exponentials" and not self.causal:
            raise ConfigError(f"{self.kind}: decode='exponentials' needs causal=True; others do not decode")


class RPEAttention(Mixer[RPEAttentionConfig]):
    """Kernelized attention with relative positions.

        q, k, v = q_proj(x), k_proj(x), v_proj(x)
        y_i = o_proj(sum_j exp(rpe_{i-j}) (phi(q_i) . phi(k_j)) v_j / sum_j exp(rpe_{i-j}) phi(q_i) . phi(k_j))

    The bias starts at zero. State: `WindowState` of features and values, or with decode="exponentials"
    `ExponentialState`, whose size does not depend on the window; both in float32. Exponentials are fitted once for
    decoding, and again in every forward pass while gradients are recorded: train with decode="window".

    Source: Luo et al. 2021 (arXiv 2106.12566), sections 3 and 4.
    """

    Config: ClassVar[type[MixerConfig]] = RPEAttentionConfig
    supports: ClassVar[frozenset[str]] = frozenset({"packed", "padded", "initial_state", "bidirectional"})

    def __init__(self, config: RPEAttentionConfig, d_model: int, **place: Any) -> None:
        super().__init__(config, d_model, **place)
        c = config
        self.headdim = divide(c.kind, "d_model", d_model, "nheads", c.nheads)
        random = c.feature_map == "nprf"
        self.d_feature = c.n_features or self.headdim if random else feature_size(c.feature_map, self.headdim)
        self.q_proj = Linear(d_model, d_model, bias=c.bias)
        self.k_proj = Linear(d_model, d_model, bias=c.bias)
        self.v_proj = Linear(d_model, d_model, bias=c.bias)
        self.o_proj = Linear(d_model, d_model, bias=c.bias)
        self.rpe = nn.Parameter(torch.empty(c.nheads, c.window if c.causal else 2 * c.window - 1))
        # Drawn once and never trained, but part of the model.
        shape = (c.nheads, self.d_feature, self.headdim)
        self.directions = nn.Parameter(torch.empty(shape), requires_grad=False) if random else None
        self._kept = Kept()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            linear_(layer)
        linear_(self.o_proj, self.residual_scale)
        fill_(self.rpe, 0.0)
        if self.directions is not None:
            random_directions_(self.directions)

    def param_groups(self) -> list[tuple[list[str], dict[str, Any]]]:
        return [(["rpe"], {"weight_decay": 0.0})]

    def fitted(self) -> Exponentials | None:
        """The exponentials that stand for the bias when decoding, with their error; None where the window itself is
        kept."""
        c = self.config
        if c.decode == "window":
            return None
        return self._kept("fitted", None, [self.rpe], lambda: fit_exponentials(self.rpe, c.n_exponentials))

    def forward(
        self, x: Tensor, state: WindowState | ExponentialState | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, WindowState | ExponentialState]:
        self.check(x, seq)
        y, state = rpe_attention(
            *self._heads(x), self.rpe, causal=self.config.causal, exponentials=self.fitted(), state=state, seq=seq,
            backend=self.backend("rpe_attention"),
        )  # fmt: skip
        return self.o_proj(y.flatten(-2).to(x.dtype)), state

    def step(self, x: Tensor, state: WindowState | ExponentialState) -> tuple[Tensor, WindowState | ExponentialState]:
        if not self.config.causal:
            raise UnsupportedInput(f"{self.config.kind} with causal=False cannot decode token by token")
        y = rpe_step(*self._heads(x), self.rpe, state, exponentials=self.fitted())
        return self.o_proj(y.flatten(-2).to(x.dtype)), state

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of queries and keys, and values, in float32: their sums are ratios of small numbers."""
        projected = project(x, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (t.unflatten(-1, (self.config.nheads, -1)) for t in projected)
        if self.directions is None:
            features = FEATURE_MAPS[self.config.feature_map]
            q, k = features(wide(q)), features(wide(k))
        else:
            q, k = positive_random(q, self.directions), positive_random(k, self.directions)
        v = wide(v)
        return q.to(v.dtype), k.to(v.dtype), v

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> WindowState | ExponentialState:
        c, device, high = self.config, device or self.rpe.device, wide_dtype(self.rpe)
        if c.decode == "window":
            sizes = (batch, c.window, c.nheads, self.d_feature, self.headdim)
            return WindowState(*KVState.empty(*sizes, dtype=high, device=device).tensors())
        complex_ = torch.complex128 if high == torch.float64 else torch.complex64
        n = exponential_count(c.window, c.n_exponentials)
        return ExponentialState(
            torch.zeros(batch, c.nheads, n, self.d_feature, self.headdim + 1, dtype=complex_, device=device)
        )

    def state_bytes(self, batch: int, seqlen: int) -> int:
        c, size = self.config, wide_dtype(self.rpe).itemsize
        if c.decode == "window":
            return batch * (c.window * c.nheads * (self.d_feature + self.headdim) * size + torch.long.itemsize)
        n = exponential_count(c.window, c.n_exponentials)
        return batch * c.nheads * n * self.d_feature * (self.headdim + 1) * 2 * size

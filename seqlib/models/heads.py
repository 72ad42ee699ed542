"""What stands on top of a backbone: the language-model loss, pooling for classification, and a plain language model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqlib.context import values_seen
from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.layers.binding import fusable
from seqlib.layers.init import normal_
from seqlib.layers.linear import Linear
from seqlib.mixers.base import wide
from seqlib.models.backbone import Backbone
from seqlib.models.config import BackboneConfig
from seqlib.ops.linear_cross_entropy import linear_cross_entropy
from seqlib.sequence import SequenceInfo, StateList

__all__ = ["Embedding", "LanguageModel", "NumberEmbedding", "finish_logits", "lm_loss", "pool"]


def lm_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    num_items: int | Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross entropy of the next token, from hidden states and the head's weight.

        loss = sum_t -log softmax(scale * hidden_t weight^T)[labels_{t+1}] / num_items

    With softcap the logits go through `finish_logits`. They exist for a few positions at a time only, see
    `seqlib.ops.linear_cross_entropy`.

    Args:
        hidden: (batch, seqlen, d_model).
        weight: (vocab_size, d_model).
        labels: (batch, seqlen) int64, the input ids themselves; position t is scored against labels[:, t + 1].
            `ignore_index` marks positions that are not scored.
        num_items: what the sum is divided by; None is the number of scored positions.
        scale, softcap: as in `finish_logits`.

    Returns:
        A float32 scalar (float64 for float64 inputs). NaN if nothing is scored and num_items is None, as in torch.
    """
    if hidden.shape[:2] != labels.shape:
        raise UnsupportedInput(f"labels must have shape {tuple(hidden.shape[:2])}, got {tuple(labels.shape)}")
    targets = F.pad(labels[:, 1:], (0, 1), value=ignore_index).reshape(-1)
    divisor = None if num_items is None else torch.as_tensor(num_items, device=hidden.device)
    if torch.is_autocast_enabled(hidden.device.type):  # the op multiplies in the dtype of the weight
        weight = weight.to(torch.get_autocast_dtype(hidden.device.type))
    return linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets,
        divisor=divisor, ignore_index=ignore_index, scale=scale, softcap=softcap,
    )  # fmt: skip


def finish_logits(logits: Tensor, scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """scale * logits, and with softcap softcap * tanh(scale * logits / softcap) in at least float32."""
    logits = logits if scale == 1 else logits * scale
    if softcap is None:
        return logits
    return softcap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softcap)


class Embedding(nn.Embedding):
    """`nn.Embedding` times `scale`."""

    def __init__(self, vocab_size: int, d_model: int, scale: float = 1.0) -> None:
        super().__init__(vocab_size, d_model)
        self.embed_scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        x = super().forward(ids)
        return x if self.embed_scale == 1 else x * self.embed_scale


class NumberEmbedding(nn.Module):
    """Ids 0 .. vocab_size - 1 as numbers from -1 to 1, and a linear map of those: for pixels.

    x = (2 id / (vocab_size - 1) - 1) weight[0] + weight[1]

    Not an `nn.Embedding`: it looks nothing up, so what adapts a table of rows would adapt it wrongly.
    """

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, d_model))
        self.vocab_size = vocab_size

    def forward(self, ids: Tensor) -> Tensor:
        values = ids.to(self.weight.dtype) * (2 / (self.vocab_size - 1)) - 1
        return torch.addcmul(self.weight[1], values.unsqueeze(-1), self.weight[0])


def pool(hidden: Tensor, mode: str, mask: Tensor | None = None) -> Tensor:
    """One vector per sequence: (batch, seqlen, d) -> (batch, d).

    Args:
        mode: "last" real position, or "mean" over the real ones.
        mask: (batch, seqlen) bool of real positions; None: all.
    """
    if mode not in ("last", "mean"):
        raise ConfigError(f"pooling must be 'last' or 'mean', got {mode!r}")
    if mask is None:
        return hidden[:, -1] if mode == "last" else hidden.mean(1)
    if values_seen() and not bool(mask.any(1).all()):
        raise UnsupportedInput("a sequence of the batch has no real position to pool; remove it")
    if mode == "mean":
        return (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), last]


class LanguageModel(nn.Module):
    """Embedding, backbone and (tied) head without transformers; `seqlib.hf.SeqlibForCausalLM` is the same inside it.

    >>> config = BackboneConfig(d_model=16, n_layer=1, mixers={"m": {"kind": "mamba"}}, layer_pattern="m")
    >>> logits, state = LanguageModel(config, vocab_size=8)(torch.tensor([[1, 2, 3]]))
    >>> logits.shape
    torch.Size([1, 3, 8])
    """

    def __init__(self, config: BackboneConfig, vocab_size: int, *, tie_embeddings: bool = True) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.d_model)
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.d_model, vocab_size, bias=False)
        normal_(self.embed_tokens.weight, 0.02)
        normal_(self.lm_head.weight, 0.02)
        if tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, ids: Tensor, state: StateList | None = None, seq: SequenceInfo | None = None
    ) -> tuple[Tensor, StateList]:
        hidden, state = self.backbone(self.embed_tokens(ids), state, seq)
        return self.lm_head(hidden), state

    def loss(self, ids: Tensor, labels: Tensor | None = None, seq: SequenceInfo | None = None) -> Tensor:
        """Mean cross entropy of the next token, in nats."""
        hidden, _ = self.backbone(self.embed_tokens(ids), None, seq)
        labels = ids if labels is None else labels
        if fusable(self.lm_head):
            return lm_loss(hidden, self.lm_head.weight, labels)
        return F.cross_entropy(wide(self.lm_head(hidden[:, :-1])).flatten(0, 1), labels[:, 1:].flatten())

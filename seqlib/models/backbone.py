"""The stack of blocks between embedding and head, its states and its clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqlib.errors import UnsupportedInput
from seqlib.layers.binding import Binding, bound, watched
from seqlib.layers.norm import RMSNorm
from seqlib.mixers import Mixer
from seqlib.mixers.base import without_gradients
from seqlib.mixers.compose import share
from seqlib.models.aside import Aside, AsideState
from seqlib.models.block import Block
from seqlib.models.config import BackboneConfig
from seqlib.sequence import SequenceInfo, State, StateList

__all__ = ["Backbone", "param_groups"]


class Backbone(nn.Module):
    """Blocks and a final norm: (batch, seqlen, d_model) -> the same, with one state per layer.

    Only the backbone advances `StateList.seqlen`.
    """

    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.layers: Sequence[Block] = nn.ModuleList(Block(config, i) for i in range(config.n_layer))  # type: ignore[assignment]
        share((name, layer.mixer) for name, layer in zip(config.layer_pattern, self.layers))
        shape = (config.d_model, config.norm_eps, config.norm_offset)
        self.norm = RMSNorm(*shape)
        self.asides: nn.ModuleList | None = None
        self._users: dict[int, int] = {}
        if config.aside is not None:
            self.asides = nn.ModuleList(Aside(config.aside, *shape) for _ in range(config.aside.copies))
            users = [i for i in range(config.n_layer) if config.block(i).aside]
            self._users = {layer: n % config.aside.copies for n, layer in enumerate(users)}
        self._binding = Binding()
        self.gradient_checkpointing = False
        self.checkpoint_every = 1  # of so many layers, one is computed again in the backward pass
        self._gradient_checkpointing_func = _checkpoint

    def forward(
        self, x: Tensor, state: StateList | None = None, seq: SequenceInfo | None = None, depth: int | None = None
    ) -> tuple[Tensor, StateList]:
        """Run a span. `state` is what an earlier span returned, or None at the beginning; it is left as it was.

        `depth` exits early, from the first `depth` layers to the final norm; the state then has as many layers.
        """
        layers = self._first(depth)
        state = None if state is None else state.writable()
        if state is not None and len(state) != len(layers):
            raise UnsupportedInput(f"state has {len(state)} layers, the model {len(layers)}")
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        remember = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        states: list[State] = []
        first = x
        for i, layer in enumerate(layers):
            before = None if state is None else state[i]
            if remember and i % self.checkpoint_every == 0:
                x, after = self._again_in_backward(layer, x, before, seq, *self._aside(i, first))
            else:
                x, after = layer(x, before, seq, *self._aside(i, first))
            states.append(after)
        seen = 0 if state is None else state.seqlen
        return self.norm(x), StateList(states, seen + x.shape[1])

    def _again_in_backward(
        self, layer: Block, x: Tensor, before: State | None, seq: SequenceInfo | None, *aside: Any
    ) -> tuple[Tensor, State]:
        """A layer under gradient checkpointing, which hands on the gradients of plain tensors only: so the tensors of
        states and the stack's first input go in and out as such."""
        first, block = aside or (None, None)
        made: list[State] = []

        def run(x: Tensor, first: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
            x, after = layer(x, None if before is None else _filled(before, tensors), seq, first, block)
            made.append(after)
            return (x, *after.tensors())

        given = () if before is None else tuple(before.tensors())
        x, *tensors = self._gradient_checkpointing_func(run, x, first, *given)
        return x, _filled(made[0], tensors)

    @without_gradients
    def step(self, x: Tensor, state: StateList, depth: int | None = None) -> tuple[Tensor, StateList]:
        """One position, x: (batch, d_model). Writes into `state` and returns it."""
        if self.config.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        if torch.compiler.is_compiling():
            x = self._steps(x, state, depth)
        else:
            with self._binding.use(self, x):
                x = self._steps(x, state, depth)
        state.seqlen += 1
        return self.norm(x), state

    def _steps(self, x: Tensor, state: StateList, depth: int | None) -> Tensor:
        first = x
        for i, layer in enumerate(self._first(depth)):
            x, state.states[i] = self._step(layer, x, state.states[i], *self._aside(i, first))
        return x

    @staticmethod
    def _step(layer: Block, x: Tensor, state: State, *aside: Any) -> tuple[Tensor, State]:
        """One layer's step; its `forward` on one position where somebody watches its calls."""
        seen = (layer, *aside[1:])
        if not bound(("watched", seen), lambda: watched(*seen)):
            return layer.step(x, state, *aside)
        if aside:
            aside = (aside[0].unsqueeze(1), aside[1])
        x, state = layer(x.unsqueeze(1), state, None, *aside)
        return x.squeeze(1), state

    def _aside(self, layer: int, first: Tensor) -> tuple[Any, ...]:
        """What a layer that uses an `Aside` needs besides."""
        block = self._block_aside(layer)
        return () if block is None else (first, block)

    def _block_aside(self, layer: int) -> Aside | None:
        return None if self.asides is None or layer not in self._users else self.asides[self._users[layer]]  # type: ignore[return-value]

    def initial_state(
        self,
        batch: int,
        max_seqlen: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        depth: int | None = None,
    ) -> StateList:
        """The state before the first position; `max_seqlen` lets key-value caches be allocated once."""
        states: list[State] = []
        for i, layer in enumerate(self._first(depth)):
            state = layer.mixer.initial_state(batch, max_seqlen, device, dtype)
            block = self._block_aside(i)
            if block is not None:
                state = AsideState(block.attention.initial_state(batch, max_seqlen, device, dtype), state)
            states.append(state)
        return StateList(states)

    def _first(self, depth: int | None) -> Sequence[Block]:
        if depth is None or depth == len(self.layers):
            return self.layers
        if not 1 <= depth < len(self.layers):
            raise UnsupportedInput(f"depth must be from 1 to the {len(self.layers)} layers of the model, got {depth}")
        return self.layers[:depth]

    def mixer(self, index: int) -> Mixer:
        """The sequence mixer of one layer."""
        return self.layers[index].mixer

    def state_bytes(self, batch: int, seqlen: int) -> int:
        """Size of the whole state after `seqlen` positions."""
        blocks = [self._block_aside(i) for i in range(len(self.layers))]
        mixers = [layer.mixer for layer in self.layers] + [b.attention for b in blocks if b is not None]
        return sum(mixer.state_bytes(batch, seqlen) for mixer in mixers)

    def special_parameters(self) -> dict[str, dict[str, Any]]:
        """Optimizer options by full parameter name, as the mixers ask for them."""
        options = {}
        for i in range(len(self.layers)):
            for names, wanted in self.mixer(i).param_groups():
                options.update({f"layers.{i}.mixer.{name}": wanted for name in names})
            if getattr(self.layers[i].mlp, "choice_bias", None) is not None:
                options[f"layers.{i}.mlp.choice_bias"] = {"weight_decay": 0.0}
        return options


def param_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups for a model that contains backbones.

    Weight decay falls on matrices only: vectors (norms, biases) have none, and what a mixer names in its own
    `param_groups` gets the options it asks for.
    """
    options: dict[str, dict[str, Any]] = {}
    for prefix, part in module.named_modules():
        if isinstance(part, Backbone):
            options.update({f"{prefix}.{k}".lstrip("."): v for k, v in part.special_parameters().items()})
    groups: dict[tuple, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        wanted = {"lr": lr, "weight_decay": weight_decay if parameter.dim() > 1 else 0.0} | options.get(name, {})
        group = groups.setdefault(tuple(sorted(wanted.items())), {"params": [], **wanted})
        group["params"].append(parameter)
    return list(groups.values())


def _filled(state: State, tensors: Iterable[Tensor]) -> State:
    """The same state with these tensors, in the order of `State.tensors`."""
    rest = iter(tensors)
    return state.map(lambda _: next(rest))


def _checkpoint(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)

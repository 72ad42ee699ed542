"""How a published layout is described: its config as ours, and which of its tensors are which of ours.

A family is one file with a function `config` from their config to fields of SeqlibConfig, and a function `parts` that
lists correspondences. Both directions of a conversion follow from the same list, and every correspondence is a matter
of rows, so what goes one way comes back bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from seqlib.errors import CheckpointMismatch
from seqlib.hf.configuration import SeqlibConfig

__all__ = [
    "GENERIC",
    "Family",
    "Names",
    "Part",
    "Values",
    "conv",
    "defaulted",
    "expect",
    "ids",
    "layer",
    "linear",
    "only",
    "ported",
    "rows",
    "top",
    "within",
]

Values = Mapping[str, Any]

# What transformers writes into any config, and what only training or serving reads.
GENERIC = frozenset(PretrainedConfig().to_dict()) | {
    "_name_or_path", "architectures", "auto_map", "attention_dropout", "bos_token_id", "dtype", "eos_token_id",
    "hidden_dropout", "initializer_range", "max_position_embeddings", "model_type", "output_router_logits",
    "pad_token_id", "quantization_config", "rescale_prenorm_residual", "router_aux_loss_coef", "tie_word_embeddings",
    "torch_dtype", "transformers_version", "unk_token_id", "use_cache", "_attn_implementation_autoset",
    "num_logits_to_keep", "attn_implementation", "_attn_implementation",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """Some tensors of ours that are some tensors of theirs: all rows of the one side are those of the other.

    Rows run along the last axis; those of a vector are its entries.

    Args:
        ours, theirs: names. "a|b" is one tensor that goes by either name; the first is written.
        order: our row i is their row order[i], counted through all of theirs; None for the same order.
        shares: rows of each of theirs where they are more than one; None: equal ones.
        tail: shape of theirs behind the first axis, with at most one -1; None: that of ours.
        value: what ours are filled with where theirs are none at all (norms without weights).
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    order: Tensor | None = None
    shares: tuple[int, ...] | None = None
    tail: tuple[int, ...] | None = None
    value: float | None = None


@dataclass(frozen=True)
class Family:
    """One published layout.

    Args:
        name: what `seqlib.export` calls it.
        config: their config, and whom to match, "authors" or "transformers", where they differ -> ours as keywords.
        parts: their config and ours -> correspondences; those of which we have no tensor are passed over, and of
            several for the same tensors of ours the first that the file has counts. The first of all is written.
        matches: whether a config.json is of this family.
        defaults: their config -> the fields of it that the family knows, with those that the file leaves out.
        known: fields of their config that change nothing here; other unknown ones are refused.
        ignored: patterns of tensors that carry nothing.
        look: fields of their config that only the names of the tensors tell.
        write: our config -> theirs, for models that were not loaded from this layout; None where only those can be
            written.
        stores_tied_head: the head is in the file although it is tied.
        weights_file: what the weights are called; None is safetensors under transformers' name.
        config_file: what the config is called.
    """

    name: str
    config: Callable[[Values, str], dict[str, Any]]
    parts: Callable[[Values, SeqlibConfig], Iterable[Part]]
    matches: Callable[[Values], bool]
    defaults: Callable[[Values], dict[str, Any]] = dict
    known: frozenset[str] = frozenset()
    ignored: tuple[str, ...] = ()
    look: Callable[[Iterable[str]], dict[str, Any]] | None = None
    write: Callable[[SeqlibConfig], dict[str, Any]] | None = None
    stores_tied_head: bool = False
    weights_file: str | None = None
    config_file: str = "config.json"


def defaulted(fields: Values, known: Iterable[str] = ()) -> Callable[[Values], dict[str, Any]]:
    """`Family.defaults` of a layout whose fields and their defaults are written out here."""
    names = fields.keys() | set(known) | GENERIC
    return lambda values: {**fields, **{name: value for name, value in values.items() if name in names}}


def ported(
    name: str,
    model_type: str,
    config: Callable[[Values, str], dict[str, Any]],
    parts: Callable[[Values, SeqlibConfig], Iterable[Part]],
    *,
    also: tuple[str, ...] = (),
    **options: Any,
) -> Family:
    """A family that transformers has too: its config class knows the defaults and older names of the fields.

    `also` are names that the authors' own code goes by.
    """

    def defaults(values: Values) -> dict[str, Any]:
        own = AutoConfig.for_model(**{**values, "model_type": model_type})
        # Fields that it does not know become attributes, too; the caller has to hear of them.
        known = {f.name for f in dataclasses.fields(own)} | own.attribute_map.keys() | options.get("known", frozenset())
        given = {k: v for k, v in values.items() if k in known}
        full = {k: v for k, v in own.to_dict().items() if k not in values.keys() - known}
        return given | full | {"model_type": model_type}

    names = (model_type, *also)
    return Family(name, config, parts, lambda v: v.get("model_type") in names, defaults, **options)


def ids(values: Values) -> dict[str, Any]:
    """The special tokens and the context length."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "max_position_embeddings")
    return {name: values[name] for name in names if values.get(name) is not None}


def top(embeddings: str, norm: str, head: str = "lm_head.weight") -> Iterator[Part]:
    """Embedding, final norm and head."""
    yield Part(("model.embed_tokens.weight",), (embeddings,))
    yield Part(("model.backbone.norm.weight",), (norm,))
    yield Part(("lm_head.weight",), (head,))


Names = Mapping[str, "str | Part"]
"""Our names to theirs, or to a `Part` in such names (its key then only names the entry)."""


def within(ours: str, theirs: str, names: Names) -> dict[str, str | Part]:
    """`names` with both sides prefixed."""
    made: dict[str, str | Part] = {}
    for name, given in names.items():
        part = given if isinstance(given, Part) else Part((name,), (given,))
        made[ours + name] = dataclasses.replace(
            part,
            ours=tuple(ours + n for n in part.ours),
            theirs=tuple("|".join(theirs + n for n in t.split("|")) for t in part.theirs),
        )
    return made


def layer(index: int, prefix: str, *names: Names) -> Iterator[Part]:
    """Correspondences within one layer; their names begin with `prefix`."""
    for group in names:
        yield from within(f"model.backbone.layers.{index}.", prefix, group).values()  # type: ignore[misc]


def linear(*names: str, **renamed: str) -> dict[str, str | Part]:
    """Weights and biases of layers called `names` on both sides, or ours=theirs."""
    pairs = {**dict.fromkeys(names), **renamed}
    return {f"{our}.{leaf}": f"{their or our}.{leaf}" for our, their in pairs.items() for leaf in ("weight", "bias")}


def conv(*theirs: str, shares: Sequence[int] | None = None) -> dict[str, str | Part]:
    """Weight and bias of `conv1d`, stored as (channels, 1, width)."""
    rows = None if shares is None else tuple(shares)
    return {
        "conv1d.weight": Part(("conv1d.weight",), tuple(f"{t}.weight" for t in theirs), shares=rows, tail=(1, -1)),
        "conv1d.bias": Part(("conv1d.bias",), tuple(f"{t}.bias" for t in theirs), shares=rows),
    }


def rows(
    ours: str | Sequence[str],
    theirs: str | Sequence[str],
    *,
    order: Tensor | None = None,
    shares: Sequence[int] | None = None,
) -> dict[str, str | Part]:
    """One entry of `layer` in which rows are joined, divided or reordered."""
    mine = (ours,) if isinstance(ours, str) else tuple(ours)
    them = (theirs,) if isinstance(theirs, str) else tuple(theirs)
    return {mine[0]: Part(mine, them, order, None if shares is None else tuple(shares))}


def only(where: str, given: Values, known: Iterable[str]) -> None:
    """Raise unless every field of a part of a config is known; what the others mean, nobody here can say."""
    unknown = sorted(given.keys() - set(known))
    if unknown:
        raise CheckpointMismatch(f"{where} has {', '.join(unknown)}; known: {', '.join(sorted(known))}")


def expect(family: str, values: Values, **wanted: Any) -> None:
    """Raise unless each named field has one of the values that this library computes."""
    wrong = []
    for name, allowed in wanted.items():
        options = allowed if isinstance(allowed, tuple) else (allowed,)
        if name in values and values[name] not in options:
            wrong.append(f"{name}={values[name]!r} (supported: {', '.join(map(repr, options))})")
    if wrong:
        raise CheckpointMismatch(f"{family}: this checkpoint has {'; '.join(wrong)}")

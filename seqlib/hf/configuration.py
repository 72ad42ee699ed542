"""The configuration of seqlib models in the form transformers stores."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from seqlib.errors import ConfigError
from seqlib.hf.names import CACHE_NAMES, nearest, of_any_config
from seqlib.mixers import MIXERS
from seqlib.models.config import BackboneConfig

__all__ = ["SeqlibConfig"]


@strict
class SeqlibConfig(PretrainedConfig):
    """Embedding, backbone and head of one model.

    The mixers are given in full or in short; what is stored is always the full form, one name per layer:

        SeqlibConfig(d_model=256, n_layer=6, layer_pattern="m m a",
                     mixers={"m": {"kind": "mamba"}, "a": {"kind": "attention", "window": 512}}, mlp={"d_mlp": 1024})
        SeqlibConfig(d_model=256, n_layer=6, mixer="mamba")

    Args:
        d_model: residual width; `hidden_size` is another name for it.
        n_layer: number of blocks; `num_hidden_layers` is another name for it.
        vocab_size: rows of the embedding.
        mixers: mixer configs by name, each a dict with `kind` and that mixer's own fields.
        layer_pattern: names of mixers by layer, "m m a" or "m*5 a", tiled over n_layer.
        tile: "exact", or "truncate" to let the last repetition of the pattern be cut.
        mixer: one mixer for every layer, a kind or a dict, instead of mixers and layer_pattern.
        mlp: fields of the MLP after every mixer (of experts, if they name `nexperts`), None for none.
        blocks: fields of `BlockConfig` by layer name, where layers differ from a plain block with `mlp`.
        aside: fields of `AsideConfig`, for layers whose block says so.
        norm_eps: epsilon of the RMSNorms.
        norm_offset: what RMSNorms add to their weight.
        residual_in_fp32: keep the residual stream in float32 whatever the dtype of the weights.
        tie_word_embeddings: the head shares the embedding's weight.
        embed_scale: factor of the embeddings.
        embedding: "table", or "number" for ids that are quantities, as pixels are (see `models.heads.NumberEmbedding`).
        logit_scale, logit_softcap: logits are scale * logits, then softcap * tanh(logits / softcap) unless None.
        initializer_range: standard deviation at which embedding and heads start.
        max_position_embeddings: context length that the model was made for; evaluation tools read it, nothing here
            enforces it.
        pooling: "last" real token or "mean" over the real tokens, for sequence classification.
        pair_head: "nli" or "concat", for classification of pairs (see `hf.pair.PairHead`).
        use_cache: return a cache when not training.
        origin: the published layout and config that the weights came from; `seqlib.export` writes them back.

    Raises:
        ConfigError: fields that describe no model, or that do not exist.
    """

    model_type = "seqlib"
    on_use: ClassVar[Callable[[], None]] = lambda: None
    """Called when a config is made; `hf.registration` puts something there."""
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(CACHE_NAMES)
    attribute_map: ClassVar[dict[str, str]] = {"hidden_size": "d_model", "num_hidden_layers": "n_layer"}
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {
        "embed_tokens": "free_full_weight",
        "backbone.layers.*": "free_full_weight",
        "backbone.norm": "keep_full_weight",
    }

    d_model: int = 768
    n_layer: int = 24
    vocab_size: int = 50280
    mixers: dict[str, Any] | None = None
    layer_pattern: str | list[str] | tuple[str, ...] | None = None
    tile: str = "exact"
    mixer: Any = None
    mlp: Any = None
    blocks: dict[str, Any] | None = None
    aside: Any = None
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    residual_in_fp32: bool = True
    tie_word_embeddings: bool = True
    embed_scale: float = 1.0
    embedding: str = "table"
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048
    pooling: str = "last"
    pair_head: str = "nli"
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    layer_types: list[str] | None = None
    origin: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for alias, name in self.attribute_map.items():
            if alias in kwargs:
                setattr(self, name, kwargs.pop(alias))
        self._refuse_unknown(kwargs)
        if isinstance(self.vocab_size, bool) or self.vocab_size < 1:
            raise ConfigError(f"vocab_size must be a positive integer, got {self.vocab_size!r}")
        if self.embedding not in ("table", "number"):
            raise ConfigError(f"embedding must be 'table' or 'number', got {self.embedding!r}")
        if self.pooling not in ("last", "mean"):
            raise ConfigError(f"pooling must be 'last' or 'mean', got {self.pooling!r}")
        if self.pair_head not in ("nli", "concat"):
            raise ConfigError(f"pair_head must be 'nli' or 'concat', got {self.pair_head!r}")
        self._expand()
        super().__post_init__(**kwargs)
        type(self).on_use()

    def _expand(self) -> None:
        """Replace short forms by what they stand for, and derive transformers' own names of the layers."""
        if self.mixers is None:
            if self.layer_pattern is not None:
                raise ConfigError("layer_pattern names mixers, but mixers is not given: mixers={'m': {'kind': ...}}")
            one = {"kind": self.mixer} if isinstance(self.mixer or "mamba", str) else self.mixer
            one = {"kind": "mamba"} if self.mixer is None else one
            name = one["kind"] if isinstance(one, dict) and isinstance(one.get("kind"), str) else "mixer"
            self.mixers, self.layer_pattern = {name: one}, [name]
        elif self.mixer is not None:
            raise ConfigError("give mixer (one for every layer) or mixers with layer_pattern, not both")
        elif self.layer_pattern is None:
            raise ConfigError(f"mixers {', '.join(self.mixers)} need a layer_pattern that says which layer has which")
        self.blocks = self.blocks or {}
        full = self.backbone.to_dict()
        self.blocks, self.aside = full["blocks"], full["aside"]
        self.mixer, self.mixers, self.layer_pattern, self.mlp = None, full["mixers"], full["layer_pattern"], full["mlp"]
        types = {name: _layer_type(config) for name, config in self.backbone.mixers.items()}
        types |= {name: "full_attention" for name, block in self.backbone.blocks.items() if block.aside}
        self.layer_types = [types[name] for name in self.layer_pattern]

    @property
    def auto_map(self) -> dict[str, str]:
        """Where a checkpoint that carries its own code has it; tools read and write this of any class."""
        return self.__dict__.setdefault("auto_map", {})

    @auto_map.setter
    def auto_map(self, value: dict[str, str] | None) -> None:
        self.__dict__["auto_map"] = value or {}

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; an empty `auto_map` is left out."""
        values = super().to_dict()
        if not values.get("auto_map"):
            values.pop("auto_map", None)
        return values

    @property
    def backbone(self) -> BackboneConfig:
        """The part that `seqlib.models.Backbone` is built from."""
        return BackboneConfig.from_dict({f.name: getattr(self, f.name) for f in dataclasses.fields(BackboneConfig)})

    def _refuse_unknown(self, kwargs: dict[str, Any]) -> None:
        """transformers keeps any keyword as an attribute; here only what it writes itself is let through."""
        own = [f.name for f in dataclasses.fields(self)]
        of_mixers = {f.name: kind for kind, cls in MIXERS.items() for f in dataclasses.fields(cls.Config)}
        for key in kwargs:
            if key in of_mixers:
                kind = of_mixers[key]
                raise ConfigError(f"{key} is a field of a mixer: write mixer={{'kind': {kind!r}, {key!r}: ...}}")
            if not of_any_config(key):
                raise ConfigError(
                    f"SeqlibConfig has no field {key!r}{nearest(key, own)} "
                    f"Its fields are {', '.join(name for name in own if not hasattr(PretrainedConfig, name))}"
                )


def _layer_type(config: Any) -> str:
    kind = MIXERS[config.kind].layer_type
    return "sliding_attention" if kind == "full_attention" and getattr(config, "window", None) else kind

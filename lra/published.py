"""Published recipes of Long Range Arena, as data.

Sizes, batches, steps, rates and decays are as published. What the library does not do in the same way is named in each
recipe's note: blocks here are pre-norm with RMSNorm and causal unless the mixer says otherwise, where S4, S5 and Mega
use BatchNorm, LayerNorm or ScaleNorm and read in both directions.
"""

from __future__ import annotations

from typing import Any

__all__ = ["PUBLISHED"]

_S4_NOTE = "published with BatchNorm (ListOps and Image post-norm)"
_S4D_NOTE = _S4_NOTE + "; the warm-up on ListOps is taken as a tenth of the steps"
_MEGA_NOTE = (
    "published with LayerNorm, ScaleNorm or BatchNorm by task, bidirectional; warm-up taken as 5 % but for Path-X"
)
_SMALL_NOTE = "published with LayerNorm and dropout 0.1; warm-up of Skyformer's configs; 128 features where they count"


_UNPUBLISHED = "no published recipe: sizes and schedule of the small protocol"
Rows = dict[str, tuple[Any, ...]]
Fields = tuple[str, ...]


def _table(
    mixer: dict[str, Any], note: str, protocol: str, rows: Rows, fields: Fields, **common: Any
) -> dict[str, Any]:
    made = {}
    for task, row in rows.items():
        values = dict(zip(fields, row))
        own = {k: values.pop(k) for k in ("d_state",) if k in values}
        if task == "pathx" and mixer["kind"] in ("s4", "s4d"):
            own["dt_min"] = 1e-4  # without it Path-X stays at chance
        numbers = {"numbers": True} if protocol == "s4" and task in ("image", "pathfinder", "pathx") else {}
        made[task] = {"mixers": {"m": mixer | own}, "protocol": protocol, "note": note, **numbers, **common, **values}
    return made


_FIELDS = ("n_layer", "d_model", "d_state", "batch_size", "learning_rate", "weight_decay", "steps", "warmup_steps")
# state-spaces/s4 v4, configs/experiment/lra; the expected scores there: 59.5 86.5 91.0 88.5 94.0 96.0.
_S4 = {
    "listops": (6, 256, 4, 32, 0.01, 0.05, 120_000, 12_000),
    "text": (6, 256, 4, 16, 0.01, 0.05, 50_000, 5_000),
    "retrieval": (6, 256, 4, 64, 0.01, 0.05, 50_000, 5_000),
    "image": (6, 512, 64, 50, 0.01, 0.05, 180_000, 18_000),
    "pathfinder": (6, 256, 64, 64, 0.004, 0.05, 500_000, 50_000),
    "pathx": (6, 256, 64, 16, 0.001, 0.05, 500_000, 50_000),
}
# HTTYH / S4D papers (v3 configs): N 64 everywhere.
_S4D = {
    "listops": (8, 128, 64, 50, 0.01, 0.05, 80_000, 8_000),
    "text": (6, 256, 64, 16, 0.01, 0.05, 50_000, 5_000),
    "retrieval": (6, 256, 64, 64, 0.01, 0.05, 50_000, 5_000),
    "image": (6, 512, 64, 50, 0.01, 0.05, 180_000, 900),
    "pathfinder": (6, 256, 64, 64, 0.004, 0.03, 500_000, 2_500),
    "pathx": (6, 256, 64, 16, 0.0005, 0.05, 500_000, 50_000),
}
# lindermanlab/S5, bin/run_experiments; steps = epochs * examples / batch, warm-up of one epoch.
_S5 = {
    "listops": (8, 128, 16, 50, 0.003, 0.04, 76_800, 1_920),
    "text": (6, 256, 192, 50, 0.004, 0.07, 17_500, 0),
    "retrieval": (6, 128, 256, 32, 0.002, 0.05, 91_920, 4_596),
    "image": (6, 512, 384, 50, 0.0045, 0.07, 225_000, 900),
    "pathfinder": (6, 192, 256, 64, 0.0045, 0.03, 500_000, 2_500),
    "pathx": (6, 128, 256, 32, 0.0018, 0.06, 375_000, 5_000),
}
# facebookresearch/mega, README.lra.md; Adam betas .9 and .98, clip 1, linear decay. Then (d_qk, scores).
_MEGA = {
    "listops": (6, 80, 16, 64, 0.001, 0.01, 90_000, 4_500),
    "text": (4, 128, 16, 50, 0.004, 0.01, 25_000, 1_250),
    "retrieval": (6, 128, 16, 64, 0.003, 0.04, 91_960, 4_598),
    "image": (8, 160, 16, 50, 0.01, 0.02, 180_000, 9_000),
    "pathfinder": (6, 128, 16, 128, 0.01, 0.01, 250_000, 12_500),
    "pathx": (4, 64, 16, 128, 0.01, 0.01, 125_000, 25_000),
}
_MEGA_ATTENTION: dict[str, dict[str, Any]] = {
    task: {"chunk_size": None, "d_qk": d_qk, "scores": scores, "bias": "simple", "max_positions": reach}
    for task, d_qk, scores, reach in (
        ("listops", 64, "softmax", 2048), ("text", 64, "softmax", 4096), ("retrieval", 64, "softmax", 4096),
        ("image", 96, "laplace", 1024), ("pathfinder", 64, "laplace", 1024), ("pathx", 32, "laplace", 16384),
    )
}  # fmt: skip


def _mega_mlp(d_model: int) -> dict[str, Any]:
    return {"d_mlp": 2 * d_model, "gated": False, "activation": "silu"}


# mlpen/Nystromformer, LRA/code/lra_config.py: two layers, d 64, ffn 128, lr 1e-4 with linear decay.
_SMALL = {
    "listops": (2, 64, 32, 1e-4, 0.0, 5_000, 1_000),
    "text": (2, 64, 32, 1e-4, 0.0, 20_000, 80),
    "retrieval": (2, 64, 32, 1e-4, 0.0, 30_000, 800),
    "image": (2, 64, 256, 1e-4, 0.0, 35_000, 175),
    "pathfinder": (2, 64, 256, 1e-4, 0.0, 62_400, 312),
}
_SMALL_FIELDS = ("n_layer", "d_model", "batch_size", "learning_rate", "weight_decay", "steps", "warmup_steps")
_EVERY: dict[str, Any] = {"log_every": 50, "eval_every": 1000, "clip": 0.0}
_LM_STYLE: dict[str, Any] = {"log_every": 50, "eval_every": 1000, "clip": 1.0}


def _small(mixer: dict[str, Any], note: str = _SMALL_NOTE, positions: bool = False) -> dict:
    mlp = {"d_mlp": 128, "gated": False, "activation": "gelu"}
    made = _table(mixer, note, "nys", _SMALL, _SMALL_FIELDS, mlp=mlp, schedule="linear", beta2=0.999, **_LM_STYLE)
    if positions:  # as a layer of their own before the others
        for row in made.values():
            row["mixers"]["p"] = {"kind": "learned_positions"}
            row |= {"layer_pattern": f"p m*{row['n_layer']}", "n_layer": row["n_layer"] + 1}
    return made


def _both(kind: str) -> dict[str, Any]:
    return {"kind": kind, "bidirectional": True}


_BASELINES: dict[str, dict[str, Any]] = {
    "local_attention": {"block": 50},
    "sliding_attention": {"window": 32, "causal": False, "rotary": False},
    "linformer": {"rank": 128},
    "linear_transformer": {"causal": False},
    "performer": {"n_features": 128, "causal": False},
    "reformer": {},
    "nystromformer": {"landmarks": 128},
    "bigbird": {},
    "longformer": {"n_global": 0},
    "sparse_attention": {},
    "sinkhorn": {},
    "synthesizer": {},
    "luna": {"d_packed": 128},
}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "s4": _table(_both("s4"), _S4_NOTE, "s4", _S4, _FIELDS, **_EVERY),
    "s4d": _table(_both("s4d"), _S4D_NOTE, "s4", _S4D, _FIELDS, **_EVERY),
    "s5": _table(_both("s5"), _S4_NOTE, "s4", _S5, _FIELDS, **_EVERY),
    "sgconv": {
        task: row | {"mixers": {"m": _both("sgconv")}, "note": _S4_NOTE + "; sizes of S4, as its configs start from"}
        for task, row in _table(_both("sgconv"), _S4_NOTE, "s4", _S4, _FIELDS, **_EVERY).items()
    },
    "mega": {
        task: row | {"mixers": {"m": row["mixers"]["m"] | _MEGA_ATTENTION[task]}, "mlp": _mega_mlp(row["d_model"])}
        for task, row in _table(
            _both("mega"), _MEGA_NOTE, "s4", _MEGA, _FIELDS, schedule="linear", beta2=0.98, **_LM_STYLE
        ).items()
    },
    "transformer": _small({"kind": "attention", "nheads": 2, "causal": False, "rotary": False}, positions=True),
    **{kind: _small({"kind": kind, "nheads": 2} | own, positions=True) for kind, own in _BASELINES.items()},
    "fnet": _small({"kind": "fnet"}, positions=True),
    "transnormer": _small({"kind": "lightning", "variant": "transnormer", "nheads": 2}),
    "lightning": _small({"kind": "lightning", "variant": "minimax", "nheads": 2}, _UNPUBLISHED),
    "mamba": _small({"kind": "mamba"}, _UNPUBLISHED),
}  # fmt: skip

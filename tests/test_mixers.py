"""The laws of the mixer protocol, run on every row of MIXERS."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqlib import use_backend
from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.hf.inputs import sequence_info
from seqlib.mixers import MIXERS, Mixer, build_mixer, looks_ahead, mixer_config
from seqlib.sequence import SequenceInfo

D_MODEL = 32
# What a kind needs beyond its defaults to be small, and variants that take other paths.
VARIANTS: dict[str, list[dict]] = {
    "mamba": [{}, {"inner_norm": "learned", "d_state": 5, "bias": True}, {"inner_norm": "plain", "conv_bias": False}],
    "mamba2": [
        {"d_state": 8, "headdim": 16, "ngroups": 2},
        {
            "d_state": 5,
            "headdim": 8,
            "d_inner": 24,
            "norm_before_gate": True,
            "D_per_channel": True,
            "bias": True,
            "out_bias": False,
            "in_scales": [0.5, 2.0, 0.7, 1.5, 0.9],
        },
        {"d_state": 4, "headdim": 32, "norm": False, "dt_limit_min": 0.01, "dt_limit_max": 0.02, "conv_bias": False},
    ],
    "lightning": [
        {"nheads": 4},
        {"nheads": 3, "headdim": 6, "lrpe": True, "bias": True},
        {"nheads": 4, "variant": "minimax"},
        {"nheads": 4, "variant": "ring", "qk_norm": True, "norm_groups": 2},
    ],
    "retnet": [{"nheads": 4}, {"nheads": 2, "expand_k": 0.5, "expand_v": 1.0, "rotary": False}],
    "linear_transformer": [
        {"nheads": 4},
        {"nheads": 2, "feature_map": "relu", "d_feature": 6},
        {"normalized": False},
        {"nheads": 4, "causal": False},
    ],
    "based": [{"nheads": 4, "d_feature": 4}],
    "gla": [{"nheads": 4}, {"nheads": 2, "expand_k": 1.0, "expand_v": 2.0, "gate_rank": 3, "gate_normalizer": 2.0}],
    "deltanet": [{"nheads": 4}, {"nheads": 2, "expand_v": 0.5, "allow_neg_eigval": True, "gate": True, "d_conv": 2}],
    "gated_deltanet": [
        {"nheads": 2, "nheads_v": 4, "headdim": 8},
        {"nheads": 3, "headdim": 5, "expand_v": 1.0, "allow_neg_eigval": True, "gate_activation": "sigmoid"},
    ],
    "kda": [{"nheads": 4, "headdim": 8}, {"nheads": 2, "headdim": 6, "lower_bound": -5.0, "gate_rank": 4}],
    "rg_lru": [{"nheads": 4}, {"nheads": 2, "d_inner": 24, "d_conv": 3}],
    "mlstm": [{"nheads": 4}, {"nheads": 2, "expand_k": 1.0, "expand_v": 0.5, "gate_cap": 3.0}],
    "conv_attention": [{"nheads": 4}, {"nheads": 2, "nheads_kv": 1, "d_conv": 3, "bias": True, "window": 5}],
    "channel": [{"mlp": {"d_mlp": 20, "gated": False, "activation": "relu2"}}, {"mlp": {"d_mlp": 12, "nexperts": 3}}],
    "gated_conv": [{}, {"d_conv": 4, "expand": 1, "bias": False, "conv_bias": False}],
    "transnormer": [{"nheads": 4}, {"nheads": 2, "feature_map": "elu"}, {"nheads": 2, "lrpe": True}],
    "diag_attention": [
        {"nheads": 4, "window": 8},
        {"nheads": 2, "nheads_kv": 1, "window": 3, "rotary": True},
        {"nheads": 2, "window": 4, "forget_gate": True},
        {"nheads": 2, "window": 5, "activation": "relu", "lrpe": True},
    ],
    "path": [
        {"nheads": 2},
        {"nheads": 4, "nheads_kv": 2, "w_rank": None, "d_conv": 2, "forget_gate": True, "qk_norm": True},
    ],
    "rpe_attention": [
        {"nheads": 4, "window": 9, "n_features": 6},
        {"nheads": 2, "window": 70, "feature_map": "elu1", "bias": True},
        # A bias of zero is one exponential, as long as the window reaches over every test.
        {"nheads": 4, "window": 80, "decode": "exponentials", "n_exponentials": 2},
    ],
    "shared": [
        {"mixer": {"kind": "attention", "nheads": 2}, "adapter_rank": 3},
        {"mixer": {"kind": "mamba2", "headdim": 16, "d_state": 4}, "adapter_rank": 2, "adapted": ["in_proj"]},
    ],
    "sum": [
        {
            "mixers": [{"kind": "attention", "nheads": 2, "gate": True}, {"kind": "rg_lru", "nheads": 2}],
            "in_scales": [0.5, 2.0],
            "out_scales": [3.0, 0.25],
        },
        {"mixers": [{"kind": "attention", "nheads": 2}, {"kind": "mamba2", "headdim": 16, "d_state": 4}]},
        {
            "mixers": [{"kind": "gated_conv"}, {"kind": "sum", "mixers": [{"kind": "gla"}, {"kind": "mamba"}]}],
            "gate": True,
        },
    ],
    "attention": [
        {"nheads": 4},
        {"nheads": 4, "nheads_kv": 2, "qk_norm": True, "gate": True},
        {"nheads": 4, "nheads_kv": 2, "qk_norm": True, "qk_norm_joint": True},
        {"nheads": 2, "rotary": False},
        {"nheads": 4, "nheads_kv": 2, "forget_gate": True},
        {"nheads": 4, "causal": False},
    ],
    "sliding_attention": [
        {"nheads": 4, "window": 8},
        {"nheads": 2, "nheads_kv": 1, "window": 3},
        {"nheads": 4, "window": 5, "forget_gate": True},
        {"nheads": 4, "window": 8, "causal": False},
    ],
    "s4": [
        {"d_state": 8, "l_max": 70},
        {"d_state": 4, "l_max": 16, "init": "legt", "n_ssm": 4, "rate": 0.5},
        {"d_state": 6, "l_max": 13, "init": "fourier", "dt_transform": "exp", "output": "linear"},
    ],
    "s4d": [
        {"d_state": 8},
        {"d_state": 6, "init": "lin", "discretization": "bilinear", "n_ssm": 4, "output": "linear", "rate": 0.5},
        {"d_state": 4, "init": "real", "dt_transform": "exp", "output": "half_glu1"},
        {"d_state": 4, "init": "real", "discretization": "bilinear", "activation": "silu", "output": "half_glu2"},
    ],
    "lru": [{"d_state": 12}, {"r_min": 0.5, "r_max": 0.9, "max_phase": 0.6, "output": "linear"}],
    "s5": [
        {"d_state": 12, "blocks": 3},
        {"d_state": 8, "discretization": "bilinear", "C_init": "complex_normal", "output": "half_glu2", "rate": 2.0},
        {"d_state": 8, "C_init": "lecun_normal", "clip_eigs": True, "output": "glu"},
    ],
    "dss": [{"d_state": 6}, {"d_state": 4, "version": "softmax", "l_max": 50, "n_ssm": 2, "rate": 0.5}],
    "sgconv": [
        {"l_max": 40, "kernel_dim": 5},
        {"l_max": 13, "kernel_dim": 2, "init_scale": 1, "kernel_init": "cos", "decay_max": 3.0, "output": "linear"},
        {"l_max": 33, "kernel_dim": 8, "combine": "sum", "decay": "power", "interpolation": "nearest"},
        {"l_max": 9, "kernel_dim": 1, "decay": "fixed_power", "decay_min": 1.0},
    ],
    "mega": [
        {"d_state": 4, "d_qk": 6, "chunk_size": 8},
        {"d_state": 2, "d_qk": 4, "chunk_size": 3, "d_hidden": 10},
        {"d_state": 3, "d_qk": 4, "chunk_size": None},
        {"d_state": 2, "d_qk": 5, "chunk_size": 7, "scores": "laplace", "bias": "simple"},
        {"d_state": 2, "d_qk": 4, "chunk_size": None, "scores": "relu2", "bias": "simple", "max_positions": 80},
    ],
    "hyena": [{"l_max": 50, "d_filter": 8}, {"l_max": 11, "d_filter": 6, "d_position": 5, "d_conv": 4, "shift": 0.05}],
    "lmu": [{"d_state": 6, "theta": 10.0}, {"d_state": 5, "theta": 30.0, "n_memory": 3, "d_hidden": 12}],
    "learned_positions": [{"max_seqlen": 80}],
    "local_attention": [{"nheads": 4, "block": 6}],
    "longformer": [{"nheads": 4, "window": 6}, {"nheads": 2, "window": 5, "n_global": 0, "causal": True}],
    "bigbird": [{"nheads": 4, "block": 4, "n_random": 1}, {"nheads": 2, "block": 3, "n_random": 1, "causal": True}],
    "sparse_attention": [{"nheads": 4, "block": 6, "summary": 2}, {"block": 5, "summary": 1, "causal": True}],
    "linformer": [{"nheads": 4, "rank": 8, "max_seqlen": 80}],
    "nystromformer": [{"nheads": 4, "landmarks": 6}, {"nheads": 2, "landmarks": 4, "conv": None}],
    "luna": [{"nheads": 4, "d_packed": 6}],
    "performer": [{"nheads": 4}, {"nheads": 2, "feature_map": "relu", "n_features": 128, "causal": False}],
    "reformer": [{"nheads": 4, "bucket": 6}, {"nheads": 2, "bucket": 5, "n_hashes": 3}],
    "sinkhorn": [{"nheads": 4, "block": 6, "max_seqlen": 80}],
    "synthesizer": [
        {"nheads": 4, "max_seqlen": 80},
        {"nheads": 2, "scores": "random", "max_seqlen": 80, "causal": True},
        {"nheads": 2, "scores": "dense", "max_seqlen": 80},
    ],
    "fnet": [{}, {"normalized": False}],
}
# Convolved through transforms, whose rounding reaches every position.
TRANSFORMED = {"s4", "s4d", "dss", "sgconv", "mega", "hyena", "lmu"}
# Says where a token stands and not which it is.
BLIND = {"learned_positions"}
HASHED = {"reformer"}
ROWS = [pytest.param({"kind": kind, **v}, id=f"{kind}{i}") for kind in MIXERS for i, v in enumerate(VARIANTS[kind])]
every = pytest.mark.parametrize("config", ROWS)


AHEAD = {row.id for row in ROWS if looks_ahead(row.values[0])}
causal = pytest.mark.parametrize("config", [row for row in ROWS if row.id not in AHEAD])
bidirectional = pytest.mark.parametrize("config", [row for row in ROWS if row.id in AHEAD])


def _mixer(config: dict, dtype: torch.dtype = torch.float64) -> Mixer:
    torch.manual_seed(0)
    return build_mixer(config, D_MODEL, layer_index=1, n_layer=4).to(dtype)


def _input(batch: int, seqlen: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, seqlen, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(
        dtype
    )


def _same(got: Tensor, want: Tensor, atol: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def _same_state(got, want, atol: float = 1e-10) -> None:
    for a, b in zip(got.tensors(), want.tensors(), strict=True):
        if a.shape == b.shape:  # key-value buffers may have grown to another capacity
            _same(a, b, atol)


def test_every_kind_has_variants() -> None:
    assert VARIANTS.keys() == MIXERS.keys()


@causal
@pytest.mark.parametrize("cuts", [(1,), (7, 8), (20,), (1, 2, 3, 4, 36)])
def test_split_invariance(config: dict, cuts: tuple[int, ...]) -> None:
    mixer, x = _mixer(config), _input(2, 37)
    want, last = mixer(x)
    state, parts = None, []
    for begin, end in zip((0, *cuts), (*cuts, 37)):
        before = None if state is None else state.clone()
        y, after = mixer(x[:, begin:end], state)
        if before is not None:  # the given state is left alone
            for a, b in zip(state.tensors(), before.tensors()):
                assert torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
        state = after
        parts.append(y)
    _same(torch.cat(parts, 1), want)
    _same_state(state, last)


@causal
def test_steps_equal_forward(config: dict) -> None:
    mixer, x = _mixer(config), _input(3, 21)
    want, last = mixer(x)
    state = mixer.initial_state(3, 21, dtype=x.dtype)
    with torch.no_grad():
        for t in range(21):
            y, state = mixer.step(x[:, t], state)
            _same(y, want[:, t])
    _same_state(state, last)


@causal
def test_steps_go_on_from_forward(config: dict) -> None:
    mixer, x = _mixer(config), _input(2, 30)
    want, _ = mixer(x)
    _, state = mixer(x[:, :18], mixer.initial_state(2, 30, dtype=x.dtype))
    with torch.no_grad():
        for t in range(18, 30):
            y, state = mixer.step(x[:, t], state)
            _same(y, want[:, t])


@causal
def test_causality(config: dict) -> None:
    mixer, x = _mixer(config), _input(1, 24)
    moved = x.clone()
    moved[:, 11] += 1.0
    change = (mixer(moved)[0] - mixer(x)[0]).abs().amax(-1)[0]
    assert float(change[:11].max()) <= (1e-14 if config["kind"] in TRANSFORMED else 0.0)
    assert (float(change[11]) > 0.0) != (config["kind"] in BLIND)


@bidirectional
def test_layers_that_look_ahead_refuse_to_go_on(config: dict) -> None:
    mixer, x = _mixer(config), _input(2, 24)
    moved = x.clone()
    moved[:, 14] += 1.0
    assert float((mixer(moved)[0] - mixer(x)[0]).abs()[:, :14].max()) > 0.0
    with pytest.raises(UnsupportedInput, match="decode"):
        mixer.step(x[:, 0], mixer.initial_state(2, 24))


@every
def test_packed_equals_separate(config: dict) -> None:
    mixer = _mixer(config)
    if "packed" not in mixer.supports:
        with pytest.raises(UnsupportedInput, match="packed"):
            mixer(_input(1, 4), None, SequenceInfo.packed([2, 2]))
        return
    lengths = [5, 1, 1, 17, 3]
    x = _input(1, sum(lengths))
    y, state = mixer(x, None, SequenceInfo.packed(lengths))
    for part, got in zip(x.split(lengths, 1), y.split(lengths, 1)):
        want, alone = mixer(part)
        _same(got, want)
    if not looks_ahead(config):
        _same_state(state, alone)


@causal
def test_first_document_continues(config: dict) -> None:
    mixer = _mixer(config)
    if "packed" not in mixer.supports:
        pytest.skip("the mixer declares no packing; test_packed_equals_separate checks the refusal")
    x = _input(1, 25)
    want, _ = mixer(x[:, :16])
    _, state = mixer(x[:, :9])
    y, _ = mixer(x[:, 9:], state, SequenceInfo.packed([7, 9], continues=True))
    _same(y[:, :7], want[:, 9:])
    _same(y[:, 7:], mixer(x[:, 16:])[0])
    fresh, _ = mixer(x[:, 9:], state, SequenceInfo.packed([7, 9]))
    _same(fresh[:, :7], mixer(x[:, 9:16])[0])


@every
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_is_absent(config: dict, side: str) -> None:
    """Rows of different lengths: outputs and the state, and what is decoded from it, equal those of each row alone."""
    mixer = _mixer(config)
    lengths, width = [13, 4, 1], 13
    x = _input(3, width)
    mask = torch.zeros(3, width, dtype=torch.bool)
    for row, n in enumerate(lengths):
        begin = {"left": width - n, "right": 0, "both": (width - n) // 2}[side]
        mask[row, begin : begin + n] = True
    seq = SequenceInfo(padding_mask=mask)
    if "padded" not in mixer.supports:
        with pytest.raises(UnsupportedInput, match="padded"):
            mixer(x, None, seq)
        return
    before = None if looks_ahead(config) else mixer(_input(3, 5) + 1)[1]
    for start in (None, before):
        y, state = mixer(x, start, seq)
        for row in range(3):
            alone = None if start is None else start.reorder(torch.tensor([row]))
            want, after = mixer(x[row : row + 1, mask[row]], alone)
            _same(y[row, mask[row]], want[0])
            if not looks_ahead(config):
                more = _input(3, 6) - 1
                _same(mixer(more, state)[0][row], mixer(more[row : row + 1], after)[0][0])


@every
def test_batch_rows_are_independent(config: dict) -> None:
    mixer, x = _mixer(config), _input(4, 9)
    order = torch.tensor([2, 0, 3, 1])
    y, state = mixer(x)
    moved, moved_state = mixer(x[order])
    _same(moved, y[order])
    _same(mixer(x[:1])[0], y[:1])
    _same_state(moved_state, state.reorder(order))


@causal
def test_autocast_may_begin_and_end_anywhere(config: dict) -> None:
    """Spans and steps inside it and outside go on from each other."""
    mixer, x = _mixer(config, torch.float32), _input(2, 12, torch.float32)
    with torch.no_grad():
        want, _ = mixer(x)
        for inside in ((True, True, True), (True, False, False), (False, True, True), (True, False, True)):
            state, parts = mixer.initial_state(2, 12), []
            for span, wanted in zip((x[:, :7], x[:, 7:11], x[:, 11:]), inside):
                with torch.autocast("cpu", torch.bfloat16, enabled=wanted):
                    if span.shape[1] > 1:
                        y, state = mixer(span, state)
                    else:
                        y, state = mixer.step(span[:, 0], state)
                        y = y[:, None]
                parts.append(y.float())
            error = (torch.cat(parts, 1) - want).square().mean().sqrt()
            assert error < 0.05 * want.square().mean().sqrt(), inside


@causal
def test_state_is_as_declared(config: dict) -> None:
    mixer = _mixer(config, torch.float32)
    for batch, seqlen in ((1, 4), (3, 40)):
        state = mixer.initial_state(batch, seqlen)
        assert state.nbytes == mixer.state_bytes(batch, seqlen)
    half = _mixer(config, torch.bfloat16)
    _, state = half(_input(1, 5, torch.bfloat16))
    for name, tensor in vars(state).items():
        if name in ("ssm", "state", "summary"):
            assert tensor.dtype in (torch.float32, torch.complex64), f"{name} accumulates in {tensor.dtype}"


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_auto_agrees_with_reference(config: dict, dtype: torch.dtype) -> None:
    """The rows that run by default, forward and gradients, against the float64 reference form of every op."""
    if config["kind"] in HASHED and dtype == torch.bfloat16:
        pytest.skip(
            "a bucket is an argmax: rounding to 16 bits moves tokens to other buckets, and the answer with them"
        )
    exact, mixer = _mixer(config), _mixer(config, dtype)
    exact.load_state_dict({k: v.double() for k, v in mixer.state_dict().items()})
    x = _input(2, 70, dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    # Not the sum of squares: behind a norm it hardly depends on what is inside, and gradients are all rounding.
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with use_backend("reference"):
        want, _ = exact(wide)
        (want * weights).sum().backward()
    got, _ = mixer(x)
    (got * weights.to(dtype)).sum().backward()
    pairs = {"y": (got, want)}
    named = [("x", x, wide), *((n, p, q) for (n, p), q in zip(mixer.named_parameters(), exact.parameters()))]
    for name, p, q in named:
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            pairs[f"d{name}"] = (p.grad, q.grad)
    # float32: rounding of the projections; bfloat16: every projection rounds its output to 8 bits.
    bound = {torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    for name, (a, b) in pairs.items():
        a, b = a.detach().double(), b.detach()
        assert float((a - b).square().mean().sqrt()) <= bound * float(b.square().mean().sqrt()), name


@every
def test_special_parameters_exist(config: dict) -> None:
    mixer = _mixer(config)
    names = dict(mixer.named_parameters())
    for group, options in mixer.param_groups():
        assert group and options
        assert set(group) <= names.keys()


@every
def test_config_round_trip(config: dict) -> None:
    made = mixer_config(config)
    assert mixer_config(made.to_dict()) == made
    with pytest.raises(ConfigError, match="no field typo"):
        mixer_config({**config, "typo": 1})


@every
def test_wrong_width_is_refused(config: dict) -> None:
    mixer = _mixer(config)
    for shape in ((1, 4, D_MODEL + 1), (4, D_MODEL), (1, 0, D_MODEL), (0, 4, D_MODEL)):
        with pytest.raises(UnsupportedInput, match="d_model|seqlen"):
            mixer(torch.zeros(shape, dtype=torch.float64))


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="known: .*mamba"):
        mixer_config({"kind": "mumba"})


def test_mamba_starts_as_published() -> None:
    """Ranges of the original initialisation: A = 1..n, dt in [1e-3, 0.1], D = 1, out_proj scaled by depth."""
    mixer = build_mixer({"kind": "mamba"}, 256, n_layer=16, branches=1)
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert float(dt.min()) >= 0.999e-3 and float(dt.max()) <= 0.1001
    assert float(dt.log().std()) == pytest.approx(torch.log(torch.tensor(100.0)).item() / 12**0.5, rel=0.1)
    assert torch.equal(mixer.D, torch.ones(512))
    bounds = {"in_proj": 256**-0.5, "x_proj": 512**-0.5, "dt_proj": 16**-0.5, "out_proj": 512**-0.5 / 4}
    for name, bound in bounds.items():
        largest = float(getattr(mixer, name).weight.abs().max())
        assert 0.98 * bound < largest <= bound, name
    assert float(mixer.conv1d.weight.abs().max()) <= 0.5


BORDERS = "..aaaaa..|.bb.b.|..c|dddddddddddd.|....e|.ffffff"
TOGETHER = "aaaaa|bbb|c|dddddddddddd|e|ffffff"


def _told(layout: str) -> tuple[Tensor, Tensor, SequenceInfo]:
    """Real tokens, the document of each position, and both as said by every way of telling documents, which agree."""
    parts = layout.split("|")
    real = torch.tensor([[c != "." for c in "".join(parts)]])
    numbers = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])[None]
    before = ((numbers == numbers.mT) & real & torch.ones(numbers.shape[1], numbers.shape[1]).tril(-1).bool()).sum(1)
    ways: list[dict] = [
        {"position_ids": torch.where(real, before[None] + first, 0)} for first in ((0, 1) if "." in layout else (0,))
    ]
    ways.append({"seq_idx": numbers})
    ways.append({"cu_seq_lens_q": torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)})
    told = [sequence_info(1, real.shape[1], 0, attention_mask=real.long(), **way) for way in ways]
    for one in told:
        assert one is not None and one.document_ids is not None
        torch.testing.assert_close(one.document_ids[real], numbers[real])
    assert told[0] is not None
    return real, numbers, told[0]


@every
@pytest.mark.parametrize(
    ("poison", "dtype"), [(torch.nan, torch.float64), (torch.inf, torch.float64), (torch.nan, torch.float32)]
)
def test_nothing_of_one_document_reaches_another(config: dict, poison: float, dtype: torch.dtype) -> None:
    """With padding at every border, NaN or infinity in it, in every second document and in the state before."""
    mixer, close = _mixer(config, dtype), 1e-10 if dtype == torch.float64 else 1e-5
    if "packed" not in mixer.supports:
        pytest.skip("the mixer declares no packing; test_packed_equals_separate checks the refusal")
    real, numbers, seq = _told(BORDERS if "padded" in mixer.supports else TOGETHER)
    for bad in (0, 1):
        clean = real & (numbers % 2 != bad)
        x = _input(1, real.shape[1], dtype).masked_fill(~clean[..., None], poison).requires_grad_()
        before, fresh = None, seq
        if "initial_state" in mixer.supports and not looks_ahead(config):
            _, before = mixer(torch.full_like(x[:, :3], poison))
            fresh = SequenceInfo(seq.starts | (real.cumsum(1) == 1), seq.padding_mask)
        y, state = mixer(x, before, fresh)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
        (grad,) = torch.autograd.grad((y.where(clean[..., None], 0) * weights).sum(), x, allow_unused=True)
        for number in numbers[clean].unique().tolist():
            at = (real & (numbers == number))[0]
            alone = x[:, at].detach().requires_grad_()
            want, after = mixer(alone)
            _same(y[:, at], want, close)
            (wanted,) = torch.autograd.grad((want * weights[:, at]).sum(), alone, allow_unused=True)
            if wanted is not None:
                _same(grad[:, at], wanted, 10 * close * max(1.0, float(wanted.abs().max())))
            if number == numbers.max() and before is not None:
                more = _input(1, 6, dtype) - 1
                _same(mixer(more, state)[0], mixer(more, after)[0], close)

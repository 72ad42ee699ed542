"""Published families: opened, their logits are those of the public implementation; written back, every bit is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import PORTS, VOCAB, save, uncached
from rederived import REDERIVED
from safetensors.torch import load_file
from torch import Tensor, nn

import seqlib
from seqlib.errors import CheckpointMismatch
from seqlib.hf.families import recognise
from seqlib.hf.files import WeightFiles, read_json

BOUND = 2e-5
LENGTHS = (21, 9, 2)
cases = pytest.mark.parametrize("case", [*PORTS, *REDERIVED])


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Reference, folder and model of a case, made once."""
    kept: dict[str, tuple[Any, Path, nn.Module]] = {}

    def get(case: str):
        if case not in kept:
            folder = tmp_path_factory.mktemp(case)
            if case in PORTS:
                reference = PORTS[case][1]()
                save(reference, folder)
            else:
                reference = REDERIVED[case]()
                reference.save(folder)
            kept[case] = (reference, folder, seqlib.from_pretrained(folder, match="transformers"))
        return kept[case]

    return get


def rows() -> tuple[list[Tensor], Tensor, Tensor]:
    """Prompts of different lengths, and the same as a left-padded batch with its mask."""
    made = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, VOCAB, (1, n), generator=made) for n in LENGTHS]
    ids, mask = torch.zeros(len(prompts), max(LENGTHS), dtype=torch.long), torch.zeros(len(prompts), max(LENGTHS))
    for row, prompt in enumerate(prompts):
        ids[row, -prompt.shape[1] :], mask[row, -prompt.shape[1] :] = prompt[0], 1
    return prompts, ids, mask


def weights(folder: Path) -> dict[str, Tensor]:
    file = folder / "pytorch_model.bin"
    return torch.load(file, weights_only=True) if file.exists() else load_file(folder / "model.safetensors")


def same(got: Tensor, want: Tensor, bound: float = BOUND) -> None:
    error = float((got - want).abs().max() / want.abs().max())
    print(f"error {error:.1e}")
    assert error <= bound, f"relative error {error:.2e}"


@cases
@torch.no_grad()
def test_logits_of_a_left_padded_batch(case: str, opened) -> None:
    reference, _, model = opened(case)
    prompts, ids, mask = rows()
    logits = model(ids, attention_mask=mask).logits
    for row, prompt in enumerate(prompts):
        same(logits[row, -prompt.shape[1] :], uncached(reference, prompt)[0])


@cases
@torch.no_grad()
def test_logits_while_64_tokens_are_generated(case: str, opened) -> None:
    """Each step's logits from the cache equal one pass of the reference over prompt and continuation."""
    reference, _, model = opened(case)
    prompts, ids, mask = rows()
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    steps = torch.stack(found.logits, 1)
    for row, prompt in enumerate(prompts):
        text = torch.cat([prompt, found.sequences[row : row + 1, ids.shape[1] :]], 1)
        same(steps[row], uncached(reference, text)[0, prompt.shape[1] - 1 : -1])


@cases
@torch.no_grad()
def test_several_tokens_after_right_padding(case: str, opened) -> None:
    """A right-padded batch goes on by five tokens at once, while another cache of the same model is in use."""
    reference, _, model = opened(case)
    prompts, _, _ = rows()
    ids, mask = torch.zeros(len(prompts), max(LENGTHS), dtype=torch.long), torch.zeros(len(prompts), max(LENGTHS))
    for row, prompt in enumerate(prompts):
        ids[row, : prompt.shape[1]], mask[row, : prompt.shape[1]] = prompt[0], 1
    more = torch.randint(3, VOCAB, (len(prompts), 5), generator=torch.Generator().manual_seed(4))
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    model(ids.flip(1), use_cache=True)
    logits = model(more, past_key_values=cache).logits
    for row, prompt in enumerate(prompts):
        same(logits[row], uncached(reference, torch.cat([prompt, more[row : row + 1]], 1))[0, -5:])


@cases
def test_fields_that_nobody_knows_are_refused(case: str, opened) -> None:
    """At the top of the config and in each of its parts: such a model may compute something else."""
    _, folder, _ = opened(case)
    config = read_json(folder, "config.json", {}) or read_json(folder, "params.json", {})

    def read(**changes: Any) -> dict[str, Any]:
        family, values = recognise(folder, config | changes)
        look = family.look or (lambda names: {})
        return family.config(values | look(WeightFiles(folder, {}).shapes), "authors")

    parts = [name for name, value in config.items() if isinstance(value, dict) and name not in ("id2label", "label2id")]
    rope = config.get("rope_parameters") or {}
    if rope and (rope["rope_theta"] is None or read() == read(rope_parameters=rope | {"rope_theta": 5.0})):
        parts.remove("rope_parameters")  # no layer rotates
    for changes in ({"bidirectional": True}, *({name: config[name] | {"bidirectional": True}} for name in parts)):
        with pytest.raises(CheckpointMismatch, match="bidirectional"):
            read(**changes)


@cases
def test_bfloat16_trains(case: str, opened) -> None:
    """Logits are near those in float32, and every weight gets a finite gradient."""
    _, folder, model = opened(case)
    ids = torch.cat(rows()[0][:1])
    narrow = seqlib.from_pretrained(folder, match="transformers", dtype=torch.bfloat16).train()
    out = narrow(ids, labels=ids)
    with torch.no_grad():
        want = model(ids).logits
    assert (out.logits.float() - want).square().mean().sqrt() < 5e-2 * want.square().mean().sqrt()
    out.loss.backward()
    for name, parameter in narrow.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name


@cases
def test_written_back_every_bit_is_there(case: str, opened, tmp_path) -> None:
    _, folder, model = opened(case)
    seqlib.export(model, PORTS[case][0] if case in PORTS else REDERIVED[case].layout, tmp_path)
    before, after = weights(folder), weights(tmp_path)
    constants = {name for name in before if name.endswith(("slope_rate", "_decay"))}  # MiniMax stores them
    if case == "gla-fused":  # the layout of today is written
        fused = [name for name in before if name.endswith("gate_proj.weight")]
        after |= {n: torch.cat([after[n], after.pop(n.replace("gate", "up"))]) for n in fused}
    assert before.keys() - constants == after.keys()
    for name, weight in after.items():
        assert torch.equal(weight, before[name]), name
    again = seqlib.from_pretrained(tmp_path, match="transformers")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))


@cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tensor_keeps_its_own_dtype(case: str, dtype: torch.dtype, opened, tmp_path) -> None:
    """Decays in float32 beside weights in 16 bits, in the file and when it is opened without a dtype."""
    _, folder, _ = opened(case)
    model = seqlib.from_pretrained(folder, match="transformers", dtype=dtype)
    seqlib.export(model, PORTS[case][0] if case in PORTS else REDERIVED[case].layout, tmp_path)
    again = seqlib.from_pretrained(tmp_path, match="transformers")
    for (name, want), got in zip(model.named_parameters(), again.parameters()):
        assert got.dtype == want.dtype and torch.equal(got, want), name
    numbers = {dt: sum(p.numel() for p in model.parameters() if p.dtype == dt) for dt in (dtype, torch.float32)}
    written = weights(tmp_path).values()
    for dt, count in numbers.items():
        assert (count == 0) == all(tensor.dtype != dt for tensor in written), dt
    assert numbers[dtype] > numbers[torch.float32]

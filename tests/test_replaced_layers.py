"""Layers may be replaced by adapters and quantised ones: a law over every mixer, and the packages that do it."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_mixers import D_MODEL, ROWS
from torch import Tensor, nn

from seqlib.errors import UnsupportedInput
from seqlib.hf import SeqlibConfig, SeqlibForCausalLM, SeqlibForSequenceClassification
from seqlib.layers.linear import Linear, ordinary
from seqlib.mixers import build_mixer, looks_ahead, mixer_config

LENGTH = 9


class Packed(nn.Module):
    """A linear layer in 8 bits, kept in two packed halves: whoever reads `weight` gets the wrong shape and dtype."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        w = layer.weight.detach()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.scale = w.abs().amax(1, keepdim=True).clamp(min=1e-9) / 127
        self.weight = nn.Parameter((w / self.scale).round().to(torch.int8).reshape(-1, 1), requires_grad=False)
        self.bias = layer.bias

    def whole(self) -> Tensor:
        return self.weight.view(self.out_features, -1) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.whole().to(x.dtype), self.bias)


class Foreign(Tensor):
    """A tensor of another class, as torchao keeps its weights: no compiled op of this library may be given one."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if str(func).startswith("seqlib."):
            raise AssertionError(f"{func} was given a tensor of another class")
        made = super().__torch_function__(func, types, args, kwargs)
        return made.as_subclass(Tensor) if func is F.linear else made


def linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((name, m) for name, m in list(module.named_modules()) if isinstance(m, nn.Linear))


def packed(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    """`module` with every linear layer in 8 bits, and the same with ordinary layers of those weights."""
    small, same = copy.deepcopy(module), copy.deepcopy(module)
    for name, layer in linears(small):
        quantised = Packed(layer)
        small.set_submodule(name, quantised)
        with torch.no_grad():
            same.get_submodule(name).weight.copy_(quantised.whole())
    return small, same


def built(row: dict) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    mixer = build_mixer(row, D_MODEL).eval()
    with torch.no_grad():
        for _, layer in linears(mixer):  # some start at zero
            layer.weight.add_(0.05 * torch.randn_like(layer.weight))
    return mixer, torch.randn(2, LENGTH, D_MODEL)


def decoded(mixer: nn.Module, x: Tensor) -> Tensor:
    state = mixer.initial_state(len(x), LENGTH)
    with torch.no_grad():
        ys = []
        for t in range(LENGTH):
            y, state = mixer.step(x[:, t], state)
            ys.append(y)
    return torch.stack(ys, 1)


def decodes(row: dict) -> bool:
    return not looks_ahead(mixer_config(row))


@pytest.mark.parametrize("row", ROWS)
def test_every_linear_layer_of_a_mixer_is_called(row: dict) -> None:
    mixer, x = built(row)
    small, same = packed(mixer)
    with torch.no_grad():
        torch.testing.assert_close(small(x)[0], same(x)[0], rtol=2e-4, atol=2e-5)
        torch.testing.assert_close(small(x[:1, :3])[0], same(x[:1, :3])[0], rtol=2e-4, atol=2e-5)
    if decodes(row):
        torch.testing.assert_close(decoded(small, x), decoded(same, x), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("row", ROWS)
def test_no_compiled_op_reads_a_tensor_of_another_class(row: dict) -> None:
    mixer, x = built(row)
    foreign = copy.deepcopy(mixer)
    for _, layer in linears(foreign):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Foreign), requires_grad=False)
        assert type(layer.weight) is not nn.Parameter
    with torch.no_grad():
        for part in (x, x[:1, :3]):
            torch.testing.assert_close(foreign(part)[0], mixer(part)[0], rtol=2e-4, atol=2e-5)
    if decodes(row):
        torch.testing.assert_close(decoded(foreign, x), decoded(mixer, x), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("row", ROWS)
def test_adapters_of_every_linear_layer_learn_decode_and_merge(row: dict) -> None:
    mixer, x = built(row)
    mixer(x.clone().requires_grad_())[0].square().sum().backward()
    # A few options leave a projection without use; a mixer says so by the gradient of the layer itself.
    names = [name for name, layer in linears(mixer) if layer.weight.grad is not None and layer.weight.grad.any()]
    mixer.zero_grad()
    if not names:
        return
    adapted = get_peft_model(mixer, LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    inner = adapted.base_model.model
    y = inner(x)[0]
    y.square().sum().backward()
    still = [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not still
    if decodes(row):
        torch.testing.assert_close(decoded(inner, x), y.detach(), rtol=1e-3, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(x)[0], y, rtol=1e-3, atol=1e-4)


MODELS: dict[str, dict] = {
    "mamba": {"mixer": {"kind": "mamba", "d_state": 4}},
    "hyena": {"mixer": {"kind": "hyena", "l_max": 32, "d_filter": 8}},
    "experts": {"mixer": {"kind": "attention", "nheads": 2}, "mlp": {"d_mlp": 32, "nexperts": 4}},
    "scaled": {"mixer": {"kind": "gla", "nheads": 2}, "embed_scale": 3.0},
    "shared": {
        "layer_pattern": "s s",
        "mixers": {"s": {"kind": "shared", "mixer": {"kind": "attention", "nheads": 2}, "adapter_rank": 2}},
    },
}
IDS = torch.tensor([[5, 9, 3, 1, 7, 2, 8], [4, 4, 6, 2, 9, 1, 3]])


def model_of(name: str, kind: type = SeqlibForCausalLM, **changes) -> SeqlibForCausalLM:
    torch.manual_seed(0)
    return kind(SeqlibConfig(**{"d_model": 32, "n_layer": 2, "vocab_size": 40} | MODELS[name] | changes)).eval()


TARGETS = [
    *(("all-linear", options) for options in ({}, {"use_dora": True}, {"use_rslora": True})),
    *((heads, {}) for heads in (["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"])),
]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("targets", "options"), TARGETS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_merging_an_adapter_changes_nothing(name: str, targets, options: dict, tied: bool, tmp_path) -> None:
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    adapted = get_peft_model(model_of(name, tie_word_embeddings=tied), config).eval()
    logits = adapted(IDS).logits
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(model_of(name, tie_word_embeddings=tied), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(IDS).logits, logits)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    opened = SeqlibForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(opened(IDS).logits, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_a_classifier_merge(name: str) -> None:
    model = model_of(name, SeqlibForSequenceClassification, num_labels=3, pad_token_id=0)
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    logits = adapted(IDS).logits
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, logits, rtol=1e-3, atol=1e-4)


def test_an_embedding_of_numbers_is_no_table_to_adapt() -> None:
    model = model_of("mamba", SeqlibForSequenceClassification, embedding="number", pad_token_id=0)
    with pytest.raises(ValueError, match="NumberEmbedding"):
        get_peft_model(model, LoraConfig(target_modules=["embed_tokens"]))


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_calls_a_head_that_was_replaced(name: str) -> None:
    model = model_of(name, tie_word_embeddings=False)
    small, same = packed(model)
    for return_logits in (True, False):
        loss, want = (m(IDS, labels=IDS, return_logits=return_logits).loss for m in (small, same))
        torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantize_dynamic_is_refused_or_converts_every_layer() -> None:
    from torch.ao.quantization import quantize_dynamic

    model = model_of("mamba", tie_word_embeddings=False)
    with pytest.raises(UnsupportedInput, match="ordinary"):
        quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert any(type(m) is Linear for m in model.modules())
    with torch.no_grad():
        logits = model(IDS).logits
        small = quantize_dynamic(ordinary(model), {nn.Linear}, dtype=torch.qint8)
        assert not list(linears(small))
        assert (small(IDS).logits - logits).norm() < 0.1 * logits.norm()


def quantised_by(package: str, folder) -> SeqlibForCausalLM:
    """The model of a folder, in 8 bits by one of the packages that transformers knows."""
    from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    pytest.importorskip(package, reason=f"{package} is not installed; the laws above hold without it")
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(load_in_8bit=True) if package == "bitsandbytes" else QuantoConfig(weights="int8")
    return SeqlibForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("package", ["bitsandbytes", "torchao", "optimum.quanto"])
def test_quantisers_quantise_every_linear_layer(package: str, name: str, tmp_path) -> None:
    model = model_of(name, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    small = quantised_by(package, tmp_path)
    left = [n for n, m in linears(small) if type(m) in (Linear, nn.Linear) and type(m.weight) is nn.Parameter]
    assert set(left) <= {"lm_head"}
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :3]):
            assert (small(ids).logits - model(ids).logits).norm() < 0.1 * model(ids).logits.norm()
    said = [small.generate(IDS, max_new_tokens=4, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*said)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_adapters_learn_the_same_under_gradient_checkpointing(name: str, reentrant: bool) -> None:
    adapted = get_peft_model(model_of(name), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.train()
    learned = [p for p in adapted.parameters() if p.requires_grad]
    plain = torch.autograd.grad(adapted(IDS, labels=IDS).loss, learned)
    adapted.enable_input_require_grads()
    adapted.gradient_checkpointing_enable({"use_reentrant": reentrant})
    adapted(IDS, labels=IDS).loss.backward()
    for p, want in zip(learned, plain, strict=True):
        assert p.grad is not None and p.grad.any()
        torch.testing.assert_close(p.grad, want)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_in_float32_beside_a_model_in_16_bits(name: str) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model_of(name).bfloat16(), config).eval()
    adapted(IDS, labels=IDS).loss.backward()
    learned = [p for p in adapted.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.any() for p in learned)
    with torch.no_grad():
        logits = adapted(IDS).logits
        merged = adapted.merge_and_unload()(IDS).logits
    assert logits.dtype == torch.bfloat16 and (merged - logits).norm() < 0.1 * logits.norm()


@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"]], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_modules_to_save_are_saved_and_merged(name: str, modules: list[str], tmp_path) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=modules, init_lora_weights=False)
    adapted = get_peft_model(model_of(name), config).eval()
    with torch.no_grad():
        for key, p in adapted.named_parameters():
            if "modules_to_save" in key:
                p.add_(0.1 * torch.randn_like(p))
    logits = adapted(IDS).logits
    adapted.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(
        PeftModel.from_pretrained(model_of(name), tmp_path / "adapter").eval()(IDS).logits, logits
    )
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    opened = SeqlibForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(opened(IDS).logits, logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_that_were_added_up_merge(name: str) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(model_of(name), config, "a")
    adapted.add_adapter("b", config)
    adapted.add_weighted_adapter(["a", "b"], [0.5, -1.0], "both", combination_type="cat")
    adapted.set_adapter("both")
    logits = adapted.eval()(IDS).logits
    torch.testing.assert_close(adapted.merge_and_unload()(IDS).logits, logits, rtol=1e-3, atol=1e-4)


PROMPTS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_layers": 2, "token_dim": 32}
PROMPTS |= {"num_attention_heads": 2, "num_transformer_submodules": 1}


@pytest.mark.parametrize("name", MODELS)
def test_a_tuned_prompt_stands_before_the_text_once(name: str) -> None:
    model = model_of(name, tie_word_embeddings=False, initializer_range=0.5)
    tuned = get_peft_model(model, PromptTuningConfig(**PROMPTS)).eval()
    with torch.no_grad():
        tuned.prompt_encoder.default.embedding.weight.mul_(3)
        ids = IDS[:1]
        for _ in range(6):
            ids = torch.cat([ids, tuned(ids).logits[:, -1:].argmax(-1)], 1)
    for cached in (True, False):
        said = tuned.generate(
            input_ids=IDS[:1], max_new_tokens=6, do_sample=False, use_cache=cached, eos_token_id=None, pad_token_id=39
        )
        assert said.tolist() == ids.tolist()


def test_prefixes_of_keys_and_values_are_refused() -> None:
    tuned = get_peft_model(model_of("mamba"), PrefixTuningConfig(**PROMPTS))
    with pytest.raises(UnsupportedInput, match="SeqlibCache"):
        tuned(IDS, labels=IDS)

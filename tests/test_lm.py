"""The language-model application: text in, a trained, evaluated and generating model out, exactly and resumably."""

from __future__ import annotations

import functools
import io
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from seqlib.errors import CheckpointMismatch, ConfigError, CorpusError, SeqlibError, UnsupportedInput
from seqlib.hf import ByteTokenizer
from seqlib.hf.names import CACHE
from seqlib.hf.runs import override, read_metrics
from seqlib.lm import cli, runs
from seqlib.lm import demo as demonstration
from seqlib.lm import train as training
from seqlib.lm.corpus import Corpus, Document, read_corpus, stdlib_corpus
from seqlib.lm.data import PackedRows, Tokens, tokenize
from seqlib.lm.evaluate import evaluate, score
from seqlib.lm.generate import _ByteStreamer, generate, load_model
from seqlib.lm.recipes import demo, mixer_sweep, tiny
from seqlib.lm.runs import DataSpec, Run
from seqlib.lm.sweep import run_sweep

QUIET = Console(quiet=True)
WORDS = ["state", "space", "models", "carry", "a", "through", "documents", "and", "forget", "it", "at", "their", "end"]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small models run no faster on more, and tests beside each other run slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _documents(*texts: bytes) -> list[Document]:
    return [Document.of(str(i), text) for i, text in enumerate(texts)]


def _tokens(path: Path, *texts: bytes) -> Tokens:
    return tokenize(_documents(*texts), ByteTokenizer(), path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files."""
    folder = tmp_path_factory.mktemp("text")
    choose = random.Random(0)
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(choose.choices(WORDS, k=250)))
    return folder


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return training.build_model(tiny(), ByteTokenizer()).eval()


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the tiny recipe that nothing interrupted; two epochs and two forwards per step."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return training.train(_recipe(), DataSpec.of([str(text)]), folder, console=QUIET)


def _recipe():
    return override(tiny(), ["accumulation=2", "batch_size=8", "eval_every=10"])


def _cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """The console script within this process."""
    monkeypatch.setattr(sys, "argv", ["seqlib-lm", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as done:
        if done.code:
            raise


# Evaluation


def test_packed_documents_do_not_see_each_other(tmp_path: Path, model: torch.nn.Module) -> None:
    texts = [b"first document", b"x", b"another one", b"and the last of them"]
    tokens = _tokens(tmp_path, *texts)
    row = PackedRows(tokens, len(tokens))[0]
    with torch.no_grad():
        logits = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0]
    for begin, (ids, _) in zip(tokens.starts.tolist(), tokens.documents()):
        alone = score(model, ids)
        packed = torch.nn.functional.cross_entropy(logits[begin : begin + len(alone)], ids[1:], reduction="none")
        torch.testing.assert_close(packed.double(), alone, atol=1e-5, rtol=0)


def test_evaluation_is_the_same_in_chunks_of_any_size(tmp_path: Path, model: torch.nn.Module) -> None:
    texts = [os.urandom(700), b"x", b"some words", os.urandom(65)]
    tokens = _tokens(tmp_path, *texts)
    found = {chunk: evaluate(model, tokens, chunk=chunk) for chunk in (50, 64, 2048)}
    whole = found[2048]
    assert whole.bytes == whole.tokens == sum(map(len, texts)) and whole.documents == 4
    for each in found.values():
        assert each.bits_per_byte == pytest.approx(whole.bits_per_byte, abs=1e-5)
    nats = 0.0
    for ids, _ in tokens.documents():
        with torch.no_grad():
            loss = model(input_ids=ids[None], labels=ids[None]).loss
        nats += float(loss) * (len(ids) - 1)
    assert whole.bits_per_byte == pytest.approx(nats / math.log(2) / whole.bytes, abs=1e-5)
    assert whole.perplexity == pytest.approx(math.exp(nats / whole.tokens), rel=1e-5)
    assert [(b.begin, b.end, b.tokens) for b in whole.buckets] == [
        (0, 64, 64 + 1 + 10 + 64), (64, 128, 64 + 1), (128, 256, 128), (256, 512, 256), (512, 1024, 188)
    ]  # fmt: skip
    assert sum(b.tokens * b.bits_per_token for b in whole.buckets) == pytest.approx(nats / math.log(2), rel=1e-5)
    assert evaluate(model, tokens, max_bytes=701).documents == 2


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes)).eval()


def test_models_of_transformers_are_evaluated_exactly_or_refused(tmp_path: Path) -> None:
    tokens, llama = _tokens(tmp_path, os.urandom(300)), _llama()
    carried, whole = (evaluate(llama, tokens, chunk=chunk).bits_per_byte for chunk in (37, 1000))
    assert carried == pytest.approx(whole, abs=1e-6)
    forward = llama.forward

    def forgets(**inputs):
        return forward(**(inputs | {CACHE: None}))

    llama.forward = forgets
    with pytest.raises(UnsupportedInput, match="does not continue a sequence exactly"):
        evaluate(llama, tokens)
    llama.forward = lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits)
    with pytest.raises(UnsupportedInput, match="returns no cache"):
        evaluate(llama, tokens)


def test_subword_models_are_measured_per_byte(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "grün": 2, "rot": 3}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>")
    data = "grün rot grün grün".encode()
    tokens = tokenize(_documents(data), tokenizer, tmp_path)
    assert [ids.tolist() for ids, _ in tokens.documents()] == [[0, 2, 3, 2, 2]]
    assert tokens.bytes_per_token == len(data) / 4
    found = evaluate(_llama(), tokens)
    assert found.bits_per_byte == pytest.approx(math.log2(found.perplexity) * 4 / len(data))
    with pytest.raises(CorpusError, match="not UTF-8"):
        tokenize(_documents(b"\xff\xfe"), tokenizer, tmp_path)


# Recipes


def test_settings_change_recipes() -> None:
    changed = override(demo(), ["d_model=64", "mixers.a.window=32", "learning_rate=1", "mlp.d_mlp=128", "tokenizer=7"])
    assert (changed.d_model, changed.mixers["a"]["window"], changed.mlp) == (64, 32, {"d_mlp": 128})
    assert changed.learning_rate == 1.0 and type(changed.learning_rate) is float and changed.tokenizer == "7"
    assert demo().mixers["a"]["window"] != 32, "the recipe itself is left alone"
    assert override(changed, ["mlp=null"]).mlp is None
    assert type(changed).from_dict(json.loads(json.dumps(changed.to_dict()))) == changed


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("d_modl=3", "did you mean d_model"), ("steps=2.5", "not int"), ("steps", "key=value"), ("name=x", "no field"),
        ("tie_embeddings=1", "not bool"), ("mixers=3", "JSON object"), ("steps.x=3", "no parts"),
        ("save_every=7", "multiple of log_every"), ("backend=fast", "one of auto"), ("dtype=int8", "float32 or bf"),
        ("learning_rate=NaN", "positive"), ("steps=0", "from 1 to"), ("seed=-1", "from 0 to"),
        ("mlp.d_mlp=NaN", "mlp.d_mlp must be a number"), ("mixers.m=null", "an object with a kind"),
        ("weight_decay=Infinity", "from 0 to"), ("layer_pattern=m*99999999", "repeats layers"),
        ("tokenizer=\" \"", "bytes"), ("clip=NaN", "from 0"), ("eval_every=7", "multiple of"),
        ("n_layer=10000000", "at most 10,000"), ("mixers.m.d_state=\"x\"", "must be an integer"),
        ("seqlen=999999999", "batch_size times"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(demo(), [setting])


# Training


def test_a_run_leaves_everything_behind(finished: Run) -> None:
    rows = [row for row in read_metrics(finished.metrics) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert rows[0]["bits_per_byte"] == pytest.approx(8, abs=0.3) and rows[-1]["bits_per_byte"] < 6
    assert all(row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2)) for row in rows)
    length = len(PackedRows(tokenize(finished.corpus().train, ByteTokenizer()), 64))
    batches = [min(8, length - at) for at in range(0, length, 8)]  # the last one of an epoch is smaller
    groups = [sum(batches[at : at + 2]) for at in range(0, len(batches), 2)]
    read = 64 * sum((groups * 20)[:20])
    assert length % 8 and rows[-1]["tokens"] == read < 20 * 2 * 8 * 64 and rows[-1]["tokens_per_s"] > 0
    held_out = [row for row in read_metrics(finished.metrics) if "eval_bits_per_byte" in row]
    assert [row["step"] for row in held_out] == [10, 20] and held_out[1]["eval_bits_per_byte"] < 6
    assert (finished.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((finished.folder / "recipe.json").read_text())
    assert kept["recipe"]["accumulation"] == 2 and {"torch", "transformers"} < set(kept["versions"])
    assert any("selective_scan" in target for target in kept["backends"])
    assert sorted(p.name for p in finished.checkpoints.iterdir()) == ["checkpoint-15", "checkpoint-20"]
    assert finished.corpus().digest == finished.digest


def test_the_saved_model_is_the_trained_one(finished: Run) -> None:
    model, _ = load_model(str(finished.folder))
    tokens = tokenize(finished.corpus().validation, ByteTokenizer())
    last = [row for row in read_metrics(finished.metrics) if "eval_bits_per_byte" in row][-1]
    found = evaluate(model, tokens, max_bytes=finished.recipe.eval_bytes)
    assert found.bits_per_byte == pytest.approx(last["eval_bits_per_byte"], abs=1e-6)
    assert type(AutoModelForCausalLM.from_pretrained(finished.model)) is type(model)


def _losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(run / "metrics.jsonl") if "loss" in row]


def test_killed_run_resumes_exactly_even_after_a_full_disk(text: Path, finished: Run, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "seqlib.lm.cli", "train", text, "--recipe", "tiny", "--output", folder]
    for setting in ("accumulation=2", "batch_size=8", "eval_every=10"):
        command += ["--set", setting]
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    try:
        while len(read_metrics(folder / "metrics.jsonl")) < 7:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.kill()  # SIGKILL: no handler runs, nothing is flushed
        process.wait()
    assert not (folder / "model").exists()
    before = {p.name for p in (folder / "checkpoints").iterdir() if p.name != "checkpoint-being-written"}
    assert "checkpoint-5" in before and "checkpoint-20" not in before

    # No file may grow beyond 100 kB, which is what a full disk looks like to the writer of a checkpoint.
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(SeqlibError, match="no space is left .* --resume"):
            training.resume(folder, console=QUIET)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert {p.name for p in (folder / "checkpoints").iterdir() if p.name != "checkpoint-being-written"} == before

    training.resume(folder, console=QUIET)
    assert _losses(folder) == _losses(finished.folder), "bit for bit"
    with pytest.raises(ConfigError, match="is finished"):
        training.resume(folder, console=QUIET)


def test_a_loss_that_is_no_number_stops_the_run(text: Path, tmp_path: Path) -> None:
    recipe = override(tiny(), ["learning_rate=1e30", "clip=0", "warmup_steps=0"])
    with pytest.raises(SeqlibError, match="the loss is nan at step"):
        training.train(recipe, DataSpec.of([str(text)]), tmp_path / "run", console=QUIET)


def test_changed_text_is_noticed_on_resume(text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "text"
    copy.mkdir()
    for path in text.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    run = Run(tmp_path / "run", tiny(), DataSpec.of([str(copy)]), read_corpus([copy]).digest)
    run.folder.mkdir()
    run.write()
    (copy / "0.txt").write_text("something else")
    with pytest.raises(CorpusError, match="has changed since the run began"):
        training.resume(run.folder, console=QUIET)


# Generation and the command line


def test_prompts_from_everywhere_continue_alike(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompt").write_text("the state")
    common = ["generate", finished.folder, "--max-new-tokens", 20, "--seed", 3]
    said = []
    for arguments in (["--prompt", "the state"], ["--prompt-file", tmp_path / "prompt"], []):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the state")))
        _cli(monkeypatch, *common, *arguments)
        captured = capsys.readouterr()
        said.append(captured.out)
        assert "20 tokens" in captured.err and "tokens/s" in captured.err
    assert said[0] == said[1] == said[2] and said[0].startswith("the state")
    model, tokenizer = load_model(str(finished.model))
    out = io.StringIO()
    made = generate(model, tokenizer, b"the state", max_new_tokens=20, temperature=0.0, out=out)
    assert out.getvalue() == made.data.decode(errors="replace") + "\n"
    assert made.data == generate(model, tokenizer, b"the state", max_new_tokens=20, temperature=0.0).data
    assert generate(model, tokenizer, b"", max_new_tokens=1).new_tokens == 1


def test_streaming_waits_for_whole_characters() -> None:
    out = io.StringIO()
    streamer = _ByteStreamer(out)
    shown = []
    for byte in "aß€".encode():
        streamer.put(torch.tensor([byte]))
        shown.append(out.getvalue())
    streamer.end()
    assert shown == ["a", "a", "aß", "aß", "aß", "aß€"]


def test_evaluate_command(
    finished: Run,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "found.json"
    _cli(monkeypatch, "evaluate", finished.folder, "--json", path)
    own = json.loads(path.read_text())
    assert own["bytes"] == finished.corpus().nbytes("test") and 0 < own["bits_per_byte"] < 6
    assert f"{own['bits_per_byte']:.4f} bits per byte" in capsys.readouterr().out
    _cli(monkeypatch, "evaluate", finished.model, text / "0.txt", text / "1.txt", "--split", "train", "--json", path)
    assert json.loads(path.read_text())["documents"] >= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train {tmp}/nothing --output {tmp}/run", "no such file or folder"),
        ("train {tmp}/binary --output {tmp}/run", "found no text"),
        ("train {text} --recipe nope --output {tmp}/run", "unknown recipe 'nope'"),
        ("train {text}", "--output"),
        ("train {text} --output {run}", "holds a run already"),
        ("train --resume {tmp}", "no run folder"),
        ("train {text} --resume {run}", "leave out everything else"),
        ("train {text} --recipe tiny --output {tmp}/run --set mixers.m.kind=nope", "unknown mixer"),
        ("train {text} --recipe tiny --output {tmp}/run --set layer_pattern=x", "layer_pattern"),
        ("train {text} --recipe tiny --output {tmp}/run --set backend=nope", "backend must be one of"),
        ("train {text} --recipe tiny --output {tmp}/run --set backend=triton", "no implementation"),
        ("train {text} --recipe tiny --output {tmp}/run --set tokenizer={tmp}", "tokenizer"),
        ("train {text} --recipe tiny --output {tmp}/run --set seqlen=100000", "lower seqlen"),
        ("evaluate {tmp}", "no run folder"),
        ("evaluate {tmp} {text}", "neither config.json nor"),
        ("evaluate {run} {tmp}/binary", "found no text"),
        ("evaluate {run} --split half", "unknown split"),
        ("generate {run} --prompt a --temperature -1", "temperature"),
        ("generate {run} --prompt a --top-p 0", "top_p"),
        ("generate {run} --prompt a --max-new-tokens 0", "max_new_tokens"),
        ("generate {run} --prompt a --prompt-file b", "not both"),
        ("generate {run} --prompt-file {tmp}/missing", "cannot be read"),
        ("generate {run} --lines {tmp}/missing", "cannot be read"),
        ("generate {run} --lines {text} --prompt a", "not both"),
        ("generate {run} --lines {text}/0.txt", "is not JSON"),
        ("generate {run} --prompt a --set num_beans=2", "did you mean 'num_beams'"),
        ("generate {run} --prompt a --set num_beams", "key=value"),
        ("generate {run} --prompt a --tokenizer {tmp}", "no tokenizer could be loaded"),
        ("demo --output {text}", "is no run"),
        ("demo --output {run}", "no demonstration"),
        ("demo --minutes nan", "positive"),
        ("recipes nope", "unknown recipe"),
        ("evaluate {run} --seed 1", "--seed"),
        ("train {text} --column text --output {tmp}/run", "--column"),
        ("train --output {tmp}/r --suffix x", "suffix"),
        ("train {run} --output {tmp}/run", "is a run of this program"),
        ("train {text} --output {text}", "no run"),
        ("train {text} --from {run} --set d_model=8 --output {tmp}/run", "--from brings"),
        ("train {text} --recipe tiny --set d_model=1000000 --output {tmp}/run", "GB"),
        ("sweep {text} --mixer {{kind:mamba}}", "no JSON object"),
        ("sweep {text} --mixer nope", "unknown mixer"),
        ("sweep {text} --mixer fnet", "reads what follows"),
        ("generate {run} --prompt a --batch-size 2", "--lines"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: str,
    message: str,
    finished: Run,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "binary").write_bytes(b"\0" * 100)
    with pytest.raises(SystemExit) as stopped:
        _cli(monkeypatch, *arguments.format(tmp=tmp_path, text=text, run=finished.folder).split())
    errors = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and all(line.startswith("  ") for line in errors[1:]), "no traceback"
    assert errors[0].startswith("error: ") and message in errors[0]
    assert not (tmp_path / "run").exists()


def test_damaged_weights_are_refused(finished: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((finished.model / name).read_bytes())
    weights = load_file(finished.model / "model.safetensors")
    weights.pop(next(name for name in weights if "norm" in name))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match="missing"):
        load_model(str(tmp_path))


def test_demo_tells_the_whole_story(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = functools.partial(stdlib_corpus, train_bytes=60_000, held_out_bytes=6_000)
    monkeypatch.setattr(runs, "stdlib_corpus", small)
    monkeypatch.setattr(demonstration, "demo", tiny)
    folder = tmp_path / "demo"
    _cli(monkeypatch, "demo", "--output", folder, "--set", "steps=10")
    _cli(monkeypatch, "demo", "--output", folder, "--minutes", 0.02)  # replaces the first
    said = capsys.readouterr().out
    assert "def " in said and "gram, Kneser-Ney" in said and "step" in said
    first = said.split("Kernels, before the clock starts")[1]
    assert first.index("compiled: seqlib_cpu") < first.index("Text: the standard library"), (
        "no time is lost to compiling"
    )
    assert "of 0.02 minutes training gets" in said and "evaluation 10%" in said
    assert "validation: " in said and "the 4-gram model" in said
    assert (folder / "loss.png").is_file() and said.count("model, metrics, plot") == 2
    result = json.loads((folder / "demo.json").read_text())
    assert result["bits_per_byte"]["every byte alike"] == 8.0
    assert any("this model" in name for name in result["bits_per_byte"])
    corpus: Corpus = small()
    assert 0 < result["test"]["bytes"] <= corpus.nbytes("test"), "what fits into the share of the evaluation"
    steps = int(next(name for name in result["bits_per_byte"] if "this model" in name).split()[-2].replace(",", ""))
    assert read_metrics(folder / "metrics.jsonl")[-1]["step"] == steps


def test_sweep_compares_models_of_equal_size_and_goes_on_where_it_stopped(text, tmp_path) -> None:
    """Sizes differ by less than a row of all MLPs; a finished run is not trained again; another recipe is refused."""
    recipe = override(mixer_sweep(), ["d_model=32", "n_layer=2", "seqlen=64", "steps=2", "log_every=1", "save_every=1"])
    options = {"data": DataSpec.of([str(text)]), "max_bytes": 500, "console": QUIET}
    made = run_sweep(tmp_path, recipe, mixers=["attention", "mamba"], **options)
    sizes = {row["mixer"]: row["parameters"] for row in made["sweep"]}
    assert abs(sizes["mamba"] - sizes["attention"]) <= recipe.n_layer * 3 * recipe.d_model

    weights = tmp_path / "attention" / "model" / "model.safetensors"
    written = weights.stat().st_mtime_ns
    longer = run_sweep(tmp_path, recipe, mixers=["attention", "mamba", '{"kind": "s4d", "d_state": 8}'], **options)
    assert weights.stat().st_mtime_ns == written
    assert [row["mixer"] for row in longer["sweep"]] == ["attention", "mamba", "s4d d_state=8"]
    assert longer["sweep"][:2] == made["sweep"]

    (tmp_path / "mamba" / "row.json").unlink()
    with pytest.raises(ConfigError, match="another recipe"):
        run_sweep(tmp_path, override(recipe, ["steps=4"]), mixers=["mamba"], **options)

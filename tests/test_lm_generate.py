"""Generation from the command line: many prompts, chat templates, every option of GenerationConfig, foreign layouts."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from families import JAMBA, MAMBA, port, save
from hf_models import tiny
from transformers import GenerationConfig

from seqlib.errors import ConfigError, UnsupportedInput
from seqlib.hf import ByteTokenizer
from seqlib.lm import cli
from seqlib.lm.generate import generate, generate_lines, load_model
from seqlib.lm.settings import FIELDS, REFUSED, parse_settings

GREEDY = {"max_new_tokens": 8, "temperature": 0.0}
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture
def speaker(tmp_path: Path) -> Path:
    tiny("hybrid", vocab_size=259, pad_token_id=256, bos_token_id=257, eos_token_id=258).save_pretrained(tmp_path / "m")
    ByteTokenizer().save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def test_lines_in_batches_say_what_single_prompts_say(speaker: Path) -> None:
    model, tokenizer = load_model(str(speaker))
    texts = ["to be", "", "that is the question", "ß"]
    lines = [json.dumps({"prompt": text, "id": i}) for i, text in enumerate(texts)]
    made = list(generate_lines(model, tokenizer, [*lines, "\n"], batch_size=3, **GREEDY))
    assert [row["id"] for row in made] == [0, 1, 2, 3]
    for text, row in zip(texts, made):
        alone = generate(model, tokenizer, text.encode(), **GREEDY)
        assert row["completion"] == alone.data.removeprefix(text.encode()).decode(errors="replace")
        assert row["new_tokens"] == alone.new_tokens


def test_a_chat_template_is_used_where_there_is_one(speaker: Path) -> None:
    model, tokenizer = load_model(str(speaker))
    plain = generate(model, tokenizer, b"hello", **GREEDY, raw=False)
    assert plain.data == generate(model, tokenizer, b"hello", **GREEDY, raw=True).data
    with pytest.raises(ConfigError, match="no chat template"):
        list(generate_lines(model, tokenizer, ['{"messages": [{"role": "user", "content": "hello"}]}'], **GREEDY))
    tokenizer.chat_template = TEMPLATE
    chat = generate(model, tokenizer, b"hello", **GREEDY, raw=False).data
    assert chat.startswith(b"<user>hello\n<assistant>")
    (row,) = generate_lines(model, tokenizer, ['{"messages": [{"role": "user", "content": "hello"}]}'], **GREEDY)
    assert chat.endswith(row["completion"].encode()) or "\ufffd" in row["completion"]
    (same,) = generate_lines(model, tokenizer, ['{"prompt": "hello"}'], **GREEDY)
    assert same["completion"] == row["completion"]


def test_any_option_of_transformers_reaches_it(speaker: Path, monkeypatch, capsys) -> None:
    (speaker.parent / "asked.jsonl").write_text('{"prompt": "to be"}\n{"prompt": "or not"}\n')
    command = ["seqlib-lm", "generate", str(speaker), "--lines", str(speaker.parent / "asked.jsonl")]
    command += ["--temperature", "0"]
    outputs = []
    for more in ([], ["--set", "bad_words_ids=[[111]]", "--set", "num_beams=2", "--max-new-tokens", "5"]):
        assert run(monkeypatch, [*command, *more]) == 0
        said = capsys.readouterr()
        outputs.append([json.loads(line) for line in said.out.splitlines()])
        assert "tokens/s" in said.err
    assert [len(rows) for rows in outputs] == [2, 2]
    assert all(row["new_tokens"] <= 5 and "o" not in row["completion"] for row in outputs[1])


def test_several_beams_are_shown_in_the_end(speaker: Path, monkeypatch, capsys) -> None:
    command = ["seqlib-lm", "generate", str(speaker), "--prompt", "ab", "--temperature", "0", "--max-new-tokens", "4"]
    assert run(monkeypatch, [*command, "--set", "num_beams=2"]) == 0
    assert capsys.readouterr().out.startswith("ab")


@pytest.mark.parametrize("family, fields", [("mamba", MAMBA), ("jamba", JAMBA)])
def test_a_foreign_checkpoint_speaks_with_a_tokenizer_from_elsewhere(
    family: str, fields: dict, speaker: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    ids = {"vocab_size": 259, "pad_token_id": 256, "bos_token_id": 257, "eos_token_id": 258}
    theirs = port(family, **fields, **ids)
    save(theirs, tmp_path / "theirs")
    texts = ["to be", "or not", "ß"]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    command = ["seqlib-lm", "generate", str(tmp_path / "theirs"), "--lines", str(tmp_path / "asked.jsonl")]
    command += ["--temperature", "0", "--max-new-tokens", "8"]

    assert run(monkeypatch, command) == 2
    assert "name one with --tokenizer" in capsys.readouterr().err
    assert run(monkeypatch, [*command, "--tokenizer", str(speaker)]) == 0
    said = [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]
    for text, completion in zip(texts, said, strict=True):
        prompt = torch.tensor([[257, *text.encode()]])
        expected = theirs.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        assert completion == ByteTokenizer().decode_bytes(expected).decode(errors="replace")


def run(monkeypatch, command: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as left:
        cli.main()
    return left.value.code


# Every field of GenerationConfig: it does what it says, with one prompt and with lines, or it is refused.

TEXTS = ["to be to be", "or not", "ß"]
LINES = [json.dumps({"prompt": text}) for text in TEXTS]


def said(speaker, settings: dict, temperature: float = 0.0, tokens: int = 12) -> list[bytes]:
    """Continuations of `TEXTS`, the same one by one, streamed and as lines."""
    model, tokenizer = speaker
    chosen = {"max_new_tokens": tokens, "temperature": temperature, "settings": settings}
    alone, shown = [], io.StringIO()
    for text in TEXTS:
        torch.manual_seed(0)
        made = generate(model, tokenizer, text.encode(), out=shown, **chosen)
        alone.append(made.data[len(text.encode()) :])
    assert (
        shown.getvalue().splitlines()
        == "".join(text + data.decode(errors="replace") + "\n" for text, data in zip(TEXTS, alone)).splitlines()
    )
    torch.manual_seed(0)
    lines = list(generate_lines(model, tokenizer, LINES, **chosen))
    if temperature == 0:
        assert [row["completion"] for row in lines] == [data.decode(errors="replace") for data in alone]
    assert [row["prompt"] for row in lines] == TEXTS and all(1 <= row["new_tokens"] <= tokens for row in lines)
    return alone


@pytest.fixture
def words(speaker: Path) -> tuple:
    return load_model(str(speaker))


def differs(found: list[bytes], plain: list[bytes]) -> bool:
    return found != plain


def repeats(found: list[bytes], size: int) -> bool:
    return any(len(grams := list(zip(*(data[i:] for i in range(size))))) != len(set(grams)) for data in found)


# Fields of greedy decoding: a value, and what is then true of (continuations, continuations without it).
GREEDY_FIELDS = {
    "min_new_tokens": (lambda first: 12, lambda found, plain: all(len(data) == 12 for data in found)),
    "max_time": (lambda first: 1e-3, lambda found, plain: all(len(data) < 12 for data in found)),
    "num_beams": (lambda first: 3, differs),
    "use_cache": (lambda first: False, lambda found, plain: found == plain),
    "prefill_chunk_size": (lambda first: 2, lambda found, plain: found == plain),
    "repetition_penalty": (lambda first: 9.0, differs),
    "encoder_repetition_penalty": (lambda first: 0.1, differs),
    "no_repeat_ngram_size": (lambda first: 1, lambda found, plain: repeats(plain, 1) and not repeats(found, 1)),
    "encoder_no_repeat_ngram_size": (
        lambda first: 1,
        lambda found, plain: all(not {*data} & {*text.encode()} for data, text in zip(found, TEXTS)),
    ),
    "bad_words_ids": (lambda first: [[first]], lambda found, plain: first_of(plain) not in b"".join(found)),
    "sequence_bias": (lambda first: [[[first], -99.0]], lambda found, plain: first_of(plain) not in b"".join(found)),
    "suppress_tokens": (lambda first: [first], lambda found, plain: first_of(plain) not in b"".join(found)),
    "begin_suppress_tokens": (lambda first: [first], lambda found, plain: found[0][0] != first_of(plain)),
    "renormalize_logits": (lambda first: True, lambda found, plain: found == plain),
    "remove_invalid_values": (lambda first: True, lambda found, plain: found == plain),
    "forced_eos_token_id": (lambda first: 258, lambda found, plain: [len(data) for data in found] == [11] * 3),
    "eos_token_id": (lambda first: [first, 258], lambda found, plain: found[0] == plain[0][:1]),
    "exponential_decay_length_penalty": (lambda first: [1, 99.0], lambda found, plain: all(len(d) < 4 for d in found)),
    "stop_strings": (lambda first: [chr(first)], lambda found, plain: found[0] == plain[0][:1]),
    "prompt_lookup_num_tokens": (lambda first: 3, lambda found, plain: found == plain),
}
WITH_OTHERS = {
    "early_stopping": {"num_beams": 3, "early_stopping": True},
    "length_penalty": {"num_beams": 3, "length_penalty": -3.0},
    "max_matching_ngram_size": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}
SAMPLING_FIELDS = {"min_p": 0.9, "top_h": 0.05, "typical_p": 0.05, "epsilon_cutoff": 0.5, "eta_cutoff": 0.9}


def first_of(plain: list[bytes]) -> int:
    return plain[0][0]


def test_every_field_of_this_transformers_is_decided() -> None:
    theirs = set(GenerationConfig().to_dict()) - {"_from_model_config", "transformers_version"}
    assert theirs <= FIELDS.keys() | REFUSED.keys() and not FIELDS.keys() & REFUSED.keys()
    assert FIELDS.keys() == GREEDY_FIELDS.keys() | WITH_OTHERS.keys() | SAMPLING_FIELDS.keys()


@pytest.mark.parametrize("name", [*REFUSED, "_from_model_config", "transformers_version", "num_beans"])
def test_refused_fields_say_what_to_do(name: str, words) -> None:
    with pytest.raises(ConfigError, match=name):
        parse_settings([f"{name}=1"])
    with pytest.raises(ConfigError, match=name):
        generate(*words, b"a", settings={name: 1})


@pytest.mark.parametrize("name", GREEDY_FIELDS)
def test_a_field_does_what_it_says_with_one_prompt_and_with_lines(name: str, words) -> None:
    plain = said(words, {})
    value, holds = GREEDY_FIELDS[name]
    assert holds(said(words, parse_settings([f"{name}={json.dumps(value(first_of(plain)))}"])), plain)


@pytest.mark.parametrize("name", WITH_OTHERS)
def test_a_field_works_with_the_one_it_needs(name: str, words) -> None:
    said(words, WITH_OTHERS[name])
    with pytest.raises(UnsupportedInput, match=f"{name} has no effect without"):
        generate(*words, b"a", settings={name: WITH_OTHERS[name][name]})


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_a_field_of_sampling_changes_what_is_drawn(name: str, words) -> None:
    """With one seed; those that only cut the tail also draw fewer different bytes."""
    settings = {name: SAMPLING_FIELDS[name]}
    plain, found = (said(words, each, temperature=9.0, tokens=40) for each in ({}, settings))
    assert found != plain
    if name in ("min_p", "top_h", "epsilon_cutoff"):
        assert len({*b"".join(found)}) < len({*b"".join(plain)})
    with pytest.raises(UnsupportedInput, match="above 0"):
        generate(*words, b"a", temperature=0.0, settings={name: SAMPLING_FIELDS[name]})


@pytest.mark.parametrize(
    "value",
    ["abc", "", "-1", "NaN", "null", "[]", "{}", "[[]]", "[-1]", "[999]", "1e400", '[["a"]]', "[[1,2,3]]", "[" * 9999],
)
@pytest.mark.parametrize("name", FIELDS)
def test_values_of_fields_are_checked_before_anything_runs(name: str, value: str, words) -> None:
    """What is taken runs; what is refused is one sentence."""
    settings = parse_settings([f"{name}={value}"])
    with contextlib.suppress(UnsupportedInput):
        generate(*words, b"a", max_new_tokens=2, settings=settings)


def test_several_fields_and_options_at_the_end_of_their_range(words) -> None:
    for settings, message in (
        ({"num_beams": 2, "prompt_lookup_num_tokens": 2}, "do not go together"),
        ({"min_new_tokens": 300}, "at most max_new_tokens"),
    ):
        with pytest.raises(UnsupportedInput, match=message):
            generate(*words, b"a", settings=settings)
    for options in ({"temperature": float("nan")}, {"temperature": float("inf")}, {"top_p": float("nan")}):
        with pytest.raises(UnsupportedInput):
            generate(*words, b"a", **options)
    with pytest.raises(UnsupportedInput, match="no effect at temperature 0"):
        generate(*words, b"a", temperature=0.0, top_k=3)


@pytest.mark.parametrize(
    "line",
    ['{"prompt": "\\ud800"}', '{"messages": []}', '{"messages": [3]}', '{"messages": [{"role": ""}]}', "[" * 99_999],
)
def test_lines_that_are_no_prompts_are_refused_by_number(line: str, words) -> None:
    with pytest.raises(ConfigError, match="line 2 "):
        list(generate_lines(*words, [LINES[0], line], **GREEDY))


def test_bytes_of_the_shell_reach_a_tokenizer_of_bytes(speaker: Path, monkeypatch, capsysbinary) -> None:
    command = ["seqlib-lm", "generate", str(speaker), "--temperature", "0", "--max-new-tokens", "4", "--prompt"]
    assert run(monkeypatch, [*command, os.fsdecode(b"a\xff")]) == 0
    model, tokenizer = load_model(str(speaker))
    expected = generate(model, tokenizer, b"a\xff", max_new_tokens=4, temperature=0.0).data
    assert capsysbinary.readouterr().out.decode() == expected.decode(errors="replace") + "\n"

"""Generation from the command line: many prompts, chat templates, every option of GenerationConfig, foreign layouts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from families import JAMBA, MAMBA, port, save
from hf_models import tiny

from seqlib.errors import ConfigError
from seqlib.hf import ByteTokenizer
from seqlib.lm import cli
from seqlib.lm.generate import generate, generate_lines, load_model

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

    assert run(monkeypatch, command) == 1
    assert "Name one with --tokenizer" in capsys.readouterr().err
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

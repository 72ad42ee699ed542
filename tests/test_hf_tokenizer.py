"""ByteTokenizer: ids are bytes, nothing is lost, and the saved file opens anywhere."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hf_models import tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from seqlib.hf import ByteTokenizer

TOKENIZER = ByteTokenizer()


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_ids_are_bytes_and_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert bytes(ids) == text.encode()
    assert TOKENIZER.decode(ids) == text


@given(st.binary())
def test_any_bytes_come_back(data: bytes) -> None:
    assert TOKENIZER.decode_bytes(TOKENIZER.encode_bytes(data)) == data


def test_specials_are_beyond_the_bytes() -> None:
    assert len(TOKENIZER) == 259
    assert (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id) == (256, 257, 258)
    assert TOKENIZER.decode([257, 104, 105, 258, 256], skip_special_tokens=True) == "hi"
    assert TOKENIZER.decode_bytes([257, 104, 105, 258]) == b"hi"


@pytest.mark.parametrize("text", ["<|eos|>", "a<|pad|>b", "  two  spaces ", "\r\n\t\x00", "don't can 't"])
def test_text_comes_back_and_specials_can_be_split(text: str) -> None:
    assert TOKENIZER(text, split_special_tokens=True)["input_ids"] == list(text.encode())
    assert TOKENIZER.encode_bytes(text.encode()) == list(text.encode())
    assert TOKENIZER.decode(list(text.encode())) == TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
    assert ByteTokenizer(split_special_tokens=True)(text)["input_ids"] == list(text.encode())


@pytest.mark.parametrize("special", ByteTokenizer.SPECIALS)
def test_specials_written_into_a_text_are_one_token(special: str) -> None:
    """Trainers add an end as text; without this a model is never taught to stop."""
    (token,) = TOKENIZER.convert_tokens_to_ids([special])
    assert TOKENIZER(f" a{special}{special} ß")["input_ids"] == [32, 97, token, token, 32, *"ß".encode()]
    assert TOKENIZER([f"{special}", "x"])["input_ids"][0][-1] == token


@pytest.mark.parametrize("markers", [[], ["<|im_start|>", "<|im_end|>"]])
def test_chat_templates_write_ends_and_markers(markers: list[str], tmp_path) -> None:
    tokenizer = ByteTokenizer()
    begin, end = markers or ["", tokenizer.eos_token]
    tokenizer.add_special_tokens({"additional_special_tokens": markers})
    tokenizer.chat_template = f"{{% for m in messages %}}{begin}{{{{ m['content'] }}}}{end}{{% endfor %}}"
    tokenizer.save_pretrained(tmp_path)
    message = [{"role": "user", "content": "hü"}]
    wanted = [*tokenizer.convert_tokens_to_ids(markers[:1]), *"hü".encode(), tokenizer.convert_tokens_to_ids(end)]
    for opened in (tokenizer, AutoTokenizer.from_pretrained(tmp_path), ByteTokenizer.from_pretrained(tmp_path)):
        ids = opened.apply_chat_template(message, return_dict=False)
        assert ids == wanted and all(i >= 256 for i in (ids[-1], *ids[: len(markers[:1])]))


def test_batches_are_padded_on_the_left() -> None:
    batch = TOKENIZER(["a", "bcd"], padding=True)
    assert batch["input_ids"] == [[256, 256, 97], [98, 99, 100]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]


def test_saved_tokenizer_opens_with_and_without_seqlib(tmp_path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    text = "naïve <|eos|> \n bytes"
    wanted = [*"naïve ".encode(), 258, *b" \n bytes"]
    for opened in (AutoTokenizer.from_pretrained(tmp_path), ByteTokenizer.from_pretrained(tmp_path)):
        assert opened(text)["input_ids"] == wanted
        assert (opened.pad_token_id, opened.eos_token_id, opened.padding_side) == (256, 258, "left")
    tiny_config("mamba").save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ByteTokenizer, "beside a model it keeps its type"
    (tmp_path / "config.json").unlink()
    code = f"""
import sys
sys.modules["seqlib"] = None
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
ids = tokenizer({text!r})["input_ids"]
assert ids == {wanted} and tokenizer.decode(ids) == {text!r}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

"""A tokenizer whose tokens are bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["ByteTokenizer"]


def byte_alphabet() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, in order of the byte.

    Printable Latin-1 stands for itself, the rest is moved beyond it.

    Source: openai/gpt-2, encoder.py, bytes_to_unicode.
    """
    itself = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in itself else next(moved)) for byte in range(256)]


class ByteTokenizer(PreTrainedTokenizerFast):
    """256 bytes and three specials: **the id of a byte is the byte**, so `numpy.frombuffer(data, uint8)` holds ids.

    pad 256, bos 257, eos 258 (also written between documents). Nothing is added around a text. As with every tokenizer
    of transformers, text that spells a special token is that token, so that chat templates and trainers can write ends
    and markers into a text; `split_special_tokens=True`, in a call or for good, takes it as its bytes. Every text comes
    back from `decode` unchanged. Bytes that are not UTF-8 have `encode_bytes` and `decode_bytes`, which know no
    specials. Pads on the left, which batched generation wants.

    It is an ordinary byte-level BPE without merges: the saved `tokenizer.json` opens with AutoTokenizer anywhere.

    Args:
        kwargs: as for PreTrainedTokenizerFast.
    """

    SPECIALS = ("<|pad|>", "<|bos|>", "<|eos|>")
    vocab_files_names = {"tokenizer_file": "tokenizer.json"}  # noqa: RUF012 - the base class declares it so
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("tokenizer_file") is None and kwargs.get("tokenizer_object") is None:
            vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
            backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            backend.decoder = decoders.ByteLevel()
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in self.SPECIALS])
            kwargs["tokenizer_object"] = backend
        defaults: dict[str, Any] = dict(zip(("pad_token", "bos_token", "eos_token"), self.SPECIALS))
        defaults |= {"padding_side": "left", "clean_up_tokenization_spaces": False}
        super().__init__(**(defaults | kwargs))

    def encode_bytes(self, data: bytes) -> list[int]:
        """The ids of raw bytes, which are the bytes."""
        return list(data)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; specials are left out."""
        return bytes(i for i in map(int, ids) if i < 256)

"""Documents become tokens once, in an Arrow cache, and are laid end to end in rows for training."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from seqlib.errors import ConfigError, CorpusError

from .corpus import Document

__all__ = ["PackedRows", "Tokens", "load_tokenizer", "start_token", "tokenize"]


class Tokens:
    """Tokenised documents, read from an Arrow file as they are needed.

    Every document is a start token followed by its text. The start token is never predicted; it is what the first
    token of the text is predicted from.

    Args:
        table: one row per document: `input_ids` and `nbytes`, the bytes of the text that they stand for.
    """

    def __init__(self, table: Any) -> None:
        self.lengths: NDArray[np.int64] = np.zeros(0, np.int64)
        self._chunks: list[NDArray[Any]] = []
        for chunk in table.data.column("input_ids").chunks:
            offsets = chunk.offsets.to_numpy()
            self._chunks.append(chunk.values.to_numpy()[offsets[0] : offsets[-1]])
            self.lengths = np.concatenate([self.lengths, np.diff(offsets)])
        self.nbytes: NDArray[np.int64] = table.data.column("nbytes").to_numpy().astype(np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        ends = np.cumsum([len(chunk) for chunk in self._chunks])
        self._bounds = np.concatenate([[0], ends]).astype(np.int64)

    def __len__(self) -> int:
        """Number of tokens, start tokens included."""
        return int(self._bounds[-1])

    @property
    def ndocuments(self) -> int:
        return len(self.lengths)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per predicted token; 1 for a tokenizer of bytes."""
        return int(self.nbytes.sum()) / (len(self) - self.ndocuments)

    def span(self, begin: int, end: int) -> NDArray[np.int64]:
        """Tokens begin..end of all documents laid end to end."""
        first = int(np.searchsorted(self._bounds, begin, "right")) - 1
        parts = []
        while begin < end:
            chunk, at = self._chunks[first], int(self._bounds[first])
            parts.append(chunk[begin - at : end - at])
            begin, first = at + len(chunk), first + 1
        return np.concatenate(parts).astype(np.int64)

    def documents(self) -> Iterator[tuple[Tensor, int]]:
        """(tokens (seqlen,) int64 with the start token, bytes of the text) of each document."""
        for start, length, nbytes in zip(self.starts.tolist(), self.lengths.tolist(), self.nbytes.tolist()):
            yield torch.from_numpy(self.span(start, start + length)), nbytes


class PackedRows(Dataset):
    """Rows of `seqlen` tokens, documents end to end, none reading another.

    A row is `input_ids`, `position_ids` that restart at 0 at each document (which tells the model to forget) and
    `labels` that are -100 at start tokens. Neighbouring rows share one token, so that each token is predicted exactly
    once per epoch; what does not fill the last row is left out.
    """

    def __init__(self, tokens: Tokens, seqlen: int) -> None:
        if seqlen < 2:
            raise ConfigError(f"seqlen must be at least 2, got {seqlen}")
        if len(tokens) < seqlen:
            raise CorpusError(
                f"the text has {len(tokens)} tokens, less than one row of {seqlen}; lower seqlen or add text"
            )
        self.tokens, self.seqlen = tokens, seqlen

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // (self.seqlen - 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = index * (self.seqlen - 1)
        end = begin + self.seqlen
        ids = self.tokens.span(begin, end)
        first, last = np.searchsorted(self.tokens.starts, [begin, end])
        starts = self.tokens.starts[first:last] - begin
        is_start = np.zeros(self.seqlen, bool)
        is_start[starts] = True
        at = np.arange(self.seqlen)
        positions = at - np.maximum.accumulate(np.where(is_start, at, 0))
        labels = np.where(is_start | (at == 0), -100, ids)
        return {
            "input_ids": torch.from_numpy(ids),
            "position_ids": torch.from_numpy(positions),
            "labels": torch.from_numpy(labels),
        }


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a recipe: "bytes", or whatever AutoTokenizer opens."""
    from transformers import AutoTokenizer

    from seqlib.hf import ByteTokenizer
    from seqlib.hf.hub import check_name

    if name == "bytes":
        return ByteTokenizer()
    check_name(name, "tokenizer", "use 'bytes', a folder or a hub name")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"tokenizer {name!r} cannot be loaded ({reason}); use 'bytes', a folder or a hub name"
        ) from error


def start_token(tokenizer: Any) -> int:
    """The token that stands before each document: the tokenizer's bos, else its eos."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ConfigError("the tokenizer has neither a bos nor an eos token to separate documents with; give it one")
    return int(token)


def encode(tokenizer: Any, document: Document) -> NDArray[Any]:
    """The start token and the tokens of one document."""
    from seqlib.hf import ByteTokenizer

    data = document.read()
    start = [start_token(tokenizer)]
    if isinstance(tokenizer, ByteTokenizer):
        return np.concatenate([np.array(start, np.int64), np.frombuffer(data, np.uint8)])
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise CorpusError(
            f"{document.name} is not UTF-8 (byte {error.start}), which this tokenizer needs; convert it, leave it out, "
            "or use tokenizer='bytes'"
        ) from error
    return np.array(start + tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int64)


def tokenize(documents: Sequence[Document], tokenizer: Any, cache_dir: Path | None = None) -> Tokens:
    """Tokenise documents, or open the cache of an earlier time.

    The cache file is named by the contents of the documents and the tokenizer; it is written aside and renamed, so an
    interrupted run leaves nothing that could be read.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    if not documents:
        raise CorpusError("there are no documents to tokenise")
    folder = cache_dir or Path(datasets.config.HF_DATASETS_CACHE) / "seqlib"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tokens-{_cache_key(documents, tokenizer)}.arrow"
    found = _opened(path, documents)
    if found is None:
        kind = "uint16" if len(tokenizer) <= 1 << 16 else "int32"
        features = datasets.Features(
            {"input_ids": datasets.Sequence(datasets.Value(kind)), "nbytes": datasets.Value("int64")}
        )
        with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
            part = os.path.join(aside, "tokens.arrow")
            with ArrowWriter(path=part, features=features, writer_batch_size=256) as writer:
                for document in documents:
                    ids = encode(tokenizer, document).astype(kind)
                    writer.write({"input_ids": ids, "nbytes": document.nbytes})
                writer.finalize()
            os.replace(part, path)
        found = _opened(path, documents)
        if found is None:
            raise CorpusError(f"the tokens of the text cannot be read back from {path}; look whether the disk is whole")
    return found


def _opened(path: Path, documents: Sequence[Document]) -> Tokens | None:
    """The cached tokens; None if there are none, or the file is damaged or cut, also between two documents."""
    import datasets

    if not path.is_file():
        return None
    try:
        tokens = Tokens(datasets.Dataset.from_file(str(path)))
    except (OSError, ValueError, LookupError):  # pyarrow's errors among them
        return None
    sizes = [document.nbytes for document in documents]
    return tokens if tokens.nbytes.tolist() == sizes else None


def _cache_key(documents: Sequence[Document], tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    text = "\n".join(
        [type(tokenizer).__name__, vocabulary, str(start_token(tokenizer)), *(d.digest for d in documents)]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:32]

"""Where documents begin, whatever way that is told, and what the laws of documents ask of every mixer and op."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqlib.hf.inputs import sequence_info
from seqlib.sequence import SequenceInfo

# x is a real token and . padding; documents are parted by bars.
LAYOUTS = ("xxx|xx|x|xxxx", "..xxx|.xx|..x|xxxx..", "xx.x|..xxx|x..", "x|.xx|...x", "xx|..|xx", "x..|.xx.|.x.|.xx")


def _told(layout: str) -> tuple[Tensor, Tensor, list[int]]:
    """Mask of real tokens, number of the document of each position, and lengths of documents, padding included."""
    parts = layout.split("|")
    real = torch.tensor([[c == "x" for c in "".join(parts)]])
    numbers = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])[None]
    return real, numbers, [len(part) for part in parts]


def _documents(seq: SequenceInfo | None, real: Tensor) -> list[int]:
    """For each real token the number of documents that began at or before it, from 0."""
    if seq is None or seq.document_ids is None:
        return [0] * int(real.sum())
    ids = seq.document_ids[real]
    return (ids - ids[0]).tolist()


def _wanted(real: Tensor, numbers: Tensor) -> list[int]:
    return numbers[real].unique(return_inverse=True)[1].tolist()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["starts", "cu_seqlens", "seq_idx", "from 0", "from 1", "padding counted"])
def test_documents_do_not_merge_over_padding(layout: str, way: str) -> None:
    """A document may begin or end with padding, and no way of telling documents joins it to the one before."""
    real, numbers, lengths = _told(layout)
    if way == "starts":
        starts = numbers.diff(dim=1, prepend=numbers[:, :1] - 1) != 0
        seq = SequenceInfo(starts=starts, padding_mask=real)
        assert not bool((seq.starts & ~real).any())
    elif way == "cu_seqlens":
        seq = sequence_info(
            1, real.shape[1], 0, attention_mask=real.long(), cu_seq_lens_q=torch.tensor([0, *lengths]).cumsum(0)
        )
    elif way == "seq_idx":
        seq = sequence_info(1, real.shape[1], 0, attention_mask=real.long(), seq_idx=numbers)
        negative = sequence_info(1, real.shape[1], 0, seq_idx=torch.where(real, numbers, -1))
        assert _documents(negative, real) == _wanted(real, numbers)
    else:
        same = numbers == numbers.mT
        counted = torch.ones_like(real) if way == "padding counted" else real
        positions = (same & counted & torch.ones_like(same).tril(-1)).sum(1)[None]
        if way != "padding counted":
            positions = torch.where(real, positions + (way == "from 1"), 0)
        seq = sequence_info(1, real.shape[1], 0, attention_mask=real.long(), position_ids=positions)
    assert _documents(seq, real) == _wanted(real, numbers)


@pytest.mark.parametrize(
    ("mask", "positions", "documents"),
    [
        ("..xxx", [0, 0, 0, 1, 2], [0, 0, 0]),  # transformers' own, padding on the left
        ("..xxx", [1, 1, 0, 1, 2], [0, 0, 0]),
        ("xxx..", [0, 1, 2, 0, 0], [0, 0, 0]),
        ("xx..xx", [0, 1, 0, 0, 2, 3], [0, 0, 0, 0]),  # padding inside a document, not counted
        ("xx..xx", [0, 1, 1, 1, 2, 3], [0, 0, 0, 0]),
        ("xx..xx", [0, 1, 2, 3, 4, 5], [0, 0, 0, 0]),  # and counted
        ("xx.x.x", [0, 1, 0, 2, 0, 3], [0, 0, 0, 0]),
        ("x.x", [0, 0, 1], [0, 1]),  # may be read either way: a document never merges with the one before
        ("xxxxxx", [0, 1, 2, 7, 8, 9], [0, 0, 0, 1, 1, 1]),
        ("xx..xx", [0, 1, 0, 0, 7, 8], [0, 0, 1, 1]),
        ("xxx.xx", [3, 4, 5, 0, 1, 2], [0, 0, 0, 1, 1]),
    ],
)
def test_positions_tell_documents(mask: str, positions: list[int], documents: list[int]) -> None:
    real = torch.tensor([[c == "x" for c in mask]])
    seq = sequence_info(1, len(mask), 0, attention_mask=real.long(), position_ids=torch.tensor([positions]))
    assert _documents(seq, real) == documents


def test_a_document_that_begins_at_padding_forgets_the_state() -> None:
    """Spans after earlier tokens: position 0 at padding, or a start there, is not lost."""
    mask = torch.tensor([[0, 1, 1]])
    for positions, starts in (([0, 1, 2], True), ([0, 5, 6], False), ([4, 5, 6], False), ([0, 0, 1], True)):
        seq = sequence_info(1, 3, 5, attention_mask=mask, position_ids=torch.tensor([positions]))
        assert (seq.starts is not None and bool(seq.starts[0, 1])) == starts, positions
    told = SequenceInfo(starts=torch.tensor([[True, False, False]]), padding_mask=mask.bool())
    assert told.starts.tolist() == [[False, True, False]]

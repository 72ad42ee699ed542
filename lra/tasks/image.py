"""CIFAR-10 in gray, one pixel per token."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from seqlib.errors import CorpusError

from ..protocols import Protocol
from ..store import Examples
from .base import Prepared, Task, check_labels, read_mega, split_order

__all__ = ["Image"]

_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


class Image(Task):
    """The object in a 32 x 32 gray image, read row by row.

    Source: Krizhevsky 2009; Tay et al. 2020 (arXiv 2011.04006).
    """

    name: ClassVar[str] = "image"
    title: ClassVar[str] = "Image (gray CIFAR-10)"
    classes: ClassVar[int] = 10
    counts: ClassVar[Mapping[str, int]] = {"train": 45_000, "validation": 5_000, "test": 10_000}
    sources: ClassVar[tuple[str, ...]] = (
        "image", "cifar10", "cifar-10-batches-py", "cifar/cifar-10-batches-py", *_BATCHES, "test_batch",
    )  # fmt: skip
    hub: ClassVar[str] = "uoft-cs/cifar10"
    where: ClassVar[str] = (
        "cifar-10-batches-py/ (cifar-10-python.tar.gz of www.cs.toronto.edu/~kriz/cifar.html, unpacked), "
        "image/input/train.src of the layout of mega, or the data set 'cifar10' in the cache of `datasets`"
    )

    def read(self, root: Path, protocol: Protocol) -> Prepared:
        for name in ("image", "cifar10"):
            mega = read_mega(root / name, self.classes, image=1024)
            if mega is not None:
                return Prepared(mega, 256, None, {"layout": "mega"})
        folder = next((p for p in (root / "cifar-10-batches-py", root / "cifar" / "cifar-10-batches-py", root)
                       if (p / _BATCHES[0]).is_file()), None)  # fmt: skip
        if folder is None:
            raise self.missing(root)
        return _prepared(*_batches(folder), protocol, "cifar-10-batches-py")

    def read_hub(self, rows: Any, protocol: Protocol) -> Prepared:
        made = []
        for split in ("train", "test"):
            pixels = np.stack([np.asarray(picture) for picture in rows[split]["img"]])
            made.append((pixels.transpose(0, 3, 1, 2), np.array(rows[split]["label"])))
        return _prepared(made[0], made[1], protocol, "datasets")


def _prepared(known: tuple[Any, Any], test: tuple[Any, Any], protocol: Protocol, layout: str) -> Prepared:
    """Gray images in the splits of a protocol."""
    gray, labels = to_gray(known[0], protocol.gray), known[1]
    train, validation, _ = split_order(len(gray), (len(gray) // 10, 0), protocol.image_split)
    splits = {
        "train": images(gray[train], labels[train]),
        "validation": images(gray[validation], labels[validation]),
        "test": images(to_gray(test[0], protocol.gray), test[1]),
    }
    return Prepared(splits, 256, None, {"layout": layout})


def images(pixels: NDArray[np.uint8], labels: NDArray[Any]) -> Examples:
    """Images (n, height, width) row by row as examples."""
    n = len(pixels)
    each = pixels[0].size if n else 0
    return Examples(pixels.reshape(-1), np.arange(n + 1, dtype=np.int64) * each, labels.astype(np.int16))


def to_gray(rgb: NDArray[np.uint8], rule: str) -> NDArray[np.uint8]:
    """(n, 3, height, width) to (n, height, width)."""
    if rule == "truncated":  # in float32 and in this order, as tf.image.rgb_to_grayscale rounds: equal for every colour
        weights = np.array([0.2989, 0.5870, 0.1140], np.float32)
        parts = [rgb[:, i].astype(np.float32) * np.float32(1 / 255) * weights[i] for i in range(3)]
        return ((parts[0] + parts[1] + parts[2]) * np.float32(255.5)).astype(np.uint8)
    r, g, b = (rgb[:, i].astype(np.uint32) for i in range(3))
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).astype(np.uint8)  # ITU-R 601 as Pillow computes it


class _Arrays(pickle.Unpickler):
    """Reads the pickled arrays of CIFAR-10 and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".", maxsplit=1)[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a CIFAR-10 file")


def _batches(folder: Path) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    parts = [_batch(folder / name) for name in (*_BATCHES, "test_batch")]
    train = np.concatenate([p[0] for p in parts[:-1]]), np.concatenate([p[1] for p in parts[:-1]])
    return train, parts[-1]


def _batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if not path.is_file():
        raise CorpusError(f"{path} is missing; unpack the archive again")
    try:
        values = _Arrays(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels, labels = np.asarray(values[b"data"], np.uint8), np.asarray(values[b"labels"])
        pixels = pixels.reshape(-1, 3, 32, 32)
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError) as error:
        raise CorpusError(f"{path} is no batch of CIFAR-10 ({error}); unpack the archive again") from error
    if len(pixels) != len(labels):
        raise CorpusError(f"{path} has {len(pixels)} images and {len(labels)} labels")
    check_labels(path, labels, 10)
    return pixels, labels

"""Pathfinder at every size: released images or images made here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from seqlib.errors import ConfigError, CorpusError

from .. import snakes
from ..protocols import Protocol
from ..store import SPLITS
from .base import Prepared, Task, read_mega, read_text, seen, split_order
from .image import images

__all__ = ["PathX", "Pathfinder", "Pathfinder256"]

_SET = "curv_contour_length_14"
_EMPTY = ("curv_baseline/imgs/0/sample_172.png",)  # known to be empty in the release


class Pathfinder(Task):
    """Whether two discs are joined by a dashed path (1), 32 x 32 pixels, contours of 14 dashes.

    Source: Linsley et al. 2018 (arXiv 1805.08315); Tay et al. 2020 (arXiv 2011.04006).
    """

    name: ClassVar[str] = "pathfinder"
    title: ClassVar[str] = "Pathfinder"
    classes: ClassVar[int] = 2
    size: ClassVar[int] = 32
    counts: ClassVar[Mapping[str, int]] = {"train": 160_000, "validation": 20_000, "test": 20_000}
    where: ClassVar[str] = (
        f"pathfinder32/{_SET}/imgs and /metadata (lra_release archive, or under pathfinder/ in the layout of S4), "
        "pathfinder/input/train.src of the layout of mega, or --generate"
    )
    generates: ClassVar[Mapping[str, Any]] = {"train": 160_000, "validation": 20_000, "test": 20_000, "size": 32}

    @property
    def sources(self) -> tuple[str, ...]:  # type: ignore[override]
        inner = f"pathfinder{self.size}/{_SET}"
        return inner, f"pathfinder/{inner}", f"{self.name}/input", f"{self.name}/label"

    def read(self, root: Path, protocol: Protocol) -> Prepared:
        mega = read_mega(root / self.name, self.classes, image=self.size**2)
        if mega is not None:
            return Prepared(mega, 256, None, {"layout": "mega"})
        inner = f"pathfinder{self.size}/{_SET}"
        folder = next((p for p in (root / inner, root / "pathfinder" / inner) if (p / "metadata").is_dir()), None)
        if folder is None:
            raise self.missing(root)
        pixels, labels = read_images(folder, self.size)
        held = len(pixels) // 10
        parts = split_order(len(pixels), (held, held), protocol.image_split)
        return Prepared(
            {split: images(pixels[part], labels[part]) for split, part in zip(SPLITS, parts)},
            256,
            None,
            {"layout": "png"},
        )

    def generate(self, options: Mapping[str, Any], seed: int, processes: int) -> Prepared:
        size = int(options["size"])
        if size not in snakes.SIZES:
            raise ConfigError(f"pathfinder images come in sizes {', '.join(map(str, snakes.SIZES))}, not {size}")
        counts = [int(options[split]) for split in SPLITS]
        pixels, labels = snakes.pathfinder(sum(counts), snakes.SIZES[size], seed=seed, processes=processes)
        ends = np.cumsum(counts)
        parts = {split: slice(end - n, end) for split, end, n in zip(SPLITS, ends, counts)}
        return Prepared(
            {split: images(pixels[part], labels[part]) for split, part in parts.items()},
            256,
            None,
            {"layout": "generated"},
        )


class PathX(Pathfinder):
    """Pathfinder at 128 x 128 pixels, 16,384 tokens."""

    name: ClassVar[str] = "pathx"
    title: ClassVar[str] = "Path-X"
    size: ClassVar[int] = 128
    where: ClassVar[str] = f"pathfinder128/{_SET}/imgs and /metadata (lra_release archive), or --generate"
    generates: ClassVar[Mapping[str, Any]] = {**Pathfinder.generates, "size": 128}


class Pathfinder256(Pathfinder):
    """Pathfinder at 256 x 256 pixels, 65,536 tokens."""

    name: ClassVar[str] = "pathfinder256"
    title: ClassVar[str] = "Pathfinder-256"
    size: ClassVar[int] = 256
    where: ClassVar[str] = f"pathfinder256/{_SET}/imgs and /metadata (lra_release archive), or --generate"
    generates: ClassVar[Mapping[str, Any]] = {**Pathfinder.generates, "size": 256}


def read_images(folder: Path, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """All images of one released set, in the order of its metadata, which are text files in spite of their name."""
    from PIL import Image, UnidentifiedImageError

    files = seen(folder / "metadata", ".npy")
    if not files:
        raise CorpusError(f"{folder / 'metadata'} holds no .npy files; unpack the archive again")
    for file in files:
        if not file.stem.isdecimal():
            raise CorpusError(f"{file} is not of the release, whose files are named 1.npy, 2.npy, ...; remove it")
    files.sort(key=lambda path: int(path.stem))
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for file in files:
        for number, line in enumerate(read_text(file).splitlines(), 1):
            cells = line.split()
            if len(cells) < 4 or cells[3] not in ("0", "1"):
                raise CorpusError(f"{file}:{number}: expected folder, file, number and label 0 or 1, got {line[:60]!r}")
            path = folder / cells[0] / cells[1]
            if f"{folder.name}/{cells[0]}/{cells[1]}" in _EMPTY:
                continue
            try:
                with Image.open(path) as picture:
                    array = np.asarray(picture.convert("L"), np.uint8)
            except (OSError, UnidentifiedImageError, SyntaxError) as error:
                raise CorpusError(f"{file}:{number}: image {path} cannot be read ({error})") from error
            if array.shape != (size, size):
                found = " x ".join(map(str, array.shape))
                raise CorpusError(f"{file}:{number}: image {path} is {found} pixels, not {size} x {size}")
            pixels.append(array)
            labels.append(int(cells[3]))
    if not pixels:
        raise CorpusError(f"{folder / 'metadata'} names no image; unpack the archive again")
    return np.stack(pixels), np.array(labels, np.int16)

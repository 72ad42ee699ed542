"""Images of Pathfinder: are the two discs joined by one dashed path? Grown for a whole batch of images at a time."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from seqlib.errors import ConfigError

__all__ = ["SIZES", "Images", "Shape", "draw", "pathfinder"]

_BLOCK = 1000  # images per random stream
_WALL = 1
_FIRST = 2  # id of the first paddle of an image in `_Canvas.field`; 0 is free
_TRIES = ((3, False), (10, False), (3, True))  # angles tried per paddle; the last ones need not lead on
_ANGLES, _PARTS = 64, 8  # of half a turn, and of a pixel
_AHEAD = (0.75, 1.5)
_SEEDS = 4  # beginnings tried per distractor
_BACK = np.array([2, 4, 8, 1000])  # paddles taken back where there is no way on; the last one starts anew
_CLEARANCE = 0.5  # margins between a new paddle and the margin of another
_TURNS = np.linspace(-np.pi / 2, np.pi / 2, 513)
_TURN_CDF = (_TURNS + np.sin(2 * _TURNS) / 2) / np.pi + 0.5
Array = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """What the published generator is told for one image size, the hard set with contours of 14 paddles.

    Source: docstrings of google-research/long-range-arena, lra_benchmarks/data/pathfinder.py; brightness measured on
    images of drewlinsley/pathfinder after its rescaling to the full range.
    """

    size: int
    padding: int
    seed_distance: float
    marker_radius: float
    length: float
    """Of a paddle."""
    thickness: float
    margins: tuple[float, ...]
    continuity: float
    paddles: int = 14
    """Per target contour."""
    distractors: int = 5
    distractor_paddles: int = 4
    brightness: tuple[int, int, int] = (191, 255, 221)
    """Of targets, distractors and discs."""


SIZES: dict[int, Shape] = {
    16: Shape(
        16,
        1,
        5,
        1.5,
        1.5,
        0.5,
        (0.75,),
        1.0,
        paddles=4,
        distractors=2,
        distractor_paddles=2,
        brightness=(160, 160, 255),
    ),
    32: Shape(32, 1, 7, 1.5, 2, 0.5, (1,), 1.0),
    64: Shape(64, 1, 12, 2.5, 5, 1.0, (1,), 1.8, distractors=22 // 4, brightness=(204, 204, 255)),
    128: Shape(128, 1, 20, 3.0, 5, 1.5, (2, 3), 1.8, distractors=35 // 4, brightness=(230, 230, 255)),
    256: Shape(256, 22, 27, 5.0, 5, 2.0, (3,), 1.8, distractors=30 // 4, brightness=(255, 255, 255)),
}
"""By image size. 16 is our own reduction, for machines without an accelerator; the others are published."""


class Images(NamedTuple):
    """Images, labels, and the geometry that they were drawn from."""

    pixels: NDArray[np.uint8]
    """(n, size, size)"""
    labels: NDArray[np.int16]
    """(n,), 1 where the discs are joined."""
    paddles: NDArray[np.float32]
    """(n, count, 5): y0, x0, y1, x1 and contour (0 and 1 the targets, from 2 the distractors, -1 for none)."""
    discs: NDArray[np.float32]
    """(n, 2, 2): y, x of each."""


def pathfinder(
    n: int, shape: Shape, *, seed: int = 0, processes: int = 1
) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    """n images (n, size, size) uint8 and their labels (n,) int16.

    Blocks of images have random streams of their own, so the result does not depend on `processes`.
    """
    jobs = [(seed, block, min(_BLOCK, n - block * _BLOCK), shape) for block in range(-(-n // _BLOCK))]
    processes = min(processes, len(jobs), os.cpu_count() or 1)
    if processes > 1:
        with get_context("spawn").Pool(processes, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
            blocks = pool.starmap(_pixels, jobs, chunksize=1)
    else:
        blocks = [_pixels(*job) for job in jobs]
    return np.concatenate([b[0] for b in blocks]), np.concatenate([b[1] for b in blocks])


def _pixels(seed: int, block: int, n: int, shape: Shape) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
    images = draw(np.random.default_rng([seed, block]), n, shape)
    return images.pixels, images.labels


def draw(rng: np.random.Generator, n: int, shape: Shape) -> Images:
    """Draw n images.

    Two contours of `paddles` dashes grow from seeds that are `seed_distance` apart, paddle by paddle in turn, until
    both are complete, going back where there is no way on; then distractors are added while there is room, and a disc
    is put at the beginning of one target and at the end of the same (label 1) or of the other (label 0). A contour goes
    on from `length + 2 margin` further along its last direction, at an angle a to it that is drawn from
    cos^2(min(|a| continuity, pi/2)), first among angles that lead on; no paddle comes within a margin of another
    contour.

    Source: drewlinsley/pathfinder, snakes2.py (Linsley et al. 2018), which starts an image anew instead of going back.
    """
    # The slowest ninth of the images is never finished: waiting for the last few would take half of the time.
    canvas = _Canvas(rng, shape, rng.choice(np.array(shape.margins), n + n // 8 + 4))
    targets, whole = _targets(canvas, n)
    canvas.keep(whole)
    targets = targets[whole]
    contour = np.broadcast_to(np.arange(2 * shape.paddles)[:, None] % 2, (n, 2 * shape.paddles, 1))
    paddles = np.concatenate([np.concatenate([targets, contour], 2), _distractors(canvas)], 1).astype(np.float32)
    tips = np.stack([targets[:, :2, :2], targets[:, -2:, 2:]], 2)
    labels = rng.integers(0, 2, n).astype(np.int16)
    origin, rows = rng.integers(0, 2, n), np.arange(n)
    end = np.where(labels == 1, origin, 1 - origin)
    discs = np.stack([tips[rows, origin, 0], tips[rows, end, 1]], 1)
    return Images(_render(shape, paddles, discs), labels, paddles, discs)


def _reach(shape: Shape) -> int:
    """Pixels from the middle of a paddle to the furthest pixel it forbids."""
    return math.ceil(shape.length / 2 + shape.thickness / 2 + max(shape.margins)) + 1


class _Canvas:
    """Which pixels are taken, and by which paddle, for a batch of images.

    The pixels around a paddle are looked up: with its middle rounded to eighths of a pixel and its angle to 1/64 of a
    half turn, which moves it by less than 0.2 pixels, they are a fixed list of steps in the image.
    """

    def __init__(self, rng: np.random.Generator, shape: Shape, margins: Array) -> None:
        self.rng, self.shape, self.margins = rng, shape, margins.astype(np.float32)
        self.which = np.searchsorted(shape.margins, margins)
        reach = _reach(shape)
        self.width = shape.size + 2 * reach
        self.field = np.full((len(margins), self.width, self.width), _WALL, np.int16)
        inner = slice(reach + shape.padding, reach + shape.size - shape.padding)
        self.field[:, inner, inner] = 0
        self.close, self.forbidden = (_stamps(shape, self.width, margin) for margin in (_CLEARANCE, 1.0))

    def keep(self, rows: Array) -> None:
        """Go on with some of the images only."""
        self.margins, self.which, self.field = self.margins[rows], self.which[rows], self.field[rows]

    def near(self, stamps: Array, rows: Array, segments: Array) -> Array:
        """Flat indices (n, pixels) into `field` of the pixels around each segment; some are named twice."""
        middle = (segments[:, :2] + segments[:, 2:]) / 2
        parts = np.rint(_PARTS * np.clip(middle, 0, self.shape.size - 1)).astype(np.int64)
        dy, dx = segments[:, 2] - segments[:, 0], segments[:, 3] - segments[:, 1]
        angle = np.rint(np.arctan2(dy, dx) * (_ANGLES / np.pi)).astype(np.int64) % _ANGLES
        y, x = parts[:, 0], parts[:, 1]
        steps = stamps[self.which[rows], angle, y % _PARTS, x % _PARTS]
        at = (rows * self.width + y // _PARTS + _reach(self.shape)) * self.width + x // _PARTS + _reach(self.shape)
        return at[:, None] + steps

    def fits(self, rows: Array, segments: Array, own: Array) -> Array:
        """Whether each segment lies inside and keeps its distance from everything but the paddle with id `own`."""
        inside = ((segments >= 0) & (segments <= self.shape.size - 1)).all(1)
        taken = self.field.reshape(-1)[self.near(self.close, rows, segments)]
        return inside & ~((taken != 0) & (taken != own[:, None])).any(1)

    def leads_on(self, rows: Array, segments: Array) -> Array:
        """Whether nothing stands in the way one and a half paddles ahead; what runs into a wall is lost later."""
        step = (segments[:, 2:] - segments[:, :2]) * (1 + 2 * self.margins[rows, None] / self.shape.length)
        clear = np.ones(len(rows), bool)
        for ahead in _AHEAD:
            at = np.rint(segments[:, 2:] + ahead * step).astype(np.int64)
            inside = ((at >= 0) & (at < self.shape.size)).all(1)
            at = np.clip(at, 0, self.shape.size - 1) + _reach(self.shape)
            clear &= inside & (self.field[rows, at[:, 0], at[:, 1]] == 0)
        return clear

    def take(self, rows: Array, segments: Array, ids: Array) -> None:
        """Mark segments and their margins; what is taken already keeps its owner, so `free` undoes this exactly."""
        index = self.near(self.forbidden, rows, segments)
        flat = self.field.reshape(-1)
        now = flat[index]
        flat[index] = np.where(now == 0, ids[:, None], now)

    def free(self, rows: Array, first: Array) -> None:
        """Unmark the paddles whose id is `first` or later."""
        now = self.field[rows]
        now[now >= first[:, None, None]] = 0
        self.field[rows] = now

    def grow(self, rows: Array, last: Array, own: Array) -> tuple[Array, Array]:
        """One more paddle after the segment `last` with id `own`: where there was room, and the segments."""
        direction = (last[:, 2:] - last[:, :2]) / self.shape.length
        angles = np.arctan2(direction[:, 0], direction[:, 1])
        pivots = last[:, 2:] + self.margins[rows, None] * direction
        return self.place(rows, pivots, lambda at: angles[at] + _turns(self.rng, len(at), self.shape.continuity), own)

    def place(self, rows: Array, pivots: Array, angles: Any, own: Array) -> tuple[Array, Array]:
        """Paddles that begin a margin after their pivots, at the first of a few angles where they fit."""
        found, segments = np.zeros(len(rows), bool), np.zeros((len(rows), 4), np.float32)
        left = np.arange(len(rows))
        for tries, last_resort in _TRIES:
            at = np.repeat(left, tries)
            segment = _segment(pivots[at], angles(at), self.margins[rows[at]], self.shape.length)
            good = self.fits(rows[at], segment, own[at])
            if not last_resort:
                good[good] = self.leads_on(rows[at[good]], segment[good])
            good = good.reshape(-1, tries)
            first = good.argmax(1)
            some = np.flatnonzero(good[np.arange(len(left)), first])
            found[left[some]], segments[left[some]] = True, segment[some * tries + first[some]]
            left = left[~found[left]]
            if not len(left):
                break
        return found, segments


def _stamps(shape: Shape, width: int, margin: float) -> Array:
    """Steps in the flat field from a paddle's middle to the pixels within its thickness and `margin` margins.

    (margins, angles, 8, 8, pixels): by kind of margin, angle, and eighth of a pixel in y and x; short lists repeat
    their first pixel.
    """
    reach = _reach(shape)
    box = np.arange(-reach, reach + 2)
    y, x = np.meshgrid(box, box, indexing="ij")
    turn = np.pi / _ANGLES * np.arange(_ANGLES)
    half = np.stack([np.sin(turn), np.cos(turn)], 1) * shape.length / 2
    part = np.arange(_PARTS) / _PARTS
    middle = np.tile(np.stack(np.meshgrid(part, part, indexing="ij"), -1).reshape(-1, 2), (_ANGLES, 1))
    half = np.repeat(half, _PARTS**2, 0)
    distance = _distance(y[None], x[None], np.concatenate([middle - half, middle + half], 1))
    steps = (y * width + x).ravel()
    lists = [steps[d.ravel() <= shape.thickness / 2 + margin * m] for m in shape.margins for d in distance]
    longest = max(map(len, lists))
    made = np.stack([np.concatenate([part, np.full(longest - len(part), part[0])]) for part in lists])
    return made.reshape(len(shape.margins), _ANGLES, _PARTS, _PARTS, longest)


def _turns(rng: np.random.Generator, n: int, continuity: float) -> Array:
    """Angles a with density proportional to cos^2(a continuity) where |a| continuity <= pi / 2."""
    return np.interp(rng.random(n), _TURN_CDF, _TURNS) / continuity


def _segment(pivots: Array, angles: Array, margins: Array, length: float) -> Array:
    """(n, 4): y0, x0, y1, x1 of the paddle that begins `margin` after its pivot."""
    direction = np.stack([np.sin(angles), np.cos(angles)], 1)
    start = pivots + margins[:, None] * direction
    return np.concatenate([start, start + length * direction], 1).astype(np.float32)


def _distance(y: Array, x: Array, segments: Array) -> Array:
    """From each pixel to its row's segment; y (n, h, 1), x (n, 1, w), segments (n, 4) -> (n, h, w)."""
    y0, x0, y1, x1 = (segments[:, i, None, None] for i in range(4))
    dy, dx = y1 - y0, x1 - x0
    along = ((y - y0) * dy + (x - x0) * dx) / np.maximum(dy * dy + dx * dx, 1e-9)
    along = np.clip(along, 0, 1)
    return np.hypot(y - y0 - along * dy, x - x0 - along * dx)


def _targets(canvas: _Canvas, wanted: int) -> tuple[Array, Array]:
    """Grow two contours per image until `wanted` images are complete.

    Returns:
        Segments (n, 2 * paddles, 4), the contours in turn, and the rows that are complete.
    """
    shape, rng = canvas.shape, canvas.rng
    n, count = len(canvas.margins), 2 * shape.paddles
    segments = np.zeros((n, count, 4), np.float32)
    step, todo = np.zeros(n, np.int64), np.arange(n)
    for _ in range(100_000):
        at = step[todo]
        grown, made = np.zeros(len(todo), bool), np.zeros((len(todo), 4), np.float32)
        for begins in (False, True):
            part = np.flatnonzero((at < 2) == begins)
            if len(part):
                rows, k = todo[part], at[part]
                if begins:
                    pivots = _seeds(rng, shape, k, segments[rows, 0, :2])
                    grown[part], made[part] = canvas.place(
                        rows, pivots, lambda left: rng.uniform(-np.pi, np.pi, len(left)), np.zeros(len(rows), np.int16)
                    )
                else:
                    grown[part], made[part] = canvas.grow(
                        rows, segments[rows, k - 2], (k - 2 + _FIRST).astype(np.int16)
                    )
        on, back = todo[grown], todo[~grown]
        segments[on, step[on]] = made[grown]
        canvas.take(on, made[grown], (step[on] + _FIRST).astype(np.int16))
        step[on] += 1
        if len(back):
            step[back] = np.maximum(0, step[back] - rng.choice(_BACK, len(back)))
            canvas.free(back, step[back] + _FIRST)
        todo = todo[step[todo] < count]
        if len(step) - len(todo) >= wanted:
            return segments, np.flatnonzero(step == count)[:wanted]
    raise ConfigError(f"pathfinder: contours of {shape.paddles} paddles do not fit {shape}")


def _seeds(rng: np.random.Generator, shape: Shape, which: Array, first: Array) -> Array:
    """Where contours begin: the first (which 0) in the middle, the second at `seed_distance` from it."""
    low = min(2 * shape.seed_distance, (shape.size - 2) / 2)
    middle = rng.uniform(low, shape.size - 1 - low, (len(which), 2))
    angle = rng.uniform(-np.pi, np.pi, len(which))
    beside = first + shape.seed_distance * np.stack([np.sin(angle), np.cos(angle)], 1)
    return np.where(which[:, None] == 0, middle, beside)


def _distractors(canvas: _Canvas) -> Array:
    """As many distractor contours as find room: (n, distractors * distractor_paddles, 5)."""
    shape, rng = canvas.shape, canvas.rng
    n, each = len(canvas.margins), shape.distractor_paddles
    made = np.full((n, shape.distractors * each, 5), -1, np.float32)
    for snake in range(shape.distractors):
        first = _FIRST + 2 * shape.paddles + snake * each
        segments = np.zeros((n, each, 4), np.float32)
        complete = np.zeros(n, bool)
        for _ in range(_SEEDS):
            rows = np.flatnonzero(~complete)
            if not len(rows):
                break
            for i in range(each):
                own = np.full(len(rows), first + i - 1 if i else 0, np.int16)
                if i == 0:
                    pivots = rng.uniform(0, shape.size - 1, (len(rows), 2))
                    grown, found = canvas.place(rows, pivots, lambda left: rng.uniform(-np.pi, np.pi, len(left)), own)
                else:
                    grown, found = canvas.grow(rows, segments[rows, i - 1], own)
                lost, rows = rows[~grown], rows[grown]
                canvas.free(lost, np.full(len(lost), first))
                segments[rows, i] = found[grown]
                canvas.take(rows, found[grown], np.full(len(rows), first + i, np.int16))
            complete[rows] = True
        at, part = np.flatnonzero(complete), slice(snake * each, (snake + 1) * each)
        made[at, part, :4], made[at, part, 4] = segments[at], 2 + snake
    return made


def _render(shape: Shape, paddles: Array, discs: Array) -> NDArray[np.uint8]:
    """Antialiased images, brightest over darker."""
    n = len(paddles)
    target, distractor, disc = shape.brightness
    reach = math.ceil(max(shape.length / 2 + shape.thickness, shape.marker_radius)) + 2
    canvas = np.zeros((n, shape.size + 2 * reach, shape.size + 2 * reach), np.float32)
    box = np.arange(-reach, reach + 1)

    def stamp(rows: Array, segments: Array, half_width: float, value: float) -> None:
        middle = np.rint((segments[:, :2] + segments[:, 2:]) / 2).astype(np.int64)
        y, x = middle[:, 0, None] + box, middle[:, 1, None] + box
        distance = _distance(y[:, :, None], x[:, None, :], segments)
        cover = np.clip(half_width + 0.5 - distance, 0, 1) * value
        index = rows[:, None, None], (y + reach)[:, :, None], (x + reach)[:, None, :]
        canvas[index] = np.maximum(canvas[index], cover)

    for i in range(paddles.shape[1]):
        for contour, value in ((0, target), (1, distractor)):
            rows = np.flatnonzero((paddles[:, i, 4] >= 0) & ((paddles[:, i, 4] >= 2) == bool(contour)))
            if len(rows):
                stamp(rows, paddles[rows, i, :4], max(shape.thickness / 2, 0.5), value)
    for which in (0, 1):
        stamp(np.arange(n), np.concatenate([discs[:, which], discs[:, which]], 1), shape.marker_radius, disc)
    inner = slice(reach, reach + shape.size)
    pixels = canvas[:, inner, inner]
    top = pixels.max((1, 2), keepdims=True)
    return np.rint(pixels * (255 / np.maximum(top, 1))).astype(np.uint8)

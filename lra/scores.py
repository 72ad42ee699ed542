"""Published scores on Long Range Arena, with where they come from.

Columns: ListOps, Text, Retrieval, Image, Pathfinder, Path-X, then the average as published; "F" is chance, "-" none.
A source that ends in "?" was quoted from memory of the paper and only checked against its average: look it up before
relying on it. Rows of different groups are different protocols and do not compare.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["COLUMNS", "GROUPS", "TITLES", "Row", "rows"]

COLUMNS = ("listops", "text", "retrieval", "image", "pathfinder", "pathx")
TITLES = ("ListOps", "Text", "Retrieval", "Image", "Pathfinder", "Path-X")

GROUPS = {
    "jax": "google-research/long-range-arena: single run, sizes by task, FNet to RWKV-4 as other authors ran them",
    "small": "small PyTorch models, 2 layers of width 64 (Nystromformer, Skyformer, FlashAttention)",
    "ssm": "S4 protocol: larger models tuned per task, Text selected on test data; Image is gray unless said",
}

_TABLE = {
    "jax": """
Local attention        | 15.82 52.98 53.39 41.46 66.63 F | 46.06 | LRA README
Linear Transformer     | 16.13 65.90 53.09 42.34 75.30 F | 50.55 | LRA README
Reformer               | 37.27 56.10 53.40 38.07 68.50 F | 50.67 | LRA README
Sparse Transformer     | 17.07 63.58 59.59 44.24 71.71 F | 51.24 | LRA README
Sinkhorn               | 33.67 61.20 53.83 41.23 67.45 F | 51.29 | LRA README
Linformer              | 35.70 53.94 52.27 38.56 76.34 F | 51.36 | LRA README
Performer              | 18.01 65.40 53.82 42.77 77.05 F | 51.41 | LRA README
Synthesizer            | 36.99 61.68 54.67 41.61 69.45 F | 52.88 | LRA README
Longformer             | 35.63 62.85 56.89 42.22 69.71 F | 53.46 | LRA README
Transformer            | 36.37 64.27 57.46 42.44 71.40 F | 54.39 | LRA README
BigBird                | 36.05 64.02 59.29 40.83 74.87 F | 55.01 | LRA README
FNet                   | 35.33 65.11 59.61 38.67 77.80 F | 54.42 | RWKV paper
Luna-256               | 37.25 64.57 79.29 47.38 77.72 F | 59.37 | RWKV paper
Hrrformer              | 39.98 65.38 76.15 50.45 72.17 F | 60.83 | RWKV paper
RWKV-4                 | 55.88 86.04 88.34 70.53 58.42 F | 72.07 | RWKV paper
""",
    "small": """
Softmax                | 37.10 65.02 79.35 38.20 74.16 - | 58.77 | Nystromformer README
Reformer               | 19.05 64.88 78.64 43.29 69.36 - | 55.04 | Nystromformer README
Linformer              | 37.25 55.91 79.37 37.84 67.60 - | 55.59 | Nystromformer README
Performer              | 18.80 63.81 78.62 37.07 69.87 - | 53.63 | Nystromformer README
Nystromformer          | 37.15 65.52 79.56 41.58 70.94 - | 58.95 | Nystromformer README
Softmax                | 36.0 63.6 81.6 42.3 72.7 - | 59.3 | FlashAttention Table 3
FlashAttention         | 37.6 63.9 81.4 43.5 72.7 - | 59.8 | FlashAttention Table 3
Linear attention       | 38.8 63.2 80.7 42.6 72.5 - | 59.6 | FlashAttention Table 3
Local                  | 36.1 60.2 76.7 40.6 66.6 - | 56.0 | FlashAttention Table 3
Softmax                | 38.37 61.95 80.69 40.57 65.26 - | 57.37 | Skyformer Table 1
Skyformer              | 38.69 64.70 82.06 40.77 70.73 - | 59.39 | Skyformer Table 1
BigBird                | 39.25 63.86 80.28 43.16 68.72 - | 59.05 | Skyformer Table 1
TransNormer T1         | 41.03 66.90 83.11 51.60 75.92 - | 63.71 | TransNormer paper?
TransNormer T2         | 41.60 72.20 83.82 49.60 76.80 - | 64.80 | TransNormer paper?
""",
    "ssm": """
Transformer, by Mega   | 37.11 65.21 79.14 42.94 71.83 F | 59.24 | Megalodon Table 6
S4 v1                  | 58.35 76.02 87.09 87.26 86.05 88.10 | 80.48 | SGConv paper
S4-LegS                | 59.60 86.82 90.90 88.65 94.20 96.35 | 86.09 | S4 repository
DSS-softmax            | 60.6 84.8 87.8 85.7 84.6 87.8 | 81.88 | ag1988/dss
S4D-LegS               | 60.47 86.18 89.46 88.19 93.06 91.95 | 84.89 | S4D paper?
S4D-Inv                | 60.18 87.34 91.09 87.83 93.78 92.80 | 85.50 | S4D paper?
S4D-Lin                | 60.52 86.97 90.96 87.93 93.96 F | 78.39 | S4D paper?
SGConv                 | 61.45 89.20 91.11 87.97 95.46 97.83 | 87.17 | ctlllll/SGConv
S5                     | 62.15 89.31 91.40 88.00 95.33 98.58 | 87.46 | S5 repository
Liquid-S4              | 62.75 89.02 91.20 89.50 94.80 96.66 | 87.32 | RTF Table 1
H3                     | 57.5 88.2 91.0 87.3 93.0 91.8 | 84.8 | RTF Table 1
Mega                   | 63.14 90.43 91.25 90.44 96.01 97.98 | 88.21 | Mega paper
Mega-chunk             | 58.76 90.19 90.97 85.80 94.41 93.81 | 85.66 | Mega paper
Megalodon              | 63.79 90.48 91.76 89.42 98.13 98.17 | 88.63 | Megalodon Table 6
RTF                    | 61.59 89.72 92.04 90.51 96.11 96.32 | 87.71 | RTF Table 1
LRU (RGB image)        | 60.2 89.4 89.9 89.0 95.1 94.2 | - | LRU Table 3, 3 seeds
Mamba, by others       | 38.02 82.98 72.14 69.82 69.26 67.32 | 66.59 | secondary table?
Transformer, scratch   | 47.90 79.08 82.31 75.04 76.64 84.72 | 74.28 | SPT paper, rotary?
Transformer, masked SPT | 61.49 91.02 91.57 86.04 94.16 92.98 | 86.21 | SPT paper, rotary?
""",
}


@dataclass(frozen=True)
class Row:
    """One line of a leaderboard, in percent."""

    model: str
    scores: dict[str, float | None]
    """None where a task was not run; `failed` names those at chance."""
    failed: tuple[str, ...]
    published_average: float | None
    source: str
    group: str

    def average(self, chance: bool) -> float | None:
        """The mean over the tasks that were run; a failed Path-X counts as 50 with `chance` and is left out without."""
        parts = [v for task, v in self.scores.items() if v is not None and task not in self.failed]
        parts += [50.0] * (len(self.failed) if chance else 0)
        return None if len(parts) < 5 else sum(parts) / len(parts)


def rows(group: str | None = None) -> list[Row]:
    """Published rows, of one group or of all."""
    found = []
    for name in GROUPS if group is None else (group,):
        for line in _TABLE[name].strip().splitlines():
            model, scores, average, source = (cell.strip() for cell in line.split("|"))
            cells = dict(zip(COLUMNS, scores.split(), strict=True))
            values = {task: None if cell in "F-" else float(cell) for task, cell in cells.items()}
            failed = tuple(task for task, cell in cells.items() if cell == "F")
            found.append(Row(model, values, failed, None if average == "-" else float(average), source, name))
    return found

"""Run folders: which text, which recipe, from which model, and what is read back of them."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from seqlib.dispatch import used
from seqlib.errors import ConfigError, CorpusError
from seqlib.hf.keep import LOCK
from seqlib.hf.runs import is_run, read_json, write_aside

from .corpus import Corpus, Document, read_corpus, stdlib_corpus
from .recipes import Recipe

__all__ = ["DataSpec", "Run", "check_new", "held_out", "open_run", "run_of", "trained_on"]

_TRAINED = "trained.txt"


@dataclass(frozen=True)
class DataSpec:
    """How a corpus was found, so that a resumed run and an evaluation find the same one."""

    sources: tuple[str, ...] = ()
    """Files, folders and data set names; empty for the standard library of the running Python."""
    suffixes: tuple[str, ...] = ()
    column: str | None = None

    def read(self, recipe: Recipe) -> Corpus:
        if not self.sources:
            return stdlib_corpus(seed=recipe.seed)
        return read_corpus(
            self.sources, seed=recipe.seed, held_out=recipe.held_out, suffixes=self.suffixes, column=self.column
        )

    @classmethod
    def of(cls, sources: Sequence[str], suffixes: Sequence[str] = (), column: str | None = None) -> DataSpec:
        """Paths are made absolute, so that a run can be continued from anywhere."""
        found = (str(Path(source).absolute()) if Path(source).exists() else source for source in sources)
        return cls(tuple(found), tuple(suffixes), column)


@dataclass(frozen=True)
class Run:
    """A run folder: recipe.json, trained.txt, metrics.jsonl, loss.png, checkpoints/ and, once finished, model/."""

    folder: Path
    recipe: Recipe
    data: DataSpec
    digest: str
    start: str | None = None
    """The model whose weights training began with; None: fresh ones."""

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.folder / "loss.png"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.folder / "tensorboard"

    def corpus(self) -> Corpus:
        """The corpus of this run; an error if the text is no longer the same."""
        corpus = self.data.read(self.recipe)
        if corpus.digest != self.digest:
            raise CorpusError(
                f"the text of {self.folder} has changed since the run began; restore it or start a new run"
            )
        return corpus

    def write(self) -> None:
        """Store what the run is, with the versions, the machine and the kernels that ran."""
        values = {
            "recipe": self.recipe.to_dict(),
            "data": {"sources": self.data.sources, "suffixes": self.data.suffixes, "column": self.data.column},
            "corpus": self.digest,
            "start": self.start,
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("seqlib", "torch", "transformers", "accelerate", "datasets")},
            "machine": {
                "cpu": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
                "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            },
            "backends": used(),
        }
        write_aside(self.folder / "recipe.json", json.dumps(values, indent=2) + "\n")

    def write_trained(self, corpus: Corpus) -> None:
        """Remember the training documents, those of the model that training began with among them."""
        known = set() if self.start is None else trained_on(self.start) or set()
        known |= {_short(document) for document in corpus.train}
        write_aside(self.folder / _TRAINED, "".join(f"{name}\n" for name in sorted(known)))


def open_run(folder: Path) -> Run:
    """Read a run folder back.

    Raises:
        ConfigError: there is no run, or one of another version.
    """
    path = folder / "recipe.json"
    if not path.is_file():
        raise ConfigError(f"{folder} is no run folder (it has no recipe.json); give the --output of an earlier train")

    def take(values: dict) -> Run:
        if "task" in values["recipe"]:
            raise ConfigError(f"{folder} is a run of seqlib-lra; open it with that command")
        data = values["data"]
        spec = DataSpec(tuple(data["sources"]), tuple(data["suffixes"]), data["column"])
        return Run(folder, Recipe.from_dict(values["recipe"]), spec, values["corpus"], values.get("start"))

    return read_json(path, take)


def check_new(folder: Path) -> None:
    """Raise ConfigError unless a new run may be written into `folder`."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; give the name of a folder with --output")
    if is_run(folder):
        raise ConfigError(f"{folder} holds a run already; continue it with --resume {folder}, or give another --output")
    if folder.exists() and {path.name for path in folder.iterdir()} - {LOCK}:
        raise ConfigError(f"{folder} holds something that is no run; give another --output")


def run_of(model: str) -> Path | None:
    """The run folder that a model comes from, named by itself or by its model/."""
    for folder in (Path(model), Path(model).absolute().parent):
        if (folder / "recipe.json").is_file() and is_run(folder):
            return folder
    return None


def trained_on(model: str) -> set[str] | None:
    """Names by content of the documents that a run trained on; None where that is not known."""
    folder = run_of(model)
    path = None if folder is None else folder / _TRAINED
    return set(path.read_text("ascii").split()) if path is not None and path.is_file() else None


def held_out(documents: Iterable[Document], trained: set[str]) -> list[Document]:
    """The documents that were not trained on, not even in parts."""
    return [document for document in documents if _short(document) not in trained]


def _short(document: Document) -> str:
    return document.origin[:16]

"""Checkpoints that carry their own code, for machines where seqlib is not installed."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import seqlib
from seqlib.errors import UnsupportedInput
from seqlib.mixers import MIXERS

__all__ = ["export_remote_code"]

_ROOT = Path(seqlib.__file__).parent
_CLASSES = {
    "AutoConfig": ("seqlib.hf.configuration", "SeqlibConfig"),
    "AutoModel": ("seqlib.hf.modeling", "SeqlibModel"),
    "AutoModelForCausalLM": ("seqlib.hf.modeling", "SeqlibForCausalLM"),
    "AutoModelForSequenceClassification": ("seqlib.hf.modeling", "SeqlibForSequenceClassification"),
    "AutoModelForTokenClassification": ("seqlib.hf.heads", "SeqlibForTokenClassification"),
    "AutoModelForQuestionAnswering": ("seqlib.hf.heads", "SeqlibForQuestionAnswering"),
    "AutoModelForMaskedLM": ("seqlib.hf.heads", "SeqlibForMaskedLM"),
    "AutoModelForNextSentencePrediction": ("seqlib.hf.pair", "SeqlibForPairClassification"),
}
_ENTRY = "modeling_seqlib"
_FLAT = "seqlib_flat"
_HELPER = '''"""Modules of seqlib that are asked for by name."""

import importlib


def import_flat(name):
    return importlib.import_module("." + name.replace(".", "_"), __package__)
'''
_NATIVE = '''"""The exported code runs on torch alone."""


def why_unavailable(target: str) -> str:
    return "this checkpoint carries seqlib's code without its compiled part; pip install seqlib and import it first"
'''


def export_remote_code(model: Any, folder: str | Path) -> list[str]:
    """Save a model together with the part of seqlib that it needs, as plain torch.

    The folder, or a repository it is pushed to, opens with `trust_remote_code=True` where seqlib is not installed, and
    gives the same logits, slower. Where seqlib is imported first, the installed code is taken.

    Args:
        model: a seqlib model of `seqlib.hf`.
        folder: where weights, config and code go.

    Returns:
        The names of the code files. Each is one module of seqlib; folders have become part of the name, because
        transformers fetches the files of a checkpoint's code from one folder only.

    Raises:
        UnsupportedInput: not a seqlib model, or one with a mixer of somebody else's.
    """
    if not type(model).__module__.startswith("seqlib.hf."):
        raise UnsupportedInput(f"export_remote_code takes a model of seqlib.hf, got {type(model).__name__}")
    folder = Path(folder)
    kinds = set(_kinds(model.config.mixers))
    foreign = sorted(kind for kind in kinds if not MIXERS[kind].__module__.startswith("seqlib.mixers."))
    if foreign:
        raise UnsupportedInput(
            f"mixer {', '.join(foreign)} lies outside seqlib, whose modules alone are taken along; put its file into "
            "seqlib/mixers, or let its users import it"
        )
    model.save_pretrained(folder)
    sources = _collect(kinds)
    sources["seqlib.native"] = _NATIVE
    files = {f"{_flat(module)}.py": text for module, text in sources.items()}
    files[f"{_FLAT}.py"] = _HELPER
    files[f"{_ENTRY}.py"] = _entry(sorted(sources))
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{_ENTRY}.{name}" for auto, (_, name) in _CLASSES.items()}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return sorted(files)


def _kinds(value: Any) -> Iterator[str]:
    """Every mixer kind in a config, those inside composed mixers included."""
    if isinstance(value, dict):
        if isinstance(value.get("kind"), str):
            yield value["kind"]
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _kinds(item)


def _collect(kinds: set[str]) -> dict[str, str]:
    """The rewritten source of every module that the entry reaches, by its name in seqlib."""
    sources: dict[str, str] = {}
    waiting = [module for module, _ in _CLASSES.values()]
    while waiting:
        module = waiting.pop()
        if module in sources or module == "seqlib.native":
            continue
        text = _read(module)
        if module == "seqlib.mixers":
            text = _only(text, kinds)
        sources[module], needed = _rewrite(text)
        waiting += needed
        # Rows of an op's table name their functions as text; those in plain torch are taken along.
        if _ROOT.joinpath(*module.split(".")[1:], "reference.py").is_file():
            waiting += [f"{module}.{part}" for part in ("torch_impl", "reference")]
    return sources


def _path(module: str) -> Path | None:
    path = _ROOT.joinpath(*module.split(".")[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def _read(module: str) -> str:
    path = _path(module)
    assert path is not None, module
    return path.read_text(encoding="utf-8")


def _flat(module: str) -> str:
    return module.replace(".", "_")


def _only(text: str, kinds: set[str]) -> str:
    """The table of mixers with the rows of these kinds alone, and without the imports of the others."""
    tree = ast.parse(text)
    table = next(n.value for n in tree.body if isinstance(n, ast.AnnAssign) and isinstance(n.value, ast.Dict))
    rows = list(zip(table.keys, table.values))
    others = [(key, value) for key, value in rows if isinstance(key, ast.Constant) and key.value not in kinds]
    dropped = {ast.unparse(value) for _, value in others}
    edits: list[tuple[ast.expr | ast.stmt, list[str]]] = [(value, []) for _, value in others]
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and any(name.name in dropped for name in node.names):
            node.names = [name for name in node.names if name.name not in dropped]
            edits.append((node, [ast.unparse(node)] if node.names else []))
    return _edited(text, edits)


def _rewrite(text: str) -> tuple[str, list[str]]:
    """Imports of seqlib made relative and flat; and the modules that are imported."""
    edits: list[tuple[ast.expr | ast.stmt, list[str]]] = []
    needed: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "seqlib":
            homes = [(*_home(node.module or "", name.name), name) for name in node.names]
            needed += [module for module, _, _ in homes]
            edits.append((node, [_import(*home) for home in homes]))
        elif isinstance(node, ast.Import) and node.names[0].name == "importlib":
            edits.append((node, ["import importlib", f"from .{_FLAT} import import_flat"]))
    return _edited(text, edits).replace("importlib.import_module(", "import_flat("), needed


def _import(module: str, attribute: str | None, name: ast.alias) -> str:
    if attribute is None:
        return f"from . import {_flat(module)} as {name.asname or name.name}"
    return f"from .{_flat(module)} import {attribute}" + (f" as {name.asname}" if name.asname else "")


def _home(module: str, name: str) -> tuple[str, str | None]:
    """Where a name is really defined, followed through packages that only pass it on; None for a module itself."""
    for node in ast.parse(_read(module)).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("seqlib"):
            if any((alias.asname or alias.name) == name for alias in node.names):
                return _home(node.module or "", name)
    return (module, name) if _path(f"{module}.{name}") is None else (f"{module}.{name}", None)


def _edited(text: str, edits: Iterable[tuple[ast.expr | ast.stmt, list[str]]]) -> str:
    lines = text.splitlines()
    for node, made in sorted(edits, key=lambda edit: edit[0].lineno, reverse=True):
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in made]
    return "\n".join(lines) + "\n"


def _entry(modules: list[str]) -> str:
    """The one module that transformers opens, so that every class comes from the same copy of the files."""
    names = [name for _, name in _CLASSES.values()]
    return "\n".join(
        [
            '"""A model of seqlib with the code that it needs."""',
            "",
            *(f"from .{_flat(module)} import {name}" for module, name in _CLASSES.values()),
            "",
            f"for _class in ({', '.join(names)}):",
            "    _class.__module__ = __name__  # this file is what transformers copies when the model is saved again",
            "",
            "",
            "def _files():",
            '    """Never called: transformers fetches the files that it sees imported."""',
            *(f"    from .{name} import __name__" for name in (*map(_flat, modules), _FLAT)),
            "",
        ]
    )

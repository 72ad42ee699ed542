"""Checks that keep the house in order: floors, tables, packaging, file sizes."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from seqlib.dispatch import BACKENDS, FORMS, op_names
from seqlib.mixers import MIXERS

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Floors of the design: a room imports only rooms on lower floors (or its own).
FLOORS = {
    "errors": 1,
    "fields": 2,
    "_register": 1,
    "sequence": 2,
    "dispatch": 2,
    "native": 2,
    "context": 1,
    "cpu": 1,
    "ops": 3,
    "layers": 4,
    "parallel": 4,
    "bench": 4,
    "mixers": 5,
    "models": 6,
    "hf": 7,
    "lm": 8,
    "lra": 8,
}
LAZY_BY_DESIGN = {("dispatch", "ops")}  # explain() looks tables up by name at call time
THIRD_PARTY = {
    "torch": set(FLOORS),
    "numpy": {"layers", "lm", "lra"},
    "transformers": {"hf", "lm", "lra"},
    "tokenizers": {"hf"},
    "huggingface_hub": {"hf", "lm", "lra"},
    "safetensors": {"hf", "lm", "lra"},
    "accelerate": {"hf", "lm", "lra"},
    "datasets": {"lm", "lra"},
    "PIL": {"lra"},
    "pyarrow": {"lra"},
    "matplotlib": {"bench", "lm", "lra"},
    "typer": {"lm", "lra"},
    "httpx": {"hf"},  # comes with huggingface_hub
    "jinja2": {"lm"},  # comes with torch
    "rich": {"dispatch", "bench", "lm", "lra"},
    "tqdm": {"lm", "lra"},
}


def _files() -> Iterator[tuple[str, Path]]:
    """Every Python file of the library with its room."""
    for path in sorted((ROOT / "seqlib").rglob("*.py")):
        relative = path.relative_to(ROOT / "seqlib")
        if "_kernels" not in relative.parts:
            yield relative.parts[0].removesuffix(".py"), path
    for room in ("lm", "lra"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield room, path


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down() -> None:
    wrong = []
    for room, path in _files():
        if room == "__init__":
            continue
        for name in _imports(path):
            parts = name.split(".")
            if parts[0] == "seqlib" and len(parts) > 1 and parts[1] in FLOORS:
                allowed = parts[1] == room or FLOORS[parts[1]] < FLOORS[room] or (room, parts[1]) in LAZY_BY_DESIGN
                same_floor = FLOORS[parts[1]] == FLOORS[room] == 2
                if not (allowed or same_floor):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
            elif parts[0] in ("lm", "lra", "kernels"):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}: use seqlib.{name}")
    assert not wrong, "\n".join(wrong)


def test_modules_of_hf_import_each_other_in_one_direction() -> None:
    """Imports inside functions count, and by name as text: a circle that is closed later is one nonetheless."""
    paths = {
        ".".join(("seqlib", *path.relative_to(ROOT / "seqlib").with_suffix("").parts)): path
        for room, path in _files()
        if room == "hf" and path.stem != "__init__"
    }
    graph = {name: paths.keys() & {*_imports(path), *_texts(path)} for name, path in paths.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)  # raises CycleError with the circle


def _texts(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_third_party_stays_in_its_rooms() -> None:
    wrong = []
    for room, path in _files():
        for name in _imports(path):
            top = name.split(".")[0]
            if top in sys.stdlib_module_names or top == "seqlib":
                continue
            optional = (
                top in ("mamba_ssm", "causal_conv1d", "flash_attn")
                if path.stem == "vendor_impl"
                else top == "triton" and path.stem.startswith("triton_")
            )
            if not optional and room not in THIRD_PARTY.get(top, set()):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_import_is_light() -> None:
    """The library imports without transformers, triton or vendor kernels, and compiles or fetches nothing."""
    code = """
import sys, time
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "triton", "mamba_ssm", "causal_conv1d", "flash_attn", "datasets"}:
            raise ModuleNotFoundError(name)
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
sys.meta_path.insert(0, Block())
import subprocess
def refuse(*a, **k): raise AssertionError("a process was started at import")
subprocess.Popen = subprocess.run = refuse
start = time.perf_counter()
import seqlib, seqlib.ops, seqlib.mixers, seqlib.models
print(time.perf_counter() - start)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 10


def test_kernels_folder_shadows_nothing() -> None:
    """With the repository root first on the path, transformers does not take our sources for its `kernels` package."""
    assert not list((ROOT / "kernels").rglob("*.py"))
    code = "import transformers, sys; k = sys.modules.get('kernels'); assert k is None or k.__file__ is None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", op_names())
def test_op_folder_is_complete(name: str) -> None:
    folder = ROOT / "seqlib" / "ops" / name
    for file in ("__init__.py", "reference.py", "cases.py"):
        assert (folder / file).is_file(), f"{name} has no {file}"
    op = importlib.import_module(f"seqlib.ops.{name}").OP
    assert op.name == name
    assert op.impls[-1].name == "reference", "the reference is the last resort of auto"
    assert getattr(importlib.import_module("seqlib.ops"), op.function).__doc__
    for impl in op.impls:
        assert impl.name in BACKENDS and impl.form in FORMS
        module, _, function = impl.target.partition(":")
        path = ROOT / (module.replace(".", "/") + ".py")
        body = ast.parse(path.read_text()).body
        defined = [n.name for n in body if isinstance(n, ast.FunctionDef)]
        defined += [t.id for n in body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
        assert function in defined, f"{impl.target} does not exist"


def test_mixers_declare_themselves() -> None:
    known = {"packed", "padded", "bidirectional", "initial_state", "sequence_parallel"}
    for kind, cls in MIXERS.items():
        assert cls.supports <= known, kind
        assert cls.layer_type in ("linear_attention", "full_attention", "sliding_attention"), kind
        assert "Source:" in (cls.__doc__ or ""), f"{kind} does not name its source"


def test_packages_equal_folders() -> None:
    folders = {"seqlib"}
    for top, name in (("seqlib", "seqlib"), ("lm", "seqlib.lm"), ("lra", "seqlib.lra")):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            folders.add(".".join((name, *parts)))
    listed = {p for p in PROJECT["tool"]["setuptools"]["packages"] if not p.startswith("seqlib._kernels")}
    assert listed == folders


def test_manifest_lists_every_source() -> None:
    manifest = tomllib.loads((ROOT / "kernels" / "manifest.toml").read_text())
    tables = [table for target in manifest.values() for table in (target, *target.get("isa", {}).values())]
    listed = {name for table in tables for key in ("sources", "kernels") for name in table.get(key, [])}
    sources = (p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".cpp", ".cu"))
    present = {p.relative_to(ROOT / "kernels").as_posix() for p in sources}
    assert listed == present


def test_work_is_divided_among_threads_in_one_place() -> None:
    """By tickets: fixed shares wait for a thread that other programs keep from its core."""
    divide = {p.name for p in (ROOT / "kernels" / "cpu").iterdir() if "parallel_for" in p.read_text()}
    assert divide == {"parallel.h"}


def test_files_are_rooms_not_halls() -> None:
    sources = [p for _, p in _files()] + [
        p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh")
    ]
    sources += list((ROOT / "tests").glob("*.py"))
    long = [f"{p.relative_to(ROOT)}: {n}" for p in sources if (n := len(p.read_text().splitlines())) > 500]
    assert not long, long


def test_no_broad_except_and_no_stray_environment() -> None:
    wrong = []
    for room, path in _files():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                broad = node.type is None or (isinstance(node.type, ast.Name) and node.type.id == "Exception")
                if broad and not any(isinstance(n, ast.Raise) for n in ast.walk(node)):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} swallows every exception")
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                if room not in ("dispatch", "native", "cpu"):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} reads the environment")
    assert not wrong, "\n".join(wrong)


def test_environment_variables_are_documented() -> None:
    readme = (ROOT / "README.md").read_text()
    used = set()
    for _, path in _files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                if node.value.startswith("SEQLIB_"):
                    used.add(node.value)
    assert used and all(name in readme for name in used), sorted(used)


def test_no_traces_of_one_machine() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    home = "/" + "root/"
    for name in names:
        path = ROOT / name
        if path.is_file() and path.suffix not in (".png",):
            text = path.read_text(errors="ignore")
            assert home not in text and os.sep + "work" + os.sep not in text, name


def test_torch_is_new_enough() -> None:
    major, minor = (int(n) for n in torch.__version__.split(".")[:2])
    assert (major, minor) >= (2, 10)


def test_constraints_pin_what_the_project_asks_for() -> None:
    """Every direct dependency has one tested version, within pyproject's range, and transformers ends at that minor."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(r.name): r for r in map(Requirement, lines[1:])}
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(text) for text in project["dependencies"] + extras["lm"] + extras["lra"] + extras["test"]]
    for requirement in asked:
        if requirement.name in ("torch", "seqlib"):
            continue  # chosen by TORCH in the Makefile; the project itself
        (pin,) = pinned[canonicalize_name(requirement.name)].specifier
        assert pin.operator == ("<=" if requirement.name == "triton" else "=="), pin
        assert pin.version in requirement.specifier, requirement
        if requirement.name == "transformers":
            release = Version(pin.version).release
            assert f"{release[0]}.{release[1] + 1}" not in requirement.specifier, "the next minor is not tested yet"
    makefile = (ROOT / "Makefile").read_text()
    assert "--constraint $(CONSTRAINTS)" in makefile


def test_the_suite_runs_under_both_ends_of_what_transformers_may_be() -> None:
    """`make test-transformers`: the oldest that pyproject.toml allows, what the constraints pin, and some between."""
    (line,) = re.findall(r"^TRANSFORMERS \?= (.*)$", (ROOT / "Makefile").read_text(), re.M)
    versions = [Version(text) for text in line.split()]
    (asked,) = (r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "transformers")
    assert versions == sorted(versions) and all(v in asked.specifier for v in versions)
    assert {Version(s.version) for s in asked.specifier if s.operator == ">="} == {Version(str(versions[0])[:-2])}
    assert f"transformers=={versions[-1]}" in (ROOT / ".ci" / "constraints.txt").read_text().splitlines()

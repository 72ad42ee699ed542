"""Finding, building and loading the compiled library, and what happens when that cannot be done."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from seqlib import native
from seqlib.errors import NativeUnavailable

KERNELS = native.sources()
SMALL = """
[cpu]
flags = ["-std=c++20", "-O1", "-fPIC"]
sources = ["bindings.cpp", "cpu/isa.cpp"]
kernels = []
[cpu.isa]
"""
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on this machine"
)


@pytest.fixture
def nothing_built(monkeypatch, tmp_path: Path) -> Path:
    """No prebuilt library and an empty cache; returns the cache."""
    monkeypatch.setattr(native, "_PREBUILT", tmp_path / "none")
    monkeypatch.setenv("SEQLIB_CACHE", str(tmp_path / "cache"))
    native._compiler.cache_clear()
    yield tmp_path / "cache"
    native._compiler.cache_clear()


@pytest.fixture
def small(monkeypatch, tmp_path: Path) -> Path:
    """A copy of the sources whose manifest names two files, so that a build takes seconds."""
    folder = tmp_path / "kernels"
    shutil.copytree(KERNELS, folder)
    (folder / "manifest.toml").write_text(SMALL)
    monkeypatch.setattr(native, "sources", lambda: folder)
    return folder


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    start = "import pathlib; from seqlib import native; native._PREBUILT = pathlib.Path('/nonexistent')\n"
    return subprocess.run(
        [sys.executable, "-c", start + code], capture_output=True, text=True, env=os.environ | environment, check=False
    )


def test_missing_compiler_is_explained(nothing_built, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler \(no-such-compiler not found\); install"):
        native.load.__wrapped__("cpu")


@needs_compiler
def test_forbidden_build_is_explained(nothing_built, monkeypatch) -> None:
    monkeypatch.setenv("SEQLIB_JIT", "0")
    with pytest.raises(NativeUnavailable, match="SEQLIB_JIT=0 forbids building; run `python -m seqlib.native build`"):
        native.load.__wrapped__("cpu")


@needs_compiler
def test_unwritable_cache_is_explained(nothing_built, monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQLIB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(NativeUnavailable, match="set SEQLIB_CACHE to a writable folder"):
        native.load.__wrapped__("cpu")


@needs_compiler
def test_compiler_error_is_shown_and_leaves_nothing(small: Path, tmp_path: Path) -> None:
    with open(small / "cpu" / "isa.cpp", "a") as source:
        source.write("\nthis is not C++;\n")
    with pytest.raises(NativeUnavailable, match=r"(?s)failed on isa\.cpp:.*this"):
        native.build("cpu", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.so"))


@needs_compiler
def test_a_change_of_sources_is_another_library(small: Path) -> None:
    before = native._name("cpu")
    header = small / "cpu" / "isa.h"
    header.write_text(header.read_text() + "\n// changed\n")
    assert native._name("cpu") != before


@needs_compiler
def test_two_processes_build_once(small: Path, tmp_path: Path) -> None:
    code = (
        "import pathlib; from seqlib import native; "
        f"native.sources = lambda: pathlib.Path({str(small)!r}); "
        f"print(native.build('cpu', pathlib.Path({str(tmp_path / 'out')!r})))"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum("compiling the" in err for _, err in said) == 1


@needs_compiler
def test_a_killed_build_is_begun_again(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import pathlib; from seqlib import native; "
        f"native.sources = lambda: pathlib.Path({str(small)!r}); native.build('cpu', pathlib.Path({str(out)!r}))"
    )
    victim = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert victim.stderr is not None
    assert "compiling" in victim.stderr.readline()
    time.sleep(0.3)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert not list(out.glob("*.so"))
    library = native.build("cpu", out)
    assert library.stat().st_size > 1000


def test_without_the_library_ops_run_and_say_so() -> None:
    code = """
import torch, warnings
from seqlib.ops import rms_norm
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        rms_norm(torch.ones(1, 4), None)
print(len(said), said[0].message)
"""
    done = _python(code, CXX="no-such-compiler", SEQLIB_CACHE="/nonexistent")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 norm runs its slower torch form because native is unavailable: no C++ compiler")
    strict = _python(code, CXX="no-such-compiler", SEQLIB_CACHE="/nonexistent", SEQLIB_STRICT="1")
    assert strict.returncode != 0 and "BackendUnavailable" in strict.stderr


def test_a_named_backend_is_never_replaced() -> None:
    code = "import torch; from seqlib.ops import rms_norm; rms_norm(torch.ones(1, 4), None, backend='native')"
    done = _python(code, CXX="no-such-compiler", SEQLIB_CACHE="/nonexistent")
    assert "BackendUnavailable" in done.stderr and "no C++ compiler" in done.stderr


def test_missing_cuda_is_explained(monkeypatch, tmp_path: Path) -> None:
    """Without nvcc, and without a device, the GPU kernels say what they lack."""
    native._nvcc.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CUDACXX", "")
    with pytest.raises(NativeUnavailable, match="no nvcc on the path, in CUDA_HOME or in CUDACXX; install the CUDA"):
        native._nvcc()
    native._nvcc.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NativeUnavailable, match="torch sees no CUDA device"):
        native.load.__wrapped__("cuda")


def test_a_library_serves_the_architectures_in_its_name(nothing_built, monkeypatch) -> None:
    """One built for two architectures is found for either, and not for a third."""
    monkeypatch.setattr(native, "_nvcc", native._compiler)
    folder = native._PREBUILT
    folder.mkdir()
    library = folder / native._name("cuda", "", ("sm_80", "sm_90"))
    library.write_text("")
    assert native._find("cuda", ("sm_90",)) == native._find("cuda", ("sm_80", "sm_90")) == library
    assert native._find("cuda", ("sm_100",)) is None


def test_instruction_set_is_checked() -> None:
    reason = native.why_unavailable("cpu")
    if reason:
        pytest.skip(f"no native library: {reason}")
    with pytest.raises(RuntimeError, match="unknown instruction set sse9"):
        torch.ops.seqlib.isa("sse9")

"""Finding, building and loading the compiled library, and what happens when that cannot be done."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from seqlib import cpu as this_cpu
from seqlib import native
from seqlib.errors import NativeUnavailable

KERNELS = native.sources()
SMALL = """
[cpu]
flags = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
source_flags = []
sources = ["bindings.cpp", "cpu/isa.cpp"]
kernel_flags = []
kernel_prefix = "vec.h"
kernels = []
[cpu.isa.avx2]
machines = ["x86_64"]
features = ["avx2", "fma"]
flags = ["-mavx2", "-mfma"]
[cpu.isa.portable]
machines = ["any"]
features = []
flags = []
"""
ONE_KERNEL = SMALL.replace("kernels = []", 'kernels = ["cpu/norm_kernel.cpp"]')
THREE_KERNELS = SMALL.replace(
    "kernels = []", 'kernels = ["cpu/norm_kernel.cpp", "cpu/linear_kernel.cpp", "cpu/ssm_kernel_kernel.cpp"]'
)
CPUS = {
    "Zen 4": ("avx2 fma avx512f avx512bw avx512dq avx512vl avx512_bf16", ("avx512bf16", "avx512")),
    "Skylake server": ("avx2 fma avx512f avx512bw avx512dq avx512vl", ("avx512",)),
    "Zen 3": ("avx2 fma", ("avx2",)),
    "Knights Landing": ("avx2 fma avx512f", ("avx2",)),
    "older": ("sse4_2 avx", ("portable",)),
}
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


@pytest.fixture
def cpu(monkeypatch, tmp_path: Path):
    """Makes this machine one of CPUS."""
    monkeypatch.setattr(native.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(this_cpu, "_CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.delenv("SEQLIB_ISA", raising=False)

    def become(name: str) -> None:
        this_cpu._CPU_INFO.write_text(f"processor\t: 0\nflags\t\t: fpu {CPUS[name][0]}\n")
        this_cpu.features.cache_clear()

    this_cpu.features.cache_clear()
    yield become
    this_cpu.features.cache_clear()


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


@pytest.mark.parametrize("name", CPUS)
def test_a_first_build_compiles_the_sets_of_this_machine(cpu, name: str) -> None:
    cpu(name)
    sets = CPUS[name][1]
    assert native.instruction_sets() == native._wanted("cpu") == sets
    compiled = {flag.removeprefix("-DSEQLIB_ISA=") for unit in native._units("cpu", sets) for flag in unit.flags
                if flag.startswith("-DSEQLIB_ISA=")}  # fmt: skip
    assert compiled == set(sets)


def test_all_sets_are_built_where_the_cpu_is_unknown_or_all_are_asked_for(cpu, monkeypatch) -> None:
    everything = ("avx512bf16", "avx512", "avx2", "portable")
    assert not this_cpu._CPU_INFO.exists() and native._wanted("cpu") == everything
    cpu("Zen 3")
    monkeypatch.setenv("SEQLIB_ISA", "all")
    assert native._wanted("cpu") == everything
    monkeypatch.setenv("SEQLIB_ISA", "avx2")
    with pytest.raises(NativeUnavailable, match="SEQLIB_ISA must be \"all\" or not set, got 'avx2'"):
        native._wanted("cpu")


@needs_compiler
@pytest.mark.parametrize("where", ["prebuilt", "cache"])
@pytest.mark.parametrize("name", CPUS)
def test_a_library_is_taken_only_where_it_has_the_sets(nothing_built, cpu, monkeypatch, name: str, where: str) -> None:
    """Every library that some machine builds, seen from every machine: a cache can be shared by different ones."""
    monkeypatch.setenv("SEQLIB_JIT", "0")
    cpu(name)
    needed = CPUS[name][1]
    folder, compiler = (native._PREBUILT, "") if where == "prebuilt" else (nothing_built, native._compiler())
    folder.mkdir()
    for held in {*(sets for _, sets in CPUS.values()), native.instruction_sets(all_sets=True)}:
        library = folder / native._name("cpu", compiler, held)
        library.write_text("")
        assert native._find("cpu", needed) == (library if set(needed) <= set(held) else None)
        library.unlink()
    (folder / native._name("cpu", compiler, ("nothing",))).write_text("")
    with pytest.raises(NativeUnavailable, match="no built cpu library"):
        native.load.__wrapped__("cpu")


@needs_compiler
def test_a_set_that_was_not_compiled_is_refused_by_name(small: Path, tmp_path: Path) -> None:
    (small / "manifest.toml").write_text(ONE_KERNEL)
    library = native.build("cpu", tmp_path / "out", ("portable",))
    assert "-portable-" in library.name
    done = _python(
        f"import torch; torch.ops.load_library({str(library)!r}); isa = torch.ops.seqlib.isa\n"
        "print(isa(None), isa('portable')); isa('avx2')"
    )
    assert done.stdout == "portable portable\n"
    assert "the library was built without avx2; run `python -m seqlib.native build`" in done.stderr or (
        "this machine has no avx2" in done.stderr
    )


def test_the_library_runs_the_set_that_it_was_chosen_for() -> None:
    reason = native.why_unavailable("cpu")
    if reason:
        pytest.skip(f"no native library: {reason}")
    assert torch.ops.seqlib.isa(None) == native.instruction_sets()[0]


@needs_compiler
def test_a_build_says_how_far_it_is_and_reuses_what_is_there(small: Path, tmp_path: Path, capsys) -> None:
    (small / "manifest.toml").write_text(ONE_KERNEL)
    native.build("cpu", tmp_path / "out", ("portable",))
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"seqlib: compiling the cpu kernels for portable into {tmp_path / 'out'} (once) ..."
    assert re.fullmatch(r"seqlib: 3 of 3 files compiled, \d+ s", said[-1])
    if len(native.instruction_sets(all_sets=True)) > 1:
        native.build("cpu", tmp_path / "out", ("avx2", "portable"))
        assert "1 of 1 files compiled" in capsys.readouterr().err


def test_progress_is_one_line_of_a_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with native._progress(2) as tell:
        tell(1)
        tell(2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and [part[:16] for part in said.split("\r")[1:]] == [
        f"seqlib: {done} of 2 f" for done in range(3)
    ]


@needs_compiler
def test_a_precompiled_header_that_fails_changes_nothing(small: Path, monkeypatch, tmp_path: Path) -> None:
    """Some compilers know no such thing; the build then takes longer."""
    (small / "manifest.toml").write_text(THREE_KERNELS)
    run, headers = native._run, []

    def refuse(command: list[str]) -> str:
        if "c++-header" in command:
            headers.append(command)
            raise NativeUnavailable("no such thing")
        return run(command)

    monkeypatch.setattr(native, "_run", refuse)
    assert native.build("cpu", tmp_path / "out", ("portable",)).is_file()
    assert len(headers) == 1, "three kernels share one header"


@needs_compiler
def test_libraries_have_the_mode_of_other_files(small: Path, tmp_path: Path) -> None:
    """Others who share the cache can read them."""
    before = os.umask(0o022)
    try:
        library = native.build("cpu", tmp_path / "out", ("portable",))
    finally:
        os.umask(before)
    assert library.stat().st_mode & 0o777 == 0o755


@needs_compiler
def test_what_older_sources_left_in_the_package_goes(small: Path, nothing_built) -> None:
    native._PREBUILT.mkdir()
    old = native._PREBUILT / "seqlib_cpu-portable-0123456789abcdef.so"
    old.write_text("")
    first = native._install("cpu", ("portable",))
    assert first.is_file() and not old.exists()
    assert [p.name for p in native._PREBUILT.iterdir()] == [first.name], "nothing but the library is shipped"


@needs_compiler
@pytest.mark.slow
def test_a_wheel_with_the_library_needs_no_compiler(tmp_path: Path) -> None:
    """`python -m seqlib.native wheel`: in an empty environment an op runs the prebuilt loops."""
    root = Path(__file__).resolve().parent.parent
    source, wheels, home = tmp_path / "source", tmp_path / "wheels", tmp_path / "home"
    ignored = shutil.ignore_patterns(".*", "_lib", "__pycache__", "build", "dist", "runs", "*.egg-info")
    shutil.copytree(root, source, ignore=ignored)
    (source / "build" / "lib" / "seqlib").mkdir(parents=True)
    (source / "build" / "lib" / "seqlib" / "left.py").write_text("")  # by an earlier build; it is not shipped
    subprocess.run(
        [sys.executable, "-m", "seqlib.native", "wheel", "--no-build-isolation", "--output", wheels],
        cwd=source, check=True,
    )  # fmt: skip
    (wheel,) = wheels.iterdir()
    assert re.fullmatch(r"seqlib-[\d.]+-py3-none-(manylinux|linux|macosx)_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    assert "seqlib/left.py" not in names and "seqlib/native.py" in names
    held = [name for name in names if name.startswith("seqlib/_lib/")]
    assert len(held) == 1 and set(native.instruction_sets(all_sets=True)) <= set(held[0].split("-"))

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    site = Path(subprocess.run([python, "-c", "import site; print(site.getsitepackages()[0])"],
                               capture_output=True, text=True, check=True).stdout.strip())  # fmt: skip
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(wheel)], check=True)
    (site / "zz_torch.pth").write_text(str(Path(torch.__file__).parent.parent) + "\n")  # torch comes from here
    code = (
        "import torch, seqlib; from seqlib import native; from seqlib.ops import rms_norm\n"
        "rms_norm(torch.ones(1, 4), None, backend='native')\n"
        "print(native.load()); print(torch.ops.seqlib.isa(None))"
    )
    environment = {
        "PATH": "/nonexistent",
        "HOME": str(tmp_path),
        "SEQLIB_CACHE": str(tmp_path / "empty"),
        "SEQLIB_JIT": "0",
    }
    done = subprocess.run(
        [python, "-c", code], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / held[0]), native.instruction_sets()[0]]


def test_a_wheel_is_made_of_a_checkout(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "seqlib")
    with pytest.raises(NativeUnavailable, match="a wheel is made of a checkout, and .* is none; clone"):
        native.wheel(tmp_path / "dist")


def test_what_pip_says_is_shown(monkeypatch, tmp_path: Path) -> None:
    """And no half of a wheel stays."""
    monkeypatch.setattr(native, "_PACKAGE", tmp_path / "seqlib")
    monkeypatch.setattr(native, "sources", lambda: KERNELS)
    monkeypatch.setattr(native, "_install", lambda *_: None)
    (tmp_path / "pyproject.toml").write_text("[build-system]\nrequires = []\nbuild-backend = 'no_such_backend'\n")
    with pytest.raises(NativeUnavailable, match="(?s)pip made no wheel of .*no_such_backend"):
        native.wheel(tmp_path / "dist", isolated=False)
    assert not list((tmp_path / "dist").iterdir())


@pytest.mark.parametrize("options", [["--arch", "avx2"], ["--target", "cuda"]])
def test_a_wheel_has_every_set(options: list[str], monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["native", "wheel", *options])
    with pytest.raises(SystemExit):
        native._main()
    assert "a wheel holds a cpu library with every instruction set" in capsys.readouterr().err


def test_instruction_set_is_checked() -> None:
    reason = native.why_unavailable("cpu")
    if reason:
        pytest.skip(f"no native library: {reason}")
    with pytest.raises(RuntimeError, match="unknown instruction set sse9"):
        torch.ops.seqlib.isa("sse9")

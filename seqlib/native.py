"""Find, build and load the compiled kernels.

Nothing is compiled at import. The first op that wants the native library gets, in this order: the library that
`python -m seqlib.native build` put into the package, the one in the user's cache, or a build into that cache. A failure
is remembered as one sentence, and ops then run their torch form and say so.

Targets: "cpu"; "cuda", built by nvcc for the devices of this machine, or for others with `--arch`; and "emulated", the
CUDA kernels compiled for the host under names of their own (`torch.ops.seqlib_emulated`), which the tests run.

Environment: SEQLIB_JIT=0 forbids building on first use; SEQLIB_CACHE moves the cache (default: seqlib in
XDG_CACHE_HOME or ~/.cache); CXX names the compiler (default: c++, g++ or clang++) and CUDACXX that for CUDA (default:
nvcc on the path, in CUDA_HOME or in /usr/local/cuda).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from seqlib.errors import NativeUnavailable

__all__ = ["TARGETS", "build", "compiler_version", "device_arch", "load", "object_file", "sources", "why_unavailable"]

_PACKAGE = Path(__file__).resolve().parent
_PREBUILT = _PACKAGE / "_lib"  # where `python -m seqlib.native build` puts a library
_ABI = "0x020a000000000000"  # LibTorch stable ABI of torch 2.10, the oldest we support
_FOLDER = {"cpu": "cpu", "cuda": "cuda", "emulated": "cuda"}
TARGETS = tuple(_FOLDER)


class Unit(NamedTuple):
    """A source, the compiler that takes it, and its flags."""

    source: Path
    compiler: str
    flags: list[str]


def sources() -> Path:
    """The folder of native sources: inside an installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "_kernels", _PACKAGE.parent / "kernels"):
        if (folder / "manifest.toml").is_file():
            return folder
    raise NativeUnavailable(f"no native sources beside {_PACKAGE}; reinstall seqlib")


@functools.cache
def load(target: str = "cpu") -> Path:
    """Load the library of `target` into this process, building it if need be, and return its path.

    Raises:
        NativeUnavailable: with the reason and the remedy.
    """
    arch: tuple[str, ...] = ()
    if target == "cuda":
        arch = device_arch()
        load("cpu")  # holds the schemas
    library = _find(target, arch)
    if library is None:
        if os.environ.get("SEQLIB_JIT", "1") == "0":
            raise NativeUnavailable(
                f"no built {target} library and SEQLIB_JIT=0 forbids building; run `python -m seqlib.native build`"
                + (f" --target {target}" if target != "cpu" else "")
            )
        library = build(target, _cache_folder(), arch)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise NativeUnavailable(f"{library} does not load: {error}; delete it and try again") from error
    return library


@functools.cache
def why_unavailable(target: str = "cpu") -> str | None:
    """The reason why the library cannot be had here, None once it is loaded."""
    try:
        load(target)
    except NativeUnavailable as error:
        return str(error)
    return None


def device_arch() -> tuple[str, ...]:
    """The architectures of this machine's CUDA devices, such as "sm_90"."""
    if not torch.cuda.is_available():
        raise NativeUnavailable("torch sees no CUDA device here; the CUDA kernels need one to run")
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return tuple(f"sm_{major}{minor}" for major, minor in sorted(found))


def build(target: str, folder: Path, arch: Sequence[str] = ()) -> Path:
    """Compile the library of `target` into `folder`; other processes that want it wait for this one.

    Args:
        arch: what the CUDA kernels are built for; () for the devices of this machine. Other targets have none.
    """
    compiler = _compiler()
    if target == "cuda":
        compiler = _nvcc()
        arch = tuple(arch) or device_arch()
    library = folder / _name(target, compiler, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{target}.lock"):
            if not library.exists():
                print(f"seqlib: compiling the {target} kernels into {folder} (once) ...", file=sys.stderr, flush=True)
                _compile(target, compiler, library, arch)
    except OSError as error:
        raise NativeUnavailable(
            f"cannot write the compiled kernels to {folder}: {error}; set SEQLIB_CACHE to a writable folder"
        ) from error
    return library


def _find(target: str, arch: Sequence[str] = ()) -> Path | None:
    """A built library that serves all of `arch`."""
    places = [(_PREBUILT, "")]
    with contextlib.suppress(NativeUnavailable):
        places.append((_cache_folder(), _nvcc() if target == "cuda" else _compiler()))
    for folder, compiler in places:
        end = _name(target, compiler).removeprefix(f"seqlib_{target}")
        for library in sorted(folder.glob(f"seqlib_{target}*{end}")):
            if set(arch) <= set(library.stem.split("-")):
                return library
    return None


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SEQLIB_CACHE") or Path(base) / "seqlib")


def _compiler_name() -> str:
    known = os.environ.get("CXX")
    return known or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), "c++")


@functools.cache
def _compiler() -> str:
    path = shutil.which(_compiler_name())
    if path is None:
        raise NativeUnavailable(
            f"no C++ compiler ({_compiler_name()} not found); install g++ or clang++, or set CXX, for the fast kernels"
        )
    return path


@functools.cache
def _nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    for name in filter(None, (os.environ.get("CUDACXX"), "nvcc", f"{home}/bin/nvcc")):
        if path := shutil.which(name):
            return path
    raise NativeUnavailable(
        "no nvcc on the path, in CUDA_HOME or in CUDACXX; install the CUDA toolkit for the GPU kernels"
    )


@functools.cache
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def compiler_version() -> str:
    """One line that names the compiler in use."""
    return _compiler_version(_compiler()).splitlines()[0]


def _manifest() -> dict:
    return tomllib.loads((sources() / "manifest.toml").read_text())


def _units(target: str, arch: Sequence[str] = ()) -> Iterator[Unit]:
    """Every translation unit: bindings once, CPU kernels once per instruction set of this machine's kind."""
    manifest, root = _manifest()[_FOLDER[target]], sources()
    host = manifest["flags"]
    if target == "emulated":
        for name in ("bindings.cpp", *manifest["sources"], *manifest["kernels"]):
            yield Unit(root / name, "c++", [*host, *manifest["emulated_flags"]])
        return
    for name in manifest["sources"]:
        yield Unit(root / name, "c++", host)
    if target == "cuda":
        code = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in arch]
        for name in manifest["kernels"]:
            yield Unit(root / name, "nvcc", [*manifest["nvcc_flags"], *code])
        return
    for isa, machines in manifest["isa"].items():
        if platform.machine() in machines["machines"] or "any" in machines["machines"]:
            for name in machines.get("kernels", manifest["kernels"]):
                yield Unit(root / name, "c++", [*host, f"-DSEQLIB_ISA={isa}", *machines["flags"]])


def _digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
        h.update(b"\0")
    return h.hexdigest()[:16]


def _header_digest(target: str) -> str:
    folders = (sources() / "include", sources() / _FOLDER[target])
    return _digest(*(p.read_bytes() for f in folders for p in sorted(f.iterdir()) if p.suffix in (".h", ".cuh")))


def _name(target: str, compiler: str = "", arch: Sequence[str] = ()) -> str:
    """File name that changes with the sources, the flags, the ABI and, where given, the compiler; and names `arch`."""
    parts: list[str | bytes] = [_ABI, platform.machine(), _header_digest(target)]
    for unit in _units(target):
        parts += [unit.source.read_bytes(), *unit.flags]
    if compiler:
        parts.append(_compiler_version(compiler))
    return "-".join([f"seqlib_{target}", *arch, _digest(*parts)]) + ".so"


def object_file(target: str, unit: Unit, folder: Path) -> Path:
    """Where the object of a unit is kept; what nvcc says about its registers stands beside it in a .log."""
    version = _compiler_version(_nvcc() if unit.compiler == "nvcc" else _compiler())
    key = _digest(unit.source.read_bytes(), _header_digest(target), _ABI, version, *unit.flags)
    return folder / "objects" / f"{unit.source.stem}-{key}.o"


def _compile(target: str, compiler: str, library: Path, arch: Sequence[str]) -> None:
    torch_root = Path(torch.__file__).parent
    include = [f"-I{sources() / 'include'}", f"-I{sources() / _FOLDER[target]}"]
    with_torch = [f"-isystem{torch_root / 'include'}", f"-DTORCH_TARGET_VERSION={_ABI}"]
    with_torch.append(f"-ffile-prefix-map={sources()}=kernels")  # what errors say of their origin
    (library.parent / "objects").mkdir(exist_ok=True)

    def compile_unit(unit: Unit) -> Path:
        made = object_file(target, unit, library.parent)
        if not made.exists():
            tool = [_nvcc()] if unit.compiler == "nvcc" else [_compiler(), *with_torch]
            with _aside(made) as temporary:
                said = _run([*tool, *unit.flags, *include, "-c", str(unit.source), "-o", str(temporary)])
                made.with_suffix(".log").write_text(said)
        return made

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = list(pool.map(compile_unit, _units(target, arch)))
    with _aside(library) as temporary:
        link = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        if target == "cuda" and (torch_root / "lib" / "libtorch_cuda.so").exists():
            link.append("-ltorch_cuda")
        _run([compiler, "-shared", "-o", str(temporary), *map(str, made), *link])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise NativeUnavailable(f"{Path(command[0]).name} failed on {Path(command[-3]).name}:\n{tail}")
    return done.stderr


@contextlib.contextmanager
def _aside(final: Path) -> Iterator[Path]:
    """A temporary name in the same folder, renamed into place only when the block succeeds."""
    handle, name = tempfile.mkstemp(dir=final.parent, suffix=final.suffix)
    os.close(handle)
    try:
        yield Path(name)
        os.replace(name, final)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl

    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"seqlib: another process is compiling (it holds {path}), waiting ...", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seqlib.native", description="the compiled kernels of this machine")
    parser.add_argument("command", choices=("status", "build"), nargs="?", default="status")
    parser.add_argument("--target", default="cpu", choices=TARGETS)
    parser.add_argument("--arch", help="CUDA architectures, such as sm_80,sm_90; those of this machine if not given")
    options = parser.parse_args()
    arch = tuple(options.arch.split(",")) if options.arch else ()
    if arch and options.target != "cuda":
        parser.error("--arch goes with --target cuda")
    if options.command == "build":
        try:
            library = build(options.target, _PREBUILT, arch)
        except NativeUnavailable as error:
            sys.exit(str(error))
        wanted = library.with_name(
            _name(options.target, "", arch or (device_arch() if options.target == "cuda" else ()))
        )
        os.replace(library, wanted)
        print(wanted)
        if arch:
            return  # perhaps for another machine
    reason = why_unavailable(options.target)
    print(f"{options.target}: {reason or load(options.target)}")
    if reason:
        sys.exit(1)
    if options.target == "cpu":
        print(f"instruction set: {torch.ops.seqlib.isa(None)}")


if __name__ == "__main__":
    _main()

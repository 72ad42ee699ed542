"""Find, build and load the compiled kernels.

Nothing is compiled at import. The first op that wants the native library gets, in this order: the library that
`python -m seqlib.native build` put into the package, the one in the user's cache, or a build into that cache. A failure
is remembered as one sentence, and ops then run their torch form and say so.

Environment: SEQLIB_JIT=0 forbids building on first use; SEQLIB_CACHE moves the cache (default: seqlib in
XDG_CACHE_HOME or ~/.cache); CXX names the compiler (default: c++, g++ or clang++).
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from seqlib.errors import NativeUnavailable

__all__ = ["build", "compiler_version", "load", "sources", "why_unavailable"]

_PACKAGE = Path(__file__).resolve().parent
_PREBUILT = _PACKAGE / "_lib"  # where `python -m seqlib.native build` puts a library
_ABI = "0x020a000000000000"  # LibTorch stable ABI of torch 2.10, the oldest we support


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
    library = _find(target)
    if library is None:
        if os.environ.get("SEQLIB_JIT", "1") == "0":
            raise NativeUnavailable(
                f"no built {target} library and SEQLIB_JIT=0 forbids building; run `python -m seqlib.native build`"
            )
        library = build(target, _cache_folder())
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


def build(target: str, folder: Path) -> Path:
    """Compile the library of `target` into `folder`; other processes that want it wait for this one."""
    compiler = _compiler()
    library = folder / _name(target, compiler)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{target}.lock"):
            if not library.exists():
                print(f"seqlib: compiling the {target} kernels into {folder} (once) ...", file=sys.stderr, flush=True)
                _compile(target, compiler, library)
    except OSError as error:
        raise NativeUnavailable(
            f"cannot write the compiled kernels to {folder}: {error}; set SEQLIB_CACHE to a writable folder"
        ) from error
    return library


def _find(target: str) -> Path | None:
    prebuilt = _PREBUILT / _name(target)
    if prebuilt.exists():
        return prebuilt
    if shutil.which(_compiler_name()):
        cached = _cache_folder() / _name(target, _compiler())
        if cached.exists():
            return cached
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
def _compiler_version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def compiler_version() -> str:
    """One line that names the compiler in use."""
    return _compiler_version(_compiler()).splitlines()[0]


def _manifest() -> dict:
    return tomllib.loads((sources() / "manifest.toml").read_text())


def _units(target: str) -> Iterator[tuple[Path, list[str]]]:
    """Every translation unit with its flags: bindings once, kernels once per instruction set of this machine's kind."""
    manifest, root = _manifest(), sources()
    common = manifest[target]["flags"]
    for name in manifest[target]["sources"]:
        yield root / name, common
    for isa, machines in manifest[target]["isa"].items():
        if platform.machine() in machines["machines"] or "any" in machines["machines"]:
            for name in machines.get("kernels", manifest[target]["kernels"]):
                yield root / name, [*common, f"-DSEQLIB_ISA={isa}", *machines["flags"]]


def _digest(*parts: str | bytes) -> str:
    h = hashlib.sha256()
    for part in parts:
        h.update(part.encode() if isinstance(part, str) else part)
        h.update(b"\0")
    return h.hexdigest()[:16]


def _header_digest() -> str:
    return _digest(*(p.read_bytes() for p in sorted(sources().rglob("*.h"))))


def _name(target: str, compiler: str = "") -> str:
    """File name that changes with the sources, the flags, the ABI and, where given, the compiler."""
    parts: list[str | bytes] = [_ABI, platform.machine(), _header_digest()]
    for unit, flags in _units(target):
        parts += [unit.read_bytes(), *flags]
    if compiler:
        parts.append(_compiler_version(compiler))
    return f"seqlib_{target}-{_digest(*parts)}.so"


def _compile(target: str, compiler: str, library: Path) -> None:
    torch_root = Path(torch.__file__).parent
    include = [f"-I{sources() / 'include'}", f"-I{sources() / target}", f"-isystem{torch_root / 'include'}"]
    abi = f"-DTORCH_TARGET_VERSION={_ABI}"
    headers = _header_digest()

    objects = library.parent / "objects"
    objects.mkdir(exist_ok=True)

    def compile_unit(unit: tuple[Path, list[str]]) -> Path:
        source, flags = unit
        key = _digest(source.read_bytes(), headers, _ABI, _compiler_version(compiler), *flags)
        made = objects / f"{source.stem}-{key}.o"
        if not made.exists():
            with _aside(made) as temporary:
                _run([compiler, *flags, abi, *include, "-c", str(source), "-o", str(temporary)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(compile_unit, _units(target)))
    with _aside(library) as temporary:
        link = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        _run([compiler, "-shared", "-o", str(temporary), *map(str, made), *link])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise NativeUnavailable(f"{Path(command[0]).name} failed on {Path(command[-3]).name}:\n{tail}")


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
    parser.add_argument("--target", default="cpu", choices=("cpu",))
    options = parser.parse_args()
    if options.command == "build":
        library = build(options.target, _PREBUILT)
        wanted = library.with_name(_name(options.target))
        os.replace(library, wanted)
        print(wanted)
    reason = why_unavailable(options.target)
    print(f"{options.target}: {reason or load(options.target)}")
    if reason:
        sys.exit(1)
    print(f"instruction set: {torch.ops.seqlib.isa(None)}")


if __name__ == "__main__":
    _main()

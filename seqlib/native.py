"""Find, build and load the compiled kernels.

Nothing is compiled at import. The first op that wants the native library gets, in this order: the library that
`python -m seqlib.native build` put into the package, the one in the user's cache, or a build into that cache. A failure
is remembered as one sentence, and ops then run their torch form and say so.

Targets: "cpu", whose loops are compiled once per instruction set: the first use compiles the set of this machine,
`python -m seqlib.native build` all of them; "cuda", built by nvcc for the devices of this machine; and "emulated", the
CUDA kernels compiled for the host under names of their own (`torch.ops.seqlib_emulated`), which the tests run. The name
of a library says which sets or devices it serves. It is taken only where those of the machine are among them, so
machines of different kinds can share a cache.

Environment: SEQLIB_JIT=0 forbids building on first use; SEQLIB_ISA=all asks for a library with every instruction set,
as the tests do; SEQLIB_CACHE moves the cache (default: seqlib in XDG_CACHE_HOME or ~/.cache); CXX names the compiler
(default: c++, g++ or clang++) and CUDACXX that for CUDA (default: nvcc on the path, in CUDA_HOME, in /usr/local/cuda).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import platform
import secrets
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch

from seqlib import cpu
from seqlib.errors import NativeUnavailable

__all__ = [
    "TARGETS",
    "build",
    "compiler_version",
    "device_arch",
    "instruction_sets",
    "load",
    "object_file",
    "sources",
    "wheel",
    "why_unavailable",
]

_PACKAGE = Path(__file__).resolve().parent
_PREBUILT = _PACKAGE / "_lib"  # where `python -m seqlib.native build` puts a library
_ABI = "0x020a000000000000"  # LibTorch stable ABI of torch 2.10, the oldest we support
_FOLDER = {"cpu": "cpu", "cuda": "cuda", "emulated": "cuda"}
TARGETS = tuple(_FOLDER)


class Unit(NamedTuple):
    """A source, the compiler that takes it, and its flags."""

    source: Path
    compiler: str
    flags: tuple[str, ...]
    prefix: str = ""
    """A header that all units with these flags start with; parsed once for all of them."""


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
    arch = _wanted(target)
    if target == "cuda":
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


def instruction_sets(*, all_sets: bool = False) -> tuple[str, ...]:
    """The sets of loops that this machine runs, the best first; with `all_sets`, those of every machine of its kind."""
    kind = platform.machine()
    known = {
        name: options
        for name, options in _manifest()["cpu"]["isa"].items()
        if kind in options["machines"] or "any" in options["machines"]
    }
    features = cpu.features()
    if all_sets or features is None:
        return tuple(known)
    best = next((name for name, options in known.items() if features >= set(options["features"])), None)
    return () if best is None else (best, *known[best].get("beside", ()))


def _wanted(target: str) -> tuple[str, ...]:
    """What a library must serve to be taken here."""
    if target == "cuda":
        return device_arch()
    if target == "emulated":
        return ()
    which = os.environ.get("SEQLIB_ISA", "")
    if which not in ("", "all"):
        raise NativeUnavailable(f'SEQLIB_ISA must be "all" or not set, got {which!r}')
    return instruction_sets(all_sets=which == "all")


def build(target: str, folder: Path, arch: Sequence[str] = ()) -> Path:
    """Compile the library of `target` into `folder`; other processes that want it wait for this one.

    Args:
        arch: the instruction sets, or for "cuda" the devices, that it is built for; () for what this machine wants.
    """
    compiler = _nvcc() if target == "cuda" else _compiler()
    arch = tuple(arch) or _wanted(target)
    library = folder / _name(target, compiler, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f"{target}.lock"):
            if not library.exists():
                what = f"the {target} kernels" + (f" for {', '.join(arch)}" if arch else "")
                print(f"seqlib: compiling {what} into {folder} (once) ...", file=sys.stderr, flush=True)
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
    """Every translation unit: bindings once, CPU kernels once for each instruction set of `arch`, () being all."""
    manifest, root = _manifest()[_FOLDER[target]], sources()
    common = manifest["flags"]
    if target == "emulated":
        for name in ("bindings.cpp", *manifest["sources"], *manifest["kernels"]):
            yield Unit(root / name, "c++", (*common, *manifest["emulated_flags"]))
        return
    host = (*common, *manifest["source_flags"])
    for name in manifest["sources"]:
        yield Unit(root / name, "c++", host, manifest.get("source_prefix", ""))
    if target == "cuda":
        code = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in arch]
        for name in manifest["kernels"]:
            yield Unit(root / name, "nvcc", (*manifest["nvcc_flags"], *code))
        return
    for isa in arch or instruction_sets(all_sets=True):
        options = manifest["isa"][isa]
        flags = (*common, *manifest["kernel_flags"], f"-DSEQLIB_ISA={isa}", *options["flags"])
        for name in options.get("kernels", manifest["kernels"]):
            yield Unit(root / name, "c++", flags, manifest["kernel_prefix"])


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
    objects = library.parent / "objects"
    objects.mkdir(exist_ok=True)
    made = {unit: object_file(target, unit, library.parent) for unit in _units(target, arch)}
    missing = sorted((u for u in made if not made[u].exists()), key=lambda u: u.source.stat().st_size, reverse=True)
    uses = Counter((unit.prefix, unit.flags) for unit in missing if unit.prefix)
    headers: dict[tuple[str, ...], list[str]] = {}

    def command(unit: Unit) -> list[str]:
        tool = [_nvcc()] if unit.compiler == "nvcc" else [_compiler(), *with_torch]
        return [*tool, *unit.flags, *include, *headers.get(unit.flags, ())]

    def precompile(unit: Unit, header: Path) -> None:
        # Saves time and nothing else: without the result compilers read the header, and say what is wrong with it.
        header.write_text(f'#include "{unit.prefix}"\n')
        with contextlib.suppress(NativeUnavailable):
            _run([*command(unit), "-x", "c++-header", "-c", str(header), "-o", f"{header}.gch"])

    def compile_unit(unit: Unit) -> None:
        with _aside(made[unit]) as temporary:
            said = _run([*command(unit), "-c", str(unit.source), "-o", str(temporary)])
            made[unit].with_suffix(".log").write_text(said)

    with (
        tempfile.TemporaryDirectory(dir=objects) as aside,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
        _progress(len(missing)) as progress,
    ):
        shared = [Unit(Path(), "c++", flags, prefix) for (prefix, flags), count in uses.items() if count > 2]
        ready = [Path(aside) / f"{i}.h" for i in range(len(shared))]
        list(pool.map(precompile, shared, ready))
        headers |= {unit.flags: ["-include", str(header)] for unit, header in zip(shared, ready)}
        jobs = [pool.submit(compile_unit, unit) for unit in missing]
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                job.result()
                progress(done)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nobody waits for the rest
    with _aside(library) as temporary:
        link = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        if target == "cuda" and (torch_root / "lib" / "libtorch_cuda.so").exists():
            link.append("-ltorch_cuda")
        _run([compiler, "-shared", "-o", str(temporary), *map(str, made.values()), *link])


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Tells on stderr how many of `total` are done: in one line of a terminal, elsewhere in a line every 5 seconds."""
    begun = last = time.monotonic()
    terminal = sys.stderr.isatty()

    def tell(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if terminal or done == total or now - last >= 5:
            last = now
            line = f"seqlib: {done} of {total} files compiled, {now - begun:.0f} s"
            print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    if terminal and total:
        tell(0)
    try:
        yield tell
    finally:
        if terminal and total:
            print(file=sys.stderr)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-8:])
        raise NativeUnavailable(f"{Path(command[0]).name} failed on {Path(command[-3]).name}:\n{tail}")
    return done.stderr


@contextlib.contextmanager
def _aside(final: Path) -> Iterator[Path]:
    """A name in the same folder, not made yet so that it gets the usual mode, and moved into place on success."""
    temporary = final.with_name(f"{secrets.token_hex(8)}{final.suffix}")
    try:
        yield temporary
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)


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


def _install(target: str, arch: Sequence[str]) -> Path:
    """Build a library in the cache and put it into the package, in place of what older sources left there."""
    built = build(target, _cache_folder(), arch)
    library = _PREBUILT / _name(target, "", arch)
    _PREBUILT.mkdir(exist_ok=True)
    digest = library.stem.rpartition("-")[2]
    for old in _PREBUILT.glob(f"seqlib_{target}-*.so"):
        if not old.stem.endswith(digest):
            old.unlink()
    with _aside(library) as temporary:
        shutil.copyfile(built, temporary)
    return library


def wheel(folder: Path, *, isolated: bool = True) -> Path:
    """Make a wheel of this checkout that needs no compiler: it holds a CPU library with every instruction set.

    The libraries know torch's stable ABI but no Python, so the wheel is tagged for this platform and any Python 3.

    Args:
        folder: where to put it.
        isolated: fetch setuptools as pip does; otherwise that of this environment is taken.

    Raises:
        NativeUnavailable: this is no checkout, or a compiler, pip or setuptools says no.
    """
    root = _PACKAGE.parent
    if not (root / "pyproject.toml").is_file():
        raise NativeUnavailable(f"a wheel is made of a checkout, and {root} is none; clone the repository")
    _install("cpu", instruction_sets(all_sets=True))
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        # A build folder of its own: what an earlier one left in build/ would be shipped too.
        options = (f"--plat-name={sysconfig.get_platform()}", "build", f"--build-base={aside}")
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", aside]
        pip += [f"--config-settings=--build-option={option}" for option in options]
        done = subprocess.run(
            [*pip, *([] if isolated else ["--no-build-isolation"]), str(root)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        made = list(Path(aside).glob("*.whl"))
        if done.returncode or len(made) != 1:
            raise NativeUnavailable(f"pip made no wheel of {root}:\n{done.stderr.strip() or made}")
        return made[0].replace(folder / made[0].name)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seqlib.native", description="the compiled kernels of this machine")
    parser.add_argument(
        "command", choices=("status", "build", "wheel"), nargs="?", default="status",
        help="status: which library runs here; build: compile one into the package; wheel: ship it",
    )  # fmt: skip
    parser.add_argument("--target", default="cpu", choices=TARGETS)
    parser.add_argument(
        "--arch",
        help="what to build for: instruction sets, such as avx2,portable (default: all), or with --target cuda "
        "devices, such as sm_80,sm_90 (default: those of this machine)",
    )
    parser.add_argument("--output", type=Path, default=Path("dist"), help="folder of the wheel (default: dist)")
    parser.add_argument(
        "--no-build-isolation", action="store_true", help="make the wheel with the setuptools of this environment"
    )
    options = parser.parse_args()
    arch = tuple(options.arch.split(",")) if options.arch else ()
    known = instruction_sets(all_sets=True)
    if arch and options.target == "emulated":
        parser.error("--arch goes with --target cpu or cuda")
    if options.target == "cpu" and (unknown := [name for name in arch if name not in known]):
        parser.error(f"unknown instruction set {unknown[0]!r}; this kind of machine has {', '.join(known)}")
    if options.command == "wheel" and (arch or options.target != "cpu"):
        parser.error("a wheel holds a cpu library with every instruction set; leave --target and --arch out")
    try:
        if options.command == "wheel":
            print(wheel(options.output, isolated=not options.no_build_isolation))
            return
        if options.command == "build":
            default = known if options.target == "cpu" else _wanted(options.target)
            print(_install(options.target, arch or default))
            if arch:
                return  # perhaps for another machine
    except (NativeUnavailable, OSError) as error:
        sys.exit(str(error))
    reason = why_unavailable(options.target)
    print(f"{options.target}: {reason or load(options.target)}")
    if reason:
        sys.exit(1)
    if options.target == "cpu":
        print(f"instruction set: {torch.ops.seqlib.isa(None)}")


if __name__ == "__main__":
    _main()

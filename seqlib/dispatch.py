"""Which implementation of an op runs, and why.

Every op folder holds one literal table of `Impl` rows. `resolve` walks it in order and takes the first row that is not
refused; every refusal is a sentence. `explain` and `python -m seqlib.dispatch` print the table for a call or a machine.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

import torch

from seqlib.context import counted, transformed, transforms
from seqlib.errors import BackendUnavailable

__all__ = [
    "BACKENDS",
    "FORMS",
    "OPEN",
    "TRANSFORMED",
    "Choice",
    "Facts",
    "Impl",
    "Op",
    "Verdict",
    "explain",
    "mode",
    "preferred",
    "remembered",
    "resolve",
    "threads_are_given",
    "use_backend",
    "used",
]

T = TypeVar("T")
TRANSFORMED = "derivatives by torch.func or forward mode"
"""A feature that `Op.choose` finds by itself; rows of plain torch operations have it, unless they refuse it."""
OPEN = "a length that an exported program leaves open"
"""A feature that `Op.choose` finds by itself."""
BACKENDS = ("reference", "torch", "native", "triton", "vendor")
FORMS = ("reference", "chunked", "parallel", "recurrent")


class Facts(NamedTuple):
    """The static facts of one call. Nothing here depends on values: a choice holds for every call that looks alike."""

    device: str
    dtype: torch.dtype
    seqlen: int
    needs_grad: bool = False
    features: frozenset[str] = frozenset()
    """Options in use that not every row supports: "packed", "padded", "initial_state", ..."""
    sizes: tuple[tuple[str, int], ...] = ()
    """Sizes that limits look at, by glossary name."""

    def size(self, name: str) -> int:
        return dict(self.sizes)[name]


@dataclass(frozen=True)
class Impl:
    """One row of an op's table.

    Args:
        name: backend, one of BACKENDS.
        form: one of FORMS.
        target: "module:function", imported when first chosen.
        devices: device types it runs on; empty means any.
        dtypes: input dtypes; empty means any.
        needs: what must be present: "native" (the compiled CPU library), "native:cuda" (that of the GPU) or a package
            requirement such as "triton>=3.6".
        limits: further check, returns a sentence when the row cannot take the call.
        grad: whether it is differentiable.
        refuses: features it does not support.
        by_name_only: never chosen by auto.
        auto_limits: as `limits`, for a row that takes the call but is the slower one; a form asked for by name runs.
        gate: "module:function" from facts to a Verdict, asked last: whether results on this very device are right.
        loops: walks the positions in Python. On a GPU, where that costs launches, auto says that it had to.
    """

    name: str
    form: str
    target: str
    devices: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    needs: tuple[str, ...] = ()
    limits: Callable[[Facts], str | None] | None = None
    grad: bool = True
    refuses: frozenset[str] = frozenset()
    by_name_only: bool = False
    auto_limits: Callable[[Facts], str | None] | None = None
    gate: str = ""
    loops: bool = False


class Verdict(NamedTuple):
    """What a gate says: why the row must not run, if so, and in a few words what runs."""

    refusal: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Op:
    """An op: its folder's name, its table, how to read the facts off a call, and the name of its public function.

    Args:
        parts: the ops that a fused op is made of. Its "torch" row calls them one by one, so it is the row for whoever
            asked for a backend of a part, or for a backend that no row of this table has.
        writes: arguments that the op writes into.
    """

    name: str
    impls: tuple[Impl, ...]
    facts: Callable[..., Facts]
    function: str
    parts: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()

    def choose(self, facts: Facts, form: str = "auto", backend: str = "auto") -> Callable[..., Any]:
        """The function that runs for these facts; remembered, because decoding asks the same at every step."""
        backend = preferred(self.name, backend)
        if torch.compiler.is_exporting():
            if isinstance(facts.seqlen, torch.SymInt):
                facts = facts._replace(features=facts.features | {OPEN})
            sizes = tuple((name, counted(size)) for name, size in facts.sizes)
            facts = facts._replace(seqlen=counted(facts.seqlen), sizes=sizes)
        if torch.compiler.is_compiling():
            return _load(resolve(self, facts, form, backend).impl.target)
        if transformed():
            facts = facts._replace(features=facts.features | {TRANSFORMED})
        asked = tuple(preferred(part) for part in self.parts)
        return remembered(
            (self.name, self.function, facts, form, backend, asked),
            lambda: _load(resolve(self, facts, form, backend).impl.target),
        )

    def recall(
        self,
        backend: str,
        tensors: Sequence[torch.Tensor | None],
        choose: Callable[[], Callable[..., Any]],
        options: Hashable = None,
    ) -> Callable[..., Any]:
        """What `choose` returns, called once for each set of shapes, dtypes and devices of `tensors`, and of `options`.

        Decoding asks the same at every token. `choose` may look at nothing else, and raises for what does not fit. For
        calls without gradients.
        """
        if torch.compiler.is_compiling():
            return choose()
        layout = [None if t is None else (t.shape, t.dtype, t.device) for t in tensors]
        return remembered((self.name, self.function, preferred(self.name, backend), options, *layout), choose)

    def bind(self, facts: Facts, form: str = "auto", backend: str = "auto") -> Callable[..., Any]:
        """As `choose` for a fused op; where `backend` leads to its parts, they run in that backend, too."""
        backend = preferred(self.name, backend)
        run = self.choose(facts, form, backend)
        if backend == "auto" or (backend != "torch" and self.has(backend)):
            return run

        pinned = {part: backend for part in self.parts if _op(part).has(backend)}

        def in_parts(*args: Any) -> Any:
            with use_backend(**pinned):
                return run(*args)

        return in_parts

    def has(self, backend: str) -> bool:
        """Whether a row of the table is of this backend."""
        return any(impl.name == backend for impl in self.impls)


class Refusal(NamedTuple):
    impl: Impl
    reason: str
    broken: bool
    """True when the row would fit but something is missing or failed; False when it simply does not apply."""


@dataclass(frozen=True)
class Choice:
    impl: Impl
    refused: tuple[Refusal, ...] = field(default=())


_scope: ContextVar[Mapping[str, str] | None] = ContextVar("seqlib_backend", default=None)
_loaded: dict[str, Callable[..., Any]] = {}
_traced = SimpleNamespace()  # the same for compilers, which do not see what is added to a dict while they trace
_probed: dict[str, str | None] = {}
_warned: set[str] = set()
_choices: dict[Hashable, Any] = {}


@contextlib.contextmanager
def use_backend(name: str | None = None, **per_op: str) -> Iterator[None]:
    """Choose a backend for every op called inside the block, or for single ops by keyword.

    An explicit `backend=` argument wins over this, this wins over a mixer's config, and that over the environment
    variable SEQLIB_BACKEND. A named backend is never replaced: where it cannot run, BackendUnavailable says why.

    >>> with use_backend("reference"):
    ...     pass
    >>> with use_backend(selective_scan="torch"):
    ...     pass
    """
    unknown = sorted(per_op.keys() - set(op_names())) if per_op else []
    if unknown:
        raise BackendUnavailable(f"unknown op {', '.join(unknown)}; known: {', '.join(op_names())}")
    chosen = dict(_scope.get() or {})
    if name is not None:
        chosen = {"*": _known(name)}
    chosen.update({op: _known(backend) for op, backend in per_op.items()})
    token = _scope.set(chosen)
    try:
        yield
    finally:
        _scope.reset(token)


def preferred(op_name: str, backend: str = "auto", config: str = "auto") -> str:
    """The backend in force: argument, then scope, then config, then SEQLIB_BACKEND, then auto."""
    if backend != "auto":
        return backend
    scoped = _scoped(op_name)
    if scoped != "auto":
        return scoped
    return config if config != "auto" else os.environ.get("SEQLIB_BACKEND", "auto")


def threads_are_given() -> bool:
    """Whether the environment says how many threads to use, so that nothing may choose another number."""
    return bool(os.environ.get("OMP_NUM_THREADS"))


def remembered(key: Hashable, choose: Callable[[], T]) -> T:
    """What `choose` returned for this key, which holds everything that it looks at."""
    found = _choices.get(key)
    if found is None:
        if len(_choices) > 4096:
            _choices.clear()
        found = _choices[key] = choose()
    return found


def mode(device: str) -> tuple[Any, ...]:
    """What else than its arguments decides which row a call gets; equal for calls that may share a choice."""
    return device, _scope.get(), os.environ.get("SEQLIB_BACKEND"), torch.is_autocast_enabled(device), transforms()


@torch.compiler.assume_constant_result  # compilers cannot trace a ContextVar; the scope at trace time holds
def _scoped(op_name: str) -> str:
    scope = _scope.get()
    return "auto" if scope is None else scope.get(op_name, scope.get("*", "auto"))


def resolve(op: Op, facts: Facts, form: str = "auto", backend: str = "auto") -> Choice:
    """The first row of the op's table that takes these facts, with a reason for each row passed over.

    Raises:
        BackendUnavailable: no row is left; the message lists every reason and what to do.
    """
    backend = _known(preferred(op.name, backend))
    if op.parts and backend != "auto" and not op.has(backend):
        backend = "torch"  # its parts may have such a row
    if form != "auto" and form not in FORMS:
        raise BackendUnavailable(f"unknown form {form!r}; known: auto, {', '.join(FORMS)}")
    refused: list[Refusal] = []
    for impl in op.impls:
        refusal = _refuse(impl, facts, form, backend) or _refuse_for_parts(op, impl, backend)
        if refusal is None:
            if backend == "auto":
                _announce(op, impl, refused, facts)
            return Choice(impl, tuple(refused))
        refused.append(refusal)
    asked = f"form={form!r}, backend={backend!r}"
    reasons = "\n".join(f"  {r.impl.name}/{r.impl.form}: {r.reason}" for r in refused)
    raise BackendUnavailable(f"{op.name}: no implementation for {asked} on this call:\n{reasons}")


def explain(op_name: str, *tensors: Any, form: str = "auto", backend: str = "auto", **options: Any) -> str:
    """Print and return the table of an op for a given call: what runs, what was passed over, and why.

    >>> print(explain("norm", torch.ones(1, 4, 8), torch.ones(8)).splitlines()[0])
    norm: (1, 4, 8) float32 on cpu
    """
    op = _op(op_name)
    facts = op.facts(*tensors, **options)
    try:
        choice: Choice | None = resolve(op, facts, form, backend)
        error = ""
    except BackendUnavailable as e:
        choice, error = None, str(e)
    shape = next((tuple(t.shape) for t in tensors if isinstance(t, torch.Tensor)), ())
    lines = [f"{op.name}: {shape} {str(facts.dtype).removeprefix('torch.')} on {facts.device}"]
    reasons = {id(r.impl): r.reason for r in choice.refused} if choice else {}
    for impl in op.impls:
        if choice and impl is choice.impl:
            note = f"runs, loops for {torch.ops.seqlib.isa(None)}" if "native" in impl.needs else "runs"
            note += f" {_load(impl.gate)(facts).note}" if impl.gate else ""
        elif id(impl) in reasons:
            note = f"refused: {reasons[id(impl)]}"
        else:
            note = "not reached" if choice else "refused"
        lines.append(f"  {impl.name:<10}{impl.form:<10} {note}")
    text = "\n".join(lines + ([error] if error else []))
    print(text)
    return text


def used() -> list[str]:
    """Every implementation that was chosen in this process so far, as "module:function"; runs write it down."""
    return sorted(_loaded)


def op_names() -> list[str]:
    """Every op folder of the library."""
    ops = importlib.util.find_spec("seqlib.ops")
    assert ops is not None and ops.submodule_search_locations
    root = ops.submodule_search_locations[0]
    return sorted(d.name for d in os.scandir(root) if os.path.isfile(os.path.join(d.path, "reference.py")))


def _op(name: str) -> Op:
    if name not in op_names():
        raise BackendUnavailable(f"unknown op {name!r}; known: {', '.join(op_names())}")
    return importlib.import_module(f"seqlib.ops.{name}").OP


def _known(backend: str) -> str:
    if backend != "auto" and backend not in BACKENDS:
        raise BackendUnavailable(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    return backend


def _refuse(impl: Impl, facts: Facts, form: str, backend: str) -> Refusal | None:
    def quiet(reason: str) -> Refusal:
        return Refusal(impl, reason, broken=False)

    if backend not in ("auto", impl.name):
        return quiet(f"backend={backend!r} was asked for")
    if form not in ("auto", impl.form):
        return quiet(f"form={form!r} was asked for")
    if backend == "auto" and form == "auto" and impl.by_name_only:
        return quiet("only runs when asked for by name")
    if impl.devices and facts.device not in impl.devices:
        return quiet(f"device is {facts.device}; it runs on {', '.join(impl.devices)}")
    if impl.dtypes and facts.dtype not in impl.dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in impl.dtypes)
        return quiet(f"dtype is {str(facts.dtype).removeprefix('torch.')}; it takes {known}")
    if facts.needs_grad and not impl.grad:
        return quiet("gradients are needed and this row has none")
    if TRANSFORMED in facts.features and impl.name not in ("torch", "reference"):
        return quiet("torch.func and forward mode see through plain torch operations only")
    missing = impl.refuses & facts.features
    if missing:
        return quiet(f"does not support {', '.join(sorted(missing))}")
    for limits in (impl.limits, impl.auto_limits if form == "auto" else None):
        reason = limits(facts) if limits else None
        if reason:
            return quiet(reason)
    for need in impl.needs:
        reason = _probe(need)
        if reason:
            return Refusal(impl, reason, broken=True)
    if impl.gate:
        reason = _judge(impl.gate, *facts)
        if reason:
            return Refusal(impl, reason, broken=True)
    return None


def _refuse_for_parts(op: Op, impl: Impl, backend: str) -> Refusal | None:
    """A row that stands for several ops gives way where another backend was asked for one of them."""
    if backend != "auto" or impl.name == "torch":
        return None
    for part in op.parts:
        asked = preferred(part)
        if asked not in ("auto", impl.name):
            return Refusal(impl, f"backend={asked!r} was asked for {part}, one of its parts", broken=False)
    return None


@torch.compiler.assume_constant_result  # a compiler tracing a model asks here once, at trace time
def _probe(need: str) -> str | None:
    """Why `need` is not there, None if it is. Asked once per process."""
    if need not in _probed:
        _probed[need] = _why_missing(need)
    return _probed[need]


@torch.compiler.assume_constant_result
def _judge(gate: str, *facts: Any) -> str | None:
    return _load(gate)(Facts(*facts)).refusal


def _why_missing(need: str) -> str | None:
    if need.partition(":")[0] == "native":
        from seqlib import native

        return native.why_unavailable(need.partition(":")[2] or "cpu")
    package, _, minimum = need.partition(">=")
    if importlib.util.find_spec(package) is None:
        return f"package {package} is not installed; pip install {package}"
    if minimum:
        version = importlib.metadata.version(package)
        if _numbers(version) < _numbers(minimum):
            return f"package {package} {version} is older than {minimum}; pip install -U {package}"
    return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+", maxsplit=1)[0].split(".") if part.isdigit())


def _announce(op: Op, chosen: Impl, refused: list[Refusal], facts: Facts) -> None:
    """Tell once that a better row would fit if it were not broken, or that a GPU is given a loop over positions.

    An error under SEQLIB_STRICT=1.
    """
    messages = {
        f"{op.name}:{r.impl.target}": f"{op.name} runs its slower {chosen.name} form because {r.impl.name} is "
        f"unavailable: {r.reason}"
        for r in refused
        if r.broken
    }
    if facts.device != "cpu" and facts.seqlen > 1 and (chosen.loops or chosen.form == "reference") and not messages:
        reasons = "; ".join(f"{r.impl.name}: {r.reason}" for r in refused)
        messages[f"{op.name}:{chosen.target}:{facts.device}"] = (
            f"{op.name} walks its {facts.seqlen} positions one by one on {facts.device}, which is slow ({reasons})"
        )
    for key, message in messages.items():
        if key in _warned:
            continue
        if os.environ.get("SEQLIB_STRICT") == "1":
            raise BackendUnavailable(message + " (SEQLIB_STRICT=1 makes this an error)")
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def _load(target: str) -> Callable[..., Any]:
    _import(target)
    return getattr(_traced, _attribute(target)) if torch.compiler.is_compiling() else _loaded[target]


def _attribute(target: str) -> str:
    return target.replace(".", "_").replace(":", "_")


@torch.compiler.assume_constant_result
def _import(target: str) -> None:
    if target not in _loaded:
        module, _, name = target.partition(":")
        _loaded[target] = getattr(importlib.import_module(module), name)
    setattr(_traced, _attribute(target), _loaded[target])


def _main() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("op", "backend", "form", "devices", "on this machine")
    devices = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    for name in op_names():
        for impl in _op(name).impls:
            if impl.devices and not devices & set(impl.devices):
                note = f"no {' or '.join(impl.devices)} device"
            else:
                note = next(filter(None, map(_probe, impl.needs)), "ready")
            table.add_row(name, impl.name, impl.form, ", ".join(impl.devices) or "any", note)
    Console().print(table)


if __name__ == "__main__":
    _main()

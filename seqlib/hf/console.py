"""What every command shares: one line for an error, a line on how to go on after Ctrl-C, silence of others."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from logging import CRITICAL, getLogger

from safetensors import SafetensorError

from seqlib.errors import SeqlibError

__all__ = ["interruptible", "quiet", "run"]

_NO_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "calculation overflowed",
    "multiplication overflow",
    "array is too big",
)


def quiet() -> None:
    """Leave out progress bars and warnings of other libraries, which say nothing about a run of ours."""
    from transformers.utils import logging

    getLogger("datasets.packaged_modules").setLevel(CRITICAL)  # which logs what it raises
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|torch|accelerate|datasets|huggingface_hub)\b.*")


@contextlib.contextmanager
def interruptible(remedy: str | Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C into a line that says how to go on, with a remedy that may depend on what is there then."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\ninterrupted; {remedy if isinstance(remedy, str) else remedy()}", file=sys.stderr)
        raise SystemExit(130) from None


def run(app: Callable[[], None]) -> None:
    """Run a command line; what the user can do something about is one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold anything
            stream.reconfigure(errors="backslashreplace")
    try:
        quiet()
        app()
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (SeqlibError, OSError, SafetensorError, MemoryError) as error:
        _stop(str(error) or "out of memory; take a smaller model, batch or data set")
    except UnicodeError as error:
        _stop(f"a name or text cannot be written in UTF-8 ({error})")
    except RecursionError:
        _stop("a file or value is nested too deeply to be one of ours")
    except RuntimeError as error:  # of torch, which has no class of its own for these
        if not any(part in str(error) for part in _NO_MEMORY):
            raise
        _stop(f"out of memory ({str(error).splitlines()[0]}); take a smaller model, batch or data set")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None


def _stop(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    raise SystemExit(2) from None

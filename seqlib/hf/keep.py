"""What keeps work: one process per folder, folders that are whole or not there, a full disk told in one line."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from seqlib.errors import ConfigError, SeqlibError

__all__ = ["LOCK", "disk_errors", "follow_umask", "locked", "whole_folder"]

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder and keep other processes out of it until the end.

    Raises:
        ConfigError: another process works there.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process works in {folder}; wait for it, or give another --output") from None
        yield


@contextlib.contextmanager
def whole_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """A folder to write into that becomes `folder` when it is whole, with the modes that the umask gives.

    Args:
        replace: take the place of one that is there; False: leave it, because its contents are the same.
    """
    aside = folder.with_name(f".{folder.name}.part-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed
    aside.mkdir(parents=True)
    try:
        yield aside
        follow_umask(aside)
        if replace and folder.exists():
            shutil.rmtree(folder)
        try:
            os.rename(aside, folder)
        except OSError:
            if replace or not folder.is_dir():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def follow_umask(folder: Path) -> None:
    """Give a folder and all in it the modes that plain writing gives; some libraries write for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what libraries raise when nothing more can be written into one sentence.

    Raises:
        SeqlibError: the disk is full, or a quota or limit is reached.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _cannot_write(error):
            raise
        raise SeqlibError(
            f"{folder} cannot be written: no space is left or a quota is reached. Earlier checkpoints are kept; make "
            "room and go on with --resume"
        ) from error


def _cannot_write(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # torch and safetensors name the cause in their text only
    told = ("PytorchStreamWriter failed", "inline_container.cc", "No space left", "File too large", "quota exceeded")
    return any(part in str(error) for part in told)

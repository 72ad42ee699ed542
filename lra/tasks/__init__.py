"""The tasks of Long Range Arena, by name."""

from __future__ import annotations

from seqlib.errors import ConfigError

from .base import Task, TaskData
from .image import Image
from .listops import ListOps
from .pathfinder import Pathfinder, Pathfinder256, PathX
from .retrieval import Retrieval
from .text import Text

__all__ = ["TASKS", "Task", "TaskData", "get_task"]

TASKS: dict[str, Task] = {
    task.name: task for task in (ListOps(), Text(), Retrieval(), Image(), Pathfinder(), PathX(), Pathfinder256())
}


def get_task(name: str) -> Task:
    """A task by name."""
    if name not in TASKS:
        raise ConfigError(f"unknown task {name!r}; known: {', '.join(TASKS)}")
    return TASKS[name]

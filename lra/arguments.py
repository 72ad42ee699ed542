"""Options that several commands take, and the refusal of those that would mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from seqlib.errors import ConfigError
from seqlib.hf.runs import for_folder

__all__ = [
    "AnySize", "Cache", "Data", "Generate", "JsonFile", "Processes", "Protocol", "Seed", "Settings", "for_folder",
    "for_output", "generated_with", "given", "refuse", "refuse_for_training",
]  # fmt: skip


def for_output(path: Path | None) -> Path | None:
    from seqlib.hf.runs import for_writing

    return for_writing(path)


JsonFile = Annotated[Path | None, typer.Option("--json", callback=for_output, help="Write the figures here.")]
Data = Annotated[Path | None, typer.Option(help="Folder or archive that holds the data of the task.")]
Generate = Annotated[bool, typer.Option("--generate", help="Make the examples here (listops, pathfinder).")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="key=value, changes an option or a field of the recipe.")
]
Protocol = Annotated[str, typer.Option(help="seqlib, lra, s4 or nys: how data is cut, split and read.")]
AnySize = Annotated[bool, typer.Option("--any-size", help="Accept other sizes and lengths than the published ones.")]
Cache = Annotated[Path | None, typer.Option(help="Folder of prepared data; default: the cache of `datasets`.")]
Processes = Annotated[int, typer.Option(min=1, help="Processes that generate images; at most one per core.")]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 32) - 1, help="Seed of generated data.")]


def given(context: typer.Context) -> dict[str, str]:
    """Names of the parameters that the command line gave, with how it calls them."""
    found = {}
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if source is not None and source.name == "COMMANDLINE":
            flag = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.opts[0].upper()
            found[str(parameter.name)] = flag
    return found


def refuse(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raise ConfigError where one of these parameters was given: an option that changes nothing is a mistake."""
    found = given(context)
    useless = [found[name] for name in names if name in found]
    if useless:
        raise ConfigError(f"{reason}; leave out {', '.join(useless)}")


def refuse_for_training(context: typer.Context, task: str, settings: Sequence[str], data: Path | None) -> None:
    """Raise ConfigError for options of `train` that would change nothing."""
    from .recall import RECALL

    named = [setting.partition("=")[0].strip() for setting in settings]
    if "seed" in named:
        raise ConfigError("--set seed= changes nothing: --seeds N trains with the seeds 0 to N - 1; leave it out")
    if task in RECALL:
        useless = ["data", "any_size", "cache", "protocol", "processes"]
        refuse(context, useless, f"the examples of {task} are made while it trains")
        if "protocol" in named:
            raise ConfigError(f"{task} knows no protocol; leave out --set protocol=")
    elif data is None:
        refuse(context, ["any_size"], "without --data there are no files whose sizes could be others")
    elif any(name.split(".")[0] == "data" for name in named):
        raise ConfigError(
            "--set data.NAME= changes generated examples, and --data names a folder; leave out one of them"
        )


def generated_with(settings: list[str] | None) -> dict[str, Any]:
    """Options of a generator from --set."""
    options = {}
    for setting in settings or []:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set takes NAME=VALUE, got {setting!r}")
        try:
            options[key.strip()] = json.loads(text)
        except ValueError:
            raise ConfigError(f"--set {key.strip()} takes a number, true or false here, got {text!r}") from None
    return options

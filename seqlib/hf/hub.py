"""Whether a name means something on the Hub, known in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from seqlib.errors import ConfigError

__all__ = ["check_name"]

_SECONDS = 2.0
_FILES = ("config.json", "tokenizer_config.json", "tokenizer.json")


def check_name(name: str, what: str, remedy: str, kind: str = "model") -> None:
    """Raise unless `name` is a path here, in the cache, or on the Hub, which is asked once and not for long.

    Libraries that load ask many times, for each file, before they give up.

    Args:
        what: is looked for, such as "model".
        remedy: what the user can do.
        kind: of repository: "model" or "dataset".

    Raises:
        ConfigError: there is none, or the Hub cannot be reached.
    """
    if Path(name).exists():
        return
    missing = f"no {what} {name!r} was found: no such file or folder here"
    try:
        if kind == "model" and any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES):
            return
        if constants.HF_HUB_OFFLINE:
            return  # what is cached is found by the library that loads it
        HfApi().repo_info(name, repo_type=kind, timeout=_SECONDS)
    except HFValidationError:
        raise ConfigError(f"{missing}, and the Hub has no such names; {remedy}") from None
    except GatedRepoError:
        raise ConfigError(f"{what} {name!r} needs permission on the Hub; log in with `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ConfigError(f"{missing}, and none of that name on the Hub; {remedy}") from None
    except (HfHubHTTPError, OSError, *_client_errors()) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"{missing}, and the Hub cannot be asked ({reason}); {remedy}") from None


def _client_errors() -> tuple[Any, ...]:
    """What the Hub's client raises without a connection: httpx's errors are no OSError."""
    try:
        from httpx import HTTPError
    except ImportError:  # older clients use requests, whose errors are OSError
        return ()
    return (HTTPError,)

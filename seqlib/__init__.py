"""Long-sequence modeling with state spaces, linear attention and hybrids, on fast kernels, inside Hugging Face."""

import importlib
from typing import TYPE_CHECKING, Any

from seqlib import _register

if TYPE_CHECKING:
    from seqlib.dispatch import explain, use_backend

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "accelerate_transformers",
    "explain",
    "export",
    "export_remote_code",
    "from_pretrained",
    "use_backend",
]

_register.install()

_ELSEWHERE = {
    "accelerate_transformers": "seqlib.hf.accelerate",
    "explain": "seqlib.dispatch",
    "export": "seqlib.hf.auto",
    "export_remote_code": "seqlib.hf.remote",
    "from_pretrained": "seqlib.hf.auto",
    "use_backend": "seqlib.dispatch",
}


def __getattr__(name: str) -> Any:
    # Rooms open when they are first asked for, so that `import seqlib` stays light and needs no transformers.
    if name in ("hf", "layers", "mixers", "models", "ops"):
        return importlib.import_module(f"seqlib.{name}")
    if name in _ELSEWHERE:
        return getattr(importlib.import_module(_ELSEWHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

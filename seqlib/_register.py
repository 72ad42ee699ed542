"""Makes `import seqlib` enough for AutoConfig and AutoModel, without importing transformers.

transformers has no plug-in discovery, so somebody must call `AutoConfig.register`. If transformers' auto classes are
already loaded that happens at once, else right after they are: a finder on `sys.meta_path` waits for that one module
and takes itself off. The model classes follow when a SeqlibConfig is first made (see hf/registration.py), because
importing them while transformers' own modules are half imported would close a circle.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Register SeqlibConfig with AutoConfig."""
    importlib.import_module("seqlib.hf.registration")


def install() -> None:
    """Register now or as soon as transformers' auto classes are imported."""
    if AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, AfterAutoConfig) for finder in sys.meta_path):
        sys.meta_path.insert(0, AfterAutoConfig())


class AfterAutoConfig(importlib.abc.MetaPathFinder):
    """Finds one module where Python would, and registers when it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != AUTO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_register(module: ModuleType) -> None:
                run(module)
                sys.meta_path.remove(self)
                register()

            spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec

"""Errors of the library. Each message says what was given, what is allowed and what to do."""

__all__ = [
    "BackendUnavailable",
    "CheckpointMismatch",
    "ConfigError",
    "CorpusError",
    "NativeUnavailable",
    "SeqlibError",
    "UnsupportedInput",
]


class SeqlibError(Exception):
    """Base of every error that seqlib raises on purpose."""


class UnsupportedInput(SeqlibError, ValueError):
    """Shapes, dtypes, devices or options that an op or a mixer does not accept."""


class ConfigError(SeqlibError, ValueError):
    """A model, mixer or recipe configuration that cannot describe a model."""


class BackendUnavailable(SeqlibError, RuntimeError):
    """A backend or form was asked for by name and cannot run here; the message lists every reason."""


class NativeUnavailable(SeqlibError, RuntimeError):
    """The compiled library could not be found, built or loaded."""


class CheckpointMismatch(SeqlibError, ValueError, RuntimeError):
    """Weights that do not fit the model they are loaded into (for which transformers raises RuntimeError), or NaN."""


class CorpusError(SeqlibError, ValueError):
    """Text that cannot be trained or evaluated on: missing, empty or binary."""

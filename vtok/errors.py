"""Errors of vtok. Each is also the built-in that a caller would expect, and its text says what to do."""


class VtokError(Exception):
    """Base of all errors that vtok raises on purpose."""


class InvalidValue(VtokError, ValueError):
    """A parameter or an input is outside its accepted range."""


class UnknownName(VtokError, LookupError):
    """No compressor, model family or bundled model has this name."""


class Unsupported(VtokError, TypeError):
    """This model, cache, mask or combination of stages cannot be compressed."""


class PatchStateError(VtokError, RuntimeError):
    """The model is in a state in which the call makes no sense (patched twice, compiled, nothing to report)."""


class NothingToReport(PatchStateError, AttributeError):
    """There is no trace yet. An `AttributeError`, so that `hasattr(patch, "trace")` is False."""


class MissingExtra(VtokError, ImportError):
    """An optional dependency is not installed; the text names the extra that brings it."""

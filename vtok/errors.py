"""Errors of vtok. Each is also the built-in that a caller would expect, and its text says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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


def meant(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'fastv'?", to be put behind a sentence on an unknown name; nothing where no name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""

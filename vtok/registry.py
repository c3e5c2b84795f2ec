"""Where classes are found by a name. Two classes of one name are an error, and not the later one's luck."""

from __future__ import annotations

import sys

from vtok.errors import InvalidValue


def register(registry: dict[str, type], name: str, cls: type) -> None:
    """Add a class. The same class, made anew from its file or in its notebook cell, takes its own place.

    Raises `InvalidValue`, which names both files, where another class has the name."""
    other = registry.get(name)
    if other is not None and _origin(other) != _origin(cls):
        (first, one), (second, two) = _origin(other), _origin(cls)
        raise InvalidValue(f"Two classes are named {name!r}: {one} in {first} and {two} in {second}. Rename one.")
    registry[name] = cls


def _origin(cls: type) -> tuple[str, str]:
    """(file, or module where there is no file, qualified name)"""
    module = sys.modules.get(cls.__module__)
    return getattr(module, "__file__", None) or cls.__module__, cls.__qualname__

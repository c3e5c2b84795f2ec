"""The choice of compressors as a file: what `Patch.save` writes, and every part of the suite takes.

{"vtok": "0.1.0", "compressors": [{"name": "fastv", "keep": 0.25, "layer": 2}]}, with the options that are not defaults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import vtok
from vtok.compressor import Compressor, build
from vtok.errors import InvalidValue


def describe(parts: Sequence[Compressor]) -> dict[str, Any]:
    """Compressors as plain values."""
    return {"vtok": vtok.__version__, "compressors": [{"name": part.name, **_changed(part)} for part in parts]}


def save(parts: Sequence[Compressor], file: str | PathLike[str]) -> None:
    """Write compressors as JSON."""
    Path(file).write_text(json.dumps(describe(parts), indent=1) + "\n", encoding="utf-8")


def load(config: str | PathLike[str] | Mapping[str, Any]) -> list[Compressor]:
    """The compressors of a file that `save` wrote, or of what is in it. Raises `InvalidValue` where it is none."""
    if not isinstance(config, Mapping):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidValue(f"{fspath(config)} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise InvalidValue(f"{fspath(config)} is no JSON file: {error}.") from error
    items = config.get("compressors") if isinstance(config, Mapping) else None
    if not isinstance(items, list) or not items or not all(isinstance(x, Mapping) and "name" in x for x in items):
        raise InvalidValue(
            'A config is {"compressors": [{"name": ..., options}]}, as Patch.save writes it; this one names none.'
        )
    return [build(**{key: tuple(v) if isinstance(v, list) else v for key, v in item.items()}) for item in items]


def _changed(part: Compressor) -> dict[str, Any]:
    """The options that are not at their defaults, as JSON has them."""
    values = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if f.init}
    defaults = {f.name: f.default for f in dataclasses.fields(part)}
    changed = {name: value for name, value in values.items() if value != defaults[name]}
    for name, value in changed.items():
        if isinstance(value, PathLike):
            changed[name] = fspath(value)
        elif not isinstance(value, str | int | float | bool | tuple | list | type(None)):
            raise InvalidValue(f"{part.name}'s {name} is a {type(value).__name__}, which no file holds: save it apart.")
    return changed

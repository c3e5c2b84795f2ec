"""How results are written, and read again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vtok.errors import InvalidValue


def read_json(file: str | os.PathLike[str], what: str) -> Any:
    """What a file of JSON holds, None where it is no JSON. what: the file is to be. Raises `InvalidValue` where it
    cannot be read."""
    try:
        return json.loads(Path(file).read_text())
    except OSError as error:
        raise InvalidValue(f"The {what} {str(file)!r} cannot be read ({error.strerror}).") from error
    except ValueError:
        return None


def read_lines(file: str | os.PathLike[str]) -> list[Any]:
    """What each line of a file of JSON lines holds. Raises `InvalidValue`."""
    try:
        return [json.loads(line) for line in Path(file).read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidValue(f"{str(file)!r} cannot be read as JSON lines: {error}") from error


def write_json(file: str | os.PathLike[str], content: Any) -> None:
    """Write a file so that a kill leaves the old one or the new one. Raises `InvalidValue` where it cannot be."""
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + ".part")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, file)
    except OSError as error:
        raise InvalidValue(f"{str(file)!r} could not be written ({error.strerror}).") from error

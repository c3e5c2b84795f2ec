"""How results are written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vtok.errors import InvalidValue


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

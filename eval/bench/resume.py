"""A run that goes on where it was killed: a file of rounds, written whole after each."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vtok.errors import InvalidValue


def begun(out: Path | None, asked: Any, about: dict[str, str]) -> dict[str, Any]:
    """What a run has so far: {"machine", "asked", "rounds": name -> what was measured}, of `files.write_json`.

    asked: a dataclass, what the run was asked for. about: the machine, of a run that begins. Raises `InvalidValue`
    where the file is of a run that was asked for something else."""
    wanted = json.loads(json.dumps(asdict(asked)))
    if out is None or not out.exists():
        return {"machine": about, "asked": wanted, "rounds": {}}
    found = json.loads(out.read_text())
    if found.get("asked") != wanted:
        raise InvalidValue(
            f"{out} is of a run that was asked for {found.get('asked')}: take another file, or delete it."
        )
    return found

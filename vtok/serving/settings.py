"""What a server was asked to keep, and whether it can. Read from the model's config, which vLLM hands to every process.

The key "vtok" of `--hf-overrides` holds what is in a file that `Patch.save` wrote, {"compressors": [{"name": ...}]}, or
one compressor spelt out, {"compressor": "divprune", "keep": 0.25}. This file knows no vLLM.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vtok import adapter as adapters
from vtok import config as configs
from vtok.adapter import Adapter
from vtok.errors import InvalidValue, Unsupported
from vtok.serving.families import FAMILIES, REFUSED, Family
from vtok.serving.positions import LIMIT
from vtok.stages.pre_llm import PreLLM
from vtok.types import Layout, keep_count

KEY = "vtok"


@dataclass(frozen=True)
class Settings:
    """One compressor on one family. text: what it was read from, for hashes."""

    compressor: PreLLM
    adapter: Adapter
    family: Family
    text: str

    @staticmethod
    def of(config: Any) -> Settings | None:
        """Those of a model's config; None where it has none, or where they would keep all tokens."""
        asked = getattr(config, KEY, None)
        if asked is None:
            return None
        settings = _read(json.dumps(asked, sort_keys=True), config.model_type)
        return None if settings.compressor.is_identity else settings

    @property
    def original(self) -> bool:
        """Whether kept tokens stand where they stood in the dense prompt, and not one behind the other."""
        return not self.compressor.renumber

    def check(self, config: Any) -> None:
        """Raise `Unsupported` where this checkpoint's vision tower does not show what the compressor reads."""
        self.adapter.check(config)
        shown = self.family.shows & self.adapter.available(config)
        if missing := sorted(self.compressor.needs_now - shown):
            ways = [self.compressor.optional.get(need, {}) for need in missing]
            hints = [self.compressor.hints[need] for need, way in zip(missing, ways) if way and self._helps(way, shown)]
            reason = f"needs {', '.join(missing)}, which vLLM's {self.adapter.family} does not show."
            raise _refusal(self.compressor, " ".join([reason, *hints]))

    def _helps(self, options: dict[str, Any], shown: frozenset[str]) -> bool:
        return dataclasses.replace(self.compressor, **options).needs_now <= shown

    def layouts(self, config: Any, modality: str, arguments: dict[str, Any]) -> list[Layout]:
        """One a picture, see `Adapter.layouts`."""
        layouts = self.adapter.layouts(config, modality, arguments)
        if largest := max((layout.n_rows for layout in layouts if layout.n_rows > LIMIT), default=0):
            raise Unsupported(f"A {modality} of {largest:,} tokens: vtok serves those of up to {LIMIT:,}.")
        return layouts

    def rows(self, layout: Layout) -> int:
        """How many placeholders of a picture stay, its separators among them."""
        return self.compressor.count(layout) + layout.n_rows - layout.n

    def layouts_of(self, config: Any, modality: str, data: Mapping[str, Any]) -> list[Layout]:
        """Of one picture or clip, as vLLM holds it, name -> what has its tensor as `data`: one layout, or one a frame
        where each frame is a picture."""
        if "video_num_patches" in data:
            return self.layouts(
                config, modality, {"tile_grids": torch.ones(int(data["video_num_patches"].data), 2).long()}
            )
        one = lambda key: data[key].data.reshape(1, -1)  # a grid, or a size
        told = {key: one(key) for key in data if key.endswith(("_grid_thw", "image_sizes", "tile_grids"))}
        return self.layouts(config, modality, {"pixel_values": [None], **told})

    def dense_rows(self, config: Any, modality: str, data: Mapping[str, Any]) -> int:
        """How many placeholders one picture or clip, as vLLM holds it, has in the dense prompt."""
        return sum(layout.n_rows for layout in self.layouts_of(config, modality, data))

    def kept_rows(self, config: Any, modality: str, data: Mapping[str, Any]) -> int:
        """How many of these stay: all of one that was made elsewhere."""
        layouts = self.layouts_of(config, modality, data)
        made_elsewhere = f"{modality}_embeds" in data
        return sum(layout.n_rows if made_elsewhere else self.rows(layout) for layout in layouts)

    def layout_of_size(self, config: Any, size: Sequence[int] | None) -> Layout:
        """Of a picture of `size` (height, width), which families of one view need not be told."""
        sizes = None if size is None else torch.tensor([list(size)])
        return self.layouts(config, "image", {"pixel_values": [None], "image_sizes": sizes})[0]

    def most_rows(self, layout: Layout) -> int:
        """A bound on `rows` of this layout and of smaller ones: grids of `pool` fit one better than another, each plane
        may keep a token of its own, and methods for clips keep a whole frame."""
        count = max(keep_count(layout.n, self.compressor.keep) + len(layout.planes), self.compressor.count(layout))
        return min(layout.n, count) + layout.n_rows - layout.n

    def times(self, layout: Layout) -> float:
        """How many tokens of a picture stand behind each that stays."""
        return layout.n_rows / self.rows(layout)

    def longest(self, length: int, layouts: Sequence[Layout]) -> int:
        """A bound on the length of the dense prompt of one of `length` tokens, given the largest layouts: pictures keep
        at least half of what is asked for, as counts are rounded down, to one at least."""
        asked = 1 / self.compressor.keep if isinstance(self.compressor.keep, float) else 1.0
        return int(2 * length * max([asked, *map(self.times, layouts)]))

    def salt(self, name: str) -> str:
        """A model's name for hashes of pictures. Stores that outlive a server must not mix those of two settings."""
        return f"{name}#vtok={self.text}"


@functools.cache
def _read(text: str, model_type: str) -> Settings:
    if model_type not in FAMILIES:
        reason = f": {REFUSED[model_type]}." if model_type in REFUSED else "."
        raise Unsupported(f"vtok serves {', '.join(FAMILIES)} with vLLM, not {model_type}{reason}")
    parts = [part for item in configs.load(as_file(json.loads(text))) for part in item.parts()]
    if len(parts) > 1:
        names = " + ".join(part.name for part in parts)
        raise Unsupported(f"vtok serves one compressor, which acts before the language model, not {names}.")
    (compressor,) = parts
    refuse(compressor)
    family = FAMILIES[model_type]
    if compressor.renumber and not family.one_axis:
        raise Unsupported(f"{compressor.name}(renumber=True) has no meaning for the M-RoPE of {model_type}.")
    return Settings(compressor, adapters.load_all()[model_type], family, text)


def as_file(asked: Any) -> dict[str, Any]:
    """Settings in the form that `Patch.save` writes."""
    if isinstance(asked, Mapping) and "compressor" in asked:
        options = {key: value for key, value in asked.items() if key != "compressor"}
        return {"compressors": [{"name": asked["compressor"], **options}]}
    if isinstance(asked, Mapping) and "compressors" in asked:
        return dict(asked)
    raise InvalidValue(
        f'"{KEY}" in --hf-overrides is {{"compressor": NAME, options}} or what is in a file of Patch.save, '
        f"not {json.dumps(asked)}."
    )


def refuse(compressor: Any) -> None:
    """Raise `Unsupported` for a method that no engine of this kind can run, whatever the family."""
    if compressor.stage != "pre_llm":
        raise _refusal(
            compressor,
            f"acts at {compressor.stage}; the tables of vLLM's cache hold the same tokens for all layers, so tokens "
            f"can only go between the encoder and the language model.",
        )
    if compressor.text_guided:
        raise _refusal(
            compressor, "reads the question; vLLM encodes a picture without it, and keeps the result for other ones."
        )
    if compressor.trained:
        raise _refusal(compressor, "has weights of its own, which vLLM does not load.")
    if compressor.adaptive_now:
        raise _refusal(
            compressor, "lets the content decide how many tokens stay; vLLM wants the number before it sees a pixel."
        )
    if not any(compressor.needs_now <= family.shows for family in FAMILIES.values()):
        needs = ", ".join(sorted(compressor.needs_now))
        raise _refusal(compressor, f"needs {needs}, which no family shows there together.")


def _refusal(compressor: Any, reason: str) -> Unsupported:
    return Unsupported(f"vtok cannot serve {compressor.name} with vLLM: it {reason}")

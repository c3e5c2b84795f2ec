"""The limit that a family's own processor has, on pixels or tiles, as a baseline: what a user can do without vtok.

One setting holds for all pictures of a task, as a user would set it: the largest at which they have at most the
budget's share of their visual tokens, on average. The model is not patched, so the prompt is shorter and positions have
no gaps.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from vtok import adapter as adapters
from vtok.engine.accounting import TextShape, encoder_flops, prefill_flops
from vtok.engine.trace import views
from vtok.errors import Unsupported
from vtok.eval.tasks.answers import read
from vtok.eval.tasks.task import Item

Setting = dict[str, Any]  # attribute of a processor's part, or of a config -> value


@dataclass(frozen=True, eq=False)
class Limit:
    """How one model's processor is limited.

    parts: what has the attributes, the processor's parts and configs. count: of settings, from the largest on.
    setting: which attributes a setting is, for each part.
    """

    parts: Sequence[Any]
    count: int
    setting: Callable[[int], Sequence[Setting]]

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """Within, the processor is limited."""
        with ExitStack() as stack:
            for part, values in zip(self.parts, self.setting(place), strict=True):
                for name, value in values.items():
                    stack.callback(setattr, part, name, getattr(part, name))
                    setattr(part, name, value)
            yield


def of(model: Any, processor: Any) -> Limit:
    """The limit of a model's processor. Raises `Unsupported` where it has none."""
    parts = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
    for kind in (_pixels, _pinpoints, _tiles):
        if found := kind(model, [part for part in parts if part is not None]):
            return found
    raise Unsupported(f"{type(processor).__name__} has no limit on pixels or tiles that can be set.")


def _pixels(model: Any, parts: Sequence[Any]) -> Limit | None:
    """Qwen's `max_pixels`, in steps of a token."""
    parts = [part for part in parts if getattr(part, "merge_size", None) and getattr(part.size, "longest_edge", None)]
    if not parts:
        return None
    unit = (parts[0].patch_size * parts[0].merge_size) ** 2
    most = max(part.size.longest_edge for part in parts) // unit

    def setting(place: int) -> list[Setting]:
        pixels = (most - place) * unit
        return [
            {
                "size": dataclasses.replace(
                    part.size,
                    longest_edge=min(pixels, part.size.longest_edge),
                    shortest_edge=min(pixels, part.size.shortest_edge),
                )
            }
            for part in parts
        ]

    return Limit(parts, most, setting)


def _pinpoints(model: Any, parts: Sequence[Any]) -> Limit | None:
    """LLaVA-NeXT's `image_grid_pinpoints`: those of at most so many pixels, and in the end one tile."""
    parts, vlm = [part for part in parts if getattr(part, "image_grid_pinpoints", None)], adapters.find(model)[0]
    if not parts:
        return None
    known, tile = parts[0].image_grid_pinpoints, [min(min(pair) for pair in parts[0].image_grid_pinpoints)] * 2
    areas = sorted({h * w for h, w in [*known, tile]}, reverse=True)

    def setting(place: int) -> list[Setting]:
        left = [pair for pair in known if pair[0] * pair[1] <= areas[place]] or [tile]
        return [{"image_grid_pinpoints": left}] * (len(parts) + 1)

    return Limit([*parts, vlm.config], len(areas), setting)


def _tiles(model: Any, parts: Sequence[Any]) -> Limit | None:
    """InternVL's `max_patches`."""
    parts = [part for part in parts if getattr(part, "max_patches", None)]
    if not parts:
        return None
    most = max(part.max_patches for part in parts)
    least = max(part.min_patches for part in parts)
    return Limit(parts, most - least + 1, lambda place: [{"max_patches": most - place}] * len(parts))


# --- of a task's items


@dataclass(frozen=True)
class Cost:
    """Of one item: visual tokens, all tokens, and FLOPs of encoder and prefill by formula."""

    visual: int
    tokens: int
    flops: int


def cost(model: Any, processor: Any, item: Item, instruction: str = "") -> Cost:
    """What the item costs as the processor is now set."""
    vlm, adapter = adapters.find(model)
    inputs = dict(read(processor, item, instruction))
    modality = "video" if item.media == "video" and "video" in adapter.encoders else "image"
    layouts = adapter.layouts(vlm.config, modality, inputs)
    text, vision = TextShape.of(vlm.config), adapter.tower(vlm.config).shape()
    lengths = inputs["attention_mask"].sum(1).tolist()
    flops = encoder_flops(vision, (view for layout in layouts for view in views(layout, vision.merge)))
    flops += sum(prefill_flops(text, [n] * text.layers) for n in lengths)
    return Cost(sum(layout.n for layout in layouts), sum(lengths), flops)


def fit(model: Any, processor: Any, items: Sequence[Item], budget: float) -> int:
    """The first, so the largest setting with which items have at most the budget's share of their visual tokens, on
    average. Raises `Unsupported` where none has."""
    limit = of(model, processor)
    asked = [dataclasses.replace(item, questions=item.questions[:1]) for item in items]
    whole = [cost(model, processor, item).visual for item in asked]

    @cache
    def kept(place: int) -> float:
        with limit.at(place):
            return sum(cost(model, processor, item).visual / n for item, n in zip(asked, whole)) / len(asked)

    place = bisect_left(range(limit.count), -budget, key=lambda place: -kept(place))
    if place == limit.count:
        raise Unsupported(
            f"A budget of {budget:g} cannot be met: with the processor's smallest limit {kept(limit.count - 1):.3f} of "
            "the visual tokens are left."
        )
    return place


def refusal(model: Any, processor: Any, items: Sequence[Item], budget: float) -> str | None:
    """Why there is no such setting, or None where there is one."""
    try:
        fit(model, processor, items, budget)
    except Unsupported as error:
        return str(error)
    return None


@contextmanager
def applied(
    model: Any, processor: Any, items: Sequence[Item], budget: float, instruction: str = ""
) -> Iterator[Callable[[Item], dict[str, float]]]:
    """Within, the processor is limited to the budget. What it gives tells what an item costs of what it would cost."""
    whole = {item.index: cost(model, processor, item, instruction) for item in items}
    place = fit(model, processor, items, budget)

    def spared(item: Item) -> dict[str, float]:
        now, before = cost(model, processor, item, instruction), whole[item.index]
        return {
            "mean_keep": now.visual / before.visual,
            "selection_seconds": 0.0,
            "cache": now.tokens / before.tokens,
            "flops": now.flops / before.flops,
        }

    with of(model, processor).at(place):
        yield spared

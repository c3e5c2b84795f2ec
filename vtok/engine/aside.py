"""Forwards of the language model that nobody called: stages read its attention in them, and nothing is left of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtok.engine.decoder import Pass, Seen

if TYPE_CHECKING:
    from vtok.engine.forward import Engine


class Enough(Exception):
    """What was to be found out is known: the rest of the language model need not run."""


class Watch:
    """In the place of all stages: shows `watcher(layer, seen)` each layer's attention, and changes nothing."""

    def __init__(self, watcher: Callable[[int, Seen], None]) -> None:
        self.watcher = watcher

    def watches(self, p: Pass, layer: int) -> bool:
        return True

    def attention(self, p: Pass, layer: int, seen: Seen) -> None:
        self.watcher(layer, seen)

    def before_layer(self, p: Pass, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def nothing(self, p: Pass, *seen: Any) -> None:
        """What stages do elsewhere."""

    entering = attended = feed_forward = nothing


def run_aside(engine: Engine, module: nn.Module, p: Pass, embeds: Tensor, positions: Tensor) -> None:
    """Run the decoder `module` on embeds [B, L, D], in a pass whose only stage is a `Watch`. Then its cache, if it has
    one, is what it was. positions: [B or 1, L] or [3, B or 1, L]."""
    given = {"inputs_embeds": embeds, "position_ids": positions, "use_cache": p.cache is not None, "return_dict": True}
    try:
        with torch.no_grad(), nullcontext() if p.cache is None else p.cache.aside():
            module.forward(**engine.run_on(p, given))
    except Enough:
        pass
    finally:
        engine.local.call.running = None

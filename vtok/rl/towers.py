"""A frozen tower's work done once: RL shows a picture or clip for every answer, in the rollout and again in training.

undo = vtok.rl.encode_once(model.model.visual, clips=16)
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import InvalidValue, Unsupported

WATCHED = ("output_attentions", "output_hidden_states")


def encode_once(
    tower: nn.Module, clips: int | None = None, known: dict[tuple, Any] | None = None
) -> Callable[[], None]:
    """Let a frozen tower of a Qwen-VL encode each picture or clip once.

    clips: how many it remembers, those seen last, and at least those of one call; None: all that it ever saw. known:
    where it remembers them, for towers of the same weights to share. Losses and gradients stay the same. While a method
    has hooks in the tower, which reads or changes what happens there, all is encoded anew. Returns a function that
    undoes it. Raises `InvalidValue` where the tower is trained, and `Unsupported` for a tower that takes no grids.
    """
    if "grid_thw" not in inspect.signature(tower.forward).parameters:
        raise Unsupported(f"{type(tower).__name__} takes no grids. This is for Qwen-VL's towers, `model.model.visual`.")
    if any(weight.requires_grad for weight in tower.parameters()):
        raise InvalidValue("The tower is trained, so what it says of a picture changes: tower.requires_grad_(False).")
    if clips is not None and clips < 1:
        raise InvalidValue(f"clips is 1 or more, or None for all, not {clips}.")
    encode, known = tower.forward, {} if known is None else known  # those seen last stand last

    def forward(pixels: Tensor, grid_thw: Tensor, **how: Any) -> Any:
        hooked = any(part._forward_hooks or part._forward_pre_hooks for part in tower.modules() if part is not tower)
        if hooked or any(how.get(name) for name in WATCHED):
            return encode(pixels, grid_thw=grid_thw, **how)
        parts = pixels.split(grid_thw.prod(1).tolist())
        names = [(*grid, _digest(part)) for grid, part in zip(grid_thw.tolist(), parts)]
        new = {name: i for i, name in enumerate(names) if name not in known}
        if new:
            with torch.inference_mode(False), torch.no_grad():  # what a rollout remembers is trained behind, too
                some = grid_thw[list(new.values())].clone()
                out = encode(torch.cat([parts[i] for i in new.values()]), grid_thw=some, **how)
            for name, made in zip(new, _apart(out, some.prod(1))):
                known[name] = made
        for name in names:
            known[name] = known.pop(name)
        made = _joined([known[name] for name in names])
        while clips is not None and len(known) > max(clips, len(set(names))):
            del known[next(iter(known))]
        return made

    tower.forward = forward
    return lambda: setattr(tower, "forward", encode)


def _digest(part: Tensor) -> bytes:
    return hashlib.blake2b(part.detach().float().cpu().numpy().tobytes()).digest()


def _apart(out: Any, patches: Tensor) -> list[Any]:
    """An output for all pictures, in rows or lists of rows, as one a picture; `patches` of each."""

    def split(rows: Tensor) -> tuple[Tensor, ...]:  # the merger leaves one row of several patches
        return rows.split((patches * len(rows) // patches.sum()).tolist())

    fields = {
        name: split(value) if isinstance(value, Tensor) else zip(*map(split, value)) for name, value in out.items()
    }
    return [type(out)(**dict(zip(fields, values))) for values in zip(*fields.values())]


def _joined(outs: list[Any]) -> Any:
    """The opposite."""
    fields = {}
    for name, first in outs[0].items():
        values = [out[name] for out in outs]
        fields[name] = torch.cat(values) if isinstance(first, Tensor) else [torch.cat(x) for x in zip(*values)]
    return type(outs[0])(**fields)

"""TokenFLEX: a trained projector that makes as many visual tokens of a view as the caller wants."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vtok.errors import InvalidValue, Unsupported
from vtok.modules.tokenflex import TokenFlexProjector, square_side
from vtok.options import Keep
from vtok.stages.pre_llm import PreLLM
from vtok.types import Layout, Plane, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class TokenFLEX(PreLLM):
    """Visual tokens by a `TokenFlexProjector`, from the patches that the model's own projector reads.

    keep: tokens of each view (a picture, a thumbnail, a crop, a frame): a perfect square, or a fraction of the view's
        tokens, rounded down to a grid of the view's proportions. Also 1.0 goes through the trained projector.
    weights: the module, or a safetensors file of it: one's own, or the released weights.
    A token stands at the place of the dense token in the middle of its cell; cells of the padding of crops are dropped.
    Differs from the paper: places and newlines of the dense grid stay, where the released model counts its tokens
    alone; views need not be square.
    """

    name = "tokenflex"
    needs = frozenset({"encoder_states"})
    paper = "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference, arXiv 2504.03154"
    by_grid = True
    merges = True
    trained = True

    keep: Keep = 0.25
    weights: nn.Module | str | Path | None = field(default=None, repr=False)

    is_identity: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.keep, int):
            square_side(self.keep)
        if self.weights is None:
            raise InvalidValue(
                "tokenflex needs its trained projector: pass weights=FILE (safetensors) or a TokenFlexProjector. "
                "`vtok.modules.training` and examples/train_tokenflex.py train one."
            )
        if isinstance(self.weights, str | Path):
            object.__setattr__(self, "weights", TokenFlexProjector.load(self.weights))

    @classmethod
    def small_weights(cls, model: nn.Module) -> dict[str, Any]:
        from vtok.modules.training import tokenflex_for

        return {"weights": tokenflex_for(model)}

    @property
    def encoder_layers(self) -> dict[str, tuple[int | float | None, ...]]:
        return {"encoder_states": (None,)}

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """(h, w) for a view of rows x cols tokens."""
        if isinstance(self.keep, int):
            side = square_side(self.keep)
            if side > min(rows, cols):
                raise InvalidValue(f"{self.keep} tokens a view do not fit a view of {rows} x {cols}.")
            return side, side
        scale = math.sqrt(self.keep)
        return max(1, int(rows * scale + 1e-6)), max(1, int(cols * scale + 1e-6))

    def count(self, layout: Layout) -> int:
        grids = ((plane, self.grid(*plane.view_shape)) for plane in layout.planes)
        return sum(int((places(plane, grid) >= 0).sum()) for plane, grid in grids)

    @property
    def replays(self) -> bool:
        return False  # what enters is made of the whole picture

    def select(self, tokens: VisualTokens) -> Selection:
        layout, features = tokens.layout, tokens.features
        states = tokens.read("encoder_states", None)  # [B, V, P, C]
        b, _, patches, _ = states.shape
        projector = self.weights.to(features.device)
        index, rows, view = [], [], 0
        for plane, start in zip(layout.planes, layout.starts):
            if any(plane.resampled):
                raise Unsupported("tokenflex cannot make tokens where the model resizes its features (anyres-max).")
            high, wide = plane.view_shape
            merge = math.isqrt(patches // (high * wide))
            own = states[:, view : view + plane.views].unflatten(2, (high, wide, merge, merge))
            own = own.transpose(3, 4).flatten(4, 5).flatten(2, 3)  # [B, v, high * m, wide * m, C]
            view += plane.views
            grid = self.grid(high, wide)
            made = projector(own.flatten(0, 1), grid).reshape(b, -1, features.shape[2])  # [B, v * h * w, D]
            place = places(plane, grid)
            shown = place >= 0
            index.append(start + place[shown])
            rows.append(made[:, shown.nonzero().squeeze(1).to(made.device)])
        index = torch.cat(index).to(features.device)
        made = features.index_copy(1, index, torch.cat(rows, 1).to(features.dtype))
        return Selection.of_indices(index.expand(b, -1), layout.n, features=made)


def places(plane: Plane, grid: tuple[int, int]) -> Tensor:
    """[views * h * w] the token of the plane in the middle of each cell of each view, or -1 in the padding of crops."""
    (high, wide), (down, across) = plane.view_shape, plane.crop_grid

    def axis(n: int, target: int, crops: int, offset: int, size: int) -> Tensor:
        """[crops * target] the row (or column) of the plane, or -1."""
        middle = (2 * torch.arange(target) + 1) * n // (2 * target)  # [target]
        at = (torch.arange(crops)[:, None] * n + middle - offset).flatten()
        return torch.where((at >= 0) & (at < size), at, -1)

    y = axis(high, grid[0], down, plane.offset[0], plane.rows).view(down, 1, grid[0], 1)
    x = axis(wide, grid[1], across, plane.offset[1], plane.cols).view(1, across, 1, grid[1])
    return torch.where((y >= 0) & (x >= 0), y * plane.cols + x, -1).flatten()

"""PixelPrune: what its neighbours already tell of a picture's pixels is not encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.options import Part, Positive
from vtok.stages.patches import Patches


@dataclass(frozen=True, kw_only=True)
class PixelPrune(Patches):
    """A cell, the square of pixels that becomes one token, is dropped before the encoder where its left or upper
    neighbour predicts it: the upper one where the cells on the left of both are alike and the upper one is not like its
    own left neighbour, as below an edge, else the left one.

    tau: a cell is as predicted where no pixel value is off by more than this, of values in [0, 1]. At 0 nothing is lost
        but copies; a photo then keeps all its cells, since noise repeats nowhere. Above 0 a cell is compared with what
        stands for its neighbours, so that errors do not add up; that goes diagonal by diagonal and takes longer.
    std: by which the processor divides pixel values; Qwen3-VL's 0.5, of Qwen2-VL and Qwen2.5-VL about 0.27. At tau=0
        it does not matter.
    Each frame of a clip is a picture of its own. What is kept follows from the picture alone, so there is no budget.
    Differs from the paper: the frames of a clip are pruned, too, where the released code leaves clips whole; both
    frames of a doubled picture are compared; the other predictors and measures of the released code are not here, nor
    its pruning behind a block of the encoder.
    """

    name = "pixelprune"
    paper = "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding, arXiv 2604.00886"
    adaptive = True
    examples = ({}, {"tau": 0.1})

    keep: float = field(default=1.0, init=False, repr=False)  # the content says it
    tau: Part = 0.0
    std: Positive = 0.5

    @property
    def is_identity(self) -> bool:
        return False

    def with_budget(self, budget: float, n_layers: int) -> NoReturn:
        raise InvalidValue("pixelprune keeps what the picture's pixels ask for, so it has no budget: set tau.")

    def anchors(self, pixels: Tensor) -> Tensor:
        t, rows, cols, _ = pixels.shape
        place = torch.arange(t * rows * cols, device=pixels.device).view(t, rows, cols)
        if self.tau == 0:
            return copies(pixels, place)
        return within(pixels, place, self.tau / self.std)


def copies(pixels: Tensor, place: Tensor) -> Tensor:
    """[T, rows, cols] the cell of which each is an exact copy by the predictions. pixels: [T, rows, cols, V]. place:
    [T, rows, cols] the index of each."""
    like_upper = (pixels[:, 1:] == pixels[:, :-1]).all(-1)  # [T, rows - 1, cols]
    like_left = (pixels[:, :, 1:] == pixels[:, :, :-1]).all(-1)  # [T, rows, cols - 1]
    anchor = place.clone()
    anchor[:, :, 1:] = torch.where(like_left, place[:, :, :-1], place[:, :, 1:])
    anchor[:, 1:, 0] = torch.where(like_upper[..., 0], place[:, :-1, 0], place[:, 1:, 0])
    up = like_upper[..., :-1] & ~like_left[:, :-1]  # the upper one predicts: [T, rows - 1, cols - 1]
    by_upper = torch.where(like_upper[..., 1:], place[:, :-1, 1:], place[:, 1:, 1:])
    anchor[:, 1:, 1:] = torch.where(up, by_upper, anchor[:, 1:, 1:])
    for _ in range((pixels.shape[1] + pixels.shape[2]).bit_length()):  # a chain of copies is no longer than both sides
        anchor = anchor.flatten()[anchor]
    return anchor


def within(pixels: Tensor, place: Tensor, tau: float) -> Tensor:
    """The same where each value may be off by `tau` from that of the cell that stands for it. Neighbours are what
    stands for them, so cells come in order, those of one anti-diagonal together."""
    _, rows, cols, _ = pixels.shape
    flat, anchor = pixels.flatten(0, 2), place.clone()
    alike = lambda a, b: (flat[a] - flat[b]).abs().amax(-1) <= tau  # of cells [T, n]
    for diagonal in range(1, rows + cols - 1):
        y = torch.arange(max(0, diagonal - cols + 1), min(rows, diagonal + 1), device=pixels.device)
        x = diagonal - y
        left, upper = anchor[:, y, (x - 1).clamp(min=0)], anchor[:, (y - 1).clamp(min=0), x]
        corner = anchor[:, (y - 1).clamp(min=0), (x - 1).clamp(min=0)]
        by_upper = (x == 0) | ((y > 0) & alike(corner, left) & ~alike(corner, upper))
        predicted = torch.where(by_upper, upper, left)
        anchor[:, y, x] = torch.where(alike(place[:, y, x], predicted), predicted, place[:, y, x])
    return anchor

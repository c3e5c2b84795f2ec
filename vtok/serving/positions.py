"""Where tokens stand: in the dense prompt, though only some of a picture's are there. Plain arithmetic, knows no vLLM.

The runner asks twice. When a request comes, `prompt_positions` places all text: it depends on the grids alone, so it is
right even where pictures come out of the prefix cache and are never encoded. When pictures have been encoded, where
their kept tokens stood is known; it travels with the embeddings, in channels behind the last, as digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BASE = 256  # bfloat16 holds whole numbers up to it; as a plain number 257 would come back as 256
LIMIT = BASE * BASE  # two digits a position


def to_digits(positions: Tensor, dtype: torch.dtype) -> Tensor:
    """[axes, n] whole numbers in [0, LIMIT) -> [n, 2 * axes] in `dtype`, of which bfloat16 is the coarsest allowed."""
    return torch.cat([positions // BASE, positions % BASE]).T.to(dtype)


def from_digits(channels: Tensor) -> Tensor:
    """[n, 2 * axes] -> [axes, n] long."""
    high, low = channels.T.round().long().chunk(2)
    return high * BASE + low


@dataclass(frozen=True)
class Run:
    """A picture in a compressed prompt: its placeholders are `start` to `start + kept`, of `dense` in the dense one.

    tokens: what stands there in the dense prompt, where that is not one placeholder again and again."""

    start: int
    kept: int
    dense: int
    tokens: tuple[int, ...] = ()


def prompt_positions(length: int, runs: Sequence[Run]) -> tuple[Tensor, int]:
    """Of a prompt of `length` tokens under one-dimensional RoPE: three rows [3, length]; and the dense one's length.

    Row 0: the position; a picture's tokens have that of its first. Row 1: where the picture begins. Row 2: where the
    answer begins, the same at all. Rows 1 and 2 never change, so that row 0 can be written again and again."""
    shift = torch.zeros(length + 1, dtype=torch.long)
    back = torch.zeros(length, dtype=torch.long)  # from each token of a picture to its first
    for run in runs:
        shift[run.start + run.kept] += run.dense - run.kept
        back[run.start : run.start + run.kept] = torch.arange(run.kept)
    shift = shift.cumsum(0)
    begins = torch.arange(length) + shift[:-1] - back
    end = length + int(shift[-1])
    return torch.stack([begins, begins, torch.full_like(begins, end)]), end


def dense_prompt(tokens: Sequence[int], runs: Sequence[Run]) -> tuple[list[int], list[Run], list[int]]:
    """The dense prompt of a compressed one. Returns its tokens, its runs, and for each token of the compressed prompt
    its place in the dense one; of a picture's those of its first tokens."""
    dense: list[int] = []
    dense_runs: list[Run] = []
    place: list[int] = []
    at = 0
    for run in [*sorted(runs, key=lambda run: run.start), Run(len(tokens), 0, 0)]:
        place += range(len(dense), len(dense) + run.start - at)
        dense += tokens[at : run.start]
        place += range(len(dense), len(dense) + run.kept)
        dense_runs.append(Run(len(dense), run.dense, run.dense))
        dense += run.tokens or ([tokens[run.start]] * run.dense if run.dense else [])
        at = run.start + run.kept
    return dense, dense_runs[:-1], place


def places_of(media: Tensor, done: int, n: int) -> Tensor:
    """[n] the places of the first n media tokens behind the first `done` tokens. media: [length] bool."""
    return media[done:].nonzero().squeeze(1)[:n] + done


def base_of(positions: Tensor, media: Tensor, at: Tensor) -> Tensor:
    """[axes, n] where the pictures of the tokens at `at` [n] begin under M-RoPE: one behind the last text before, or 0.

    positions: [axes, length], of which only text is looked at. media: [length] bool, the tokens of pictures."""
    text = torch.arange(len(media), device=media.device).masked_fill(media, -1)
    before = text.cummax(0).values[at]
    return torch.where(before < 0, 0, positions[:, before] + 1)

"""APOLLO: AdamW's learning rates from a random projection of the gradient (https://arxiv.org/abs/2412.05270).

What Adam does to a channel of a matrix is, above all, to scale it. The scale is taken from Adam's moments of the
gradient seen through a small random matrix, and the gradient itself is applied, at full rank. Written from the paper;
libraries have optimisers of this name whose update stays in the projection, which is another method.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.optim.base import Base, drawn, in_range, moments

GROWTH = 1.01  # by which the norm of an update may grow in a step


class Apollo(Base):
    """APOLLO, and with rank=1, per="tensor" and scale=128 APOLLO-Mini (`create("apollo_mini", ...)`).

    rank: of the projection; the paper's is a quarter of the model's width. scale: the update is multiplied by its root.
    gap: steps after which the projection is drawn anew; the moments stay. per: "channel", a scale for each row or
        column along the longer side, or "tensor".

    The projection follows from the seed and is not stored: the state of an m x n matrix is 2 rank max(m, n) floats and
    one. lr: the paper's, for pretraining; fine-tuning of 8B took 1e-5 with rank 128 and scale 32."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int = 128,
        scale: float = 1.0,
        gap: int = 200,
        per: str = "channel",
        **shared: Any,
    ) -> None:
        own = {"rank": rank, "scale": scale, "gap": gap, "per": per}
        super().__init__(params, lr, betas, eps, weight_decay, matrices=True, **own, **shared)

    def check(self, group: dict[str, Any]) -> None:
        in_range("rank", group["rank"], 1)
        in_range("gap", group["gap"], 1)
        in_range("scale", group["scale"], 0)
        if group["per"] not in ("channel", "tensor"):
            raise InvalidValue(f'per is "channel" or "tensor", not {group["per"]!r}.')

    def update(self, weight: Tensor, grad: Tensor, state: dict, group: dict, key: tuple[int, int]) -> None:
        (b1, b2), step = group["betas"], state["step"]
        tall = grad.shape[0] >= grad.shape[1]
        seen = (grad if tall else grad.T) @ self.projection(grad, step, group, key)  # [long, rank]
        mean, square = moments(seen, state, group["betas"])
        adapted = mean / (square.sqrt() + group["eps"])
        if group["per"] == "channel":
            factor = adapted.norm(dim=1) / (seen.norm(dim=1) + 1e-8)  # [long]
            factor = factor[:, None] if tall else factor
        else:
            factor = adapted.norm() / (seen.norm() + 1e-8)
        update = factor * grad
        norm = update.norm()
        if "norm" in state:
            limit = (norm / (state["norm"] + 1e-8)).clamp(min=GROWTH) / GROWTH
            update, norm = update / limit, norm / limit
        state["norm"] = norm
        size = group["lr"] * (1 - b2**step) ** 0.5 / (1 - b1**step) * group["scale"] ** 0.5
        weight.sub_(size * update)
        weight.mul_(1 - group["lr"] * group["weight_decay"])

    @staticmethod
    def projection(grad: Tensor, step: int, group: dict[str, Any], key: tuple[int, int]) -> Tensor:
        """[short, rank] the random matrix of this step; entries of variance 1 / rank."""
        short, rank = min(grad.shape), group["rank"]
        made = drawn(grad, *key, "apollo", (step - 1) // group["gap"])
        return torch.randn(short, rank, dtype=grad.dtype, device=grad.device, generator=made) / rank**0.5

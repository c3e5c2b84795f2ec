"""SPAM and StableSPAM: Adam for gradients with spikes (https://arxiv.org/abs/2501.06842, 2502.17055).

Spikes stay in Adam's moments for long. SPAM cuts entries that are far above their own second moment, and forgets the
moments now and then; StableSPAM cuts by a running maximum and normalises the gradient's norm. Written from the papers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vtok.text.optim.base import Base, adam, forget, in_range, kept, moments

EARLY = 20  # steps after a reset in which nothing is cut, as second moments are not known yet


class Spam(Base):
    """SPAM: an entry g with g^2 > threshold v is cut to sign(g) sqrt(threshold v), where v is Adam's second moment.

    gap: steps after which both moments begin anew, 0 for never. warmup: steps after such a reset in which the learning
        rate comes back from a hundredth of itself, by a cosine. threshold: > 0.

    The bias of the moments is corrected by all steps so far, not by those since the reset, as in the official code. The
    state is Adam's. For parameters of any shape."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        threshold: float = 5000.0,
        gap: int = 500,
        warmup: int = 150,
        **shared: Any,
    ) -> None:
        own = {"threshold": threshold, "gap": gap, "warmup": warmup}
        super().__init__(params, lr, betas, eps, weight_decay, **own, **shared)

    def check(self, group: dict[str, Any]) -> None:
        for name in ("threshold", "gap", "warmup"):
            in_range(name, group[name], 0)

    def update(self, weight: Tensor, grad: Tensor, state: dict, group: dict, key: tuple[int, int]) -> None:
        (b1, b2), step, gap = group["betas"], state["step"], group["gap"]
        turn, since = divmod(step - 1, gap) if gap else (0, step - 1)
        if since == 0:
            forget(state)
        if since >= EARLY:
            most = (group["threshold"] * state["exp_avg_sq"]).sqrt_()
            grad = grad.clamp(-most, most)
        mean, square = moments(grad, state, group["betas"])
        size = group["lr"] * (1 - b2**step) ** 0.5 / (1 - b1**step)
        if turn and since < group["warmup"]:
            size *= 1 - 0.99 * (1 + math.cos(math.pi * since / group["warmup"])) / 2
        weight.sub_(size * mean / (square.sqrt() + group["eps"]))
        weight.mul_(1 - group["lr"] * group["weight_decay"])


class StableSpam(Base):
    """StableSPAM: entries are cut to a running maximum, the norm to a running mean of norms; then Adam.

    gammas: of the running mean and mean square of norms. theta: of the running maximum. gap: steps after which Adam's
        moments begin anew, 0 for never. The state is Adam's and three numbers. For parameters of any shape."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        gammas: tuple[float, float] = (0.7, 0.9),
        theta: float = 0.999,
        gap: int = 1000,
        **shared: Any,
    ) -> None:
        own = {"gammas": tuple(gammas), "theta": theta, "gap": gap}
        super().__init__(params, lr, betas, eps, weight_decay, **own, **shared)

    def check(self, group: dict[str, Any]) -> None:
        for name, value in (("gammas", group["gammas"][0]), ("gammas", group["gammas"][1]), ("theta", group["theta"])):
            in_range(name, value, 0, 1, below=True)
        in_range("gap", group["gap"], 0)

    def update(self, weight: Tensor, grad: Tensor, state: dict, group: dict, key: tuple[int, int]) -> None:
        (g1, g2), theta, step, gap = group["gammas"], group["theta"], state["step"], group["gap"]
        most = grad.abs().max()
        limit = kept(state, "most", most).lerp_(most, 1 - theta) / (1 - theta**step)
        grad = grad.where(grad.abs() <= limit, grad / most.clamp(min=1e-38) * limit)
        norm = grad.norm()
        mean = kept(state, "norm", norm).lerp_(norm, 1 - g1) / (1 - g1**step)
        square = kept(state, "norm_sq", norm).lerp_(norm * norm, 1 - g2) / (1 - g2**step)
        grad = grad * (mean / (square.sqrt() + group["eps"]) / norm.clamp(min=1e-38))
        since = (step - 1) % gap if gap else step - 1
        if since == 0:
            forget(state)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(adam(grad, state, group["betas"], group["eps"], since + 1), alpha=group["lr"])

"""FRUGAL: Adam for a share of each gradient, signs for the rest (https://arxiv.org/abs/2411.07837).

The share is drawn anew every `gap` steps, so that all weights get their turn; signs have no state. Written from the
paper, with the official defaults.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.optim.base import Base, adam, drawn, forget, in_range, lion

SHARES = ("columns", "rows", "entries", "blocks")
INNER = ("adam", "lion")
Place = tuple[Any, ...]  # an index into a matrix, of what has a state


class Frugal(Base):
    """FRUGAL. density: in [0, 1], the share with a state. 0 is signSGD, 1 the inner optimiser.

    share: what is drawn: "columns", "rows" or single "entries" of each matrix, or "blocks", whole matrices.
    inner: "adam" or "lion", of what has a state; its moments begin at 0 when the share is drawn anew.
    sign_scale: of the learning rate for signs; the paper's are 1 for pretraining and 0.1 for fine-tuning.
    gap: steps after which the share is drawn anew.

    The state of a matrix is `density` of the inner optimiser's; what was drawn follows from the seed."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        density: float = 0.25,
        share: str = "columns",
        inner: str = "adam",
        sign_scale: float = 1.0,
        gap: int = 200,
        **shared: Any,
    ) -> None:
        own = {"density": density, "share": share, "inner": inner, "sign_scale": sign_scale, "gap": gap}
        super().__init__(params, lr, betas, eps, weight_decay, matrices=True, **own, **shared)

    def check(self, group: dict[str, Any]) -> None:
        in_range("density", group["density"], 0, 1)
        in_range("sign_scale", group["sign_scale"], 0)
        in_range("gap", group["gap"], 1)
        for name, known in (("share", SHARES), ("inner", INNER)):
            if group[name] not in known:
                raise InvalidValue(f"{name} is one of {', '.join(known)}, not {group[name]!r}.")

    def update(self, weight: Tensor, grad: Tensor, state: dict, group: dict, key: tuple[int, int]) -> None:
        turn, since = divmod(state["step"] - 1, group["gap"])
        place = self.place(grad, turn, group, key)
        if since == 0:
            forget(state)
        update = grad.sign() * group["sign_scale"]
        if (chosen := grad[place]).numel():
            update[place] = self._inner(chosen, state, group, since + 1)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    @staticmethod
    def _inner(grad: Tensor, state: dict, group: dict, step: int) -> Tensor:
        if group["inner"] == "adam":
            return adam(grad, state, group["betas"], group["eps"], step)
        return lion(grad, state, group["betas"])

    def place(self, grad: Tensor, turn: int, group: dict, key: tuple[int, int]) -> Place:
        """Which part of a matrix has a state in this turn."""
        seed, number = key
        density, (rows, columns) = group["density"], grad.shape
        pick = lambda n, *names: torch.randperm(n, generator=drawn(grad, seed, turn, *names), device=grad.device)
        if group["share"] == "columns":
            return (slice(None), pick(columns, number)[: round(density * columns)])
        if group["share"] == "rows":
            return (pick(rows, number)[: round(density * rows)],)
        if group["share"] == "entries":
            flat = pick(rows * columns, number)[: round(density * rows * columns)]
            return (flat // columns, flat % columns)
        first, count = self._blocks(number)
        chosen = pick(count, first)[: round(density * count)]
        return (slice(None) if number - first in chosen.tolist() else slice(0),)

    def _blocks(self, number: int) -> tuple[int, int]:
        """The number of the first matrix of the group of matrix `number`, and how many it has."""
        first = 0
        for group in self.param_groups:
            if number < first + len(group["params"]):
                break
            first += len(group["params"])
        return first, len(group["params"])

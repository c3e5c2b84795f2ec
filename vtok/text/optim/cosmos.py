"""COSMOS: a full second moment in the leading directions, Muon in the others (https://arxiv.org/abs/2502.17410).

SOAP's rotation costs two full matrices; here it is kept in the `rank` leading right singular directions of the
gradients alone, and the momentum outside of them is orthogonalised, as Muon does. Written from the paper.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vtok.text.optim.base import Base, in_range, kept, newton_schulz


class Cosmos(Base):
    """COSMOS. Each step of a matrix has the root mean square lr * ratio exactly.

    rank: of the leading directions, at most the shorter side. ratio: see above. gamma: weight of the other directions.

    The state of an m x n matrix is m n + n rank + m rank + rank^2 floats. The first step takes an SVD of the
    gradient."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        rank: int = 64,
        ratio: float = 0.2,
        gamma: float = 0.2,
        **shared: Any,
    ) -> None:
        own = {"rank": rank, "ratio": ratio, "gamma": gamma}
        super().__init__(params, lr, betas, eps, weight_decay, matrices=True, **own, **shared)

    def check(self, group: dict[str, Any]) -> None:
        in_range("rank", group["rank"], 1)
        in_range("ratio", group["ratio"], 0)
        in_range("gamma", group["gamma"], 0)

    def update(self, weight: Tensor, grad: Tensor, state: dict, group: dict, key: tuple[int, int]) -> None:
        (b1, b2), step = group["betas"], state["step"]
        momentum = kept(state, "exp_avg", grad).mul_(b1).add_(grad)
        basis = self._follow(grad, state, group)  # [n, rank]
        seen = grad @ basis
        square = kept(state, "exp_avg_sq", seen).mul_(b2).addcmul_(seen, seen, value=1 - b2)
        ahead = (grad + b1 * momentum) / (1 + b1 * (1 - b1**step) / (1 - b1))
        inside = ahead @ basis
        rest = ahead - inside @ basis.T
        rest = rest * (rest.norm() > 1e-5 * ahead.norm())  # what is rounding of the leading directions is no direction
        rest = newton_schulz(rest)
        entries = grad.numel() ** 0.5
        rest = rest * (entries / rest.norm().clamp(min=1e-12))
        leading = inside / ((square / (1 - b2**step)).sqrt() + group["eps"]) @ basis.T
        update = leading + group["gamma"] * rest
        size = group["lr"] * group["ratio"] * entries / update.norm().clamp(min=1e-12)
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(size * update)

    @staticmethod
    def _follow(grad: Tensor, state: dict, group: dict) -> Tensor:
        """[n, rank] the leading directions after this gradient: one step of power iteration on the running G^T G."""
        b2 = group["betas"][1]
        if "basis" not in state:
            found = torch.linalg.svd(grad, full_matrices=False).Vh[: group["rank"]].T.contiguous()
            inner = torch.zeros(found.shape[1], found.shape[1], dtype=grad.dtype, device=grad.device)
        else:
            before, inner = state["basis"], state["inner"]
            found = torch.linalg.qr(b2 * before @ inner + (1 - b2) * grad.T @ (grad @ before)).Q
            turned = before.T @ found
            inner = turned.T @ inner @ turned
        seen = grad @ found
        state["basis"], state["inner"] = found, b2 * inner + (1 - b2) * seen.T @ seen
        return found

"""Lion, and Lion-K: signed momentum as constrained optimisation (https://arxiv.org/abs/2302.06675, 2310.05898).

    m' = b1 m + (1 - b1) g        x -= lr (dK(m') + weight_decay x)        m = b2 m + (1 - b2) g

With weight decay w the weights solve min f(x) where K*(-w x) is finite: for K = |.|_1 (Lion) all |x| <= 1 / w, for the
nuclear norm (Muon's direction) singular values <= 1 / w. Written from the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.optim.base import Base, in_range, lion, newton_schulz

# a subgradient of K at the momentum x; e is `threshold`
KERNELS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "l1": lambda x, e: x.sign(),
    "huber": lambda x, e: x / x.abs().clamp(min=e),
    "soft": lambda x, e: x.sign() * (x.abs() > e),
    "group": lambda x, e: x / x.norm(dim=1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny),
    "nuclear": lambda x, e: newton_schulz(x),
}
OF_MATRICES = ("group", "nuclear")


class LionK(Base):
    """Lion-K; with the kernel "l1" it is Lion.

    kernel: "l1" (signs), "huber" (signs, but linear within the threshold), "soft" (0 within it), "group" (each row
        normalised), "nuclear" (the matrix' singular values set to 1). The last two are for matrices.
    threshold: > 0, of "huber" and "soft".

    One momentum a weight is all its state. Against AdamW take a learning rate 3 to 10 times smaller and weight decay as
    many times larger."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        kernel: str = "l1",
        threshold: float = 1e-3,
        **shared: Any,
    ) -> None:
        if kernel not in KERNELS:
            raise InvalidValue(f"kernel is one of {', '.join(KERNELS)}, not {kernel!r}.")
        self.kernel = KERNELS[kernel]
        matrices = kernel in OF_MATRICES
        super().__init__(params, lr, betas, eps, weight_decay, matrices=matrices, threshold=threshold, **shared)

    def check(self, group: dict[str, Any]) -> None:
        in_range("threshold", group["threshold"], torch.finfo(torch.float32).tiny)

    def update(self, weight: Tensor, grad: Tensor, state: dict, group: dict, key: tuple[int, int]) -> None:
        direction = lion(grad, state, group["betas"], lambda x: self.kernel(x, group["threshold"]))
        weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])

"""What the optimisers here share: one loop over parameters, AdamW for what is no matrix, rounding, resuming.

Arithmetic and state are fp32 (float64 for float64 weights), whatever the weights are. bf16 weights are rounded
stochastically: rounded to the nearest, a step below 1/512 of a weight would be lost every time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from vtok.errors import InvalidValue, Unsupported


class Base(torch.optim.Optimizer):
    """An optimiser of one parameter at a time; subclasses write `update`.

    params: tensors, or groups, as of any torch optimiser. A group with `plain=True` gets AdamW with the group's betas,
    eps and weight_decay. matrices: whether all others have to be matrices. Raises `InvalidValue` for what is none, and
    for options out of range.

    Options that all have, also by group: `seed`, of which with the parameter's number all that is drawn follows;
    `stochastic_rounding` of bf16 weights, True by default."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        matrices: bool = False,
        seed: int = 0,
        stochastic_rounding: bool = True,
        **options: Any,
    ) -> None:
        self.matrices = matrices
        shared = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "plain": False}
        super().__init__(params, shared | {"seed": seed, "stochastic_rounding": stochastic_rounding} | options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if unknown := set(group) - set(self.defaults) - {"params", "param_names", "initial_lr"}:
            raise InvalidValue(f"{type(self).__name__} has no option {sorted(unknown)[0]!r}: {sorted(self.defaults)}.")
        for name in ("lr", "eps", "weight_decay"):
            in_range(name, group[name], 0)
        for beta in group["betas"]:
            in_range("betas", beta, 0, 1, below=True)
        if self.matrices and not group["plain"] and (bad := [p for p in group["params"] if p.ndim != 2]):
            raise InvalidValue(
                f"{type(self).__name__} is for matrices, and {len(bad)} of the parameters are none, the first of shape "
                f"{list(bad[0].shape)}. Give the model itself to vtok.optim.create, or put them in a group of "
                f"their own with plain=True (AdamW)."
            )
        self.check(group)

    def check(self, group: dict[str, Any]) -> None:
        """Raise `InvalidValue` for a subclass' own options out of range."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step along the gradients there are. closure: computes them anew, and gives the loss that is returned.

        Raises `Unsupported` for sparse gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        number = -1  # of the parameter, among all
        for group in self.param_groups:
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise Unsupported("Sparse gradients are not taken: leave the embedding's `sparse` at False.")
                wide = torch.promote_types(p.dtype, torch.float32)
                weight, state = p.to(wide), self.state[p]
                state["step"] = state.get("step", 0) + 1
                key = (group["seed"], number)
                if group["plain"]:
                    adamw(weight, p.grad.to(wide), state, group)
                else:
                    self.update(weight, p.grad.to(wide), state, group, key)
                write(p, weight, (*key, state["step"]) if group["stochastic_rounding"] else None)
        return loss

    def update(self, weight: Tensor, grad: Tensor, state: dict, group: dict, key: tuple[int, int]) -> None:
        """Of subclasses. Changes `weight` in place, not `grad`. state: `step`, from 1, and what was put there."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which turns the state to the weights' dtype; here it keeps its own."""
        super().load_state_dict(state_dict)
        params = (p for group in self.param_groups for p in group["params"])
        names = (name for group in state_dict["param_groups"] for name in group["params"])
        for p, name in zip(params, names):
            for key, value in state_dict["state"].get(name, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][key] = value.to(p.device, copy=True)


def moments(grad: Tensor, state: dict, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Adam's moments with this gradient in them: the running means of gradients and of their squares."""
    b1, b2 = betas
    mean, square = kept(state, "exp_avg", grad), kept(state, "exp_avg_sq", grad)
    return mean.lerp_(grad, 1 - b1), square.mul_(b2).addcmul_(grad, grad, value=1 - b2)


def forget(state: dict) -> None:
    """Let the moments begin anew."""
    for name in ("exp_avg", "exp_avg_sq"):
        state.pop(name, None)


def adam(grad: Tensor, state: dict, betas: tuple[float, float], eps: float, step: int) -> Tensor:
    """Adam's direction: the mean of gradients by the root of the mean of their squares, both without bias."""
    (b1, b2), (mean, square) = betas, moments(grad, state, betas)
    return mean / (1 - b1**step) / ((square / (1 - b2**step)).sqrt() + eps)


def lion(
    grad: Tensor, state: dict, betas: tuple[float, float], kernel: Callable[[Tensor], Tensor] = torch.sign
) -> Tensor:
    """Lion's direction: `kernel` of a momentum that looks one gradient further than the one that is kept."""
    (b1, b2), momentum = betas, kept(state, "exp_avg", grad)
    direction = kernel(momentum.lerp(grad, 1 - b1))
    momentum.lerp_(grad, 1 - b2)
    return direction


def adamw(weight: Tensor, grad: Tensor, state: dict, group: dict) -> None:
    """A step of AdamW on the weight, in place."""
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    weight.sub_(adam(grad, state, group["betas"], group["eps"], state["step"]), alpha=group["lr"])


def kept(state: dict, name: str, like: Tensor) -> Tensor:
    """A tensor of the state, zeros at first."""
    if name not in state:
        state[name] = torch.zeros_like(like)
    return state[name]


def write(p: Tensor, weight: Tensor, key: tuple[int, ...] | None) -> None:
    """Put an fp32 weight into a parameter. key: of what is drawn for rounding to bf16; None rounds to the nearest."""
    if weight is p:
        return
    if p.dtype == torch.bfloat16 and key is not None:
        below = torch.randint(0, 1 << 16, p.shape, dtype=torch.int32, device=p.device, generator=drawn(p, *key))
        weight = weight.view(torch.int32).add_(below).bitwise_and_(-(1 << 16)).view(torch.float32)
    p.copy_(weight)


def drawn(like: Tensor, *key: int | str) -> torch.Generator:
    """A generator on the tensor's device that a key alone decides: equal on all ranks and after a resume."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator(like.device).manual_seed(int.from_bytes(digest, "big"))


def newton_schulz(x: Tensor, steps: int = 5) -> Tensor:
    """The matrix with the singular vectors of x [m, n] and singular values near 1 (0.7 to 1.2): Muon's polynomial."""
    x, flip = x / x.norm().clamp(min=1e-12), x.shape[0] > x.shape[1]
    x = x.T if flip else x
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if flip else x


def in_range(name: str, value: Any, low: float, high: float = float("inf"), below: bool = False) -> None:
    """Raise `InvalidValue` unless low <= value <= high, or < high."""
    good = isinstance(value, int | float | Tensor) and low <= value <= high and not (below and value == high)
    if not good:
        raise InvalidValue(f"{name} is from {low} to {'below ' * below}{high}, not {value!r}.")

"""Zeroth-order optimisation (MeZO): losses of perturbed weights for gradients (https://arxiv.org/abs/2305.17333).

optimizer = vtok.optim.create("mezo", model, lr=1e-6)
loss = optimizer.step(lambda: model(**batch).loss)      # two forwards, no backward, no state

For a direction z of normal numbers g = (L(w + eps z) - L(w - eps z)) / (2 eps), and the step is -lr g z. z is drawn
again from its seed whenever it is needed. Variants are those of the benchmark https://arxiv.org/abs/2402.11592.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtok.errors import InvalidValue
from vtok.text.optim.base import drawn, in_range, write

ESTIMATES = ("two_sided", "one_sided", "forward")
RULES = ("sgd", "sign", "conservative")


class ZerothOrder(torch.optim.Optimizer):
    """MeZO and its variants. The loss has to be computed by a closure, of which no gradient is taken.

    estimate: "two_sided"; "one_sided", from L(w + eps z) - L(w), as many forwards; "forward", the exact derivative
        along z by forward-mode differentiation in one forward, which wants `model` and has no `eps`.
    rule: "sgd"; "sign", sign(g) z; "conservative", the best of w, w - lr g z and w + lr g z, for two forwards more.
    density: in (0, 1], the share of the entries that is perturbed. blocks: >= 1, of the parameters one after the other
        is perturbed, a step each. queries: >= 1 directions a step, whose estimates are averaged.

    Nothing is stored between steps but their number. Weights of 16 bits are copied while they are perturbed, since
    adding and subtracting would let them drift by a tenth of themselves in 1000 steps; others are not. Dropout draws
    the same in all forwards of a step. Several processes average g, and draw the same z.

    lr: full weights of 13B took 1e-6 with eps 1e-3, LoRA 1e-4 with 1e-2. Raises `InvalidValue`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        *,
        estimate: str = "two_sided",
        rule: str = "sgd",
        density: float = 1.0,
        blocks: int = 1,
        queries: int = 1,
        seed: int = 0,
        model: nn.Module | None = None,
    ) -> None:
        for name, value, known in (("estimate", estimate, ESTIMATES), ("rule", rule, RULES)):
            if value not in known:
                raise InvalidValue(f"{name} is one of {', '.join(known)}, not {value!r}.")
        if estimate == "forward" and model is None:
            raise InvalidValue(
                'estimate="forward" differentiates the model: give it, as model=... or in place of params.'
            )
        tiny = torch.finfo(torch.float32).tiny
        for name, value, low, high in (("density", density, tiny, 1), ("eps", eps, tiny, 1e9), ("lr", lr, 0, 1e9)):
            in_range(name, value, low, high)
        for name, value in (("blocks", blocks), ("queries", queries)):
            in_range(name, value, 1)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "step": 0})
        self.eps, self.rule, self.density, self.blocks, self.queries = eps, rule, density, blocks, queries
        self.seed, self.model, self._slope = seed, model, getattr(self, f"_{estimate}")
        self._slopes = [0.0] * queries  # of each direction, summed over what was estimated since the last step
        self._closures: list[Callable[[], Tensor]] = []

    @torch.no_grad()
    def estimate(self, closure: Callable[[], Tensor]) -> Tensor:
        """The loss; and the slopes along the directions of the next step are added up, as `backward` adds gradients."""
        loss = torch.zeros(())
        for query in range(self.queries):
            loss, slope = self._slope(lambda: self._loss(closure), query)
            self._slopes[query] = self._slopes[query] + _mean_of_ranks(slope) / self.queries
        if self.rule == "conservative":
            self._closures.append(closure)
        return loss

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Go along what was estimated. closure: gives the loss, estimated first. Returns the closure's loss."""
        loss = None if closure is None else self.estimate(closure)
        sizes = [torch.sign(torch.as_tensor(g)) if self.rule == "sign" else g for g in self._slopes]
        if self.rule == "conservative":
            self._best_of_three(sizes)
        else:
            self._go(sizes, 1.0)
        for group in self.param_groups:
            group["step"] += 1
        self._slopes, self._closures = [0.0] * self.queries, []
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was estimated; gradients, too, if there are any."""
        super().zero_grad(set_to_none)

    # ---- estimates ---------------------------------------------------------------------------------------------------
    def _two_sided(self, loss: Callable[[], Tensor], query: int) -> tuple[Tensor, Tensor]:
        with self._moved(query) as to:
            to(self.eps)
            above = loss()
            to(-self.eps)
            below = loss()
        return (above + below) / 2, (above - below) / (2 * self.eps)

    def _one_sided(self, loss: Callable[[], Tensor], query: int) -> tuple[Tensor, Tensor]:
        here = loss()
        with self._moved(query) as to:
            to(self.eps)
            above = loss()
        return here, (above - here) / self.eps

    def _forward(self, loss: Callable[[], Tensor], query: int) -> tuple[Tensor, Tensor]:
        along = {id(p): z for p, z in self._directions(query)}
        with forward_ad.dual_level(), _duals(self.model, along), sdpa_kernel(SDPBackend.MATH):
            found, slope = forward_ad.unpack_dual(loss())
        return found, torch.zeros_like(found) if slope is None else slope

    def _loss(self, closure: Callable[[], Tensor]) -> Tensor:
        """With the same random numbers in each forward of a step, for dropout."""
        devices = {p.device for group in self.param_groups for p in group["params"] if p.is_cuda}
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(self.seed + self.param_groups[0]["step"])
            return torch.as_tensor(closure()).detach() if self._slope != self._forward else closure()

    # ---- weights -----------------------------------------------------------------------------------------------------
    def _directions(self, query: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Each parameter of this step's block, and its z."""
        params = [p for group in self.param_groups for p in group["params"]]
        step = self.param_groups[0]["step"]
        for number, p in enumerate(params):
            if number * self.blocks // len(params) == step % self.blocks or len(params) < self.blocks:
                made = drawn(p, self.seed, step, query, number)
                z = torch.randn(p.shape, dtype=_wide(p), device=p.device, generator=made)
                if self.density < 1:
                    z *= torch.rand(p.shape, device=p.device, generator=made) < self.density
                yield p, z

    @contextmanager
    def _moved(self, query: int) -> Iterator[Callable[[float], None]]:
        """Gives a function that puts the weights to w + offset z; they are w again afterwards."""
        now, copies = 0.0, {}

        def to(offset: float) -> None:
            nonlocal now
            for p, z in self._directions(query):
                if p.dtype == z.dtype:
                    p.add_(z, alpha=offset - now)
                else:
                    w = copies.setdefault(p, p.clone())
                    p.copy_(w if offset == 0 else w + offset * z)
            now = offset

        try:
            yield to
        finally:
            to(0.0)

    def _go(self, slopes: list[Any], factor: float) -> None:
        """w - factor lr (slopes z + weight_decay w)."""
        options = {p: group for group in self.param_groups for p in group["params"]}
        step = self.param_groups[0]["step"]
        for query, slope in enumerate(slopes):
            for number, (p, z) in enumerate(self._directions(query)):
                lr, decay = factor * options[p]["lr"], options[p]["weight_decay"] if query == 0 else 0.0
                weight = p.to(z.dtype)
                weight.mul_(1 - lr * decay).sub_(lr * slope * z)
                write(p, weight, (self.seed, step, query, number, "round"))

    def _best_of_three(self, slopes: list[Any]) -> None:
        params = [p for group in self.param_groups for p in group["params"]]
        start = [p.clone() for p in params]
        total = lambda: float(_mean_of_ranks(sum(self._loss(closure) for closure in self._closures)))
        best, kept = total(), start
        for sign in (1.0, -1.0):
            self._go(slopes, sign)
            if (loss := total()) < best:
                best, kept = loss, [p.clone() for p in params]
            for p, w in zip(params, start):
                p.copy_(w)
        for p, w in zip(params, kept):
            p.copy_(w)


def without_backward(trainer: Any) -> Any:
    """Let one of transformers' or TRL's trainers, whose optimizer is a `ZerothOrder`, train without a backward.

    trainer = Trainer(model, ..., optimizers=(vtok.optim.create("mezo", model), None)). Losses of accumulated batches
    add up as their gradients would. Returns the trainer. Raises `InvalidValue` for another optimizer."""
    optimizer = trainer.optimizer
    if not isinstance(optimizer, ZerothOrder):
        raise InvalidValue(f"The trainer's optimizer is a {type(optimizer).__name__}: pass optimizers=(mezo, None).")

    def training_step(model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # as in Trainer.training_step, from here on
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = counted or trainer.compute_loss_func is not None
        parts = 1 if scaled else trainer.current_gradient_accumulation_steps
        loss = lambda: trainer.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch) / parts
        return optimizer.estimate(loss).detach()

    trainer.training_step = training_step
    return trainer


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _mean_of_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        value = value.clone()
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


@contextmanager
def _duals(model: nn.Module, along: dict[int, Tensor]) -> Iterator[None]:
    """The model with dual numbers in place of the parameters that have a direction, tied ones included."""
    put = []
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if any(id(p) in along for p in own.values()):
            put.append((module, own))
    made = {id(p): p for _, own in put for p in own.values()}
    made |= {i: forward_ad.make_dual(made[i].detach(), z.to(made[i].dtype)) for i, z in along.items() if i in made}
    try:
        for module, own in put:
            for name, p in own.items():
                delattr(module, name)
                setattr(module, name, made[id(p)])
        yield
    finally:
        for module, own in put:
            for name, p in own.items():  # all of a module, so that their order stays
                delattr(module, name)
                setattr(module, name, p)

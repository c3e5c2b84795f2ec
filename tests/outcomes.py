"""All ways that chance can go: what draws by a `Chance` alone is tested exactly, not by samples."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator

import torch

from vtok.text.decoding.coupling import Chance


class Undecided(Exception):
    """A decision is asked for that is not in the script: these are possible."""


class Script(Chance):
    """Takes the decisions of a list, and multiplies how likely each was. tail: where geometric draws are cut off."""

    def __init__(self, decisions: list[int], tail: int) -> None:
        object.__setattr__(self, "state", {"left": list(decisions), "likely": 1.0, "tail": tail})

    def decide(self, weights: list[float]) -> int:
        if not self.state["left"]:
            raise Undecided([i for i, weight in enumerate(weights) if weight > 0])
        taken = self.state["left"].pop(0)
        self.state["likely"] *= weights[taken]
        return taken

    def happens(self, probability: float) -> bool:
        probability = min(1.0, max(0.0, probability))
        return bool(self.decide([1 - probability, probability]))

    def draw(self, weights: torch.Tensor) -> int:
        return self.decide((weights / weights.sum()).tolist())

    def order(self, logp: torch.Tensor) -> Iterator[tuple[int, float]]:
        p = logp.exp()
        left = p.clone()
        while left.sum() > 0:
            token = self.draw(left)
            left[token] = 0
            yield token, p[token].item()

    def failures(self, success: float) -> int:
        return self.decide([success * (1 - success) ** i for i in range(self.state["tail"])])


def outcomes(rule: Callable[[Chance], Hashable], tail: int = 8) -> dict[Hashable, float]:
    """What a rule gives -> with what probability."""
    found: dict[Hashable, float] = {}
    waiting: list[list[int]] = [[]]
    while waiting:
        decisions = waiting.pop()
        chance = Script(decisions, tail)
        try:
            result = rule(chance)
        except Undecided as undecided:
            waiting += [[*decisions, i] for i in undecided.args[0]]
        else:
            found[result] = found.get(result, 0.0) + chance.state["likely"]
    return found

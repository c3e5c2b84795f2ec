"""How many drafts pay, found out while decoding; and what is told of a call."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vtok.errors import NothingToReport

GUESS = 1 / 16  # of a plain step: what one more draft is taken to cost, at most, where so many were not checked yet
AGAIN = 64  # steps with drafts, until a plain one is measured anew
STEPS = 8  # of one number of drafts, how many steps are remembered
FORGET, TRUST = 0.97, 2  # how much a trial counts after another one; trials that weigh as much as the prior


@dataclass
class Stats:
    """Of one call of `generate`.

    prompt: tokens of the prompt. tokens: emitted. steps: forwards, the prefill among them. drafted: tokens that were
    drafted and checked. accepted: of them emitted. plain: steps without drafts, behind the prefill.
    """

    prompt: int = 0
    tokens: int = 0
    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    plain: int = 0

    @staticmethod
    def of(known: Stats | None) -> Stats:
        if known is None:
            raise NothingToReport("Nothing to report yet: generate with this decoder first.")
        return known

    @property
    def tokens_a_step(self) -> float:
        """Emitted tokens a forward behind the prefill; 1.0 is plain decoding."""
        return (self.tokens - 1) / (self.steps - 1) if self.steps > 1 else 1.0

    def note(self, drafted: int, emitted: int) -> None:
        if not drafted and self.steps:
            self.plain += 1
        self.steps += 1
        self.tokens += emitted
        self.drafted += drafted
        self.accepted += emitted - 1


class Payoff:
    """Chooses how many drafts to check, none where they cost more time than they save, by the times of the steps
    themselves. Each number of drafts has a time of its own, since times jump: a product of matrices with 12 rows may
    take longer than one with 16. Where so many were not checked yet, the time is guessed from that of others, rather
    too low than too high, so that they are tried.

    slack: the share of the time so far that trying may lose, so that nothing is slower than plain decoding by more.
    clock: seconds.
    """

    def __init__(self, slack: float = 0.03, clock: Callable[[], float] = time.perf_counter) -> None:
        self.slack, self.clock = slack, clock
        self.plain: deque[float] = deque(maxlen=STEPS)
        self.drafted: dict[str, dict[int, deque[float]]] = {}  # kind of drafts -> how many -> seconds of the step
        self.known: dict[str, dict[int, float]] = {}  # the same of former calls, in plain steps
        self.since_plain = 0
        self.began = self.lost = self.prefill = 0.0
        self.hope = 0.0  # how many of the drafts that were chosen last are expected to be accepted
        self.hoped = self.accepted = 0.0  # of the drafts in this call, old steps less and less

    def begin(self) -> None:
        """A call of `generate` begins. Former calls were of other lengths: of their times only ratios are taken on."""
        if self.plain:
            self.known = {kind: self.costs(kind) for kind in {*self.known, *self.drafted}}
        self.plain.clear()
        self.drafted.clear()
        self.began, self.lost = self.clock(), 0.0
        self.hoped = self.accepted = 0.0

    def prefilled(self) -> None:
        """The prefill is done."""
        self.prefill = self.clock() - self.began

    @property
    def step(self) -> float:
        """Seconds of a plain step."""
        return statistics.median(self.plain)

    def costs(self, kind: str) -> dict[int, float]:
        """How many drafts of a kind -> what such a step takes, in plain steps, of those that were measured. A guess
        counts as one measurement more: of so few, one may have been disturbed."""
        known, times = self.known.get(kind, {}), self.drafted.get(kind, {})
        costs = dict(known)
        for n in sorted({*known, *times}):
            before = known.get(n) or guess(n, {m: cost for m, cost in costs.items() if m < n})
            costs[n] = statistics.median([before, *(seconds / self.step for seconds in times.get(n, ()))])
        return costs

    def choose(self, sizes: Sequence[tuple[int, float]], kind: str = "", making: float = 0.0) -> int:
        """How many drafts to check now, 0 for none.

        sizes: (drafts, how many of them are expected to be accepted), of what can be had. kind: those of one kind take
        one time each. making: what it takes to make one draft, about, in plain steps."""
        if len(self.plain) < (1 if self.known else 2) or self.since_plain >= AGAIN or not sizes:
            return 0
        costs = self.costs(kind)
        taken = {n: costs[n] if n in costs else guess(n, costs) + (0.0 if costs else n * making) for n, _ in sizes}
        right = min(1.0, (self.accepted + TRUST) / (self.hoped + TRUST))  # of what is expected: texts differ
        gains = [((1 + right * accepted) / taken[n], n) for n, accepted in sizes]
        sure = max((taken[n] for gain, n in gains if gain > 1 and n in costs), default=1.0)  # to try more costs less
        affordable = lambda n: self.affords((taken[n] - sure) * self.step)
        pay = [(gain, n) for gain, n in gains if gain > 1 and (n in costs or affordable(n))]
        trial = min(taken)
        best = max(pay)[1] if pay else trial if affordable(trial) else 0
        self.hope = dict(sizes).get(best, 0.0)
        return best

    def affords(self, seconds: float) -> bool:
        """Whether a loss of so much is still within what trying may cost."""
        return self.lost + seconds <= self.slack * (self.clock() - self.began)

    def once(self, share: float, work: Callable[[], None]) -> float | None:
        """Do what takes about `share` of the prefill's time, where that is affordable. Returns the share that it took;
        None where it waits."""
        if not self.affords(share * self.prefill):
            return None
        began = self.clock()
        work()
        took = self.clock() - began
        self.spent(took)
        return took / self.prefill if self.prefill else share

    def start(self) -> None:
        """A step begins."""
        self.started = self.clock()

    def stop(self, drafts: int, emitted: int, kind: str = "") -> None:
        """A step with so many drafts of a kind is over, which emitted so many tokens."""
        seconds = self.clock() - self.started
        if not drafts:
            self.plain.append(seconds)
            self.since_plain = 0
            return
        self.drafted.setdefault(kind, {}).setdefault(drafts, deque(maxlen=STEPS)).append(seconds)
        self.since_plain += 1
        self.hoped = FORGET * self.hoped + self.hope
        self.accepted = FORGET * self.accepted + emitted - 1
        if self.plain:  # gains pay losses back, and are not saved up
            self.lost = max(0.0, self.lost + seconds - emitted * self.step)

    def spent(self, seconds: float) -> None:
        """So much was spent beside the steps."""
        self.lost += seconds


def guess(n: int, costs: Mapping[int, float]) -> float:
    """What a step with n drafts takes at least, in plain steps, by what others take: one more draft takes no more than
    those so far, and more drafts take no less."""
    fewer = [cost + (n - m) * min(GUESS, (cost - 1) / m) for m, cost in costs.items() if m < n]
    more = [cost for m, cost in costs.items() if m > n]
    return max(1.0, min([*(fewer or [1 + n * GUESS]), *more]))


class Rates:
    """How often drafts of a chain were accepted at each depth, once the one above was; old steps are forgotten."""

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.tried: list[float] = []
        self.accepted: list[float] = []

    def note(self, drafted: int, accepted: int) -> None:
        """A chain of so many drafts was checked."""
        missing = [0.0] * (drafted - len(self.tried))
        self.tried += missing
        self.accepted += missing
        for depth in range(min(drafted, accepted + 1)):
            self.tried[depth] = FORGET * self.tried[depth] + 1
            self.accepted[depth] = FORGET * self.accepted[depth] + (depth < accepted)

    def sizes(self, most: int) -> list[tuple[int, float]]:
        """(drafts, how many of them are expected to be accepted), for chains of up to `most`."""
        sizes, through, total, rate = [], 1.0, 0.0, self.prior
        for depth in range(most):
            tried, accepted = (x[depth] if depth < len(x) else 0.0 for x in (self.tried, self.accepted))
            rate = (accepted + TRUST * rate) / (tried + TRUST)  # one below is believed to fare as the one above
            through *= rate
            total += through
            sizes.append((depth + 1, total))
        return sizes

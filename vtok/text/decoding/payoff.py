"""How many drafts pay, found out while decoding; and what is told of a call."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtok.errors import NothingToReport

GUESS = 1 / 16  # of a plain step: what a draft is taken to cost until one was checked
AGAIN = 64  # steps with drafts, until a plain one is measured anew
PLAIN, DRAFTED = 8, 32  # how many steps are remembered
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
    themselves: a step with n drafts is taken to last a + b n, where a is the time of a plain step.

    slack: the share of the time so far that trying may lose, so that nothing is slower than plain decoding by more.
    clock: seconds.
    """

    def __init__(self, slack: float = 0.05, clock: Callable[[], float] = time.perf_counter) -> None:
        self.slack, self.clock = slack, clock
        self.plain: deque[float] = deque(maxlen=PLAIN)
        self.drafted: dict[str, deque[tuple[int, float]]] = {}  # kind of drafts -> (how many, seconds of the step)
        self.known: dict[str, float] = {}  # kind -> what one took in former calls, in plain steps
        self.since_plain = 0
        self.began = self.lost = self.prefill = 0.0

    def begin(self) -> None:
        """A call of `generate` begins. Former calls were of other lengths: of their times only ratios are taken on."""
        if self.plain:
            self.known |= {kind: self.draft(kind) / self.step for kind in self.drafted}
        self.plain.clear()
        self.drafted.clear()
        self.began, self.lost = self.clock(), 0.0

    def prefilled(self) -> None:
        """The prefill is done."""
        self.prefill = self.clock() - self.began

    @property
    def step(self) -> float:
        """Seconds of a plain step."""
        return statistics.median(self.plain)

    def draft(self, kind: str) -> float:
        """Seconds that one more draft of a kind takes."""
        steps = self.drafted.get(kind)
        if not steps:
            return self.known.get(kind, GUESS) * self.step
        over = sum(n * (seconds - self.step) for n, seconds in steps)
        return max(0.0, over / sum(n * n for n, _ in steps))

    def choose(self, sizes: Sequence[tuple[int, float]], kind: str = "") -> int:
        """How many drafts to check now, 0 for none.

        sizes: (drafts, how many of them are expected to be accepted), of what can be had. kind: those of one kind take
        one time each."""
        if len(self.plain) < 2 or self.since_plain >= AGAIN or not sizes:
            return 0
        plain, draft = self.step, self.draft(kind)
        gain, best = max((plain * (1 + accepted) / (plain + draft * n), n) for n, accepted in sizes)
        if gain > 1 and (kind in self.drafted or kind in self.known):
            return best
        trial = min(n for n, _ in sizes)
        return trial if self.affords(draft * trial) else 0

    def affords(self, seconds: float) -> bool:
        """Whether a loss of so much is still within what trying may cost."""
        return self.lost + seconds <= self.slack * (self.clock() - self.began)

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
        self.drafted.setdefault(kind, deque(maxlen=DRAFTED)).append((drafts, seconds))
        self.since_plain += 1
        if self.plain:  # gains pay losses back, and are not saved up
            self.lost = max(0.0, self.lost + seconds - emitted * self.step)

    def spent(self, seconds: float) -> None:
        """So much was spent beside the steps."""
        self.lost += seconds


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

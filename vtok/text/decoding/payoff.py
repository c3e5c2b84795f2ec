"""How many drafts pay, found out while decoding; and what is told of a call."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vtok.errors import NothingToReport

FIRST = 4  # drafts of the first trial, of which nobody knows what they cost
GUESS = 1 / 16  # of a plain step: what a draft is taken to cost until one was checked
AGAIN = 64  # steps with drafts, until a plain one is measured anew
PLAIN, DRAFTED = 8, 32  # how many steps are remembered


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
        self.drafted: deque[tuple[int, float]] = deque(maxlen=DRAFTED)
        self.since_plain = 0

    def begin(self) -> None:
        """A call of `generate` begins. Times of former calls were at other lengths: a plain step is measured first."""
        self.began, self.lost = self.clock(), 0.0
        self.plain.clear()

    @property
    def step(self) -> float:
        """Seconds of a plain step."""
        return statistics.median(self.plain)

    @property
    def draft(self) -> float:
        """Seconds that one more draft takes."""
        if not self.drafted:
            return GUESS * self.step
        over = sum(n * (seconds - self.step) for n, seconds in self.drafted)
        return max(0.0, over / sum(n * n for n, _ in self.drafted))

    def choose(self, sizes: Sequence[tuple[int, float]]) -> int:
        """How many drafts to check now, 0 for none.

        sizes: (drafts, how many of them are expected to be accepted), of what can be had."""
        if len(self.plain) < 2 or self.since_plain >= AGAIN or not sizes:
            return 0
        plain, draft = self.step, self.draft
        gains = [(plain * (1 + accepted) / (plain + draft * n), n) for n, accepted in sizes]
        gain, best = max(gains)
        if gain > 1 and self.drafted:
            return best
        trial = min(min(n for n, _ in sizes), FIRST) if not self.drafted else min(n for n, _ in sizes)
        loss = draft * trial
        return trial if self.lost + loss <= self.slack * (self.clock() - self.began) else 0

    def start(self) -> None:
        """A step begins."""
        self.started = self.clock()

    def stop(self, drafts: int, emitted: int) -> None:
        """A step with so many drafts is over, which emitted so many tokens."""
        seconds = self.clock() - self.started
        if not drafts:
            self.plain.append(seconds)
            self.since_plain = 0
            return
        self.drafted.append((drafts, seconds))
        self.since_plain += 1
        if self.plain:
            self.lost = max(
                0.0, self.lost + seconds - emitted * self.step
            )  # gains pay losses back, and are not saved up

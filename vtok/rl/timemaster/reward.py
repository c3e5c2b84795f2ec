"""TimeMaster's composite reward: the form of an answer, its class, and how good its insight is."""

from __future__ import annotations

import hashlib
import json
import math
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vtok.errors import InvalidValue, VtokError
from vtok.rl.timemaster.prompts import RULES, Answer, parse

Judge = Callable[[Answer, Mapping[str, Any]], float]


class JudgeFailed(VtokError, RuntimeError):
    """The judge of the insights failed too often in a row to go on."""


# ---- the judge -------------------------------------------------------------------------------------------------------
@dataclass
class Guarded:
    """A judge that may be slow, fail or talk nonsense, asked so that training goes on or stops, but never hangs.

    judge: called with the answer and the row's texts and numbers; gives 0..1, what lies outside is clamped. It is
        called from other threads, and several at a time.
    timeout: seconds an attempt. retries: further attempts after a failure: an exception, no answer in time, or no
        number (None, text, NaN). Then the answer counts 0 and is asked about again the next time it is seen.
    patience: after so many failed answers in a row `JudgeFailed` is raised, as rewards of 0 would be learnt from.
    workers: attempts at a time. An answer is judged once: what was judged is kept by its hash."""

    judge: Judge
    timeout: float = 20.0
    retries: int = 2
    patience: int = 8
    workers: int = 8
    known: dict[str, float] = field(default_factory=dict, repr=False)
    _failed: int = field(default=0, repr=False)  # answers, in a row
    _warned: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not callable(self.judge):
            raise InvalidValue(f"A judge is called with an answer and its row, and {self.judge!r} cannot be.")
        if self.timeout <= 0 or self.retries < 0 or self.patience < 1 or self.workers < 1:
            raise InvalidValue(f"A judge needs timeout > 0, retries >= 0, patience and workers >= 1, got {self}.")

    def __call__(self, asked: Sequence[tuple[Answer, Mapping[str, Any]]]) -> list[float]:
        """A score of 0..1 for each answer with its row. Takes at most (retries + 1) x timeout seconds for every
        `workers` answers."""
        keys = [_key(answer, row) for answer, row in asked]
        open_ = {key: one for key, one in zip(keys, asked) if key not in self.known}
        new, reason = list(open_), ""
        for _ in range(self.retries + 1):
            todo = list(open_.items())
            for start in range(0, len(todo), self.workers):
                for key, found in self._attempt(todo[start : start + self.workers]).items():
                    if isinstance(found, float):
                        self.known[key] = found
                        del open_[key]
                    else:
                        reason = found
        self._note(new, open_, reason)
        return [self.known.get(key, 0.0) for key in keys]

    def _attempt(self, asked: list[tuple[str, tuple[Answer, Mapping[str, Any]]]]) -> dict[str, float | str]:
        """For each key a score, or why there is none."""
        found: dict[str, float | str] = {}

        def ask(key: str, answer: Answer, row: Mapping[str, Any]) -> None:
            try:
                found[key] = _score(self.judge(answer, row))
            except Exception as error:
                found[key] = f"{type(error).__name__}: {error}"

        # Daemons: a thread that hangs must not keep the process from ending, as a pool's would.
        threads = [threading.Thread(target=ask, args=(key, *one), daemon=True) for key, one in asked]
        for thread in threads:
            thread.start()
        end = time.monotonic() + self.timeout
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        late = f"no answer within {self.timeout:g} s"
        return {key: found.get(key, late) for key, _ in asked}

    def _note(self, new: list[str], failed: Mapping[str, Any], reason: str) -> None:
        for key in new:
            self._failed = self._failed + 1 if key in failed else 0
            if self._failed >= self.patience:
                raise JudgeFailed(
                    f"The judge failed on {self._failed} answers in a row, each {self.retries + 1} times; at last: "
                    f"{reason}. Repair it and resume from the last checkpoint."
                )
        if failed and not self._warned:
            self._warned = True
            warnings.warn(f"The judge failed, the insight of that answer counts 0: {reason}.", stacklevel=4)


def _score(said: Any) -> float:
    if isinstance(said, bool) or not isinstance(said, int | float) or math.isnan(said):
        raise TypeError(f"a judge gives a number of 0..1, not {said!r}")
    return min(1.0, max(0.0, float(said)))


def _key(answer: Answer, row: Mapping[str, Any]) -> str:
    text = json.dumps([answer.think, answer.label, answer.extension, row], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


GENERIC = re.compile(
    r"further (diagnostic )?test|clinical history|physical exam|refer\w* .{0,20}specialist|confirm\w* the diagnosis",
    re.I,
)


def capped(judge: Judge, most: float = 0.4, generic: re.Pattern[str] = GENERIC) -> Judge:
    """The judge, giving at most `most` to an insight in which `generic` is found: advice that fits any series.

    Source: the caps of TimeMaster's emg_soft.py, in our words."""

    def limited(answer: Answer, row: Mapping[str, Any]) -> float:
        score = judge(answer, row)
        return min(_score(score), most) if generic.search(answer.extension) else score

    return limited


# ---- the reward ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Weights:
    """Shares of a reward: an answer with all three right gets their sum. Source: TimeMaster's emg_soft.py; the paper
    gives none."""

    accuracy: float = 0.9
    form: float = 0.1
    extension: float = 0.5

    def __post_init__(self) -> None:
        if min(self.accuracy, self.form, self.extension) < 0 or not self.accuracy + self.form > 0:
            raise InvalidValue(f"Weights are at least 0, and not both those of class and form are 0: {self}.")


@dataclass
class TimeMasterReward:
    """A reward function for TRL's trainers: 0.9 for the class, 0.1 for the form, 0.5 times the judge's score for the
    insight. The judge is asked only where class and form are right.

    classes: all class names. judge: a function or a `Guarded`; without one no insight is expected or rewarded.
    rules: what the right form is, "paper" or "code", see `parse`. weights: see `Weights`.
    Data sets need a column `label`; columns of texts and numbers are shown to the judge.
    Source: TimeMaster, Section 4."""

    classes: Sequence[str]
    judge: Judge | Guarded | None = None
    rules: str = "paper"
    weights: Weights = Weights()

    __name__ = "timemaster"  # TRL's logs call the reward by it

    def __post_init__(self) -> None:
        if isinstance(self.classes, str) or len(set(self.classes)) < 2:
            raise InvalidValue(f"A reward needs at least two classes, got {self.classes!r}.")
        if self.rules not in RULES:
            raise InvalidValue(f"rules are one of {', '.join(RULES)}, not {self.rules!r}.")
        if self.judge is not None and not isinstance(self.judge, Guarded):
            self.judge = Guarded(self.judge)

    def read(self, text: str) -> Answer:
        """An answer, read by the rules of this reward."""
        return parse(text, self.classes, extension=self.judge is not None, rules=self.rules)

    def __call__(
        self, prompts: Any, completions: Sequence[Any], label: Sequence[str], log_metric: Any = None, **columns: Any
    ) -> list[float]:
        """One reward a completion, 0..sum of the weights.

        completions: texts, or conversations whose last turn is the answer. label: the class of each.
        Raises `InvalidValue` for a label that is not among the classes, and `JudgeFailed`."""
        if unknown := sorted(set(label) - set(self.classes)):
            raise InvalidValue(f"The label {unknown[0]!r} is none of the reward's classes: {', '.join(self.classes)}.")
        answers = [self.read(_text(completion)) for completion in completions]
        right = [answer.label == truth for answer, truth in zip(answers, label)]
        soft = self._extensions(answers, right, {"label": label} | columns)
        parts = {"accuracy": right, "form": [answer.well for answer in answers], "extension": soft}
        if log_metric is not None:
            for name, values in parts.items():
                log_metric(f"timemaster/{name}", sum(values) / len(values))
        rows = zip(*parts.values())
        return [sum(getattr(self.weights, part) * value for part, value in zip(parts, row)) for row in rows]

    def _extensions(self, answers: list[Answer], right: list[bool], columns: Mapping[str, Any]) -> list[float]:
        scores = [0.0] * len(answers)
        if self.judge is None:
            return scores
        plain = {
            name: values
            for name, values in columns.items()
            if isinstance(values, list | tuple) and all(isinstance(value, str | int | float) for value in values)
        }
        asked = [i for i, answer in enumerate(answers) if right[i] and answer.well and answer.extension]
        found = self.judge([(answers[i], {name: plain[name][i] for name in plain}) for i in asked])
        for i, score in zip(asked, found):
            scores[i] = score
        return scores


def _text(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    said = completion[-1]["content"]
    return said if isinstance(said, str) else "".join(part.get("text") or "" for part in said)


def check_reward(reward: Callable[..., Any], label: str, **columns: Any) -> None:
    """Raises `InvalidValue` where a reward function of one's own does not give a number for each of two answers of the
    class `label`: before the training starts, rather than in it.

    columns: further columns of the data set, a value each."""
    name = getattr(reward, "__name__", type(reward).__name__)
    said = [[{"role": "assistant", "content": text}] for text in (f"<think>.</think><class>{label}</class>", "?")]
    prompts = [[{"role": "user", "content": ""}]] * 2
    got = reward(
        prompts=prompts, completions=said, label=[label] * 2, **{key: [one] * 2 for key, one in columns.items()}
    )
    whole = isinstance(got, list | tuple) and len(got) == 2
    if not whole or not all(isinstance(one, int | float) and math.isfinite(one) for one in got):
        raise InvalidValue(
            f"The reward {name} must return a list with a finite number for each completion, but for two it returned "
            f"{got!r}."
        )

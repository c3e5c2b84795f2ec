"""Items of the offline tasks as training material: their words, and what lies where, from the questions' boxes."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from recipes.words import is_word, pieces
from vtok.eval.tasks.task import Box, Item, Question, Task

# Words that tell nothing about what to look for. A head that may look at "shape" in "Which shape is red?" stops there.
PLAIN = frozenset(
    {
        "a", "an", "and", "are", "at", "by", "clip", "color", "colour", "did", "do", "does", "first", "for", "from",
        "had", "has", "have", "how", "in", "is", "it", "its", "last", "many", "most", "much", "no", "object", "of",
        "on", "one", "ones", "or", "picture", "said", "say", "says", "see", "shape", "shown", "than", "the",
        "there", "to", "video", "was", "were", "what", "when", "where", "which", "who", "with", "written", "yes",
        "you",
    }
)  # fmt: skip
PERIOD = 84  # items whose indices differ by a multiple of it mostly share one size
CLOSED = 60  # a category with more different answers is an open one


@dataclass(frozen=True)
class Lexicon:
    """What the questions and answers of some tasks can say.

    words: every piece that is a token. content: those that name what is asked about or seen, with their space.
    labels: (task, category, answer) of the categories with few answers, each about one place. characters: of codes.
    """

    words: tuple[str, ...]
    content: tuple[str, ...]
    labels: tuple[tuple[str, str, str], ...]
    characters: tuple[str, ...]

    @classmethod
    def of_lists(cls, lists: dict[str, list]) -> Lexicon:
        """As JSON has it."""
        labels = tuple(map(tuple, lists["labels"]))
        return cls(tuple(lists["words"]), tuple(lists["content"]), labels, tuple(lists["characters"]))

    @cached_property
    def groups(self) -> dict[tuple[str, str], list[int]]:
        """(task, category) -> indices into `labels`."""
        found = defaultdict(list)
        for i, (task, category, _) in enumerate(self.labels):
            found[task, category].append(i)
        return dict(found)

    @cached_property
    def label(self) -> dict[tuple[str, str, str], int]:
        return {label: i for i, label in enumerate(self.labels)}

    @cached_property
    def named(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.content)}


def lexicon(tasks: Iterable[Task], read: Iterable[tuple[str, str]], count: int = 400) -> Lexicon:
    """From `count` training items of each task; the answers of the categories `read` are spelled by character."""
    words, content, characters, read = {"user", "assistant", "system"}, set(), set(), set(read)
    answers: dict[tuple[str, str], Counter] = defaultdict(Counter)
    for task in tasks:
        for index in range(count):
            for q in task.item("train", 0, index).questions:
                key = task.name, q.category
                said = [] if key in read else pieces(f" {q.answer}")
                words.update(piece for piece in (*pieces(q.text), *said) if is_word(piece))
                content.update(piece for piece in (*naming(q.text), *said) if is_word(piece))
                if key in read:
                    characters.update(q.answer)
                elif single(q):
                    answers[key][q.answer] += 1
    few = {
        key: sorted(found)
        for key, found in answers.items()
        if 2 <= len(found) <= CLOSED and all(is_word(piece) for answer in found for piece in pieces(answer))
    }
    return Lexicon(
        tuple(sorted(words)),
        tuple(sorted(content - {" yes", " no"})),
        tuple((*key, answer) for key, found in sorted(few.items()) for answer in found),
        tuple(sorted(characters)),
    )


def naming(question: str) -> list[str]:
    """The pieces of a question that name something, with the space before them."""
    return [p for p in pieces(question) if p.startswith(" ") and p.strip().lower() not in PLAIN and p.strip().isalnum()]


def single(question: Question) -> bool:
    """Whether a question is about one thing: one box in a picture or frame."""
    frames = [box[0] for box in question.boxes]
    return bool(frames) and len(set(frames)) == len(frames)


def covered(box: Box, rows: int, columns: int, side: float) -> np.ndarray:
    """Cells of a grid, `side` pixels wide each, that show what is in a box, bool [rows, columns]."""
    x0, y0, x1, y1 = (edge / side for edge in box[1:])
    xs, ys = np.arange(columns), np.arange(rows)
    across = np.minimum(x1, xs + 1) - np.maximum(x0, xs)
    down = np.minimum(y1, ys + 1) - np.maximum(y0, ys)
    share = np.outer(down.clip(0), across.clip(0)) / min(1, max(1e-6, (x1 - x0) * (y1 - y0)))
    return share >= min(0.3, share.max())


def letters(question: Question, pad: float) -> list[tuple[str, Box]]:
    """Each character of a code with the box that it stands in, evenly spread over the question's box but for `pad`."""
    frame, left, top, right, bottom = question.boxes[0]
    step = (right - left - 2 * pad) / len(question.answer)
    starts = [left + pad + i * step for i in range(len(question.answer))]
    return [(letter, (frame, x, top, x + step, bottom)) for letter, x in zip(question.answer, starts)]


def draw(task: Task, split: str, seed: int, part: int, size: int) -> list[Item]:
    """Items of one part, which mostly share one size: a function of its arguments."""
    rest = int(np.random.default_rng((seed, part, 1)).integers(PERIOD))
    return [task.item(split, seed, (part * size + i) * PERIOD + rest) for i in range(size)]

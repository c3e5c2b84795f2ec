"""Exact match on the held-out test set, by the plain processor and greedy `generate`.

With what it takes to judge it: intervals, chance, a majority guesser, a reader of the question alone, and
pictures robbed of detail or of everything.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from vtok.zoo import scenes
from vtok.zoo.scenes import CATEGORIES, Question, Scene

TEST_SEED = 2026
TEST_SCENES = 300  # about 2100 questions
TOKENS = 8  # of an answer at most


@dataclass(frozen=True)
class Record:
    scene: int
    category: str
    question: str
    answer: str
    predicted: str


def held_out(count: int = TEST_SCENES) -> Iterator[tuple[Scene, list[Question]]]:
    """The fixed test set, scene by scene: one question of every category that applies.

    A smaller count is a prefix of it.
    """
    for index in range(count):
        scene = scenes.generate("test", TEST_SEED, index)
        first = {q.category: q for q in reversed(scene.questions)}
        yield scene, [first[c] for c in CATEGORIES if c in first]


def answer(model, processor, image: Image.Image, questions: list[str]) -> list[str]:
    """Greedy answers to questions about one picture, each asked alone."""
    from vtok.eval.tasks import answers  # which knows this file's seed
    from vtok.eval.tasks.task import Item, Question

    asked = tuple(Question("", text, "") for text in questions)
    return answers.answer(model, processor, Item(0, "image", (image,), asked), tokens=TOKENS)


def halved(image: Image.Image) -> Image.Image:
    """The picture with no more detail than half its resolution holds, which is the most a thumbnail sees."""
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def grey(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, (128, 128, 128))


def run(model, processor, count: int = TEST_SCENES, change: Callable = lambda image: image, progress=iter):
    """Records of the first `count` test scenes, the pictures passed through `change` first."""
    records = []
    for index, (scene, asked) in enumerate(progress(held_out(count))):
        said = answer(model, processor, change(scene.image), [q.text for q in asked])
        records += [Record(index, q.category, q.text, q.answer, text) for q, text in zip(asked, said)]
    return records


def accuracy(records: list[Record]) -> dict[str, float]:
    """Share of exact matches per category."""
    hits = defaultdict(list)
    for r in records:
        hits[r.category].append(r.predicted == r.answer)
    return {c: sum(hits[c]) / len(hits[c]) for c in CATEGORIES if hits[c]}


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share. Scenes are independent and a category has one question per scene."""
    centre, spread = hits + z * z / 2, z * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return (centre - spread) / (n + z * z), (centre + spread) / (n + z * z)


def bootstrap(records: list[Record], draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the share over all categories, scenes redrawn whole: the questions of a scene are not
    independent."""
    hits, n = np.zeros((2, max(r.scene for r in records) + 1))
    for r in records:
        hits[r.scene] += r.predicted == r.answer
        n[r.scene] += 1
    picks = np.random.default_rng(0).integers(len(n), size=(draws, len(n)))
    low, high = np.percentile(hits[picks].sum(1) / n[picks].sum(1), [2.5, 97.5])
    return float(low), float(high)


def guessers(count: int = 3000) -> tuple[dict[str, str], dict[str, str]]:
    """What the training scenes answer most: by category, and by the wording of the question."""
    by_category, by_text = defaultdict(Counter), defaultdict(Counter)
    for index in range(count):
        for q in scenes.generate("train", 0, index).questions:
            by_category[q.category][q.answer] += 1
            by_text[q.text][q.answer] += 1
    return tuple({key: c.most_common(1)[0][0] for key, c in counts.items()} for counts in (by_category, by_text))


def chance(category: str) -> float:
    """Share that drawing an answer at random gets right."""
    known = scenes.ANSWERS[category]
    letters = len(scenes.ALPHABET)
    return 1 / len(known) if known else 1 / (letters**2 + letters**3)


def report(model, processor, count: int | None = None, robbed: int = 100, progress=iter) -> dict:
    """Everything the card says about quality, ready for JSON.

    count: test scenes; all if left out. The first `robbed` are also asked about without detail and without content.
    """
    count = count or TEST_SCENES
    robbed = min(robbed, count)
    records = run(model, processor, count, progress=progress)
    half = accuracy(run(model, processor, robbed, halved, progress))
    none = accuracy(run(model, processor, robbed, grey, progress))
    majority, blind = guessers()
    rows, confusion = {}, {}
    for category in CATEGORIES:
        mine = [r for r in records if r.category == category]
        hits = sum(r.predicted == r.answer for r in mine)
        low, high = wilson(hits, len(mine))
        rows[category] = {
            "n": len(mine),
            "accuracy": hits / len(mine),
            "low": low,
            "high": high,
            "chance": chance(category),
            "majority": sum(r.answer == majority[category] for r in mine) / len(mine),
            "question_only": sum(r.answer == blind.get(r.question) for r in mine) / len(mine),
            "half_resolution": half[category],
            "grey_picture": none[category],
        }
        pairs = Counter((r.answer, r.predicted) for r in mine)
        confusion[category] = [[a, p, n] for (a, p), n in sorted(pairs.items())]
    low, high = bootstrap(records)
    hits = sum(r.predicted == r.answer for r in records)
    reading = [(a, p) for r in records if r.category == "reading" for a, p in zip(r.answer, r.predicted.ljust(3))]
    return {
        "test_set": {"version": scenes.VERSION, "seed": TEST_SEED, "scenes": count, "robbed_scenes": robbed},
        "overall": {"n": len(records), "accuracy": hits / len(records), "low": low, "high": high},
        "letters": {"n": len(reading), "accuracy": sum(a == p for a, p in reading) / len(reading)},
        "categories": rows,
        "confusion": confusion,
        "records": [asdict(r) for r in records if r.predicted != r.answer][:40],
    }

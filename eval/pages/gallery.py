"""The gallery of `vtok report`: questions at which methods disagree, asked again, with the kept tokens drawn."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vtok import draw, show, zoo
from vtok.eval.results import sweep
from vtok.eval.results.cells import OWN_LIMIT, Cell, baselines, smaller_picture
from vtok.eval.results.results import Results, Several
from vtok.eval.results.verdicts import headline
from vtok.eval.tasks.answers import answer
from vtok.eval.tasks.task import Item
from vtok.media import Clip
from vtok.runs import DENSE

FRAMES = 4  # of a clip's planes of tokens, in a row
WIDTH, SCALE = 1000, 0.55  # of a drawing in the page: pixels, and part of those that were drawn, both at most

Gallery = tuple[str, list[tuple[str, bytes]]]  # what to say, and (question and right answer, WebP) of each picture


def draw_all(
    model: Several, leaders: Sequence[str], count: int, device: str = "cpu", dtype: str | None = None
) -> list[Gallery]:
    """A gallery for each of the model's tasks that have a tab, of `count` pictures at most.

    The model is run again on these questions; where that is not possible the words say why, and there are no pictures.
    """
    if not count:
        return [("Left out, as asked.", [])] * len(model.shown)
    if model.model not in zoo.names():
        words = f"Not drawn: {model.model} is not bundled with this version of vtok, so it cannot be run again."
        return [(words, [])] * len(model.shown)
    about = model.tasks[0].about
    network, processor = zoo.load(model.model, about["dtype"], device)
    same = sweep.fingerprint(network) == about["weights"]
    network = network.to(getattr(torch, dtype or about["dtype"]))
    return [
        _of_task(network, processor, results, leaders, count)
        if same and results.about["test_set"] == sweep.test_set(results.task)
        else ("Not drawn: the bundled weights or the test set have changed since these results were made.", [])
        for results in model.shown
    ]


def _of_task(model: Any, processor: Any, results: Results, leaders: Sequence[str], count: int) -> Gallery:
    best, small = headline(results), smaller_picture()
    budget = best.budget if best else results.budgets[0]
    there = [row.method for row in results.at(budget)]
    drawn = [name for name in there if name in baselines() and name != OWN_LIMIT]
    rivals = sorted(drawn, key=lambda n: (n != small, there.index(n)))
    methods = [name for name in leaders if name in there][:3] + rivals[:2]
    chosen = disputed(results, budget, methods, count)
    if not chosen:
        return "There is no question at which these methods disagree and the dense model is right.", []
    items = list(results.task.held_out(max(item for item, _ in chosen) + 1))
    pictures = []
    for index, n in chosen:
        question = items[index].questions[n]
        asked = replace(items[index], questions=(question,))
        drawn = panels(model, processor, asked, methods, budget, results.about["instruction"])
        pictures.append((f"{question.text} Right: {question.answer}", _webp(drawn)))
    words = (
        f"{len(pictures)} question{'s' * (len(pictures) > 1)} that the dense model gets right and these methods, at "
        f"{100 * budget:g} % of the tokens, divide about evenly, asked again for this page. What no decoder layer "
        "looks at is faded; wrong answers are red."
    )
    return words, pictures


def disputed(results: Results, budget: float, methods: Sequence[str], count: int) -> list[tuple[int, int]]:
    """(item, question) of up to `count` questions that the dense model gets right and about half of the methods get
    wrong: of different categories as far as there are, and of different items."""
    ranked = []
    answers = [results.right[Cell(name, budget)] for name in methods]
    seen: dict[int, int] = {}
    for i, (item, kind) in enumerate(results.questions):
        n = seen[item] = seen.get(item, -1) + 1
        got = [bool(right[i]) for right in answers]
        if results.right[results.dense_cell][i] and 0 < sum(got) < len(got):
            ranked.append((abs(sum(got) - len(got) / 2), item, n, kind))
    ranked.sort()
    chosen: list[tuple[int, int]] = []
    used: set[Any] = set()
    for again in (False, True):  # first one a category, then whatever is left
        for _, item, n, category in ranked:
            if len(chosen) < count and item not in used and (again or category not in used):
                chosen.append((item, n))
                used |= {item, category}
    return chosen


def panels(model: Any, processor: Any, item: Item, methods: Sequence[str], budget: float, instruction: str = "") -> Any:
    """The dense model and each method, with its answer to the one question of the item, over its picture; over a clip's
    frames side by side."""

    runs = []
    for method in methods:
        with Cell(method, budget).patch(model) as handle:
            said = answer(model, processor, item, instruction)
            runs.append((method, said[0], handle.trace))
    reference = runs[0][2]
    runs.insert(0, (DENSE, answer(model, processor, item, instruction)[0], None))
    shown = [draw.panel(*run, reference) for run in runs]
    if item.media != "video":
        return draw.panels(item.images[0], shown, item.questions[0].text, columns=3)
    clip, planes = Clip(item.images, item.fps), len(shown[0].layout.planes)
    across = min(planes, FRAMES)
    strip = show.contact_sheet(clip, planes, across)
    return draw.panels(strip, [show.on_sheet(each, across) for each in shown], item.questions[0].text, columns=2)


def _webp(image: Any) -> bytes:
    scale = min(WIDTH / image.width, SCALE)
    with io.BytesIO() as file:
        small = image.resize((round(image.width * scale), round(image.height * scale)))
        small.save(file, format="WEBP", quality=76, method=6)
        return file.getvalue()

"""What `vtok search` asks a model, validation questions of the task `scenes`; the judgement on its test set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from vtok.compressor import Compressor
from vtok.eval.results.statistics import interval
from vtok.eval.tasks.answers import answer
from vtok.eval.tasks.scenes import TASK
from vtok.eval.tasks.task import TEST_SEED, Question
from vtok.patching import patch

SEED = TEST_SEED  # of the validation scenes: another split than the test set's


def validation(count: int, instruction: str = "") -> list[tuple[Image.Image, list[Question]]]:
    """The first `count` validation questions, scene by scene, one of every category that applies, with `instruction`
    behind each."""
    asked: list[tuple[Image.Image, list[Question]]] = []
    left = count
    while left > 0:
        scene = TASK.item("val", SEED, len(asked))
        first = {q.category: q for q in reversed(scene.questions)}
        chosen = [first[c] for c in TASK.categories if c in first][:left]
        asked.append((scene.images[0], [replace(q, text=q.asked(instruction)) for q in chosen]))
        left -= len(chosen)
    return asked


def judged(
    model: Any,
    processor: Any,
    methods: dict[str, Compressor | str],
    count: int,
    instruction: str = "",
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[dict[str, Any]]:
    """Right answers on the first `count` scenes of the test set: of the dense model and of each method a row with its
    accuracy, mean keep, and the paired difference to the first method, 95 % intervals from a bootstrap over scenes."""
    runs = {"dense": None, **{name: method for name, method in methods.items() if not isinstance(method, str)}}
    hits, keeps = {}, {}
    for name in progress(list(runs)):
        rows, kept = [], []
        with nullcontext() if runs[name] is None else patch(model, runs[name]) as handle:
            for scene in TASK.held_out(count):
                said = answer(model, processor, scene, instruction)
                rows.append((sum(map(TASK.score, (q.answer for q in scene.questions), said)), len(said)))
                kept.append(1.0 if handle is None else handle.trace.mean_keep)
        hits[name], keeps[name] = np.array(rows), sum(kept) / len(kept)  # [scenes, 2]
    reference = hits[next(iter(methods))]
    found = []
    for name, mine in hits.items():
        n, gain = mine[:, 1], mine[:, 0] - reference[:, 0]
        row = {"method": name, "n": int(n.sum()), "accuracy": float(mine[:, 0].sum() / n.sum())}
        row |= {"interval": interval(mine[:, 0], n), "mean_keep": keeps[name]}
        found.append(row | {"to_found": {"difference": float(gain.sum() / n.sum()), "interval": interval(gain, n)}})
    return found + [{"method": name, "refused": why} for name, why in methods.items() if isinstance(why, str)]

"""The measurement behind `vtok probe`: at which decoder layers a method's score finds the tokens that answers need.

A question says with boxes where its answer lies. Of its visual tokens those are needed whose middle lies in a box; if a
box holds no middle, the one in which the box's middle lies. A score finds them as often as it puts a needed token
before another one: the AUC, .5 by chance. Nothing is dropped, so each layer is asked about all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import vtok
from vtok import methods as spelling
from vtok.compressor import load_all
from vtok.errors import InvalidValue, VtokError
from vtok.eval.results import statistics
from vtok.eval.tasks.answers import media
from vtok.eval.tasks.task import Question, Task, tasks
from vtok.files import read_lines
from vtok.media import open_picture
from vtok.prompts import ask, encode
from vtok.stages.llm import InLLM
from vtok.types import Activations, Attention, Layout

SAFE = 0.85  # of an AUC: a needed token is then before 85 % of the others. Ours
QUARTER = 4  # methods whose score says which of so many remain are asked for one in that many


class Watcher(InLLM):
    """Keeps all tokens, and notes how methods would rank them at each layer but the last, in their order."""

    adaptive = True
    paper = "none"

    def __init__(self, methods: dict[str, InLLM], need: str) -> None:
        object.__setattr__(self, "methods", methods)
        object.__setattr__(self, "needs", frozenset({need}))
        object.__setattr__(self, "seen", [])

    def schedule(self, n_layers: int) -> dict[int, None]:
        return dict.fromkeys(range(n_layers - 1))

    def score(self, seen: Attention | Activations) -> Tensor:
        told = seen
        if isinstance(seen, Attention):
            told = replace(seen, remaining=(seen.visual.sum(1) // QUARTER).tolist())
        past = seen.visual.shape[1]
        self.seen.append({name: one.rank(told)[:, -past:].float() for name, one in self.methods.items()})
        return torch.ones_like(seen.visual, dtype=torch.float32)


Watcher.name = "watcher"  # behind the class, so that it is no method that users find


def methods(wanted: Sequence[str] | None = None) -> dict[str, InLLM]:
    """Those named, as `vtok.methods.read` reads them, or all that rank visual tokens inside the decoder."""
    if wanted is None:
        wanted = [name for name, cls in load_all().items() if issubclass(cls, InLLM) and cls.stage == "llm"]
    found = {}
    for spelt in wanted:
        name, values = spelling.read(spelt)
        found[spelt] = load_all()[name](**values)
        if not isinstance(found[spelt], InLLM):
            raise InvalidValue(f"{name} ranks no tokens inside the decoder, so there is nothing to probe.")
    return found


@dataclass(frozen=True)
class Asked:
    """A picture, or several of one prompt, and what is asked about them."""

    name: str
    images: tuple[Image.Image, ...]
    questions: tuple[Question, ...]


def of_tasks(processor: Any, named: Sequence[Task] | None, questions: int) -> Iterable[Asked]:
    """About so many questions with boxes of each task, all whose pictures the processor takes if none is named."""
    takes = [kind for kind in media(processor) if kind != "video"]
    for task in tasks().values() if named is None else named:
        if task.media not in takes:
            if named is not None:
                raise InvalidValue(
                    f"{task.name} shows a {task.media}, and this model is probed with: {', '.join(takes)}."
                )
            continue
        left = questions
        for item in map(task.test_item, range(task.count)):
            pointed = tuple(q for q in item.questions if q.boxes)
            if pointed and left > 0:
                yield Asked(task.name, item.images, pointed)
            left -= len(pointed)


def of_file(file: Path) -> Iterable[Asked]:
    """Of JSON lines {"image": "cat.jpg", "question": "...", "boxes": [[left, top, right, bottom], ...]}, in pixels."""
    for number, line in enumerate(read_lines(file), 1):
        try:
            boxes = tuple((0, *map(float, box)) for box in line["boxes"])
            question, image = str(line["question"]), file.parent / line["image"]
            good = bool(boxes) and all(len(box) == 5 for box in boxes)
        except (TypeError, KeyError, ValueError):
            good = False
        if not good:
            raise InvalidValue(
                f'Line {number} of {str(file)!r} must be {{"image": FILE, "question": TEXT, "boxes": [[left, top, '
                f"right, bottom], ...]}}, boxes in pixels."
            )
        yield Asked(file.name, (open_picture(image),), (Question("", question, "", boxes),))


def needed(layout: Layout, size: tuple[int, int], boxes: Iterable[Sequence[float]]) -> Tensor:
    """[N] bool: the tokens of a picture of `size` (width, height) in which boxes (left, top, right, bottom) lie.

    A thumbnail and a mosaic of crops show the picture each for itself, and so do both need tokens."""
    x0, y0, x1, y1 = (layout.boxes.double() * torch.tensor([*size, *size])).unbind(1)
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    found = torch.zeros(layout.n, dtype=torch.bool)
    for left, top, right, bottom in boxes:
        inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
        across, down = (left + right) / 2, (top + bottom) / 2
        at = (x0 <= across) & (across < x1) & (y0 <= down) & (down < y1)
        for plane, start in zip(layout.planes, layout.starts):
            here = slice(start, start + plane.size)
            found[here] |= inside[here] if inside[here].any() else at[here]
    return found


def auc(score: Tensor, wanted: Tensor) -> float:
    """How often one of the `wanted` [N] bool has a higher score [N] than one of the others; a tie counts half."""
    high, low = score[wanted][:, None], score[~wanted][None]
    return ((high > low).double() + (high == low).double() / 2).mean().item()


def look(model: Any, processor: Any, asked: Asked, found: dict[str, InLLM]) -> dict[str, np.ndarray]:
    """Method -> [questions, layers - 1] AUC, of those questions for which some tokens are needed and some are not."""
    inputs = encode(processor, [ask(q.text, *asked.images) for q in asked.questions]).to(model.device)
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    result: dict[str, np.ndarray] = {}
    for need in ("attention", "ffn"):
        of_need = {name: method for name, method in found.items() if need in method.needs}
        if not of_need:
            continue
        watcher = Watcher(of_need, need)
        with vtok.patch(model, watcher) as patch, torch.inference_mode():
            model(**inputs, use_cache=True, logits_to_keep=1)
            trace = patch.trace
        each = len(asked.images)
        rows = trace.rows_at(0)
        for name in of_need:
            values = []
            for b, question in enumerate(asked.questions):
                pictures = trace.pictures[b * each : (b + 1) * each]
                wanted = [
                    needed(p.layout, asked.images[i].size, [box[1:] for box in question.boxes if box[0] == i])
                    for i, p in enumerate(pictures)
                ]
                wanted = torch.cat(wanted)
                if not wanted.any() or wanted.all():
                    continue
                places = torch.cat([p.tokens.cpu() for p in pictures]) - b * trace.length
                columns = (rows.index[b].cpu()[None] == places[:, None]).long().argmax(1)
                values.append([auc(layer[name][b].cpu()[columns], wanted) for layer in watcher.seen])
            result[name] = np.array(values).reshape(len(values), -1)
    return result


def run(
    model: Any,
    processor: Any,
    asked: Iterable[Asked],
    found: dict[str, InLLM],
    safe: float,
    step: Callable[[str], None],
) -> dict[str, Any]:
    """What probe.json holds of a model, but for its name. found: the methods. Raises `InvalidValue` where no question
    points anywhere."""
    items, counts = [], {}
    refused = {name: why for name, one in found.items() if (why := _refusal(model, one))}
    found = {name: one for name, one in found.items() if name not in refused}
    for one in asked:
        step(one.name)
        item = look(model, processor, one, found)
        n = len(next(iter(item.values())))
        if n:
            items.append(item)
            counts[one.name] = counts.get(one.name, 0) + n
    if not items:
        raise InvalidValue("No question has a box that parts the picture's tokens: there is nothing to find.")
    number = np.array([len(next(iter(item.values()))) for item in items])
    told = {}
    for name in found:
        sums = np.stack([item[name].sum(0) for item in items])  # [items, layers]
        mean = sums.sum(0) / number.sum()
        spans = [statistics.interval(column, number) for column in sums.T]
        told[name] = {
            "auc": [round(float(x), 4) for x in mean],
            "interval": [[round(x, 4) for x in span] for span in spans],
            "safe": earliest(mean, safe),
        }
    return {"layers": len(mean) + 1, "safe": safe, "questions": counts, "methods": told, "not_probed": refused}


def earliest(auc: Sequence[float], safe: float) -> int | None:
    """The first layer from which on no layer in the next tenth of the depth is below `safe`; None where there is none.

    One layer alone may be above it by chance, and methods that go on dropping rank by the next ones too."""
    span = max(1, round((len(auc) + 1) / 10))
    return next((i for i in range(len(auc)) if all(x >= safe for x in auc[i : i + span])), None)


def _refusal(model: Any, method: InLLM) -> str | None:
    try:
        vtok.patch(model, Watcher({}, next(iter(method.needs)))).remove()
    except VtokError as error:
        return str(error)
    return None


def draw(file: Path, probe: dict[str, Any], title: str) -> None:
    """Write the curves as a PNG. Methods with the same curve have one line."""
    from vtok import draw as drawing

    drawing.check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4.5), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    lines: dict[tuple[float, ...], list[str]] = {}
    for name, told in probe["methods"].items():
        lines.setdefault(tuple(told["auc"]), []).append(name)
    for curve, names in lines.items():
        told = probe["methods"][names[0]]
        label = ", ".join(names) + (f": from layer {told['safe']}" if told["safe"] is not None else ": no safe layer")
        (line,) = axes.plot(range(len(curve)), curve, linewidth=1.8, label=label)
        low, high = zip(*told["interval"])
        axes.fill_between(range(len(curve)), low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.axhline(0.5, color="#7a7a7a", linewidth=0.8, linestyle=":")
    axes.axhline(probe["safe"], color="#7a7a7a", linewidth=0.8, linestyle="--")
    axes.set(xlabel="decoder layer", ylabel="AUC of the needed tokens", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(title, fontsize=10, parse_math=False)
    FigureCanvasAgg(figure)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)

"""The measurement behind `vtok calibrate`: how many tokens pictures need, by their own redundancy, for a stated loss.

Every item is answered with all tokens and with each of `KEEPS`. A setting gives each item one of these, so its loss is
looked up. Settings are tried from the most careful one down, as long as a bound on their mean loss, of items redrawn,
is at most what was allowed; the last is taken. So the loss is within it at the stated confidence (fixed sequences of
Angelopoulos et al., Learn then Test, arXiv 2110.01052). The one fixed keep that the same rule gives stands beside.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vtok
from vtok.calibration import Calibration, needed, rounded_up, spectrum
from vtok.compressor import find
from vtok.errors import InvalidValue, Unsupported
from vtok.eval.bench import machine
from vtok.eval.bench.resume import begun
from vtok.eval.results import statistics
from vtok.eval.tasks.answers import answer, media
from vtok.eval.tasks.task import Item, Question, Task, normal
from vtok.files import read_lines, write_json
from vtok.media import open_clip, open_picture
from vtok.stages.pre_llm import PreLLM
from vtok.types import Selection, VisualTokens

KEEPS = (0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 1.0)
SCALES = (100.0, *(4 * 0.94**i for i in range(64)))  # falling; at 100 every picture keeps all
CONFIDENCE = 0.95


class Watcher(PreLLM):
    """Keeps all tokens, and notes the spectrum of each picture."""

    paper = "none"

    def __init__(self) -> None:
        super().__init__(keep=0.5)
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "widths", set())

    def select(self, tokens: VisualTokens) -> Selection:
        self.seen.extend(spectrum(tokens.features)[:, None].cpu())
        self.widths.add(tokens.features.shape[-1])
        return Selection(torch.ones(tokens.features.shape[:2], dtype=torch.bool, device=tokens.features.device))


Watcher.name = "watcher"  # behind the class, so that it is no method that users find


@dataclass(frozen=True)
class Seen:
    """One item. needs: of each picture, a fraction of the tokens. lost: [KEEPS, questions] right answers of the dense
    model less those at each keep; without a right answer, whether it answers otherwise."""

    needs: tuple[float, ...]
    lost: np.ndarray

    def keeps(self, scale: float) -> list[float]:
        """Of each picture."""
        return rounded_up(self.needs, scale, KEEPS)

    def at(self, scale: float) -> int:
        """Which of `KEEPS` the item is judged at: the smallest of its pictures, on the careful side."""
        return KEEPS.index(min(self.keeps(scale)))


@dataclass(frozen=True)
class Asked:
    """What was measured; what may be lost is decided behind it."""

    model: str
    weights: str
    method: str
    options: dict[str, Any]
    data: str
    items: int


# ---- what is asked ---------------------------------------------------------------------------------------------------
def of_tasks(tasks: Sequence[Task], split: str, count: int, seed: int = 0) -> Iterable[Item]:
    """So many items of each task. "test" are those of its fixed test set, on which calibration must not look."""
    for task in tasks:
        for i in range(count):
            yield task.test_item(i) if split == "test" else task.item(split, seed, i)


def of_file(file: Path) -> list[Item]:
    """Of JSON lines {"image": "cat.jpg", "question": "...", "answer": "..."}: a clip is {"clip": "film.mp4"}, and the
    answer may be left out. Questions of one picture are one item."""
    found: dict[tuple[str, str], list[Question]] = {}
    for number, line in enumerate(read_lines(file), 1):
        kind = "clip" if isinstance(line, dict) and "clip" in line else "image"
        if not (isinstance(line, dict) and isinstance(line.get(kind), str) and isinstance(line.get("question"), str)):
            raise InvalidValue(
                f'Line {number} of {str(file)!r} must be {{"image": FILE, "question": TEXT}}, with "clip" for a film '
                f'and "answer" where you know it.'
            )
        asked = Question("", line["question"], str(line.get("answer", "")))
        found.setdefault((kind, line[kind]), []).append(asked)
    items = []
    for i, ((kind, name), questions) in enumerate(found.items()):
        if kind == "clip":
            clip = open_clip(file.parent / name)
            items.append(Item(i, "video", tuple(clip.frames), tuple(questions), clip.fps))
        else:
            items.append(Item(i, "image", (open_picture(file.parent / name),), tuple(questions)))
    return items


def told(file: Path) -> str:
    """The file's name and 12 digits of a hash of its lines: answers to others are not taken for answers to these."""
    return f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"


# ---- what is answered ------------------------------------------------------------------------------------------------
def look(model: Any, processor: Any, method: str, options: dict[str, Any], item: Item) -> dict[str, Any]:
    """One item at every keep: `Seen`'s fields, and the width of the tokens. Raises `Unsupported` where the model takes
    no such item."""
    if item.media not in media(processor):
        raise Unsupported(f"The model takes {', '.join(media(processor))}, and item {item.index} is {item.media}.")
    watcher = Watcher()
    with vtok.patch(model, watcher):
        dense = answer(model, processor, item)
    lost = []
    with vtok.patch(model, method, keep=KEEPS[0], **options) as patch:
        for keep in KEEPS[:-1]:
            with patch.using(keep=keep):
                lost.append(losses(item, dense, answer(model, processor, item)))
    needs = [needed(spectrum).item() for spectrum in watcher.seen]
    return {"needs": needs, "lost": [*lost, [0] * len(item.questions)], "width": watcher.widths.pop()}


def losses(item: Item, dense: Sequence[str], said: Sequence[str]) -> list[int]:
    """Of each question: 1 lost, -1 won, against the dense model; without a right answer 1 where it says otherwise."""
    return [
        (normal(was) == normal(q.answer)) - (normal(now) == normal(q.answer))
        if q.answer
        else int(normal(was) != normal(now))
        for q, was, now in zip(item.questions, dense, said)
    ]


# ---- what is concluded -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Setting:
    """scale, keep: one of them. kept: mean keep of the items. lost: mean loss of the questions, and its bound."""

    kept: float
    lost: float
    bound: float
    scale: float | None = None
    keep: float | None = None


def bound(lost: Sequence[np.ndarray]) -> float:
    """On the mean loss of a question, items redrawn; never below what so many items can miss (1 in 20 for 59 of them,
    at 95 %)."""
    sums, counts = totals(lost)
    drawn = np.nanpercentile(statistics.redrawn(sums[None], counts[None])[0], 100 * CONFIDENCE)
    return max(float(drawn), unseen(len(lost)))


def totals(lost: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[items] what is lost of each, and how many questions it has."""
    return np.array([x.sum() for x in lost]), np.array([len(x) for x in lost])


def unseen(items: int) -> float:
    """How often something may happen that none of so many items shows."""
    return 1 - (1 - CONFIDENCE) ** (1 / items)


def settings(seen: Sequence[Seen]) -> tuple[list[Setting], list[Setting]]:
    """Of each scale and of each fixed keep, from the most careful one down."""
    by_scale, by_keep = [], []
    for scale in SCALES:
        lost = [item.lost[item.at(scale)] for item in seen]
        kept = float(np.mean([np.mean(item.keeps(scale)) for item in seen]))
        by_scale.append(Setting(kept, float(np.concatenate(lost).mean()), _bound(lost, kept), scale))
    for k in reversed(range(len(KEEPS))):
        lost = [item.lost[k] for item in seen]
        at = _bound(lost, KEEPS[k])
        by_keep.append(Setting(KEEPS[k], float(np.concatenate(lost).mean()), at, keep=KEEPS[k]))
    return by_scale, by_keep


def _bound(lost: Sequence[np.ndarray], kept: float) -> float:
    return 0.0 if kept == 1 else bound(lost)  # of all tokens nothing is lost


def last_within(found: Sequence[Setting], loss: float) -> Setting:
    """The last before the first whose bound is above the loss."""
    good = found[0]
    for setting in found:
        if setting.bound > loss:
            break
        good = setting
    return good


def run(
    model: Any,
    processor: Any,
    asked: Asked,
    items: Sequence[Item],
    loss: float,
    out: Path,
    step: Callable[[], None],
) -> dict[str, Any]:
    """What the file of a calibration holds, written to `out`, after each item what there is: a run that was killed goes
    on, and one with another loss asks nothing anew. Raises `InvalidValue` where so few items cannot show so small a
    loss."""
    if find(asked.method).stage != "pre_llm":
        raise InvalidValue(f"keep='auto' is for methods before the language model, and {asked.method} is none.")
    if unseen(len(items)) > loss:
        least = math.ceil(math.log(1 - CONFIDENCE) / math.log(1 - loss))
        raise InvalidValue(
            f"{len(items)} items cannot show that at most {loss:.1%} is lost: it takes {least} at a confidence of "
            f"{CONFIDENCE:.0%}. Give more, or allow more."
        )
    found = begun(out, asked, machine.describe(model.device.type, str(model.dtype).removeprefix("torch.")))
    rounds = found["rounds"]
    for i, item in enumerate(items):
        if str(i) not in rounds:
            rounds[str(i)] = look(model, processor, asked.method, asked.options, item)
            write_json(out, found)
        step()
    seen = [Seen(tuple(x["needs"]), np.array(x["lost"])) for x in rounds.values()]
    by_scale, by_keep = settings(seen)
    auto, fixed = last_within(by_scale, loss), last_within(by_keep, loss)
    found |= Calibration(asked.method, auto.scale, KEEPS, rounds["0"]["width"], loss).to_dict()
    found |= {"auto": vars(auto), "fixed": vars(fixed), "tried": [vars(x) for x in by_scale + by_keep]}
    found |= {"confidence": CONFIDENCE, "questions": sum(x.lost.shape[1] for x in seen)}
    write_json(out, found)
    return found


def held_out(
    model: Any, processor: Any, found: dict[str, Any], file: Path, items: Sequence[Item], step: Callable[[], None]
) -> dict[str, Any]:
    """What `run` found, and what both its settings lose on items that they were not found on, and how much they keep;
    written to its file, too."""
    both = {"auto": {"keep": "auto", "calibration": file}, "fixed": {"keep": found["fixed"]["keep"]}}
    lost: dict[str, list[np.ndarray]] = {kind: [] for kind in both}
    kept: dict[str, list[float]] = {kind: [] for kind in both}
    for item in items:
        dense = answer(model, processor, item)
        for kind, given in both.items():
            with vtok.patch(model, found["method"], **found["asked"]["options"], **given) as patch:
                lost[kind].append(np.array(losses(item, dense, answer(model, processor, item))))
                kept[kind].append(patch.trace.mean_keep)
        step()
    found = found | {"held_out": {kind: _summed(lost[kind], kept[kind]) for kind in both}}
    write_json(file, found)
    return found


def _summed(lost: Sequence[np.ndarray], kept: Sequence[float]) -> dict[str, Any]:
    sums, counts = totals(lost)
    interval = statistics.interval(sums, counts) if statistics.enough(len(lost), counts.sum()) else None
    number = float(sums.sum() / counts.sum())
    return {"kept": float(np.mean(kept)), "lost": number, "interval": interval, "items": len(lost)}

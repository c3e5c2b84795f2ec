"""How good a bundled model is (`vtok zoo eval`): exact match on the held-out items of the offline tasks, by the plain
processor and greedy `generate`.

With what it takes to judge it: intervals, chance, guessers without eyes, and media robbed of detail or of everything.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.table import Table
from scipy import stats

from vtok import zoo
from vtok.eval.results.statistics import interval
from vtok.eval.tasks import task as offline
from vtok.eval.tasks.answers import answer
from vtok.eval.tasks.fingerprint import fingerprint
from vtok.eval.tasks.task import TEST_SEED, Item, Question, Task, blind_baseline
from vtok.markdown import percent

WRONG = 4  # examples of each category to keep
ROBBED = 60  # items of each task that are also asked about without detail and without content
LEARN = 2000  # training items that the guessers see
GUESSES = ("chance", "majority", "question_only")


@dataclass(frozen=True)
class Record:
    scene: int  # index of the item
    category: str
    question: str
    answer: str
    predicted: str  # the answer itself where what was said counts as right


def run(
    model: Any,
    processor: Any,
    task: Task,
    count: int | None = None,
    change: Callable[[Image.Image], Image.Image] = lambda image: image,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = iter,
) -> list[Record]:
    """Records of the first `count` test items, all pictures and frames passed through `change` first."""
    records = []
    for item in progress(task.held_out(count)):
        seen = replace(item, images=tuple(map(change, item.images)))
        for q, said in zip(item.questions, answer(model, processor, seen) if item.questions else ()):
            said = q.answer if task.score(q.answer, said) else said
            records.append(Record(item.index, q.category, q.text, q.answer, said))
    return records


def halved(image: Image.Image) -> Image.Image:
    """The picture with no more detail than half its resolution holds, which is the most a thumbnail sees."""
    small = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def grey(image: Image.Image) -> Image.Image:
    return Image.new("RGB", image.size, (128, 128, 128))


def report(
    model: Any,
    processor: Any,
    tasks: Mapping[str, Task],
    count: int | None = None,
    robbed: int = ROBBED,
    learn: int = LEARN,
    progress: Callable[[Iterable[Item]], Iterable[Item]] = iter,
) -> dict[str, Any]:
    """Everything that the card says about quality, ready for JSON.

    count: test items of each task, all if left out. The first `robbed` are also asked about without detail and without
    content. learn: training items that the guessers see.
    """
    rows, confusion, wrong, by_task = {}, {}, [], {}
    everything: list[np.ndarray] = []
    for name, task in tasks.items():
        items = min(count or task.count, task.count)
        records = run(model, processor, task, items, progress=progress)
        half, none = (run(model, processor, task, min(robbed, items), change, progress) for change in (halved, grey))
        blind = blind_baseline(task, learn, items)
        for category in task.categories:
            mine, part, bare = ([r for r in some if r.category == category] for some in (records, half, none))
            if not mine:
                continue
            rows[f"{name}/{category}"] = {
                **_share(mine),
                **{key: blind[category][key] for key in GUESSES},
                "half_resolution": _share(part)["accuracy"] if part else None,
                "grey_picture": _share(bare)["accuracy"] if bare else None,
            }
            pairs = Counter((r.answer, r.predicted) for r in mine)
            confusion[f"{name}/{category}"] = [[a, p, n] for (a, p), n in sorted(pairs.items())]
            wrong += [{"task": name, **asdict(r)} for r in mine if r.predicted != r.answer][:WRONG]
        everything.append(_per_item(records))
        by_task[name] = {"version": task.version, "fingerprint": fingerprint(task, min(items, 16)), "items": items}
        by_task[name] |= _redrawn(everything[-1]) | {key: blind[""][key] for key in GUESSES}
    return {
        "test_set": {"seed": TEST_SEED, "robbed_items": robbed, "guessers_items": learn},
        "dtype": str(model.dtype).removeprefix("torch."),
        "overall": _redrawn(np.concatenate(everything)),
        "tasks": by_task,
        "categories": rows,
        "confusion": confusion,
        "records": wrong,
        "demo": demo(model, processor),
    }


def settings(folder: Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """What `report` is given to repeat the evaluation in the folder of a model, eval.json; without one, all tasks.

    names: other tasks.
    """
    file = folder / "eval.json"
    before = json.loads(file.read_text()) if file.exists() else {"tasks": offline.shown(), "test_set": {}}
    found = {"tasks": {name: offline.get(name) for name in names or before["tasks"]}}
    found["robbed"] = before["test_set"].get("robbed_items", ROBBED)
    return found | {"learn": before["test_set"].get("guessers_items", LEARN)}


def table(result: Mapping[str, Any]) -> Table:
    """What the command line shows of a report."""
    drawn = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for heading in ("category", "questions", "exact match", "95 %", "chance"):
        drawn.add_column(heading, justify="left" if heading == "category" else "right", no_wrap=True)
    for name, row in (result["categories"] | {"all": result["overall"]}).items():
        chance = percent(row["chance"]) if "chance" in row else ""
        between = f"{percent(row['low'])} to {percent(row['high'])}"
        drawn.add_row(name, str(row["n"]), percent(row["accuracy"]), between, chance)
    return drawn


def demo(model: Any, processor: Any) -> str:
    """What the model says of the demo's picture."""
    with Image.open(zoo.DEMO_IMAGE) as picture:
        item = Item(0, "image", (picture.convert("RGB"),), (Question("", zoo.DEMO_QUESTION, ""),))
    return answer(model, processor, item)[0]


def _share(records: list[Record]) -> dict[str, Any]:
    """Of right answers to the questions of one category, with Wilson's interval: items are independent, and a category
    has one question an item."""
    hits, n = sum(r.predicted == r.answer for r in records), len(records)
    low, high = stats.binomtest(hits, n).proportion_ci(method="wilson")
    return {"n": n, "accuracy": hits / n, "low": low, "high": high}


def _per_item(records: list[Record]) -> np.ndarray:
    """[items, 2] right answers and questions."""
    found: dict[int, list[bool]] = defaultdict(list)
    for r in records:
        found[r.scene].append(r.predicted == r.answer)
    return np.array([(sum(hits), len(hits)) for hits in found.values()])


def _redrawn(hits: np.ndarray) -> dict[str, Any]:
    """Share of right answers over all categories, items redrawn whole: the questions of an item are not independent."""
    low, high = interval(hits[:, 0], hits[:, 1])
    right, n = hits.sum(0).tolist()
    return {"n": n, "accuracy": right / n, "low": low, "high": high}


def summary(records: list[Record]) -> dict[str, Any]:
    """Share of right answers with its interval, items redrawn whole, and the share of each category."""
    each: dict[str, list[bool]] = defaultdict(list)
    for r in records:
        each[r.category].append(r.predicted == r.answer)
    shares = {category: round(float(np.mean(hits)), 3) for category, hits in each.items()}
    return {**_redrawn(_per_item(records)), "categories": shares}


def mistakes(confusion: list[list], count: int = 3) -> list[tuple[str, str, int]]:
    """The commonest wrong answers of a category: (answer, said, times)."""
    wrong = [(truth, said, n) for truth, said, n in confusion if truth != said]
    return sorted(wrong, key=lambda row: (-row[2], *row[:2]))[:count]

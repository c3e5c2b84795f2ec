"""A line on each model, task and method, and where results come from: what every page says of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

from vtok import zoo
from vtok.adapter import Adapter
from vtok.compressor import load_all
from vtok.eval.results.cells import OWN_LIMIT
from vtok.eval.results.results import PATTERNS, Results
from vtok.eval.results.statistics import FEWEST
from vtok.methods import available

AROUND = "SmolLM2-135M's real weights, 30 layers, behind a small tower"
FEW = (
    f"Below {FEWEST['items']} items or {FEWEST['questions']} questions a result has no interval and carries no verdict "
    "and no recommendation."
)


def family(name: str) -> str:
    """The family of a bundled model; "" of others, of which a summary does not tell it."""
    if name not in zoo.names():
        return ""
    kind = json.loads((zoo.path(name) / "config.json").read_text())["model_type"]
    return next(family for family, facts in available()["adapters"].items() if kind in facts["model_types"])


def default_of(name: str) -> str:
    """The method that `vtok.patch` takes by default: that of a bundled model's family, else of all."""
    known = available()["adapters"]
    return known[family(name)]["default"]["method"] if family(name) else Adapter.default["method"]


def about_models(names: Sequence[str]) -> str:
    """Names, and in the same breath what they are; for the middle of a sentence."""
    toys = [name for name in names if name in zoo.names()]
    told = {zoo.AROUND_SMOLLM2: AROUND}
    others = [f"{name}, {told.get(name, 'which is not bundled with vtok')}" for name in names if name not in toys]
    if not toys:
        return listed(others)
    sizes = listed(f"{_millions(name):.1f}" for name in toys)
    kind = f"{'toys' if len(toys) > 1 else 'a toy'} of {sizes} million parameters on drawn scenes"
    return listed([f"{listed(toys)}, {kind}", *others])


def about_model(name: str) -> str:
    """In a line of its own."""
    if name == zoo.AROUND_SMOLLM2:
        return f"{AROUND}."
    if name not in zoo.names():
        return "Not bundled with vtok, so nothing more is known of it here."
    return f"A toy of {_millions(name):.1f} million parameters, bundled with vtok, of the family {family(name)}."


def _millions(name: str) -> float:
    return json.loads((zoo.path(name) / "training.json").read_text())["parameters"] / 1e6


def about_task(results: Results) -> str:
    """The first sentence of the task's card."""
    return results.task.card.strip().split("\n\n")[0].replace("\n", " ")


def about_method(name: str) -> str:
    """The first sentence of its class, and its paper; "" of a method that is not installed."""
    if name == OWN_LIMIT:
        return "A smaller limit on pixels or tiles in the family's own processor, without vtok (a baseline)"
    cls = load_all().get(name)
    if cls is None:
        return ""
    first = " ".join((cls.__doc__ or "").strip().split("\n\n")[0].split()).replace("`", "")
    return f"{first.split('. ')[0].rstrip('.')} ({'a baseline' if cls.paper == 'baseline' else cls.paper})"


def sources(found: Sequence[Results]) -> str:
    """Which files, which commits, how many questions."""
    commits = dict.fromkeys(run["commit"] for results in found for run in results.runs)
    named = [f"{name.rstrip('+')}{' with local changes' if name.endswith('+') else ''}" for name in commits]
    paths = [PurePosixPath(results.file) for results in found]
    files = sorted({p for path in paths for p in PATTERNS if path.match(p) and len(path.parts) == p.count("/") + 1})
    questions = sum(len(results.questions) for results in found)
    items = sum(results.about["items"] for results in found)
    return (
        f"From {len(found)} file{'s' * (len(found) != 1)} ({', '.join(f'`{f}`' for f in files)}), whose {questions:,} "
        f"questions about {items:,} items were answered at commit {listed(named)}."
    )


def listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def percent_of(share: float) -> str:
    return f"{100 * share:g} %"

"""The page of `vtok report`: what its templates, in templates/, need to know. First all models side by side, then of
each model an overview and its tasks, each behind a tab."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vtok.compressor import load_all
from vtok.eval.pages import words
from vtok.eval.pages.drawings import THEME
from vtok.eval.pages.gallery import Gallery
from vtok.eval.results import verdicts
from vtok.eval.results.cells import OWN_LIMIT, Cell, bare, baselines, calls, smaller_picture
from vtok.eval.results.results import Mean, Results, Row, Several, rival, signed
from vtok.eval.tasks.answers import TOKENS

TEMPLATES = Path(__file__).with_name("templates")
ACROSS = "all-models"  # the address of the tab over all models


@dataclass(frozen=True)
class Tab:
    """One part of the page. found: what an overview is of; results: the task that the tab is about."""

    key: str
    label: str
    found: Several | None = None
    results: Results | None = None
    across: bool = False
    drawings: Sequence[str] = ()
    gallery: Gallery = ("", [])

    @property
    def template(self) -> str:
        return "task.html.j2" if self.results else "overview.html.j2"


def page(models: Sequence[Several], drawings: Mapping[str, Sequence[str]], galleries: Mapping[str, Gallery]) -> str:
    """The whole page. drawings: `key` of a tab -> SVGs; galleries: `key` of a task's tab -> what to show."""
    every = Several([results for model in models for results in model.tasks])
    rows: list[tuple[str, list[Tab]]] = []
    if len(models) > 1:
        rows.append(("", [Tab(ACROSS, "all models", every, across=True)]))
    for model in models:
        own = (
            [Tab(key(model), "overview", model, drawings=drawings.get(key(model), ()))] if len(model.tasks) > 1 else []
        )
        for results in model.shown:
            name = key(model, results)
            tab = Tab(name, results.about["task"], results=results, drawings=drawings[name], gallery=galleries[name])
            own.append(tab)
        rows.append((model.model, own))
    about_methods = _about_methods()
    light, dark = (";".join(f"--{name}:{pair[i]}" for name, pair in THEME.items()) for i in (0, 1))
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            models=models,
            every=every,
            rows=rows,
            tabs=[tab for _, tabs in rows for tab in tabs],
            tasks={results.about["task"]: results for results in every.tasks},
            methods=sorted(
                {bare(cell.method) for results in every.tasks for cell in results.facts} & about_methods.keys()
            ),
            light=light,
            dark=dark,
            css=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
            js=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
        )
    )


def key(model: Several, results: Results | None = None) -> str:
    """The address of a tab within the page: that of a task, or of the model's overview."""
    name = f"{model.model}-{results.about['task'] if results else 'overview'}"
    return "".join(c if c.isalnum() else "-" for c in name)


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters |= {
        "points": points,
        "signed": minus,
        "span": lambda pair, sign=False: " to ".join(map(minus if sign else points, pair)),
        "percent_of": words.percent_of,
        "listed": words.listed,
        "count": lambda n, noun: f"{n:,} {noun}{'s' * (n != 1)}",
        "base64": lambda data: base64.b64encode(data).decode(),
        "dense_points": lambda results: points(results.dense.accuracy.at),
        "lot": lambda results: ratio(results.chance, results.dense.accuracy.at) if results.telling else "not counted",
    }
    made.globals |= {
        name: getattr(verdicts, name)
        for name in (
            "LEVEL",
            "SAME_COST",
            "at_all",
            "drift",
            "filtered",
            "headline",
            "no_better",
            "overall",
            "paired",
            "tied",
        )
    }
    made.globals |= {
        name: getattr(words, name)
        for name in ("FEW", "about_model", "about_models", "about_task", "default_of", "sources")
    }
    made.globals |= {
        "TOKENS": TOKENS,
        "baselines": baselines(),
        "about_methods": _about_methods(),
        "smaller_picture": smaller_picture,
        "bold": lambda text: Markup("<b>{}</b>").format(text),
        "bests": lambda found: [best for budget in found.budgets if (best := found.best(budget))],
        "firsts": lambda results: [results.at(budget)[0] for budget in results.budgets],
        "rival": rival,
        "share_of": share_of,
        "kind_head": kind_head,
        "lots": lots,
        "kept_by_kind": kept_by_kind,
        "by_detail": lambda found: sorted(
            found.methods.items(), key=lambda item: -(item[1][0].at if item[1][0] else 0)
        ),
        "left_out": left_out,
        "provenance": provenance,
    }
    return made


def _about_methods() -> dict[str, str]:
    return {name: words.about_method(name) for name in (*load_all(), OWN_LIMIT)}


def points(share: float) -> str:
    return f"{100 * share:.1f}"


def minus(share: float) -> str:
    return signed(share).replace("-", "−")


def ratio(got: float, of: float) -> str:
    return f"{100 * got / of:.0f}" if of else "–"


def share_of(column: Several | Results, row: Mean) -> float | None:
    """What the row's method keeps of a model's mean, or of a task; None where that says nothing."""
    if isinstance(column, Results):
        if column.enough and not column.telling:
            return None
        return row.tasks[column].at if column in row.tasks else float("nan")
    own = column.rows.get(Cell(row.method, row.budget))
    return own.kept.at if own is not None and own.kept else None


def kind_head(results: Results, kind: str) -> Markup:
    """A kind of question, and how many there are."""
    asked = Counter(name for _, name in results.questions)
    return Markup("{}<small>{}</small>").format(kind, asked[kind])


def lots(results: Results) -> list[str]:
    """What drawing answers by lot would keep, by kind and of all."""
    dense = results.by_kind(results.dense_cell)
    return [ratio(results.task.chance(kind), at) for kind, at in dense.items()] + [
        ratio(results.chance, results.dense.accuracy.at)
    ]


def kept_by_kind(results: Results, row: Row) -> list[float]:
    own, dense = (results.by_kind(cell) for cell in (Cell(row.method, row.budget), results.dense_cell))
    return [own[kind] / dense[kind] if dense[kind] else float("nan") for kind in dense]


def left_out(results: Results) -> list[tuple[str, str]]:
    """(what, why) of all that was not run."""
    found = verdicts.not_run(results.refused)
    out = [(f"{method} at {words.listed(map(words.percent_of, at))}", why) for (method, why), at in found.items()]
    ran = {bare(method) for method in (*(c.method for c in results.facts), *(r["method"] for r in results.refused))}
    untried: dict[bool, list[str]] = {False: [], True: []}
    for name, cls in load_all().items():
        if name not in ran:
            untried[cls.trained].append(name)
    for trained, names in untried.items():
        if names:
            why = "Weights of its own, which have to be trained first." if trained else "Not asked for."
            out.append((words.listed(names), why))
    rest = results.task.count - results.about["items"]
    if rest > 0:
        out.append((f"{rest} of the {results.task.count} test items", "Not asked for; the first ones were taken."))
    return out


def provenance(results: Results) -> dict[str, Any]:
    about, machine = results.about, results.about["machine"]
    earlier = [f"{run['command']} (commit {run['commit']})" for run in results.runs[:-1]]
    test = about["test_set"]
    told = calls((cell.method, row.get("options", {})) for cell, row in results.facts.items())
    return {
        "File": results.file,
        "Model": about["model"],
        "Weights": f"{about['weights']} (first 12 hex digits of a SHA-256 of all of them)",
        "Test set": f"version {test['version']}, seed {test['seed']}, first {about['items']} items, drawn offline",
        "Options": ", ".join(told) or "none",
        "Commit": f"{machine['commit']}{' (with local changes)' if machine['commit'].endswith('+') else ''}",
        "Machine": machine.get("machine", "unknown"),
        "Threads, load": f"{machine.get('threads', 'unknown')}, {machine.get('load', 'unknown')}",
        "Data type": about["dtype"],
        "Versions": f"torch {machine.get('torch', 'unknown')}, transformers {machine.get('transformers', 'unknown')}",
        "Command": machine.get("command", "unknown"),
        "Before it": "; ".join(earlier) or "nothing",
    }

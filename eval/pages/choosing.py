"""docs/choosing.md, written from the summaries of `vtok eval`: which method a user should take, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vtok.compressor import load_all
from vtok.errors import InvalidValue
from vtok.eval.pages.words import FEW, about_models, family, percent_of, sources
from vtok.eval.results.cells import bare, tried
from vtok.eval.results.results import Mean, Results, Several, load
from vtok.eval.results.verdicts import WORTH, hopeless, tied
from vtok.markdown import paragraph, percent
from vtok.methods import available
from vtok.serving.families import FAMILIES

AT = 0.25  # the budget at which engines and families are compared, if it was run; that of the default method


def write(folder: str | Path, out: str | Path) -> Path:
    """Write the page. Raises `InvalidValue` where the folder holds no results, or `out` cannot be written."""
    text, out = page(folder), Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidValue(f"The page could not be written to {str(out)!r} ({error.strerror}).") from error
    return out


def page(folder: str | Path) -> str:
    """The page, from all results in a folder (see `results.read`)."""
    models = load(folder)
    every = Several([results for model in models for results in model.tasks])
    parts = [
        _answer(every),
        _limits(every, models),
        _engines(every),
        _families(every, models),
        _made(every, Path(folder)),
    ]
    return "# Which method to take\n\n" + "\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The best of some methods, and those whose paired difference to it has an interval that holds 0."""

    best: Mean
    tied: tuple[str, ...]

    @property
    def names(self) -> str:
        return " or ".join(_code(name) for name in (self.best.method, *self.tied))

    def __str__(self) -> str:
        return f"{self.names}: {_kept(self)}{'' if self.best.kept.at >= WORTH else ', *not good*'}"


def _at(found: Several) -> float:
    return AT if AT in found.budgets else found.budgets[0]


def _kept(choice: Choice) -> str:
    low, high = choice.best.kept.span
    return f"{percent(choice.best.kept.at)} ({percent(low)} to {percent(high)})"


def choose(found: Several, budget: float, fits: Callable[[str], bool] = lambda _: True) -> Choice | None:
    """The best method by the mean over telling tasks at a budget, of those that fit and ran on all of them; None where
    there is none, as where there are too few questions for a verdict."""
    known = load_all()
    rows = [row for row in found.at(budget) if row.kept and bare(row.method) in known and fits(bare(row.method))]
    return Choice(rows[0], tuple(tied(rows, rows[0]))) if rows else None


# --- the answer


def _answer(every: Several) -> str:
    names = list(dict.fromkeys(results.model for results in every.tasks))
    defaults = {tuple(facts["default"].items()) for facts in available()["adapters"].values()}
    default = " or ".join(f"{_spelt(d)}" for d in sorted(defaults))
    choice = choose(every, _at(every))
    if choice is not None:
        first = (
            f"Take {choice.names} (`vtok.patch(model)` without a name takes {default}): at {percent_of(_at(every))} of "
            f"the visual tokens it keeps {_kept(choice)} % of the dense accuracy of {about_models(names)}. "
        )
    else:
        why = "no model is above chance on any task, or no method ran on all that count."
        why = why if any(r.enough for r in every.tasks) else f"there are too few questions. {FEW}"
        first = (
            f"**No recommendation** at {percent_of(_at(every))} of the visual tokens for {about_models(names)}: {why} "
            f"Without a name `vtok.patch(model)` takes {default}. "
        )
    first += "Nothing here tells what a model of billions of parameters keeps on your photos: measure it (`vtok eval`)."
    head = ["task", *(f"at {percent_of(budget)}" for budget in every.budgets)]
    rows = [["all of them", *(_cell(choose(every, budget)) for budget in every.budgets)]] if every.telling else []
    for name in dict.fromkeys(results.about["task"] for results in every.tasks):
        rows.append([f"{_title(every, name)} (`{name}`)", *_of_task(every, name)])
    words = (
        "What to take and what it keeps of the dense model's accuracy, in percent, with the 95 % interval. *A or B*: A "
        "keeps more here, but the two cannot be told apart. Every task of every model counts the same."
    )
    return "\n\n".join([paragraph(first), paragraph(words), _table(head, rows)]) + "\n"


def _title(every: Several, name: str) -> str:
    return next(results.task.title for results in every.tasks if results.about["task"] == name).rstrip(".")


def _of_task(every: Several, name: str) -> list[str]:
    """A cell for each budget, from the models that carry a recommendation on the task."""
    own = [results for results in every.tasks if results.about["task"] == name]
    good = Several([results for results in own if results.advises])
    if good.tasks:
        return [_cell(choose(good, budget)) for budget in every.budgets]
    return [f"no recommendation: {_why_not(own)}", *[""] * (len(every.budgets) - 1)]


def _why_not(own: Sequence[Results]) -> str:
    if not any(results.enough for results in own):
        return "too few questions"
    best = max(own, key=lambda results: len(results.answered))
    return f"the dense models answer at most {len(best.answered)} of {len(best.by_kind(best.dense_cell))} kinds"


def _cell(choice: Choice | None) -> str:
    return str(choice) if choice else "-"


# --- its limits


def _limits(every: Several, models: Sequence[Several]) -> str:
    left = [f"{r.model} on `{r.about['task']}`" for r in every.tasks if not r.advises]
    weak, first = hopeless(every.tasks), _names(tried(every.tasks))
    lines = [
        "A *budget* is an upper bound of the mean over decoder layers of kept over all visual tokens. "
        f"*Not good* is less than {percent_of(WORTH)} of the dense accuracy.",
        f"No better than the best of the baselines ({first}) at any budget on any task, beyond the interval: "
        + (f"{_names(weak)}. They are not worth their cost on these models." if weak else "none."),
    ]
    if any(family(model.model) for model in models):
        lines.append(
            "The bundled models have few layers, which tells against methods that act within the decoder, and see "
            "drawn pictures, whose redundancy is not that of photos."
        )
    if left:
        lines.append(
            "No recommendation for a task rests on models that are at chance on most of its kinds of question, or were "
            f"asked too few: {', '.join(left)}."
        )
    return "## What it is worth\n\n" + "\n".join(_item(line) for line in lines) + "\n"


def _engines(every: Several) -> str:
    known = {name: facts for name, facts in available()["compressors"].items() if facts["of_pictures"]}
    parts = {name: facts["stage"].split("+") for name, facts in known.items()}
    anchored = {n for n, cls in load_all().items() if any(f.name == "anchor" for f in dataclasses.fields(cls))}
    kinds: list[tuple[str, str, Callable[[str], bool]]] = [
        ("`transformers`", "all", lambda name: True),
        (
            "`patch.compile()`",
            "count in the decoder not by content, none in decoding",
            lambda n: "decode" not in parts[n] and not ("llm" in parts[n] and known[n]["adaptive"]),
        ),
        (
            "vLLM",
            "before the language model, count by the grid, text not read, no weights of its own",
            lambda n: (
                parts[n] == ["pre_llm"]
                and not (known[n]["adaptive"] or known[n]["text_guided"] or load_all()[n].trained)
                and any(load_all()[n].needs <= family.shows for family in FAMILIES.values())
            ),
        ),
        ("training, RL", "text not read: nothing to be given", lambda n: not known[n]["text_guided"]),
        (
            "training, RL",
            'text read: `labels`, or `anchor="after_visual"`',
            lambda n: known[n]["text_guided"] and n in anchored,
        ),
        (
            "training, RL",
            "text read up to the prompt's end: `labels`",
            lambda n: known[n]["text_guided"] and n not in anchored,
        ),
    ]
    rows = []
    for engine, which, fits in kinds:
        names = [name for name in known if fits(name)]
        others = [name for name in known if name not in names]
        listed = _names(names) if len(names) <= len(others) else f"all but {_names(others)}" if others else "all"
        choice = choose(every, _at(every), fits)
        rows.append([engine, which, listed, str(choice) if choice else "not measured"])
    head = ["engine", "methods that go", "they are", f"best at {percent_of(_at(every))}"]
    cache = "What drops columns of the cache instead stands in [Text](text.md)."
    return f"## By engine\n\n{_table(head, rows)}\n\n{cache}\n"


def _families(every: Several, models: Sequence[Several]) -> str:
    known = available()
    rows, unmeasured = [], []
    for name, facts in known["adapters"].items():
        own = [model for model in models if family(model.model) == name]
        if not own:
            unmeasured.append(_code(name))
            continue
        found = Several([results for model in own for results in model.tasks])
        fits = lambda method, name=name: name in known["compressors"][method]["families"]
        choice = choose(found, _at(every), fits)
        default = _spelt(facts["default"].items())
        rows.append([_code(name), _names(m.model for m in own), str(choice) if choice else "no verdict", default])
    head = ["family", "measured on", f"best at {percent_of(_at(every))} without an option", "default"]
    left = f"Not measured, and given the same default: {', '.join(unmeasured)}."
    return f"## By family\n\n{_table(head, rows)}\n\n{paragraph(left)}\n" if rows else f"## By family\n\n{left}\n"


# --- how it was made


def _made(every: Several, folder: Path) -> str:
    words = (
        f"Written by `vtok report {folder.name} --choosing FILE`; do not edit. {sources(every.tasks)} Intervals: 95 %, "
        "percentile bootstrap over items, the same items for all that is compared. "
        f"{FEW} Tables of every method: [the report](report.html) and the models' cards."
    )
    head = ["model", "task", "items", "questions", "dense, % right", "kinds answered", "counts in means"]
    rows = []
    for r in every.tasks:
        low, high = r.dense.accuracy.span or (None, None)
        right = percent(r.dense.accuracy.at) + (f" ({percent(low)} to {percent(high)})" if low is not None else "")
        kinds = f"{len(r.answered)} of {len(r.by_kind(r.dense_cell))}"
        counts = "yes" if r.telling else "no: at chance" if r.enough else "no: too few"
        rows.append([f"`{r.model}`", f"`{r.about['task']}`", r.about["items"], len(r.questions), right, kinds, counts])
    return f"## How it was made\n\n{paragraph(words)}\n\n{_table(head, rows)}\n"


def _names(names: Iterable[str]) -> str:
    return ", ".join(map(_code, names))


def _code(name: str) -> str:
    return f"`{name}`"


def _spelt(items: Any) -> str:
    """A default method as one would write it."""
    values = dict(items)
    return " at ".join([f"`{values.pop('method')}`", *(f"`{key}={value:g}`" for key, value in values.items())])


def _item(text: str) -> str:
    return paragraph(f"- {text}").replace("\n", "\n  ")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table of words: columns to the left."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [head, ["---"] * len(head), *rows])

"""docs/choosing.md, written from the summaries of `vtok eval`: which method a user should take, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from vtok.compressor import load_all
from vtok.errors import InvalidValue
from vtok.eval.pages.words import FEW, about_models, default_of, family, listed, percent_of, sources
from vtok.eval.results import verdicts
from vtok.eval.results.cells import OWN_LIMIT, Cell, bare, drawn_by_lot, tried
from vtok.eval.results.results import Mean, Results, Several, load
from vtok.eval.results.statistics import Number
from vtok.eval.results.verdicts import WORTH, Paired, hopeless, tied
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
        _answer(models),
        _limits(every, models),
        _tests(models),
        _engines(every, models),
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
    def all(self) -> tuple[str, ...]:
        return (self.best.method, *self.tied)

    def __str__(self) -> str:
        names = " or ".join(map(_code, self.all))
        return f"{names}: {_span(self.best.kept)}{'' if self.best.kept.at >= WORTH else ', *not good*'}"


def _at(found: Several) -> float:
    return AT if AT in found.budgets else found.budgets[0]


def _span(number: Number) -> str:
    low, high = number.span
    return f"{percent(number.at)} ({percent(low)} to {percent(high)})"


def choose(found: Several, budget: float, fits: Callable[[str], bool] | None = None) -> Choice | None:
    """The best method by the mean over telling tasks at a budget, of those that fit and ran on all of them, or where
    nothing has to fit also the processor's own limit; None where there is none, as where there are too few questions
    for a verdict."""
    known = load_all()
    good = lambda name: name in known and fits(name) if fits else name in known or name == OWN_LIMIT
    rows = [row for row in found.at(budget) if row.kept and good(bare(row.method))]
    return Choice(rows[0], tuple(tied(rows, rows[0]))) if rows else None


# --- the answer


def _answer(models: Sequence[Several]) -> str:
    budgets = sorted({budget for model in models for budget in model.budgets}, reverse=True)
    words = (
        "What to take and what it keeps of the dense model's accuracy, in percent, with the 95 % interval. *A or B*: A "
        "keeps more here, but the two cannot be told apart. Every task of a model counts the same. There is no mean "
        "over models, and no ranking by one."
    )
    rows = []
    for model in models:
        name = f"`{model.model}`"
        if model.telling:
            rows.append([name, "all that count", *(_cell(choose(model, budget)) for budget in budgets)])
        rows += [
            [name, f"{_title(results)} (`{results.about['task']}`)", *_of_task(results, budgets)]
            for results in model.tasks
        ]
    head = ["model", "task", *(f"at {percent_of(budget)}" for budget in budgets)]
    return "\n\n".join([paragraph(_advice(models)), paragraph(words), _table(head, rows)]) + "\n"


def _advice(models: Sequence[Several]) -> str:
    """What to take: the methods that on no model can be told from the best."""
    at = _at(Several([results for model in models for results in model.tasks]))
    defaults = {tuple(facts["default"].items()) for facts in available()["adapters"].values()}
    default = " or ".join(f"{_spelt(d)}" for d in sorted(defaults))
    chosen = {model: choice for model in models if (choice := choose(model, at))}
    names = about_models([model.model for model in models])
    if chosen:
        first, *others = chosen.values()
        common = [name for name in first.all if all(name in other.all for other in others)]
        common.sort(
            key=lambda name: name not in {method for facts in defaults for key, method in facts if key == "method"}
        )
        if common:
            kept = listed(f"{_span(model.rows[Cell(common[0], at)].kept)} % on {model.model}" for model in chosen)
            said = (
                f"Take {' or '.join(map(_code, common))} (`vtok.patch(model)` without a name takes {default}): at "
                f"{percent_of(at)} of the visual tokens no method is known to be better on {names}. Of the "
                f"dense accuracy {_code(common[0])} keeps {kept}. "
            )
        else:
            best = listed(f"{choice} % on {model.model}" for model, choice in chosen.items())
            said = (
                f"No one method is among the best on all of {names}. Most of the dense "
                f"accuracy is kept at {percent_of(at)} of the visual tokens by {best}. "
                f"Without a name `vtok.patch(model)` takes {default}. "
            )
    else:
        why = "no model is above chance on any task, or no method ran on all that count."
        why = why if any(r.enough for model in models for r in model.tasks) else f"there are too few questions. {FEW}"
        said = (
            f"**No recommendation** at {percent_of(at)} of the visual tokens for {names}: {why} "
            f"Without a name `vtok.patch(model)` takes {default}. "
        )
    billions = (
        "Nothing here tells what a model of billions of parameters keeps on your photos: measure it (`vtok eval`)."
    )
    return said + billions


def _title(results: Results) -> str:
    return results.task.title.rstrip(".")


def _of_task(results: Results, budgets: Sequence[float]) -> list[str]:
    """A cell for each budget, or why there is none."""
    if results.advises:
        return [_cell(choose(Several([results]), budget)) for budget in budgets]
    return [f"no recommendation: {_why_not(results)}", *[""] * (len(budgets) - 1)]


def _why_not(results: Results) -> str:
    if not results.enough:
        return "too few questions"
    return f"the dense model answers {len(results.answered)} of {len(results.by_kind(results.dense_cell))} kinds"


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
            "The toys have eight layers, too few for methods that act within the decoder. Where there are thirty, "
            "`core_tokens`, `fastv` and `schedule` know what to keep behind a layer that `vtok probe` finds safe, for "
            "which a budget of a quarter leaves no room ([measured](probe.md))."
        )
        lines.append("The pictures are drawn, and their redundancy is not that of photos.")
    if left:
        lines.append(
            "No recommendation for a task rests on models that are at chance on most of its kinds of question, or were "
            f"asked too few: {', '.join(left)}."
        )
    return "## What it is worth\n\n" + "\n".join(_item(line) for line in lines) + "\n"


# --- the tests


def _tests(models: Sequence[Several]) -> str:
    lot = drawn_by_lot()
    words = (
        "Each method against the one that `vtok.patch` takes by default, model by model: *+a -b*, the questions that "
        "only the method and only the default answers right, of all tasks that count, and p of McNemar's exact test, "
        "corrected (Holm) for all methods and budgets of the table. **Bold** is better, *slanted* worse: p is below "
        f"{verdicts.LEVEL:g} and the 95 % interval of the difference, which redraws pictures with all their questions, "
        "holds no 0. All else cannot be told apart."
    )
    parts = [f"## Against the default, question by question\n\n{paragraph(words)}"]
    for model in models:
        rival = default_of(model.model)
        found = verdicts.paired(model, rival)
        if found:
            drawn = _pairs(model, found, verdicts.paired(model, lot))
            parts.append(f"### `{model.model}` against `{rival}`\n\n{_said(model, rival, found)}\n\n{drawn}")
    return "\n\n".join(parts) + "\n" if parts[1:] else ""


def _said(model: Several, rival: str, found: Sequence[Paired]) -> str:
    better = {b: [_code(one.method) for one in found if one.budget == b and one.verdict > 0] for b in model.budgets}
    lines = [f"at {percent_of(b)} {', '.join(names) or 'none'}" for b, names in better.items()]
    ever = {name for names in better.values() for name in names}
    never = [_code(name) for name in sorted({one.method for one in found}) if _code(name) not in ever]
    return paragraph(f"Better than `{rival}`: {'; '.join(lines)}. At no budget: {', '.join(never) or 'none'}.")


def _pairs(model: Several, found: Sequence[Paired], chance: Sequence[Paired]) -> str:
    lot = drawn_by_lot()
    head = ["method", *(f"at {percent_of(budget)}" for budget in model.budgets), f"better than `{lot}` at"]
    rows = []
    for name in sorted({one.method for one in found}):
        own = {one.budget: one for one in found if one.method == name}
        beaten = sorted((one.budget for one in chance if one.method == name and one.verdict > 0), reverse=True)
        tasks = next(iter(own.values())).tasks
        on = "" if len(tasks) == len(model.telling) else f" ({', '.join(tasks)})"
        cells = [_pair(own[budget]) if budget in own else "-" for budget in model.budgets]
        rows.append([f"{_code(name)}{on}", *cells, "" if name == lot else ", ".join(map(percent_of, beaten)) or "none"])
    return _table(head, rows)


def _pair(one: Paired) -> str:
    mark = {1: "**", 0: "", -1: "*"}[one.verdict]
    p = "p < 0.001" if one.p < 0.001 else f"p = {one.p:.2g}"
    return f"{mark}+{one.better} -{one.worse}{mark}, {p}"


# --- by engine and family


def _engines(every: Several, models: Sequence[Several]) -> str:
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
        go = _names(names) if len(names) <= len(others) else f"all but {_names(others)}" if others else "all"
        choices = [choose(model, _at(every), fits) for model in models]
        rows.append([engine, which, go, *(str(choice) if choice else "not measured" for choice in choices)])
    best = [f"best at {percent_of(_at(every))} on `{model.model}`" for model in models]
    head = ["engine", "methods that go", "they are", *best]
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

"""docs/choosing.md, written from the summaries of `vtok eval`: which method a user should take, and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok.compressor import load_all
from vtok.errors import InvalidValue
from vtok.eval.results.evidence import Evidence, Kept, mean, read
from vtok.eval.results.results import WORTH
from vtok.eval.results.sweep import BASELINES
from vtok.eval.tasks import task
from vtok.markdown import paragraph, percent, table
from vtok.patching import available

AT = 0.25  # the budget at which families and kinds of question are compared; that of the default method


@dataclass(frozen=True)
class Choice:
    """The best of some methods, and those whose paired difference to it has an interval that holds 0."""

    method: str
    kept: Kept
    tied: tuple[str, ...]

    def __str__(self) -> str:
        return _code(self.method) + (f" or {_or(_code(name) for name in self.tied)}" if self.tied else "")


def write(folder: str | Path, out: str | Path) -> Path:
    """Write the page. Raises `InvalidValue` where the folder holds no summary, or `out` cannot be written."""
    text, out = page(folder), Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidValue(f"The page could not be written to {str(out)!r} ({error.strerror}).") from error
    return out


def page(folder: str | Path) -> str:
    """The page, from all summaries in a folder (see `results.summaries`)."""
    found = read(folder)
    if not found:
        raise InvalidValue(f"{folder} holds no summaries of `vtok eval`: sweep.json, or sweep/TASK.json of a model.")
    return "\n".join([HEAD, _decision(found), _engines(found), _families(found), _proof(found)])


HEAD = f"""# Which method to take

Written by `vtok report model_cards --choosing docs/choosing.md` from the committed results; do not edit.

A *budget* is the mean over decoder layers of kept over all visual tokens, at most. *Keeps* is accuracy as a part of the
dense model's, in percent, with the 95 % interval of the paired difference. *A or B*: A keeps more by these numbers,
but the interval of the paired difference between the two holds 0. *Not good* is less than {percent(WORTH)} %.
"""


def choose(found: Sequence[Evidence], budget: float, fits: Callable[[str], bool] = lambda _: True) -> Choice | None:
    """The best method by mean over the telling evidence at a budget, of those that fit and ran on all of it."""
    there = [e for e in found if e.telling and budget in e.budgets]
    names = [name for name in load_all() if fits(name) and all((name, budget) in e.cells for e in there)]
    if not there or not names:
        return None
    means = {name: mean([e.kept(name, budget) for e in there]) for name in names}
    best = max(names, key=lambda name: means[name].share)
    tied = [name for name in names if name != best and mean([e.lead(best, name, budget) for e in there]).low <= 0]
    return Choice(best, means[best], tuple(sorted(tied, key=lambda name: -means[name].share)))


# --- decisions


def _decision(found: Sequence[Evidence]) -> str:
    budgets = sorted({budget for e in found for budget in e.budgets}, reverse=True)
    defaults = {tuple(facts["default"].items()) for facts in available()["adapters"].values()}
    rows = [
        [
            "do not want to choose",
            _or(f"`vtok.patch(model)`: {_spelt(d)}" for d in sorted(defaults)),
            "see the families below",
        ]
    ]
    for budget in budgets:
        choice = choose(found, budget)
        if choice:
            rows.append([f"can spend {100 * budget:g} % of the visual tokens", str(choice), _verdict(choice)])
    for name, kind in task.tasks().items():
        own = [e for e in found if e.task == name]
        rows.append([f"ask what `{name}` asks: {kind.title[0].lower()}{kind.title[1:].rstrip('.')}", *_cheapest(own)])
    return f"## In short\n\n{_left(['if you', 'take', 'which keeps, %'], rows)}\n\n{_baselines(found, budgets)}\n"


def _cheapest(own: Sequence[Evidence]) -> list[str]:
    """What is good at the smallest budget, for one task."""
    if not own:
        return ["not measured", ""]
    if not any(e.telling for e in own):
        return ["not measured: no model that was run is above chance", ""]
    choices = {b: c for b in sorted({b for e in own for b in e.budgets}) if (c := choose(own, b))}
    for budget, choice in choices.items():
        if choice.kept.share >= WORTH:
            return [f"{choice} at {100 * budget:g} %", str(choice.kept)]
    budget, choice = max(choices.items())
    return [f"no method: the best, {choice}, is not good at {100 * budget:g} %", str(choice.kept)]


def _verdict(choice: Choice) -> str:
    return f"{choice.kept}{'' if choice.kept.share >= WORTH else ': not good'}"


def _baselines(found: Sequence[Evidence], budgets: Sequence[float]) -> str:
    """Which methods are no better than the best baseline, on none of the tasks."""
    weak = []
    for name in load_all():
        rows = [e.cells[name, b] for e in found if e.telling for b in budgets if (name, b) in e.cells]
        rivals = [row["to_baseline"] for row in rows if "to_baseline" in row]
        if name not in BASELINES and rivals and all(rival["interval"][0] <= 0 for rival in rivals):
            weak.append(name)
    listed = f"{_names(weak)}. They are" if weak else "none. Such methods would be"
    return paragraph(
        f"No better than the best of the baselines ({_names(BASELINES)}) at any budget on any task, beyond the "
        f"interval: {listed} not worth their cost on these models."
    )


def _engines(found: Sequence[Evidence]) -> str:
    known = available()["compressors"]
    parts = {name: facts["stage"].split("+") for name, facts in known.items()}
    anchored = {n for n, cls in load_all().items() if any(f.name == "anchor" for f in dataclasses.fields(cls))}
    kinds: list[tuple[str, str, Callable[[str], bool]]] = [
        ("`transformers`", "all", lambda name: True),
        (
            "`patch.compile()`",
            "those whose count in the decoder does not depend on the content, and none that acts in decoding",
            lambda n: "decode" not in parts[n] and not ("llm" in parts[n] and known[n]["adaptive"]),
        ),
        (
            "vLLM",
            "those with a fixed count that do not read the text: it expands the prompt before it sees a pixel. vtok "
            "has no plug-in for it; this is what could be served",
            lambda n: not known[n]["adaptive"] and not known[n]["text_guided"],
        ),
        (
            "training, RL: nothing to be given",
            "those that do not read the text, so that rollout and training select alike",
            lambda n: not known[n]["text_guided"],
        ),
        (
            'training, RL: `labels`, or `anchor="after_visual"`',
            "those that read the text up to an anchor",
            lambda n: known[n]["text_guided"] and n in anchored,
        ),
        (
            "training, RL: `labels`",
            "those that read the text, and whose anchor is the prompt's end",
            lambda n: known[n]["text_guided"] and n not in anchored,
        ),
    ]
    rows = []
    for engine, which, fits in kinds:
        names = [name for name in known if fits(name)]
        choice = choose(found, AT, fits)
        others = [name for name in known if name not in names]
        listed = _names(names) if len(names) <= len(others) else f"all but {_names(others)}" if others else "all"
        best = f"{choice}: {_verdict(choice)}" if choice else "not measured"
        rows.append([engine, which, listed, best])
    head = ["engine", "which methods go", "they are", f"best at {100 * AT:g} %"]
    return f"## By engine\n\n{_left(head, rows)}\n"


def _families(found: Sequence[Evidence]) -> str:
    known = available()
    rows = []
    for family, facts in known["adapters"].items():
        own = [e for e in found if e.family == family]
        fits = lambda name, family=family: family in known["compressors"][name]["families"]
        measured = _names(dict.fromkeys(e.model for e in own)) if own else "not measured"
        choice = choose(own or found, AT, fits)
        best = "nothing was run"
        if choice:
            best = f"{choice}: {_verdict(choice)}" if own else f"{choice}, by what the measured ones show"
        rows.append([f"`{family}`", measured, best, _spelt(facts["default"].items())])
    head = ["family", "measured on", f"best at {100 * AT:g} % of what goes without an option", "default"]
    words = (
        "Bundled models are tiny and see drawn scenes: their redundancy is not that of photos, and their few layers "
        "tell against methods that act within the decoder. No checkpoint of billions of parameters has been measured."
    )
    return f"## By family\n\n{paragraph(words)}\n\n{_left(head, rows)}\n"


# --- evidence


def _proof(found: Sequence[Evidence]) -> str:
    return "## The numbers\n\n" + "\n".join(_of_task(e) for e in found)


def _of_task(e: Evidence) -> str:
    title = f"### {e.model}: {e.task}"
    machine = e.about["machine"]
    source = f"`{machine['command']}`, commit {machine['commit']}, {machine['machine']}, {e.about['dtype']}."
    counted = (
        f"{e.dense['n']:,} questions about {e.about['items']} items, of which the dense model answers "
        f"{percent(e.dense['accuracy'])} % ({percent(e.dense['interval'][0])} to {percent(e.dense['interval'][1])})."
    )
    if not e.telling:
        counted += " It is not above chance, so what a method keeps of it says nothing."
        return "\n\n".join([title, paragraph(counted), paragraph(source)]) + "\n"
    names = list(dict.fromkeys(name for name, budget in e.cells if budget in e.budgets))
    middle = AT if AT in e.budgets else e.budgets[0]
    order = lambda name: (-e.cells[name, middle]["accuracy"] if (name, middle) in e.cells else 0, name)
    best = {budget: choose([e], budget) for budget in e.budgets}
    rows = []
    for name in sorted(names, key=order):
        line = []
        for budget in e.budgets:
            choice = best[budget]
            text = str(e.kept(name, budget)) if (name, budget) in e.cells else "-"
            line.append(f"**{text}**" if choice and name in (choice.method, *choice.tied) else text)
        spent = [e.cells[name, b]["selection_seconds"] for b in e.budgets if (name, b) in e.cells]
        rows.append([f"`{name}`", *line, f"{1e3 * max(spent):.1f}"])
    head = ["method", *(f"at {100 * budget:g} %" for budget in e.budgets), "select, ms"]
    counted += (
        " Bold is the best at a budget, and what is no worse. *Select* is the method itself, on a batch of the "
        "questions about an item, at most over budgets."
    )
    return "\n\n".join([title, paragraph(counted), table(head, rows), *_kinds(e, middle), paragraph(source)]) + "\n"


def _kinds(e: Evidence, budget: float) -> list[str]:
    """By kind of question the methods that keep most, at one budget."""
    rows = []
    for category, dense in e.dense["categories"].items():
        if dense:
            ranked = [(row["categories"][category] / dense, name) for (name, b), row in e.cells.items() if b == budget]
            ranked.sort(key=lambda pair: (-pair[0], pair[1]))
            first = ", ".join(f"`{name}` {percent(share)}" for share, name in ranked[:3])
            rows.append([category, percent(dense), first])
    head = ["kind of question", "dense, % right", f"the three that keep most at {100 * budget:g} %"]
    return ["By kind of question, without intervals, so that small differences say nothing:", _left(head, rows)]


def _names(names: Sequence[str] | Any) -> str:
    return ", ".join(map(_code, names))


def _code(name: str) -> str:
    return f"`{name}`"


def _or(texts: Any) -> str:
    return " or ".join(texts)


def _spelt(items: Any) -> str:
    """A default method as one would write it."""
    values = dict(items)
    return ", ".join([f"`{values.pop('method')}`", *(f"{key}={value:g}" for key, value in values.items())])


def _left(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of words: columns to the left."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])

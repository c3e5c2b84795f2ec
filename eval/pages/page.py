"""The page of `vtok report`: an overview of each model, and its tasks, each behind a tab."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vtok.compressor import load_all
from vtok.eval.pages.drawings import THEME
from vtok.eval.pages.gallery import Gallery
from vtok.eval.results import sweep
from vtok.eval.results.results import (
    FILTER,
    SAME_COST,
    Model,
    Results,
    at_all,
    drift,
    filtered,
    headline,
    not_run,
    overall,
    paired,
    tied,
    tied_overall,
)
from vtok.eval.results.sweep import BASELINES
from vtok.eval.tasks.answers import TOKENS


def page(models: Sequence[Model], drawings: Mapping[str, Sequence[str]], galleries: Mapping[str, Gallery]) -> str:
    """The whole page. drawings: `key` of a tab -> SVGs; galleries: `key` of a task's tab -> what to show."""
    tabs = []
    for model in models:
        own = {key(model, results): _task(model, results, drawings, galleries) for results in model.shown}
        if len(model.tasks) > 1:
            own = {key(model): _overview(model, drawings[key(model)]), **own}
        tabs += own.items()
    bodies = "".join(f'<article class=tab id="{name}">{body}</article>\n' for name, body in tabs)
    named = ", ".join(html.escape(model.name) for model in models)
    variables = [";".join(f"--{name}:{pair[i]}" for name, pair in THEME.items()) for i in (0, 1)]
    style = f":root{{{variables[0]}}}@media(prefers-color-scheme:dark){{:root{{{variables[1]}}}}}{_file('report.css')}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>vtok: {named}, compressed</title>
<link rel="icon" href="data:,">
<style>{style}</style>
<script>document.documentElement.className = "js"</script>
</head>
<body>
{_tabs(models) if len(tabs) > 1 else ""}
<main>
{bodies}</main>
<script>{_file("report.js")}</script>
</body>
</html>
"""


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def key(model: Model, results: Results | None = None) -> str:
    """The address of a tab within the page: that of a task, or of the model's overview."""
    name = f"{model.name}-{results.about['task'] if results else 'overview'}"
    return "".join(c if c.isalnum() else "-" for c in name)


def _tabs(models: Sequence[Model]) -> str:
    rows = []
    for model in models:
        links = [f'<a href="#{key(model)}">overview</a>'] if len(model.tasks) > 1 else []
        links += [f'<a href="#{key(model, results)}">{results.about["task"]}</a>' for results in model.shown]
        name = f"<b>{html.escape(model.name)}</b>" if len(models) > 1 else ""
        rows.append(f"<div>{name}{''.join(links)}</div>")
    return f"<nav class=tabs>{''.join(rows)}</nav>"


# --- the overview of a model


def _overview(model: Model, drawings: Sequence[str]) -> str:
    first = overall(model)
    left = ", ".join(results.about["task"] for results in model.tasks if not results.telling)
    parts = [("tasks", "Task by task", _by_task(model, first))]
    if drawings:
        parts.insert(0, ("costs", "Accuracy against cost, over all tasks", _mean_costs(model, drawings)))
    if left:
        words = (
            f"<p>On {left} the dense model is not above what drawing answers by lot reaches, beyond its interval: "
            "there is nothing that a method could lose. Means leave them out.</p>"
        )
        parts.append(("not-counted", "What the model cannot do", words))
    questions = sum(results.dense["n"] for results in model.tasks)
    over = f"{html.escape(model.name)} · {_count(len(model.tasks), 'task')} · {questions:,} questions"
    head = _overall_words(model, first) if first else "<h1>No task of these tells anything about a method.</h1>"
    return _tab(key(model), over, head, parts)


def _overall_words(model: Model, row: dict[str, Any]) -> str:
    counted = model.telling
    shares = {results.about["task"]: row["tasks"][results.about["task"]] for results in counted}
    worst, best = min(shares, key=shares.get), max(shares, key=shares.get)
    said = (
        f"With at most {_percent(row['budget'])} of the visual tokens, <b>{row['method']}</b> keeps "
        f"<b>{_points(row['retention'])}&nbsp;%</b> of the dense model’s accuracy, "
        + (f"on average over {len(counted)} tasks" if len(counted) > 1 else f"on {counted[0].about['task']}")
    )
    detail = f"Interval {_span(row['interval'])} %"
    if len(shares) > 1:
        detail += f"; from {_points(shares[worst])} % on {worst} to {_points(shares[best])} % on {best}"
    rivals = [r for r in model.at(row["budget"]) if r["method"] in BASELINES and "retention" in r and r is not row]
    if rivals:
        gap = paired(row, rivals[0])
        detail += (
            f"; {_signed(gap['difference'])} points ({_span(gap['interval'], _signed)}) to {rivals[0]['method']}, the "
            "best baseline"
        )
    others = tied_overall(model, row)
    chosen = f"It is the best of {sum('retention' in r for r in model.at(row['budget']))} methods; " + (
        f"{_list(others)} cannot be told from it." if others else "all others are behind it beyond their intervals."
    )
    tiles = [(budget, model.best(budget)) for budget in model.budgets]
    drawn = "".join(
        f"<li><span>at {_percent(budget)}</span><b>{best['method']}</b>"
        f"<span>{_points(best['retention'])} % of dense ({_span(best['interval'])})</span></li>"
        for budget, best in tiles
        if best
    )
    return (
        f"<h1>{said}.</h1><p class=dek>{detail}. {chosen} Every task counts the same. Intervals are 95 %, by bootstrap "
        f"over items; differences are paired.</p><ul class=tiles>{drawn}</ul>"
    )


def _mean_costs(model: Model, drawings: Sequence[str]) -> str:
    names = _list(results.about["task"] for results in model.telling)
    return (
        f"<p>Accuracy as a part of the dense model’s, and cost as a part of its cost, both means over {names}; a line "
        f"for each method that ran on all of them. {LEGEND}</p>{_pair(drawings)}"
    )


def _by_task(model: Model, first: dict[str, Any] | None) -> str:
    words = (
        "<p>Accuracy as a part of the dense model’s, in percent. The first lines are what the dense model gets right, "
        "and what drawing answers by lot would keep: what is near that is lost, whatever its number. <i>Mean</i> is "
        "over tasks, <i>to best</i> the paired difference to the best method; = marks what cannot be told from it.</p>"
    )
    head = ["method", *(r.about["task"] for r in model.tasks), "mean", "95 % interval", "to best", "tokens", "FLOPs"]
    blank = "<td></td>" * 5
    fixed = "".join(f"<td>{_points(results.dense['accuracy'])}</td>" for results in model.tasks)
    lots = [_ratio(r.chance, r.dense["accuracy"], "") if r.telling else "not counted" for r in model.tasks]
    lot = "".join(f"<td>{text}</td>" for text in lots)
    top = [
        f"<tr class=fixed><th scope=row>dense, % right</th>{fixed}{blank}</tr>",
        f"<tr class=fixed><th scope=row>by lot</th>{lot}{blank}</tr>",
    ]
    tables = {}
    for budget in model.budgets:
        best = model.best(budget)
        ties = tied_overall(model, best) if best else []
        lines = []
        for row in model.at(budget):
            shares = [
                _warm(row["tasks"].get(results.about["task"], math.nan)) if results.telling else _blank("")
                for results in model.tasks
            ]
            means = [_blank("–")] * 5
            if "retention" in row:
                gap = paired(row, best)
                lead = "best" if row is best else ("= " if row["method"] in ties else "") + _difference(gap)
                means = [
                    _cell(f"<b>{_points(row['retention'])}</b>", row["retention"]),
                    _cell(_span(row["interval"]), row["interval"][0]),
                    _cell(lead, gap["difference"]),
                    _cell(f"{row['mean_keep']:.3f}", row["mean_keep"]),
                    _cell(f"{row['flops']:.2f}", row["flops"]),
                ]
            lines.append(_row(row["method"], *shares, *means))
        kept = [name for name in ties if name not in BASELINES]
        said = f"Not to be told from {best['method']}: {_list(ties) if ties else 'no other'}." if best else ""
        if best and len(ties) > len(kept):
            said += " Among them are baselines: at this budget the methods are not worth their cost."
        tables[budget] = _table(head, [*top, *lines], f"{key(model)}-{budget:g}", "heat") + f"<p class=note>{said}</p>"
    return words + _budgets(tables, first["budget"] if first else None)


# --- one task of a model


def _task(
    model: Model, results: Results, drawings: Mapping[str, Sequence[str]], galleries: Mapping[str, Gallery]
) -> str:
    name = key(model, results)
    parts = [
        ("costs", "Accuracy against cost", _costs(results, drawings[name])),
        ("methods", "Every method", _tables(results, name)),
        ("kinds", "What is lost, by kind of question", _heat(results, name)),
        ("detail", "Questions that need detail", _detail(results, name)),
        ("gallery", "Where the methods disagree", _gallery(galleries[name])),
        ("not-run", "What was not run", _not_run(results)),
        ("provenance", "Where the numbers come from", _provenance(results)),
    ]
    over = (
        f"{html.escape(model.name)} · {results.task.title} ({results.about['task']}) · {results.about['items']} items "
        f"· {results.dense['n']:,} questions"
    )
    return _tab(name, over, _headline(results), parts)


def _tab(name: str, over: str, head: str, parts: Sequence[tuple[str, str, str]]) -> str:
    """A headline, links to the sections, and these."""
    links = "".join(f'<a href="#{name}-{part}">{title}</a>' for part, title, _ in parts)
    sections = "".join(f'<section id="{name}-{part}"><h2>{title}</h2>{body}</section>\n' for part, title, body in parts)
    return f"<header><p class=over>{over}</p>{head}<nav>{links}</nav></header>\n{sections}"


def _headline(results: Results) -> str:
    row, dense = headline(results), results.dense
    kept = row["accuracy"] / dense["accuracy"] if dense["accuracy"] else 0.0
    said = (
        f"With at most {_percent(row['budget'])} of the visual tokens, <b>{row['method']}</b> keeps "
        f"<b>{100 * kept:.1f}&nbsp;%</b> of the dense model’s accuracy"
    )
    rival = row.get("to_baseline")
    detail = (
        f"{_points(row['accuracy'])} % ({_span(row['interval'])}) of {row['n']:,} questions right, against "
        f"{_points(dense['accuracy'])} % for the dense model: {_signed(row['to_dense']['difference'])} points "
        f"({_span(row['to_dense']['interval'], _signed)})"
    )
    if rival:
        said += (
            f", {_signed(rival['difference'])} points to {rival['baseline']}, the best baseline"
            if rival["difference"] > 0
            else f", but no more than the baseline {rival['baseline']}"
        )
        detail += (
            f", and {_signed(rival['difference'])} ({_span(rival['interval'], _signed)}) to {rival['baseline']} with "
            "as many tokens"
        )
    others = tied(results, row)
    chosen = f"It is the best of {len(results.at(row['budget']))} methods on these very questions; " + (
        f"{_list(others)} cannot be told from it." if others else "all others are behind it beyond their intervals."
    )
    tiles = "".join(
        f"<li><span>at {_percent(budget)}</span><b>{best['method']}</b>"
        f"<span>{_points(best['accuracy'])} %, {_ratio(best['accuracy'], dense['accuracy'])} of dense</span></li>"
        for budget in results.budgets
        for best in results.at(budget)[:1]
    )
    return (
        f"<h1>{said}.</h1><p class=dek>{detail}. {chosen} Intervals are 95 %, by bootstrap over pictures; differences "
        f"are paired.</p><ul class=tiles>{tiles}</ul>"
    )


LEGEND = (
    f"Bars are 95 % intervals. Ringed and joined by dots is the Pareto front: nothing that costs as much (within "
    f"{100 * SAME_COST:g} %) or less is more accurate. The line across is the dense model. In colour are the methods "
    "that are best on average, dashed the baselines. Point at a name to see its line alone."
)


def _costs(results: Results, drawings: Sequence[str]) -> str:
    if span := drift(results):
        rough = f"What dropped nothing took {span[0]:.2f} to {span[1]:.2f} of the dense model’s time: it is that rough."
    else:
        rough = "How rough times are was not measured: nothing was run at a budget of 1, which would show it."
    return f"<p>Exact match of each method through its budgets. {LEGEND} {rough}</p>{_pair(drawings)}"


def _pair(drawings: Sequence[str]) -> str:
    return f"<div class=pair>{''.join(f'<figure>{drawing}</figure>' for drawing in drawings)}</div>"


def _budgets(tables: Mapping[float, str], chosen: float | None) -> str:
    """A table for each budget, one of which is shown at a time, and the buttons for that."""
    chosen = next(iter(tables)) if chosen not in tables else chosen
    buttons = "".join(
        f'<button type=button data-b="{b:g}" aria-pressed={"true" if b == chosen else "false"}>{_percent(b)}</button>'
        for b in tables
    )
    bodies = "".join(
        f'<div class="at{" on" if b == chosen else ""}" data-b="{b:g}"><h3>At most {_percent(b)} of the tokens</h3>'
        f"{body}</div>"
        for b, body in tables.items()
    )
    return f"<div class=budgets><p class=pick>At most {buttons} of the visual tokens</p>{bodies}</div>"


def _tables(results: Results, name: str) -> str:
    dense = results.dense
    head = [
        "method",
        "kept",
        "FLOPs",
        "right",
        "95 % interval",
        "",
        "to dense",
        "to best baseline",
        "as dense",
        "select",
        "seconds",
    ]
    words = (
        "<p>A budget bounds the mean over decoder layers of kept over all visual tokens; <i>kept</i> is what it was, "
        "<i>FLOPs</i> what encoder and prefill then cost, both as parts of the dense model’s. <i>Right</i> is exact "
        f"match; the dense model has {_points(dense['accuracy'])} % ({_span(dense['interval'])}), the upright line. "
        "<i>To dense</i> and <i>to best baseline</i> are paired differences in points, <i>as dense</i> the share of "
        "answers that are word for word the dense model’s. <i>Select</i> is milliseconds of the method itself, "
        f"<i>seconds</i> a picture with all its questions (dense: {dense['seconds']:.2f}). Click a heading to sort.</p>"
    )
    tables = {}
    for budget in results.budgets:
        lines = []
        for row in results.at(budget):
            rival = row.get("to_baseline")
            lines.append(
                _row(
                    row["method"],
                    _cell(f"{row['mean_keep']:.3f}", row["mean_keep"]),
                    _cell(f"{row['flops']:.2f}", row["flops"]),
                    _cell(f"<b>{_points(row['accuracy'])}</b>", row["accuracy"]),
                    _cell(_span(row["interval"]), row["interval"][0]),
                    f"<td>{_whisker(row['accuracy'], row['interval'], dense['accuracy'])}</td>",
                    _cell(_difference(row["to_dense"]), row["to_dense"]["difference"]),
                    _cell(f"{_difference(rival)} <i>{rival['baseline']}</i>", rival["difference"])
                    if rival
                    else _blank("–"),
                    _cell(f"{_points(row['agreement'])} %", row["agreement"]),
                    _cell(f"{1e3 * row['selection_seconds']:.1f}", row["selection_seconds"]),
                    _cell(f"{row['seconds']:.2f}", row["seconds"]),
                )
            )
        tables[budget] = _table(head, lines, f"{name}-methods-{budget:g}") + _weak(results.at(budget))
    same = {name: row["agreement"] for name, row in results.whole.items()}
    unchanged = f"<p>{at_all(same)}</p>" if same else ""
    return words + _budgets(tables, headline(results)["budget"]) + unchanged


def _weak(rows: list[dict[str, Any]]) -> str:
    """Which methods do not beat the best baseline, said plainly."""
    tried = [row for row in rows if row["method"] not in BASELINES and "to_baseline" in row]
    if not tried:
        return ""
    rival = tried[0]["to_baseline"]["baseline"]
    weak = [row["method"] for row in tried if row["to_baseline"]["interval"][0] <= 0]
    if not weak:
        return f"<p class=note>Every method beats {rival} beyond its interval.</p>"
    return f"<p class=note>No better than {rival}, the best baseline, within the interval: {_list(weak)}.</p>"


def _heat(results: Results, name: str) -> str:
    dense = results.dense["categories"]
    asked = [category for _, category, _ in results.answers(results.dense_cell)]
    head = ["method", *(f"{c}<small>{asked.count(c)}</small>" for c in dense), "all"]
    words = (
        "<p>Accuracy as a part of the dense model’s, in percent. Under each kind stands how many questions it has, in "
        "the first line what the dense model gets right, and in the second what drawing an answer by lot would keep: "
        "what is near that is lost, whatever its number.</p>"
    )
    fixed = "".join(f"<td>{_points(value)}</td>" for value in (*dense.values(), results.dense["accuracy"]))
    lots = [(results.task.chance(c), dense[c]) for c in dense] + [(results.chance, results.dense["accuracy"])]
    lot = "".join(f"<td>{_ratio(*pair, '')}</td>" for pair in lots)
    top = [
        f"<tr class=fixed><th scope=row>dense, % right</th>{fixed}</tr>",
        f"<tr class=fixed><th scope=row>by lot</th>{lot}</tr>",
    ]
    tables = {}
    for budget in results.budgets:
        lines = []
        for row in results.at(budget):
            pairs = [*((row["categories"][c], dense[c]) for c in dense), (row["accuracy"], results.dense["accuracy"])]
            lines.append(_row(row["method"], *(_warm(got / of if of else math.nan) for got, of in pairs)))
        tables[budget] = _table(head, [*top, *lines], f"{name}-kinds-{budget:g}", "heat")
    return words + _budgets(tables, headline(results)["budget"])


def _warm(share: float) -> str:
    """A cell that is the redder the more is lost; NaN where nothing is known."""
    if math.isnan(share):
        return _blank("–")
    lost = 100 * min(1, max(0, 1 - share))
    return f'<td data-v="{share:.6f}" style="--lost:{lost:.0f}%">{100 * share:.0f}</td>'


def _detail(results: Results, name: str) -> str:
    words = (
        "<p>Many questions about a picture can be answered from a smaller one. After VTC-Bench, here are only "
        f"questions that the dense model gets right, divided by what <i>{FILTER}</i>, a smaller picture with the same "
        "budget, makes of them: <i>needs detail</i> where that is wrong, <i>easy</i> where it is right. The dense "
        f"model has 100 % on both, {FILTER} 0 and 100 %, by construction; so this ranks methods, and does not tell how "
        "good they are on all questions.</p>"
    )
    tables = {}
    for budget in results.budgets:
        found = filtered(results, budget)
        if found is None:
            tables[budget] = f"<p>{FILTER} was not run at {_percent(budget)}, so there is no filter.</p>"
            continue
        lines = [
            _row(method, *_shared(shares["hard"], bar=True), *_shared(shares["easy"]))
            for method, shares in sorted(found["methods"].items(), key=lambda item: -(item[1]["hard"] or (0,))[0])
        ]
        head = ["method", "needs detail", "95 % interval", "", "easy", "95 % interval"]
        said = f"{_count(found['hard'], 'question')} need{'s' * (found['hard'] == 1)} detail, {found['easy']} are easy."
        tables[budget] = f"<p class=note>{said}</p>{_table(head, lines, f'{name}-detail-{budget:g}')}"
    return words + _budgets(tables, headline(results)["budget"])


def _shared(share: tuple[float, list[float]] | None, bar: bool = False) -> list[str]:
    if share is None:
        return [_blank("–")] * (2 + bar)
    at, span = share
    cells = [_cell(f"<b>{_points(at)}</b>" if bar else _points(at), at), _cell(_span(span), span[0])]
    return [*cells, f"<td>{_whisker(at, span)}</td>"] if bar else cells


def _gallery(shown: Gallery) -> str:
    words, pictures = shown
    drawn = "".join(
        f'<figure><img alt="{html.escape(title)}" loading=lazy '
        f'src="data:image/webp;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, data in pictures
    )
    return f"<p>{html.escape(words)}</p><div class=shots>{drawn}</div>"


def _not_run(results: Results) -> str:
    items = "".join(f"<dt>{html.escape(what)}</dt><dd>{html.escape(why)}</dd>" for what, why in _left_out(results))
    return f"<dl>{items}</dl>" if items else "<p>Nothing was left out.</p>"


def _left_out(results: Results) -> list[tuple[str, str]]:
    """(what, why) of all that was not run."""
    out = [(f"{method} at {_list(map(_percent, at))}", why) for (method, why), at in not_run(results.refused).items()]
    ran = {cell.method for cell in results.rows} | {item["method"] for item in results.refused}
    untried: dict[bool, list[str]] = {False: [], True: []}
    for name, cls in load_all().items():
        if name not in ran:
            untried[cls.trained].append(name)
    for trained, names in untried.items():
        if names:
            why = "Weights of its own, which have to be trained first." if trained else "Not asked for."
            out.append((_list(names), why))
    rest = results.task.count - results.about["items"]
    if rest:
        out.append(
            (f"{rest} of the {results.about['items'] + rest} test items", "Not asked for; the first ones were taken.")
        )
    return out


def _provenance(results: Results) -> str:
    about, machine = results.about, results.about["machine"]
    test = about["test_set"]
    items = {
        "Model": about["model"],
        "Weights": f"{about['weights']} (first 12 hex digits of a SHA-256 of all of them)",
        "Test set": f"version {test['version']}, seed {test['seed']}, first {about['items']} items, drawn offline",
        "Options": ", ".join(sweep.calls(results.rows.values())) or "none",
        "Commit": f"{machine['commit']}{' (with local changes)' if machine['commit'].endswith('+') else ''}",
        "Machine": machine.get("machine", "unknown"),
        "Threads, load": f"{machine.get('threads', 'unknown')}, {machine.get('load', 'unknown')}",
        "Data type": about["dtype"],
        "Versions": f"torch {machine.get('torch', 'unknown')}, transformers {machine.get('transformers', 'unknown')}",
        "Command": machine.get("command", "unknown"),
    }
    lines = "".join(f"<dt>{key}</dt><dd>{html.escape(str(value))}</dd>" for key, value in items.items())
    return (
        f"<dl>{lines}</dl><p>Greedy answers, at most {TOKENS} tokens; all questions about a picture in one batch.</p>"
    )


def _table(head: Sequence[str], lines: Iterable[str], key: str, kind: str = "") -> str:
    """Sortable by its headings; a heading with no name is not."""
    cells = "".join(f"<th scope=col><button>{name}</button></th>" if name else "<th></th>" for name in head)
    body = "".join(lines)
    table = f'<table id="{key}" class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'
    return f"<div class=wide>{table}</div>"


def _row(method: str, *cells: str) -> str:
    kind = ' class="base"' if method in BASELINES else ""
    return f'<tr data-m="{method}"{kind}><th scope=row>{method}</th>{"".join(cells)}</tr>'


def _cell(text: str, value: float) -> str:
    return f'<td data-v="{value:.6f}">{text}</td>'


def _blank(text: str) -> str:
    """A cell with no number, behind all others when sorted."""
    return f'<td data-v="-1e9">{text}</td>'


def _whisker(at: float, span: Sequence[float], line: float | None = None) -> str:
    """A dot with its interval on a scale from 0 to 100 %."""
    mark = "" if line is None else f'<u style="left:{100 * line:.2f}%"></u>'
    bar = f'<i style="left:{100 * span[0]:.2f}%;width:{100 * (span[1] - span[0]):.2f}%"></i>'
    return f'<span class=whisker aria-hidden=true>{mark}{bar}<b style="left:{100 * at:.2f}%"></b></span>'


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _signed(share: float) -> str:
    return sweep.signed(share).replace("-", "−")


def _span(pair: Sequence[float], form: Any = _points) -> str:
    return f"{form(pair[0])} to {form(pair[1])}"


def _difference(paired: dict[str, Any]) -> str:
    return f"<b>{_signed(paired['difference'])}</b> <small>({_span(paired['interval'], _signed)})</small>"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _ratio(got: float, of: float, unit: str = " %") -> str:
    return f"{100 * got / of:.0f}{unit}" if of else "–"


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def _list(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last

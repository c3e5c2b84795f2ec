"""The page behind `vtok report`: what `vtok eval` left in a folder, as one HTML file that needs nothing else.

Every number is computed here from the answers in the folder's JSON lines; of sweep.json only the list of cells, what
was refused and the provenance are taken. Nothing in the folder is changed.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vtok import draw
from vtok.compressor import load_all
from vtok.errors import InvalidValue
from vtok.eval import sweep, task
from vtok.eval.answers import TOKENS, answer
from vtok.eval.sweep import BASELINES, DENSE, Cell
from vtok.eval.task import Item

FILTER = "downsample"  # whose mistakes are the questions that need visual detail
SAME_COST = 0.05  # costs that differ by less than this part count as equal on a Pareto front
WORTH = 0.9  # of the dense accuracy, that the headline's method keeps at as small a budget as can be
COLOURED = 5  # methods that get a colour; the others are grey

# Name -> (light, dark). The light ones stand in the drawings and are there replaced by CSS variables of these names.
THEME = {
    "paper": ("#fbfaf7", "#14161a"),
    "card": ("#fffffe", "#1b1e24"),
    "ink": ("#1b1d22", "#e8e6e1"),
    "soft": ("#5f636c", "#a2a6af"),
    "line": ("#dedbd3", "#343942"),
    "grey": ("#a9abb0", "#6c717b"),
    "loss": ("#d6452b", "#d8553c"),
    "c1": ("#0b63b5", "#6cb2f5"),
    "c2": ("#c2500a", "#f59a54"),
    "c3": ("#0a8460", "#4fcfa2"),
    "c4": ("#8c3f98", "#d692e2"),
    "c5": ("#93700b", "#dcb94c"),
}


@dataclass(frozen=True)
class Results:
    """A complete folder of `vtok eval`.

    about, refused: as in sweep.json. lines: cell -> item -> line of its file. rows: cell -> its row of
    `sweep.summarise`, the dense model's first.
    """

    about: dict[str, Any]
    refused: list[dict[str, Any]]
    lines: dict[Cell, dict[int, dict[str, Any]]]
    rows: dict[Cell, dict[str, Any]]

    @property
    def dense(self) -> dict[str, Any]:
        return next(row for cell, row in self.rows.items() if cell.method == DENSE)

    @property
    def budgets(self) -> list[float]:
        return sorted({cell.budget for cell in self.rows if cell.method != DENSE}, reverse=True)

    def at(self, budget: float) -> list[dict[str, Any]]:
        """Rows of the methods at a budget, best first."""
        rows = [row for cell, row in self.rows.items() if cell.method != DENSE and cell.budget == budget]
        return sorted(rows, key=lambda row: (-row["accuracy"], row["method"]))

    def answers(self, cell: Cell) -> list[tuple[int, str, bool]]:
        """(item, category, right) of each question, in the same order for every cell."""
        lines = [self.lines[cell][i] for i in range(self.about["items"])]
        return [
            (i, category, right)
            for i, line in enumerate(lines)
            for (category, *_), right in zip(line["answers"], line["right"])
        ]


def load(folder: str | Path) -> Results:
    """The results in a folder. Raises `InvalidValue` where it is not one of `vtok eval`, or not complete."""
    folder = Path(folder)
    file = folder / "sweep.json"
    if not file.is_file():
        if (folder / "about.json").is_file():
            raise InvalidValue(f"The run in {folder} has not finished: call `vtok eval --out {folder}` again.")
        raise InvalidValue(f"{folder} holds no sweep.json: give a folder that `vtok eval --out` has filled.")
    try:
        summary = json.loads(file.read_text())
        about, refused, count = summary["about"], summary["refused"], summary["about"]["items"]
        cells = [Cell(row["method"], row["budget"]) for row in summary["cells"]]
        about["machine"]["commit"], about["test_set"]["version"], about["model"], about["weights"], about["dtype"]
        about["task"], about["instruction"]
        lines = {cell: sweep.read(folder / cell.file, missing=False) for cell in cells}
        short = [cell for cell, known in lines.items() if not set(range(count)) <= set(known)]
        if short or len(cells) < 2:
            lacks = f"{short[0].file} lacks items" if short else "only the dense model was run"
            raise InvalidValue(f"The results in {folder} are not complete ({lacks}): call `vtok eval` again.")
        rows = dict(zip(cells, sweep.summarise(lines, count)))
    except FileNotFoundError as error:
        raise InvalidValue(f"{folder} lacks {Path(error.filename).name}, which its sweep.json sums up.") from error
    except (OSError, UnicodeDecodeError, KeyError, TypeError, IndexError, StopIteration, json.JSONDecodeError) as error:
        raise InvalidValue(
            f"{folder} holds a sweep.json, but not one that `vtok eval` of this version wrote with its answers beside "
            f"it ({type(error).__name__}: {error})."
        ) from error
    return Results(about, refused, lines, rows)


def front(points: Mapping[Any, tuple[float, float]], same: float = SAME_COST) -> list[Any]:
    """Of key -> (cost, accuracy) the keys that no other beats: none is more accurate at a cost that is lower, or
    higher by a part `same` at most. Cheapest first."""
    best = [
        key
        for key, (cost, gain) in points.items()
        if not any(c <= cost * (1 + same) and g > gain for c, g in points.values())
    ]
    return sorted(best, key=lambda key: points[key])


def leaders(results: Results) -> list[str]:
    """The methods in colour: those with the best mean accuracy, of those that ran at the most budgets; no baselines."""
    got: dict[str, list[float]] = {}
    for cell, row in results.rows.items():
        if cell.method != DENSE and cell.method not in BASELINES:
            got.setdefault(cell.method, []).append(row["accuracy"])
    most = max(map(len, got.values()), default=0)
    full = [name for name, values in got.items() if len(values) == most]
    return sorted(full, key=lambda name: (-np.mean(got[name]), name))[:COLOURED]


def headline(results: Results) -> dict[str, Any]:
    """The row of the best method at the smallest budget at which it keeps `WORTH` of the dense accuracy, else at the
    largest budget."""
    best = [results.at(budget)[0] for budget in results.budgets]
    worth = [row for row in best if row["accuracy"] >= WORTH * results.dense["accuracy"]]
    return worth[-1] if worth else best[0]


def tied(results: Results, row: dict[str, Any]) -> list[str]:
    """Methods at the row's budget whose paired difference to it has an interval that holds 0."""
    own = _by_item(results, Cell(row["method"], row["budget"]))
    names = []
    for other in results.at(row["budget"]):
        gain = own - _by_item(results, Cell(other["method"], other["budget"]))
        low, high = sweep.interval(gain[:, 0], own[:, 1])
        if other is not row and low <= 0 <= high:
            names.append(other["method"])
    return names


def _by_item(results: Results, cell: Cell, chosen: Sequence[bool] | None = None) -> np.ndarray:
    """[items, 2] right answers and questions of each item, of the chosen questions or all."""
    sums = np.zeros((results.about["items"], 2))
    for i, (item, _, right) in enumerate(results.answers(cell)):
        if chosen is None or chosen[i]:
            sums[item] += right, 1
    return sums


def filtered(results: Results, budget: float) -> dict[str, Any] | None:
    """The filter of VTC-Bench: the questions that the dense model gets right, divided by whether `downsample` at the
    same budget gets them wrong ("hard", they need detail) or right ("easy").

    Returns their numbers and method -> (accuracy, interval) on each, or None where `downsample` was not run. The dense
    model has 1 on both and `downsample` 0 and 1 by construction.
    """
    cell = Cell(FILTER, budget)
    if cell not in results.lines:
        return None
    dense = [right for *_, right in results.answers(next(c for c in results.lines if c.method == DENSE))]
    small = [right for *_, right in results.answers(cell)]
    groups = {"hard": [d and not s for d, s in zip(dense, small)], "easy": [d and s for d, s in zip(dense, small)]}
    found: dict[str, Any] = {name: sum(chosen) for name, chosen in groups.items()}
    found["methods"] = {
        row["method"]: {name: _share(_by_item(results, Cell(row["method"], budget), c)) for name, c in groups.items()}
        for row in results.at(budget)
        if row["method"] != FILTER
    }
    return found


def _share(sums: np.ndarray) -> tuple[float, list[float]] | None:
    """Accuracy and its interval over the items that have such questions; None without any."""
    sums = sums[sums[:, 1] > 0]
    return (sums[:, 0].sum() / sums[:, 1].sum(), sweep.interval(*sums.T)) if len(sums) else None


def left_out(results: Results) -> list[tuple[str, str]]:
    """(what, why) of all that was not run."""
    budgets: dict[tuple[str, str], list[float]] = {}
    for item in results.refused:
        reason = item["reason"].replace(f"budget of {item['budget']:g}", "budget of that size")
        reason = reason.replace(f"mean keep of {item['budget']:g}", "mean keep of that size")
        budgets.setdefault((item["method"], reason), []).append(item["budget"])
    out = [(f"{method} at {_list(map(_percent, at))}", why) for (method, why), at in budgets.items()]
    ran = {cell.method for cell in results.rows} | {item["method"] for item in results.refused}
    for name, cls in load_all().items():
        if name not in ran:
            why = "It has weights of its own, which have to be trained first." if cls.trained else "Not asked for."
            out.append((name, why))
    rest = task.get(results.about["task"]).count - results.about["items"]
    if rest:
        out.append(
            (f"{rest} of the {results.about['items'] + rest} test items", "Not asked for; the first ones were taken.")
        )
    if _busy(results.about):
        machine = results.about["machine"]
        why = f"The machine was shared (load {machine['load']} on {machine['machine']}), so seconds are rough."
        out.append(("A chart of accuracy against measured time", why))
    return out


def _busy(about: dict[str, Any]) -> bool:
    """Whether others used the machine while it was timed: a load above its number of cores."""
    load, cores = about["machine"].get("load", ""), about["machine"].get("machine", "").rpartition(" x ")[2]
    return bool(re.fullmatch(r"[\d.]+", load) and cores.isdigit() and float(load) > int(cores) + 0.5)


# --- drawings


COSTS = {
    "tokens": ("mean_keep", "visual tokens a decoder layer works on (mean)"),
    "flops": ("flops", "FLOPs of encoder and prefill, by formula"),
    "time": ("seconds", "seconds a picture with its questions (median)"),
}


def cost(results: Results, row: dict[str, Any], kind: str) -> float:
    """As a fraction of the dense model's."""
    value = row[COSTS[kind][0]]
    return value / results.dense["seconds"] if kind == "time" else value


def chart(results: Results, kind: str) -> Any:
    """Accuracy against a cost, a line for each method through its budgets, as a figure of matplotlib."""
    figure_class, _ = draw._matplotlib()
    colours = {name: THEME[f"c{i + 1}"][0] for i, name in enumerate(leaders(results))}
    ink, soft, line, grey = (THEME[name][0] for name in ("ink", "soft", "line", "grey"))
    figure = figure_class(figsize=(5.6, 5.0), dpi=100, facecolor="none")
    axes = figure.add_axes((0.09, 0.115, 0.69, 0.85), facecolor="none")
    methods: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for cell, row in results.rows.items():
        if cell.method != DENSE:
            methods.setdefault(cell.method, []).append((cost(results, row, kind), row))
    ends = {}
    for i, name in enumerate(sorted(methods, key=lambda name: name in colours)):
        points = sorted(methods[name], key=lambda point: point[0])
        x = [at for at, _ in points]
        y = [100 * row["accuracy"] for _, row in points]
        strong, colour = name in colours, colours.get(name, grey)
        style = {"color": colour, "linewidth": 2.0 if strong else 1.1, "linestyle": "--" if name in BASELINES else "-"}
        axes.plot(x, y, marker="o", markersize=5 if strong else 3.2, gid=f"m:{name}:{i}a", zorder=4 + strong, **style)
        low, high = ([100 * row["interval"][side] for _, row in points] for side in (0, 1))
        axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.55, gid=f"m:{name}:{i}b", zorder=3)
        ends[name] = (x[-1], y[-1])
    best = front({(r["method"], r["budget"]): (x, 100 * r["accuracy"]) for p in methods.values() for x, r in p})
    at = {(r["method"], r["budget"]): (x, 100 * r["accuracy"]) for p in methods.values() for x, r in p}
    axes.plot(*zip(*(at[key] for key in best)), color=ink, linewidth=1, linestyle=":", zorder=6)
    axes.plot(*zip(*(at[key] for key in best)), "o", markersize=11, mfc="none", mec=ink, mew=1.1, zorder=6)
    dense = 100 * results.dense["accuracy"]
    axes.axhline(dense, color=ink, linewidth=1, zorder=2)
    axes.axhspan(*(100 * side for side in results.dense["interval"]), color=ink, alpha=0.07, linewidth=0, zorder=1)

    top = max([dense, *(100 * row["interval"][1] for row in results.rows.values())])
    low = min(100 * row["interval"][0] for row in results.rows.values())
    axes.set_ylim(max(0, low - 4), min(101, top + 6))
    every = [x for points in methods.values() for x, _ in points]
    axes.set_xscale("log")
    axes.set_xlim(min(every) * 0.86, max(every) * 1.12)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0) if min(every) * 0.86 <= t <= max(every) * 1.12]
    axes.set_xticks(ticks, [_percent(t) for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel(COSTS[kind][1] + ", dense = 100 %", color=soft, fontsize=10.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.tick_params(colors=soft, labelsize=10.5, length=0)
    axes.grid(color=line, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    name_at = axes.get_xlim()[0] * 1.03
    axes.text(name_at, dense + 0.7, f"dense {dense:.1f} %", color=ink, fontsize=10.5, va="bottom", gid="dense")
    bottom, ceiling = axes.get_ylim()
    heights = _apart({name: y for name, (_, y) in ends.items()}, (ceiling - bottom) / 28, bottom, ceiling)
    for i, (name, (x, y)) in enumerate(ends.items()):
        note = axes.annotate(
            name,
            (x, y),
            (1.025, heights[name]),
            textcoords=axes.get_yaxis_transform(),
            color=colours.get(name, soft),
            fontsize=10.5,
            fontweight="bold" if name in colours else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colours.get(name, grey),
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 4,
            },
        )
        note.set_gid(f"m:{name}:{i}c")
    return figure


def _apart(wanted: dict[str, float], gap: float, bottom: float, top: float) -> dict[str, float]:
    """Heights near the wanted ones, `gap` apart, from `top` down, and lifted where they fall below `bottom`."""
    placed: dict[str, float] = {}
    height = top
    for name in sorted(wanted, key=lambda name: -wanted[name]):
        placed[name] = height = min(wanted[name], height - gap if placed else top)
    floor = bottom
    for name in reversed(placed):
        placed[name] = floor = max(placed[name], floor)
        floor += gap
    return placed


def _png(figure: Any, file: Path) -> None:
    _, canvas_class = draw._matplotlib()
    canvas_class(figure)
    figure.savefig(file, dpi=200, facecolor=THEME["card"][0])


def _svg(figure: Any, title: str) -> str:
    """The figure for use inside a page: its colours are the page's, its texts are text, and no address is left."""
    import matplotlib

    with io.StringIO() as file, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        drawn = file.getvalue()
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    drawn = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", drawn).replace("xlink:href", "href")
    drawn = re.sub(r'id="m:(\w+):\w+"', r'class="m" data-m="\1"', drawn)
    prefix = re.sub(r"\W+", "-", title)
    drawn = re.sub(r'\bid="', f'id="{prefix}-', drawn)  # ids are the page's, and two drawings have the same
    drawn = re.sub(r'(href="#|url\(#)', rf"\g<1>{prefix}-", drawn)
    for name, (light, _) in THEME.items():
        drawn = drawn.replace(light, f"var(--{name})")
    head = f'<svg role="img" aria-label="{html.escape(title)}"'
    drawn = re.sub(r'^<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r'(^<svg[^>]*?) height="[^"]*"', r"\1", drawn))
    return head + drawn.strip().removeprefix("<svg")


# --- gallery


def disputed(results: Results, budget: float, methods: Sequence[str], count: int) -> list[tuple[int, int]]:
    """(item, question) of up to `count` questions that the dense model gets right and about half of the methods get
    wrong: of different categories as far as there are, and of different items."""
    dense = next(cell for cell in results.lines if cell.method == DENSE)
    ranked = []
    for item in range(results.about["items"]):
        line = results.lines[dense][item]
        for n, ((category, *_), right) in enumerate(zip(line["answers"], line["right"])):
            got = [results.lines[Cell(name, budget)][item]["right"][n] for name in methods]
            if right and 0 < sum(got) < len(got):
                ranked.append((abs(sum(got) - len(got) / 2), item, n, category))
    ranked.sort()
    chosen: list[tuple[int, int]] = []
    used: set[Any] = set()
    for again in (False, True):  # first one a category, then whatever is left
        for _, item, n, category in ranked:
            if len(chosen) < count and item not in used and (again or category not in used):
                chosen.append((item, n))
                used |= {item, category}
    return chosen


def gallery(results: Results, count: int) -> tuple[str, list[tuple[str, bytes]]]:
    """What to say about the gallery, and (question and right answer, WebP) of each picture.

    The model is run again on these questions; where that is not possible the words say why, and there are no pictures.
    """
    from vtok import zoo

    about = results.about
    if not count:
        return "Left out, as asked.", []
    if about["model"] not in zoo.names():
        return f"Not drawn: {about['model']} is not bundled with this version of vtok, so it cannot be run again.", []
    model, processor = zoo.load(about["model"], dtype=about["dtype"])
    asked = task.get(about["task"])
    if sweep.fingerprint(model) != about["weights"] or about["test_set"] != sweep.test_set(asked):
        return "Not drawn: the bundled weights or the test set have changed since these results were made.", []
    budget = headline(results)["budget"]
    there = [row["method"] for row in results.at(budget)]
    rivals = sorted((name for name in there if name in BASELINES), key=lambda name: (name != FILTER, there.index(name)))
    methods = [name for name in leaders(results)[:3] if name in there] + rivals[:2]
    chosen = disputed(results, budget, methods, count)
    if not chosen:
        return "There is no question at which these methods disagree and the dense model is right.", []
    items = list(asked.held_out(max(item for item, _ in chosen) + 1))
    pictures = []
    for index, n in chosen:
        question = items[index].questions[n]
        drawn = _panels(model, processor, replace(items[index], questions=(question,)), methods, budget)
        pictures.append((f"{question.text} Right: {question.answer}", _webp(drawn)))
    words = (
        f"{_count(len(pictures), 'question')} that the dense model gets right and these methods, at {_percent(budget)} "
        "of the tokens, divide about evenly, asked again for this page. What no decoder layer looks at is faded; wrong "
        "answers are red."
    )
    return words, pictures


def _panels(model: Any, processor: Any, item: Item, methods: Sequence[str], budget: float) -> Any:
    """The dense model and each method, with its answer to the one question of the item, over its picture."""
    from vtok import demo
    from vtok.patching import patch

    def ask(method: str, trace: Any, said: str, tokens: int) -> demo.Answer:
        kept = tokens if trace is None else round(trace.mean_keep * tokens)
        unknown = dict.fromkeys(("flops", "kv_bytes"), 0) | dict.fromkeys(("selection", "prefill", "total"), math.nan)
        return demo.Answer(method=method, text=said, tokens=tokens, kept=kept, trace=trace, **unknown)

    answers = []
    for method in methods:
        with patch(model, method, budget=budget) as handle:
            said = answer(model, processor, item)
            trace = handle.trace
            answers.append(ask(method, trace, said[0], sum(trace.n_visual)))
    reference = answers[0].trace
    dense = ask(DENSE, None, answer(model, processor, item)[0], sum(reference.n_visual))
    panels = [demo.panel(each, reference) for each in (dense, *answers)]
    return draw.panels(item.images[0], panels, item.questions[0].text, columns=3)


def _webp(image: Any, width: int = 1100) -> bytes:
    with io.BytesIO() as file:
        image.resize((width, round(image.height * width / image.width))).save(file, format="WEBP", quality=82, method=6)
        return file.getvalue()


# --- the page


def write(folder: str | Path, out: str | Path, pictures: int = 4) -> list[Path]:
    """Write the page and its drawings as PNGs beside it; the files, the page first.

    pictures: at most so many in the gallery; 0 runs no model. Raises `InvalidValue` for a folder that is not one of
    `vtok eval`, or an `out` that cannot be written, and `MissingExtra` without matplotlib.
    """
    draw.check()
    results, out = load(folder), Path(out)
    kinds = [kind for kind in COSTS if kind != "time" or not _busy(results.about)]
    figures = {kind: chart(results, kind) for kind in kinds}
    page = _page(results, {kind: _svg(f, f"accuracy against {kind}") for kind, f in figures.items()}, pictures)
    files = [out, *(out.with_name(f"{out.stem}-{kind}.png") for kind in kinds)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
        for file, figure in zip(files[1:], figures.values()):
            _png(figure, file)
    except OSError as error:
        raise InvalidValue(f"The report could not be written to {str(out)!r} ({error.strerror}).") from error
    return files


def _page(results: Results, drawings: dict[str, str], pictures: int) -> str:
    about, dense = results.about, results.dense
    parts = [
        ("costs", "Accuracy against cost", _costs(results, drawings)),
        ("methods", "Every method, budget by budget", _tables(results)),
        ("kinds", "What is lost, by kind of question", _heat(results)),
        ("detail", "Questions that need detail", _detail(results)),
        ("gallery", "Where the methods disagree", _gallery(results, pictures)),
        ("not-run", "What was not run", _not_run(results)),
        ("provenance", "Where the numbers come from", _provenance(results)),
    ]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in parts)
    sections = "".join(f'<section id="{key}"><h2>{title}</h2>{body}</section>\n' for key, title, body in parts)
    variables = [";".join(f"--{name}:{pair[i]}" for name, pair in THEME.items()) for i in (0, 1)]
    style = f":root{{{variables[0]}}}@media(prefers-color-scheme:dark){{:root{{{variables[1]}}}}}{CSS}"
    model = html.escape(about["model"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>vtok: {model}, compressed</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<p class="over">{model} · {about["items"]} items · {dense["n"]:,} questions</p>
{_headline(results)}
<nav>{links}</nav>
</header>
<main>
{sections}</main>
<script>{JS}</script>
</body>
</html>
"""


def _headline(results: Results) -> str:
    row, dense = headline(results), results.dense
    kept = row["accuracy"] / dense["accuracy"] if dense["accuracy"] else 0.0
    said = (
        f"With at most {_percent(row['budget'])} of the visual tokens, <b>{row['method']}</b> keeps "
        f"<b>{100 * kept:.1f} %</b> of the dense model’s accuracy"
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


def _costs(results: Results, drawings: dict[str, str]) -> str:
    named = "".join(f"<figure>{drawing}</figure>" for drawing in drawings.values())
    return (
        "<p>Exact match of each method through its budgets. Bars are 95 % intervals. Ringed and joined by dots is the "
        f"Pareto front: nothing that costs as much (within {_percent(SAME_COST)}) or less is more accurate. The line "
        "across is the dense model. In colour are the methods that are best on average over the budgets; dashed are "
        "the baselines. Point at a name to see its line alone.</p>"
        f"<div class=pair>{named}</div>"
    )


def _tables(results: Results) -> str:
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
    ]
    head.append("seconds")
    parts = [
        "<p>A budget bounds the mean over decoder layers of kept over all visual tokens; <i>kept</i> is what it was, "
        "<i>FLOPs</i> what encoder and prefill then cost, both as parts of the dense model’s. <i>Right</i> is exact "
        f"match; the dense model has {_points(dense['accuracy'])} % ({_span(dense['interval'])}), the upright line. "
        "<i>To dense</i> and <i>to best baseline</i> are paired differences in points, <i>as dense</i> the share of "
        "answers that are word for word the dense model’s. <i>Select</i> is milliseconds of the method itself, "
        f"<i>seconds</i> a picture with all its questions (dense: {dense['seconds']:.2f}). Click a heading to sort.</p>"
    ]
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
                    else _cell("–", -math.inf),
                    _cell(f"{_points(row['agreement'])} %", row["agreement"]),
                    _cell(f"{1e3 * row['selection_seconds']:.1f}", row["selection_seconds"]),
                    _cell(f"{row['seconds']:.2f}", row["seconds"]),
                )
            )
        parts.append(f"<h3>At most {_percent(budget)} of the tokens</h3>{_table(head, lines, f'budget-{budget:g}')}")
        parts.append(_weak(results.at(budget)))
    return "".join(parts)


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


def _heat(results: Results) -> str:
    dense = results.dense["categories"]
    first = results.lines[next(cell for cell in results.lines if cell.method == DENSE)]
    asked = [c for i in range(results.about["items"]) for c, _, _ in first[i]["answers"]]
    asked_of = task.get(results.about["task"])
    head = ["method", *(f"{c}<small>{asked.count(c)}</small>" for c in dense), "all"]
    parts = [
        "<p>Accuracy as a part of the dense model’s, in percent. Under each kind stands how many questions it has, in "
        "the first line what the dense model gets right, and in the second what drawing an answer by lot would keep: "
        "what is near that is lost, whatever its number.</p><div class=pair>"
    ]
    for budget in results.budgets:
        fixed = "".join(f"<td>{_points(value)}</td>" for value in dense.values())
        lot = "".join(f"<td>{_ratio(asked_of.chance(c), dense[c], '')}</td>" for c in dense)
        lines = [
            f"<tr class=fixed><th scope=row>dense, % right</th>{fixed}"
            f"<td>{_points(results.dense['accuracy'])}</td></tr>",
            f"<tr class=fixed><th scope=row>by lot</th>{lot}<td></td></tr>",
        ]
        for row in results.at(budget):
            pairs = [*((row["categories"][c], dense[c]) for c in dense), (row["accuracy"], results.dense["accuracy"])]
            lines.append(_row(row["method"], *(_warm(got, of) for got, of in pairs)))
        drawn = _table(head, lines, f"kinds-{budget:g}", "heat")
        parts.append(f"<div><h3>At most {_percent(budget)} of the tokens</h3>{drawn}</div>")
    return "".join(parts) + "</div>"


def _warm(got: float, of: float) -> str:
    """A cell that is the redder the more is lost."""
    if not of:
        return _cell("–", -1)
    lost = 100 * min(1, max(0, 1 - got / of))
    return f'<td data-v="{got / of:.6f}" style="--lost:{lost:.0f}%">{100 * got / of:.0f}</td>'


def _detail(results: Results) -> str:
    parts = [
        "<p>Many questions about a picture can be answered from a smaller one. After VTC-Bench, here are only "
        f"questions that the dense model gets right, divided by what <i>{FILTER}</i>, a smaller picture with the same "
        "budget, makes of them: <i>needs detail</i> where that is wrong, <i>easy</i> where it is right. The dense "
        f"model has 100 % on both, {FILTER} 0 and 100 %, by construction; so this ranks methods, and does not tell how "
        "good they are on all questions.</p><div class=pair>"
    ]
    for budget in results.budgets:
        found = filtered(results, budget)
        if found is None:
            parts.append(f"<p>At {_percent(budget)}: {FILTER} was not run, so there is no filter.</p>")
            continue
        lines = [
            _row(name, *_shared(shares["hard"], bar=True), *_shared(shares["easy"]))
            for name, shares in sorted(found["methods"].items(), key=lambda item: -(item[1]["hard"] or (0,))[0])
        ]
        head = ["method", "needs detail", "95 % interval", "", "easy", "95 % interval"]
        said = f"{_count(found['hard'], 'question')} need{'s' * (found['hard'] == 1)} detail, {found['easy']} are easy."
        drawn = _table(head, lines, f"detail-{budget:g}")
        parts.append(f"<div><h3>At most {_percent(budget)} of the tokens</h3><p class=note>{said}</p>{drawn}</div>")
    return "".join(parts) + "</div>"


def _shared(share: tuple[float, list[float]] | None, bar: bool = False) -> list[str]:
    if share is None:
        return [_cell("–", -1)] * (2 + bar)
    at, span = share
    cells = [_cell(f"<b>{_points(at)}</b>" if bar else _points(at), at), _cell(_span(span), span[0])]
    return [*cells, f"<td>{_whisker(at, span)}</td>"] if bar else cells


def _gallery(results: Results, count: int) -> str:
    words, pictures = gallery(results, count)
    shown = "".join(
        f'<figure><img alt="{html.escape(title)}" src="data:image/webp;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
        for title, data in pictures
    )
    return f"<p>{html.escape(words)}</p><div class=shots>{shown}</div>"


def _not_run(results: Results) -> str:
    items = "".join(f"<dt>{html.escape(what)}</dt><dd>{html.escape(why)}</dd>" for what, why in left_out(results))
    return f"<dl>{items}</dl>" if items else "<p>Nothing was left out.</p>"


def _provenance(results: Results) -> str:
    about, machine = results.about, results.about["machine"]
    test = about["test_set"]
    items = {
        "Model": about["model"],
        "Weights": f"{about['weights']} (first 12 hex digits of a SHA-256 of all of them)",
        "Test set": f"version {test['version']}, seed {test['seed']}, first {about['items']} items, drawn offline",
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


CSS = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Noto Sans","DejaVu Sans",sans-serif;font-variant-numeric:tabular-nums lining-nums}
header,main{max-width:1160px;margin:auto;padding:0 clamp(16px,4vw,40px)}
header{padding-top:clamp(28px,6vw,72px)}
h1,h2,h3{font-family:"Iowan Old Style",Charter,"Palatino Linotype",Palatino,"Noto Serif",Georgia,serif;line-height:1.2;
text-wrap:balance;font-weight:600}
h1{font-size:clamp(25px,4.1vw,42px);letter-spacing:-.012em;font-weight:400;max-width:25em;margin:.35em 0 .5em}
h1 b{font-weight:700}
h2{font-size:clamp(21px,2.5vw,28px);margin:0 0 .5em}
h3{font-size:17px;margin:2em 0 .5em}
p{max-width:70ch;margin:0 0 1em}
.over{color:var(--soft);font-size:14px;letter-spacing:.02em;margin:0}
.dek{color:var(--soft);font-size:17px}
.note{color:var(--soft);font-size:14px;margin:.6em 0 .6em}
section{padding-top:clamp(28px,4vw,48px);margin-top:clamp(28px,4vw,48px);border-top:1px solid var(--line)}
main{padding-bottom:80px}
nav{display:flex;flex-wrap:wrap;gap:4px 20px;font-size:14px;margin-top:28px}
a{color:var(--c1);text-decoration:none}a:hover{text-decoration:underline}
.tiles{list-style:none;display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,200px),1fr));gap:12px;
padding:0;margin:28px 0 0}
.tiles li{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 16px;display:grid}
.tiles span{color:var(--soft);font-size:14px}.tiles b{font-size:20px}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,500px),1fr));gap:20px 28px}
.pair>*{min-width:0}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px}
figure svg{display:block;width:100%;height:auto;overflow:visible}
figure svg text{font-family:inherit!important}
svg .m{transition:opacity .15s}
.picking svg .m{opacity:.1}.picking svg .m.on{opacity:1}
tr.on>*{background:color-mix(in srgb,var(--c1) 12%,var(--card))}
.shots{display:grid;gap:20px}
.shots img{display:block;width:100%;height:auto;border-radius:4px}
figcaption{font-size:14px;color:var(--soft);margin-top:8px}
.wide{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px;
-webkit-overflow-scrolling:touch}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:14px;line-height:1.35}
th,td{padding:6px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
tbody tr:last-child>*{border-bottom:0}
th:first-child{text-align:left;position:sticky;left:0;background:var(--card);font-weight:500;z-index:1}
thead th{font-weight:500;color:var(--soft);vertical-align:bottom;padding:0}
thead button{all:unset;box-sizing:border-box;cursor:pointer;padding:9px 10px 7px;width:100%}
thead button:hover,thead [aria-sort] button{color:var(--ink)}
thead button:focus-visible{outline:2px solid var(--c1);outline-offset:-2px}
[aria-sort=ascending] button::after{content:" ↑"}[aria-sort=descending] button::after{content:" ↓"}
td small,thead small,td i{color:var(--soft);font-size:12px;font-style:normal}
thead small{display:block}
.base th:first-child{font-style:italic;color:var(--soft)}
.whisker{position:relative;display:block;width:120px;height:14px;background:linear-gradient(var(--line),var(--line))
center/100% 1px no-repeat}
.whisker *{position:absolute}
.whisker u{top:0;bottom:0;border-left:1.5px solid var(--ink)}
.whisker i{top:5px;height:4px;border-radius:2px;background:var(--c1);opacity:.45}
.whisker b{top:3px;width:8px;height:8px;margin-left:-4px;border-radius:50%;background:var(--c1)}
.heat th,.heat td{padding:6px 8px}.heat thead th{padding:0}.heat thead button{padding:9px 8px 7px}
.heat td{border:1px solid var(--card);border-radius:5px;text-align:center;
background:color-mix(in oklab,var(--loss) calc(var(--lost,0%)*.72),var(--card))}
.heat thead th{text-align:center}.heat thead th:first-child{text-align:left}
.heat .fixed>*{color:var(--soft);font-size:13px}
dl{display:grid;grid-template-columns:minmax(0,17em) minmax(0,1fr);gap:6px 24px;margin:0 0 1em;font-size:15px}
dt{font-weight:500}dd{margin:0;color:var(--soft);overflow-wrap:anywhere}
@media(max-width:640px){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.7em}figure{padding:8px 6px}
th,td{padding:6px 8px}}
@media print{nav{display:none}section{break-inside:avoid-page}}
"""

JS = """
for (const table of document.querySelectorAll('table')) {
  table.tHead.addEventListener('click', event => {
    const head = event.target.closest('th');
    if (!head || !event.target.closest('button')) return;
    const column = head.cellIndex, named = column === 0;
    const way = head.getAttribute('aria-sort') === (named ? 'ascending' : 'descending') ? -1 : 1;
    const value = row => named ? row.cells[0].textContent : -Number(row.cells[column].dataset.v);
    const rows = [...table.tBodies[0].rows].filter(row => row.dataset.m);
    rows.sort((a, b) => way * (value(a) < value(b) ? -1 : value(a) > value(b) ? 1 : 0));
    table.tBodies[0].append(...rows);
    for (const other of head.parentNode.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', (way > 0) === named ? 'ascending' : 'descending');
  });
}
const pick = event => {
  const at = event.target.closest && event.target.closest('[data-m]');
  document.body.classList.toggle('picking', !!at);
  for (const one of document.querySelectorAll('[data-m]'))
    one.classList.toggle('on', !!at && one.dataset.m === at.dataset.m);
};
for (const kind of ['pointerover', 'pointerdown']) document.addEventListener(kind, pick);
"""

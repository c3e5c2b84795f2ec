"""The drawings of `vtok report`: accuracy against a cost, as SVG inside the page and as PNG beside it."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtok import draw
from vtok.eval.results.cells import baselines
from vtok.eval.results.results import Results, Several
from vtok.eval.results.statistics import Number
from vtok.eval.results.verdicts import front

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
COLOURED = 5  # methods that get a colour; the others are grey
COSTS = {
    "tokens": "visual tokens a decoder layer works on (mean)",
    "flops": "FLOPs of encoder and prefill, by formula",
    "time": "seconds a picture with its questions (median)",
}


LOGARITHMIC = "tokens"  # the cost whose axis is: budgets halve, and other costs lie close together near the top
MARKERS = "osD^v"  # of the methods in colour, so that they differ without it too
APART = 0.012  # part of the axis by which neighbours are moved apart that would lie on each other


@dataclass(frozen=True)
class Point:
    """A method at a budget: its cost as a part of the dense model's, its share and the interval of that."""

    method: str
    budget: float
    cost: float
    share: float
    low: float
    high: float


def of_task(results: Results, colours: Mapping[str, str]) -> dict[str, Any]:
    """Kind of cost -> figure: the accuracies of one task."""
    rows, seconds = results.methods, results.dense.facts["seconds"]
    costs = {
        "tokens": [row.facts["mean_keep"] for row in rows],
        "flops": [row.facts["flops"] for row in rows],
        "time": [row.facts["seconds"] / seconds for row in rows],
    }
    dense = _limits(results.dense.accuracy)
    return {
        kind: chart([_point(row, x, row.accuracy) for row, x in zip(rows, at)], dense, kind, colours)
        for kind, at in costs.items()
    }


def of_several(found: Several, colours: Mapping[str, str]) -> dict[str, Any]:
    """Kind of cost -> figure: the means over tasks; none where no method has one."""
    rows = [row for row in found.rows.values() if row.kept]
    costs = {"tokens": [row.mean_keep for row in rows], "flops": [row.flops for row in rows]}
    return {
        kind: chart([_point(row, x, row.kept) for row, x in zip(rows, at)], (1.0, 1.0, 1.0), kind, colours)
        for kind, at in (costs.items() if rows else ())
    }


def _limits(number: Number) -> tuple[float, float, float]:
    """A number and its interval, itself where it has none."""
    return (number.at, *(number.span or (number.at, number.at)))


def _point(row: Any, cost: float, number: Number) -> Point:
    return Point(row.method, row.budget, cost, *_limits(number))


def chart(points: Sequence[Point], dense: tuple[float, float, float], kind: str, colours: Mapping[str, str]) -> Any:
    """Share against cost, a line for each method through its budgets, as a figure of matplotlib.

    dense: the dense model's share and interval. kind: of `COSTS`. colours: method -> colour; others are grey.
    """
    figure_class, _ = draw._matplotlib()
    figure = figure_class(figsize=(5.6, 5.0), dpi=100, facecolor="none")
    axes = figure.add_axes((0.09, 0.115, 0.69, 0.85), facecolor="none")
    places = moved(points, kind, {*colours, *baselines()})
    _scales(axes, points, dense, kind, places)
    ends = _lines(axes, points, colours, places)
    ink = THEME["ink"][0]
    at = {(point.method, point.budget): (point.cost, 100 * point.share) for point in points}
    x = {(point.method, point.budget): x for point, x in zip(points, places)}
    best = list(zip(*((x[key], at[key][1]) for key in front(at))))
    axes.plot(*best, color=ink, linewidth=1, linestyle=":", zorder=6)
    axes.plot(*best, "o", markersize=11, mfc="none", mec=ink, mew=1.1, zorder=6)
    level, *span = (100 * share for share in dense)
    axes.axhline(level, color=ink, linewidth=1, zorder=2)
    axes.axhspan(*span, color=ink, alpha=0.07, linewidth=0, zorder=1)
    words = {"color": ink, "fontsize": 10.5, "va": "bottom", "gid": "dense", "transform": axes.get_yaxis_transform()}
    axes.text(0.015, level + 0.7, f"dense {level:.1f} %", **words)
    _names(axes, ends, colours)
    return figure


def moved(points: Sequence[Point], kind: str, bars: Collection[str] = ()) -> list[float]:
    """Where along the axis each point is drawn: near its cost, and beside those that it would lie on.

    bars: methods that are drawn with their intervals, which then do not lie on each other either."""
    costs = [math.log(point.cost) if kind == LOGARITHMIC else point.cost for point in points]
    step = APART * ((max(costs) - min(costs)) or 1)
    places = [0.0] * len(points)
    placed: list[tuple[float, float, float]] = []  # place, and what is drawn from where to where above it
    for i in sorted(range(len(points)), key=lambda i: -points[i].share):
        p = points[i]
        low, high = (p.low, p.high) if p.method in bars else (p.share - 0.005, p.share + 0.005)
        taken = [x for x, bottom, top in placed if bottom < high and low < top]
        steps = (side * n for n in range(len(points)) for side in (1, -1))
        at = next(costs[i] + n * step for n in steps if all(abs(costs[i] + n * step - x) > 0.99 * step for x in taken))
        placed.append((at, low, high))
        places[i] = math.exp(at) if kind == LOGARITHMIC else at
    return places


def _scales(
    axes: Any, points: Sequence[Point], dense: tuple[float, float, float], kind: str, costs: Sequence[float]
) -> None:
    """Limits, ticks and grid of both axes."""
    soft, line = THEME["soft"][0], THEME["line"][0]
    top, low = 100 * max(*(p.high for p in points), *dense), 100 * min(p.low for p in points)
    axes.set_ylim(max(0, low - 4), top + 6 if top > 101 else min(101, top + 6))
    if kind == LOGARITHMIC:
        left, right = min(costs) * 0.86, max(costs) * 1.12
        axes.set_xscale("log")
        ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0) if left <= t <= right]
        axes.set_xticks(ticks, [f"{100 * t:g} %" for t in ticks])
        axes.minorticks_off()
    else:
        room = 0.05 * (max(costs) - min(costs) or 1)
        left, right = min(costs) - room, max(costs) + room
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlim(left, right)
    axes.set_xlabel(COSTS[kind] + ", dense = 100 %", color=soft, fontsize=10.5)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    axes.tick_params(colors=soft, labelsize=10.5, length=0)
    axes.grid(color=line, linewidth=0.7, zorder=0)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _lines(
    axes: Any, points: Sequence[Point], colours: Mapping[str, str], places: Sequence[float]
) -> dict[str, tuple[float, float]]:
    """A line a method, those in colour last, and where each ends."""
    methods: dict[str, list[tuple[float, Point]]] = {}
    for x, point in zip(places, points):
        methods.setdefault(point.method, []).append((x, point))
    ends, known = {}, baselines()
    for i, name in enumerate(sorted(methods, key=lambda name: (name in colours, name in known))):
        path = sorted(methods[name], key=lambda pair: pair[0])
        x, y = [x for x, _ in path], [100 * point.share for _, point in path]
        strong, colour = name in colours, colours.get(name, THEME["grey"][0])
        style = {"color": colour, "linewidth": 2.0 if strong else 1.0, "linestyle": "--" if name in known else "-"}
        style["marker"] = MARKERS[list(colours).index(name) % len(MARKERS)] if strong else "."
        axes.plot(x, y, markersize=5 if strong else 4, gid=f"m:{name}:{i}a", zorder=4 + strong, **style)
        if strong or name in known:
            low, high = [100 * point.low for _, point in path], [100 * point.high for _, point in path]
            axes.vlines(x, low, high, color=colour, linewidth=1.2, alpha=0.55, gid=f"m:{name}:{i}b", zorder=3)
        ends[name] = (x[-1], y[-1])
    return ends


def _names(axes: Any, ends: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """The name of each line, right of the axes, none on another."""
    soft, grey = THEME["soft"][0], THEME["grey"][0]
    bottom, ceiling = axes.get_ylim()
    heights = _apart({name: y for name, (_, y) in ends.items()}, (ceiling - bottom) / 28, bottom, ceiling)
    for i, (name, (x, y)) in enumerate(ends.items()):
        arrow = {"arrowstyle": "-", "color": colours.get(name, grey), "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4}
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
            arrowprops=arrow,
        )
        note.set_gid(f"m:{name}:{i}c")


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


def png(figure: Any, file: Path) -> None:
    _, canvas_class = draw._matplotlib()
    canvas_class(figure)
    figure.savefig(file, dpi=200, facecolor=THEME["card"][0])


def svg(figure: Any, title: str) -> str:
    """The figure for use inside a page: its colours are the page's, its texts are text, and no address is left.

    title: what it shows; no two drawings of a page may have the same.
    """
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

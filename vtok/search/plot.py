"""A search as a picture: the schedule that was found, and how its score came about. Needs matplotlib ("viz")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vtok.search.schedules import Rates, mean

INK, FAINT, ACCENT = "#1c1c1c", "#7a7a7a", "#b3261e"
DASHES = ("-", "--", ":", "-.")


def draw(
    file: Path,
    asked: Sequence[tuple[Rates, float]],
    found: Rates,
    others: dict[str, Rates] | None = None,
    metric: str = "score",
    floor: float | None = None,
    title: str = "",
) -> None:
    """Write a PNG with two panels: rates by layer, and scores by evaluation.

    asked: (rates, score) in the order of the search. others: name -> schedules to compare with. floor: the score
    below which a schedule does not pass, where there is one; else the best score so far is drawn.
    """
    from vtok import draw as drawing

    drawing.check()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from PIL import Image

    figure = Figure(figsize=(10, 4), dpi=150, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=11, color=INK, parse_math=False)
    left, right = figure.subplots(1, 2)
    for i, (name, rates) in enumerate({**(others or {}), f"found, mean {mean(found):.3f}": found}.items()):
        edges = range(1, len(rates) + 2)  # a layer's rate holds from its number to the next
        style = {"color": FAINT, "linewidth": 1, "linestyle": DASHES[i % len(DASHES)]}
        if rates is found:
            style = {"color": ACCENT, "linewidth": 2}
        left.stairs(rates, [e - 0.5 for e in edges], baseline=None, label=name, **style)
    left.set(xlabel="decoder layer", ylabel="share of the visual tokens", ylim=(0, 1.05))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(frameon=False, fontsize=8)

    numbers, scores = range(1, len(asked) + 1), [score for _, score in asked]
    right.scatter(numbers, scores, s=14, color=INK, zorder=2)
    if floor is not None:
        right.axhline(floor, color=ACCENT, linewidth=1, label="lowest that passes")
    else:
        best = [max(scores[: n + 1]) for n in range(len(scores))]
        right.step(numbers, best, where="post", color=ACCENT, linewidth=1, label="best so far")
    right.set(xlabel="evaluation", ylabel=metric)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawing.save(Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB"), file)

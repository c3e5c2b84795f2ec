"""Series as pictures: line plots as TimeMaster draws them, and smaller ones for small models. Needs matplotlib."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vtok.errors import InvalidValue, MissingExtra


@dataclass(frozen=True)
class Plot:
    """How a series is drawn. The defaults are those of TimeMaster's code for one channel.

    width, height: inches; several channels share the height. dpi: pixels an inch. line: width in points.
    title, x, y: texts, none if empty. sizes: of title, axis labels and tick labels, points; no ticks where the last
        is 0. tight: cut to what is drawn, with that many inches around; None keeps width times dpi by height times dpi.
    """

    width: float = 6.0
    height: float = 2.5
    dpi: int = 100
    line: float = 2.0
    title: str = "Complete Signal"
    x: str = "Timestamp"
    y: str = "Value"
    sizes: tuple[float, float, float] = (9, 8, 7)
    tight: float | None = 0.05

    def __post_init__(self) -> None:
        if min(self.width, self.height, self.dpi, self.line) <= 0:
            raise InvalidValue(f"A plot needs a width, height, dpi and line above 0, got {self}.")
        if self.tight is None and min(self.width, self.height) * self.dpi < 16:
            raise InvalidValue("A plot needs at least 16 pixels a side.")


def small(width: int, height: int) -> Plot:
    """A bare curve in a frame, exactly so many pixels, for models that cannot read small print."""
    return Plot(width / 100, height / 100, 100, 1.2, "", "", "", (0, 0, 0), None)


def render(
    values: np.ndarray,
    plot: Plot = Plot(),
    channels: tuple[str, ...] = (),
    scale: tuple[tuple[float, float], ...] | None = None,
) -> Image.Image:
    """The picture of one series, RGB, the same in every run with one version of matplotlib.

    values: [channels, points], finite; a constant channel is a flat line. Channels stand one below the other.
    channels: their names, on the y axes instead of `plot.y`. scale: lowest and highest value that the y axis of each
        channel shows; without it each axis fits its own values.
    Matplotlib's settings of the process are neither read nor changed. Raises `MissingExtra` without it."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtra('Drawing series needs matplotlib: pip install "vtok[viz]".') from error
    values = np.atleast_2d(np.asarray(values, dtype=float))
    # The class's own defaults, whatever a matplotlibrc says; "backend" would load one.
    with matplotlib.rc_context():
        dict.update(matplotlib.rcParams, {k: v for k, v in matplotlib.rcParamsDefault.items() if k != "backend"})
        figure = Figure(figsize=(plot.width, plot.height), dpi=plot.dpi)
        canvas = FigureCanvasAgg(figure)
        for i, row in enumerate(values):
            axes = figure.add_subplot(len(values), 1, i + 1)
            axes.plot(np.arange(len(row)), row, linewidth=plot.line)
            if scale is not None and scale[i][0] < scale[i][1]:
                axes.set_ylim(*scale[i])
            _label(axes, plot, channels[i] if channels else plot.y, i == 0, i == len(values) - 1)
        if plot.tight is None:
            figure.subplots_adjust(0.02, 0.03, 0.98, 0.97, hspace=0.06)
            canvas.draw()
            return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        return _tight(figure, plot.tight)


def _label(axes, plot: Plot, y: str, first: bool, last: bool) -> None:
    title, label, ticks = plot.sizes
    if plot.title and first:
        axes.set_title(plot.title, fontsize=title)
    if plot.x and last:
        axes.set_xlabel(plot.x, fontsize=label)
    if y and label:
        axes.set_ylabel(y, fontsize=label)
    if not ticks:
        axes.set(xticks=[], yticks=[])
    elif last:
        axes.tick_params(labelsize=ticks)
    else:  # the time axis is shared
        axes.tick_params(labelsize=ticks, labelbottom=False)


def _tight(figure, pad: float) -> Image.Image:
    from io import BytesIO

    file = BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=pad)
    return Image.open(file).convert("RGB")

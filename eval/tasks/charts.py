"""Charts of real time series: lines, points and bars, and what they show.

The series are those of the UCR and UEA archives that aeon ships: windows of ArrowHead, GunPoint, ItalyPowerDemand and
OSULeaf, and whole series of GunPoint, ItalyPowerDemand and BasicMotions for the class. Charts of 128 x 128 to
256 x 128 pixels. Asked are the movement (`trend`: rising, falling, peak or valley), in which third the highest point
lies (`maximum`), the number of peaks (`peaks`, 1 to 4), which of two curves starts or ends higher (`compare`), the
tallest or lowest of four to six bars (`bars`), whether a spike was put into the curve (`spike`) and what was recorded
(`class`: gun or point, winter or summer, standing, running, walking or badminton). Windows on which the answer is not
plain to see are left out, and every answer of a question is equally likely. `class` is knowledge: a person has to see
the series of the training split first. BasicMotions is drawn to one scale, its three acceleration axes together.

Splits share no series.

Licences: aeon is BSD-3-Clause; the archives ask to be cited (Dau et al., The UCR time series archive, 2019; Bagnall et
al., The UEA multivariate time series classification archive, 2018) and name no licence. Fonts: DejaVu, of matplotlib.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from vtok.eval.tasks import sources
from vtok.eval.tasks.canvas import INK
from vtok.eval.tasks.task import Item, Question, Task, generator

POINTS = 64  # of a plotted window
SIZES = ((192, 128), (128, 128), (256, 128), (160, 128))
KINDS = ("trend", "maximum", "peaks", "compare", "bars", "spike", "class")
THIRDS = ("left", "middle", "right")
CLEAR = 0.2  # of the height: what tells a highest point from the next, or two ends from each other
CLASSES = {  # data set -> label in its file -> the word for it
    "GunPoint": {"1": "gun", "2": "point"},
    "ItalyPowerDemand": {"1": "winter", "2": "summer"},
    "BasicMotions": {name: name for name in ("standing", "running", "walking", "badminton")},
}
Curve = tuple[np.ndarray, str]  # values in 0..1, float [POINTS]; name of the series it was cut from


@cache
def windows(split: str) -> dict[str, dict[str, list[Curve]]]:
    """Windows of a split's series by what they show: "trend", "maximum", "peaks" -> answer -> curves; "smooth": those
    without a spike, under the one key ""; "any": all, likewise."""
    rng = np.random.default_rng(sources.SPLITS.index(split))
    found: dict[str, dict[str, list[Curve]]] = defaultdict(lambda: defaultdict(list))
    for row in sources.series(split):
        name = _name(row)
        for _ in range(max(3, len(row) // 14)):
            length = int(rng.integers(max(16, len(row) // 5), len(row) + 1)) if len(row) > 16 else len(row)
            start = int(rng.integers(0, len(row) - length + 1))
            curve = _resample(row[start : start + length], POINTS)
            if np.ptp(curve) < 0.5:  # the series are z-scored: less than this is noise
                continue
            curve = (curve - curve.min()) / np.ptp(curve)
            for kind, answer in _shown(curve).items():
                found[kind][answer].append((curve, name))
    return {kind: dict(groups) for kind, groups in found.items()}


def _name(row: np.ndarray) -> str:
    return f"series {zlib.crc32(row.tobytes()):08x}"


def _resample(row: np.ndarray, points: int) -> np.ndarray:
    return np.interp(np.linspace(0, len(row) - 1, points), np.arange(len(row)), row)


def _shown(curve: np.ndarray) -> dict[str, str]:
    """What is plain to see in a curve: kind of question -> answer."""
    shown = {"any": ""}
    coarse = _resample(curve, sources.POINTS)
    trend = sources.trend((coarse - coarse.min()) / np.ptp(coarse))
    crossings = int((np.diff(curve > 0.5) != 0).sum())
    if trend and crossings == (1 if trend in ("rising", "falling") else 2):  # no peak among several, no detour
        shown["trend"] = trend
    if third := highest_third(curve):
        shown["maximum"] = third
    if count := peaks(curve):
        shown["peaks"] = str(count)
    neighbours = np.stack([curve[:-4], curve[1:-3], curve[3:-1], curve[4:]])
    if np.abs(curve[2:-2] - np.median(neighbours, axis=0)).max() < 0.12:
        shown["smooth"] = ""
    return shown


def highest_third(curve: np.ndarray) -> str | None:
    """The third that holds the highest point, if that is well inside it and all points elsewhere are lower by CLEAR."""
    at, size = int(curve.argmax()), len(curve) / 3
    third = int(at // size)
    inside = min(at - third * size, (third + 1) * size - at)
    away = np.abs(np.arange(len(curve)) - at) > size / 2
    others = np.arange(len(curve)) // size != third
    if (inside < 2 and at not in (0, len(curve) - 1)) or curve[away | others].max() > 1 - CLEAR:
        return None
    return THIRDS[third]


def peaks(curve: np.ndarray) -> int | None:
    """Number of peaks, 1 to 4, if each rises by 0.25 on both sides, all other bumps by less than 0.06, and neither
    end is high enough to be taken for one."""
    from scipy.signal import find_peaks

    if max(curve[0], curve[-1]) > 0.5:
        return None
    heights = find_peaks(curve, prominence=0.0)[1]["prominences"]
    large = int((heights >= 0.25).sum())
    if not 1 <= large <= 4 or ((heights >= 0.06) & (heights < 0.25)).any():
        return None
    return large


@cache
def recordings(split: str) -> dict[str, dict[str, list[tuple[np.ndarray, str]]]]:
    """Whole series: data set -> word of the class -> (float [L] or [3, L], name)."""
    mine = {row.tobytes() for row in sources.series(split)}
    found: dict[str, dict[str, list]] = {data: {word: [] for word in words.values()} for data, words in CLASSES.items()}
    for data, words in CLASSES.items():
        for part in ("TRAIN", "TEST"):
            text = sources.wheel_file(f"aeon/datasets/data/{data}/{data}_{part}.ts").read_text()
            for i, line in enumerate(text.lower().split("@data", 1)[1].split()):
                *axes, label = line.split(":")
                rows = np.array([axis.split(",") for axis in axes], dtype=float)
                if data == "BasicMotions":
                    if sources.split_of(i) == split:
                        found[data][words[label]].append((rows[:3], _name(rows)))
                elif rows[0].tobytes() in mine:
                    found[data][words[label]].append((rows[0], _name(rows[0])))
    return found


# ------------------------------------------------------------------------------------------------- drawing


class Chart:
    """A chart whose plot area holds 0..1 in both directions."""

    zoom = 3

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.width, self.height = SIZES[int(rng.integers(len(SIZES)))]
        left = int(rng.choice([8, 24]))
        self.left, self.top, self.right, self.bottom = left, 8, self.width - 8, self.height - 16
        self.labels: list[tuple[float, float, str]] = []
        paper = tuple(rng.integers(232, 256, 3).tolist())
        self.tile = Image.new("RGB", (self.width * self.zoom, self.height * self.zoom), paper)
        self.pen = ImageDraw.Draw(self.tile)
        for share in (0.0, 0.5, 1.0) if rng.random() < 0.6 else ():
            self.line([(0, share), (1, share)], (200, 200, 200), 0.7)
            if left > 8:
                self.labels.append((3, self.at(0, share)[1] - 5, str(int(share * 10))))
        self.line([(0, 1), (0, 0), (1, 0)], (70, 70, 70), 1)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a place in the plot area."""
        pad = 3
        width, height = self.right - self.left - 2 * pad, self.bottom - self.top - 2 * pad
        return self.left + pad + x * width, self.bottom - pad - y * height

    def line(self, points, colour, width: float) -> None:
        pixels = [tuple(v * self.zoom for v in self.at(x, y)) for x, y in points]
        self.pen.line(pixels, colour, round(width * self.zoom), joint="curve")

    def curve(self, values: np.ndarray, colour, style: str = "line") -> None:
        """Values in 0..1 as a line, as points or as thin bars."""
        places = list(zip(np.linspace(0, 1, len(values)).tolist(), values.tolist()))
        if style == "line":
            self.line(places, colour, 1.6)
        for x, y in places:
            px, py = (v * self.zoom for v in self.at(x, y))
            if style == "points":
                r = 1.4 * self.zoom
                self.pen.ellipse((px - r, py - r, px + r, py + r), fill=colour)
            elif style == "bars":
                half = 0.36 * (self.right - self.left) / len(values) * self.zoom
                self.pen.rectangle((px - half, py, px + half, self.at(0, 0)[1] * self.zoom), fill=colour)

    def around(self, x: float, y: float, reach: float = 10) -> tuple[int, float, float, float, float]:
        """The box of `reach` pixels around a place in the plot area."""
        px, py = self.at(x, y)
        return (0, max(px - reach, 0), max(py - reach, 0), min(px + reach, self.width), min(py + reach, self.height))

    def image(self) -> Image.Image:
        image = self.tile.resize((self.width, self.height), Image.Resampling.BOX)
        pen = ImageDraw.Draw(image)
        for x, y, text in self.labels:
            pen.text((x, y), text, font=sources.font("DejaVuSans.ttf", 10), fill=(40, 40, 40))
        return image


def _some(rng, items):
    return items[int(rng.integers(len(items)))]


def _dark(rng) -> tuple[int, int, int]:
    return tuple(rng.integers(0, 150, 3).tolist())


# ----------------------------------------------------------------------------------------------- questions


def item(split: str, seed: int, index: int) -> Item:
    rng = generator("charts", split, seed, index)
    kind = KINDS[index % len(KINDS)]
    chart = Chart(rng)
    draw = {"compare": _compare, "bars": _bars, "spike": _spike, "class": _class}.get(kind, _curve)
    questions, names = draw(chart, rng, split, kind)
    return Item(index, "image", (chart.image(),), tuple(questions), sources=tuple(names))


def _curve(chart: Chart, rng, split: str, kind: str):
    groups = windows(split)[kind]
    answer = _some(rng, sorted(groups))
    curve, name = _some(rng, groups[answer])
    style = "line" if kind == "peaks" else _some(rng, ("line", "points", "bars"))
    chart.curve(0.06 + 0.9 * curve, _dark(rng), style)
    text, boxes = {
        "trend": ("Is it rising, falling, a peak or a valley?", ()),
        "maximum": (
            "Where is the highest point, left, middle or right?",
            (chart.around(curve.argmax() / POINTS, 0.96),),
        ),
        "peaks": ("How many peaks does the curve have?", ()),
    }[kind]
    return [Question(kind, text, answer, boxes)], [name]


def _compare(chart: Chart, rng, split: str, kind: str):
    """Two curves, scaled together, apart at both ends."""
    curves = windows(split)["any"][""]
    while True:
        pair = [_some(rng, curves), _some(rng, curves)]
        one, two = ((row - row.mean()) / row.std() for row, _ in pair)
        low, span = min(one.min(), two.min()), np.ptp([one, two])
        one, two = (one - low) / span, (two - low) / span
        if min(abs(one[0] - two[0]), abs(one[-1] - two[-1])) >= CLEAR:
            break
    colours = rng.permutation(["red", "green", "blue", "black"]).tolist()[:2]
    for row, colour in zip((one, two), colours):
        chart.curve(0.04 + 0.92 * row, INK[colour])
    questions = []
    for where, verb in ((0, "starts"), (-1, "ends")):
        higher = colours[int(two[where] > one[where])]
        first, second = rng.permutation(colours).tolist()
        boxes = tuple(chart.around(-where, 0.04 + 0.92 * row[where], 8) for row in (one, two))
        text = f"Which curve {verb} higher, the {first} or the {second} one?"
        questions.append(Question("compare", text, higher, boxes))
    return [questions[i] for i in rng.permutation(2)], [name for _, name in pair]


def _bars(chart: Chart, rng, split: str, kind: str):
    """Means over stretches of a window, one bar each."""
    count = int(rng.integers(4, 7))
    tallest, lowest = rng.permutation(count)[:2].tolist()
    while True:
        curve, name = _some(rng, windows(split)["any"][""])
        means = np.array([part.mean() for part in np.array_split(curve, count)])
        means = means[rng.permutation(count)]
        order = np.argsort(means)
        if means[order[-1]] - means[order[-2]] >= 0.08 and means[order[1]] - means[order[0]] >= 0.08:
            break
    # The order of the stretches is free: the extremes go where the answers want them.
    means[[tallest, order[-1]]] = means[[order[-1], tallest]]
    at = int(means.argmin())
    means[[lowest, at]] = means[[at, lowest]]
    means = 0.12 + 0.85 * (means - means.min()) / np.ptp(means)
    letters = "ABCDEF"[:count]
    step = 1 / count
    colour, boxes = _dark(rng), {}
    for i, value in enumerate(means.tolist()):
        (left, top), (right, _) = chart.at((i + 0.18) * step, value), chart.at((i + 0.82) * step, value)
        area = (left, top, right, chart.at(0, 0)[1])
        chart.pen.rectangle([v * chart.zoom for v in area], fill=colour)
        boxes[i] = (0, left, top, right, chart.height)
        chart.labels.append(((left + right) / 2 - 4, chart.bottom + 2, letters[i]))
    asked = [("tallest", tallest), ("lowest", lowest)]
    asked = [asked[i] for i in rng.permutation(2)]
    return [Question("bars", f"Which bar is the {word}?", letters[i], (boxes[i],)) for word, i in asked], [name]


def _spike(chart: Chart, rng, split: str, kind: str):
    """A smooth curve, to half of which a spike is added."""
    curve, name = _some(rng, windows(split)["smooth"][""])
    curve, boxes = curve.copy(), ()
    there = bool(rng.random() < 0.5)
    at = int(rng.integers(4, POINTS - 4))
    if there:
        curve[at] += rng.uniform(0.45, 0.8) * (1 if curve[at] < 0.5 else -1)
    curve = (curve - curve.min()) / np.ptp(curve)
    chart.curve(0.05 + 0.9 * curve, _dark(rng))
    if there:
        boxes = (chart.around(at / (POINTS - 1), 0.05 + 0.9 * curve[at]),)
    return [Question("spike", "Is there a spike in the curve?", "yes" if there else "no", boxes)], [name]


def _class(chart: Chart, rng, split: str, kind: str):
    data = _some(rng, sorted(CLASSES))
    words = list(CLASSES[data].values())
    word = _some(rng, words)
    rows, name = _some(rng, recordings(split)[data][word])
    if data == "BasicMotions":
        for row, colour in zip(np.clip(rows / 50 + 0.5, 0, 1), ("red", "green", "blue")):
            chart.curve(row, INK[colour])
    else:
        chart.curve(0.05 + 0.9 * (rows - rows.min()) / np.ptp(rows), _dark(rng))
    listed = f"{', '.join(words[:-1])} or {words[-1]}"
    return [Question("class", f"Which class is it, {listed}?", word)], [name]


TASK = Task(
    name="charts",
    title="Charts of real series",
    version=1,
    media="image",
    chances={
        "trend": 1 / 4,
        "maximum": 1 / 3,
        "peaks": 1 / 4,
        "compare": 1 / 2,
        "bars": (1 / 4 + 1 / 5 + 1 / 6) / 3,
        "spike": 1 / 2,
        "class": (1 / 2 + 1 / 2 + 1 / 4) / 3,
    },
    count=560,
    item=item,
    card=__doc__,
)

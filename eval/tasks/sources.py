"""Real material that installed wheels carry: photos, handwritten digits, time series, fonts. No download.

Each source is cut into "train", "val" and "test" once, here, so that no split shares a photo, a digit sample
or a series with another.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from vtok.errors import MissingExtra

SPLITS = ("train", "val", "test")

# motorcycle_left and _right show one scene, so they stay on one side.
PHOTOS = {
    "train": (
        "skimage/data/astronaut.png",
        "skimage/data/brick.png",
        "skimage/data/camera.png",
        "skimage/data/cell.png",
        "skimage/data/coffee.png",
        "skimage/data/coins.png",
        "skimage/data/gravel.png",
        "skimage/data/hubble_deep_field.jpg",
        "skimage/data/motorcycle_left.png",
        "skimage/data/motorcycle_right.png",
        "skimage/data/retina.jpg",
        "sklearn/datasets/images/flower.jpg",
    ),
    "val": ("skimage/data/ihc.png", "skimage/data/rocket.jpg"),
    "test": (
        "skimage/data/chelsea.png",
        "skimage/data/grass.png",
        "skimage/data/moon.png",
        "sklearn/datasets/images/china.jpg",
    ),
}
SERIES = ("ArrowHead", "GunPoint", "ItalyPowerDemand", "OSULeaf")
TRENDS = ("rising", "falling", "peak", "valley")
POINTS = 24  # samples of one plotted curve
FONTS = ("DejaVuSans-Bold.ttf", "DejaVuSansMono-Bold.ttf")


def wheel_file(name: str) -> Path:
    """Path of a data file inside an installed package, without importing the package."""
    package, rest = name.split("/", 1)
    spec = find_spec(package)
    if spec is None:
        raise MissingExtra(f"{package} holds {name}, which is needed here: pip install 'vtok[zoo]'")
    return Path(spec.submodule_search_locations[0]) / rest


def split_of(index: int) -> str:
    """Split of the `index`-th sample of a source: 70 % train, 10 % val, 20 % test."""
    return "train" if index % 10 < 7 else "val" if index % 10 == 7 else "test"


@cache
def photos(split: str) -> tuple[Image.Image, ...]:
    """RGB photos of a split, the long side cut to 640 pixels."""
    images = []
    for name in PHOTOS[split]:
        with Image.open(wheel_file(name)) as image:
            image = image.convert("RGB")
            image.thumbnail((640, 640))
            images.append(image)
    return tuple(images)


@cache
def digits(split: str) -> dict[int, np.ndarray]:
    """Handwritten digits of a split: label -> uint8 ink [N, 8, 8], 0 = paper, 255 = full ink."""
    rows = np.loadtxt(wheel_file("sklearn/datasets/data/digits.csv.gz"), delimiter=",")
    mine = np.array([split_of(i) == split for i in range(len(rows))])
    ink, label = (rows[mine, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), rows[mine, 64].astype(int)
    return {d: ink[label == d] for d in range(10)}


@cache
def series(split: str) -> tuple[np.ndarray, ...]:
    """Real series of a split, each float [L]."""
    rows = []
    for name in SERIES:
        for part in ("TRAIN", "TEST"):
            text = wheel_file(f"aeon/datasets/data/{name}/{name}_{part}.ts").read_text()
            body = text.lower().split("@data", 1)[1].split()
            rows += [np.array(line.split(":")[0].split(","), dtype=float) for line in body]
    owner: dict[bytes, str] = {}  # UCR repeats some series: copies belong together, to train if one of them does
    for name in SPLITS:
        for i, row in enumerate(rows):
            if split_of(i) == name:
                owner.setdefault(row.tobytes(), name)
    return tuple(row for i, row in enumerate(rows) if split_of(i) == split == owner[row.tobytes()])


def trend(curve: np.ndarray) -> str | None:
    """Name of the movement of `curve` (float [POINTS], range 0..1), or None where it is not plain to see."""
    start, end = curve[:3].mean(), curve[-3:].mean()
    inner = slice(POINTS // 4, -POINTS // 4)
    if abs(end - start) > 0.7:
        return "rising" if end > start else "falling"
    if max(start, end) < 0.3 and curve[inner].max() == 1:
        return "peak"
    if min(start, end) > 0.7 and curve[inner].min() == 0:
        return "valley"
    return None


@cache
def curves(split: str) -> dict[str, np.ndarray]:
    """Windows of the real series of a split, by movement: name -> float [N, POINTS] scaled to 0..1."""
    rng = np.random.default_rng(SPLITS.index(split))
    found = {name: [] for name in TRENDS}
    for row in series(split):
        for _ in range(24):
            length = int(rng.integers(max(8, len(row) // 6), len(row) + 1))
            start = int(rng.integers(0, len(row) - length + 1))
            window = np.interp(np.linspace(0, length - 1, POINTS), np.arange(length), row[start : start + length])
            spread = np.ptp(window)
            if spread < 0.5:  # the series are z-scored: less than this is noise
                continue
            window = (window - window.min()) / spread
            name = trend(window)
            if name:
                found[name].append(window.astype(np.float32))
    return {name: np.stack(rows) for name, rows in found.items()}


@cache
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(wheel_file(f"matplotlib/mpl-data/fonts/ttf/{name}")), size)

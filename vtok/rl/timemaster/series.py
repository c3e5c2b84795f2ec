"""Sets of labelled time series: those that aeon ships, .ts files and CSV files. Nothing is downloaded."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from vtok.errors import InvalidValue, MissingExtra, UnknownName, meant

LABEL = "label"  # the column of a CSV file that names the class
# What a set shows, and words for the labels of its files.
ABOUT: dict[str, tuple[str, dict[str, str]]] = {
    "GunPoint": ("the height of a hand that draws a gun or only points", {"1": "gun", "2": "point"}),
    "ItalyPowerDemand": ("the electric power that Italy used in one day", {"1": "winter", "2": "summer"}),
    "BasicMotions": (
        "acceleration and turning of a watch in motion",
        {name: name.lower() for name in ("Standing", "Running", "Walking", "Badminton")},
    ),
    "ArrowHead": ("the outline of an arrow head", {}),
    "OSULeaf": ("the outline of a leaf", {}),
    "ACSF1": ("the electric power that an appliance used", {}),
}


@dataclass(frozen=True, eq=False)
class Series:
    """Series of one length with their classes, checked by `check`.

    values: float64 [series, channels, points]. labels: class of each. name: of the set, for messages.
    about: what they show, as the prompt says it. channels: a name for each, may be empty.
    """

    values: np.ndarray
    labels: tuple[str, ...]
    name: str
    about: str = "a series of measurements"
    channels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check(self)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> tuple[str, ...]:
        """Each class once, in order: numbers by value, before words."""
        return tuple(sorted(set(self.labels), key=_order))

    def take(self, rows: np.ndarray | list[int]) -> Series:
        """The series of these rows, in this order."""
        rows = list(map(int, rows))
        labels = tuple(self.labels[row] for row in rows)
        return Series(self.values[rows], labels, self.name, self.about, self.channels)


def _order(label: str) -> tuple[bool, float, str]:
    try:
        return False, float(label), label
    except ValueError:
        return True, 0.0, label


# ---- checks ----------------------------------------------------------------------------------------------------------
def check(series: Series) -> None:
    """Raises `InvalidValue` where series cannot be trained on: none of them, fewer than two points, values that are
    missing or infinite, labels that are empty or that an answer could not hold."""
    values, labels, name = series.values, series.labels, series.name
    if values.ndim != 3 or len(values) != len(labels) or not len(labels):
        raise InvalidValue(f"{name}: needs values [series, channels, points] and as many labels, at least one.")
    if values.shape[2] < 2:
        raise InvalidValue(f"{name}: a series needs at least 2 points, these have {values.shape[2]}.")
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, channel, point = bad[0].tolist()
        raise InvalidValue(
            f"{name}: series {row} has no finite value at point {point} of channel {channel} ({len(bad)} such values "
            f"in all): fill or drop them first."
        )
    for row, label in enumerate(labels):
        if not label.strip() or label != label.strip() or set(label) & set("<>\n"):
            raise InvalidValue(
                f"{name}: the label {label!r} of series {row} cannot stand in an answer: no empty ones, no <, > or "
                f"line breaks, no spaces around."
            )
    folded = Counter(label.lower() for label in set(labels))
    if twice := [label for label, count in folded.items() if count > 1]:
        raise InvalidValue(f"{name}: labels that differ in case alone are one class to the reward: {twice[0]!r}.")


def check_split(train: Series, test: Series) -> None:
    """Raises `InvalidValue` where what was learnt of `train` says nothing on `test`: another shape, one class alone,
    or a class that is never seen in training."""
    if train.values.shape[1:] != test.values.shape[1:]:
        raise InvalidValue(
            f"{train.name}: series to train on are [channels, points] {train.values.shape[1:]}, and those to test on "
            f"{test.values.shape[1:]}."
        )
    if len(train.classes) < 2:
        raise InvalidValue(f"{train.name}: all series to train on are of the class {train.classes[0]!r}.")
    if unseen := [label for label in test.classes if label not in train.classes]:
        raise InvalidValue(
            f"{train.name}: the class {unseen[0]!r} is tested and never seen in training, which has "
            f"{', '.join(train.classes)}: move some of its series there."
        )


# ---- reading ---------------------------------------------------------------------------------------------------------
def shipped() -> dict[str, Path]:
    """The classification sets that the installed aeon holds: name -> folder. Raises `MissingExtra` without aeon."""
    spec = find_spec("aeon")  # found, not imported: that takes seconds
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra('The series sets come with aeon: pip install "vtok[zoo]".')
    root = Path(spec.submodule_search_locations[0]) / "datasets" / "data"
    found = {}
    for file in sorted(root.glob("*/*_TRAIN.ts")):
        name = file.name.removesuffix("_TRAIN.ts")
        if name == file.parent.name and "@classlabel true" in _head(file) and _part(file.parent, name, "TEST").exists():
            found[name] = file.parent
    return found


def _part(folder: Path, name: str, part: str) -> Path:
    return folder / f"{name}_{part}.ts"


def _head(file: Path) -> str:
    """What a .ts file says before its data, in lower case."""
    with file.open() as lines:
        head = []
        for line in lines:
            if line.strip().lower() == "@data":
                break
            head.append(line.lower())
    return "".join(head)


def load(source: str | Path, *, label: str = LABEL, share: float = 0.7, seed: int = 0) -> tuple[Series, Series]:
    """Series to train on, and others to test on.

    source: a set that aeon ships (`shipped`), split as its archive does; or a CSV file, see `read_csv`, of which
        `share` (0..1) of each class is drawn for training by `seed`; or a folder with NAME_TRAIN.ts and NAME_TEST.ts,
        or train.csv and test.csv, of any NAME.
    label: the column of a CSV file with the class.
    Raises `UnknownName` where there is no such set, and `InvalidValue` where it cannot be trained on.
    """
    path = Path(source)
    if path.is_file():
        train, test = split(read_csv(path, label), share, seed)
    elif (path / "train.csv").is_file() and (path / "test.csv").is_file():
        train, test = (read_csv(path / f"{part}.csv", label) for part in ("train", "test"))
    else:
        known = {} if path.is_dir() else shipped()
        folder = known.get(str(source), path)
        files = sorted(folder.glob(f"{folder.name if known else '*'}_TRAIN.ts"))
        if not files:
            raise UnknownName(
                f"No series {str(source)!r}: it is no CSV file and no folder with train.csv and test.csv or "
                f"NAME_TRAIN.ts and NAME_TEST.ts, and the sets that aeon ships are: {', '.join(known)}."
                f"{meant(str(source), known)}"
            )
        name = files[0].name.removesuffix("_TRAIN.ts")
        train, test = (read_ts(_part(folder, name, part), name) for part in ("TRAIN", "TEST"))
    check_split(train, test)
    return train, test


def read_ts(file: Path, name: str = "", words: Mapping[str, str] | None = None) -> Series:
    """The series of one .ts file of the UCR and UEA archives.

    words: for the labels of the file; those of `ABOUT` if left out."""
    name = name or file.stem
    about, known = ABOUT.get(name, (Series.about, {}))
    words = known if words is None else words
    try:
        lines = file.read_text().splitlines()
    except OSError as error:
        raise InvalidValue(f"{name}: {file} cannot be read ({error}).") from error
    start = next((i for i, line in enumerate(lines) if line.strip().lower() == "@data"), len(lines)) + 1
    rows, labels = [], []
    for line in filter(str.strip, lines[start:]):
        *channels, said = line.strip().split(":")
        rows.append([[_number(cell) for cell in channel.split(",")] for channel in channels])
        labels.append(words.get(said, said))
    return Series(_stack(rows, name), tuple(labels), name, about)


def read_csv(file: str | Path, label: str = LABEL) -> Series:
    """One series a row, its points in the columns from left to right, its class in the column `label`.

    Several channels: columns named CHANNEL:POINT, such as x:0,x:1,y:0,y:1. Raises `InvalidValue`, also for rows of
    unequal length."""
    name = Path(file).stem
    try:
        with Path(file).open(newline="") as lines:
            table = [row for row in csv.reader(lines) if any(map(str.strip, row))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidValue(f"{name}: {file} cannot be read as CSV ({error}).") from error
    if len(table) < 2 or label not in table[0]:
        raise InvalidValue(f"{name}: the first line of {file} must name the columns, one of them {label!r}.")
    head = table[0]
    at = head.index(label)
    columns: dict[str, list[int]] = {}
    for i, title in enumerate(head):
        if i != at:
            columns.setdefault(title.rpartition(":")[0], []).append(i)
    rows, labels = [], []
    for line, cells in enumerate(table[1:], 2):
        if len(cells) != len(head):
            raise InvalidValue(
                f"{name}: line {line} has {len(cells)} cells and the first line {len(head)}: series must have one "
                f"length; resample or cut them first."
            )
        rows.append([[_number(cells[i]) for i in place] for place in columns.values()])
        labels.append(cells[at].strip())
    return Series(_stack(rows, name), tuple(labels), name, channels=tuple(filter(None, columns)))


def _number(cell: str) -> float:
    """NaN for what is no number, which `check` then finds and places."""
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _stack(rows: list[list[list[float]]], name: str) -> np.ndarray:
    """[series, channels, points]"""
    shapes = Counter(tuple(map(len, row)) for row in rows)
    if len(shapes) > 1:
        longest, shortest = max(shapes), min(shapes)
        raise InvalidValue(
            f"{name}: series must have one length, but their channels have {min(shortest)} to {max(longest)} points: "
            f"resample or cut them first."
        )
    return np.array(rows, dtype=float)


# ---- splitting -------------------------------------------------------------------------------------------------------
def split(series: Series, share: float, seed: int = 0) -> tuple[Series, Series]:
    """Two parts, the first with `share` of each class, at least one series of it in each part.

    share: 0..1, both excluded. Raises `InvalidValue`, also for a class with a single series."""
    if not 0 < share < 1:
        raise InvalidValue(f"share must lie between 0 and 1, got {share!r}.")
    rng, first, second = np.random.default_rng(seed), [], []
    for label in series.classes:
        rows = rng.permutation([i for i, own in enumerate(series.labels) if own == label]).tolist()
        if len(rows) < 2:
            raise InvalidValue(f"{series.name}: the class {label!r} has one series, which cannot be split.")
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        first += rows[:count]
        second += rows[count:]
    return series.take(sorted(first)), series.take(sorted(second))

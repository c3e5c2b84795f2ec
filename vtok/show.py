"""What `vtok show` does: one picture or clip, and what each method keeps of it, stage by stage and layer by layer.

A PNG with a row for each method, an HTML page with a slider over decoder layers, and for a clip an animated GIF.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor, nn

from vtok import adapter as adapters
from vtok import draw
from vtok.draw import Panel
from vtok.engine.trace import Trace
from vtok.errors import InvalidValue, Unsupported
from vtok.media import Clip
from vtok.prompts import ask
from vtok.runs import Asked
from vtok.types import Layout, Plane

METHODS = ("globalcom2", "divprune", "fastv", "schedule")  # one of each kind; those that the model supports
ENCODER = -1  # stands for a decoder layer: what leaves the vision encoder
COLUMNS = 5  # of the PNG, at most
SHEET = 1600  # pixels of a contact sheet's longer side
PAGE = 900  # pixels of the longer side of a picture in the page
GIF_WIDTH = 1200


@dataclass(frozen=True)
class Step:
    """What is there at the decoder layers `first` to `last`; both are `ENCODER` for what leaves the encoder.

    n: how many visual tokens that is. held: of how many the cache holds the columns behind the prompt, the mean over
        key-value heads. panel: which are held, and what they stand for.
    """

    first: int
    last: int
    n: int
    held: float
    panel: Panel

    @property
    def words(self) -> str:
        if self.first == ENCODER:
            return "encoder"
        return f"layer {self.first}" if self.first == self.last else f"layers {self.first}–{self.last}"


@dataclass(frozen=True)
class Shown:
    """One method's answer, and its steps from the encoder to the last decoder layer. tokens: of the picture in the
    prompt."""

    method: str
    answer: str
    tokens: int
    steps: tuple[Step, ...]

    @property
    def last(self) -> int:
        """The last decoder layer."""
        return self.steps[-1].last

    def at(self, layer: int) -> Step:
        """What is there at a decoder layer, or `ENCODER`."""
        return next(step for step in self.steps if step.first <= layer <= step.last)

    @cached_property
    def mean(self) -> Panel:
        """[N] the part of the decoder's layers that work on each token."""
        inside = [step for step in self.steps if step.first != ENCODER]
        seen = sum(step.panel.seen.float() * (step.last - step.first + 1) for step in inside) / (self.last + 1)
        return replace(inside[0].panel, seen=seen)

    @property
    def counts(self) -> list[tuple[int, int]]:
        """How many tokens are there at the encoder's end, and held of each decoder layer."""
        return [(layer, round(self.at(layer).held)) for layer in range(ENCODER, self.last + 1)]

    @property
    def stages(self) -> str:
        """How many tokens go from stage to stage, in words."""
        encoded, entered, final = self.steps[0].n, self.at(0).n, self.steps[-1].n
        inside = [step for step in self.steps if step.first != ENCODER]
        parts = [f"{self.tokens} in the prompt"]
        if encoded != self.tokens:
            parts.append(f"{encoded} from the encoder")
        if entered != encoded:
            parts.append(f"{entered} enter the language model")
        if final != entered:
            parts.append(f"{final} reach its last layer")
        if any(step.held != step.n for step in inside):
            held = sum(step.held * (step.last - step.first + 1) for step in inside) / (self.last + 1)
            parts.append(f"{held:.4g} stay in the cache, mean over layers and heads")
        return " → ".join(parts)


# ---- running -------------------------------------------------------------------------------------------------------
def follow(
    model: nn.Module,
    processor: Any,
    seen: Image.Image | Clip,
    question: str,
    methods: Sequence[str],
    keep: float | int = 0.25,
    budget: float | None = None,
    max_new_tokens: int = 20,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Shown]:
    """Answer the question with the dense model, then with each method, at `keep` or, where given, at `budget`."""
    _, adapter = adapters.find(model)
    if isinstance(seen, Clip) and "video" not in adapter.encoders:
        able = [name for name, other in adapters.load_all().items() if "video" in other.encoders]
        raise Unsupported(f"{adapter.family} reads no clips. These families do: {', '.join(able)}.")
    runs = Asked.of(model, processor, ask(question, seen), methods, max_new_tokens, keep, budget).all(progress)
    reference = runs[methods[0]].trace
    return [
        Shown(method, run.text, sum(reference.n_visual), steps(method, run.trace, reference))
        for method, run in runs.items()
    ]


def steps(method: str, trace: Trace | None, reference: Trace) -> tuple[Step, ...]:
    """The steps of one method on one picture. `reference`: any trace of it, for the dense model, which has none."""
    (picture,) = (trace or reference).pictures
    if trace is None:  # whatever the reference's encoder did
        picture = replace(picture, source=None, merged_into=None)
    layers, n = reference.shapes.layers, picture.dense.n
    everything = torch.ones(n)

    def step(first: int, last: int, count: int, held: Tensor, merged: Tensor | None) -> Step:
        panel = draw.placed(Panel(method, "", None, picture.dense, held, merged), picture)
        made = Step(first, last, count, float(held.sum()) if first != ENCODER else count, panel)
        cached = "" if made.held == count else " cached"
        return replace(made, panel=replace(panel, caption=f"{made.words}: {made.held:.4g} of {n}{cached}"))

    if trace is None:
        return step(ENCODER, ENCODER, n, everything, None), step(0, layers - 1, n, everything, None)
    encoded = picture.layout.n
    if picture.merged_into is not None:
        encoded = len(picture.merged_into.unique())
    inside = None if picture.merged_into is None else picture.merged_into.cpu()
    found = [step(ENCODER, ENCODER, encoded, everything, inside)]
    held = [trace.held_at(layer)[0] for layer in range(layers)]
    starts = [i for i in range(layers) if i == 0 or not torch.equal(held[i], held[i - 1])]
    for first, end in zip(starts, [*starts[1:], layers]):
        found.append(step(first, end - 1, trace.n_kept_at(first)[0], held[first], trace.merged_into[0]))
    return tuple(found)


# ---- drawing -------------------------------------------------------------------------------------------------------
def contact_sheet(clip: Clip, planes: int, across: int | None = None) -> Image.Image:
    """The frames that `planes` planes of tokens show (the first, where a plane is of several), in one picture; `across`
    of them in a row, or as `grid` says."""
    across, down = grid(clip, planes) if across is None else (across, -(-planes // across))
    width, height = clip.frames[0].size
    scale = min(1.0, SHEET / max(across * width, down * height))
    width, height = max(8, round(width * scale)), max(8, round(height * scale))
    sheet = Image.new("RGB", (across * width, down * height), "white")
    for plane, i in enumerate(range(0, len(clip.frames), _per_plane(clip, planes))):
        frame = clip.frames[i].resize((width - 2, height - 2), Image.Resampling.LANCZOS)
        sheet.paste(frame, (plane % across * width + 1, plane // across * height + 1))
    return sheet


def grid(clip: Clip, planes: int) -> tuple[int, int]:
    """Columns and rows of a contact sheet: about 3:2, with few empty places."""
    width, height = clip.frames[0].size
    across = draw.columns_of(planes, width / height)
    return across, -(-planes // across)


def _per_plane(clip: Clip, planes: int) -> int:
    """How many frames of the clip a plane of tokens is of."""
    return -(-len(clip.frames) // planes)


def on_sheet(item: Panel, across: int) -> Panel:
    """A clip's panel with its planes side by side as one, as `contact_sheet` lays the frames."""
    place, plane = places(item.layout, across)
    seen = torch.zeros(plane.size).index_put_((place,), item.seen.float())
    merged = item.merged_into
    if merged is not None:
        merged = torch.where(merged >= 0, place[merged.clamp(min=0)], -1)
        merged = torch.full((plane.size,), -1).index_put_((place,), merged)
    layout = Layout((plane,), modality=item.layout.modality)
    return replace(item, layout=layout, seen=seen, merged_into=merged)


def places(layout: Layout, across: int) -> tuple[Tensor, Plane]:
    """[N] where each token of a clip lies in raster order on a sheet of `across` frames a row, and that sheet."""
    frame, count = layout.planes[0], len(layout.planes)  # a clip's frames are of one size
    index = torch.arange(layout.n)
    t, row, col = index // frame.size, index % frame.size // frame.cols, index % frame.cols
    place = (t // across * frame.rows + row) * across * frame.cols + t % across * frame.cols + col
    return place, Plane(-(-count // across) * frame.rows, across * frame.cols, kind="frame")


def flat(seen: Image.Image | Clip, shown: Sequence[Shown]) -> tuple[Image.Image, list[Shown]]:
    """One picture and panels over it: of a clip the contact sheet."""
    if not isinstance(seen, Clip):
        return seen, list(shown)
    planes = len(shown[0].steps[0].panel.layout.planes)
    across, _ = grid(seen, planes)
    turn = lambda step: replace(step, panel=on_sheet(step.panel, across))
    return contact_sheet(seen, planes), [replace(item, steps=tuple(map(turn, item.steps))) for item in shown]


def poster(seen: Image.Image | Clip, shown: Sequence[Shown], question: str = "") -> Image.Image:
    """A row for each method, a panel for each run of decoder layers that see the same tokens.

    What leaves the encoder is a panel of its own where fewer tokens leave it, and still fewer enter the first layer.
    Of more than `COLUMNS` runs some are
    left out, never the first and the last.
    """
    picture, shown = flat(seen, shown)
    rows = []
    for item in shown:
        encoded, *rest = item.steps
        apart = encoded.n not in (item.tokens, rest[0].n)
        rows.append([step.panel for step in pick(item.steps if apart else rest, COLUMNS)])
        rows[-1][0] = replace(rows[-1][0], answer=item.answer)
    columns = max(map(len, rows))
    panels = [panel for row in rows for panel in [*row, *[None] * (columns - len(row))]]
    return draw.panels(picture, panels, question, columns)


def pick(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, with the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def animation(clip: Clip, shown: Sequence[Shown], question: str = "") -> list[Image.Image]:
    """A picture for each frame of the clip: what each method keeps of it, as long as decoder layers work on it."""
    planes = len(shown[0].steps[0].panel.layout.planes)
    frames = []
    for i, picture in enumerate(clip.frames):
        items = []
        for item in shown:
            index, layout = i // _per_plane(clip, planes), item.mean.layout
            part = item.mean.seen[layout.starts[index] :][: layout.planes[index].size]
            size = shown[0].mean.layout.planes[index].size
            caption = f"{float(part.sum()):.4g} of {size} tokens here"
            if item.steps[-1].n != item.at(0).n:
                caption += ", mean over layers"
            items.append(replace(item.mean, caption=caption, answer=item.answer, frame=index))
        drawn = draw.panels(picture, items, f"{question} ({i + 1}/{len(clip.frames)})".strip())
        height = round(drawn.height * GIF_WIDTH / drawn.width)
        frames.append(
            drawn if drawn.width <= GIF_WIDTH else drawn.resize((GIF_WIDTH, height), Image.Resampling.LANCZOS)
        )
    return frames


# ---- the page ------------------------------------------------------------------------------------------------------
def page(seen: Image.Image | Clip, shown: Sequence[Shown], question: str = "", about: str = "") -> str:
    """A web page that refers to nothing outside itself: a slider over decoder layers, the methods side by side.

    Without scripts it shows what enters the language model. about: a line on model and settings.
    """
    picture, shown = flat(seen, shown)
    veil, edge = draw.look(picture)
    images: dict[str, int] = {}  # data URI -> number of its class
    facts = {
        "shown": shown,
        "views": [_views(picture, item, images) for item in shown],
        "images": images,
        "question": question,
        "about": about,
        "grey": round(255 * veil),
        "edge": edge,
        "encoder": ENCODER,
    }
    env = Environment(autoescape=True, trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return env.from_string(Path(__file__).with_name("show.html.j2").read_text(encoding="utf-8")).render(facts)


def _views(picture: Image.Image, item: Shown, images: dict[str, int]) -> list[dict[str, Any]]:
    """One method's planes of tokens, each over its part of the picture, with what is dropped and outlined at each step.
    images: those of the page, to which its own are added."""
    indices = draw.planes(item.steps[0].panel)
    views = []
    for index, width in zip(indices, ["100%"] if len(indices) == 1 else ["72%", "26%"]):
        plane = item.steps[0].panel.layout.planes[index]
        left, top, right, bottom = plane.box
        size = ((right - left) * picture.width, (bottom - top) * picture.height)
        across, down = (max(1, round(side * PAGE / max(size))) for side in size)
        shape = f"aspect-ratio: {across} / {down}; max-width: calc(75vh * {across / down:.3f})"
        for step in item.steps:
            image = images.setdefault(_uri(draw.colours(picture, step.panel, index, (across, down))), len(images))
            paths = {"dropped": _dropped(step.panel, index), "edges": _edges(step.panel, index)}
            views.append({"step": step, "plane": plane, "image": image, "width": width, "shape": shape} | paths)
    return views


def _uri(colours: Any) -> str:
    """[Y, X, 3] in [0, 1] as a picture in the page's own text."""
    buffer = io.BytesIO()
    Image.fromarray((255 * colours).round().astype("uint8")).save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _dropped(item: Panel, index: int) -> list[tuple[float, str]]:
    """SVG paths over the tokens that are not there, or not for all heads: for each share that is missing one path, of a
    rectangle for each run in a row."""
    missing = 1 - draw.cells(item, index)[0]
    paths = []
    for share in sorted({*missing[missing > 0].tolist()}):
        path = []
        for row, line in enumerate((missing == share).tolist()):
            edges = [i for i, (a, b) in enumerate(zip([False, *line], [*line, False])) if a != b]
            path += [f"M{start} {row}h{end - start}v1H{start}z" for start, end in zip(edges[::2], edges[1::2])]
        paths.append((round(share, 3), "".join(path)))
    return paths


def _edges(item: Panel, index: int) -> str:
    """An SVG path along the outlines."""
    return "".join(f"M{a} {b}H{c}" if b == d else f"M{a} {b}V{d}" for (a, b), (c, d) in draw.outlines(item, index))


# ---- writing -------------------------------------------------------------------------------------------------------
def write(seen: Image.Image | Clip, shown: Sequence[Shown], question: str, about: str, folder: Path) -> list[Path]:
    """`kept.png`, `kept.html` and for a clip `kept.gif`, in `folder`, which is made if need be."""
    files = [draw.save(poster(seen, shown, question), folder / "kept.png")]
    try:
        files.append(folder / "kept.html")
        files[-1].write_text(page(seen, shown, question, about), encoding="utf-8")
        if isinstance(seen, Clip):
            files.append(folder / "kept.gif")
            first, *rest = animation(seen, shown, question)
            pause = min(1000, max(100, round(1000 / seen.fps)))
            first.save(files[-1], save_all=True, append_images=rest, duration=pause, loop=0)
    except OSError as error:
        raise InvalidValue(f"Could not write to {str(files[-1])!r} ({error.strerror}).") from error
    return files

"""What `vtok show` does: one picture or clip, and what each method keeps of it, stage by stage and layer by layer.

A PNG with a row for each method, an HTML page with a slider over decoder layers, and for a clip an animated GIF.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from vtok import adapter as adapters
from vtok import draw
from vtok.draw import Panel
from vtok.engine.trace import Trace
from vtok.errors import InvalidValue, Unsupported
from vtok.media import Clip
from vtok.prompts import ask
from vtok.runs import DENSE, Asked
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

    n: how many visual tokens that is. panel: which, and what they stand for.
    """

    first: int
    last: int
    n: int
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
    def stages(self) -> str:
        """How many tokens go from stage to stage, in words."""
        encoded, entered, final = self.steps[0].n, self.at(0).n, self.steps[-1].n
        parts = [f"{self.tokens} in the prompt"]
        if encoded != self.tokens:
            parts.append(f"{encoded} from the encoder")
        if entered != encoded:
            parts.append(f"{entered} enter the language model")
        if final != entered:
            parts.append(f"{final} reach its last layer")
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
    how = {"keep": keep} if budget is None else {"budget": budget}
    asked = Asked.of(model, processor, ask(question, seen), methods, max_new_tokens, **how)
    runs = {}
    for method in (DENSE, *methods):
        progress(method)
        runs[method] = asked.run(method)
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
    everything = torch.ones(n, dtype=torch.bool)

    def step(first: int, last: int, count: int, present: Tensor, merged: Tensor | None) -> Step:
        panel = draw.placed(Panel(method, "", None, picture.dense, present, merged), picture)
        made = Step(first, last, count, panel)
        return replace(made, panel=replace(panel, caption=f"{made.words}: {count} of {n}"))

    if trace is None:
        return step(ENCODER, ENCODER, n, everything, None), step(0, layers - 1, n, everything, None)
    encoded = picture.layout.n
    if picture.merged_into is not None:
        encoded = len(picture.merged_into.unique())
    inside = None if picture.merged_into is None else picture.merged_into.cpu()
    found = [step(ENCODER, ENCODER, encoded, everything, inside)]
    masks = [trace.keep_masks_at(layer)[0] for layer in range(layers)]
    starts = [i for i in range(layers) if i == 0 or not torch.equal(masks[i], masks[i - 1])]
    for first, end in zip(starts, [*starts[1:], layers]):
        found.append(step(first, end - 1, int(masks[first].sum()), masks[first], trace.merged_into[0]))
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
    cost = lambda n: abs(math.log(n * width / (-(-planes // n) * height) / 1.5)) + 0.5 * (-planes % n)
    across = min(range(1, planes + 1), key=cost)
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
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --faint: #666; --ground: #fff; --line: #ddd; --mark: #0b62c4;
  --other: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #eee; --faint: #aaa; --ground: #161616; --line: #3a3a3a;
  --mark: #6db1ff; --other: #ff8a80 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 0 16px 32px; max-width: 1800px; background: var(--ground); color: var(--ink);
  font: 16px/1.4 system-ui, sans-serif }
h1 { font-size: 1.25rem; margin: 16px 0 2px; overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 0 }
p { margin: 0 }
.faint { color: var(--faint); font-size: .85rem; overflow-wrap: anywhere }
.bar { position: sticky; top: 0; z-index: 1; display: flex; gap: 12px; align-items: center; padding: 10px 0;
  background: var(--ground); border-bottom: 1px solid var(--line); margin-bottom: 16px }
.bar input { flex: 1; min-width: 0; accent-color: var(--mark); height: 28px; margin: 0 }
.bar output { min-width: 5.2em; font-weight: 600 }
.bar button { font: inherit; color: inherit; background: none; border: 1px solid var(--line); border-radius: 6px;
  padding: 4px 12px; min-width: 4.6em }
main { display: grid; gap: 28px 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.views { display: flex; gap: 2%; align-items: flex-start; margin: 6px 0 }
.view { background-size: 100% 100%; min-width: 0 }
.view svg { display: block; width: 100%; height: 100%; overflow: visible }
.step { display: none }
.on.step { display: inline }
.edges { fill: none; stroke-width: 1.2px; vector-effect: non-scaling-stroke }
.chart { display: block; width: 100%; height: 34px; margin: 6px 0 }
.chart rect { fill: var(--line); cursor: pointer }
.chart .on { fill: var(--mark) }
.answer { margin-top: 4px; font-size: 1.05rem; overflow-wrap: anywhere }
.other { color: var(--other) }
"""
_SCRIPT = """
const slider = document.getElementById("layer"), label = document.getElementById("where");
const play = document.getElementById("play"), marked = document.querySelectorAll("[data-first]");
function go() {
  const layer = Number(slider.value);
  for (const e of marked) e.classList.toggle("on", e.dataset.first <= layer && layer <= e.dataset.last);
  label.textContent = layer < 0 ? "encoder" : "layer " + layer;
  slider.setAttribute("aria-valuetext", label.textContent);
}
let timer = 0;
function stop() { clearInterval(timer); timer = 0; play.textContent = "Play"; }
function next() { slider.value = slider.value === slider.max ? slider.min : Number(slider.value) + 1; go(); }
slider.addEventListener("input", () => { stop(); go(); });
play.addEventListener("click", () => {
  if (timer) return stop();
  timer = setInterval(next, 700); play.textContent = "Pause"; next();
});
for (const bar of document.querySelectorAll(".chart rect"))
  bar.addEventListener("click", () => { stop(); slider.value = bar.dataset.first; go(); });
go();
"""


def page(seen: Image.Image | Clip, shown: Sequence[Shown], question: str = "", about: str = "") -> str:
    """A web page that refers to nothing outside itself: a slider over decoder layers, the methods side by side.

    Without scripts it shows what enters the language model. about: a line on model and settings.
    """
    picture, shown = flat(seen, shown)
    veil, edge = draw.look(picture)
    images: dict[str, int] = {}  # data URI -> number of its class
    figures = [_figure(picture, item, shown[0].answer, images) for item in shown]
    grey = round(255 * veil)
    rules = "".join(f".p{i} {{ background-image: url({uri}) }}\n" for uri, i in images.items())
    rules += f".dropped {{ fill: rgb({grey} {grey} {grey} / 80%) }} .edges {{ stroke: {edge} }}"
    last, title = shown[0].last, html.escape(question or "What is kept")
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<style>{_STYLE}{rules}</style>
</head>
<body>
<h1>{title}</h1>
<p class="faint">{html.escape(about)}</p>
<div class="bar"><button id="play" type="button">Play</button>
<input id="layer" type="range" min="{ENCODER}" max="{last}" value="0" aria-label="Decoder layer">
<output id="where" for="layer">layer 0</output></div>
<main>
{"".join(figures)}</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def _figure(picture: Image.Image, item: Shown, dense: str, images: dict[str, int]) -> str:
    """One method. images: those of the page, to which its own are added."""
    indices = draw.planes(item.steps[0].panel)
    widths = ["100%"] if len(indices) == 1 else ["72%", "26%"]
    views = "".join(_view(picture, item, index, width, images) for index, width in zip(indices, widths))
    spans = [(step, f"{step.n} of {item.tokens} visual tokens") for step in item.steps]
    counts = "".join(f'<span class="{_marks(step)}" {_range(step)}>{text}</span>' for step, text in spans)
    other = "" if item.answer == dense else " other"
    return f"""<article>
<h2>{html.escape(item.method)}</h2>
<p class="faint">{html.escape(item.stages)}</p>
<div class="views">{views}</div>
<p>{counts}</p>
{_chart(item)}
<p class="answer{other}">“{html.escape(item.answer)}”</p>
</article>
"""


def _marks(step: Step) -> str:
    return "step on" if step.first <= 0 <= step.last else "step"


def _range(step: Step) -> str:
    return f'data-first="{step.first}" data-last="{step.last}"'


def _view(picture: Image.Image, item: Shown, index: int, width: str, images: dict[str, int]) -> str:
    """One plane of tokens over its part of the picture, with what is dropped and outlined at each step."""
    plane = item.steps[0].panel.layout.planes[index]
    left, top, right, bottom = plane.box
    size = ((right - left) * picture.width, (bottom - top) * picture.height)
    pixels = tuple(max(1, round(side * PAGE / max(size))) for side in size)
    shape = f"aspect-ratio: {pixels[0]} / {pixels[1]}; max-width: calc(75vh * {pixels[0] / pixels[1]:.3f})"
    drawn = []
    for step in item.steps:
        uri = _uri(draw.colours(picture, step.panel, index, pixels))
        back = images.setdefault(uri, len(images))
        drawn.append(
            f'<div class="view {_marks(step)} p{back}" {_range(step)} style="width: {width}; {shape}">'
            f'<svg viewBox="0 0 {plane.cols} {plane.rows}" preserveAspectRatio="none" role="img" '
            f'aria-label="{html.escape(item.method)}: {step.n} of {item.tokens} tokens">'
            f'<path class="dropped" d="{_dropped(step.panel, index)}"/>'
            f'<path class="edges" d="{_edges(step.panel, index)}"/></svg></div>'
        )
    return "".join(drawn)


def _uri(colours: Any) -> str:
    """[Y, X, 3] in [0, 1] as a picture in the page's own text."""
    buffer = io.BytesIO()
    Image.fromarray((255 * colours).round().astype("uint8")).save(buffer, format="JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _dropped(item: Panel, index: int) -> str:
    """An SVG path over the tokens that are not there, one rectangle for each run in a row."""
    path = []
    for row, line in enumerate((draw.cells(item, index)[0] == 0).tolist()):
        edges = [i for i, (a, b) in enumerate(zip([False, *line], [*line, False])) if a != b]
        path += [f"M{start} {row}h{end - start}v1H{start}z" for start, end in zip(edges[::2], edges[1::2])]
    return "".join(path)


def _edges(item: Panel, index: int) -> str:
    """An SVG path along the outlines."""
    return "".join(f"M{a} {b}H{c}" if b == d else f"M{a} {b}V{d}" for (a, b), (c, d) in draw.outlines(item, index))


def _chart(item: Shown) -> str:
    """A bar for the encoder and for each decoder layer: the tokens that are there."""
    bars = []
    for layer in range(ENCODER, item.last + 1):
        n = item.at(layer).n
        tall = max(0.02, n / item.tokens)
        words = "encoder" if layer == ENCODER else f"layer {layer}"
        on = ' class="on"' if layer == 0 else ""
        bars.append(
            f'<rect{on} data-first="{layer}" data-last="{layer}" x="{layer + 1.06:g}" y="{1 - tall:.4g}" width=".88" '
            f'height="{tall:.4g}"><title>{words}: {n}</title></rect>'
        )
    return f'<svg class="chart" viewBox="0 0 {item.last + 2} 1" preserveAspectRatio="none">{"".join(bars)}</svg>'


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

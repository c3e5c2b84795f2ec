"""`vtok show`: what is kept, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtok import zoo
from vtok.cli import options
from vtok.cli.options import say
from vtok.errors import InvalidValue


def show(
    image: Annotated[Path | None, typer.Option(help="A picture.  [default: the bundled one]")] = None,
    clip: Annotated[Path | None, typer.Option(help="Instead: a video file, or a folder of frames.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    model: options.Model = options.MODEL,
    methods: options.Methods = None,
    config: options.Config = None,
    keep: options.Keep = None,
    budget: options.Budget = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("vtok-show"),
    frames: Annotated[int, typer.Option(metavar="N", min=1, help="Frames of a clip, at most.")] = 16,
    tokens: options.Tokens = 20,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Draw what is kept of one picture or clip, layer by layer: a PNG, a page with a slider, and for a clip a GIF.

    \b
    Examples:
      vtok show --image cat.jpg --question "What is it?" --methods fastv
      vtok show --clip film.mp4 --model vtok-tiny-qwen2.5-vl --frames 8
    """
    if image is not None and clip is not None:
        raise InvalidValue("Give --image or --clip, not both.")
    how = options.amount(keep, budget)
    names = options.chosen(methods, config, keep=keep is None and budget is None)
    options.drawing(required=True)
    from vtok.media import Sampling, open_clip, open_picture

    source = clip or image or zoo.DEMO_IMAGE
    seen = open_picture(source) if clip is None else open_clip(clip, Sampling(max_frames=frames))
    what = "picture" if clip is None else "clip"
    asked = question or (zoo.DEMO_QUESTION if image is None and clip is None else f"What is in this {what}?")
    with options.loaded(model, device, dtype, threads) as (network, processor, status):
        from vtok import show as work
        from vtok.methods import supported

        names = supported(network, work.METHODS, **how) if names is None else names
        report = lambda method: status(f"answering with {method}")
        shown = work.follow(network, processor, seen, asked, names, max_new_tokens=tokens, progress=report, **how)
        status("drawing")
        told = ", ".join(f"{key} {value}" for key, value in how.items())
        files = work.write(seen, shown, asked, f"{model}, {told}, {source.name}", out)
    for item in shown:
        say(f"{item.method}: {item.stages}: “{item.answer}”")
    for file in files:
        say(f"wrote {file}")

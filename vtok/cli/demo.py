"""`vtok demo`: one question, dense and compressed, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from vtok import zoo
from vtok.cli import options
from vtok.cli.options import say

NOTES = (
    "kept: visual tokens that a decoder layer works on, mean over layers. FLOPs: encoder and prefill; KV: cache of the "
    "prompt; both by formula. select: the method itself; prefill: the language model's first pass without it; total: "
    "the whole answer; medians. Yellow: not the dense answer."
)


def demo(
    image: Annotated[Path | None, typer.Option(help="A picture.  [default: the bundled one]")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    model: options.Model = options.MODEL,
    methods: options.Methods = None,
    config: options.Config = None,
    keep: options.Keep = None,
    budget: options.Budget = None,
    out: Annotated[Path | None, typer.Option(help="PNG to write.  [default: ./vtok-demo.png]")] = None,
    tokens: options.Tokens = 20,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Answer one question about one picture, dense and compressed, and draw what was kept.

    \b
    Examples:
      vtok demo --methods visionzip:importance=received,fastv --keep 0.5
      vtok demo --image cat.jpg --question "What is it?" --methods divprune
    """
    how = options.amount(keep, budget)
    names = options.chosen(methods, config, keep=keep is None and budget is None)
    drawing = options.drawing(required=out is not None)
    from vtok.media import open_picture

    picture = open_picture(image or zoo.DEMO_IMAGE)
    asked = question or (zoo.DEMO_QUESTION if image is None else "What is in this picture?")
    with options.loaded(model, device, dtype, threads) as (network, processor, status):
        import torch

        from vtok import demo as work
        from vtok import draw
        from vtok.methods import supported

        names = supported(network, work.METHODS, **how) if names is None else names
        report = lambda method: status(f"answering with {method}")
        answers = work.compare(network, processor, picture, asked, names, max_new_tokens=tokens, progress=report, **how)
    where = f"{network.device.type}, {str(network.dtype).removeprefix('torch.')}"
    if network.device.type == "cpu":
        where += f", {torch.get_num_threads()} threads"
    say(f"{model} ({where}), {', '.join(f'{key}={value}' for key, value in how.items())}")
    say(f"{(image or zoo.DEMO_IMAGE).name}, {picture.width} x {picture.height}: {asked}")
    if image is None and question is None:
        say(f"right answer: {zoo.DEMO_ANSWER}")
    say("")
    Console().print(work.table(answers))
    Console().print(f"\n{NOTES}", style="dim", highlight=False)
    if drawing is None:
        say('No picture was written, since matplotlib is missing: pip install "vtok[viz]".')
        return
    reference = answers[1].trace
    panels = [draw.panel(each.method, each.text, each.trace, reference) for each in answers]
    say(f"Kept tokens: {draw.save(draw.panels(picture, panels, asked), out or Path('vtok-demo.png'))}")

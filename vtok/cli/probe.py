"""`vtok probe`: from which decoder layer on a method's score finds what answers need."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtok.cli import options
from vtok.cli.options import say
from vtok.errors import InvalidValue


def probe(
    model: Annotated[str, typer.Argument(help="A bundled name, a local folder or a repository of the hub.")],
    out: Annotated[Path, typer.Option(help="Folder for probe.json and probe.png.")],
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Offline tasks.  [default: all with boxes that it takes]")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Instead: JSON lines of your pictures, see below.")
    ] = None,
    questions: Annotated[int, typer.Option(metavar="N", min=1, help="Questions of each task.")] = 60,
    methods: Annotated[
        str | None, typer.Option(metavar="NAME,...", help=f"{options.METHODS_HELP}  [default: all inside the decoder]")
    ] = None,
    safe: Annotated[float, typer.Option(metavar="AUC", help="What makes a layer safe to drop behind.")] = 0.85,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """How well the score of each method inside the decoder finds the tokens that an answer needs, layer by layer: the
    AUC, .5 by chance. Draws the curves and names the earliest safe layer, which methods take with layer="auto",
    probe="probe.json".

    A line of --boxes: {"image": "cat.jpg", "question": "What is it?", "boxes": [[10, 20, 50, 60]]}, boxes in pixels.

    \b
    Examples:
      vtok probe vtok-tiny-qwen2.5-vl --out probe
      vtok probe smollm2-words --tasks needle_text --out probe
    """
    if not 0.5 < safe < 1:
        raise InvalidValue(f"--safe is an AUC above 0.5 and below 1, not {safe}.")
    if tasks is not None and boxes is not None:
        raise InvalidValue("Give --tasks or --boxes, not both.")
    chosen = options.chosen(methods)
    options.drawing(required=True)
    from vtok.eval.tasks import task
    from vtok.files import write_json

    named = None if tasks is None else [task.get(name) for name in options.names(tasks)]
    with options.loaded(model, device, dtype, threads) as (network, processor, status):
        from vtok.eval.results import probe as work
        from vtok.eval.results.sweep import fingerprint

        asked = work.of_tasks(processor, named, questions) if boxes is None else work.of_file(boxes)
        step = lambda name: status(f"asking about {name}")
        found = work.run(network, processor, asked, work.methods(chosen), safe, step)
        found = {"model": Path(model).name, "weights": fingerprint(network)} | found
        write_json(out / "probe.json", found)
        told = ", ".join(f"{n} questions of {name}" for name, n in found["questions"].items())
        work.draw(out / "probe.png", found, f"{found['model']}: {told}")
    say(f"{found['layers']} layers, {told}")
    for name, one in found["methods"].items():
        best = max(one["auc"])
        where = "no layer is safe" if one["safe"] is None else f"safe from layer {one['safe']}"
        say(f"{name:12} {where}, best AUC {best:.2f} at layer {one['auc'].index(best)}")
    for name, reason in found["not_probed"].items():
        say(f"{name:12} not probed: {reason}", style="dim")
    for file in ("probe.json", "probe.png"):
        say(f"wrote {out / file}")

"""`vtok calibrate`: a budget by quality, for keep="auto"."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vtok.cli import options
from vtok.cli.group import resumable
from vtok.cli.options import say
from vtok.errors import InvalidValue


def calibrate(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A bundled name, a local folder or a repository of the hub.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="JSON file to write.")],
    loss: Annotated[
        float, typer.Option(metavar="SHARE", help="Right answers that may be lost, as a share of the questions.")
    ] = 0.02,
    compressor: Annotated[
        str, typer.Option(metavar="NAME", help="A method that acts before the decoder.")
    ] = "divprune",
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines of your pictures and questions, see below.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(metavar="NAME,...", help="Instead: offline tasks.")] = None,
    items: Annotated[int, typer.Option(metavar="N", min=1, help="Items of each task.")] = 60,
    held_out: Annotated[
        int, typer.Option(metavar="N", min=0, help="Test items of each task on which the result is checked.")
    ] = 0,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """How many tokens pictures need for a stated loss, at a confidence of 95 %. Each picture gets its own number:

    vtok.patch(model, "divprune", keep="auto", calibration="calibration.json")

    A line of --data: {"image": "cat.jpg", "question": "What is it?", "answer": "a cat"}, or {"clip": "film.mp4", ...}.
    Without an answer, an answer that differs from the dense model's is lost.

    \b
    Examples:
      vtok calibrate vtok-tiny-qwen2.5-vl --tasks scenes,charts --out FILE
      vtok calibrate MODEL --data mine.jsonl --loss 0.01 --out calibration.json
    """
    if not 0 < loss < 1:
        raise InvalidValue(f"--loss is a share above 0 and below 1, not {loss}.")
    if (tasks is None) == (data is None) or (held_out and data):
        raise InvalidValue("Give --data, your own pictures and questions, or --tasks, which --held-out goes with.")
    from vtok.eval.tasks import task
    from vtok.methods import read

    name, how = read(compressor)
    named = [task.get(each) for each in options.names(tasks)] if tasks else []
    resumable(ctx)
    with options.loaded(model, device, dtype, threads) as (network, processor, status):
        from vtok.eval.results import calibrate as work
        from vtok.eval.results.sweep import fingerprint

        asked = work.of_file(data) if data else list(work.of_tasks(named, "val", items))
        total = len(asked) + held_out * len(named)
        done = iter(range(1, total + 1))
        step = lambda: status(f"{next(done)} of {total} items")
        about = (Path(model).name, fingerprint(network), name, how, work.told(data) if data else str(tasks), len(asked))
        found = work.run(network, processor, work.Asked(*about), asked, loss, out, step)
        if held_out:
            tests = list(work.of_tasks(named, "test", held_out))
            found = work.held_out(network, processor, found, out, tests, step)
    _tell(found)
    say(f"wrote {out}")


def _tell(found: dict[str, Any]) -> None:
    said = f"{found['loss']:.1%} may be lost, at {found['confidence']:.0%}"
    say(f"{found['asked']['items']} items, {found['questions']} questions; at most {said}")
    for kind, label in (("auto", "by the picture"), ("fixed", "one keep for all")):
        one = found[kind]
        say(f"{label:16} keeps {one['kept']:.1%}, loses {one['lost']:.1%} (at most {one['bound']:.1%})")
        if "held_out" in found:
            one = found["held_out"][kind]
            span = "too few for an interval" if one["interval"] is None else "{:.1%} to {:.1%}".format(*one["interval"])
            say(f"{'  held out':16} keeps {one['kept']:.1%}, loses {one['lost']:.1%} ({span})")

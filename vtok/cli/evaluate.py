"""`vtok eval`: accuracy of every method at every budget on the offline tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from vtok.cli import options
from vtok.cli.group import resumable
from vtok.errors import InvalidValue


def evaluate(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of results; the same one again goes on after a kill.")],
    model: Annotated[
        str, typer.Option(metavar="NAME,...", help="Bundled models, local folders or repositories of the hub.")
    ] = options.MODEL,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="Offline tasks.  [default: all that the model takes]")
    ] = None,
    methods: options.EveryMethod = None,
    config: options.Config = None,
    budgets: Annotated[
        str, typer.Option(metavar="SHARE,...", help="Mean shares of visual tokens that a decoder layer sees.")
    ] = "0.5,0.25,0.1,0.05",
    items: options.Items = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Instead: of each task as many items as hold so many questions.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Exact match of every method at every budget on the offline tasks, paired with the dense model.

    Results lie in OUT/TASK, those of several models in OUT/MODEL/TASK; other methods, asked later, are added. Several
    processes share the work, see the second example. own_limit among the methods is no compressor, but the limit on
    pixels or tiles of the model's own processor.

    \b
    Examples:
      vtok eval --out results --tasks scenes --methods divprune,fastv --items 20
      torchrun --nproc_per_node 2 -m vtok.cli eval --out results
    """
    if items is not None and questions is not None:
        raise InvalidValue("--items and --questions both say how much of a task to run: give one of them.")
    named = options.names(model)
    folders = {name: out / Path(name).name if len(named) > 1 else out for name in named}
    if len({*folders.values()}) < len(named):
        raise InvalidValue(f"The models {model} would write to one folder: evaluate them apart.")
    cells = (_chosen(methods, config), options.numbers(budgets, float, "--budgets"))
    from vtok.eval.results.sweep import Share
    from vtok.eval.tasks import task

    share = Share.of_accelerate()
    known = task.tasks()
    counts = {
        work.name: work.items_of(questions) if questions else min(items or work.count, work.count)
        for work in (known.values() if tasks is None else map(task.get, options.names(tasks)))
    }
    resumable(ctx)
    for name, folder in folders.items():
        with options.loaded(name, device, dtype, threads, plain=share.rank == 0) as (network, processor, status):
            status("")  # the sweep has a bar of its own
        _evaluate(network, processor, name, folder, counts, tasks is not None, cells, share)


def _chosen(methods: str | None, config: Path | None) -> list[str] | None:
    """The methods, the limit of the family's own processor among them, which is none of vtok's."""
    from vtok.eval.results.cells import OWN_LIMIT

    names = [name.strip() for name in (methods or "").split(",")]
    if OWN_LIMIT not in names:
        return options.chosen(methods, config)
    others = ",".join(name for name in names if name and name != OWN_LIMIT)
    return [OWN_LIMIT, *((options.chosen(others or None, config) or []) if others or config else [])]


def _evaluate(
    network: Any, processor: Any, model: str, out: Path, counts: dict[str, int], asked: bool, cells: Any, share: Any
) -> None:
    """One model. counts: items of each task; asked: whether the tasks were named; cells: methods and budgets."""
    from vtok.eval.results import sweep
    from vtok.eval.results.results import table
    from vtok.eval.tasks import task
    from vtok.eval.tasks.answers import media

    takes, faults = media(processor), []
    console = Console(quiet=share.rank > 0)
    for work, count in ((task.get(name), count) for name, count in counts.items()):
        if work.media not in takes:
            if asked:
                raise InvalidValue(f"{work.name} shows a {work.media}, and {model} takes: {', '.join(takes)}.")
            console.print(f"not run: {work.name} shows a {work.media}, and {model} takes: {', '.join(takes)}")
            continue
        if share.rank == 0:
            typer.echo(f"asking {model} about {count} items of {work.name}, with each method at each budget", err=True)
        instruction = work.instruction_of(model)
        folder = out / work.name
        summary = sweep.run(network, processor, model, work, *cells, count, folder, share, instruction)
        console.print(f"\n{model}: {work.title} ({work.name}), {summary['about']['items']} items", style="bold")
        console.print(table(summary))
        for row in summary["refused"]:
            told = f"{row['method']} at {row['budget']:g}: {row['reason']}"
            console.print(f"not run: {told}", style="dim", highlight=False, markup=False)
            faults += [f"{work.name}: {told}"] * row.get("fault", False)
        console.print(f"wrote {folder / 'sweep.json'}", soft_wrap=True)
    if faults:
        raise InvalidValue(
            "\n".join(
                ["Some cells are errors and no results. Mend the method, delete its files, and call again.", *faults]
            )
        )

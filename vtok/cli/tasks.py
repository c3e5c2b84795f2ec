"""`vtok tasks`: list the offline tasks, draw some of their items, write their cards, export them for lmms-eval."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vtok.cli import options
from vtok.cli.group import Group

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="""Offline tasks: what they ask, samples, cards, files for lmms-eval.

    \b
    Example:
      vtok tasks list
    """,
)


@app.command(name="list", short_help="List the tasks.")
def show_all(
    blind: Annotated[bool, typer.Option("--blind", help="Measure what guessers without eyes reach, too.")] = False,
) -> None:
    """List the tasks; chance is the mean over categories, or with --blind over the questions of the test set.

    \b
    Example:
      vtok tasks list --blind
    """
    from vtok.eval.tasks.task import tasks

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    of_the_blind = ("questions",) if blind else ()
    for name in ("task", "media", "items", *of_the_blind, "chance", *(("blind",) if blind else ())):
        table.add_column(name, justify="left" if name in ("task", "media") else "right", no_wrap=True)
    table.add_column("categories", overflow="fold")
    measured = _measure() if blind else {}
    for name, task in tasks().items():
        row = measured.get(name, {}).get("")
        chance = row["chance"] if row else sum(task.chances.values()) / len(task.chances)
        numbers = [str(row["n"]), f"{chance:.1%}", f"{row['question_only']:.1%}"] if row else [f"{chance:.1%}"]
        table.add_row(name, task.media, str(task.count), *numbers, ", ".join(task.categories))
    Console().print(table)


@app.command(short_help="Draw some items of a task.")
def sample(
    name: Annotated[str, typer.Argument(help="Name of a task.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    items: Annotated[int, typer.Option(metavar="N", min=1, help="How many items.")] = 8,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="test: the held-out items.")] = "test",
    first: Annotated[int, typer.Option(metavar="N", min=0, help="Index of the first item.")] = 0,
) -> None:
    """Write items as PNGs (a clip's frames side by side), their questions as JSON, and a sheet. Tasks of text have
    questions alone.

    \b
    Example:
      vtok tasks sample needle --out needle --items 4
    """
    from vtok.eval.tasks import canvas
    from vtok.eval.tasks.task import get

    task = get(name)
    item = task.test_item if split == "test" else partial(task.item, split, 0)
    drawn = [item(index) for index in range(first, first + items)]
    out.mkdir(parents=True, exist_ok=True)
    asked = []
    for item in drawn:
        file = f"{item.index:04}.png" if item.images else None
        if file is not None:
            canvas.strip(item).save(out / file)
        facts = {"file": file, "media": item.media, "fps": item.fps, "sources": item.sources}
        asked.append(facts | {"questions": [asdict(q) for q in item.questions]})
    (out / "questions.json").write_text(json.dumps(asked, indent=1) + "\n")
    sheets = [item for item in drawn if item.images]
    if sheets:
        canvas.sheet(sheets).save(out / "sheet.png")
    typer.echo(f"wrote {len(drawn)} items, questions.json{' and sheet.png' if sheets else ''} to {out}")


@app.command(short_help="Write the cards of all tasks.")
def card(
    out: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/tasks.md"),
) -> None:
    """Write the cards of all tasks, with what guessers without eyes reach (about a minute).

    \b
    Example:
      vtok tasks card --out docs/tasks.md
    """
    from vtok.eval.tasks import fingerprint as work
    from vtok.eval.tasks.task import tasks

    out.write_text(work.render(tasks(), _measure()))
    typer.echo(f"wrote {out}")


def _measure() -> dict[str, dict[str, Any]]:
    from vtok.eval.tasks.task import blind_baseline, tasks

    bar = track(tasks().items(), "guessing", console=Console(stderr=True), transient=True)
    return {name: blind_baseline(task) for name, task in bar}


@app.command(short_help="Write tasks as files for lmms-eval.")
def export(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write to; give it as --include_path.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Tasks; all if left out.")] = None,
    items: options.Items = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Do not say how to answer: for models that were trained on these tasks.")
    ] = False,
) -> None:
    """Write tasks with their pictures, for `lmms-eval --include_path OUT --tasks vtok_offline`.

    \b
    Example:
      vtok tasks export tasks scenes needle --items 100
    """
    with options.working(f"writing to {out}", plain=False) as status:
        from vtok.eval.lmms.tasks import export as work

        written = work(out, names or None, items, not plain, lambda name: status(f"writing {name}"))
    typer.echo(f"wrote to {out}: {', '.join(written)}")

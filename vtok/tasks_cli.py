"""`vtok tasks`: list the offline tasks, draw some of their items, write their cards, export them for lmms-eval."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Offline tasks: what they ask, samples, cards, files for lmms-eval.")


@app.command(name="list")
def show_all(
    blind: Annotated[bool, typer.Option("--blind", help="Measure what guessers without eyes reach, too.")] = False,
) -> None:
    """List the tasks; chance is the mean over categories, or with --blind over the questions of the test set."""
    from vtok.eval.tasks.task import tasks

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in (
        "task",
        "media",
        "items",
        *(("questions",) if blind else ()),
        "chance",
        *(("blind",) if blind else ()),
    ):
        table.add_column(name, justify="left" if name in ("task", "media") else "right", no_wrap=True)
    table.add_column("categories", overflow="fold")
    measured = _measure() if blind else {}
    for name, task in tasks().items():
        row = measured.get(name, {}).get("")
        chance = row["chance"] if row else sum(task.chances.values()) / len(task.chances)
        numbers = [str(row["n"]), f"{chance:.1%}", f"{row['question_only']:.1%}"] if row else [f"{chance:.1%}"]
        table.add_row(name, task.media, str(task.count), *numbers, ", ".join(task.categories))
    Console().print(table)


@app.command()
def sample(
    name: Annotated[str, typer.Argument(help="Name of a task.")],
    out: Annotated[Path, typer.Option(help="Folder to write to.")],
    count: Annotated[int, typer.Option(min=1, help="Items.")] = 8,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="test: the held-out items.")] = "test",
) -> None:
    """Write items as PNGs (a clip's frames side by side), their questions as JSON, and a sheet of all."""
    from vtok.eval.tasks import canvas
    from vtok.eval.tasks.task import get

    task = get(name)
    items = list(task.held_out(count)) if split == "test" else [task.item(split, 0, i) for i in range(count)]
    out.mkdir(parents=True, exist_ok=True)
    asked = []
    for item in items:
        file = f"{item.index:04}.png"
        canvas.strip(item).save(out / file)
        facts = {"file": file, "media": item.media, "fps": item.fps, "sources": item.sources}
        asked.append(facts | {"questions": [asdict(q) for q in item.questions]})
    (out / "questions.json").write_text(json.dumps(asked, indent=1) + "\n")
    canvas.sheet(items).save(out / "sheet.png")
    typer.echo(f"wrote {len(items)} items, questions.json and sheet.png to {out}")


@app.command()
def card(
    out: Annotated[Path, typer.Option(help="Markdown file to write.")] = Path("docs/tasks.md"),
) -> None:
    """Write the cards of all tasks, with what guessers without eyes reach (about a minute)."""
    from vtok.eval.tasks import fingerprint as work
    from vtok.eval.tasks.task import tasks

    out.write_text(work.render(tasks(), _measure()))
    typer.echo(f"wrote {out}")


def _measure() -> dict[str, dict[str, Any]]:
    from vtok.eval.tasks.task import blind_baseline, tasks

    bar = track(tasks().items(), "guessing", console=Console(stderr=True), transient=True)
    return {name: blind_baseline(task) for name, task in bar}


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder to write to; give it as --include_path.")],
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="Tasks; all if left out.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Test items of each, at most; all if left out.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Do not say how to answer: for models that were trained on these tasks.")
    ] = False,
) -> None:
    """Write tasks with their pictures, for `lmms-eval --include_path DIR --tasks vtok_offline`."""
    from vtok.eval.lmms.tasks import export as work

    console = Console(stderr=True)
    with console.status("writing") as status:
        written = work(folder, names or None, count, not plain, lambda name: status.update(f"writing {name}"))
    typer.echo(f"wrote to {folder}: {', '.join(written)}")

"""`vtok zoo`: judge and document the bundled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import vtok
from vtok.cli import options
from vtok.cli.group import Group
from vtok.errors import InvalidValue

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="""Bundled tiny models. What trained them is in a checkout: python -m recipes NAME --out DIR.

    \b
    Example:
      vtok zoo eval vtok-tiny-llava-next --items 3
    """,
)

Name = Annotated[str, typer.Argument(help="A bundled model, or the folder of one that a recipe wrote.")]


def _outside(out: Path) -> Path:
    """A place to write to, which is never the installed package."""
    if out.resolve().is_relative_to(Path(vtok.__file__).resolve().parent):
        raise InvalidValue(f"--out {out} lies in the installed package, whose files are to stay as they are.")
    return out


@app.command(name="eval")
def evaluate(
    name: Name,
    items: Annotated[int | None, typer.Option(min=1, help="Test items of each task.  [default: all]")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="One task.  [default: those it was judged on before, or all]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder or .json file to write.  [default: nothing]")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Exact match on the held-out sets, as a table. Writes nothing unless --out says where.

    \b
    Example:
      vtok zoo eval vtok-tiny-llava-next --items 20 --out eval.json
    """
    from rich.console import Console
    from rich.progress import track

    from vtok.eval.results import judge
    from vtok.models import place

    file = None if out is None else _outside(out if out.suffix == ".json" else out / "eval.json")
    settings = judge.settings(Path(place(name)), tasks)
    with options.loaded(name, device, dtype, threads) as (network, processor, status):
        status("")
    bar = lambda some: track(list(some), "items", console=Console(stderr=True), transient=True)
    result = judge.report(network, processor, count=items, progress=bar, **settings)
    Console().print(judge.table(result))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        typer.echo(f"wrote {file}")


@app.command()
def card(name: Name) -> None:
    """Write the model card, README.md, from eval.json and training.json in the same folder.

    \b
    Example:
      vtok zoo card model_cards/vtok-tiny-internvl
    """
    from vtok.eval.pages import cards
    from vtok.models import place

    typer.echo(f"wrote {cards.write(_outside(Path(place(name))))}")


@app.command(short_help="Write the pages of the public checkpoints.")
def pages(
    out: Annotated[Path, typer.Option(help="Folder to write to.", file_okay=False, exists=True)] = Path("model_cards"),
) -> None:
    """Write the pages of the public checkpoints, and the index of all models.

    \b
    Example:
      vtok zoo pages --out model_cards
    """
    from vtok.eval.pages.checkpoint_pages import write

    typer.echo(f"wrote {', '.join(path.name for path in write(out))}")

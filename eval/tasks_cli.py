"""`vtok tasks`: the offline tasks as files for the command line of lmms-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="The offline tasks, for lmms-eval.")


@app.callback()
def root() -> None:
    pass


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
    from rich.console import Console

    from vtok.eval.lmms_tasks import export as work

    console = Console(stderr=True)
    with console.status("writing") as status:
        written = work(folder, names or None, count, not plain, lambda name: status.update(f"writing {name}"))
    typer.echo(f"wrote to {folder}: {', '.join(written)}")

"""`vtok report`: the results of `vtok eval` as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vtok.cli import options


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of results that `vtok eval --out` has filled.")],
    out: Annotated[Path, typer.Option(help="HTML file to write; its drawings go beside it as PNGs.")] = Path(
        "report.html"
    ),
    gallery: Annotated[
        int, typer.Option(min=0, help="Pictures with kept tokens a task, at most; 0 runs no model.")
    ] = 4,
    choosing: Annotated[
        Path | None, typer.Option(help="Instead: a Markdown page on which method to take, from the summaries alone.")
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
) -> None:
    """Turn results of `vtok eval`, of one task, several or several models, into one self-contained HTML page.

    \b
    Examples:
      vtok report results --out report.html
      vtok report results --choosing choosing.md
    """
    if choosing is not None:
        from vtok.eval.pages import choosing as guide

        typer.echo(f"wrote {guide.write(folder, choosing)}")
        return
    options.drawing(required=True)
    device = options.device_of(device) if gallery else "cpu"
    with options.working("writing the report", plain=False):
        from transformers.utils import logging

        from vtok.eval.pages import report as work

        logging.disable_progress_bar()
        files = work.write(folder, out, gallery, device, dtype)
    for file in files:
        typer.echo(f"wrote {file}")

"""The command line, `vtok COMMAND`: one file a command, over the options and helpers that they share.

Commands import the library and never each other. An error is one line on standard error: exit code 2 where what was
asked for cannot be, 1 where it failed, 130 after Ctrl-C. VTOK_DEBUG=1 shows the traceback.
"""

from __future__ import annotations

from typing import Annotated

import typer

import vtok
from vtok.cli import bench, calibrate, demo, evaluate, methods, probe, report, search, serve, show, tasks, zoo
from vtok.cli.group import Group

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""Visual-token compression for Hugging Face vision-language models.

    \b
    Examples:
      vtok demo
      vtok methods visionzip
      vtok show --image cat.jpg --methods divprune,fastv --keep 0.25

    VTOK_DEBUG=1 shows the traceback of an error.
    """,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vtok {vtok.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command(short_help="One question, dense and compressed, side by side.")(demo.demo)
app.command(short_help="Draw what is kept, layer by layer.")(show.show)
app.command(short_help="List the methods, or explain one.")(methods.methods)
app.command(name="eval", short_help="Accuracy of methods at budgets on the offline tasks.")(evaluate.evaluate)
app.command(short_help="From which layer on methods find what answers need.")(probe.probe)
app.command(short_help="A budget by quality: how many tokens pictures need.")(calibrate.calibrate)
app.command(short_help="Results of vtok eval as a page.")(report.report)
app.command(
    short_help="Serve a model with vLLM on fewer visual tokens.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(serve.serve)
app.add_typer(bench.app, name="bench", short_help="Time and memory against the FLOP ratio.")
app.add_typer(search.app, name="search")
app.add_typer(tasks.app, name="tasks")
app.add_typer(zoo.app, name="zoo")


def main() -> None:
    app()

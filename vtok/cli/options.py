"""The options that commands share, one word for one thing, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from vtok.errors import InvalidValue, MissingExtra

MODEL = "vtok-tiny-llava-next"
METHODS_HELP = "Separated by commas, options behind a colon: visionzip:importance=received. See vtok methods."

Model = Annotated[str, typer.Option(help="A bundled name, a local folder or a repository of the hub.")]
Methods = Annotated[str | None, typer.Option(metavar="NAME,...", help=f"{METHODS_HELP}  [default: a choice]")]
EveryMethod = Annotated[
    str | None, typer.Option(metavar="NAME,...", help=f"{METHODS_HELP}  [default: all training-free ones]")
]
Config = Annotated[
    Path | None, typer.Option(metavar="FILE", help="One more: the choice in a file that patch.save wrote.")
]
Keep = Annotated[
    str | None, typer.Option(metavar="SHARE|COUNT", help="Each method's keep: a fraction or a count.  [default: 0.25]")
]
Budget = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Instead of keep: the mean share of visual tokens that a decoder layer sees."),
]
Items = Annotated[int | None, typer.Option(metavar="N", min=1, help="Test items of each task.  [default: all]")]
Tokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    typer.Option(help="[default: the checkpoint's; float32 for bundled models]"),
]
Threads = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="CPU threads of PyTorch.  [default: PyTorch's choice]")
]


# ---- what they mean --------------------------------------------------------------------------------------------------
def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(name) for name in names(text)]
    except ValueError:
        raise InvalidValue(f"{option} is comma-separated numbers, not {text!r}.") from None


def chosen(methods: str | None, config: Path | None = None, keep: bool = False) -> list[str] | None:
    """The methods of `--methods` and `--config`, each checked, or None where a command takes its own choice. The one
    place through which a command's methods come.

    keep: whether what is in the file keeps as much as it says there; else as much as the command says."""
    if methods is None and config is None:
        return None
    with working("starting PyTorch", plain=False):
        from vtok.config import load
        from vtok.methods import spelt, split

        found = split(methods or "") + ([spelt(load(config), keep)] if config is not None else [])
    if not found:
        raise InvalidValue("No method was given.")
    return found


def amount(keep: str | None, budget: float | None) -> dict[str, Any]:
    """{"keep": ...} or {"budget": ...}."""
    if keep is not None and budget is not None:
        raise InvalidValue("Give --keep or --budget, not both.")
    if budget is not None:
        if not 0 < budget <= 1:
            raise InvalidValue(f"--budget is a fraction in (0, 1], not {budget}.")
        return {"budget": budget}
    with working("starting PyTorch", plain=False):
        from vtok.methods import number
        from vtok.types import check_keep

        return {"keep": check_keep(number(keep or "0.25"), "--keep")}


def device_of(device: str | None) -> str:
    """The device of `--device`. Raises `InvalidValue`."""
    with working("starting PyTorch", plain=False):
        from vtok import models

        return models.device_of(device)


# ---- what is seen of the work ----------------------------------------------------------------------------------------
@contextmanager
def working(words: str, plain: bool = True) -> Iterator[Callable[[str], None]]:
    """Say what takes so long: on a terminal beside a spinner, which can be given other words, else as one line; both on
    standard error. plain: whether there is such a line."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(words) as status:
            yield status.update
        return
    if plain:
        typer.echo(words, err=True)
    yield lambda _: None


@contextmanager
def loaded(
    model: str, device: str | None, dtype: str | None, threads: int | None = None, plain: bool = True
) -> Iterator[tuple[Any, Any, Callable[[str], None]]]:
    """The model, its processor, and how to say what is done with it. Says which is loaded, and where from."""
    from vtok.models import load, place, whence

    place(model)  # raises where there is none such, before torch is there
    device = device_of(device)
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    with working(f"loading {model} ({whence(model)}) on {device}", plain) as status:
        yield *load(model, device, dtype), status


def say(text: str, style: str | None = None) -> None:
    """A line on standard output, no markup read in it, that is never broken."""
    Console().print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def drawing(required: bool) -> Any:
    """`vtok.draw`, or None where matplotlib is missing and no file was asked for."""
    try:
        from vtok import draw

        draw.check()
    except MissingExtra:
        if required:
            raise
        return None
    return draw

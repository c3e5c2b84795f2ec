"""How commands end: what goes wrong becomes one line and an exit code."""

from __future__ import annotations

import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from vtok.errors import VtokError

USAGE: type[Exception] = typer.BadParameter.__mro__[1]  # click's UsageError; newer typers bring a click of their own
GOES_ON = "The same command again goes on where this one stopped."
RESUME = "vtok.resume"  # of a context: what to say after Ctrl-C


class Group(TyperGroup):
    """A group of commands. The root one prints errors as one line."""

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)
        try:
            code = super().main(*args, standalone_mode=False, **extra)
        except USAGE as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                typer.echo(error.format_message(), err=True)
            else:
                where = error.ctx.command_path if error.ctx is not None else "vtok"
                _tell(f"{_sentence(error.format_message())} See {where} -h.")
            code = 2
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        if ctx.parent is not None:
            return super().invoke(ctx)
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _tell(f"Stopped. {ctx.meta.get(RESUME, '')}".strip(), "\n")
            raise typer.Exit(130) from None
        except VtokError as error:
            if _debug():
                raise
            _tell(str(error))
            raise typer.Exit(2) from None
        except (USAGE, typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if _debug() or isinstance(error, BrokenPipeError):
                raise
            reason = next((line for line in str(error).split("\n") if line.strip()), "no reason given")
            _tell(f"{type(error).__name__}: {_sentence(reason)} VTOK_DEBUG=1 shows where.")
            raise typer.Exit(1) from None


def resumable(ctx: Any, words: str = GOES_ON) -> None:
    """Let Ctrl-C from now on say how to go on."""
    ctx.meta[RESUME] = words


def _tell(text: str, before: str = "") -> None:
    typer.echo(f"{before}vtok: {' '.join(text.split())}", err=True)


def _sentence(text: str) -> str:
    text = text.strip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _debug() -> bool:
    return os.environ.get("VTOK_DEBUG", "") not in ("", "0")

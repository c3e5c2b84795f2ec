"""`vtok methods`: the compressors, the model families, which goes with which; and one compressor explained."""

from __future__ import annotations

import textwrap
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from vtok.cli import options
from vtok.cli.options import say
from vtok.markdown import table

WIDTH = 80


def methods(
    name: Annotated[str | None, typer.Argument(help="Explain this one, with its options.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table and a list, for a README.")] = False,
) -> None:
    """List the compressors, the model families, and which goes with which; or explain one.

    \b
    Examples:
      vtok methods
      vtok methods visionzip
    """
    with options.working("starting PyTorch", plain=False):
        from vtok.methods import available, exceptions, explain, fit

        known = available()
    if name is not None:
        _explain(name, explain(name))
        return
    found, families = known["compressors"], known["adapters"]
    facts = [_facts(method, about) for method, about in found.items()]
    hints = [f"{method}: {about['hints'][need]}" for method, about in found.items() for need in about["optional"]]
    if markdown:
        coded = lambda names: ", ".join(f"`{one}`" for one in names)
        words = {"no": "does not go with", "option": "goes by an option with"}
        listed = [f"- `{m}` {words[kind]} {coded(some)}: {why}" for m, kind, some, why in exceptions(known)]
        stages = dict.fromkeys(about["stage"] for about in found.values() if not about["of_pictures"])
        every = (
            f"Those of stage {', '.join(stages)} drop text and columns of the cache as well, and go with any causal "
            f"language model, too. Families: {coded(families)}. Each method goes with each family, except:"
        )
        drawn = table(list(facts[0]), [list(_linked(row).values()) for row in facts], left=len(facts[0]))
        typer.echo("\n\n".join([drawn, every, "\n".join(listed)]))
        return
    listing = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for column in facts[0]:
        heading = "arXiv" if column == "paper" else column
        listing.add_column(heading, overflow="fold", no_wrap=column in ("method", "paper"))
    for row in facts:
        listing.add_row(*(row | {"paper": row["paper"].rpartition("arXiv ")[2]}).values())  # of the paper its number
    Console().print(listing)
    for family, about in families.items():
        default = ", ".join(f"{key}={value}" for key, value in about["default"].items())
        say(f"\n{family}: {', '.join(about['modalities'])}; by default {default}")
        for wanted, words in (("option", "with an option"), ("no", "not")):
            if listed := [each for each in found if fit(found[each], family).partition(" ")[0] == wanted]:
                Console().print(Padding(f"{words}: {', '.join(listed)}", (0, 0, 0, 2)), highlight=False)
    say("")
    for line in (*hints, "One of them with its options: vtok methods NAME"):
        say(line)


def _facts(name: str, about: dict[str, Any]) -> dict[str, str]:
    return {
        "method": name,
        "stage": about["stage"],
        "needs": ", ".join(about["needs"]) or "-",
        "count": "by content" if about["adaptive"] else "fixed",
        "text": "read" if about["text_guided"] else "-",
        "weights": "own" if about["trained"] else "-",
        "cost": "slow" if about["slow"] else "-",
        "paper": about["paper"],
    }


def _linked(row: dict[str, str]) -> dict[str, str]:
    title, _, number = row["paper"].rpartition(", arXiv ")
    paper = f"[{title}](https://arxiv.org/abs/{number})" if title else row["paper"]
    return row | {"method": f"`{row['method']}`", "paper": paper}


def _explain(name: str, about: dict[str, Any]) -> None:
    """One method, in 80 columns."""
    fill = lambda text, indent: textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )
    say(fill(f"{name}: {about['summary']}", ""))
    facts = _facts(name, about)
    say("")
    for key, value in facts.items():
        if key != "method" and value != "-":
            say(fill(value, " " * 10).replace(" " * 10, f"{key:10}", 1))
    say("\noptions, with their defaults:")
    for meaning, some in groupby(about["options"].items(), lambda item: item[1][1]):  # what is told of several, once
        say(fill(", ".join(f"{option}={_shown(default)}" for option, (default, _) in some), "  "))
        if meaning:
            say(fill(meaning, " " * 6))
    say("\nfamilies:")
    if not about["of_pictures"]:
        say("  runs on: any causal language model of transformers")
    for wanted, words in (("yes", "runs on"), ("option", "with an option on"), ("no", "not on")):
        if listed := [family for family, fits in about["fits"].items() if fits.partition(" ")[0] == wanted]:
            say(fill(f"{words}: {', '.join(listed)}", "  "))
    for need in about["optional"]:
        say(fill(about["hints"][need], "  "))
    if about["remarks"]:
        say(f"\n{fill(about['remarks'], '')}")
    trained = ", weights=..." if about["trained"] else ", keep=0.25" if "keep" in about["options"] else ""
    say(f'\nvtok.patch(model, "{name}"{trained})')


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

"""`vtok zoo`: train, judge and document the bundled models, and draw their pictures."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import typer

from vtok.cli import options
from vtok.cli.group import Group, resumable
from vtok.errors import InvalidValue, UnknownName, meant

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    help="""Bundled tiny models and the recipes that made them.

    \b
    Example:
      vtok zoo eval vtok-tiny-llava-next --items 20
    """,
)

RECIPES = {  # model -> modules of `vtok.zoo` that train it, judge it, and write its card
    "vtok-tiny-llava-next": ("train", "evaluate", "card"),
    "vtok-tiny-qwen2.5-vl": ("qwen2_5_vl", "judge", "task_card"),
    "vtok-tiny-internvl": ("internvl", "judge", "task_card"),
}
Name = Annotated[str, typer.Argument(help="Name of a bundled model.")]


def _module(name: str, part: int):
    if name not in RECIPES:
        raise UnknownName(f"No recipe {name!r}. There are: {', '.join(RECIPES)}.{meant(name, RECIPES)}")
    return import_module(f"vtok.zoo.{RECIPES[name][part]}")


@app.command()
def train(
    ctx: typer.Context,
    name: Name,
    out: Annotated[Path, typer.Option(help="Hub folder to write; the state to resume from lies beside it.")],
    seed: Annotated[int, typer.Option(metavar="N", help="Of everything that is drawn.")] = 0,
    start: Annotated[
        str | None, typer.Option(help="Bundled model whose weights to begin with.  [default: the recipe's]")
    ] = None,
    tower_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of the tower's stage.  [default: the recipe's]")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of the question stage.  [default: the recipe's]")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Processes of one CPU thread.")] = 2,
) -> None:
    """Train a bundled model by its recipe. The same command again goes on after a kill.

    \b
    Example:
      vtok zoo train vtok-tiny-internvl --out model --steps 1000
    """
    from vtok.models import place

    recipe = _module(name, 0)
    given = {"start": start, "tower_steps": tower_steps, "steps": steps}
    settings = {"seed": seed} | {key: value for key, value in given.items() if value is not None}
    if unknown := settings.keys() - {field.name for field in fields(recipe.Recipe)}:
        raise InvalidValue(f"The recipe of {name} has no {', '.join(sorted(unknown))}.")
    if start:
        place(start)
    resumable(ctx)
    recipe.train(out, recipe.Recipe(**settings), workers, log=typer.echo)


@app.command(name="eval")
def evaluate(
    name: Name,
    model: Annotated[Path | None, typer.Option(help="Folder of its weights.  [default: the bundled ones]")] = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="Test scenes, or items of each task.  [default: all]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, as the card reads it (eval.json).")] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Exact match on the held-out set. Writes nothing unless --out says where.

    \b
    Example:
      vtok zoo eval vtok-tiny-llava-next --items 20 --out eval.json
    """
    from rich.console import Console
    from rich.progress import track

    judge = _module(name, 1)
    with options.loaded(str(model or name), device, dtype, threads) as (network, processor, status):
        status("")
    bar = lambda items: track(list(items), "items", console=Console(stderr=True), transient=True)
    result = judge.report(network, processor, items, progress=bar)
    for category, row in result["categories"].items():
        typer.echo(f"{category:20} {row['accuracy']:.3f}  n {row['n']}  chance {row['chance']:.3f}")
    typer.echo(f"{'all':20} {result['overall']['accuracy']:.3f}  n {result['overall']['n']}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
        typer.echo(f"wrote {out}")


@app.command()
def card(
    name: Name,
    out: Annotated[
        Path | None, typer.Option(help="Model folder to read and to write README.md in.  [default: the bundled one]")
    ] = None,
) -> None:
    """Write the model card from eval.json and training.json.

    \b
    Example:
      vtok zoo card vtok-tiny-internvl --out model
    """
    from vtok.models import place

    typer.echo(f"wrote {_module(name, 2).write(out or Path(place(name))).name}")


@app.command(short_help="Write the pages of the public checkpoints.")
def pages(
    out: Annotated[Path, typer.Option(help="Folder to write to.", file_okay=False, exists=True)] = Path("model_cards"),
) -> None:
    """Write the pages of the public checkpoints, and the index of all models.

    \b
    Example:
      vtok zoo pages --out model_cards
    """
    from vtok.zoo.pages import write

    typer.echo(f"wrote {', '.join(path.name for path in write(out))}")


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder to write pictures and questions.json to.")],
    items: Annotated[int, typer.Option(metavar="N", min=1, help="How many scenes.")] = 8,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Which scenes.")] = "test",
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of the scenes.  [default: the test set's]")
    ] = None,
    first: Annotated[int, typer.Option(metavar="N", min=0, help="Index of the first scene.")] = 0,
) -> None:
    """Draw scenes with their questions and answers.

    \b
    Example:
      vtok zoo sample --out scenes --first 345 --items 1
    """
    from vtok.zoo import evaluate, scenes

    out.mkdir(parents=True, exist_ok=True)
    listed = {}
    for index in range(first, first + items):
        scene = scenes.generate(split, evaluate.TEST_SEED if seed is None else seed, index)
        file = f"{split}-{index:05d}.png"
        scene.image.save(out / file)
        listed[file] = [{"category": q.category, "question": q.text, "answer": q.answer} for q in scene.questions]
    (out / "questions.json").write_text(json.dumps(listed, indent=1) + "\n")
    typer.echo(f"wrote {items} pictures and questions.json")

"""`vtok zoo`: train, judge and document the bundled models, and draw their pictures."""

from __future__ import annotations

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Bundled tiny models and the recipes that made them.")

RECIPES = {  # model -> modules of `vtok.zoo` that train it and judge it
    "vtok-tiny-llava-next": ("train", "evaluate"),
    "vtok-tiny-qwen2.5-vl": ("qwen2_5_vl", "judge"),
    "vtok-tiny-internvl": ("internvl", "judge"),
}
Name = Annotated[str, typer.Argument(help="Name of a bundled model.")]
Folder = Annotated[Path | None, typer.Option(help="Model folder; the bundled one if left out.")]


def _folder(name: str, out: Path | None) -> Path:
    from vtok import zoo

    try:
        return out or zoo.path(name)
    except KeyError as error:
        raise typer.BadParameter(error.args[0]) from None


def _module(name: str, part: int):
    if name not in RECIPES:
        raise typer.BadParameter(f"no recipe {name!r}; there are: {', '.join(RECIPES)}")
    return import_module(f"vtok.zoo.{RECIPES[name][part]}")


@app.command()
def train(
    name: Name,
    out: Annotated[Path, typer.Option(help="Hub folder to write; the state to resume from lies beside it.")],
    seed: int = 0,
    start: Annotated[
        str | None, typer.Option(help="Bundled model whose weights to begin with; as the recipe says if left out.")
    ] = None,
    tower_steps: Annotated[int | None, typer.Option(help="Steps of the tower's stage, likewise.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the question stage, likewise.")] = None,
    workers: Annotated[int, typer.Option(help="Processes of one CPU thread.")] = 2,
) -> None:
    """Train a bundled model by its recipe. Call again after a kill to go on."""
    recipe = _module(name, 0)
    given = {"start": start, "tower_steps": tower_steps, "steps": steps}
    settings = {"seed": seed} | {key: value for key, value in given.items() if value is not None}
    if unknown := settings.keys() - {field.name for field in fields(recipe.Recipe)}:
        raise typer.BadParameter(f"the recipe of {name} has no {', '.join(unknown)}")
    if start:
        _folder(start, None)
    recipe.train(out, recipe.Recipe(**settings), workers, log=typer.echo)


@app.command(name="eval")
def evaluate(
    name: Name,
    out: Folder = None,
    scenes: Annotated[
        int | None, typer.Option(help="Test scenes or items of each task; the whole test set if left out.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Exact match on the held-out set, written to eval.json in the model folder."""
    import torch
    from rich.progress import track
    from transformers import AutoModelForImageTextToText, AutoProcessor

    judge = _module(name, 1)
    torch.set_num_threads(threads)
    folder = _folder(name, out)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    result = judge.report(model, processor, scenes, progress=lambda items: track(list(items), "items"))
    (folder / "eval.json").write_text(json.dumps(result, indent=1) + "\n")
    for category, row in result["categories"].items():
        typer.echo(f"{category:20} {row['accuracy']:.3f}  n {row['n']}  chance {row['chance']:.3f}")
    typer.echo(f"{'all':20} {result['overall']['accuracy']:.3f}  n {result['overall']['n']}")


@app.command()
def card(name: Name, out: Folder = None) -> None:
    """Write the model card from eval.json and training.json."""
    from vtok.eval.pages import cards

    typer.echo(f"wrote {cards.write(_folder(name, out)).name}")


@app.command()
def pages(
    out: Annotated[Path, typer.Option(help="Folder to write to.", file_okay=False, exists=True)] = Path("model_cards"),
) -> None:
    """Write the pages of the public checkpoints, and the index of all models."""
    from vtok.eval.pages.checkpoint_pages import write

    typer.echo(f"wrote {', '.join(path.name for path in write(out))}")


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="Folder to write pictures and questions.json to.")],
    count: int = 8,
    split: Annotated[str, typer.Option(help="train, val or test")] = "test",
    seed: Annotated[int | None, typer.Option(help="Seed of the scenes; the test set's if left out.")] = None,
    first: Annotated[int, typer.Option(help="Index of the first scene.")] = 0,
) -> None:
    """Draw scenes with their questions and answers."""
    from vtok.zoo import evaluate, scenes, sources

    if split not in sources.SPLITS:
        raise typer.BadParameter(f"split is one of {', '.join(sources.SPLITS)}")
    out.mkdir(parents=True, exist_ok=True)
    listed = {}
    for index in range(first, first + count):
        scene = scenes.generate(split, evaluate.TEST_SEED if seed is None else seed, index)
        file = f"{split}-{index:05d}.png"
        scene.image.save(out / file)
        listed[file] = [{"category": q.category, "question": q.text, "answer": q.answer} for q in scene.questions]
    (out / "questions.json").write_text(json.dumps(listed, indent=1) + "\n")
    typer.echo(f"wrote {count} pictures and questions.json")


if __name__ == "__main__":
    app()

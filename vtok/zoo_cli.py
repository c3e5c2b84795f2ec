"""`vtok zoo`: judge and document the bundled models, and draw their pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import vtok
from vtok.errors import InvalidValue

app = typer.Typer(
    no_args_is_help=True,
    help="Bundled tiny models. What trained them is in a checkout: python -m recipes NAME --out DIR.",
)

Name = Annotated[str, typer.Argument(help="A bundled model, or the folder of one that a recipe wrote.")]


def _folder(name: str) -> Path:
    from vtok import zoo

    try:
        return Path(name) if Path(name).is_dir() else zoo.path(name)
    except KeyError as error:
        raise typer.BadParameter(error.args[0]) from None


def _file(out: Path) -> Path:
    """Where to write, which is never the installed package."""
    file = out if out.suffix == ".json" else out / "eval.json"
    if file.resolve().is_relative_to(Path(vtok.__file__).resolve().parent):
        raise InvalidValue(f"--out {out} lies in the installed package, whose files are to stay as they are.")
    return file


@app.command(name="eval")
def evaluate(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="Folder or .json file to write to; nothing if left out.")] = None,
    items: Annotated[
        int | None, typer.Option(min=1, help="Test items of each task; the whole test sets if left out.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", help="Tasks; those that the model was judged on before, else all.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Exact match on the held-out sets, as a table. vtok zoo eval vtok-tiny-llava-next --items 3"""
    import torch
    from rich.console import Console
    from rich.progress import track
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vtok.eval.results import judge

    file = None if out is None else _file(out)
    torch.set_num_threads(threads)
    folder = _folder(name)
    settings = judge.settings(folder, tasks)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    progress = lambda some: track(list(some), "items", console=Console(stderr=True), transient=True)
    result = judge.report(model, processor, count=items, progress=progress, **settings)
    Console().print(judge.table(result))
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(result, indent=1) + "\n")
        typer.echo(f"wrote {file}")


@app.command()
def card(name: Name) -> None:
    """Write the model card, README.md, from eval.json and training.json in the same folder."""
    from vtok.eval.pages import card, task_card

    folder = _folder(name)
    _file(folder)
    made = json.loads((folder / "training.json").read_text())
    own = "tower_batch" in made["recipe"]  # of vtok-tiny-llava-next before all models had one recipe
    typer.echo(f"wrote {(card if own else task_card).write(folder)}")


@app.command()
def pages(
    out: Annotated[Path, typer.Option(help="Folder to write to.", file_okay=False, exists=True)] = Path("model_cards"),
) -> None:
    """Write the pages of the public checkpoints, and the index of all models."""
    from vtok.eval.pages.pages import write

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
    from vtok.eval.tasks import scenes, sources
    from vtok.eval.tasks.task import TEST_SEED

    if split not in sources.SPLITS:
        raise typer.BadParameter(f"split is one of {', '.join(sources.SPLITS)}")
    out.mkdir(parents=True, exist_ok=True)
    listed = {}
    for index in range(first, first + count):
        scene = scenes.TASK.item(split, TEST_SEED if seed is None else seed, index)
        file = f"{split}-{index:05d}.png"
        scene.images[0].save(out / file)
        listed[file] = [{"category": q.category, "question": q.text, "answer": q.answer} for q in scene.questions]
    (out / "questions.json").write_text(json.dumps(listed, indent=1) + "\n")
    typer.echo(f"wrote {count} pictures and questions.json")

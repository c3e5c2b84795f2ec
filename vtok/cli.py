"""The command line, `vtok COMMAND`: demo, show, methods, eval, report, search, tasks, zoo, bench."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

import vtok
from vtok.errors import InvalidValue, VtokError
from vtok.search.cli import app as search_app
from vtok.tasks_cli import app as tasks_app
from vtok.zoo.cli import app as zoo_app

MODEL = "vtok-tiny-llava-next"


class _OneLineErrors(TyperGroup):
    """Prints vtok's own errors, which are written for people, as one line and exits with code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except VtokError as error:
            typer.echo(f"vtok: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Visual-token compression for Hugging Face vision-language models.",
)
app.add_typer(zoo_app, name="zoo")
app.add_typer(search_app, name="search")
app.add_typer(tasks_app, name="tasks")


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


@app.command()
def demo(
    image: Annotated[Path | None, typer.Option(help="A picture; the bundled one if left out.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    model: Annotated[str, typer.Option(help="A bundled name, a local folder or a hub repository.")] = MODEL,
    methods: Annotated[
        str | None, typer.Option(help="Names separated by commas; all training-free ones if left out.")
    ] = None,
    keep: Annotated[str, typer.Option(help="Each method's keep: a fraction such as 0.25, or a count.")] = "0.25",
    out: Annotated[Path | None, typer.Option(help="PNG to write; ./vtok-demo.png if left out.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 20,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option()] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch.")] = None,
) -> None:
    """Answer one question about one picture, dense and compressed, and draw what was kept."""
    fraction = _keep(keep)
    console = Console()
    say = functools.partial(console.print, highlight=False, markup=False)
    drawing = _drawing(required=out is not None)
    with console.status("loading PyTorch"):
        from transformers.utils import logging

        from vtok import demo as work
        from vtok import zoo
        from vtok.types import check_keep
    logging.disable_progress_bar()
    check_keep(fraction)
    if threads:
        work.torch.set_num_threads(threads)
    picture = work.open_picture(image or zoo.DEMO_IMAGE)
    asked = question or (zoo.DEMO_QUESTION if image is None else "What is in this picture?")
    with console.status(f"loading {model}") as status:
        network, processor = work.load(model, device, dtype)
        if methods is None:
            chosen = work.supported(network)
        else:
            chosen = _names(methods)
        report = lambda method: status.update(f"running {method}")
        answers = work.compare(network, processor, picture, asked, chosen, fraction, tokens, report)

    where = f"{network.device.type}, {str(network.dtype).removeprefix('torch.')}"
    if network.device.type == "cpu":
        where += f", {work.torch.get_num_threads()} threads"
    say(f"{model} ({where}), keep={keep}")
    say(f"{(image or zoo.DEMO_IMAGE).name}, {picture.width} x {picture.height}: {asked}")
    if image is None and question is None and zoo.DEMO_ANSWER:
        say(f"right answer: {zoo.DEMO_ANSWER}")
    say()
    console.print(work.table(answers))
    say(
        "\nkept: visual tokens that a decoder layer works on, mean over layers. FLOPs: encoder and prefill; "
        "KV: cache of the prompt; both by formula. select: the method itself; prefill: the language model's "
        "first pass without it; total: the whole answer; medians. Yellow: not the dense answer.",
        style="dim",
    )
    if drawing is None:
        say('No picture was written, since matplotlib is missing: pip install "vtok[viz]".')
        return
    reference = answers[1].trace
    drawn = drawing.panels(picture, [work.panel(a, reference) for a in answers], asked)
    say(f"Kept tokens: {drawing.save(drawn, out or Path('vtok-demo.png'))}", soft_wrap=True)


@app.command()
def show(
    image: Annotated[Path | None, typer.Option(help="A picture; the bundled one if left out.")] = None,
    clip: Annotated[Path | None, typer.Option(help="Instead: a video file, or a folder of frames.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    model: Annotated[str, typer.Option(help="A bundled name, a local folder or a hub repository.")] = MODEL,
    methods: Annotated[
        str | None, typer.Option(help="Names separated by commas; one of each kind if left out.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Each method's keep: a fraction or a count; 0.25 if left out.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Instead: the mean share of visual tokens a decoder layer sees.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("vtok-show"),
    frames: Annotated[int, typer.Option(min=1, help="Frames of a clip, at most.")] = 16,
    tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 20,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, typer.Option()] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch.")] = None,
) -> None:
    """Draw what is kept of one picture or clip, layer by layer: a PNG, a page with a slider, and for a clip a GIF."""
    if keep is not None and budget is not None:
        raise InvalidValue("Give --keep or --budget, not both.")
    if image is not None and clip is not None:
        raise InvalidValue("Give --image or --clip, not both.")
    fraction = _keep(keep or "0.25")
    console = Console()
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    _drawing(required=True)
    with console.status("loading PyTorch"):
        from transformers.utils import logging

        from vtok import demo, zoo
        from vtok import show as work
        from vtok.types import check_keep
    logging.disable_progress_bar()
    check_keep(fraction)
    if threads:
        demo.torch.set_num_threads(threads)
    source = clip or image or zoo.DEMO_IMAGE
    seen = demo.open_picture(source) if clip is None else work.open_clip(clip, frames)
    ours = image is None and clip is None
    what = "picture" if clip is None else "clip"
    asked = question or (zoo.DEMO_QUESTION if ours else f"What is in this {what}?")
    with console.status(f"loading {model}") as status:
        network, processor = demo.load(model, device, dtype)
        chosen = demo.supported(network, work.METHODS) if methods is None else _names(methods)
        report = lambda method: status.update(f"running {method}")
        shown = work.follow(network, processor, seen, asked, chosen, fraction, budget, tokens, report)
        status.update("drawing")
        amount = f"keep {fraction}" if budget is None else f"budget {budget}"
        files = work.write(seen, shown, asked, f"{model}, {amount}, {source.name}", out)
    for item in shown:
        say(f"{item.method}: {item.stages}: “{item.answer}”")
    for file in files:
        say(f"wrote {file}")


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As tables for a README.")] = False,
) -> None:
    """List the compressors, the model families, and which goes with which."""
    known = vtok.available()
    found, families = known["compressors"], known["adapters"]
    facts = [
        {
            "method": name,
            "stage": about["stage"],
            "needs": ", ".join(about["needs"]) or "-",
            "count": "by content" if about["adaptive"] else "fixed",
            "text": "read" if about["text_guided"] else "-",
            "weights": "own" if about["trained"] else "-",
            "cost": "slow" if about["slow"] else "-",
            "paper": about["paper"],
        }
        for name, about in found.items()
    ]
    fits = [{"method": name, **{family: _fit(about, family) for family in families}} for name, about in found.items()]
    hints = [f"{name}: {about['hints'][need]}" for name, about in found.items() for need in about["optional"]]
    if markdown:
        for row in facts:
            title, _, number = row["paper"].rpartition(", arXiv ")
            if title:
                row["paper"] = f"[{title}](https://arxiv.org/abs/{number})"
            row["method"] = f"`{row['method']}`"
        fits = [
            {"method": f"`{n}`"} | {family: _fit(about, family) for family in families} for n, about in found.items()
        ]
        listed = "\n".join(f"- {hint}" for hint in hints)
        typer.echo(f"{_markdown(facts)}\n\n{_markdown(fits)}\n\n{listed}")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for name in facts[0]:
        table.add_column("arXiv" if name == "paper" else name, overflow="fold", no_wrap=name in ("method", "paper"))
    for row in facts:
        table.add_row(*(row | {"paper": row["paper"].rpartition("arXiv ")[2]}).values())  # of the paper its number
    say = functools.partial(Console().print, highlight=False, markup=False)
    say(table)
    for family, about in families.items():
        default = ", ".join(f"{key}={value}" for key, value in about["default"].items())
        say(f"\n{family}: {', '.join(about['modalities'])}; by default {default}")
        for fit, words in (("option", "with an option"), ("no", "not")):
            if names := [name for name in found if _fit(found[name], family).partition(" ")[0] == fit]:
                say(f"  {words}: {', '.join(names)}")
    say()
    for line in hints:
        say(line)


def _fit(about: dict[str, Any], family: str) -> str:
    """Whether a method goes with a family: "yes", "option" (its hint says which), or "no" and what is missing."""
    missing = about["lacking"].get(family)
    if not missing:
        return "yes"
    needed = [need for need in missing if need not in about["optional"]]
    return f"no {', '.join(needed)}" if needed else "option"


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@app.command(name="eval")
def evaluate(
    out: Annotated[Path, typer.Option(help="Folder of results; call again with the same one to go on after a kill.")],
    model: Annotated[
        str, typer.Option(help="Bundled models, local folders or repositories of the hub, separated by commas.")
    ] = MODEL,
    tasks: Annotated[
        str | None, typer.Option(help="Offline tasks separated by commas; all that the model takes if left out.")
    ] = None,
    methods: Annotated[
        str | None, typer.Option(help="Names separated by commas; all training-free ones if left out.")
    ] = None,
    budgets: Annotated[
        str, typer.Option(help="Mean shares of visual tokens a decoder layer sees, separated by commas.")
    ] = "0.5,0.25,0.1,0.05",
    items: Annotated[int | None, typer.Option(min=1, help="Test items of each task; all if left out.")] = None,
    questions: Annotated[
        int | None, typer.Option(min=1, help="Instead: of each task as many items as hold so many questions.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch.")] = None,
) -> None:
    """Exact match of every method at every budget on the offline tasks, paired with the dense model.

    Results lie in OUT/TASK, those of several models in OUT/MODEL/TASK. Several processes share the work:
    torchrun --nproc_per_node 2 -m vtok.cli eval --out DIR
    """
    from transformers.utils import logging

    from vtok.eval.results import sweep
    from vtok.eval.tasks import task

    logging.disable_progress_bar()
    if threads:
        import torch

        torch.set_num_threads(threads)
    if items is not None and questions is not None:
        raise InvalidValue("--items and --questions both say how much of a task to run: give one of them.")
    named = _names(model)
    folders = {name: out / Path(name).name if len(named) > 1 else out for name in named}
    if len({*folders.values()}) < len(named):
        raise InvalidValue(f"The models {model} would write to one folder: evaluate them apart.")
    share = sweep.Share.of_accelerate()
    known = task.tasks()
    counts = {
        work.name: work.items_of(questions) if questions else min(items or work.count, work.count)
        for work in (known.values() if tasks is None else map(task.get, _names(tasks)))
    }
    for name, folder in folders.items():
        _evaluate(name, folder, counts, tasks is not None, methods, _numbers(budgets, float, "--budgets"), share)


def _evaluate(
    model: str, out: Path, counts: dict[str, int], asked: bool, methods: str | None, budgets: list[float], share
) -> None:
    """`vtok eval` of one model. counts: items of each task; asked: whether the tasks were named."""
    from vtok import demo, zoo
    from vtok.eval.results import sweep
    from vtok.eval.results.results import table
    from vtok.eval.tasks import task
    from vtok.eval.tasks.answers import media

    network, processor = demo.load(model)
    takes = media(processor)
    console = Console(quiet=share.rank > 0)
    for work, count in ((task.get(name), count) for name, count in counts.items()):
        if work.media not in takes:
            if asked:
                raise InvalidValue(f"{work.name} shows a {work.media}, and {model} takes: {', '.join(takes)}.")
            console.print(f"not run: {work.name} shows a {work.media}, and {model} takes: {', '.join(takes)}")
            continue
        instruction = "" if model in zoo.names() else work.instruction
        names = None if methods is None else _names(methods)
        folder = out / work.name
        summary = sweep.run(network, processor, model, work, names, budgets, count, folder, share, instruction)
        console.print(f"\n{model}: {work.title} ({work.name}), {summary['about']['items']} items", style="bold")
        console.print(table(summary))
        for row in summary["refused"]:
            told = f"not run: {row['method']} at {row['budget']:g}: {row['reason']}"
            console.print(told, style="dim", highlight=False, markup=False)
        console.print(f"wrote {folder / 'sweep.json'}", soft_wrap=True)


@app.command()
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
) -> None:
    """Turn results of `vtok eval`, of one task, several or several models, into one self-contained HTML page."""
    if choosing is not None:
        from vtok.eval.pages import choosing as guide

        typer.echo(f"wrote {guide.write(folder, choosing)}")
        return
    _drawing(required=True)
    console = Console(stderr=True)
    with console.status("writing the report"):
        from transformers.utils import logging

        from vtok.eval.pages import report as work

        logging.disable_progress_bar()
        files = work.write(folder, out, gallery)
    for file in files:
        typer.echo(f"wrote {file}")


@app.command()
def bench(
    check: Annotated[bool, typer.Option("--check", help="Exit with code 1 if a bar is missed.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write, with a plot of each picture beside it.")] = None,
    workload: Annotated[
        str, typer.Option(help="small, smollm2, llava-next-7b, qwen2.5-vl-3b, or a bundled model.")
    ] = "small",
    tokens: Annotated[str, typer.Option(help="Visual tokens, comma-separated; all pictures if left out.")] = "",
    keep: Annotated[str, typer.Option(help="Fractions to keep, comma-separated.")] = "0.5,0.25,0.1",
    methods: Annotated[str, typer.Option(help="Comma-separated; all if left out.")] = "",
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 1,
    decode: Annotated[int, typer.Option(min=0, help="Tokens to decode after each prefill.")] = 8,
    repetitions: Annotated[int, typer.Option(min=1, help="Timed runs of each variant, at most.")] = 9,
    seconds: Annotated[float, typer.Option(help="Stop after so long a picture, but not before 3 runs.")] = 300.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of PyTorch.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "float32",
    kernels: Annotated[bool, typer.Option("--kernels", help="Each kernel alone over sizes instead.")] = False,
    page: Annotated[
        Path | None, typer.Option(help="Measure nothing: make a page of this folder's JSON files, FOLDER.md beside it.")
    ] = None,
    cpu_time: Annotated[
        bool, typer.Option("--cpu-time", help="For a busy machine: CPU time instead of wall; use with --threads 1.")
    ] = False,
) -> None:
    """Measure every phase against the FLOP ratio, the cost of the patch itself, memory and decoding."""
    if page is not None:
        from vtok.eval.bench import page as bench_page

        typer.echo(f"wrote {bench_page.write(page)}")
        return
    if kernels:
        from vtok.eval.bench import kernels as alone

        met = alone.run(out, repetitions, threads, device, dtype)
    else:
        from vtok.eval.bench import bench as work

        if out is not None:
            _drawing(required=True)
        met = work.run(
            workload,
            _numbers(tokens, int, "--tokens") or None,
            out,
            _numbers(keep, float, "--keep"),
            _names(methods) or None,
            batch,
            decode,
            repetitions,
            seconds,
            threads,
            device,
            dtype,
            cpu_time,
        )
    if check and not met:
        raise typer.Exit(1)


def _numbers(text: str, kind: type, option: str) -> list[Any]:
    try:
        return [kind(name) for name in _names(text)]
    except ValueError:
        raise InvalidValue(f"{option} is comma-separated numbers, not {text!r}.") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _keep(text: str) -> float | int:
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise InvalidValue(f"--keep is a fraction such as 0.25 or a count such as 64, not {text!r}.") from None


def _drawing(required: bool) -> Any:
    """`vtok.draw`, or None where matplotlib is missing and no file was asked for."""
    from vtok.errors import MissingExtra

    try:
        from vtok import draw

        draw.check()
    except MissingExtra:
        if required:
            raise
        return None
    return draw


def main() -> None:
    app()


if __name__ == "__main__":
    main()

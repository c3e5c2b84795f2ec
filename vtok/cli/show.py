"""`vtok show`: what is kept, layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vtok import zoo
from vtok.cli import options
from vtok.cli.options import say
from vtok.errors import InvalidValue


def show(
    image: Annotated[Path | None, typer.Option(help="A picture.  [default: the bundled one]")] = None,
    clip: Annotated[Path | None, typer.Option(help="Instead: a video file, or a folder of frames.")] = None,
    text: Annotated[Path | None, typer.Option(help="Instead: a text file, for a language model.")] = None,
    question: Annotated[str | None, typer.Option(help="What to ask about it.")] = None,
    model: options.Model = options.MODEL,
    methods: options.Methods = None,
    config: options.Config = None,
    keep: options.Keep = None,
    budget: options.Budget = None,
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("vtok-show"),
    frames: Annotated[int, typer.Option(metavar="N", min=1, help="Frames of a clip, at most.")] = 16,
    tokens: options.Tokens = 20,
    device: options.Device = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
) -> None:
    """Draw what is kept of one picture or clip, layer by layer: a PNG, a page with a slider, and for a clip a GIF. Of a
    text: which columns stay in the cache, as a page.

    \b
    Examples:
      vtok show --image cat.jpg --question "What is it?" --methods fastv
      vtok show --clip film.mp4 --model vtok-tiny-qwen2.5-vl --frames 8
      vtok show --text notes.txt --model smollm2 --methods snapkv,h2o
    """
    if sum(given is not None for given in (image, clip, text)) > 1:
        raise InvalidValue("Give one of --image, --clip and --text.")
    how = options.amount(keep, budget)
    names = options.chosen(methods, config, keep=keep is None and budget is None)
    options.drawing(required=True)
    if text is not None:
        with options.loaded(model, device, dtype, threads) as (network, tokenizer, status):
            _columns(network, tokenizer, status, model, text, question, names, tokens, how, out)
        return
    from vtok.media import Sampling, open_clip, open_picture

    source = clip or image or zoo.DEMO_IMAGE
    seen = open_picture(source) if clip is None else open_clip(clip, Sampling(max_frames=frames))
    what = "picture" if clip is None else "clip"
    asked = question or (zoo.DEMO_QUESTION if image is None and clip is None else f"What is in this {what}?")
    with options.loaded(model, device, dtype, threads) as (network, processor, status):
        from vtok import show as work
        from vtok.methods import supported

        if _reads_text_alone(network):
            raise InvalidValue(f"{model} is a language model: give --text FILE.")
        names = supported(network, work.METHODS, **how) if names is None else names
        report = lambda method: status(f"answering with {method}")
        shown = work.follow(network, processor, seen, asked, names, max_new_tokens=tokens, progress=report, **how)
        status("drawing")
        told = ", ".join(f"{key} {value}" for key, value in how.items())
        files = work.write(seen, shown, asked, f"{model}, {told}, {source.name}", out)
    for item in shown:
        say(f"{item.method}: {item.stages}: “{item.answer}”")
    for file in files:
        say(f"wrote {file}")


def _columns(
    network: Any,
    tokenizer: Any,
    status: Callable[[str], None],
    model: str,
    file: Path,
    question: str | None,
    names: list[str] | None,
    tokens: int,
    how: dict[str, Any],
    out: Path,
) -> None:
    """Show what stays of a text, with the question, if there is one, behind it."""
    from vtok import show_text as work

    if not _reads_text_alone(network):
        raise InvalidValue(f"--text is for language models, and {model} sees pictures: give --image or --clip.")
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"Could not read {str(file)!r} as a text in UTF-8 ({error}).") from error
    asked = "\n\n".join(part for part in (text, question) if part)
    report = lambda method: status(f"answering with {method}")
    words, shown = work.follow(
        network, tokenizer, asked, names or work.METHODS, max_new_tokens=tokens, progress=report, **how
    )
    told = ", ".join(f"{key} {value}" for key, value in how.items())
    written = work.write(words, shown, f"{model}, {told}, {file.name}", out)
    for item in shown:
        say(f"{item.method}: {item.words}: “{item.answer}”")
    say(f"wrote {written}")


def _reads_text_alone(network: Any) -> bool:
    from vtok import adapter

    return not adapter.find(network)[1].encoders

"""What `vtok demo` does: one picture, one question, answered dense and compressed, side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from vtok import adapter as adapters
from vtok import compressor as compressors
from vtok.draw import Panel
from vtok.engine.trace import Picture, Trace
from vtok.errors import InvalidValue, UnknownName, Unsupported
from vtok.patching import available, patch

METHODS = ("divprune", "globalcom2", "fastv", "aim", "pool", "random", "downsample")
DENSE = "dense"
TIMED_SECONDS = 10.0  # about how long the timed rounds may take together
MAX_ROUNDS = 7


@dataclass(frozen=True)
class Answer:
    """One method's answer and what it cost.

    tokens, kept: visual tokens of the picture in the prompt, and those that a decoder layer works on (mean).
    flops: operations of encoder and prefill, by formula. kv_bytes: of the prompt's cache, by formula.
    selection, prefill, total: seconds (medians): the compressor alone, the rest of the language model's first
        forward, and the whole of `generate`.
    trace: of the last run; None for the dense model.
    """

    method: str
    text: str
    tokens: int
    kept: int
    flops: int
    kv_bytes: int
    selection: float
    prefill: float
    total: float
    trace: Trace | None


def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[nn.Module, Any]:
    """A model in eval mode and its processor: a bundled name, a local folder, or a repository of the hub.

    device: if left out, "cuda" where there is one, else "cpu". dtype: a name of torch's; if left out the
    checkpoint's own, or float32 for bundled models. Raises `UnknownName` where there is no such model.
    """
    from vtok import zoo

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: PyTorch was built without CUDA
        raise InvalidValue(f"There is no device {device!r} here.") from error
    if name in zoo.names():
        return zoo.load(name, dtype=dtype or "float32", device=device)
    if not Path(name).is_dir() and "/" not in name:
        bundled = ", ".join(zoo.names()) or "none"
        raise UnknownName(f"No model {name!r}: it is no local folder, and the bundled models are: {bundled}.")
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(name)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype or "auto")
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnknownName(f"The model {name!r} could not be loaded: {reason}") from error
    return model.to(device).eval(), processor


def open_picture(file: str | Path) -> Image.Image:
    """The picture in a file, upright and RGB. Raises `InvalidValue` if it is missing or cannot be read."""
    try:
        with Image.open(file) as opened:
            return rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as error:
        raise InvalidValue(f"There is no picture {str(file)!r}.") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidValue(f"{str(file)!r} is not a picture that can be read ({error}).") from error


def rgb(picture: Image.Image) -> Image.Image:
    """8 bits a channel. Greys of 16 bits keep their whole range, which Pillow's own conversion cuts at 255.

    Raises `InvalidValue` for numbers of which nobody says what is white."""
    if not picture.mode.startswith(("I", "F")):
        return picture.convert("RGB")
    low, high = picture.getextrema()
    if picture.mode == "F" or low < 0 or high > 0xFFFF:
        raise InvalidValue(
            f"A picture with values from {low:g} to {high:g} does not say what is white: save it with 8 or 16 bits a "
            f"channel."
        )
    return picture.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")


def options(method: str, keep: float | int) -> dict[str, Any]:
    """What to pass to `patch` beside a method's name: its keep, where it has one."""
    cls = compressors.load_all().get(method)
    return {} if cls is not None and "keep" not in {f.name for f in fields(cls) if f.init} else {"keep": keep}


def inputs_for(
    processor: Any, picture: Any, question: str, device: torch.device, modality: str = "image", **how: Any
) -> Any:
    """The model's inputs for one question about one picture, or one clip where modality is "video".

    how: more arguments of the processor. Raises `Unsupported` without a chat template."""
    if getattr(processor, "chat_template", None) is None:
        raise Unsupported("This checkpoint's processor has no chat template, so the question cannot be put.")
    turn = {"role": "user", "content": [{"type": modality}, {"type": "text", "text": question}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    return processor(**{f"{modality}s": [picture]}, text=[prompt], return_tensors="pt", **how).to(device)


def supported(model: nn.Module, wanted: Sequence[str] = METHODS) -> list[str]:
    """Those of the methods that this very model can be patched with."""
    _, adapter = adapters.find(model)
    known = available()["compressors"]
    names = [name for name in wanted if name in known and adapter.family in known[name]["families"]]
    return [name for name in names if _patches(model, name)]


def _patches(model: nn.Module, name: str) -> bool:
    try:
        patch(model, name).remove()
    except Unsupported:
        return False
    return True


def compare(
    model: nn.Module,
    processor: Any,
    picture: Image.Image,
    question: str,
    methods: Sequence[str],
    keep: float | int = 0.25,
    max_new_tokens: int = 20,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Answer]:
    """Answer the question with the dense model, then with each method at `keep`.

    Each round runs all methods once, so that a disturbance of the machine meets all alike. The first warms up
    and is not timed, unless the model is so slow that one round takes over a minute.
    """
    if not methods:
        raise InvalidValue("No method was given.")
    vlm, _ = adapters.find(model)
    inputs = inputs_for(processor, picture, question, vlm.device)

    def once(method: str) -> tuple[Tensor, tuple[float, float, float], Trace | None]:
        progress(method)
        return run(model, inputs, method, options(method, keep), max_new_tokens)

    names = [DENSE, *methods]
    began = time.perf_counter()
    first = {name: once(name) for name in names}
    took = time.perf_counter() - began
    timed = {name: [run[1]] for name, run in first.items()}
    if took < 60:
        rounds = max(1, min(MAX_ROUNDS, int(TIMED_SECONDS / took)))
        repeated = [{name: once(name)[1] for name in names} for _ in range(rounds)]
        timed = {name: [each[name] for each in repeated] for name in names}

    reference = first[methods[0]][2]
    answers = []
    for name in names:
        ids, _, trace = first[name]
        kind = DENSE if trace is None else "compressed"
        flops, held = (trace or reference).flops()[kind], (trace or reference).kv_bytes()[kind]
        tokens = sum(reference.n_visual)
        selection, prefill, total = (statistics.median(column) for column in zip(*timed[name]))
        answers.append(
            Answer(
                method=name,
                text=words(processor, inputs, ids),
                tokens=tokens,
                kept=tokens if trace is None else round(trace.mean_keep * tokens),
                flops=flops["encoder"] + flops["prefill"],
                kv_bytes=held,
                selection=selection,
                prefill=prefill,
                total=total,
                trace=trace,
            )
        )
    return answers


def words(processor: Any, inputs: Any, ids: Tensor) -> str:
    """What was generated behind one prompt, on one line."""
    (text,) = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return _readable(text)


def _readable(text: str) -> str:
    """The text on one line, without what a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def run(
    model: nn.Module, inputs: Any, method: str, how: dict[str, Any], max_new_tokens: int
) -> tuple[Tensor, tuple[float, float, float], Trace | None]:
    """Generated ids, (selection, prefill, total) seconds and trace of one run of one method, patched with `how`."""
    vlm, adapter = adapters.find(model)
    language_model = adapter.core(vlm).language_model
    marks: list[float] = []

    def now() -> float:
        if vlm.device.type == "cuda":
            torch.cuda.synchronize(vlm.device)
        return time.perf_counter()

    def mark(*_: Any) -> None:
        if len(marks) < 2:  # the later calls are decoding
            marks.append(now())

    with ExitStack() as stack:
        # The patch's own hooks lie between these two, so that its work is counted.
        stack.callback(language_model.register_forward_pre_hook(mark).remove)
        handle = None if method == DENSE else stack.enter_context(patch(model, method, **how))
        stack.callback(language_model.register_forward_hook(mark).remove)
        began = now()
        ids = vlm.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        total = now() - began
        trace = handle.trace if handle is not None else None
    selection = trace.selection_seconds if trace is not None else 0.0
    return ids, (selection, marks[1] - marks[0] - selection, total), trace


def table(answers: Sequence[Answer]) -> Table:
    """The answers as a table that fits 80 columns."""
    drawn = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", collapse_padding=True)
    drawn.add_column("method", no_wrap=True)
    drawn.add_column("answer", max_width=20, overflow="fold")
    for name in ("tokens", "kept", "FLOPs", "KV", "select", "prefill", "total"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_row("", "", "", "", "", "", "ms", "ms", "ms", style="dim")
    dense = answers[0].text
    for a in answers:
        times = [f"{1e3 * seconds:.1f}" for seconds in (a.selection, a.prefill, a.total)]
        if a.trace is None:
            times[0] = "-"
        cells = [str(a.tokens), str(a.kept), scaled(a.flops), scaled(a.kv_bytes, "B"), *times]
        drawn.add_row(a.method, Text(a.text), *cells, style=None if a.text == dense else "yellow")
    return drawn


def scaled(value: float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 8.18 T, 320 kB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    digits = 0 if value >= 99.95 or not prefix else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {prefix}{unit}".strip()


def panel(answer: Answer, reference: Trace) -> Panel:
    """What to draw of one answer. `reference`: any trace of the picture, for the dense model's layout."""
    trace, picture = answer.trace, (answer.trace or reference).pictures[0]
    caption = f"{answer.kept} of {answer.tokens} visual tokens"
    if trace is None:
        whole = torch.ones(picture.dense.n)
        return Panel(answer.method, f"{answer.tokens} visual tokens", answer.text, picture.dense, whole)
    layers = trace.shapes.layers
    seen = torch.stack([trace.keep_masks_at(layer)[0].float() for layer in range(layers)]).mean(0)  # [N]
    if trace.n_kept_at(layers - 1) != trace.n_kept:
        caption += ", mean over layers"
    return placed(Panel(answer.method, caption, answer.text, picture.dense, seen, trace.merged_into[0]), picture)


def placed(drawn: Panel, picture: Picture) -> Panel:
    """A panel over the tokens of `picture` in the prompt, moved to those of the smaller one that the encoder saw."""
    if picture.source is None:
        return drawn
    # they stand on `source` of the dense ones
    source, merged = picture.source.cpu(), drawn.merged_into
    if merged is not None:
        small = torch.full((picture.dense.n + 1,), -1)  # the last: for the -1 of dropped tokens
        small[source] = torch.arange(len(source))
        merged = small[merged[source]]
    scale = (picture.layout.n / picture.dense.n) ** 0.5
    return replace(drawn, layout=picture.layout, seen=drawn.seen[source], merged_into=merged, scale=scale)

"""`vtok bench --page DIR`: what `vtok bench --out DIR/NAME.json` measured, as one page beside the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtok.errors import InvalidValue
from vtok.eval.bench import fleet, rl, serve, split
from vtok.eval.bench.bars import bars
from vtok.eval.bench.shown import cells, ms
from vtok.markdown import table
from vtok.runs import DENSE

HEAD = """# Speed

Written by `vtok bench --page docs/speed` from the files in that folder; nothing here is typed by hand.

*Speed-up* is dense over compressed time of the language model's prefill, medians, with selection and everything else
that the patch does inside. *Ideal* is the ratio of the operations that causal attention needs (n (n + 1) / 2 scores
of a prompt of n tokens; published tables count all n^2, which no dense run pays for). *Reached* is the one over the
other; it passes 100 % where attention is slower per operation than matrix products are. *Selection* is within the
prefill. *Token* is one decoded token, everything in `generate` included. *Peak* is how far memory rises in a prefill.
"""
NO_GPU = """
## On a GPU

Not measured: no GPU has been at hand, so there is no table. The commands are `vtok bench --workload llava-next-7b
--device cuda --dtype bfloat16 --batch 1 --out docs/speed/llava-next-7b.json` (and `--batch 8`, and `--workload
qwen2.5-vl-3b`), and `vtok bench --kernels --device cuda --dtype bfloat16 --out docs/speed/kernels-cuda.json`. The
Triton kernels have been run in Triton's interpreter only, for their results and not for their speed.
"""


def write(folder: Path) -> Path:
    """The page, DIR.md. Raises `InvalidValue` where the folder holds no results."""
    runs = {file: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    if not runs:
        raise InvalidValue(f"{folder} holds no results of vtok bench --out.")
    parts = [HEAD]
    for file, run in runs.items():
        parts.append(next(section(file, run) for key, section in SECTIONS.items() if key in run))
    if not any(run["machine"]["device"].startswith("cuda") for run in runs.values()):
        parts.append(NO_GPU)
    page = folder.with_suffix(".md")
    page.write_text("".join(parts))
    return page


def _about(run: dict[str, Any]) -> str:
    about = run["machine"]
    versions = f"{about['dtype']}, torch {about['torch']}, transformers {about['transformers']}"
    return (
        f"{about['machine']}, {about['threads']} threads, {versions}, commit {about['commit']}: `{about['command']}`."
    )


def _head(run: dict[str, Any]) -> str:
    title = run["machine"]["workload"]
    return f"\n## {title[0].upper()}{title[1:]}\n\n{_about(run)}"


def _workload(file: Path, run: dict[str, Any]) -> str:
    text = f"{_head(run)}\n"
    for result in run["results"]:
        picture = f"{file.parent.name}/{file.stem}-{result['visual_tokens']}.png"
        dense = result["variants"][DENSE]
        phases = [f"{name} {ms(dense[f'{name}_seconds'])} ms" for name in ("encoder", "projector", "prefill")]
        text += (
            f"\n### {result['visual_tokens']:,} visual and {result['text_tokens']} other tokens\n\n"
            f"Batch {result['batch']}, {result['rounds']} rounds, dense {', '.join(phases)}. At keep=1.0 hooks and "
            f"trace take {result['overhead']:.2%} of a dense prefill.\n\n"
            f"![Prefill time against kept tokens]({picture})\n\n{_table(result)}\n\n"
        )
        text += "".join(f"- {'Met' if met else '**Missed**'}: {sentence}.\n" for met, sentence in bars(result))
        text += "".join(f"- Not run: {name}. {reason}\n" for name, reason in result["refused"].items())
    return text


def _table(result: dict[str, Any]) -> str:
    head = ["variant", "mean keep", "prefill ms", "least to most", "speed-up", "ideal", "reached %", "selection ms"]
    head += ["token ms", "cache MB", "peak MB"]
    return table(head, [[f"`{name}`", *cells(name, row)] for name, row in result["variants"].items()])


def _kernels(file: Path, run: dict[str, Any]) -> str:
    device = run["machine"]["device"]
    text = f"\n## Kernels alone, {device}\n\n{_about(run)}\n"
    text += "\nMilliseconds, medians. *Exponent*: slope of log time over log N, 1 for linear cost.\n\n"
    sizes = [f"N = {n:,}" for n in run["sizes"]]
    roofs = any(row.get("roofline") for row in run["kernels"])
    head = ["kernel", "backend", *sizes, "exponent", *(["% of the nearer limit"] if roofs else [])]
    lines = [
        [
            f"`{row['kernel']}`",
            row["backend"],
            *(f"{1e3 * t['median']:.2f}" for t in row["seconds"]),
            f"{row['exponent']:.2f}",
            *([f"{100 * row['roofline']:.0f}" if row["roofline"] else ""] if roofs else []),
        ]
        for row in run["kernels"]
    ]
    return text + table(head, lines) + "\n"


def _rl(file: Path, run: dict[str, Any]) -> str:
    text = f"{_head(run)}\n"
    text += (
        "\nMilliseconds, medians; variants take turns. *Of dense*: the median of a step's time over the dense step's "
        "of the same round. *Ideal*: the same of the language model's operations.\n"
    )
    for result in run["rl"]:
        size = f"{result['visual_tokens']:,} visual tokens, {result['parameters'] / 1e6:.0f} M parameters"
        text += f"\n### {size}\n\n{table(rl.HEAD, [[f'`{name}`', *cells] for name, *cells in rl.rows_of(result)])}\n"
    fits = ", ".join(f"`{name}` {tokens:,}" for name, tokens in run["fits"].items())
    if fits:
        text += f"\nVisual tokens of the largest step that fits in {run['memory_gib']:g} GiB, on a line through the "
        text += f"measured peaks, weights and gradients included: {fits}.\n"
    return text + "\n" + "".join(f"- {'Met' if met else '**Missed**'}: {told}.\n" for met, told in rl.bars(run["rl"]))


def _serve(file: Path, run: dict[str, Any]) -> str:
    told = run["serve"]
    text = f"{_head(run)}\n\n"
    text += (
        "Two servers take turns; medians of rounds. *First*: seconds to the first token. *Between*: from a token to "
    )
    text += "the next. *KV*: of the cache in use, and requests that run and wait, at most.\n\n"
    text += table(list(serve.HEAD), serve.rows_of(told["results"])) + "\n\n"
    verdicts = serve.bars(told["visual_tokens"], told["keep"], told["results"])
    text += "".join(f"- {'' if met else '**Missed**: '}{sentence}.\n" for met, sentence in verdicts)
    return text + (_fleet(told) if (told["visual_tokens"], told["keep"]) == serve.BAR_AT else "")


def _fleet(told: dict[str, Any]) -> str:
    """How many cards serve a load, by the ratios of this file."""
    lines = table(list(fleet.HEAD), fleet.rows_of(told["visual_tokens"], told["results"]))
    return f"\n### Cards for a fleet\n\n{fleet.told(told['visual_tokens'], told['results'])}\n\n{lines}\n"


def _split(file: Path, run: dict[str, Any]) -> str:
    text = f"{_head(run)}\n\n"
    text += (
        "One server reads a prompt (*read*, encoder included) and writes its cache into files (*handed over*); another "
        "answers with these, and encodes no picture that lies in whole blocks: *first* to its first token, "
        "*between* from a token to the next. "
        "*Same answers*: as the first one gives alone. Medians.\n\n"
    )
    return text + table(list(split.HEAD), split.rows_of(run["split"]["results"])) + "\n"


SECTIONS = {
    "kernels": _kernels,
    "rl": _rl,
    "serve": _serve,
    "split": _split,
    "results": _workload,
}  # what is in a file -> its section

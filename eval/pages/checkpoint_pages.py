"""The pages of `model_cards/`: one for each public checkpoint, and the index. `vtok zoo pages` writes them."""

from __future__ import annotations

import json
from pathlib import Path

from vtok import adapter as adapters
from vtok import zoo
from vtok.engine.accounting import TextShape, kv_bytes
from vtok.eval.pages.checkpoints import (
    CHECKPOINTS,
    REMARKS,
    TASKS,
    TEXT,
    VIDEO,
    Checkpoint,
    Media,
    Table,
    costs,
    encoder,
    layouts,
    media,
)
from vtok.markdown import percent, table
from vtok.types import Layout, Plane

SHARES = (1.0, 0.5, 0.25, 0.1)
AT = 0.25  # at which the commands run
UNMEASURED = "Our own numbers: **not measured yet**, these commands have not been run by us."


def pages() -> dict[str, str]:
    """File name in `model_cards/` -> its text."""
    return {f"{c.name}.md": page(c) for c in CHECKPOINTS} | {"README.md": index()}


def write(folder: Path) -> list[Path]:
    """Write them all and return their paths."""
    for name, text in pages().items():
        (folder / name).write_text(text)
    return [folder / name for name in pages()]


def index() -> str:
    """The bundled models and the public checkpoints, a line each."""
    bundled = []
    for name in zoo.names():
        folder = zoo.path(name)
        family = json.loads((folder / "config.json").read_text())["model_type"]
        megabytes = (folder / "model.safetensors").stat().st_size / 1e6
        result = json.loads((folder / "eval.json").read_text())
        known = ", ".join(f"`{task}`" for task in result.get("tasks", ["scenes"]))
        right = f"{percent(result['overall']['accuracy'])} % of {result['overall']['n']:,}"
        bundled.append([f"[{name}]({name}/README.md)", f"`{family}`", f"{megabytes:.1f} MB", known, right])
    public = []
    for c in CHECKPOINTS:
        shape, photo = TextShape.of(c.build()), next(media(c))
        tokens = sum(picture.n for picture in layouts(c, photo))
        public.append([f"[{c.name}]({c.name}.md)", f"`{c.family}`", f"{shape.layers} x {shape.hidden}", f"{tokens:,}"])
    return f"""# Models

Written by `vtok zoo pages`; do not edit.

## Bundled

Trained by the recipes in `recipes/`; weights, processor and measured tables are in the folder and in the wheel:
`model, processor = vtok.zoo.load(NAME)`.

{table(["model", "family", "weights", "trained on", "held-out questions answered"], bundled)}

## Public checkpoints

Nothing of them is bundled: each page has the commands that measure the checkpoint, what vtok is to save by formula, and
what papers published. None has been measured by us yet.

{table(["checkpoint", "family", "decoder, layers x width", "visual tokens of a 640 x 480 photo"], public)}
"""


def page(c: Checkpoint) -> str:
    """The page of one checkpoint."""
    notes = "".join(f"\n- {note}" for note in c.notes)
    return f"""# {c.hub}

Written by `vtok zoo pages` from `eval/pages/checkpoints.toml`; do not edit. Family `{c.family}`
(`adapters/{c.family}.py`).

```python
import vtok
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained(
    "{c.hub}", dtype="bfloat16", device_map="cuda"
)
patch = vtok.patch(model, "{_default(c)}", keep={AT})
```
{notes and f"{chr(10)}Worth knowing:{chr(10)}{notes}{chr(10)}"}
## Sizes

{_sizes(c)}

## Visual tokens

{_tokens(c)}

## Predicted savings

By formula (`vtok.engine.accounting`), for one picture or clip, {TEXT} text tokens and a compressor before the language
model that keeps the given share; prefill in TFLOPs, KV cache in MB of half precision. The encoder's work is not saved
by it, which bounds the gain of the whole.

{_savings(c)}

## Accuracy

`pip install "vtok[eval]"`; all arguments are in [docs/lmms_eval.md](../docs/lmms_eval.md). Each run prints scores and
costs (`avg_n_kept`, `avg_mean_keep`, `avg_flops_ratio`, ...) and leaves its answers in `results/`.

{_accuracy(c)}
## Speed

Batch 1; each run prints `avg_peak_memory_mb` and the seconds of encoder, selection, prefill and decoding
(`avg_*_seconds`).

```bash
{_speed(c)}
```

{UNMEASURED}

## Published numbers

{_published(c)}"""


def _default(c: Checkpoint) -> str:
    return adapters.load_all()[c.family].default["method"]


def _sizes(c: Checkpoint) -> str:
    config = c.build()
    text, vision = TextShape.of(config), adapters.of(config).tower(config).shape()
    head = text.query_width // text.heads
    heads = f"{text.heads} query and {text.kv_width // head} key-value heads of {head}"
    windows = vision.layers - vision.full_layers
    seen = f", {windows} of them in windows of {vision.window} x {vision.window} patches" if windows else ""
    merged = f"; {vision.merge} x {vision.merge} patches are one visual token" if vision.merge > 1 else ""
    mlp, experts = f"MLP of {text.ffn} ({text.ffn / text.hidden:.2f} times the width)", text.experts
    if experts is not None:
        mlp = f"{experts.router} experts in {len(experts.layers)} layers, of whose neurons a token uses {experts.width}"
    size = sum(parameter.numel() for parameter in c.hollow().parameters())
    cache = kv_bytes(text, [1] * text.layers, 2) / 1e3
    return "\n".join(
        (
            f"- {size / 1e9:.2f} billion parameters, {2 * size / 1e9:.1f} GB in half precision",
            f"- decoder: {text.layers} layers of width {text.hidden}, {heads}, {mlp}; "
            f"{cache:.1f} kB of cache a token in half precision",
            f"- encoder: {vision.layers} layers of width {vision.hidden}, {vision.heads} heads, MLP of {vision.ffn}"
            f"{seen}{merged}",
        )
    )


def _tokens(c: Checkpoint) -> str:
    rows = []
    for shown in media(c):
        pictures = layouts(c, shown)
        n = sum(picture.n for picture in pictures)
        extra = sum(picture.n_rows - picture.n for picture in pictures)
        kept = [f"{cost.kept:,}" for cost in costs(c, shown, SHARES[1:])]
        rows.append([_named(c, shown), _made_of(pictures), f"{n:,}", extra or "-", *kept])
    shares = [f"at {share:.0%}".replace("%", " %") for share in SHARES[1:]]
    head = ["", "grids of tokens, rows x columns", "visual tokens", "separators", *shares]
    return (
        table(head, rows)
        + "\n\nSeparators (newline tokens of the family) always stay and are not counted. The counts are those of "
        + "the adapter, which the tests compare with the processor's."
    )


def _named(c: Checkpoint, shown: Media) -> str:
    frames = min(shown.frames, c.max_frames)
    return f"{shown.name}, {f'{frames} frames of ' if frames else ''}{shown.width} x {shown.height}"


def _made_of(pictures: list[Layout]) -> str:
    """What the first of equal pictures is made of."""
    planes, parts = pictures[0].planes, []
    for plane in dict.fromkeys(planes):
        times = planes.count(plane)
        parts.append(f"{f'{times} of ' if times > 1 else ''}{_plane(plane)}")
    whole = " + ".join(parts)
    return f"{len(pictures)} of ({whole})" if len(pictures) > 1 else whole


def _plane(plane: Plane) -> str:
    grid = f"{plane.rows} x {plane.cols}"
    if plane.kind == "thumbnail":
        return f"thumbnail {grid}"
    if plane.kind == "crops":
        rows, cols = plane.crop_grid
        shrunk = ", resampled" if any(plane.resampled) else ""
        return f"{rows} x {cols} crops, {grid}{shrunk}"
    return grid


def _savings(c: Checkpoint) -> str:
    rows = []
    for shown in media(c):
        at = costs(c, shown, SHARES)
        times = [f"{cost.flops / 1e12:.2f} ({at[0].flops / cost.flops:.1f}x)" for cost in at[1:]]
        cells = [f"{at[0].flops / 1e12:.2f}", *times, " / ".join(f"{cost.bytes / 1e6:.0f}" for cost in at)]
        rows.append([_named(c, shown), f"{encoder(c, shown) / 1e12:.2f}", *cells])
    shares = [f"prefill at {share:.0%}".replace("%", " %") for share in SHARES]
    return table(["", "encoder", *shares, "cache at " + " / ".join(f"{100 * s:.0f}" for s in SHARES) + " %"], rows)


# ---- commands --------------------------------------------------------------------------------------------------------
def runs(c: Checkpoint) -> dict[str, str]:
    """Label -> arguments of vtok's model: the dense run, and those at 25 %."""
    at = {f"{name}-25": f"compressor={name},keep={AT}" for name in (_default(c), *c.methods)}
    return {"dense": "compressor=none"} | at


def command(c: Checkpoint, label: str, arguments: str, tasks: tuple[str, ...], more: str = "") -> str:
    """One run of lmms-eval."""
    clips = f"max_frames={c.max_frames}," if set(tasks) & {TASKS[name] for name in VIDEO} else ""
    return (
        f"lmms-eval --model vtok --model_args pretrained={c.hub},dtype=bfloat16,{clips}{arguments} \\\n"
        f"  --tasks {','.join(tasks)} --batch_size 1{more} \\\n"
        f"  --log_samples --output_path results/{c.name}/{label}"
    )


def _accuracy(c: Checkpoint) -> str:
    kinds = [("Pictures", c.images, "")] + ([("Clips", c.videos, "-video")] if c.videos else [])
    parts = []
    for title, tasks, suffix in kinds:
        names = ", ".join(name for name in c.benchmarks if TASKS[name] in tasks)
        lines = "\n".join(command(c, label + suffix, arguments, tasks) for label, arguments in runs(c).items())
        parts.append(f"{title} ({names}):\n\n```bash\n{lines}\n```\n")
    if c.repeats:
        rows = [[row, f"`{arguments}`"] for row, arguments in c.repeats.items()]
        parts.append(
            "To repeat a published row (below), put these in place of `compressor=none`:\n\n"
            + table(["row", "arguments"], rows).replace("---:", "---")
            + "\n"
        )
    remarks = "".join(f"- `{task}`: {REMARKS[task]}\n" for task in (*c.images, *c.videos) if task in REMARKS)
    parts.append(f"{remarks}\n{UNMEASURED}\n")
    return "\n".join(parts)


def _speed(c: Checkpoint) -> str:
    lines = [
        command(c, f"{label}-speed", arguments, ("textvqa_val",), " --limit 200")
        for label, arguments in runs(c).items()
    ]
    if c.workload:
        methods = ",".join((_default(c), *c.methods))
        lines.append(
            f"# the decoder alone: random weights of its proportions, against the FLOP ratio\n"
            f"vtok bench --workload {c.workload} --methods {methods} --device cuda --dtype bfloat16 "
            f"--out results/{c.name}/bench.json"
        )
    return "\n".join(lines)


def _published(c: Checkpoint) -> str:
    if not c.tables:
        return "None of the papers whose methods vtok has gives numbers for this checkpoint that could be confirmed.\n"
    return "\n".join(map(_table, c.tables))


def _table(t: Table) -> str:
    source = f"[{t.paper}](https://arxiv.org/abs/{t.arxiv}), {t.where}"
    return f"{source} ({t.read}). {t.setting[0].upper()}{t.setting[1:]}.\n\n{table(list(t.columns), list(t.rows))}\n"

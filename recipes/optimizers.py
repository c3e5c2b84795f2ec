"""The page of optimisers: every name of `vtok.optim` beside AdamW, by steps, by time, by state and by memory.

    python -m recipes.optimizers run --out docs/training/optimizers.json [--minutes 11]     # again to go on
    python -m recipes.optimizers table --out docs/training/optimizers.json

Two trainings of all weights. `pictures`: a fresh decoder learns to answer questions of the task `scenes` behind the
tower of a bundled model, as in the recipe that made it. `text`: SmolLM2-135M reads the language reference of Python.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from transformers import set_seed

import vtok
from recipes.alignment import quiet
from recipes.pairs import NAME, SEED, SEEN
from vtok import models, zoo
from vtok.eval.bench import machine
from vtok.eval.bench.resume import begun
from vtok.eval.bench.texts import passages
from vtok.eval.tasks import task as offline
from vtok.files import write_json
from vtok.markdown import table
from vtok.prompts import ask, encode
from vtok.rl.towers import encode_once
from vtok.text.align.stats import IGNORE
from vtok.text.optim.zeroth import ZerothOrder

# The middle of each grid for a training from scratch, and what it is multiplied with.
LRS = {
    "adamw": 1e-3,
    "apollo": 1e-2,
    "apollo_mini": 1e-2,
    "cosmos": 2e-3,
    "frugal": 1e-3,
    "lion": 3e-4,
    "lion_k": 3e-3,
    "muon": 3e-3,
    "spam": 1e-3,
    "stable_spam": 1e-3,
    "mezo": 1e-4,
    "forward_gradient": 1e-4,
}

FACTORS = {"pictures": (1.0, 1 / 3, 3.0), "text": (0.1, 0.02)}

app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Asked:
    """pictures, text: steps. batch: questions, or passages. tokens: of a passage."""

    pictures: int = 60
    batch: int = 8
    text: int = 6
    passages: int = 2
    tokens: int = 64


@dataclass(frozen=True)
class Setting:
    """load: the model anew. batches: inputs of each step, labels among them. held: of what is not trained on."""

    load: Callable[[], nn.Module]
    batches: list[dict[str, Tensor]]
    held: list[dict[str, Tensor]]
    width: int  # of the model, of which ranks are a quarter


def pictures(asked: Asked) -> Setting:
    _, processor = zoo.load(NAME)
    train = scenes(processor, "train", asked.pictures, asked.batch)
    return Setting(fresh, list(train), list(scenes(processor, "val", 4, 16)), 192)


def fresh() -> nn.Module:
    """The bundled model, its decoder as it was before it learnt anything."""
    model, _ = zoo.load(NAME)
    set_seed(0)
    decoder = type(model)(model.config).model.language_model
    model.model.language_model.load_state_dict(decoder.state_dict())
    encode_once(model.model.visual.requires_grad_(False), known=SEEN)
    return model


def scenes(processor: Any, split: str, batches: int, size: int) -> Iterator[dict[str, Tensor]]:
    """A question a picture, of all categories in turn; the answers are supervised."""
    task, end = offline.get("scenes"), processor.tokenizer.eos_token_id
    for number in range(batches):
        items = [task.item(split, SEED, number * size + i) for i in range(size)]
        asked = [(item, item.questions[item.index % len(item.questions)]) for item in items]
        prompt = encode(processor, [ask(q.text, *item.images) for item, q in asked])  # padded on the left
        said = [processor.tokenizer(q.answer, add_special_tokens=False)["input_ids"] + [end] for _, q in asked]
        tail = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in said], True, IGNORE)
        real = tail != IGNORE
        batch = {**prompt, "input_ids": torch.cat([prompt["input_ids"], tail.where(real, end)], 1)}
        batch["attention_mask"] = torch.cat([prompt["attention_mask"], real.long()], 1)
        batch["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], 0 * tail], 1)
        yield batch | {"labels": torch.cat([torch.full_like(prompt["input_ids"], IGNORE), tail], 1)}


def text(asked: Asked) -> Setting:
    tokenizer = models.load(models.SMOLLM2, "cpu")[1]
    count = asked.text * asked.passages
    ids = torch.tensor(passages(tokenizer, "prose", asked.tokens, count + 4))
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    of = lambda rows: [{"input_ids": part, "labels": part} for part in rows.split(asked.passages)]
    load = lambda: models.load(models.SMOLLM2, "cpu")[0]
    return Setting(load, of(ids[:count]), of(ids[count:]), 576)


SETTINGS = {"pictures": pictures, "text": text}


# ---- a run -----------------------------------------------------------------------------------------------------------
def made(name: str, model: nn.Module, lr: float, width: int) -> list[torch.optim.Optimizer]:
    """One optimiser, or two: torch's Muon takes matrices alone."""
    options: dict[str, Any] = {"apollo": {"rank": width // 4}, "lion_k": {"kernel": "nuclear"}}.get(name, {})
    if name != "muon":
        return [vtok.optim.create(name, model, lr=lr, **options)]
    first, *rest = vtok.optim.groups(model, plain=False)
    return [
        vtok.optim.create("muon", [first], lr=lr),
        vtok.optim.create("adamw", rest, lr=LRS["adamw"] * lr / LRS[name]),
    ]


def trained(setting: Setting, name: str, lr: float) -> dict[str, Any]:
    """losses: of each step's batch, before the step. seconds: CPU time until after it; `stepping` is the optimiser's
    share of all. before, after: the loss on what is not trained on. state, peak: bytes."""
    model = setting.load().train()
    before, memory = held(model, setting), machine.PeakMemory("cpu")
    optimizers = made(name, model, lr, setting.width)
    losses, seconds, stepping, began = [], [], 0.0, time.process_time()
    for batch in setting.batches:
        loss = lambda batch=batch: model(**batch, use_cache=False).loss
        if isinstance(optimizers[0], ZerothOrder):
            value = optimizers[0].step(loss)
        else:
            value = loss()
            value.backward()
            since = time.process_time()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            stepping += time.process_time() - since
        losses.append(round(float(value.detach()), 4))
        seconds.append(round(time.process_time() - began, 2))
    state = sum(map(vtok.optim.state_bytes, optimizers))
    found = {
        "losses": losses,
        "seconds": seconds,
        "stepping": round(stepping, 2),
        "state": state,
        "peak": memory.rise(),
    }
    return (
        found
        | {"weights": sum(p.numel() for p in model.parameters() if p.requires_grad), "before": before}
        | {"after": held(model, setting)}
    )


@torch.no_grad()
def held(model: nn.Module, setting: Setting) -> float:
    model.eval()
    found = [float(model(**batch, use_cache=False).loss) for batch in setting.held]
    model.train()
    return round(float(np.mean(found)), 4)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file to write, and to go on from.")],
    minutes: Annotated[float, typer.Option(help="No training begins later than this.")] = 1e9,
    settings: Annotated[str, typer.Option(metavar="NAME,...")] = "pictures,text",
    names: Annotated[str, typer.Option(metavar="NAME,...", help="Optimisers; left out: all.")] = "",
) -> None:
    """Train and measure what `out` has not yet: each optimiser at each learning rate of its grid."""
    quiet()
    asked, started = Asked(), time.monotonic()
    result = begun(out, asked, machine.describe("cpu", "float32"))
    setting = cache(lambda kind: SETTINGS[kind](asked))
    for kind, factor, name in cells(settings.split(",")):
        lr = float(f"{LRS[name] * factor:.1e}")
        cell = f"{kind} {name} {lr:g}"
        if cell in result["rounds"] or (names and name not in names.split(",")):
            continue
        if time.monotonic() - started > 60 * minutes:
            return
        row = result["rounds"][cell] = trained(setting(kind), name, lr)
        write_json(out, result)
        print(cell, row["before"], row["after"], row["seconds"][-1], row["stepping"], row["state"], flush=True)


def cells(kinds: list[str]) -> Iterator[tuple[str, float, str]]:
    """(setting, factor of the learning rate, optimiser), all optimisers before another factor."""
    for kind in kinds:
        yield from ((kind, factor, name) for factor in FACTORS[kind] for name in LRS)


# ---- the table -------------------------------------------------------------------------------------------------------
HEAD = ["optimiser", "learning rate", "loss held out", "state, MB", "of AdamW's", "peak, MB", "s a step", "its own"]


def best(result: dict[str, Any], kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Optimiser -> learning rate and run of the least loss on what is not trained on."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for cell, row in result["rounds"].items():
        of, name, lr = cell.split()
        if of == kind and np.isfinite(row["after"]) and (name not in found or row["after"] < found[name][1]["after"]):
            found[name] = lr, row
    return found


def of_kind(result: dict[str, Any], kind: str) -> str:
    rows, lines = best(result, kind), []
    for name, (lr, row) in sorted(rows.items(), key=lambda one: one[1][1]["after"]):
        steps, peak = len(row["losses"]), "" if row["peak"] is None else f"{row['peak'] / 1e6:.0f}"
        line = [f"`{name}`", lr, f"{row['after']:.3f}", f"{row['state'] / 1e6:.1f}"]
        line += [f"{row['state'] / rows['adamw'][1]['state']:.2f}", peak]
        lines.append([*line, f"{row['seconds'][-1] / steps:.2f}", f"{row['stepping'] / steps:.2f}"])
    return table(HEAD, lines)


@app.command(name="table")
def print_table(out: Annotated[Path, typer.Option(help="JSON file of `run`; the drawing is beside it.")]) -> None:
    """The tables of the page, in Markdown; and the drawing of the losses of `pictures` against steps and time."""
    result = json.loads(out.read_text())
    for kind in SETTINGS:
        if "adamw" in (found := best(result, kind)):
            print(f"{kind}, {found['adamw'][1]['before']:.3f} before:\n\n{of_kind(result, kind)}\n")
    draw(best(result, "pictures"), out.with_suffix(".png"))


def draw(runs: dict[str, tuple[str, dict[str, Any]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (name, (lr, found)) in enumerate(runs.items()):
        smooth = np.convolve(found["losses"], np.ones(3) / 3, "valid")
        how = {"color": f"C{number % 10}", "ls": "-" if number < 10 else "--", "label": f"{name}, {lr}"}
        left.plot(np.arange(len(smooth)) + 2, smooth, **how)
        right.plot(found["seconds"][2:], smooth, **how)
    left.set(xlabel="step", ylabel="loss, mean of three steps")
    right.set(xlabel="CPU seconds")
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    app()

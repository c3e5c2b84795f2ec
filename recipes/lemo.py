"""LeMo on SmolLM2-135M's real weights, LoRA on its decoder: what it saves of memory and time, and what it costs.

    python -m recipes.lemo run --out docs/training/lemo.json      # again to go on
    python -m recipes.lemo table --out docs/training/lemo.json

`bytes`: of the tensors that a forward keeps for its backward pass, each storage once, without weights. `seconds`: CPU
of forward and backward. `after`: the loss on texts that are not trained on, in eval mode, so dense.
"""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from vtok import models
from vtok.eval.bench import machine
from vtok.eval.bench.resume import begun
from vtok.eval.bench.texts import passages
from vtok.files import write_json
from vtok.markdown import table
from vtok.text import lemo

app = typer.Typer(help=__doc__)

WAYS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "attention, half": {"keep": 0.5},
    "attention, a quarter": {"keep": 0.25},
    "layer, half": {"keep": 0.5, "skip": "layer"},
    "layer, a quarter": {"keep": 0.25, "skip": "layer"},
    "checkpointing": None,
}


@dataclass(frozen=True)
class Asked:
    """lengths: of the prompts that are measured, in tokens. repeats: of a step, of which the median counts. steps,
    tokens, held: of a training: its steps of one text each, their tokens, and the texts that are not trained on."""

    lengths: tuple[int, ...] = (1024, 2048)
    repeats: int = 2
    steps: int = 16
    tokens: int = 512
    held: int = 8
    lr: float = 1e-3


def loaded() -> tuple[nn.Module, Any]:
    from peft import LoraConfig, get_peft_model

    model, tokenizer = models.load(models.SMOLLM2, "cpu")
    torch.manual_seed(0)
    adapter = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, adapter).train(), tokenizer


def sparse(model: nn.Module, way: str) -> AbstractContextManager:
    options = WAYS[way]
    return nullcontext() if options is None else lemo.sparsify(model, **options)


def measured(length: int, asked: Asked) -> dict[str, dict[str, Any]]:
    """way -> bytes and seconds of a step, the ways in turns."""
    model, tokenizer = loaded()
    ids = torch.tensor(passages(tokenizer, "prose", length, 1))
    found: dict[str, dict[str, Any]] = {way: {"seconds": []} for way in WAYS}
    forward = lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
    for _ in range(asked.repeats):
        for way in WAYS:
            if way == "checkpointing":
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with sparse(model, way):
                began = time.process_time()
                found[way]["bytes"], loss = machine.kept_for_backward(model, forward)
                loss.backward()
                found[way]["seconds"].append(round(time.process_time() - began, 2))
            model.zero_grad()
            model.gradient_checkpointing_disable()
    return found


def trained(way: str, asked: Asked) -> dict[str, Any]:
    """The loss on held-out texts before and after a training."""
    model, tokenizer = loaded()
    texts = torch.tensor(passages(tokenizer, "prose", asked.tokens, asked.steps + asked.held))
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))
    held, train = texts[order[: asked.held]], texts[order[asked.held :]]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), asked.lr)
    before = judged(model, held)
    with sparse(model, way):
        for text in train:
            model(input_ids=text[None], labels=text[None], use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return {"before": before, "after": judged(model, held)}


@torch.no_grad()
def judged(model: nn.Module, texts: torch.Tensor) -> list[float]:
    model.eval()
    found = [round(float(model(input_ids=text[None], labels=text[None]).loss), 4) for text in texts]
    model.train()
    return found


@app.command()
def run(out: Annotated[Path, typer.Option(help="JSON file to write, and to go on from.")]) -> None:
    """Measure what `out` has not yet."""
    asked = Asked()
    result = begun(out, asked, machine.describe("cpu", "float32"))
    rounds = result["rounds"]
    for length in asked.lengths:
        if f"{length} tokens" not in rounds:
            rounds[f"{length} tokens"] = measured(length, asked)
            write_json(out, result)
    for way in WAYS:
        if way != "checkpointing" and f"trained, {way}" not in rounds:  # which trains as the dense one
            rounds[f"trained, {way}"] = trained(way, asked)
            write_json(out, result)


@app.command(name="table")
def print_table(out: Annotated[Path, typer.Option(help="JSON file of `run`.")]) -> None:
    """The table of the page, in Markdown."""
    result = json.loads(out.read_text())
    rounds, lengths = result["rounds"], result["asked"]["lengths"]
    head = ["passed by, kept", *(f"{n} tokens, {what}" for n in lengths for what in ("MB", "s")), "loss held out"]
    rows = []
    for way in WAYS:
        cells = [rounds[f"{n} tokens"][way] for n in lengths]
        row = [way, *(x for cell in cells for x in (f"{cell['bytes'] / 1e6:.0f}", f"{median(cell['seconds']):.1f}"))]
        found = rounds[f"trained, {'dense' if way == 'checkpointing' else way}"]
        rows.append([*row, f"{np.mean(found['after']):.3f}"])
    before = np.mean(rounds["trained, dense"]["before"])
    print(f"{before:.3f} before the training:\n\n{table(head, rows)}")


if __name__ == "__main__":
    app()

"""`vtok bench decoding`: each decoder against plain greedy search, on SmolLM2's real weights.

Each decoder answers each prompt abreast with plain search, a token each in turn. A round is what a killed run begins
anew: some prompts of a kind, the first of which are not measured, so that decoders that are kept from request to
request have seen others by then. The clock that counts is the process's CPU time, by which decoders adapt too: with one
thread it is what an idle machine's wall clock would tell, also where others use this one. Time is that of `generate`,
prefill and all.
"""

from __future__ import annotations

import copy
import statistics
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import StoppingCriteria

from vtok import models
from vtok.compressors.snapkv import SnapKV
from vtok.eval.bench import machine
from vtok.eval.bench.resume import begun
from vtok.eval.bench.texts import FIRST, KINDS, prompts, repeated
from vtok.eval.bench.turns import Turns
from vtok.files import write_json
from vtok.markdown import table
from vtok.text.decoding.dyspec import DySpec
from vtok.text.decoding.ngram import NGram
from vtok.text.decoding.self_speculation import SelfSpeculation
from vtok.text.decoding.spectr import SpecTr
from vtok.text.decoding.token_recycling import TokenRecycling

PLAIN = "plain"
FASTER = {"repetitive": 1.5, "ordinary": 1.15}  # than plain: `JUDGED`
JUDGED = "TokenRecycling, kept"
SLOWEST = 1 / 1.05  # of plain's speed: decoders that adapt
LOOKED_UP = 10  # tokens that transformers' prompt lookup drafts
ASSISTED = 2  # tokens that its assistant drafts, not 20, its default: a check of three rows is the cheapest on a CPU


@dataclass(frozen=True)
class Asked:
    """prompts: measured ones of each kind. layers: of the draft model, the first ones of the model itself."""

    tokens: int = 48
    rounds: int = 1
    prompts: int = 2
    layers: int = 4


@dataclass(frozen=True)
class Entrant:
    """make: what `generate` is given, beside inputs. kept: whether one object serves all of a round, and has answered
    the first prompts when measuring begins; else each prompt has a new one."""

    make: Callable[[], dict[str, Any]]
    kept: bool = False


def run(asked: Asked, out: Path | None, threads: int | None = 1) -> bool:
    """Measure, print, write JSON to `out` after each round; whether all bars are met. Rounds that `out` has are not run
    again. Raises `InvalidValue` where it is of another run."""
    if threads:
        torch.set_num_threads(threads)
    console, run_ = Console(), begun(out, asked, machine.describe("cpu", "float32"))
    model, tokenizer = models.load(models.SMOLLM2, "cpu")
    for number in range(asked.rounds):
        for kind in KINDS:
            name = f"{kind} {number + 1}"
            if name in run_["rounds"]:
                continue
            with console.status(name):
                asking = prompts(kind, tokenizer)[: FIRST + asked.prompts]
                run_["rounds"][name] = _round(model, asking, entrants(model, asked.layers), asked.tokens, number % 2)
            if out is not None:
                write_json(out, run_)
    head, *lines = cells(run_)
    console.print(table(head, lines), soft_wrap=True, highlight=False, markup=False)
    verdicts = bars(run_)
    for met, sentence in verdicts:
        console.print(f"{'ok  ' if met else 'MISS'} {sentence}", soft_wrap=True)
    return all(met for met, _ in verdicts)


def entrants(model: nn.Module, layers: int) -> dict[str, Entrant]:
    """Name -> decoder, all at their defaults. No embeddings are trained for SmolLM2, so PPD is not among them."""
    small = first_layers(model, layers)
    custom = lambda decoder, **options: {"custom_generate": decoder(**options)}
    return {
        PLAIN: Entrant(dict),
        "prompt lookup of transformers": Entrant(lambda: {"prompt_lookup_num_tokens": LOOKED_UP}),
        f"assistant of transformers, {layers} layers": Entrant(lambda: {"assistant_model": small}),
        "TokenRecycling, new": Entrant(partial(custom, TokenRecycling)),
        JUDGED: Entrant(partial(custom, TokenRecycling), kept=True),
        "NGram, kept": Entrant(partial(custom, NGram), kept=True),
        "SelfSpeculation, SnapKV": Entrant(partial(custom, SelfSpeculation, draft=[SnapKV(keep=0.25)])),
        f"DySpec, {layers} layers": Entrant(partial(custom, DySpec, draft=small)),
        f"SpecTr, {layers} layers": Entrant(partial(custom, SpecTr, draft=small)),
    }


def first_layers(model: nn.Module, layers: int) -> nn.Module:
    """The first decoder layers of a language model and its head, as a model that shares their weights."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        small = type(model)(config)
    small.model.embed_tokens, small.model.norm = model.model.embed_tokens, model.model.norm
    small.model.rotary_emb, small.lm_head = model.model.rotary_emb, model.lm_head
    small.model.layers = model.model.layers[:layers]
    small.generation_config = copy.deepcopy(model.generation_config)
    small.generation_config.num_assistant_tokens = ASSISTED
    return small.eval()


# ---- measuring -------------------------------------------------------------------------------------------------------
def _round(
    model: nn.Module, asking: Sequence[dict[str, Tensor]], found: dict[str, Entrant], tokens: int, backwards: bool
) -> list[dict[str, Any]]:
    """Of each measured prompt what it is, and of each decoder how it did."""
    kept = {name: entrant.make() for name, entrant in found.items() if entrant.kept}
    told = []
    for i, inputs in enumerate(asking):
        if i < FIRST:
            for how in kept.values():
                abreast(model, inputs, how, tokens)
            continue
        order = list(found) if (i % 2 == 0) ^ backwards else list(found)[::-1]
        done = {name: abreast(model, inputs, kept.get(name) or found[name].make(), tokens) for name in order}
        prompt, (plain, _) = inputs["input_ids"][0].tolist(), done[PLAIN]
        rows = {name: row for name, (_, row) in done.items()}
        told.append({"prompt": len(prompt), "repeated": repeated(prompt, plain), "decoders": rows})
    return told


def abreast(
    model: nn.Module, inputs: dict[str, Tensor], how: dict[str, Any], tokens: int
) -> tuple[list[int], dict[str, Any]]:
    """The ids of plain search's answer; and what the other one is, and took, beside the time of plain search."""
    turns = Turns()
    if decoder := how.get("custom_generate"):
        decoder._running.payoff.clock = turns.clock
    answer = partial(_answer, model, inputs, tokens, turns)
    ((ids, row), cpu), ((plain, _), plain_cpu) = turns.run(partial(answer, how), partial(answer, {}))
    return plain, row | {"cpu": cpu, "plain": plain_cpu, "same": ids == plain}


class _Give(StoppingCriteria):
    """Stops nothing; after each token the other's turn comes."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.turns.give()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)


def _answer(
    model: nn.Module, inputs: dict[str, Tensor], tokens: int, turns: Turns, how: dict[str, Any]
) -> tuple[list[int], dict[str, Any]]:
    """The answer's ids, and what it is made of."""
    rows: list[int] = []  # of each forward of this thread how many tokens it was given
    me = threading.get_ident()

    def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == me:
            rows.append((kwargs.get("input_ids") if not args else args[0]).shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        output = model.generate(
            **inputs, max_new_tokens=tokens, do_sample=False, stopping_criteria=[_Give(turns)], **how
        )
    finally:
        hook.remove()
    ids = output[0, inputs["input_ids"].shape[1] :].tolist()
    decoder = how.get("custom_generate")
    if decoder is None:  # a check of n rows has n - 1 drafts; the first may read the prompt, too
        steps, drafted = len(rows), rows[0] - inputs["input_ids"].shape[1] + sum(n - 1 for n in rows[1:])
        accepted = len(ids) - steps if drafted else 0
    else:
        steps, drafted, accepted = decoder.stats.steps, decoder.stats.drafted, decoder.stats.accepted
    return ids, {"tokens": len(ids), "steps": steps, "drafted": drafted, "accepted": accepted}


# ---- what is read of it ----------------------------------------------------------------------------------------------
def rows_of(run_: dict[str, Any], kind: str) -> dict[str, dict[str, float]]:
    """Decoder -> its numbers on one kind of text. speed: plain's time beside it over its own, the median of all prompts
    and rounds. accepted: share of the drafts, NaN where there were none. same: share of texts equal to plain's."""
    asked = [p for name, told in run_["rounds"].items() if name.split()[0] == kind for p in told]
    found: dict[str, dict[str, float]] = {}
    for name in asked[0]["decoders"] if asked else ():
        rows = [p["decoders"][name] for p in asked]
        total = {key: sum(row[key] for row in rows) for key in ("tokens", "steps", "drafted", "accepted", "same")}
        found[name] = {
            "tokens_a_step": (total["tokens"] - len(rows)) / (total["steps"] - len(rows)),
            "accepted": total["accepted"] / total["drafted"] if total["drafted"] else float("nan"),
            "same": total["same"] / len(rows),
            "speed": statistics.median(row["plain"] / row["cpu"] for row in rows),
        }
    return found


def bars(run_: dict[str, Any]) -> list[tuple[bool, str]]:
    """(met, sentence) of each bar."""
    found = []
    for kind in KINDS:
        rows = rows_of(run_, kind)
        ours = {name: row for name, row in rows.items() if name != PLAIN and "transformers" not in name}
        for name, row in ours.items():
            if row["same"] < 1:
                found.append(
                    (False, f"{name}, {kind}: {row['same']:.0%} of the texts are those of plain greedy search")
                )
        if JUDGED in rows and kind in FASTER:
            speed, bar = rows[JUDGED]["speed"], FASTER[kind]
            found.append((speed >= bar, f"{JUDGED}, {kind}: {speed:.2f} times plain's speed (bar {bar:g})"))
        if ours:
            name = min(ours, key=lambda name: ours[name]["speed"])
            speed = ours[name]["speed"]
            found.append((speed >= SLOWEST, f"slowest, {kind}: {name}, {speed:.2f} times plain's speed (bar 0.95)"))
    return found


def cells(run_: dict[str, Any]) -> list[list[str]]:
    """Head and rows of the table: of each kind the speed, in plain's, tokens a step, and accepted drafts in percent."""
    found = {kind: rows for kind in KINDS if (rows := rows_of(run_, kind))}
    lines = [["decoder", *(f"{kind}: {what}" for kind in found for what in ("speed", "a step", "%"))]]
    for name in next(iter(found.values()), ()):
        line = [name]
        for row in (rows[name] for rows in found.values()):
            accepted = "" if row["accepted"] != row["accepted"] else f"{100 * row['accepted']:.0f}"
            line += [f"{row['speed']:.2f}", f"{row['tokens_a_step']:.2f}", accepted]
        lines.append(line)
    return lines

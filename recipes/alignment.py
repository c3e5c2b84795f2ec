"""The page of losses: preference losses against DPO at equal steps, on a bundled model that sees and on SmolLM2.

    python -m recipes.alignment run --out docs/training/alignment.json [--minutes 11]     # again to go on
    python -m recipes.alignment run --setting records --out docs/training/records.json --keeps 1 --lrs 0.0003,0.0001
    python -m recipes.alignment table --out docs/training/alignment.json

The models and their pairs are in `recipes.pairs`. Trained are LoRA adapters of the decoder. Measured are held-out
questions like those that were trained, what else the model could (other questions, or the loss of English prose), and
on held-out pairs the order, the margin and the KL to the model before.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed
from transformers.utils import logging
from trl import SFTConfig

from recipes.pairs import LORA, QUIET, SEED, SETTINGS, prose, task
from vtok.errors import UnknownName
from vtok.eval.bench import machine
from vtok.eval.bench.resume import begun
from vtok.eval.results.statistics import Number, redrawn
from vtok.eval.tasks import task as offline
from vtok.files import write_json
from vtok.markdown import table
from vtok.media import Clip
from vtok.prompts import ask
from vtok.rl import AnswerTrainer, PreferenceConfig, PreferenceTrainer
from vtok.rl.objectives import DPO, LOGO, RRPO, TDPO, TREG, SparsePO, WeightedDPO
from vtok.rl.pairs import own_answers
from vtok.rl.preferences import PairCollator, for_models
from vtok.rl.scores import contrast, critical
from vtok.rl.supervised import IFT, AlignDistil
from vtok.text.align.stats import token_stats

app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Asked:
    """beta: of all losses but LOGO and SimPO. held_out: items a task. pairs: held-out ones."""

    setting: str = "pictures"
    steps: int = 40
    batch: int = 4
    beta: float = 0.1
    held_out: int = 60
    pairs: int = 48


ASKED = {"pictures": Asked(), "records": Asked("records", steps=16, batch=2, held_out=48, pairs=16)}


# ---- one keep: the model, its pairs, and what losses need beside them ------------------------------------------------
@cache
def prepared(keep: float, asked: Asked, work: Path) -> tuple[Any, Dataset, Dataset]:
    """The processor, and the pairs to train on and to hold out, which the model makes once."""
    setting, found = SETTINGS[asked.setting], []
    model, processor = setting.load(keep, work)
    for split, count in {"train": asked.steps * asked.batch, "val": asked.pairs}.items():
        folder = work / f"{split}-{count}-{keep:g}"
        if not folder.exists():
            setting.pairs(model, processor, split, count).save_to_disk(folder)
        found.append(Dataset.load_from_disk(folder))
    return processor, *found


class Place:
    """A keep's and a learning rate's model and pairs, and what teachers made of them, which is done once and kept in
    the folder `work`."""

    def __init__(self, keep: float, lr: float, asked: Asked, work: Path) -> None:
        self.keep, self.lr, self.asked, self.work = keep, lr, asked, work / asked.setting
        self.setting = SETTINGS[asked.setting]
        self.processor, self.train, self.val = prepared(keep, asked, self.work)
        self.collator = PairCollator(self.processor, phrases="all")

    def loaded(self) -> nn.Module:
        return self.setting.load(self.keep, self.work)[0]

    @property
    def adapter(self) -> LoraConfig:
        return LoraConfig(target_modules=self.setting.lora, **LORA)

    def policy(self, seed: int) -> nn.Module:
        set_seed(seed)
        return get_peft_model(self.loaded(), self.adapter).eval()

    def by_pairs(self, seed: int, objective: Any, data: Dataset | None = None, **given: Any) -> nn.Module:
        """A policy trained on pairs. given: options of `PreferenceConfig`."""
        set_seed(seed)
        args = PreferenceConfig(tempfile.mkdtemp(), **self._how(seed) | {"beta": self.asked.beta} | given)
        trainer = PreferenceTrainer(
            self.loaded(),
            args=args,
            train_dataset=self.train if data is None else data,
            processing_class=self.processor,
            objective=objective,
            peft_config=self.adapter,
        )
        trainer.train()
        return trainer.model.eval()

    def by_answers(self, seed: int, objective: Any, column: str = "chosen") -> nn.Module:
        """A policy trained on one answer of each pair."""
        seen = lambda r: {"images": [r["image"]]} if "image" in r else {}
        rows = [{"prompt": r["prompt"], "completion": r[column], **seen(r)} for r in self.train]
        trainer = AnswerTrainer(
            self.policy(seed),
            args=SFTConfig(tempfile.mkdtemp(), max_length=None, **self._how(seed)),
            train_dataset=Dataset.from_list(rows),
            processing_class=self.processor,
            objective=objective,
        )
        trainer.train()
        return trainer.model.eval()

    def _how(self, seed: int) -> dict[str, Any]:
        how = {"max_steps": self.asked.steps, "per_device_train_batch_size": self.asked.batch, "seed": seed}
        return QUIET | how | {"learning_rate": self.lr, "gradient_checkpointing": False}

    # ---- made once ---------------------------------------------------------------------------------------------------
    @cached_property
    def marked(self) -> Dataset:
        """The pairs as RRPO wants them."""
        return Dataset.from_list([self.setting.marked(row) for row in self.train])

    @cached_property
    def contrasted(self) -> Dataset:
        """The pairs with T-REG's scores."""
        return self._scored("contrast", lambda: contrast(self.loaded(), self.collator, self.train))

    @cached_property
    def criticised(self) -> Dataset:
        """The pairs with cDPO's weights, from models tuned on right and on wrong answers for as many steps."""
        tuned = lambda: (self.by_answers(SEED, SFT, column) for column in ("chosen", "rejected"))
        return self._scored("critical", lambda: critical(*tuned(), self.collator, self.train))

    @cached_property
    def teachers(self) -> list[nn.Module]:
        """By DPO, and by DPO of swapped pairs."""
        made = []
        for name, columns in {"dpo": {}, "swapped": {"chosen": "rejected", "rejected": "chosen"}}.items():
            folder = self.work / f"{name}-{self.keep:g}-{self.lr:g}"
            if not folder.exists():
                data = Dataset.from_list([r | {new: r[old] for new, old in columns.items()} for r in self.train])
                self.by_pairs(SEED, DPO(), data).save_pretrained(folder)
            made.append(PeftModel.from_pretrained(self.loaded(), folder))
        return made

    def _scored(self, name: str, make: Callable[[], Iterable[dict[str, list[float]]]]) -> Dataset:
        file = self.work / f"{name}-{self.keep:g}-{self.lr:g}.json"
        if not file.exists():
            write_json(file, list(make()))
        return Dataset.from_list([row | more for row, more in zip(self.train, json.loads(file.read_text()))])


SFT = IFT(share=0.0, gamma=0.0)
LOSSES: dict[str, Callable[[Place, int], nn.Module]] = {
    "DPO": lambda place, seed: place.by_pairs(seed, DPO()),
    "SFT": lambda place, seed: place.by_answers(seed, SFT),
    "TDPO 2": lambda place, seed: place.by_pairs(seed, TDPO()),
    "RRPO": lambda place, seed: place.by_pairs(seed, RRPO(alpha=0.05), place.marked, phrases=place.setting.phrases),
    "SimPO": lambda place, seed: place.by_pairs(seed, LOGO(gap=0.25, sft=0.0, rejected=1), beta=2.0),
    "LOGO": lambda place, seed: place.by_pairs(seed, LOGO(), beta=10.0),
    "IFT": lambda place, seed: place.by_answers(seed, IFT()),
    "SparsePO": lambda place, seed: place.by_pairs(seed, SparsePO()),
    "TDPO 1": lambda place, seed: place.by_pairs(seed, TDPO(version=1)),
    "T-REG": lambda place, seed: place.by_pairs(seed, TREG(), place.contrasted),
    "cDPO": lambda place, seed: place.by_pairs(seed, WeightedDPO(), place.criticised),
    "AlignDistil": lambda place, seed: place.by_answers(seed, AlignDistil(*place.teachers, {})),
}
BEFORE = "before"


# ---- what is measured ------------------------------------------------------------------------------------------------
def measured(place: Place, policy: nn.Module) -> dict[str, Any]:
    """hits: of each group of categories the right answers and the questions of each item, a digit an item. margin, kl:
    of each held-out pair in nats, by how much more than before the right answer is preferred, and the forward KL to the
    model before, over that answer. prose: of language models, the loss of each passage in nats a token."""
    found: dict[str, Any] = {"hits": {}, "margin": [], "kl": []}
    for group in place.setting.groups:
        each = [hits(policy, place, *one) for one in held_out(place.asked.setting, group, place.asked.held_out)]
        found["hits"][group] = ["".join(map(str, column)) for column in zip(*itertools.chain(*each))]
    for start in range(0, len(place.val), 8):
        given, _ = for_models(place.collator([place.val[i] for i in range(start, min(start + 8, len(place.val)))]))
        with torch.no_grad():
            logits = policy(**given).logits
            with policy.disable_adapter():
                stats = token_stats(logits, policy(**given).logits, given["labels"])
        chosen, rejected = stats.margin.sum(1).view(2, -1)
        found["margin"] += [round(x, 3) for x in (chosen - rejected).tolist()]
        found["kl"] += [round(x, 3) for x in stats.kl.sum(1).view(2, -1)[0].tolist()]
    if "other" not in place.setting.groups:
        with torch.no_grad():
            found["prose"] = [round(policy(ids, labels=ids).loss.item(), 4) for ids in prose(place.processor).split(1)]
    return found


def hits(policy: nn.Module, place: Place, task: offline.Task, items: Sequence[offline.Item]) -> list[list[int]]:
    """[right, asked] of each of these items; questions of several go through the model together."""
    asked = [(item, q) for item in items for q in item.questions]
    seen = lambda item: [Clip(item.images, item.fps)] if item.media == "video" else item.images
    told = [ask(q.text, *seen(item)) for item, q in asked]
    said = own_answers(policy, place.processor, told, tokens=place.setting.tokens, together=24)
    found: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for (item, q), text in zip(asked, said, strict=True):
        found[item.index][0] += task.score(q.answer, text)
        found[item.index][1] += 1
    return list(found.values())


@cache
def held_out(setting: str, group: str, items: int) -> list[tuple[offline.Task, list[offline.Item]]]:
    """The tasks of a group and of each the first held-out items, with questions of its categories alone."""
    made = []
    for name, categories in SETTINGS[setting].groups[group].items():
        whole = task(name)
        some = replace(whole, chances={c: whole.chances[c] for c in categories or whole.categories})
        made.append((some, list(some.held_out(items))))
    return made


Cell = tuple[float, str, float, int]


def cells(losses: Sequence[str], keeps: Sequence[float], lrs: Sequence[float], seeds: int) -> Iterator[Cell]:
    """(keep, loss, learning rate, seed): what was before, the first seed of each keep, then the other seeds."""
    yield from ((keep, BEFORE, 0.0, 0) for keep in keeps)
    passes = [(keep, 0) for keep in keeps] + [(keep, seed) for keep in keeps for seed in range(1, seeds)]
    yield from ((keep, loss, lr, seed) for keep, seed in passes for lr in lrs for loss in losses)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file to write, and to go on from.")],
    work: Annotated[Path, typer.Option(help="Folder for what is made once.")] = Path("out/alignment"),
    setting: Annotated[str, typer.Option(help=f"One of {', '.join(ASKED)}.")] = "pictures",
    keeps: Annotated[str, typer.Option(metavar="X,...", help="Of the visual tokens, by divprune.")] = "1,0.5",
    seeds: int = 3,
    minutes: Annotated[float, typer.Option(help="No training begins later than this.")] = 1e9,
    lrs: Annotated[str, typer.Option(metavar="X,...", help="Learning rates.")] = "0.003",
    losses: Annotated[str, typer.Option(metavar="NAME,...", help="Left out: all of the setting.")] = "",
) -> None:
    """Train and measure what `out` has not yet."""
    quiet()
    if setting not in ASKED:
        raise UnknownName(f"No setting is named {setting!r}. There are: {', '.join(ASKED)}.")
    asked, started = ASKED[setting], time.monotonic()
    result = begun(out, asked, machine.describe("cpu", "float32"))
    some = losses.split(",") if losses else SETTINGS[setting].losses or [*LOSSES]
    if unknown := [name for name in some if name not in LOSSES]:
        raise UnknownName(f"No loss is named {unknown[0]!r}. There are: {', '.join(LOSSES)}.")
    for keep, loss, lr, seed in cells(some, [*map(float, keeps.split(","))], [*map(float, lrs.split(","))], seeds):
        name = f"{keep:g} {loss} {lr:g} {seed}"
        if name in result["rounds"]:
            continue
        if time.monotonic() - started > 60 * minutes:
            return
        here, began = Place(keep, lr, asked, work), time.process_time()
        policy = here.policy(seed) if loss == BEFORE else LOSSES[loss](here, seed)
        trained = time.process_time() - began
        result["rounds"][name] = measured(here, policy) | {"cpu_seconds": round(trained, 1)}
        write_json(out, result)
        print(name, *told(result["rounds"][name]), round(trained), round(time.process_time() - began), flush=True)


def quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    disable_progress_bars()
    torch.set_num_threads(1)


def told(row: dict[str, Any]) -> list[str]:
    """A run in short."""
    return [f"{name} {np.divide(*np.sum(get(row), 1)):.3f}" for name, get in quantities(row).items()]


# ---- the table -------------------------------------------------------------------------------------------------------
HEAD = ["loss", "lr", "trained, %", "of seeds", "less DPO", "other", "less before", "in order, %", "margin", "KL"]
OTHERS = {"other": "other, %", "prose": "prose, nats"}
Row = tuple[str, str]  # of the table: a loss, and its learning rate
QUANTITIES: dict[str, Callable[[dict[str, Any]], Any]] = {  # of a run: [2, items], a sum and what it is a share of
    "trained": lambda row: [[*map(int, digits)] for digits in row["hits"]["trained"]],
    "other": lambda row: [[*map(int, digits)] for digits in row["hits"]["other"]],
    "prose": lambda row: [row["prose"], np.ones(len(row["prose"]))],
    "order": lambda row: [np.array(row["margin"]) > 0, np.ones(len(row["margin"]))],
    "margin": lambda row: [row["margin"], np.ones(len(row["margin"]))],
    "kl": lambda row: [row["kl"], np.ones(len(row["kl"]))],
}


def quantities(row: dict[str, Any]) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Those that a run has: of what it was not trained on, other questions or prose."""
    return {name: get for name, get in QUANTITIES.items() if name != ("other" if "prose" in row else "prose")}


def numbers(runs: dict[str, list[dict[str, Any]]], get: Callable[[dict[str, Any]], Any]) -> dict[str, Number]:
    """Of each loss, over its seeds; items and pairs are redrawn whole, and alike for all losses."""
    values, counts = np.swapaxes([np.mean([get(row) for row in some], 0) for some in runs.values()], 0, 1)
    shares = values.sum(1) / counts.sum(1)
    return {loss: Number(float(at), draws) for loss, at, draws in zip(runs, shares, redrawn(values, counts))}


def shown(number: Number, digits: int = 1) -> str:
    low, high = number.span or (np.nan, np.nan)
    return f"{number.at:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def runs_of(result: dict[str, Any], keep: float) -> dict[Row, list[dict[str, Any]]]:
    """The runs of a keep by loss and learning rate, in the order of `LOSSES`."""
    found: dict[Row, list[dict[str, Any]]] = defaultdict(list)
    for name, run in result["rounds"].items():
        first, rest = name.split(" ", 1)
        loss, lr, _ = rest.rsplit(" ", 2)
        if float(first) == keep:
            found[loss, lr].append(run)
    order = [BEFORE, *LOSSES]
    return dict(sorted(found.items(), key=lambda one: (order.index(one[0][0]), -float(one[0][1]))))


def dpo_of(runs: dict[Row, list[dict[str, Any]]], beta: float) -> Row:
    """DPO at the learning rate at which its loss on the held-out pairs is lowest."""
    loss = lambda row: np.mean([np.logaddexp(0, -beta * np.array(run["margin"])) for run in runs[row]])
    return min((row for row in runs if row[0] == "DPO"), key=loss)


def of_keep(result: dict[str, Any], keep: float) -> str:
    """The table of a keep: means over the seeds that a row has, with 95 % intervals."""
    runs = runs_of(result, keep)
    before, dpo = (BEFORE, "0"), dpo_of(runs, result["asked"]["beta"])
    found = {name: numbers(runs, get) for name, get in quantities(runs[before][0]).items()}
    less = lambda a, b, unit=100, digits=1: shown(Number(unit * (a - b).at, unit * (a - b).draws), digits)
    other, unit, digits = ("other", 100, 1) if "other" in found else ("prose", 1, 3)
    lines = []
    for row, some in runs.items():
        of = {name: each[row] for name, each in found.items()}
        each = ", ".join(f"{100 * np.divide(*np.sum(QUANTITIES['trained'](run), 1)):.0f}" for run in some)
        line = [row[0], "" if row == before else row[1], f"{100 * of['trained'].at:.1f}", each]
        line += ["" if row == dpo else less(of["trained"], found["trained"][dpo])]
        line += [f"{unit * of[other].at:.{digits}f}"]
        if row != before:
            line += [less(of[other], found[other][before], unit, digits), f"{100 * of['order'].at:.0f}"]
            line += [shown(of["margin"], 2), shown(of["kl"], 2)]
        lines.append(line + [""] * (len(HEAD) - len(line)))
    return table([OTHERS[other] if name == "other" else name for name in HEAD], lines)


@app.command(name="table")
def print_table(out: Annotated[Path, typer.Option(help="JSON file of `run`.")]) -> None:
    """The tables of the page, in Markdown."""
    result = json.loads(out.read_text())
    for keep in sorted({float(name.split()[0]) for name in result["rounds"]}, reverse=True):
        print(f"keep={keep:g}:\n\n{of_keep(result, keep)}\n")


if __name__ == "__main__":
    app()

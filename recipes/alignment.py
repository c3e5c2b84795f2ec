"""The page of losses: every preference loss against DPO at equal steps, on a bundled model that sees.

    python -m recipes.alignment run --out docs/training/alignment.json [--minutes 11]     # again to go on
    python -m recipes.alignment table --out docs/training/alignment.json

Pairs come from the offline tasks: the right answer to a question about a picture, and a wrong one, which is the model's
own where it errs. Trained are LoRA adapters of the decoder. Measured are held-out questions of the categories that were
trained and of others, and on held-out pairs the order, the margin and the KL to the model before.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import set_seed
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging
from trl import SFTConfig

import vtok
from vtok import zoo
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

NAME, SEED = "vtok-tiny-qwen2.5-vl", 77  # a seed that the model was not trained with
TRAINED = {"scenes": ("count", "digit", "reading"), "existence": ("adversarial",)}
OTHER = {"scenes": ("colour", "shape", "position", "trend"), "charts": None, "video": None}  # None: all categories
Categories = tuple[str, ...] | None
LORA = {"r": 16, "lora_alpha": 32, "target_modules": r".*language_model.*(q|k|v|o|gate|up|down)_proj"}
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_strategy": "no",
}

app = typer.Typer(help=__doc__)


@dataclass(frozen=True)
class Asked:
    """beta: of all losses but LOGO and SimPO. held_out: items a task. pairs: held-out ones, a category."""

    steps: int = 40
    batch: int = 4
    lr: float = 3e-3
    beta: float = 0.1
    held_out: int = 60
    pairs: int = 12


# ---- pairs -----------------------------------------------------------------------------------------------------------
def questions(split: str, each: int) -> Iterator[tuple[offline.Item, offline.Question]]:
    """The first so many of each trained category, categories taking turns, one question a picture."""
    found: dict[str, list] = defaultdict(list)
    for name, categories in TRAINED.items():
        task, index = offline.get(name), itertools.count()
        while any(len(found[c]) < each for c in categories):
            item = task.item(split, SEED, next(index))
            open_ = [q for q in item.questions if q.category in categories and len(found[q.category]) < each]
            if open_:
                q = min(open_, key=lambda q: len(found[q.category]))
                found[q.category].append((item, q))
    yield from itertools.chain.from_iterable(zip(*found.values()))


def pairs(model: nn.Module, processor: Any, split: str, each: int) -> Dataset:
    """Rows of a question, the right answer, a wrong one, and another wrong one if the category has it."""
    rng = np.random.default_rng((SEED, each))
    asked = list(questions(split, each))
    answers: dict[str, set[str]] = defaultdict(set)
    for item, _ in asked:
        for q in item.questions:
            answers[q.category].add(q.answer)
    says = lambda role, text: [{"role": role, "content": text}]
    heard = own_answers(model, processor, [ask(q.text, *item.images) for item, q in asked], tokens=6, together=24)
    rows = []
    for (item, q), said in zip(asked, heard, strict=True):
        own = offline.normal(said) != offline.normal(q.answer)
        others = rng.permutation(sorted(answers[q.category] - {q.answer, said})).tolist()
        wrong = [*([said] if own else []), *others][:2]
        row = {"prompt": says("user", q.text), "chosen": says("assistant", q.answer), "image": item.images[0]}
        row |= {"rejected": says("assistant", wrong[0]), "rejected_2": says("assistant", wrong[-1]), "own": own}
        rows.append(row)
    return Dataset.from_list(rows)


# ---- pictures --------------------------------------------------------------------------------------------------------
FEATURES: dict[bytes, torch.Tensor] = {}  # of each picture that a tower has seen


def see_once(tower: nn.Module) -> None:
    """Let Qwen's tower, which nothing trains, look at a picture once: a pair shows it four times a step."""
    forward, size = tower.forward, tower.spatial_merge_size**2

    def remembered(pixels: torch.Tensor, grid_thw: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        parts = pixels.split(grid_thw.prod(1).tolist())
        names = [hashlib.blake2b(part.numpy().tobytes()).digest() for part in parts]
        new = {name: i for i, name in enumerate(names) if name not in FEATURES}
        if new:
            with torch.inference_mode(False), torch.no_grad():
                some = grid_thw[[*new.values()]].clone()
                made = forward(torch.cat([parts[i] for i in new.values()]), grid_thw=some).pooler_output
            FEATURES.update(zip(new, made.split((some.prod(1) // size).tolist())))
        return BaseModelOutputWithPooling(pooler_output=torch.cat([FEATURES[name] for name in names]))

    tower.forward = remembered


# ---- one keep: the model, its pairs, and what losses need beside them ------------------------------------------------
class Place:
    """A keep's model and pairs, and what teachers made of them, which is done once and kept in the folder `work`."""

    def __init__(self, keep: float, asked: Asked, work: Path) -> None:
        self.keep, self.asked, self.work = keep, asked, work
        model, self.processor = self.loaded()
        self.train = pairs(model, self.processor, "train", asked.steps * asked.batch // 4)
        self.val = pairs(model, self.processor, "val", asked.pairs)
        self.collator = PairCollator(self.processor, phrases="all")

    def loaded(self) -> tuple[nn.Module, Any]:
        model, processor = zoo.load(NAME)
        see_once(model.model.visual)
        if self.keep < 1:
            vtok.patch(model, "divprune", keep=self.keep)
        return model, processor

    def policy(self, seed: int) -> nn.Module:
        set_seed(seed)
        return get_peft_model(self.loaded()[0], LoraConfig(**LORA)).eval()

    def by_pairs(self, seed: int, objective: Any, data: Dataset | None = None, **given: Any) -> nn.Module:
        """A policy trained on pairs. given: options of `PreferenceConfig`."""
        set_seed(seed)
        args = PreferenceConfig(tempfile.mkdtemp(), **self._how(seed) | {"beta": self.asked.beta} | given)
        trainer = PreferenceTrainer(
            self.loaded()[0],
            args=args,
            train_dataset=self.train if data is None else data,
            processing_class=self.processor,
            objective=objective,
            peft_config=LoraConfig(**LORA),
        )
        trainer.train()
        return trainer.model.eval()

    def by_answers(self, seed: int, objective: Any, column: str = "chosen") -> nn.Module:
        """A policy trained on one answer of each pair."""
        rows = [{"prompt": r["prompt"], "completion": r[column], "images": [r["image"]]} for r in self.train]
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
        return QUIET | how | {"learning_rate": self.asked.lr, "gradient_checkpointing": False}

    # ---- made once ---------------------------------------------------------------------------------------------------
    @cached_property
    def contrasted(self) -> Dataset:
        """The pairs with T-REG's scores."""
        return self._scored("contrast", lambda: contrast(self.loaded()[0], self.collator, self.train))

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
            folder = self.work / f"{name}-{self.keep:g}"
            if not folder.exists():
                data = Dataset.from_list([r | {new: r[old] for new, old in columns.items()} for r in self.train])
                self.by_pairs(SEED, DPO(), data).save_pretrained(folder)
            made.append(PeftModel.from_pretrained(self.loaded()[0], folder))
        return made

    def _scored(self, name: str, make: Callable[[], Iterable[dict[str, list[float]]]]) -> Dataset:
        file = self.work / f"{name}-{self.keep:g}.json"
        if not file.exists():
            write_json(file, list(make()))
        return Dataset.from_list([row | more for row, more in zip(self.train, json.loads(file.read_text()))])


SFT = IFT(share=0.0, gamma=0.0)
LOSSES: dict[str, Callable[[Place, int], nn.Module]] = {
    "DPO": lambda place, seed: place.by_pairs(seed, DPO()),
    "SFT": lambda place, seed: place.by_answers(seed, SFT),
    "TDPO 2": lambda place, seed: place.by_pairs(seed, TDPO()),
    "RRPO": lambda place, seed: place.by_pairs(seed, RRPO(alpha=0.05), phrases="words"),
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
    model before, over that answer."""
    found: dict[str, Any] = {"hits": {}, "margin": [], "kl": []}
    for group, some in {"trained": TRAINED, "other": OTHER}.items():
        tasks = ((offline.get(name), categories) for name, categories in some.items())
        each = [hits(policy, place.processor, *task, place.asked.held_out) for task in tasks]
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
    return found


def hits(policy: nn.Module, processor: Any, task: offline.Task, categories: Categories, items: int) -> list[list[int]]:
    """[right, asked] of each of the first held-out items; questions of several go through the model together."""
    asked = [(item, q) for item in held_out(task.name, categories, items) for q in item.questions]
    seen = lambda item: [Clip(item.images, item.fps)] if item.media == "video" else item.images
    said = own_answers(policy, processor, [ask(q.text, *seen(item)) for item, q in asked], tokens=6, together=24)
    found: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for (item, q), text in zip(asked, said, strict=True):
        found[item.index][0] += task.score(q.answer, text)
        found[item.index][1] += 1
    return list(found.values())


@cache
def held_out(name: str, categories: Categories, items: int) -> list[offline.Item]:
    task = offline.get(name)
    return list(replace(task, chances={c: task.chances[c] for c in categories or task.categories}).held_out(items))


def cells(keeps: Sequence[float], seeds: int) -> Iterator[tuple[float, str, int]]:
    """(keep, loss, seed): what was before, the first seed of each keep, then the other seeds."""
    yield from ((keep, BEFORE, 0) for keep in keeps)
    passes = [(keep, 0) for keep in keeps] + [(keep, seed) for keep in keeps for seed in range(1, seeds)]
    yield from ((keep, loss, seed) for keep, seed in passes for loss in LOSSES)


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="JSON file to write, and to go on from.")],
    work: Annotated[Path, typer.Option(help="Folder for what teachers make.")] = Path("out/alignment"),
    keeps: Annotated[str, typer.Option(metavar="X,...", help="Of the visual tokens, by divprune.")] = "1,0.5",
    seeds: int = 3,
    minutes: Annotated[float, typer.Option(help="No training begins later than this.")] = 1e9,
    lr: Annotated[float, typer.Option(help="Of all losses.")] = Asked.lr,
    losses: Annotated[str, typer.Option(metavar="NAME,...", help="Left out: all.")] = "",
) -> None:
    """Train and measure what `out` has not yet."""
    quiet()
    asked, started = Asked(lr=lr), time.monotonic()
    result = begun(out, asked, machine.describe("cpu", "float32"))
    place = cache(partial(Place, asked=asked, work=work))
    for keep, loss, seed in cells([float(keep) for keep in keeps.split(",")], seeds):
        name = f"{keep:g} {loss} {seed}"
        if name in result["rounds"] or (losses and loss not in losses.split(",")):
            continue
        if time.monotonic() - started > 60 * minutes:
            return
        here, began = place(keep), time.process_time()
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
    share = lambda group: f"{np.divide(*np.sum(QUANTITIES[group](row), 1)):.3f}"
    margin = np.array(row["margin"])
    return [
        share("trained"),
        share("other"),
        f"{(margin > 0).mean():.2f}",
        f"{margin.mean():.2f}",
        f"{np.mean(row['kl']):.3f}",
    ]


# ---- the table -------------------------------------------------------------------------------------------------------
HEAD = ["loss", "trained, %", "of seeds", "less DPO", "other, %", "less before", "in order, %", "margin", "KL"]
QUANTITIES: dict[str, Callable[[dict[str, Any]], Any]] = {  # of a run: [2, items], a sum and what it is a share of
    "trained": lambda row: [[*map(int, digits)] for digits in row["hits"]["trained"]],
    "other": lambda row: [[*map(int, digits)] for digits in row["hits"]["other"]],
    "order": lambda row: [np.array(row["margin"]) > 0, np.ones(len(row["margin"]))],
    "margin": lambda row: [row["margin"], np.ones(len(row["margin"]))],
    "kl": lambda row: [row["kl"], np.ones(len(row["kl"]))],
}


def numbers(runs: dict[str, list[dict[str, Any]]], get: Callable[[dict[str, Any]], Any]) -> dict[str, Number]:
    """Of each loss, over its seeds; items and pairs are redrawn whole, and alike for all losses."""
    values, counts = np.swapaxes([np.mean([get(row) for row in some], 0) for some in runs.values()], 0, 1)
    shares = values.sum(1) / counts.sum(1)
    return {loss: Number(float(at), draws) for loss, at, draws in zip(runs, shares, redrawn(values, counts))}


def shown(number: Number, digits: int = 1) -> str:
    low, high = number.span or (np.nan, np.nan)
    return f"{number.at:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def of_keep(result: dict[str, Any], keep: float) -> str:
    """The table of a keep: means over the seeds that all losses have, with 95 % intervals."""
    rows: dict[str, dict[str, dict[str, Any]]] = {loss: {} for loss in (BEFORE, *LOSSES)}
    for name, row in result["rounds"].items():
        first, rest = name.split(" ", 1)
        if float(first) == keep:
            loss, seed = rest.rsplit(" ", 1)
            rows[loss][seed] = row
    rows = {loss: some for loss, some in rows.items() if some}
    seeds = sorted(set.intersection(*(set(some) for loss, some in rows.items() if loss != BEFORE)))
    runs = {loss: [*some.values()] if loss == BEFORE else [some[seed] for seed in seeds] for loss, some in rows.items()}
    found = {name: numbers(runs, get) for name, get in QUANTITIES.items()}
    points = lambda a, b: shown(Number(100 * (a - b).at, 100 * (a - b).draws))
    lines = []
    for loss, some in runs.items():
        of = {name: each[loss] for name, each in found.items()}
        each = ", ".join(f"{100 * np.divide(*np.sum(QUANTITIES['trained'](row), 1)):.0f}" for row in some)
        line = [loss, f"{100 * of['trained'].at:.1f}", each]
        line += ["" if loss == "DPO" else points(of["trained"], found["trained"]["DPO"]), f"{100 * of['other'].at:.1f}"]
        if loss != BEFORE:
            line += [points(of["other"], found["other"][BEFORE]), f"{100 * of['order'].at:.0f}"]
            line += [shown(of["margin"], 2), shown(of["kl"], 2)]
        lines.append(line + [""] * (len(HEAD) - len(line)))
    return table(HEAD, lines)


@app.command(name="table")
def print_table(out: Annotated[Path, typer.Option(help="JSON file of `run`.")]) -> None:
    """The tables of the page, in Markdown."""
    result = json.loads(out.read_text())
    for keep in sorted({float(name.split()[0]) for name in result["rounds"]}, reverse=True):
        print(f"{100 * keep:g} % of the visual tokens:\n\n{of_keep(result, keep)}\n")


if __name__ == "__main__":
    app()

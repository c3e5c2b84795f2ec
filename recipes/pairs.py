"""What the page of losses trains on: a model, its questions, and pairs of a right and a wrong answer to each.

`pictures`: a bundled model that sees, and the offline tasks. `records`: SmolLM2-135M's real weights, and records to
sort, whose answers are long. In a file of its own, since `recipes.alignment` has one runner and one table for all.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import vtok
from recipes.smollm2 import PROSE
from vtok import models, zoo
from vtok.errors import InvalidValue
from vtok.eval.tasks import task as offline
from vtok.eval.tasks.recall import CITIES
from vtok.prompts import ask
from vtok.rl.pairs import own_answers
from vtok.rl.towers import encode_once

NAME, SEED = "vtok-tiny-qwen2.5-vl", 77  # a seed that the model was not trained with
TRAINED = {"scenes": ("count", "digit", "reading"), "existence": ("adversarial",)}
OTHER = {"scenes": ("colour", "shape", "position", "trend"), "charts": None, "video": None}  # None: all categories
Categories = tuple[str, ...] | None
LORA = {"r": 16, "lora_alpha": 32}
MATRICES = r".*(q|k|v|o|gate|up|down)_proj"
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_strategy": "no",
}


@dataclass(frozen=True)
class Setting:
    """load: of a keep and a folder for what is made once; the model in eval mode, and its processor. pairs: of model,
    processor, split and how many. groups: "trained", and "other" questions if there are any, by task, of categories.
    lora: which matrices. tokens: of an answer at most. losses: left out: all. phrases: what RRPO compares answers by,
    see `RRPOConfig`. marked: a pair as it wants them, where these are marked."""

    load: Callable[[float, Path], tuple[nn.Module, Any]]
    pairs: Callable[[nn.Module, Any, str, int], Dataset]
    groups: Mapping[str, Mapping[str, Categories]]
    lora: str
    tokens: int
    losses: tuple[str, ...] = ()
    phrases: str = "words"
    marked: Callable[[dict], dict] = dict


# ---- pictures: pairs -------------------------------------------------------------------------------------------------
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


def pairs(model: nn.Module, processor: Any, split: str, count: int) -> Dataset:
    """Rows of a question, the right answer, a wrong one, and another wrong one if the category has it."""
    each = count // sum(map(len, TRAINED.values()))
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


# ---- pictures: the model ---------------------------------------------------------------------------------------------
SEEN: dict[tuple, Any] = {}  # what the tower of all runs, which nothing trains, said of each picture


def bundled(keep: float, work: Path) -> tuple[nn.Module, Any]:
    model, processor = zoo.load(NAME)
    encode_once(model.model.visual.requires_grad_(False), known=SEEN)
    if keep < 1:
        vtok.patch(model, "divprune", keep=keep)
    return model, processor


# ---- records ---------------------------------------------------------------------------------------------------------
RECORDS, LONGEST = 4, 32  # of a question; tokens of an answer
TAUGHT = {"max_steps": 16, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "seed": SEED}
TURNS = (  # SmolLM2's own, without the system's message, which is a third of such a prompt
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def records(split: str, seed: int, index: int) -> offline.Item:
    """Cities with numbers, in no order, to be put in that of the names."""
    rng = offline.generator("records", split, seed, index)
    lines = [f"{name} {rng.integers(10, 100)}" for name in rng.permutation(CITIES)[:RECORDS]]
    while lines == sorted(lines):
        lines = rng.permutation(lines).tolist()
    question = f"Sort by name: {', '.join(lines)}."
    return offline.Item(index, "text", (), (offline.Question("sorted", question, ", ".join(sorted(lines))),))


SORTING = offline.Task(
    "records", "Records to sort", 1, "text", {"sorted": 1 / 24}, 200, records, records.__doc__, instruction=""
)


def task(name: str) -> offline.Task:
    return SORTING if name == SORTING.name else offline.get(name)


def taught(keep: float, work: Path) -> tuple[nn.Module, Any]:
    """SmolLM2, which sorts some of the records right: after a short training on other ones, done once.

    Raises `InvalidValue` for a keep below 1: there is nothing to see."""
    if keep < 1:
        raise InvalidValue(f"SmolLM2 has no visual tokens of which keep={keep:g} could stay: --keeps 1.")
    model, tokenizer = models.load(models.SMOLLM2, "cpu")
    tokenizer.chat_template = TURNS
    folder = work / "taught"
    if not folder.exists():
        says = lambda role, text: [{"role": role, "content": text}]
        count = TAUGHT["max_steps"] * TAUGHT["per_device_train_batch_size"]
        asked = [records("train", SEED + 1, index).questions[0] for index in range(count)]
        rows = [{"prompt": says("user", q.text), "completion": says("assistant", q.answer)} for q in asked]
        set_seed(SEED)
        trainer = SFTTrainer(
            model,
            args=SFTConfig(tempfile.mkdtemp(), max_length=None, gradient_checkpointing=False, **QUIET, **TAUGHT),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=MATRICES, **LORA),
        )
        trainer.train()
        trainer.model.save_pretrained(folder)
        model, _ = models.load(models.SMOLLM2, "cpu")
    return PeftModel.from_pretrained(model, folder).merge_and_unload().eval(), tokenizer


def sorted_wrong(model: nn.Module, tokenizer: Any, split: str, count: int) -> Dataset:
    """Rows of a question, the right answer, and the model's own wrong one: of the first questions at which it errs."""
    says = lambda role, text: [{"role": role, "content": text}]
    rows, index, together = [], itertools.count(), 24
    while len(rows) < count:
        asked = [records(split, SEED, next(index)).questions[0] for _ in range(together)]
        heard = own_answers(model, tokenizer, [ask(q.text) for q in asked], tokens=LONGEST, together=together)
        for q, said in zip(asked, heard, strict=True):
            if not SORTING.score(q.answer, said):
                row = {"prompt": says("user", q.text), "chosen": says("assistant", q.answer)}
                rows.append(row | {"rejected": says("assistant", said)})
    return Dataset.from_list(rows[:count])


def marked(row: dict) -> dict:
    """A pair in which the records at places where the answers differ are marked: a diff finds that one was moved, which
    is no phrase that stands in place of another."""
    right, wrong = (row[key][0]["content"].split(", ") for key in ("chosen", "rejected"))
    differ = [i for i, (a, b) in enumerate(zip(right, wrong)) if a != b]
    said = {}
    for key, parts in (("chosen", right), ("rejected", wrong)):
        told = [f"<MASK>{part}</MASK>" if i in differ else part for i, part in enumerate(parts)]
        said[key] = [{"role": "assistant", "content": ", ".join(told)}]
    return row | said


def prose(tokenizer: Any, tokens: int = 64) -> torch.Tensor:
    """[texts, tokens] ids of English prose out of scikit-learn: the first two passages of each description."""
    from sklearn import datasets

    texts = [getattr(datasets, f"load_{name}")().DESCR for name in PROSE]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][: 2 * tokens] for text in texts]
    return torch.tensor(ids).view(-1, tokens)


SETTINGS = {
    "pictures": Setting(bundled, pairs, {"trained": TRAINED, "other": OTHER}, r".*language_model" + MATRICES, tokens=6),
    "records": Setting(
        taught,
        sorted_wrong,
        {"trained": {"records": None}},
        MATRICES,
        LONGEST,
        ("DPO", "TDPO 2", "RRPO"),
        "markup",
        marked,
    ),
}

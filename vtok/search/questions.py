"""How good a schedule is by the questions at hand: exact match, or the log-probability of the right answers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from vtok.compressor import Compressor
from vtok.compressors.schedule import Schedule
from vtok.errors import InvalidValue, VtokError
from vtok.patching import patch
from vtok.prompts import ask, encode
from vtok.search.schedules import Rates

METRICS = ("accuracy", "logprob")


class Question(Protocol):
    """What is asked of a picture, and the right answer."""

    text: str
    answer: str


Asked = Sequence[tuple[Image.Image, Sequence[Question]]]


def metric_of(
    name: str, model: Any, processor: Any, asked: Asked, right: Callable[[str, str], bool] = operator.eq
) -> Callable[[Rates], float]:
    """rates -> score of the model with that schedule, more is better. name: see `accuracy`, which takes `right`, and
    `log_probability`."""
    if name not in METRICS:
        raise InvalidValue(f"metric must be one of {METRICS}, got {name!r}")
    if name == "accuracy":
        measure = lambda: accuracy(model, processor, asked, right)
    else:
        batches = [teacher_forced(processor, image, questions, model) for image, questions in asked]
        measure = lambda: log_probability(model, batches)

    def metric(rates: Rates) -> float:
        with patch(model, Schedule(rates=rates)):
            return measure()

    return metric


def prompts(processor: Any, image: Image.Image, questions: Sequence[Question]) -> Any:
    """Inputs that ask each of the questions about one picture, padded on the left."""
    return encode(processor, [ask(q.text, image) for q in questions])


@torch.inference_mode()
def accuracy(
    model: Any, processor: Any, asked: Asked, right: Callable[[str, str], bool] = operator.eq, tokens: int = 16
) -> float:
    """Share of questions answered right, by greedy `generate` of at most `tokens`. right: the answer and what was said
    -> whether it is right."""
    hits = []
    for image, questions in asked:
        inputs = prompts(processor, image, questions).to(model.device, model.dtype)
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        said = processor.batch_decode(out, skip_special_tokens=True)
        hits += [right(q.answer, text.strip()) for text, q in zip(said, questions)]
    return sum(hits) / len(hits)


def teacher_forced(processor: Any, image: Image.Image, questions: Sequence[Question], model: Any) -> dict[str, Tensor]:
    """Inputs and labels of the right answers to questions about one picture: prompts padded on the left, answers and
    the end token on the right, labels on these alone."""
    inputs, tokenizer = prompts(processor, image, questions), processor.tokenizer
    before = tokenizer.decode(inputs["input_ids"][0, -1:])
    answers = [[*_behind(tokenizer, before, q.answer), tokenizer.eos_token_id] for q in questions]
    longest = max(map(len, answers))
    ids = torch.tensor([[*a, *[tokenizer.pad_token_id] * (longest - len(a))] for a in answers])  # [B, A]
    real = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids.masked_fill(real == 0, -100)], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], real], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    inputs = inputs.to(model.device, model.dtype)
    return {**inputs, "labels": labels.to(model.device)}


def _behind(tokenizer: Any, before: str, answer: str) -> list[int]:
    """Tokens of an answer behind the prompt's end `before`: with a space, unless that ends in one ("assistant\\n").
    Read together, as some tokenizers (Llama's) put a space of their own before whatever they are given."""
    ids, both = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (before, f"{before}{'' if before[-1:].isspace() else ' '}{answer}")
    )
    return both[len(ids) :]


@torch.inference_mode()
def log_probability(model: Any, batches: list[dict[str, Tensor]]) -> float:
    """Mean over questions of the log-probability, in nats, of the right answer and its end, each token given the right
    ones before it. `batches`: of `teacher_forced`."""
    total, n = 0.0, 0
    for batch in batches:
        logits = model(**batch).logits[:, :-1].float()  # [B, S - 1, V]
        labels = batch["labels"][:, 1:]
        chosen = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None]).squeeze(2)
        total += chosen.masked_fill(labels == -100, 0.0).sum().item()
        n += len(labels)
    return total / n


def rivals(rates: Rates) -> dict[str, Compressor | str]:
    """Name -> in-LLM compressors of the same mean keep as the schedule `rates`, or why there is none. All of them
    round counts down, the schedule "found" too."""
    from vtok.compressors.fastv import FastV
    from vtok.compressors.pyramiddrop import PyramidDrop

    n_layers, keep = len(rates), math.fsum(rates) / len(rates)
    named: dict[str, Compressor | str] = {"found": Schedule(rates=rates, rounding="down")}
    for name, plain in {"p-sigmoid": Schedule(), "fastv": FastV(), "pyramiddrop": PyramidDrop()}.items():
        try:
            named[name] = plain.with_budget(keep, n_layers)
        except VtokError as error:
            named[name] = str(error)
    return named

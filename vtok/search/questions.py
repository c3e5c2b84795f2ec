"""What the searches ask a model: validation questions of the bundled task; and the judgement on its test set."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vtok.compressor import Compressor
from vtok.compressors.schedule import Schedule
from vtok.errors import InvalidValue, VtokError
from vtok.patching import patch
from vtok.search.schedules import Rates
from vtok.zoo import evaluate, scenes
from vtok.zoo.scenes import CATEGORIES, Question

METRICS = ("accuracy", "logprob")
SEED = evaluate.TEST_SEED  # of the validation scenes: another split than the test set's

Asked = list[tuple[Image.Image, list[Question]]]


def validation(count: int) -> Asked:
    """The first `count` validation questions, scene by scene, one of every category that applies."""
    asked: Asked = []
    index = left = 0
    left = count
    while left > 0:
        scene = scenes.generate("val", SEED, index)
        first = {q.category: q for q in reversed(scene.questions)}
        chosen = [first[c] for c in CATEGORIES if c in first][:left]
        asked.append((scene.image, chosen))
        index, left = index + 1, left - len(chosen)
    return asked


def metric_of(name: str, model: Any, processor: Any, asked: Asked) -> Callable[[Rates], float]:
    """rates -> score of the model with that schedule, more is better. name: see `accuracy` and `log_probability`."""
    if name not in METRICS:
        raise InvalidValue(f"metric must be one of {METRICS}, got {name!r}")
    if name == "accuracy":
        measure = lambda: accuracy(model, processor, asked)
    else:
        batches = [teacher_forced(processor, image, questions, model) for image, questions in asked]
        measure = lambda: log_probability(model, batches)

    def metric(rates: Rates) -> float:
        with patch(model, Schedule(rates=rates)):
            return measure()

    return metric


def accuracy(model: Any, processor: Any, asked: Asked) -> float:
    """Share of questions answered exactly, by greedy `generate`."""
    hits = [
        said == question.answer
        for image, questions in asked
        for question, said in zip(questions, evaluate.answer(model, processor, image, [q.text for q in questions]))
    ]
    return sum(hits) / len(hits)


def teacher_forced(processor: Any, image: Image.Image, questions: list[Question], model: Any) -> dict[str, Tensor]:
    """Inputs and labels of the right answers to questions about one picture: prompts padded on the left, answers and
    the end token on the right, labels on these alone."""
    chats = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}] for q in questions]
    prompts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    tokenizer = processor.tokenizer
    inputs = processor(
        text=prompts, images=[image] * len(prompts), padding=True, padding_side="left", return_tensors="pt"
    )
    answers = [tokenizer(f" {q.answer}", add_special_tokens=False)["input_ids"] for q in questions]
    answers = [[*ids, tokenizer.eos_token_id] for ids in answers]
    longest = max(map(len, answers))
    ids = torch.tensor([[*a, *[tokenizer.pad_token_id] * (longest - len(a))] for a in answers])  # [B, A]
    real = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers])
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids.masked_fill(real == 0, -100)], 1)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], real], 1)
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    inputs = inputs.to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {**inputs, "labels": labels.to(model.device)}


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
    n_layers, keep = len(rates), math.fsum(rates) / len(rates)
    from vtok.compressors.fastv import FastV
    from vtok.compressors.pyramiddrop import PyramidDrop

    named: dict[str, Compressor | str] = {"found": Schedule(rates=rates, rounding="down")}
    for name, plain in {"p-sigmoid": Schedule(), "fastv": FastV(), "pyramiddrop": PyramidDrop()}.items():
        try:
            named[name] = plain.with_budget(keep, n_layers)
        except VtokError as error:
            named[name] = str(error)
    return named


def judged(
    model: Any,
    processor: Any,
    methods: dict[str, Compressor | str],
    count: int,
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[dict[str, Any]]:
    """Exact match on the first `count` scenes of the test set: of the dense model and of each method a row with its
    accuracy, mean keep, and the paired difference to the first method, 95 % intervals from a bootstrap over scenes.
    """
    import numpy as np

    from vtok.eval.results.statistics import interval

    hits: dict[str, Any] = {}
    keeps: dict[str, float] = {"dense": 1.0}
    runs = {"dense": None, **{name: method for name, method in methods.items() if not isinstance(method, str)}}
    for name in progress(list(runs)):
        handle = patch(model, runs[name]) if runs[name] is not None else None
        try:
            rows, kept = [], []
            for scene, questions in evaluate.held_out(count):
                said = evaluate.answer(model, processor, scene.image, [q.text for q in questions])
                rows.append((sum(q.answer == text for q, text in zip(questions, said)), len(questions)))
                kept += [handle.trace.mean_keep] if handle else []
        finally:
            if handle:
                handle.remove()
        hits[name] = np.array(rows)  # [scenes, 2]
        if kept:
            keeps[name] = sum(kept) / len(kept)
    reference = hits[next(iter(methods))]
    rows = []
    for name, mine in hits.items():
        n, gain = mine[:, 1], mine[:, 0] - reference[:, 0]
        rows.append(
            {
                "method": name,
                "n": int(n.sum()),
                "accuracy": float(mine[:, 0].sum() / n.sum()),
                "interval": interval(mine[:, 0], n),
                "mean_keep": keeps[name],
                "to_found": {"difference": float(gain.sum() / n.sum()), "interval": interval(gain, n)},
            }
        )
    return rows + [{"method": name, "refused": why} for name, why in methods.items() if isinstance(why, str)]

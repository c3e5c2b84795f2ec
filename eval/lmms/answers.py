"""From a task's generation arguments to answers, and from continuations to their likelihoods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from torch import Tensor
from transformers import GenerationConfig

from vtok.errors import InvalidValue, Unsupported

MAX_NEW_TOKENS = 1024  # where a task does not say
_GENERATION = GenerationConfig()


def arguments(
    asked: dict[str, Any], model: Any, tokenizer: Any, warn: Callable[[str], None]
) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `generate`, and the strings at which an answer ends.

    A task's temperature of 0 is greedy whatever else it says; one above 0 samples unless it says do_sample=false.
    """
    asked = dict(asked)
    until = asked.pop("until", None) or []
    until = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
    longest = asked.pop("max_gen_toks", None)
    how = {"max_new_tokens": asked.pop("max_new_tokens", None) or longest or MAX_NEW_TOKENS}
    temperature, sample = asked.pop("temperature", None), asked.pop("do_sample", None)
    sample = bool(temperature) if sample is None else bool(sample) and temperature != 0
    shape = {"temperature": temperature} | {name: asked.pop(name, None) for name in ("top_p", "top_k")}
    how["do_sample"] = sample
    how |= {name: value for name, value in shape.items() if value is not None} if sample else dict.fromkeys(shape)
    if (asked.get("num_return_sequences") or 1) > 1:
        raise Unsupported("num_return_sequences above 1: ask for --repeats instead.")
    for name, value in asked.items():
        if value is None:
            continue
        if hasattr(_GENERATION, name):
            how[name] = value
        else:
            warn(f"The task's generation argument {name}={value!r} means nothing to transformers; left out.")
    if until:
        how |= {"stop_strings": until, "tokenizer": tokenizer}
    if model.generation_config.pad_token_id is None:
        how["pad_token_id"] = _pad(tokenizer)
    return how, until


def generate(
    model: Any, processor: Any, inputs: Any, how: dict[str, Any], until: list[str]
) -> Callable[[], list[GenerationResult]]:
    """Run the model, and return a function that reads its answers, so that the caller's clock stops between."""
    with torch.inference_mode():
        out = model.generate(**inputs, **how)[:, inputs["input_ids"].shape[1] :]  # [B, T]

    def results() -> list[GenerationResult]:
        texts, read = processor.batch_decode(out, skip_special_tokens=True), []
        for text, row, mask in zip(texts, out, inputs["attention_mask"]):
            for stop in until:
                text = text.partition(stop)[0]
            counts = TokenCounts(int(mask.sum()), _n_generated(row, model.generation_config, processor.tokenizer))
            read.append(GenerationResult(text.strip(), counts))
        return read

    return results


def _n_generated(row: Tensor, generation: GenerationConfig, tokenizer: Any) -> int:
    """Tokens of an answer, its end token with them and padding without."""
    ends = generation.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=row.device, dtype=row.dtype).view(-1)
    found = torch.isin(row, ends).nonzero()
    if len(found):
        return int(found[0]) + 1
    pad = generation.pad_token_id
    content = (row != (tokenizer.pad_token_id if pad is None else pad)).nonzero()
    return int(content[-1]) + 1 if len(content) else 0


def score(
    model: Any, tokenizer: Any, inputs: dict[str, Any], continuations: list[str]
) -> Callable[[], list[GenerationResult]]:
    """As `generate`: for each continuation (loss, is_greedy), its tokens' mean negative log-probability in nats, and
    whether each is the likeliest. Raises `InvalidValue` where one has no token."""
    inputs, joined = _with_answers(tokenizer, dict(inputs), continuations)
    # The labels tell a text-guided compressor where the prompt ends, so that it chooses as before an answer.
    labels = _fill([torch.cat([torch.full_like(prompt, -100), answer]) for prompt, answer in joined], -100)
    with torch.inference_mode():
        logits = model(**inputs, labels=labels, use_cache=False).logits  # [B, S, V]

    def results() -> list[GenerationResult]:
        read = []
        for row, (prompt, answer) in zip(logits, joined):
            given = row[len(prompt) - 1 : len(prompt) + len(answer) - 1].float()  # [T, V]
            loss = torch.nn.functional.cross_entropy(given, answer)
            greedy = bool((given.argmax(-1) == answer).all())
            read.append(GenerationResult((float(loss), greedy), TokenCounts(len(prompt), 0)))
        return read

    return results


def _with_answers(
    tokenizer: Any, inputs: dict[str, Any], continuations: list[str]
) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """Inputs with a continuation behind each prompt, and both of each row. Padding goes to the right, where nothing is
    in the way of the answers, and positions are those of a row alone."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    prompts = [row[valid] for row, valid in zip(ids, mask)]
    ends = [tokenizer.decode(row[-1:])[-1:].isspace() for row in prompts]
    said = [text.lstrip() if space else text for text, space in zip(continuations, ends)]
    answers = [tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for text in said]
    if not all(len(answer) for answer in answers):
        raise InvalidValue("A continuation without a token has no likelihood.")
    joined = [(prompt, answer.to(ids)) for prompt, answer in zip(prompts, answers)]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:
            rows = [row[valid] for row, valid in zip(inputs[name], mask)]
            inputs[name] = _fill([torch.cat([row, row.new_zeros(len(a))]) for row, a in zip(rows, answers)], 0)
    inputs["input_ids"] = _fill([torch.cat(pair) for pair in joined], _pad(tokenizer))
    inputs["attention_mask"] = _fill([ids.new_ones(len(p) + len(a)) for p, a in joined], 0)
    return inputs, joined


def _fill(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def _pad(tokenizer: Any) -> int:
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

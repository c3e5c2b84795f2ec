"""Preference pairs for clips by RRPO's recipe: the model's own errors on a perturbed clip, in the right answer's words.

asked = [ask(question, perturb(clip, rng)) for question, clip, answer in known]
said = own_answers(model, processor, asked)
rows = [pair(*one, own, others, rng) for one, own in zip(known, said)]     # rows of RRPOTrainer's data set

The paper lets a language model compare the two answers and rewrite the right one with the wrong phrases. Here a diff of
their words does it: what stands in one's place in the other is exchanged, and all else stays (`splice`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from vtok.errors import InvalidValue
from vtok.media import Clip
from vtok.prompts import Conversation, encode
from vtok.text.align.rrpo import diff_spans

MASKED = (0.25, 0.5)  # share of the frames that are masked, drawn between these, as in the paper
WINDOW = 4  # frames that change places among each other; the paper's "local" shuffle gives no number


def perturb(clip: Clip, rng: np.random.Generator, masked: tuple[float, float] = MASKED, window: int = WINDOW) -> Clip:
    """The clip with a share of its frames black, and all frames shuffled within windows of so many.

    masked: least and most share, in [0, 1]. window: >= 1; 1 shuffles nothing. Raises `InvalidValue`."""
    low, high = masked
    if not 0 <= low <= high <= 1 or window < 1:
        raise InvalidValue(f"masked is two shares in [0, 1] and window >= 1, not {masked} and {window}.")
    frames, n = list(clip.frames), len(clip.frames)
    for i in rng.permutation(n)[: round(n * rng.uniform(low, high))]:
        frames[i] = Image.new("RGB", frames[i].size)
    order = [i for start in range(0, n, window) for i in start + rng.permutation(min(window, n - start))]
    return replace(clip, frames=tuple(frames[i] for i in order))


def own_answers(
    model: Any, processor: Any, asked: Sequence[Conversation], tokens: int = 128, together: int = 16
) -> list[str]:
    """What the model says, greedily: an answer a conversation, of so many tokens at most, `together` at a time."""
    said: list[str] = []
    for start in range(0, len(asked), together):
        inputs = encode(processor, asked[start : start + together]).to(model.device)
        inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs.items()}
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        said += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in said]


def splice(answer: str, said: str) -> str:
    """The right answer with the phrases in which another one contradicts it: what stands in place of its own words.

    What either says beyond the other is left as the right answer has it. So both have the same build, and the phrases
    that differ are aligned. An answer with which nothing is in common takes the place of the whole."""
    mine, theirs = diff_spans(answer, said)
    stretch = lambda spans, sign: (
        min(a for a, _, s in spans if s == sign),
        max(b for _, b, s in spans if s == sign),
    )
    made, last = "", 0
    for sign in sorted({sign for _, _, sign in mine}):
        (start, stop), (a, b) = stretch(mine, sign), stretch(theirs, sign)
        made, last = made + answer[last:start] + said[a:b], stop
    return made + answer[last:]


def pair(
    question: str, clip: Clip, answer: str, said: str, others: Sequence[str], rng: np.random.Generator
) -> dict[str, Any] | None:
    """A row: the clip as it is, the right answer, and a wrong one. None where there is nothing wrong to be said.

    said: by the model, on the perturbed clip. others: answers that would be wrong, one of which is spliced in where the
    model said nothing wrong. The column `own` says whether the error is the model's."""
    same = lambda text: text.casefold().strip().removesuffix(".") == answer.casefold().strip().removesuffix(".")
    wrong = answer if same(said) else splice(answer, said)
    own, others = not same(wrong), [other for other in others if not same(other)]
    if not own:
        if not others:
            return None
        wrong = splice(answer, others[rng.integers(len(others))])
    says = lambda role, text: [{"role": role, "content": text}]
    row = {"prompt": says("user", question), "chosen": says("assistant", answer), "rejected": says("assistant", wrong)}
    return {**row, "video": list(clip.frames), "fps": float(clip.fps), "own": own}

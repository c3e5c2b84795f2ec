"""RRPO: preference optimisation of the phrases in which two answers differ (https://arxiv.org/abs/2504.12083).

Tokens that both answers share get no reward, so the gradient goes with what differs, not with how long the answers are;
and the chosen answer stays near the reference token by token. Written from the paper; the official code was read for
what the paper leaves open, and these of its slips are not repeated:

- Reference probabilities that underflow gave an infinite margin and a NaN: here both sides are log-softmaxes in fp32.
- The smallest sign of a batch was taken for "unchanged", and a phrase was lost where none was: here that is 0 alone.
- A sign where the label is -100 counted as token 0: here labels mask signs. Diffs see answers, never prompts or
  padding, and know no "popular" tokens.

A *sign* says of a token to which differing phrase it belongs: 1, 2, ...; 0 where the answers agree.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher

from torch import Tensor

from vtok.errors import InvalidValue
from vtok.text.align.stats import TokenStats, by_answer
from vtok.text.align.weighted import weighted_dpo

Span = tuple[int, int, int]  # of characters, from and to; and the sign
TAG = re.compile(r"<MASK> ?| ?</MASK>")  # the paper's data have a space on the inner side
WORD = re.compile(r"\w+|[^\w\s]")


def rrpo(stats: TokenStats, signs: Tensor, *, alpha: float = 0.01, beta: float = 0.1) -> tuple[Tensor, dict]:
    """The loss of each pair, [B], and what to log of it, detached.

    stats: of 2B rows, the chosen answers and then the rejected ones. signs: [2B, T], see above; any value <= 0 is "no".
    alpha: weight of the KL, summed over the chosen answer's supervised tokens; the paper's are 0.01 to 0.05.
    beta: nats of margin to nats of reward; the paper's are 0.1 to 0.9.

    -log sigmoid(beta (margins of the chosen phrases - margins of the rejected ones)) + alpha KL. The metrics, [B] each:
    `rewards/chosen`, `rewards/rejected`, `kl/chosen`, `kl/rejected` and `phrase_tokens`, signed tokens of both answers.
    Where the policy is the reference, or the answers agree, the first term is ln 2. Raises `InvalidValue`."""
    rows, width = stats.mask.shape
    if rows % 2 or signs.shape != (rows, width + 1):
        raise InvalidValue(f"signs are [2B, T], a row an answer: here [{rows}, {width + 1}], not {list(signs.shape)}.")
    losses, metrics = weighted_dpo(stats, (signs > 0).to(stats.kl.dtype), beta=beta)
    signed = (signs[:, 1:] > 0) & stats.mask
    metrics["phrase_tokens"] = sum(by_answer(stats, signed.to(stats.kl.dtype)))
    return losses + alpha * by_answer(stats, stats.kl)[0], metrics


# ---- signs -----------------------------------------------------------------------------------------------------------
def diff_signs(a: Sequence[Hashable], b: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Signs of two answers, given as token ids or as words, without prompt and padding.

    The k-th stretch of `a` that stands in place of another stretch of `b` gets sign k in both. What only one has gets
    none: it stands in place of nothing, and would make a reward of length."""
    signs = [0] * len(a), [0] * len(b)
    number = 0
    for kind, *ends in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "replace":
            number += 1
            for row, (start, stop) in zip(signs, (ends[:2], ends[2:])):
                row[start:stop] = [number] * (stop - start)
    return signs


def diff_spans(a: str, b: str) -> tuple[list[Span], list[Span]]:
    """`diff_signs` of the words of two texts, punctuation marks being words, as spans of characters.

    For tokens that are parts of words: "walking" and "running" then differ as a whole. Writing without spaces between
    words makes one word of a clause."""
    words = [list(WORD.finditer(text)) for text in (a, b)]
    signs = diff_signs(*([word.group() for word in found] for found in words))
    spans = lambda found, row: [(*word.span(), sign) for word, sign in zip(found, row) if sign]
    return spans(words[0], signs[0]), spans(words[1], signs[1])


def unmark(text: str) -> tuple[str, list[Span]]:
    """A text without the tags of its phrases `<MASK>...</MASK>`, of which the k-th gets sign k.

    Raises `InvalidValue` where tags are not in pairs, one behind the other."""
    plain, spans, start, last = "", [], None, 0
    for tag in TAG.finditer(text):
        plain += text[last : tag.start()]
        last = tag.end()
        if ("/" not in tag.group()) == (start is not None):
            raise InvalidValue(f"<MASK> and </MASK> must take turns: {text!r}.")
        if start is None:
            start = len(plain)
        else:
            spans.append((start, len(plain), len(spans) + 1))
            start = None
    if start is not None:
        raise InvalidValue(f"A <MASK> is not closed: {text!r}.")
    return plain + text[last:], spans


def to_tokens(spans: Sequence[Span], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """The sign of each token, from spans of characters; offsets: from and to which character a token goes.

    A token that reaches into a span belongs to it, to the first of several."""
    return [next((sign for a, b, sign in spans if start < b and end > a), 0) for start, end in offsets]

"""Columns of token scores for a data set of pairs: `chosen_weights` and `rejected_weights` of `WeightedDPO` and `TREG`.

pairs = pairs.add_column(...)   # or:
rows = [row | columns for row, columns in zip(pairs, contrast(model, PairCollator(processor), pairs))]

Answers are tokenised once, by the collator that the trainer uses, so that scores and tokens fit. Pictures and clips are
seen by the scorer as by the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vtok.rl.preferences import WEIGHTS, PairCollator, for_models
from vtok.text.align.cdpo import critical_weights
from vtok.text.align.stats import IGNORE, token_stats
from vtok.text.align.treg import BETTER, WORSE, contrast_scores

Row = Mapping[str, Any]


def contrast(
    model: nn.Module, pairs: PairCollator, rows: Iterable[Row], better: str = BETTER, worse: str = WORSE
) -> Iterator[dict[str, list[float]]]:
    """T-REG's scores: for each row both columns. model: the judge, the reference as a rule.

    better, worse: system messages, put in front of the prompt's messages."""
    for row in rows:
        said = [_answers(model, pairs, _told(row, what)) for what in (better, worse)]
        yield {name: contrast_scores(*both).tolist() for name, both in zip(WEIGHTS, zip(*said))}


def critical(
    right: nn.Module, wrong: nn.Module, pairs: PairCollator, rows: Iterable[Row]
) -> Iterator[dict[str, list[float]]]:
    """cDPO's weights of the rejected answer, from models tuned on right and on wrong answers."""
    for row in rows:
        batch, labels = _batch(right, pairs, row)
        with torch.no_grad():
            weights = critical_weights(right(**batch).logits, wrong(**batch).logits, labels)
        yield {WEIGHTS[1]: weights[1][labels[1] != IGNORE].tolist()}


def _told(row: Row, what: str) -> Row:
    return {**row, "prompt": [{"role": "system", "content": what}, *row["prompt"]]}


def _answers(model: nn.Module, pairs: PairCollator, row: Row) -> list[Tensor]:
    """Log-probabilities of the chosen and of the rejected answer's tokens."""
    batch, labels = _batch(model, pairs, row)
    with torch.no_grad():
        stats = token_stats(model(**batch).logits, None, labels)
    return [logp[mask] for logp, mask in zip(stats.logp, stats.mask)]


def _batch(model: nn.Module, pairs: PairCollator, row: Row) -> tuple[dict[str, Tensor], Tensor]:
    given, _ = for_models({name: value.to(model.device) for name, value in pairs([row]).items()})
    return given, given["labels"]

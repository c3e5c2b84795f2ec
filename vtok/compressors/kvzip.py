"""KVzip: the columns without which the model could not repeat its context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.engine.columns import Columns
from vtok.kernels.attention_rows import attention_rows
from vtok.options import AtLeast0, AtLeast1, Keep
from vtok.stages.kv import KV

BLOCK = 64  # rows of attention in memory at a time


@dataclass(frozen=True, kw_only=True)
class KVzip(KV):
    """Behind the prompt the model reads it once more, as if it repeated it, in chunks. Score of a column: the largest
    attention that it gets then, over all rows and the heads of its group (Section 3). It reads no question, so that one
    cache serves many.

    chunk: columns that are repeated at a time. sinks: first columns, which stay.
    even: whether each layer and head group keeps equally many; else the best of all pairs stay, wherever they are.
    ask: ids of the words that ask to repeat, and of the template's turn, in front of each chunk; none if empty. The
        official code says "Repeat the previous context:".
    overlap: columns before a chunk that are repeated with it, but not scored.
    Differs from the paper: without `ask` the repeated tokens alone do the work, as a model has no tokenizer at hand; a
        prompt's pictures are repeated as their embeddings, which is ours.
    Not good for: a cache that is asked once. It costs two to three prefills more.
    """

    name = "kvzip"
    paper = "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416"
    rereads = True
    slow = True
    examples = ({}, {"keep": 8, "even": True, "chunk": 7, "sinks": 1})

    keep: Keep = 0.3
    chunk: AtLeast1 = 2048
    sinks: AtLeast0 = 4
    even: bool = False
    ask: tuple[int, ...] = ()
    overlap: AtLeast0 = 8

    @property
    def least(self) -> int:
        return self.sinks + 1

    def score(self, seen: Columns) -> Tensor:
        """seen: of a repeat, whose queries are the last columns; valid are the columns that it may see."""
        query, key, rows, valid = seen.apart
        best = torch.zeros(valid.shape, device=key.device)
        for part in rows.split(BLOCK, 1):
            held = part.clamp(min=key.shape[2] - query.shape[2])
            attention = attention_rows(query, key, held, seen.scaling, valid)  # [B * G, H / G, r, L]
            attention = attention.masked_fill((part < 0)[:, None, :, None], 0.0)
            best = torch.maximum(best, attention.amax((1, 2)))
        return best.view(seen.valid.shape)

    def stays(self, seen: Columns) -> Tensor:
        return seen.place < self.sinks

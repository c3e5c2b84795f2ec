"""KVzip: the columns without which the model could not repeat its context."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.engine.columns import Columns
from vtok.kernels.attention_rows import attention_rows
from vtok.options import Keep
from vtok.stages.kv import Rereading

BLOCK = 64  # rows of attention in memory at a time


@dataclass(frozen=True, kw_only=True)
class KVzip(Rereading):
    """Behind the prompt the model reads it once more, as if it repeated it, in chunks. Score of a column: the largest
    attention that it gets then, over all rows and the heads of its group (Section 3). It reads no question, so that one
    cache serves many.

    Differs from the paper: the repeated tokens alone do the work unless `ask` is given, since a model has no tokenizer
        at hand, where the official code says "Repeat the previous context:"; a prompt's pictures are repeated as their
        embeddings, which is ours.
    Not good for: a cache that is asked once. It costs two to three prefills more. Bytes: all heads of a layer take as
        many as the one that holds the most; with `even` they hold what `keep` says.
    """

    name = "kvzip"
    paper = "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction, arXiv 2505.23416"
    slow = True
    examples = ({}, {"keep": 8, "even": True, "chunk": 7, "sinks": 1})

    keep: Keep = 0.3

    def score(self, seen: Columns) -> Tensor:
        query, key, rows, valid = seen.apart
        best = torch.zeros(valid.shape, device=key.device)
        for part in rows.split(BLOCK, 1):
            held = part.clamp(min=key.shape[2] - query.shape[2])
            attention = attention_rows(query, key, held, seen.scaling, valid)  # [B * G, H / G, r, L]
            attention = attention.masked_fill((part < 0)[:, None, :, None], 0.0)
            best = torch.maximum(best, attention.amax((1, 2)))
        return best.view(seen.valid.shape)

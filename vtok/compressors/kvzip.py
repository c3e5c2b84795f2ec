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
        queries, length = query.shape[2], key.shape[2]
        repeated = torch.arange(length, device=key.device) >= length - queries
        used = (valid.any(0) | repeated).nonzero()[:, 0]  # a chunk sees few of a long prompt's columns
        key, valid, past = key[:, :, used], valid[:, used], len(used) - queries
        rows = (rows - (length - len(used))).clamp(min=past)  # in the place of padding the first row, once more
        best = torch.zeros(valid.shape, device=key.device)
        for start in range(0, queries, BLOCK):
            end = min(start + BLOCK, queries)
            there = slice(past + end)  # what is behind the block's last row is not seen by any of it
            part = query[:, :, :end], key[:, :, there], rows[:, start:end], seen.scaling, valid[:, there]
            best[:, there] = torch.maximum(best[:, there], attention_rows(*part).amax((1, 2)))
        return best.new_zeros(len(best), length).index_copy(1, used, best).view(seen.valid.shape)

"""Compact sequences and the caches that hold them: gather, restore, masks.

A *position* is an index into the padded input of one forward. A *column* is an index into what a decoder layer really
sees or caches. Compacting keeps the order, and puts the padding that ragged batches need on the left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from vtok.engine.ffn import Copies, Core
from vtok.errors import Unsupported
from vtok.kernels.compact_sequence import kept_last

OTHER_PATCH = "This cache was made under another patch, whose layers hold different tokens. Start a new conversation."


@dataclass(frozen=True)
class Rows:
    """The positions that are present at some decoder layer.

    index: [B, L] long, ascending within a row where valid.
    valid: [B, L] bool; false entries are padding on the left.
    padded: whether any entry of `valid` is false, known on the host.
    visual: [B, L] bool, the visual tokens that may be dropped; None where nobody told.
    """

    index: Tensor
    valid: Tensor
    padded: bool
    visual: Tensor | None = None

    @staticmethod
    def of(keep: Tensor, lengths: list[int]) -> Rows:
        """From keep [B, S] bool and its row sums, which the caller knows on the host."""
        index = kept_last(keep, max(lengths))  # [B, L]
        return Rows(index, keep.gather(1, index), padded=min(lengths) < max(lengths))

    def narrow(self, keep: Tensor, lengths: list[int]) -> tuple[Rows, Tensor]:
        """Keep some of these columns: keep [B, L] bool -> the new rows and the [B, L'] columns to gather."""
        inner = Rows.of(keep & self.valid, lengths)
        visual = None if self.visual is None else self.visual.gather(1, inner.index) & inner.valid
        return Rows(self.index.gather(1, inner.index), inner.valid, inner.padded, visual), inner.index

    def to(self, device: torch.device) -> Rows:
        if self.index.device == device:
            return self
        visual = None if self.visual is None else self.visual.to(device)
        return Rows(self.index.to(device), self.valid.to(device), self.padded, visual)

    def restore(self, hidden: Tensor, length: int) -> Tensor:
        """[B, L, D] -> [B, length, D]: each row back at its position, zero elsewhere."""
        here = self.to(hidden.device)
        hidden = torch.where(here.valid[..., None], hidden, hidden.new_zeros(()))
        full = hidden.new_zeros(hidden.shape[0], length, hidden.shape[2])
        return full.scatter(1, here.index[..., None].expand_as(hidden), hidden)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x [B or 1, L, D] by index [B, L'] -> [B, L', D]."""
    index = index.to(x.device)
    return x.expand(index.shape[0], -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class CompressedCache(DynamicCache):
    """A `DynamicCache` whose layers hold fewer columns than the sequence has tokens.

    `get_seq_length()` is the logical length (all tokens seen, dropped ones too), which is what positions, `generate`
    and chat loops mean by it; the masks are sized by what each layer holds.

    seen: the logical length.
    valid: first layer -> [B, columns] bool for that layer and those up to the next key, or None without padding.
    shift: [B] or None: how far later positions move down, for methods that renumber.
    core: the FFN neurons that text on this cache goes through, or None for all; copies: of their weights, once used.
    """

    seen: int
    valid: dict[int, Tensor | None]
    shift: Tensor | None
    core: Core | None
    copies: Copies | None

    @classmethod
    def adopt(cls, cache: DynamicCache, past_mask: Tensor | None) -> CompressedCache:
        """Turn a plain cache into a compressed one, in place, since the caller goes on using the object it passed."""
        if isinstance(cache, cls):
            return cache
        if type(cache) is not DynamicCache or any(cache.is_sliding):
            raise Unsupported(
                f"Visual tokens can be dropped from a DynamicCache without sliding windows, not from a "
                f"{type(cache).__name__}. Leave `past_key_values` and `cache_implementation` unset."
            )
        cache.__class__ = cls
        cache.seen = DynamicCache.get_seq_length(cache)
        cache.valid = {0: None if past_mask is None else past_mask.bool()}
        cache.shift = cache.core = cache.copies = None
        return cache

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.columns(layer_idx)

    def columns(self, layer_idx: int) -> int:
        """How many columns a layer holds."""
        return DynamicCache.get_seq_length(self, layer_idx)

    def valid_at(self, layer_idx: int) -> Tensor | None:
        """[B, columns] bool of a layer's columns, or None where none is padding."""
        return self.valid[max(first for first in self.valid if first <= layer_idx)]

    def split(self, layer_idx: int) -> None:
        """Let the layers from `layer_idx` on keep their own record of columns."""
        self.valid.setdefault(layer_idx, self.valid_at(layer_idx))

    def extend(self, layer_idx: int, new: Tensor | None, batch: int, q_len: int, device: torch.device) -> Tensor | None:
        """Record the `q_len` columns that the group starting at `layer_idx` is about to receive.

        new: [B, q_len] bool, or None if none is padding. Returns the group's [B, columns + q_len] mask or None."""
        old = self.valid[layer_idx]
        if old is not None or new is not None:
            held = self.columns(layer_idx)
            ones = lambda n: torch.ones(batch, n, dtype=torch.bool, device=device)
            parts = [ones(held) if old is None else old.to(device), ones(q_len) if new is None else new.to(device)]
            self.valid[layer_idx] = torch.cat(parts, 1)
        return self.valid[layer_idx]

    def _map(self, change) -> None:
        self.valid = {first: None if v is None else change(v) for first, v in self.valid.items()}
        self.shift = None if self.shift is None else change(self.shift)
        if self.core is not None:
            before, self.core = self.core, self.core.map(change)
            if self.copies is not None and not self.core.same(before):  # beams move within a prompt, and it stays true
                self.copies = None

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.seen += tokens_to_remove  # negative
            self.valid = {first: None if v is None else v[:, :tokens_to_remove] for first, v in self.valid.items()}

    def reset(self) -> None:
        super().reset()
        self.seen, self.valid, self.shift, self.core, self.copies = 0, {0: None}, None, None, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda v: v.index_select(0, beam_idx.to(v.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda v: v.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda v: v[indices.to(v.device)])


def causal_mask(config, hidden: Tensor, valid: Tensor | None, cache: DynamicCache | None, layer_idx: int):
    """The mask that transformers itself would make for this layer, for the attention implementation in use.

    hidden: [B, Q, D]; valid: [B, columns + Q] bool or None."""
    return create_causal_mask(
        config=config, inputs_embeds=hidden, attention_mask=valid, past_key_values=cache, layer_idx=layer_idx
    )

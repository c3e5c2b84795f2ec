"""Compact sequences and the caches that hold them: gather, restore, masks. transformers' name for a cache stands here.

A *position* is an index into the padded input of one forward. A *column* is an index into what a decoder layer really
sees or caches. Compacting keeps the order, and puts the padding that ragged batches need on the left.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from vtok.errors import PatchStateError, Unsupported
from vtok.kernels.compact_sequence import kept_last

# What transformers calls the cache in keywords and outputs: `past_key_values` up to 5.23, then `cache`.
NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
OTHER_PATCH = "This cache was made under another patch, whose layers hold different tokens. Start a new conversation."

GONE = (
    "Of the tokens that are to be cropped some columns were dropped already, so that others would go in their place. "
    "Work on a copy.deepcopy of the cache, made before they came, or start a new conversation."
)


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

    def column(self, position: Tensor) -> Tensor:
        """[B] the column in which a position [B] of each row is."""
        return ((self.index == position.to(self.index.device)[:, None]) & self.valid).to(torch.uint8).argmax(1)

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


def take(x: Tensor, index: Tensor) -> Tensor:
    """Columns index [B, G, K] of x [B, G, L, d] -> [B, G, K, d]. Copies whole columns, where `gather` goes number by
    number."""
    first = torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2], 1) * x.shape[2]
    rows = (index.to(x.device) + first).flatten()
    return x.reshape(-1, x.shape[3]).index_select(0, rows).view(*index.shape, x.shape[3])


def cache_in(holder: Any) -> Any:
    """The cache in a call's keywords or in a model's output, under either of its names, or None."""
    for name in ("cache", "past_key_values"):
        if (cache := holder.get(name)) is not None:
            return cache
    return None


def with_cache(kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The keywords with this cache, under the name that this transformers reads."""
    return {**{k: v for k, v in kwargs.items() if k not in ("cache", "past_key_values")}, NAME: cache}


class State(ABC):
    """What a stage keeps for a sequence. It lives in the sequence's cache, and follows it."""

    @abstractmethod
    def map(self, change: Callable[[Tensor], Tensor]) -> State:
        """The same where the batch has other rows: `change` picks them of a tensor [B, ...]."""

    def cropped(self, count: int, columns: Callable[[int], int]) -> State:
        """The same without the last `count` tokens, where layer i holds columns(i) columns with theirs. Raises
        `PatchStateError` where some of these are gone already."""
        return self


class CompressedCache(DynamicCache):
    """A `DynamicCache` whose layers hold fewer columns than the sequence has tokens.

    `get_seq_length()` is the logical length (all tokens seen, dropped ones too), which is what positions, `generate`
    and chat loops mean by it; the masks are sized by what each layer holds.

    seen: the logical length.
    firm: the logical length behind which each token that came has a column in each layer, but for what `states` say.
    valid: first layer -> which of the columns of that layer and those up to the next key are not padding: [B, columns]
        bool, or [B, G, columns] where each of G head groups holds columns of its own; None where none is padding.
    states: stage -> what it keeps for the sequence.
    open: whether a patched model's forward is under way. Nothing else may add to the cache, since only that forward
        sizes masks by it.
    """

    seen: int
    firm: int
    valid: dict[int, Tensor | None]
    states: dict[str, State]
    open: bool

    @classmethod
    def adopt(cls, cache: DynamicCache, past_mask: Tensor | None) -> CompressedCache:
        """Turn a plain cache into a compressed one, in place, since the caller goes on using the object it passed."""
        if isinstance(cache, cls):
            return cache
        offloaded = getattr(cache, "offloading", False)  # layers are being copied away while columns would be dropped
        if type(cache) is not DynamicCache or offloaded:
            kind = "DynamicCache that is offloaded" if offloaded else type(cache).__name__
            raise Unsupported(
                f"Columns can be dropped from a DynamicCache, not from a {kind}. Leave `past_key_values` and "
                f"`cache_implementation` unset."
            )
        cache.__class__ = cls
        cache.seen = DynamicCache.get_seq_length(cache)
        cache.valid = {0: None if past_mask is None else past_mask.bool()}
        cache.states, cache.open, cache.firm = {}, False, 0
        return cache

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.open:
            raise PatchStateError(
                "This cache holds a compressed prompt, and the model that is given it is not patched (any more). Patch "
                "it again, or start a new conversation."
            )
        return super().update(*args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.columns(layer_idx)

    def columns(self, layer_idx: int) -> int:
        """How many columns a layer holds, or was given, where it holds a window of them."""
        return DynamicCache.get_seq_length(self, layer_idx)

    def valid_at(self, layer_idx: int) -> Tensor | None:
        """`valid` of the group in which a layer is."""
        return self.valid[max(first for first in self.valid if first <= layer_idx)]

    def split(self, layer_idx: int) -> None:
        """Let the layers from `layer_idx` on keep their own record of columns."""
        self.valid.setdefault(layer_idx, self.valid_at(layer_idx))

    def extend(self, layer_idx: int, new: Tensor | None, batch: int, q_len: int, device: torch.device) -> Tensor | None:
        """Record the `q_len` columns that the group starting at `layer_idx` is about to receive.

        new: [B, q_len] bool, or None if none is padding. Returns the group's `valid`, with them."""
        old = self.valid[layer_idx]
        if old is not None or new is not None:
            held = self.columns(layer_idx)
            ones = lambda n: torch.ones(batch, n, dtype=torch.bool, device=device)
            old = ones(held) if old is None else old.to(device)
            new = ones(q_len) if new is None else new.to(device)
            if old.ndim == 3:
                new = new[:, None].expand(-1, old.shape[1], -1)
            self.valid[layer_idx] = torch.cat([old, new], -1)
        return self.valid[layer_idx]

    def keep(self, layer_idx: int, index: Tensor, valid: Tensor | None = None) -> None:
        """Hold these columns of a layer alone, and free the others.

        layer_idx: a layer with a record of its own (`split`), as that of the next. index: [B, K] long, or [B, G, K]
        where each of the layer's G key-value heads keeps columns of its own. Ascending, so that time order stays.
        valid: [B, K] or [B, G, K] bool, where rows or heads keep fewer than K; false ones are padding on the left. Else
        a column is padding that was."""
        if layer_idx not in self.valid or (layer_idx + 1 < len(self.layers) and layer_idx + 1 not in self.valid):
            raise PatchStateError(f"Layer {layer_idx} shares its record of columns with others: split the cache first.")
        layer, known = self.layers[layer_idx], self.valid[layer_idx]
        heads = layer.keys.shape[1]
        places = index if index.ndim == 3 else index[:, None].expand(-1, heads, -1)  # [B, G, K]
        for name in ("keys", "values"):
            held = getattr(layer, name)  # [B, G, L, d]
            setattr(layer, name, take(held, places))
        if valid is None and known is not None:
            if known.ndim < index.ndim:
                known = known[:, None].expand(-1, heads, -1)
            valid = known.gather(-1, (index if known.ndim == index.ndim else places).to(known.device))
        self.valid[layer_idx] = valid

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, forwards of the engine's own add columns, which are gone at the end."""
        valid, seen, held = dict(self.valid), self.seen, [self.columns(i) for i in range(len(self.layers))]
        self.open = True
        try:
            yield
        finally:
            del self.layers[len(held) :]
            for i, layer in enumerate(self.layers):
                if more := self.columns(i) - held[i]:
                    layer.crop(-more)
            self.valid, self.seen, self.open = valid, seen, False

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.valid = {first: None if v is None else change(v) for first, v in self.valid.items()}
        self.states = {stage: state.map(change) for stage, state in self.states.items()}

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0:  # others are refused
            whole = all(self.columns(i) == self.seen for i in range(len(self.layers)))
            if self.seen + tokens_to_remove < self.firm and not whole:
                raise PatchStateError(GONE)
            self.states = {name: s.cropped(-tokens_to_remove, self.columns) for name, s in self.states.items()}
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self.seen += tokens_to_remove  # negative
            self.valid = {first: None if v is None else v[..., :tokens_to_remove] for first, v in self.valid.items()}

    def reset(self) -> None:
        super().reset()
        self.seen, self.firm, self.valid, self.states = 0, 0, {0: None}, {}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map(lambda v: v.index_select(0, beam_idx.to(v.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map(lambda v: v.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map(lambda v: v[indices.to(v.device)])


def causal_mask(
    config, hidden: Tensor, valid: Tensor | None, cache: DynamicCache | None, layer_idx: int, tree: Tensor | None = None
):
    """The mask that transformers itself would make for this layer, for the attention implementation in use.

    hidden: [B, Q, D]; valid: [B, columns + Q] bool or None; [B, G, columns + Q] where each head group has columns of
    its own, for which transformers knows no mask: [B, H, Q, columns + Q], for SDPA and eager attention. tree: [Q, Q]
    bool, which new columns see which, where that is not the earlier ones."""
    if valid is None and hidden.shape[1] == 1:
        return None  # one token, which sees all
    if tree is None and (valid is None or valid.ndim == 2):
        how = {"config": config, "inputs_embeds": hidden, "attention_mask": valid, "layer_idx": layer_idx, NAME: cache}
        return create_causal_mask(**how)
    if config._attn_implementation not in ("sdpa", "eager"):
        raise Unsupported(
            f"Drafts in a tree and head groups that hold different columns need a mask that "
            f"{config._attn_implementation} does not take: use attn_implementation='sdpa'."
        )
    batch, queries = hidden.shape[:2]
    if valid is None:
        valid = torch.ones(batch, cache.columns(layer_idx) + queries, dtype=torch.bool)
    if valid.ndim == 3:
        valid = valid.repeat_interleave(config.num_attention_heads // valid.shape[1], 1)
    if tree is None:
        tree = torch.ones(queries, queries, dtype=torch.bool).tril()
    return tree_mask(tree, valid.to(hidden.device), hidden.dtype)


def tree_mask(tree: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask of new columns that see the cache, and each other as a tree says.

    tree: [N, N] bool: [i, j], whether the i-th new column sees the j-th. valid: [B, L + N] bool, no padding; or
    [B, H, L + N] where heads differ. Returns [B, 1 or H, N, L + N]: 0 where it is seen, elsewhere the lowest number."""
    valid = valid[:, None] if valid.ndim == 2 else valid
    seen = valid[:, :, None].repeat(1, 1, len(tree), 1)
    seen[..., -len(tree) :] &= tree.to(valid.device)
    return torch.zeros(seen.shape, dtype=dtype, device=valid.device).masked_fill_(~seen, torch.finfo(dtype).min)


def settle(cache: DynamicCache, new: int, route: list[int]) -> None:
    """Of the `new` last columns, a tree of drafts, hold the accepted ones alone: `route`, ascending, from 0 on."""
    kept, contiguous = len(route), route == list(range(len(route)))
    pick = lambda x, dim: x.index_select(dim, torch.tensor(route, device=x.device) + x.shape[dim] - new)
    for layer in cache.layers:
        if not layer.is_initialized:  # shares another layer's
            continue
        for name in ("keys", "values"):
            held = getattr(layer, name)  # [B, G, L + new, d]
            past = held.shape[2] - new
            if not contiguous:
                held[:, :, past : past + kept] = pick(held, 2)
            setattr(layer, name, held[:, :, : past + kept])
    if isinstance(cache, CompressedCache):
        cache.seen -= new - kept
        cut = lambda v: torch.cat([v[..., : v.shape[-1] - new], pick(v, v.ndim - 1)], -1)
        cache.valid = {first: None if v is None else cut(v) for first, v in cache.valid.items()}

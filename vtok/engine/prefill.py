"""A forward that brings a prompt: what is visual, where prompts end, what stages keep, the sequence made compact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import find_packed_sequence_indices

from vtok.adapter import Encoded, Placed
from vtok.engine import prompt
from vtok.engine.cache import Rows, cache_in, gather
from vtok.engine.decoder import Pass
from vtok.engine.encode import Read
from vtok.engine.replay import Replay
from vtok.engine.stopwatch import Stopwatch
from vtok.engine.trace import Picture, Trace
from vtok.errors import Unsupported
from vtok.kernels.compact_sequence import compact_sequence
from vtok.types import Question

if TYPE_CHECKING:
    from vtok.engine.forward import Call, Engine


class Prefill:
    """What is known of such a forward, and what stages decide on it.

    batch, length: B, S of the padded input. valid, visual: [B, S] bool. pictures: in the order of the call.
    probed: for each of them what compressors asked of the encoder. prompts: where its prompts end.
    Stages change: flat [B * S, D], the embeddings; kept [B * S] bool, what enters the language model; countable
    [B * S] bool, visual tokens that were chosen, and may be dropped later; late, late_row: see `Adapter.late_features`;
    positions: [B or 1, S] or [3 or 4, B or 1, S]. replay: what to keep, where that is not to be chosen anew.
    """

    def __init__(self, engine: Engine, module: nn.Module, call: Call, kwargs: dict[str, Any], cache: Any) -> None:
        self.engine, self.module, self.call = engine, module, call
        self.embeds: Tensor = kwargs["inputs_embeds"]
        self.batch, self.length, width = self.embeds.shape
        self.device, self.cache = self.embeds.device, cache
        self.stopwatch = Stopwatch(self.device)
        mask = call.mask_in(kwargs)
        check_mask(mask)
        refuse_packed(kwargs, mask, cache)
        self.valid = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        if mask is not None:
            self.valid = mask[:, -self.length :].bool()
        self.visual, self.pictures = locate(engine, call, self.embeds)
        # beside the pictures, not in them: a trace is kept, and must not hold the encoder's states
        self.probed: list[Mapping[Read, Tensor]] = [
            x for encoded in call.encoded.values() for x in encoded.probed or [{}] * len(encoded.layouts)
        ]
        seen = cache.get_seq_length() if cache is not None else 0
        self.prompts = prompt.locate(call.told, self.valid, self.visual, seen, max(1, len(self.pictures)))
        self.stages = engine.stages if self.pictures else [stage for stage in engine.stages if stage.on_text]
        self.flat = self.embeds.reshape(self.batch * self.length, width)
        self.kept = (self.valid & (~self.visual | self.prompts.needed)).view(-1)
        self.countable = torch.zeros_like(self.kept)
        self.late = engine.adapter.late_features(kwargs) if engine.active or cache is not None else {}
        self.late_row = (self.visual.view(-1).cumsum(0) - 1).masked_fill(~self.visual.view(-1), -1)
        self.positions = engine.positions(kwargs.get("position_ids"), cache, self.length, self.device)
        self.state: dict[str, Any] = {}  # stage -> what it keeps until the language model runs
        self.chosen = False  # whether a stage chose among the tokens of pictures
        self._asked: dict[str, Tensor] = {}
        self.told: dict[str, Any] = {}
        recorded = engine.local.recorded
        self.replay = None if recorded is None else Replay.on(self, recorded.next(self.batch))

    def groups(self) -> list[list[int]]:
        """The pictures of one layout together."""
        groups: dict[Any, list[int]] = {}
        for i, picture in enumerate(self.pictures):
            groups.setdefault((picture.modality, picture.dense, picture.layout), []).append(i)
        return list(groups.values())

    def ask(self, name: str, numbers: Tensor) -> None:
        """Have whole numbers told on the host, as nested lists in `told[name]`, with the one wait for the device."""
        self._asked[name] = numbers

    def wait(self) -> None:
        """The one wait for the device: how long the compacted rows are, and what stages asked for."""
        flat = torch.cat([numbers.reshape(-1).long() for numbers in self._asked.values()]).tolist()
        for name, numbers in self._asked.items():
            values, flat = flat[: numbers.numel()], flat[numbers.numel() :]
            if numbers.ndim == 2:
                values = [values[i : i + numbers.shape[1]] for i in range(0, len(values), numbers.shape[1])]
            self.told[name] = values

    def select(self) -> tuple[Tensor, Tensor]:
        """Stages choose. Returns keep and droppable, each [B, S] bool."""
        for stage in self.stages:
            stage.select(self)
        if not self.chosen:
            self.keep_all()
        keep = self.kept.view(self.batch, self.length) & self.valid
        droppable = self.countable.view(self.batch, self.length) & ~self.prompts.needed
        self.ask("lengths", keep.sum(1))
        self.ask("stays", (keep & ~droppable).flip(1).long().cumprod(1).sum(1).amin()[None])  # of the last tokens
        first = [picture.tokens[0] for picture in self.pictures]
        self.ask("owners", torch.stack(first) // self.length if first else self.prompts.turns.new_empty(0))
        self.ask("unclear", self.prompts.unclear)
        self.ask("turns", self.prompts.turns)
        call, ids = self.call, self.engine.token_ids
        filled = {ids[modality] for modality in call.encoded}  # families may have one placeholder for all
        absent = [modality for modality, token in ids.items() if token not in filled]
        self.ask("unfilled", torch.stack([torch.zeros_like(keep).any(), *(call.places(m).any() for m in absent)]))
        for stage in self.stages:
            stage.count(self, keep, droppable)
        self.wait()
        return keep, droppable

    def keep_all(self) -> None:
        """All tokens of all pictures enter the language model."""
        for picture in self.pictures:
            self.kept[picture.tokens] = True
            self.kept[picture.separators] = True
            self.countable[picture.tokens] = True

    def picture_of_token(self) -> tuple[Tensor, int]:
        """[B, S] which of its sample's pictures (from 0) a token belongs to, -1 for text; and the most that one has.
        Only when it is told who owns them."""
        owners = self.told["owners"]
        order = [owners[:i].count(owner) for i, owner in enumerate(owners)]  # of each picture in its sample
        picture = torch.full((self.batch * self.length,), -1, device=self.device)
        for place, rank in zip(self.pictures, order):
            picture[place.tokens] = rank
        return picture.view(self.batch, self.length), max(order) + 1

    @cached_property
    def question(self) -> Question:
        """What each row of the batch asks. Waits for the device: only the prompt says how long that is."""
        place = torch.arange(self.length, device=self.device)
        end = self.prompts.ends[:, 0]
        text = self.valid & ~self.visual & (place <= end[:, None])
        behind = text & (self.visual.flip(1).cumsum(1).flip(1) == 0)
        text = torch.where(behind.any(1, keepdim=True), behind, text)
        index = (~text).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(text.sum(1).max()))]
        ids = None if self.call.input_ids is None else self.call.input_ids.gather(1, index)
        return Question(text.gather(1, index), gather(self.embeds, index).detach(), None, ids)

    @cached_property
    def read_question(self) -> Question:
        """The same, with the states of the language model that reads it."""
        # no hooks: this is not the forward that was called. Padding is on the right, where no token sees it
        with torch.no_grad():
            read = self.module.forward(inputs_embeds=self.question.embeds, use_cache=False, return_dict=True)
        return replace(self.question, states=read.last_hidden_state)


def prefill(engine: Engine, module: nn.Module, call: Call, kwargs: dict[str, Any], cache: Any) -> dict[str, Any]:
    """The keywords with which the language model runs on what is kept. cache: the sequence's, already compressed."""
    seen = Prefill(engine, module, call, kwargs, cache)
    keep, droppable = seen.select()
    engine.check_prompts(seen.told, seen.replay is not None)
    if seen.replay is None:
        engine.warn_of_rounding(seen.embeds.dtype)
    if engine.active and (kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False)):
        raise Unsupported("output_attentions is not available while tokens are dropped: its shape would change.")
    present: dict[int, Rows] = {}  # grows as decoder layers prune
    parts = {stage.name: part for stage in seen.stages if (part := stage.part(seen)) is not None}
    engine.note(
        Trace(
            engine.shapes,
            tuple(seen.pictures),
            tuple(seen.told["owners"]),
            seen.batch,
            seen.length,
            seen.valid.sum(1),
            present,
            seen.embeds.itemsize,
            seen.stopwatch,
            parts,
        )
    )
    lengths = seen.told["lengths"]
    if not engine.active and cache is None:
        present[0] = Rows.of(keep, lengths)
        return kwargs
    p = Pass(module.config, seen.stages, cache, seen.batch, seen.length, present, seen.prompts)
    p.parts, p.told = parts, call.told
    p.stopwatch, p.late, p.late_row = seen.stopwatch, seen.late, seen.late_row.view(seen.batch, seen.length)
    index, there, embeds, positions, may_go = compact_sequence(
        keep, max(lengths), seen.flat.view_as(seen.embeds), seen.positions, droppable
    )
    present[0] = Rows(index, there, min(lengths) < max(lengths), may_go)
    if call.blocks is not None:
        blocks = call.blocks[:, -seen.length :].to(index.device)
        blocks = torch.nn.functional.pad(blocks, (0, seen.length - blocks.shape[1]), value=-1)  # of a prompt alone
        p.blocks = blocks.gather(1, index).masked_fill(~there, -1)
    for stage in seen.stages:
        stage.begin(seen, p)
    if cache is not None:
        engine.check_cache(p)
        if (stays := seen.told["stays"][0]) < seen.length:
            cache.firm = cache.seen + seen.length - stays
    call.passing = p
    return engine.run_on(p, {**kwargs, "inputs_embeds": embeds, "position_ids": positions})


def check_mask(mask: Any) -> None:
    """Raise `Unsupported` for a mask that is no [batch, length] tensor."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise Unsupported(
            "A prepared attention mask (4-D or a dict, as static caches and packing make it) cannot be compacted. "
            "Pass a [batch, length] mask or none, and use the default dynamic cache."
        )


def refuse_packed(kwargs: dict[str, Any], mask: Tensor | None, cache: Any) -> None:
    """Raise `Unsupported` where positions of one row belong to several sequences."""
    positions = kwargs.get("position_ids")
    held = cache_in(kwargs) if cache is None else cache
    if positions is None or mask is not None or held is not None or (positions.ndim == 3 and len(positions) == 3):
        return
    if find_packed_sequence_indices(positions[0] if positions.ndim == 3 else positions) is not None:
        raise Unsupported("Packed sequences cannot be compressed: pass padded rows with an attention_mask.")


def locate(engine: Engine, call: Call, embeds: Tensor) -> tuple[Tensor, list[Picture]]:
    """Which places are visual, [B, S] bool, and for each picture where its tokens are in the flattened batch."""
    batch, length, _ = embeds.shape
    visual = torch.zeros(batch, length, dtype=torch.bool, device=embeds.device)
    pictures: list[Picture] = []
    for modality, encoded in call.encoded.items():
        here = call.places(modality)
        visual |= here
        sizes = [layout.n_rows for layout in encoded.layouts]
        where = torch.nonzero_static(here.view(-1), size=sum(sizes)).squeeze(1)
        if encoded.previews is not None:  # a wait for the device: only the prompt knows which views are a picture
            tokens = partial(_tokens, call.input_ids, embeds)
            encoded = call.encoded[modality] = engine.adapter.join(encoded, Placed(where, sizes, length, tokens))
            sizes = [layout.n_rows for layout in encoded.layouts]
        pictures += [_picture(modality, encoded, i, rows) for i, rows in enumerate(where.split(sizes))]
    return visual, pictures


def _tokens(ids: Tensor | None, embeds: Tensor, places: Tensor) -> Tensor:
    """[K] a number for the token at each of places [K] of the flattened batch, that of a neighbour beyond its ends."""
    places = places.clamp(0, embeds.shape[0] * embeds.shape[1] - 1)
    if ids is not None:
        return ids.view(-1)[places]
    return torch.unique(embeds.flatten(0, 1)[places], dim=0, return_inverse=True)[1]


def _picture(modality: str, encoded: Encoded, i: int, rows: Tensor) -> Picture:
    """The i-th picture of a modality, whose placeholders are `rows` in the flattened batch."""
    dense = encoded.layouts[i]
    place = dense.place.to(rows.device)
    separators = dense.separator_place
    layout, source = dense, None
    if encoded.small is not None:
        layout, source = encoded.small[i], encoded.sources[i]
        if dense.separators:
            separators = separators[dense.separators_of(source.cpu())]
        source = source.to(rows.device)
        place = place[source]
    into = encoded.merged_into[i] if encoded.merged_into is not None else None
    return Picture(modality, dense, layout, rows, rows[place], rows[separators.to(rows.device)], source, into)

"""Between the encoder and the language model: some of a picture's tokens enter it."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from vtok.calibration import Auto, Calibration
from vtok.compressor import Compressor
from vtok.engine.cache import State
from vtok.engine.decoder import Pass
from vtok.engine.encode import Read
from vtok.engine.prefill import Prefill
from vtok.engine.trace import Part
from vtok.errors import InvalidValue, Unsupported
from vtok.options import Keep
from vtok.stages.stage import Site, Stage
from vtok.types import Layout, Question, Selection, VisualTokens, keep_count, mean_of_members, sum_of_members


@dataclass(frozen=True, kw_only=True)
class PreLLM(Compressor):
    """A method that chooses among the tokens of pictures before the language model.

    keep: fraction or count of a picture's tokens; "auto": as many as the picture needs, see `vtok.calibration`.
    calibration: with keep="auto", the file that `vtok calibrate` wrote of this method and this model.
    renumber: kept tokens get consecutive positions instead of their own, and the text behind them moves up. Only for
        one-dimensional RoPE.
    """

    stage = "pre_llm"
    merges: ClassVar[bool] = False  # True if kept tokens get new features, through which gradient must flow

    keep: Keep | Auto = 0.25
    calibration: str | os.PathLike[str] | None = field(default=None, repr=False)
    renumber: bool = False
    _calibrated: Calibration | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep == "auto":
            object.__setattr__(self, "_calibrated", self._read())

    def _read(self) -> Calibration:
        if self.calibration is None:
            raise InvalidValue(
                f"keep='auto' needs a calibration: run `vtok calibrate MODEL --compressor {self.name} --loss 0.02 "
                f"--out FILE`, then vtok.patch(model, {self.name!r}, keep='auto', calibration=FILE)."
            )
        found = Calibration.read(self.calibration)
        if found.method != self.name:
            raise InvalidValue(f"{str(self.calibration)!r} is a calibration of {found.method}, not of {self.name}.")
        return found

    @property
    def adaptive_now(self) -> bool:
        return super().adaptive_now or self._calibrated is not None

    def for_each(self, features: Tensor) -> list[PreLLM]:
        """The compressor for each of G pictures [G, n, D]: with keep="auto" one that keeps what the picture needs."""
        if self._calibrated is None:
            return [self] * len(features)
        keeps = self._calibrated.of(features)
        of_keep = {keep: replace(self, keep=keep) for keep in set(keeps)}
        return [of_keep[keep] for keep in keeps]

    @property
    def reads_prompt_end(self) -> bool:
        return bool(self.needs_now & {"question", "question_embeds"})  # the text up to there

    @abstractmethod
    def select(self, tokens: VisualTokens) -> Selection:
        """Choose among the tokens of B pictures of one layout."""

    def count(self, layout: Layout) -> int | None:
        """How many of the layout's tokens `select` keeps, known without seeing any; None where their content decides,
        see `adaptive_now`. `keep` of all tokens of a picture, rounded down, unless overridden."""
        return None if self.adaptive_now else keep_count(layout.n, self.keep)


@dataclass(frozen=True)
class Placed:
    """What a compressor leaves of G pictures of one layout, with the separators of their family.

    keep: [G, n_rows] bool, which of a picture's placeholders stay. rows: [G, n_rows, D], what enters at them.
    """

    keep: Tensor
    rows: Tensor
    selection: Selection


def select(
    compressor: PreLLM,
    features: Tensor,
    layout: Layout,
    encoder: Mapping[Read, Tensor] | None = None,
    question: Question | None = None,
) -> Selection:
    """Ask a compressor about G pictures of one layout. features: [G, n, D]; encoder, question: see `VisualTokens`."""
    encoder = encoder or {}
    tokens = VisualTokens(features, layout, encoder.get(("cls_attention", -1)), encoder, question)
    with torch.set_grad_enabled(torch.is_grad_enabled() and compressor.merges):
        return compressor.select(tokens)


def place(compressor: PreLLM, rows: Tensor, layout: Layout, encoder: Mapping[Read, Tensor] | None = None) -> Placed:
    """What is left of G pictures as the family's encoder method gives them, for an engine that has no prompt at hand.

    rows: [G, n_rows, D], tokens and separators in the order of the prompt's placeholders. Raises `Unsupported` with
    keep="auto": ask it `for_each`."""
    if compressor.keep == "auto":
        raise Unsupported("keep='auto' gives each picture a compressor of its own: compressor.for_each(features).")
    at, separators = layout.place.to(rows.device), layout.separator_place.to(rows.device)
    selection = select(compressor, rows[:, at], layout, encoder)
    keep = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    keep[:, at], keep[:, separators] = selection.keep, True
    if selection.features is not None:
        rows = rows.index_copy(1, at, selection.features.to(rows.dtype))
    return Placed(keep, rows, selection)


class PreLLMStage(Stage[PreLLM]):
    name = "pre_llm"

    def __init__(self, compressor: PreLLM, site: Site) -> None:
        super().__init__(compressor, site)
        self._each: list[PreLLM] = []
        rope = getattr(site.config.get_text_config(), "rope_parameters", None) or {}
        if compressor.renumber and "mrope_section" in rope:
            family = site.adapter.family
            raise Unsupported(f"{compressor.name}(renumber=True) has no meaning for the M-RoPE of {family}.")

    def each(self, compressors: list[PreLLM]) -> None:
        """Let each picture of a forward have a compressor of its own."""
        self._each = compressors

    def _groups(self, prefill: Prefill) -> Iterator[tuple[PreLLM, list[int]]]:
        """Pictures of one layout for which one compressor acts."""
        each = self._each
        if each and len(each) != len(prefill.pictures):
            n = len(prefill.pictures)
            raise InvalidValue(f"using() was given {len(each)} values, and this call has {n} pictures.")
        again = prefill.replay is not None and self.compressor.replays
        for members in prefill.groups():
            of = dict.fromkeys(members, self.compressor) | {i: each[i] for i in members if each}
            if not again and (auto := [i for i in members if of[i].keep == "auto"]):
                with prefill.stopwatch:
                    features = torch.stack([prefill.flat[prefill.pictures[i].tokens] for i in auto])
                    of |= dict(zip(auto, of[auto[0]].for_each(features)))
            left = dict(of)
            while left:  # compressors need not be hashable
                compressor = next(iter(left.values()))
                yield compressor, [i for i in members if of[i] == compressor]
                left = {i: one for i, one in left.items() if one != compressor}

    def select(self, prefill: Prefill) -> None:
        prefill.chosen = True
        merged: dict[int, tuple[Tensor, Tensor | None]] = {}
        for compressor, members in self._groups(prefill):
            first = prefill.pictures[members[0]]
            tokens = torch.stack([prefill.pictures[i].tokens for i in members])  # [G, n] flat positions
            separators = torch.stack([prefill.pictures[i].separators for i in members])
            probed = [prefill.probed[i] for i in members]
            encoder = {key: torch.stack([x[key] for x in probed]) for key in probed[0]}
            with prefill.stopwatch:
                question = None
                if prefill.replay is not None and compressor.replays:
                    selection = self._again(prefill, members, tokens)
                else:
                    if self.compressor.reads_prompt_end:
                        read = "question" in self.compressor.needs_now
                        question = prefill.read_question if read else prefill.question
                        question = question.rows(tokens[:, 0] // prefill.length)
                    selection = select(compressor, prefill.flat[tokens], first.layout, encoder, question)
            prefill.kept[separators.flatten()] = True
            prefill.kept[tokens.flatten()] |= selection.keep.flatten()
            prefill.countable[tokens.flatten()] = selection.keep.flatten()
            if selection.features is not None:
                _replace(prefill, tokens, selection)
            if selection.merged_into is not None:
                weights = [None] * len(members) if selection.weight is None else selection.weight
                merged |= {i: (selection.merged_into[g], weights[g]) for g, i in enumerate(members)}
        prefill.state[self.name] = merged

    def _again(self, prefill: Prefill, members: list[int], tokens: Tensor) -> Selection:
        """What is recorded of pictures of one layout, tokens [G, n] flat positions."""
        device = tokens.device
        keep = torch.stack([prefill.replay.mask(i, 0) for i in members]).to(device)
        recorded = [prefill.replay.part(self.name, i) for i in members]
        if recorded[0] is None:
            return Selection(keep)
        into, weight = (None if x[0] is None else torch.stack(x).to(device) for x in zip(*recorded))
        x = prefill.flat[tokens]
        features = mean_of_members(x, into) if weight is None else sum_of_members(x, into, weight)
        return Selection(keep, features=features, merged_into=into, weight=weight)

    def count(self, prefill: Prefill, keep: Tensor, droppable: Tensor) -> None:
        prefill.positions = self._shifted(prefill.cache, prefill.positions)
        if not self.compressor.renumber:
            return
        dropped = (prefill.valid & ~keep).long()
        prefill.positions = prefill.positions - dropped.cumsum(1)
        if prefill.cache is not None:
            before = prefill.cache.states.get(self.name)
            amount = dropped.sum(1) if before is None else before.amount + dropped.sum(1)
            prefill.cache.states[self.name] = Shift(amount)

    def resume(self, p: Pass, positions: Tensor) -> Tensor:
        return self._shifted(p.cache, positions)

    def _shifted(self, cache, positions: Tensor) -> Tensor:
        """Positions [B or 1, S], less what renumbering took from those before."""
        shift = cache.states.get(self.name) if cache is not None else None
        return positions if shift is None else positions - shift.amount[:, None]

    def part(self, prefill: Prefill) -> Part:
        return Merged(prefill.state[self.name])


def _replace(prefill: Prefill, tokens: Tensor, selection: Selection) -> None:
    """Kept tokens enter with new features, and late ones are those of all that they stand for."""
    features = selection.features.flatten(0, 1).to(prefill.flat.dtype)
    prefill.flat = prefill.flat.index_copy(0, tokens.flatten(), features)
    if selection.merged_into is None:
        return
    for layer, late in prefill.late.items():
        rows = prefill.late_row[tokens].to(late.device)
        means = mean_of_members(late[rows], selection.merged_into.to(late.device))
        prefill.late[layer] = late.index_copy(0, rows.flatten(), means.flatten(0, 1))


@dataclass(frozen=True)
class Shift(State):
    """How far later positions of a sequence move down, `amount` [B]."""

    amount: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Shift:
        return Shift(change(self.amount))


@dataclass(frozen=True)
class Merged(Part):
    of: dict[int, tuple[Tensor, Tensor | None]]  # picture -> `Selection.merged_into` and `weight`

    def merged_into(self, picture: int) -> Tensor | None:
        return self.of[picture][0] if picture in self.of else None

    def recorded(self, sample: int, pictures: Sequence[int]) -> list[tuple[Tensor, Tensor | None] | None]:
        here = [self.of.get(i) for i in pictures]
        return [x if x is None else tuple(None if t is None else t.cpu() for t in x) for x in here]

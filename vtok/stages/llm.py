"""In the language model: visual tokens are dropped between decoder layers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.engine import ffn
from vtok.engine.cache import Rows
from vtok.engine.columns import uniform
from vtok.engine.decoder import Pass, Seen
from vtok.engine.ffn import Visit
from vtok.engine.prefill import Prefill
from vtok.engine.probe import check_shown
from vtok.engine.trace import Part
from vtok.stages.stage import Site, Stage
from vtok.types import Activations, Attention, Entered, mean_of_members, ranks


@dataclass(frozen=True, kw_only=True)
class InLLM(Compressor):
    """A method that drops visual tokens behind decoder layers, by what it observes there.

    anchor: whose attention or activations count: "prompt_end", the prompt's last token, or "after_visual", the first
        text token behind the last visual one, which every forward can find. Never "the last position": in a training
        forward that is a token of the answer.
    ranking: "own", or "random", the control: as many tokens stay behind each layer, drawn by their places alone. What
        a method gains over it is what its scores are worth.
    """

    stage = "llm"
    text_guided = True
    movable = True

    anchor: Literal["prompt_end", "after_visual"] = "prompt_end"
    ranking: Literal["own", "random"] = "own"

    @property
    def reads_prompt_end(self) -> bool:
        return self.anchor == "prompt_end"

    @abstractmethod
    def schedule(self, n_layers: int) -> dict[int, float | int | None]:
        """Layer index -> what `keep` of the sample's visual tokens remains after that decoder layer; None where the
        score itself decides, and those remain whose score is above 0."""

    @abstractmethod
    def score(self, seen: Attention | Activations) -> Tensor:
        """[B, L] importance of each key at a layer of the schedule; only the entries of visual tokens are used. `seen`
        is what the compressor needs of the layer: "attention" or "ffn"."""

    def rank(self, seen: Attention | Activations) -> Tensor:
        """[B, L] by what tokens are ranked: the score, unless that says no more than which of them stay."""
        return self.score(seen)

    @property
    def joins(self) -> bool:
        """Whether `join` merges tokens that go into ones that stay."""
        return False

    @property
    def replays(self) -> bool:
        return super().replays and not self.joins  # what was merged is not recorded

    def join(self, hidden: Tensor, rank: Tensor, there: Sequence[int] | None, remaining: Sequence[int]) -> Tensor:
        """[B, L] long: the column into whose hidden state each visual token is merged behind a layer of the schedule,
        itself where it stays, -1 where it is gone. As many stay as remain: the best, unless overridden.

        hidden: [B, L, D] behind the layer. rank: [B, L] of each visual token by its score, the best first; L for
        others. there, remaining: how many visual tokens of each sample there are, None where a score said so, and are
        to be."""
        own = torch.arange(rank.shape[1], device=rank.device)
        return torch.where(rank < torch.tensor(remaining, device=rank.device)[:, None], own, -1)

    def check_depth(self, n_layers: int) -> None:
        """Raise `InvalidValue` where an option was found on a decoder of another depth."""

    def remaining(self, n: int, keep: float | int, images: int) -> int:
        """How many of a sample's `n` visual tokens, those of `images` pictures, a value of `schedule()` means."""
        return min(n, keep * images if isinstance(keep, int) else math.floor(n * keep + 1e-9))


@dataclass
class Dropping:
    """What an in-LLM stage keeps for one forward.

    schedule: layer -> visual tokens after it, of each turn of each sample, or None where the score says. idle: layers
    of it after which no sample drops any. text: tokens of each sample that stay. anchors: [B] of each turn.
    instruction: [B, S] bool of each turn, and its row sums. hidden: [B, L, D], what enters a layer of the schedule,
    until its attention was observed. scores: layer -> [B, L]. entering: visual tokens before the first layer, as in
    schedule. joined: layer -> [B, L], what `InLLM.join` said behind it. replayed: layer -> [B, S] bool, the visual
    tokens that stay behind it, and how many of each sample, where that is recorded.
    """

    schedule: dict[int, list[list[int]] | None]
    idle: set[int]
    text: list[int]
    anchors: list[Tensor]
    instruction: list[tuple[Tensor, list[int]]]
    pictures: Tensor | None = None  # [B, S] which of its sample's pictures a visual token belongs to, -1 for text
    most: int = 0  # pictures of a sample at most
    hidden: Tensor | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)
    entering: list[list[int]] = field(default_factory=list)
    joined: dict[int, Tensor] = field(default_factory=dict)
    replayed: dict[int, tuple[Tensor, list[int]]] = field(default_factory=dict)

    def before(self, layer: int) -> list[list[int]] | None:
        """How many visual tokens of each turn of each sample there are up to a layer of the schedule; None where a
        score said so."""
        return next((n for at, n in reversed(self.schedule.items()) if at < layer), self.entering)


@dataclass(frozen=True)
class Joined(Part):
    """layers: decoder layer -> the tokens present before it, and the columns into which they were merged."""

    layers: dict[int, tuple[Rows, Tensor]] = field(default_factory=dict)
    length: int = 0  # S, of the padded input

    def joined(self, layer: int) -> Tensor | None:
        if layer not in self.layers:
            return None
        rows, into = self.layers[layer]
        target = torch.where(into >= 0, rows.index.gather(1, into.clamp(min=0)), -1)
        whole = torch.full((len(into), self.length + 1), -1, device=into.device)
        return whole.scatter(1, torch.where(rows.valid, rows.index, self.length), target)[:, :-1].cpu()


class InLLMStage(Stage[InLLM]):
    name = "llm"
    in_layers = True

    def __init__(self, compressor: InLLM, site: Site) -> None:
        super().__init__(compressor, site)
        self.n_layers = len(site.layers)
        compressor.check_depth(self.n_layers)
        self.schedule = dict(sorted(compressor.schedule(self.n_layers).items()))  # raises where the depth is too small
        self.by_ffn = "ffn" in compressor.needs_now
        if self.by_ffn:
            ffn.check_all(site.layers, compressor.name, copies=False)

    def ffn_layers(self) -> Iterable[int]:
        return self.schedule if self.by_ffn else ()

    # ---- before the language model ---------------------------------------------------------------------------------
    def select(self, prefill: Prefill) -> None:
        turns = range(prefill.prompts.ends.shape[1])
        prompts, visual, valid = prefill.prompts, prefill.visual, prefill.valid
        if self.compressor.reads_prompt_end:
            anchors = [prompts.ends[:, t] for t in turns]
        else:
            anchors = [prompts.after_visual(t, visual) for t in turns]
        prefill.state[self.name] = anchors, [prompts.instruction(anchors[t], t, visual, valid) for t in turns]

    def count(self, prefill: Prefill, keep: Tensor, droppable: Tensor) -> None:
        _, instructions = prefill.state[self.name]
        turn = prefill.prompts.turn
        counts = [(droppable & (turn == t)).sum(1) for t in range(len(instructions))]
        prefill.ask("visual", torch.stack(counts, 1))
        prefill.ask("instruction", torch.stack([x.sum(1) for x in instructions], 1))
        first = torch.stack([picture.tokens[0] for picture in prefill.pictures])
        prefill.ask("turn of pictures", turn.flatten()[first])

    def begin(self, prefill: Prefill, p: Pass) -> None:
        told, (anchors, instructions) = prefill.told, prefill.state[self.name]
        turns = max(1, *told["turns"])
        visual = [row[:turns] for row in told["visual"]]
        owners = list(zip(told["owners"], told["turn of pictures"]))
        images = [[owners.count((b, t)) for t in range(turns)] for b in range(p.batch)]
        remaining = lambda share: [
            [self.compressor.remaining(n, share, i) for n, i in zip(*row)] for row in zip(visual, images)
        ]
        schedule = {
            layer: None if share is None else remaining(share)
            for layer, share in self.schedule.items()
            if layer < self.n_layers - 1
        }
        before = [visual, *schedule.values()]
        idle = {layer for (layer, n), m in zip(schedule.items(), before) if n is not None and n == m}
        text = [n - sum(v) for n, v in zip(told["lengths"], visual)]
        asked = [(instructions[t], [row[t] for row in told["instruction"]]) for t in range(turns)]
        state = p.state[self.name] = Dropping(schedule, idle, text, anchors[:turns], asked, entering=visual)
        if self.compressor.joins:
            p.parts[self.name] = Joined(length=p.length)
        if self.by_ffn:
            state.pictures, state.most = prefill.picture_of_token()
        if prefill.replay is not None and self.compressor.replays:
            state.replayed = {layer - 1: prefill.replay.present(prefill, layer) for layer in prefill.replay.layers()}
            state.schedule, state.idle = dict.fromkeys(state.replayed), set()
        p.groups |= {layer + 1 for layer in state.schedule}

    # ---- in its layers -----------------------------------------------------------------------------------------------
    def before_layer(self, p: Pass, layer: int, hidden: Tensor) -> Tensor:
        state: Dropping | None = p.state.get(self.name)
        if state is None or layer - 1 not in state.schedule:
            return hidden
        if layer not in p.rows:  # else the layer runs again, for checkpointing
            self._narrow(p, state, layer, hidden.detach())
        into = state.joined.get(layer - 1)
        return hidden if into is None else mean_of_members(hidden, into.to(hidden.device))

    def _narrow(self, p: Pass, state: Dropping, layer: int, hidden: Tensor) -> None:
        if layer - 1 in state.idle:  # a group of its own all the same: a later turn on the cache may drop here
            p.narrow(layer, None, [])
            return
        if layer - 1 not in state.replayed:
            check_shown([layer - 1], state.scores)
        with p.stopwatch, torch.no_grad():
            rows = p.rows[max(p.rows)]
            kept, lengths = self._ranked(p, state, layer - 1, rows, hidden)
            p.narrow(layer, kept | ~rows.visual, lengths)
        if layer - 1 in state.joined:
            p.parts[self.name].layers[layer] = rows, state.joined[layer - 1]

    def _ranked(self, p: Pass, state: Dropping, layer: int, rows: Rows, hidden: Tensor) -> tuple[Tensor, list[int]]:
        """[B, L] bool, the visual tokens that stay behind a layer, and how many tokens stay in each sample."""
        budgets, device, visual = state.schedule[layer], rows.index.device, rows.visual
        if layer in state.replayed:
            present, counts = state.replayed[layer]
            kept = present.to(device).gather(1, rows.index) & rows.valid
            return kept, [text + n for text, n in zip(state.text, counts)]
        score = state.scores[layer].to(device).nan_to_num(-torch.inf).masked_fill(~visual, -torch.inf)
        if self.compressor.ranking == "random":
            drawn = drawn_by_place(p.rows[0].to(device), rows).masked_fill(~visual, -torch.inf)
            score = drawn if budgets is not None else (score > 0).sum(1, keepdim=True) - ranks(drawn)
        if budgets is None:  # as many as the score says
            kept, counts = score > 0, None
        else:
            into, counts = torch.full_like(rows.index, -1), [sum(row) for row in budgets]
            before = state.before(layer)
            for t, budget in enumerate(zip(*budgets)):
                there = None if before is None else [row[t] for row in before]
                mine = self._of_turn(p, rows, t, len(state.anchors)).to(device)
                # what is no number goes behind all others, but is a token of the turn
                rank = ranks(score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~mine, -torch.inf))
                rank = rank.masked_fill(~mine, rank.shape[1])
                into = into.maximum(self.compressor.join(hidden, rank, there, budget))
            kept = into == torch.arange(into.shape[1], device=device)
            if self.compressor.joins:
                state.joined[layer] = into
        if any(state.schedule[before] is None for before in state.schedule if before <= layer):
            counts = kept.sum(1).tolist()  # a wait for the device: a count may ask for more than a score left
        return kept, [text + n for text, n in zip(state.text, counts)]

    def _of_turn(self, p: Pass, rows: Rows, turn: int, turns: int) -> Tensor:
        """[B, L] bool: the visual tokens of one turn."""
        if turns == 1:
            return rows.visual
        return rows.visual & (p.prompts.turn.to(rows.index.device).gather(1, rows.index) == turn)

    def entering(self, p: Pass, layer: int, hidden: Tensor) -> None:
        if self.watches(p, layer):
            p.state[self.name].hidden = hidden.detach()

    def watches(self, p: Pass, layer: int) -> bool:
        state: Dropping | None = p.state.get(self.name)
        return state is not None and not self.by_ffn and self._awaits(state, layer)

    def _awaits(self, state: Dropping, layer: int) -> bool:
        """Whether a layer's score is still to be found."""
        known = layer in state.idle or layer in state.scores or layer in state.replayed
        return layer in state.schedule and not known

    def attention(self, p: Pass, layer: int, seen: Seen) -> None:
        if not self.watches(p, layer):
            return
        state: Dropping = p.state[self.name]
        key, rows = seen.key, p.rows_at(layer).to(seen.key.device)
        hidden, state.hidden = state.hidden.to(key.device), None
        with p.stopwatch, torch.no_grad():
            scores = [self._score(p, layer, state, seen, rows, hidden, t) for t in range(len(state.anchors))]
            state.scores[layer] = self._joined(p, rows, scores)

    def _joined(self, p: Pass, rows: Rows, scores: list[Tensor]) -> Tensor:
        """[B, L] each visual token's score in its turn."""
        joined = scores[0]
        for t, score in enumerate(scores[1:], 1):
            joined = torch.where(self._of_turn(p, rows, t, len(scores)), score, joined)
        return joined

    def _score(self, p: Pass, layer: int, state: Dropping, seen: Seen, rows: Rows, hidden: Tensor, turn: int) -> Tensor:
        """[B, L] of the tokens that this forward brings, for the prompt of one turn."""
        device = seen.key.device
        past = seen.key.shape[2] - seen.query.shape[2]
        valid, visual = rows.valid, self._of_turn(p, rows, turn, len(state.anchors))
        mask, counts = state.instruction[turn]
        asked = _asked(mask, counts, rows)
        instruction = torch.where(asked < 0, asked, past + asked)
        entered = None
        if "question_embeds" in self.compressor.needs_now:
            first = p.rows[0].to(device)
            of_turn = self._of_turn(p, first, turn, len(state.anchors))
            entered = Entered(p.embeds.detach().to(device), of_turn, _asked(mask, counts, first))
        if past:
            held = p.cache.valid_at(layer)
            old = valid.new_ones(p.batch, past) if held is None else held[:, :past].to(device)
            valid, visual = torch.cat([old, valid], 1), torch.cat([torch.zeros_like(old), visual], 1)
        budgets = state.schedule[layer]
        told = Attention(
            seen.query.detach(),
            seen.key.detach(),
            seen.scaling,
            valid,
            visual,
            past + rows.column(state.anchors[turn]),
            instruction,
            hidden,
            None if budgets is None else [row[turn] for row in budgets],
            entered,
        )
        return self.compressor.score(told)[:, past:].float()

    def feed_forward(self, p: Pass, visit: Visit) -> None:
        state: Dropping | None = p.state.get(self.name)
        if not self.by_ffn or state is None or not self._awaits(state, visit.layer):
            return
        rows = p.rows_at(visit.layer).to(visit.x.device)
        values = visit.values.detach()
        with p.stopwatch, torch.no_grad():
            seen = activations_until(state.anchors[0], values, rows, state.pictures, state.most)
            state.scores[visit.layer] = self.compressor.score(seen).float()


def _asked(mask: Tensor, counts: list[int], rows: Rows) -> Tensor:
    """[B, R] the columns of `rows` in which the text of mask [B, S] is, `counts` of each sample; -1 in front."""
    asked = Rows.of(mask.to(rows.index.device).gather(1, rows.index) & rows.valid, counts)
    return torch.where(asked.valid, asked.index, -1)


def drawn_by_place(whole: Rows, rows: Rows) -> Tensor:
    """[B, L] numbers in (0, 1) that depend on how far each token stands behind the first of its sample alone.

    whole: what entered the first layer."""
    first = whole.index.masked_fill(~whole.valid, torch.iinfo(torch.long).max).amin(1, keepdim=True)
    return uniform(0, rows.index - first)


def activations_until(end: Tensor, values: Tensor, rows: Rows, pictures: Tensor, most: int) -> Activations:
    """What compressors see of an FFN, of the tokens up to `end` [B]. pictures: [B, S], see `Activations`."""
    end = end.to(values.device)[:, None]
    picture = pictures.to(values.device).gather(1, rows.index)
    return Activations(values, rows.valid & (rows.index <= end), rows.visual, picture, most, rows.column(end[:, 0]))

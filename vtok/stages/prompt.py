"""The prompt: some of its tokens, of text as well as of pictures, are all that the decoder is given."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.compressor import Compressor
from vtok.engine.aside import Enough, Watch, run_aside
from vtok.engine.cache import Rows, gather
from vtok.engine.decoder import Pass, Seen
from vtok.engine.prefill import Prefill
from vtok.engine.probe import check_shown
from vtok.engine.prompt import CHUNKS, UNKNOWN
from vtok.engine.trace import Part
from vtok.errors import Unsupported
from vtok.kernels.compact_sequence import kept_last
from vtok.options import Keep
from vtok.stages.stage import Site, Stage

LABELS = (
    "{name} chooses by what the prompt's end attends to, and these labels begin with the prompt: pass labels with -100 "
    "on it (TRL: completion_only_loss=True)."
)


@dataclass(frozen=True, kw_only=True)
class OfPrompt(Compressor):
    """A method that runs the first decoder layers on the prompt, chooses among its tokens by what it sees in one of
    them, and lets the decoder run on these alone. A later turn on its cache without pictures stays whole.

    keep: of the prompt's tokens, a fraction or a count.
    """

    stage = "prompt"
    needs = frozenset({"attention"})
    text_guided = True
    of_pictures = False
    several_turns = False

    keep: Keep = 0.5

    @property
    def reads_prompt_end(self) -> bool:
        return True

    @abstractmethod
    def layer(self, n_layers: int) -> int:
        """The layer by whose attention it chooses. Raises `InvalidValue` where there is none such."""

    @abstractmethod
    def choose(self, seen: Seen, rows: Rows, end: Tensor) -> Tensor:
        """[B, L] bool: what stays of the columns `rows`, the last L of those in `seen`. end: [B] among them the column
        of the prompt's last token, which stays."""


class PromptStage(Stage[OfPrompt]):
    name = "prompt"
    in_layers = on_text = True
    compiles = False

    def __init__(self, compressor: OfPrompt, site: Site) -> None:
        super().__init__(compressor, site)
        self.layer = compressor.layer(len(site.layers))

    def select(self, prefill: Prefill) -> None:
        told, prompts, name = prefill.call.told, prefill.prompts, self.compressor.name
        if not told.known:
            raise Unsupported(UNKNOWN.format(name=name))
        seen = 0 if prefill.cache is None else prefill.cache.seen
        if isinstance(told.length, int) and told.length > seen + prefill.length:
            raise Unsupported(CHUNKS.format(name=name))
        if not prefill.chosen:
            prefill.keep_all()
            prefill.chosen = True
        behind = torch.arange(prefill.length, device=prefill.device) > prompts.ends[:, :1]  # answers stay
        keep = prefill.kept.view(prefill.batch, -1) & prefill.valid
        asked = keep & ~behind
        longest, at_once = torch.stack([asked.sum(1).max(), (prompts.supervised & ~behind).any().long()]).tolist()
        if at_once:
            raise Unsupported(LABELS.format(name=name))
        with prefill.stopwatch:
            index = kept_last(asked, longest)
            rows = Rows(index, asked.gather(1, index), padded=True)
            chosen = self._chosen(prefill, rows)
        prefill.state[self.name] = Aside(rows.valid.sum(1), self.layer + 1)
        present = (keep & behind) | torch.zeros_like(keep).scatter(1, index, chosen & rows.valid)
        prefill.kept &= present.view(-1)
        prefill.countable &= present.view(-1)

    def _chosen(self, prefill: Prefill, rows: Rows) -> Tensor:
        found: list[Tensor] = []

        def watch(layer: int, seen: Seen) -> None:
            if layer == self.layer:
                found.append(self.compressor.choose(seen, rows, rows.column(prefill.prompts.ends[:, 0])))
                raise Enough

        embeds = gather(prefill.flat.view_as(prefill.embeds), rows.index)
        positions = prefill.positions
        axes = (positions[None] if positions.ndim == 2 else positions[-3:]).expand(-1, prefill.batch, -1)
        axes = axes.gather(2, rows.index.expand(len(axes), -1, -1))
        given = axes[0] if positions.ndim == 2 else axes
        p = Pass(prefill.module.config, [Watch(watch)], prefill.cache, prefill.batch, prefill.length, {0: rows})
        p.groups |= set() if p.cache is None else p.cache.valid.keys()
        p.late, p.late_row = prefill.late, prefill.late_row.view(prefill.batch, -1)
        run_aside(prefill.engine, prefill.module, p, embeds.detach(), given)
        check_shown([self.layer], [self.layer] if found else [])
        return found[0]

    def part(self, prefill: Prefill) -> Part:
        return prefill.state[self.name]


@dataclass(frozen=True)
class Aside(Part):
    """tokens: [B] that ran through the first `layers` layers, to choose among them."""

    tokens: Tensor
    layers: int

    def aside(self, sample: int) -> list[int]:
        return [int(self.tokens[sample])] * self.layers

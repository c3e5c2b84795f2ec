"""What a patched model kept in its last prefill, and what that saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtok.adapter import Adapter
from vtok.engine.accounting import (
    TextShape,
    VisionShape,
    copied_bytes,
    decode_flops,
    encoder_flops,
    kv_bytes,
    layer_flops,
    prefill_flops,
)
from vtok.engine.cache import Rows
from vtok.engine.replay import Kept
from vtok.engine.stopwatch import Stopwatch
from vtok.errors import Unsupported
from vtok.types import Layout

if TYPE_CHECKING:
    from vtok.adapter import Adapter


@dataclass(frozen=True)
class Shapes:
    """What the accounting needs of a model, found out when it is asked for: a model that cannot be counted can still be
    patched. Raises `Unsupported` then."""

    adapter: Adapter
    config: Any  # of the whole model

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.config.get_text_config().num_hidden_layers

    @cached_property
    def text(self) -> TextShape:
        return TextShape.of(self.config)

    @cached_property
    def vision(self) -> VisionShape:
        return self.adapter.tower(self.config).shape()


@dataclass(frozen=True)
class Picture:
    """One picture or clip of a prefill. Positions are in the flattened [B * S] batch.

    dense, layout: its layout in the prompt, and the one that the compressors saw (smaller after an encoder stage).
    rows: [n_rows] all its placeholders. tokens: [n] those of `layout`'s tokens. separators: kept, not counted.
    source: [n] for each token of `layout` the token of `dense` that it stands on, or None where they are the same.
    merged_into: [N] for each token of `dense` the one that stands for it after merging in the encoder, or None.
    """

    modality: str
    dense: Layout
    layout: Layout
    rows: Tensor
    tokens: Tensor
    separators: Tensor
    source: Tensor | None
    merged_into: Tensor | None = None


class Part:
    """What a stage adds to a trace. Each method says that nothing changed, unless a stage overrides it."""

    def seen_as(self, picture: Picture) -> Layout | None:
        """The layout that the encoder computed, where it is another than the prompt's."""
        return None

    def merged_at(self, patches: int) -> Sequence[int]:
        """Of a view of so many patches, the rows that each block of the encoder groups away."""
        return ()

    def merged_into(self, picture: int) -> Tensor | None:
        """[n] the token that absorbed each token of the picture's `layout`, or None."""
        return None

    def joined(self, layer: int) -> Tensor | None:
        """[B, S] as `Trace.joined_at`."""
        return None

    def neurons(self) -> Mapping[int, int]:
        """Decoder layer -> how many neurons of its FFN decoding computes, where it does not compute all."""
        return {}

    def prompts(self) -> int:
        """For how many prompts weights of these neurons are copied."""
        return 0

    def cached(self, layer: int, sample: int, tokens: float) -> float:
        """How many columns a layer's cache holds of a sample's prompt, of which so many tokens entered the layer. The
        mean over its key-value heads."""
        return tokens

    def stored(self, layer: int, sample: int, columns: float) -> float:
        """How many columns wide the layer's cache is for this: as the head with the most needs, since all are stored in
        one tensor."""
        return columns

    def held(self, layer: int, present: Tensor) -> Tensor:
        """[B, S] the share of a layer's key-value heads whose cache holds each position of the padded prompt, of those
        `present` [B, S], 0 or 1, in the layer."""
        return present

    def attended(self, layer: int, sample: int, columns: float) -> float:
        """To how many of the columns of a sample's prompt in a layer's cache the first token of the answer attends."""
        return columns

    def aside(self, sample: int) -> Sequence[int]:
        """Of each of the first decoder layers, the tokens of a sample that went through it once more, to be read."""
        return ()

    def recorded(self, sample: int, pictures: Sequence[int]) -> Any:
        """What the stage needs to do the same again for a sample of the batch, whose pictures these are; on the CPU."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {}


@dataclass(frozen=True)
class Trace:
    """A record of the last prefill. Reading it waits for the device; making it does not.

    A *layer* argument is a decoder layer, 0 for what enters the language model. `parts` is what stages add, by name.
    """

    shapes: Shapes
    pictures: tuple[Picture, ...]
    samples: tuple[int, ...]  # of each picture, the sample (row of the batch) it belongs to
    batch: int
    length: int  # S, of the padded input
    tokens: Tensor  # [B] of each sample's prompt, before anything was dropped
    rows: dict[int, Rows]  # first layer -> positions present
    bytes_per_value: int  # of the embeddings, and so of keys and values
    _stopwatch: Stopwatch | None
    parts: dict[str, Part]

    def __repr__(self) -> str:
        return (
            f"Trace(n_visual={self.n_visual}, n_kept={self.n_kept}, mean_keep={self.mean_keep:.3f}, "
            f"selection={self.selection_seconds * 1e3:.2f} ms)"
        )

    def rows_at(self, layer: int) -> Rows:
        """The positions present at a decoder layer, as tensors on the model's device."""
        if not 0 <= layer < self.shapes.layers:
            raise IndexError(f"There are decoder layers 0 to {self.shapes.layers - 1}, not {layer}.")
        return self.rows[max(first for first in self.rows if first <= layer)]

    def positions_at(self, layer: int) -> list[Tensor]:
        """For each sample the positions in the padded input that are present at a decoder layer, ascending."""
        rows = self.rows_at(layer)
        return [index[valid].cpu() for index, valid in zip(rows.index, rows.valid)]

    @property
    def positions(self) -> list[Tensor]:
        """For each sample the positions in the padded input of all tokens that enter the language model."""
        return self.positions_at(0)

    def present_at(self, layer: int) -> Tensor:
        """[B, S] bool on the CPU."""
        present = torch.zeros(self.batch, self.length, dtype=torch.bool)
        for sample, positions in enumerate(self.positions_at(layer)):
            present[sample, positions] = True
        return present

    def held_at(self, layer: int) -> list[Tensor]:
        """For each picture [N] in [0, 1]: the share of a decoder layer's key-value heads whose cache holds the token's
        column behind the prompt."""
        held = self.columns_at(layer)
        return [held.view(-1)[p.rows.cpu()][p.dense.place] for p in self.pictures]

    def columns_at(self, layer: int) -> Tensor:
        """[B, S] in [0, 1]: the same of each place of the input."""
        held = self.present_at(layer).float()
        for part in self.parts.values():
            held = part.held(layer, held)
        return held

    def kept(self) -> list[Kept]:
        """For each sample what was kept, for `Patch.replaying`."""
        present = {first: self.present_at(first).view(-1) for first in sorted(self.rows)}
        samples = []
        for b in range(self.batch):
            mine = [i for i, sample in enumerate(self.samples) if sample == b]
            tokens = [self.pictures[i].tokens.cpu() for i in mine]
            samples.append(
                Kept(
                    {first: tuple(there[places] for places in tokens) for first, there in present.items()},
                    {name: part.recorded(b, mine) for name, part in self.parts.items()},
                )
            )
        return samples

    @property
    def layouts(self) -> list[Layout]:
        """The layout of each picture, as the prompt counts it."""
        return [picture.dense for picture in self.pictures]

    def keep_masks_at(self, layer: int) -> list[Tensor]:
        """For each picture [N] bool over its layout's tokens: present at a decoder layer."""
        present = self.present_at(layer).view(-1)
        return [present[p.rows.cpu()][p.dense.place] for p in self.pictures]

    @property
    def keep_masks(self) -> list[Tensor]:
        """For each picture [N] bool over its layout's tokens: entered the language model."""
        return self.keep_masks_at(0)

    def joined_at(self, layer: int) -> Tensor | None:
        """[B, S] long, the position into whose hidden state that of each position was merged at the entrance of a
        decoder layer, itself where it stays, -1 for what is gone or no visual token; None where nothing was merged. On
        the CPU."""
        found = [joined for part in self.parts.values() if (joined := part.joined(layer)) is not None]
        return found[0] if found else None

    @property
    def merged_into(self) -> list[Tensor | None]:
        """For each picture [N] long: the token that absorbed each token before the language model (itself if kept, -1
        if dropped), or None where nothing was merged."""
        result: list[Tensor | None] = []
        for i, picture in enumerate(self.pictures):
            found = [into for part in self.parts.values() if (into := part.merged_into(i)) is not None]
            merged = found[-1].cpu() if found else None
            if merged is not None and picture.source is not None:
                source = picture.source.cpu()
                full = torch.full((picture.dense.n,), -1)
                full[source] = torch.where(merged >= 0, source[merged.clamp(min=0)], merged)
                merged = full
            if picture.merged_into is not None:  # in the encoder, and then perhaps once more
                leader = picture.merged_into.cpu()
                present = self.keep_masks[i]
                merged = torch.where(present[leader], leader, -1) if merged is None else merged[leader]
            result.append(merged)
        return result

    @property
    def n_visual(self) -> list[int]:
        """Visual tokens of each picture in the prompt (newline tokens are not counted)."""
        return [p.dense.n for p in self.pictures]

    @property
    def n_kept(self) -> list[int]:
        """Visual tokens of each picture that entered the language model."""
        return self.n_kept_at(0)

    def n_kept_at(self, layer: int) -> list[int]:
        """Visual tokens of each picture that are present at a decoder layer."""
        return [int(mask.sum()) for mask in self.keep_masks_at(layer)]

    def per_sample(self, counts: list[int]) -> list[int]:
        """Sums of a per-picture list over the pictures of each sample."""
        totals = [0] * self.batch
        for sample, count in zip(self.samples, counts):
            totals[sample] += count
        return totals

    @property
    def n_visual_per_sample(self) -> list[int]:
        return self.per_sample(self.n_visual)

    @property
    def n_kept_per_sample(self) -> list[int]:
        return self.per_sample(self.n_kept)

    @property
    def mean_keep(self) -> float:
        """Mean over decoder layers of the visual tokens present, over all visual tokens."""
        if not self.pictures:
            return 1.0
        kept = sum(sum(self.n_kept_at(first)) * layers for first, layers in self._groups())
        return kept / (sum(self.n_visual) * self.shapes.layers)

    @property
    def selection_seconds(self) -> float:
        """Time that the compressors took, measured on the device's clock. Encoder-stage compressors take none."""
        return 0.0 if self._stopwatch is None else self._stopwatch.seconds()

    def counts(self) -> dict[str, list[list[int]]]:
        """{"dense", "compressed"}: for each sample the tokens that enter each decoder layer."""
        dense = [[n] * self.shapes.layers for n in self.tokens.tolist()]
        per_layer: list[list[int]] = [[] for _ in range(self.batch)]
        for first, layers in self._groups():
            for sample, n in enumerate(self.present_at(first).sum(1).tolist()):
                per_layer[sample] += [n] * layers
        return {"dense": dense, "compressed": per_layer}

    def flops(self, causal: bool = False) -> dict[str, dict[str, int]]:
        """{"dense", "compressed"} -> {"encoder", "prefill", "decode"}: operations of the whole batch by formula
        (`vtok.engine.accounting`, where `causal` is explained); "decode" is one step after the prefill. Raises
        `Unsupported` for a tower or a decoder that cannot be counted."""
        text, vision = self.shapes.text, self.shapes.vision if self.pictures else None
        seen = {"dense": self.layouts, "compressed": [self._seen_as(picture) for picture in self.pictures]}
        merged_at = {"dense": None, "compressed": self._merged_at}
        neurons = {"dense": {}, "compressed": self.neurons}
        attended = self.attended()
        once_more = [part.aside(b) for part in self.parts.values() for b in range(self.batch)]
        more = sum(layer_flops(text, n, causal, i) for counts in once_more for i, n in enumerate(counts))
        aside = {"dense": 0, "compressed": more}
        return {
            kind: {
                "encoder": 0
                if vision is None
                else encoder_flops(
                    vision, (view for x in seen[kind] for view in views(x, vision.merge)), merged_at[kind]
                ),
                "prefill": sum(prefill_flops(text, counts, causal) for counts in samples) + aside[kind],
                "decode": sum(decode_flops(text, counts, neurons[kind]) for counts in attended[kind]),
            }
            for kind, samples in self.counts().items()
        }

    def cached(self) -> dict[str, list[list[float]]]:
        """{"dense", "compressed"}: for each sample the columns of its prompt that each decoder layer's cache holds, the
        mean over key-value heads."""
        counts = self.counts()
        return {
            "dense": counts["dense"],
            "compressed": self._by_parts(counts["compressed"], lambda part: part.cached),
        }

    def attended(self) -> dict[str, list[list[float]]]:
        """The same as `cached`, of columns to which the first token of the answer attends."""
        cached = self.cached()
        return {
            "dense": cached["dense"],
            "compressed": self._by_parts(cached["compressed"], lambda part: part.attended),
        }

    @property
    def mean_attended(self) -> float:
        """Mean over layers and samples of these, over those of the dense model: 1.0 where nothing is spared."""
        sums = {kind: sum(map(sum, samples)) for kind, samples in self.attended().items()}
        return sums["compressed"] / sums["dense"]

    def _by_parts(
        self, samples: list[list[float]], says: Callable[[Part], Callable[[int, int, float], float]]
    ) -> list[list[float]]:
        """Counts of columns [B][layers] after each part, in turn, said what becomes of them."""
        for part in self.parts.values():
            samples = [[says(part)(i, b, n) for i, n in enumerate(counts)] for b, counts in enumerate(samples)]
        return samples

    def _seen_as(self, picture: Picture) -> Layout:
        found = [layout for part in self.parts.values() if (layout := part.seen_as(picture)) is not None]
        return found[-1] if found else picture.dense

    def _merged_at(self, patches: int) -> Sequence[int]:
        return next((merged for part in self.parts.values() if (merged := part.merged_at(patches))), ())

    def kv_bytes(self) -> dict[str, int]:
        """{"dense", "compressed"}: bytes of the prompt's keys and values, padding of ragged batches left out. Heads
        that hold fewer columns than another one of their layer take as many bytes."""
        text, size, columns = self.shapes.text, self.bytes_per_value, self.cached()
        stored = self._by_parts(columns["compressed"], lambda part: part.stored)
        return {
            kind: sum(kv_bytes(text, counts, size) for counts in samples)
            for kind, samples in {"dense": columns["dense"], "compressed": stored}.items()
        }

    @property
    def neurons(self) -> dict[int, int]:
        """Decoder layer -> how many neurons of its FFN decoding computes, for layers in which it does not compute all.
        A batch in which some samples need all is computed whole."""
        return {layer: n for part in self.parts.values() for layer, n in sorted(part.neurons().items())}

    @property
    def copied_bytes(self) -> int:
        """Bytes of the weights that decoding copies, those of these neurons for each prompt (not for each beam)."""
        return sum(
            part.prompts() * copied_bytes(self.shapes.text, part.neurons(), self.bytes_per_value)
            for part in self.parts.values()
            if part.neurons()
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers and lists, for JSON; None for what cannot be counted."""
        return {
            "n_visual": self.n_visual,
            "n_kept": self.n_kept,
            "samples": list(self.samples),
            "mean_keep": self.mean_keep,
            "selection_seconds": self.selection_seconds,
            "positions": {str(first): [p.tolist() for p in self.positions_at(first)] for first, _ in self._groups()},
            "merged_into": [None if m is None else m.tolist() for m in self.merged_into],
            "flops": _counted(self.flops),
            "kv_bytes": _counted(self.kv_bytes),
            "neurons": {str(layer): n for layer, n in self.neurons.items()},
            "copied_bytes": self.copied_bytes,
            **{key: value for part in self.parts.values() for key, value in part.to_dict().items()},
        }

    def _groups(self) -> Iterator[tuple[int, int]]:
        """(first layer, number of layers) of each run of layers that see the same positions."""
        starts = sorted(self.rows)
        for start, end in zip(starts, [*starts[1:], self.shapes.layers]):
            yield start, end - start


def _counted(count: Callable[[], Any]) -> Any:
    try:
        return count()
    except Unsupported:
        return None


def views(layout: Layout, merge: int) -> Iterator[tuple[int, int]]:
    """(rows, cols) in encoder patches of each view that the encoder saw."""
    for plane in layout.planes:
        for _ in range(plane.views):
            yield plane.view_shape[0] * merge, plane.view_shape[1] * merge

"""The vision encoder of a patched model, called through its method: layouts are noted, and what compressors read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vtok.adapter import Adapter, Encoded, bind
from vtok.errors import Unsupported
from vtok.tower import Layer
from vtok.types import Layout

if TYPE_CHECKING:
    from vtok.stages.stage import Stage

Read = tuple[str, Layer]  # a need of a compressor, at a layer of the encoder
MARK = "_vtok_encoded"  # on an encoder's output that a user passes on by himself


@dataclass
class EncoderCall:
    """One call of an encoder method. Stages fill in what they changed, see `Encoded`.

    method: the family's own, bound. arguments: those of the call, by name. layouts: as the prompt counts.
    """

    adapter: Adapter
    core: nn.Module
    modality: str
    method: Callable[..., Any]
    arguments: dict[str, Any]
    layouts: tuple[Layout, ...]
    small: tuple[Layout, ...] | None = None
    sources: tuple[Tensor, ...] | None = None
    merged_into: tuple[Tensor, ...] | None = None


class Encoding:
    """What is read of the encoder while it runs."""

    def __init__(self, reads: list[Read]) -> None:
        self.seen: dict[Read, list[Tensor]] = {key: [] for key in reads}

    def probed(self, call: EncoderCall) -> tuple[dict[Read, Tensor], ...] | None:
        """For each picture (need, layer) -> [V, P, ...]."""
        seen = {key: torch.cat(parts) for key, parts in self.seen.items() if parts}
        if not seen:
            return None
        tower = call.adapter.tower(call.core.config)
        split = [tower.arrange(x, call.small or call.layouts) for x in seen.values()]
        return tuple(dict(zip(seen, of_picture)) for of_picture in zip(*split))


def run(
    call: EncoderCall, args: tuple, kwargs: dict[str, Any], stages: list[Stage], encoding: Encoding
) -> tuple[Any, Encoded | None]:
    """The encoder's output, and what it made of the pictures; None where somebody asked for a plain tuple."""
    step = functools.partial(call.method, *args, **kwargs)
    for stage in reversed(stages):
        step = functools.partial(stage.encode, call, step)
    output = step()
    probed = encoding.probed(call)
    if not hasattr(output, "pooler_output"):
        return output, None
    call.adapter.by_view(call.core.config, output)
    for rows, layout in zip(output.pooler_output, call.layouts):
        if len(rows) != layout.n_rows:
            raise Unsupported(
                f"The encoder gave {len(rows)} tokens for a picture where {layout.n_rows} were expected. "
                f"vision_feature_layer and vision_feature_select_strategy must be those of the config."
            )
    previews = call.adapter.previews(call.arguments)
    encoded = Encoded(call.modality, call.layouts, call.small, call.sources, probed, previews, call.merged_into)
    setattr(output, MARK, encoded)
    return output, encoded


def begin(
    adapter: Adapter, core: nn.Module, modality: str, method: Callable[..., Any], args: tuple, kwargs: dict[str, Any]
) -> EncoderCall:
    """What a call of an encoder method is about."""
    arguments = bind(method, args, kwargs)
    layouts = tuple(adapter.layouts(core.config, modality, arguments))
    return EncoderCall(adapter, core, modality, method, arguments, layouts)


def mark(adapter: Adapter, core: nn.Module, modality: str, output: Any, arguments: dict[str, Any]) -> None:
    """Note on features that a model encoded before it was patched what they are of, as if it had been.

    arguments: of the encoder method, by name, which made them."""
    layouts = tuple(adapter.layouts(core.config, modality, arguments))
    adapter.by_view(core.config, output)
    setattr(output, MARK, Encoded(modality, layouts, previews=adapter.previews(arguments)))


def passed_on(modality: str, output: Any, noted: Encoded | None, places: Callable[[], Tensor]) -> Encoded:
    """What is known of features that were encoded before the forward that uses them, for each of its pictures.

    noted: what `generate` encoded a moment ago: wrappers that move tensors between devices rebuild its output, and the
        mark on it is lost. places: gives the [B, S] placeholders; beam search repeats a sample's pictures, in turn.
    """
    encoded = noted if noted is not None else getattr(output, MARK, None)
    features = output.pooler_output
    sizes = [layout.n_rows for layout in encoded.layouts] if encoded is not None else []
    copies = len(features) // max(1, len(sizes))
    order = list(range(len(sizes)))
    if copies > 1:
        order, end = [], 0
        for total in places()[::copies].sum(1).tolist():  # placeholders of a sample: a wait for the device
            first = end
            while total > 0 and end < len(sizes):
                total, end = total - sizes[end], end + 1
            order += list(range(first, end)) * copies
    given = [len(rows) for rows in features]
    if encoded is None or given != [sizes[i] for i in order]:
        if copies > 1 and given == [n for n in sizes for _ in range(copies)]:
            raise Unsupported(
                "For its beams transformers repeats each picture of this model, not each prompt's pictures in turn, so "
                "that beams would see other pictures. Give a prompt one picture, or leave num_beams unset."
            )
        raise Unsupported(
            f"The {modality} features in mm_encoder_outputs were not made by this patched model, or were cut "
            f"into chunks. Encode after patching, and leave generation_config.prefill_chunk_size unset."
        )
    return encoded.pick(order)

"""What our model classes have in common: a mixin ahead of vLLM's, and how rows of the encoder become rows that stay."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.distributed import get_tp_group, tensor_model_parallel_all_gather

from vtok.compressor import Compressor
from vtok.engine.encode import Read
from vtok.serving.positions import Run, from_digits, places_of, prompt_positions, to_digits
from vtok.serving.settings import Settings
from vtok.stages.pre_llm import place
from vtok.tower import Tower
from vtok.types import Layout, mean_of_members


class Served(ABC):
    """Ahead of a class of vLLM, whose model it is made in the place of where there are settings.

    The runner asks `get_mrope_input_positions` when a request comes and `recompute_mrope_positions` when pictures have
    been encoded, which it may do again: for the next chunk, or after the request was put off. So it only overwrites."""

    stock: ClassVar[type[nn.Module]]

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        if Settings.of(vllm_config.model_config.hf_config) is None:
            return cls.stock(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(cls)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.vtok = Settings.of(vllm_config.model_config.hf_config)
        self.width = self.features = vllm_config.model_config.get_inputs_embeds_size()
        if self.vtok.original:
            self.supports_mrope = self.supports_multimodal_pruning = True

    # ---- of a family -----------------------------------------------------------------------------------------------
    @abstractmethod
    def media_ids(self) -> list[int]:
        """The ids of its placeholders."""

    @abstractmethod
    def place_media(self, positions: Tensor, at: Tensor, local: Tensor, media: Tensor) -> None:
        """Write into `positions` [3, length] where the picture tokens at `at` [n] stand, given where in their picture
        they stood, local [axes, n]. media: [length] bool, the tokens of pictures."""

    @abstractmethod
    def dense_length(self, positions: Tensor) -> int:
        """Of the dense prompt, the position behind its last."""

    # ---- vLLM's side -----------------------------------------------------------------------------------------------
    def finished(self, rows: Tensor, local: Tensor) -> Tensor:
        """Rows [n, D] with the digits of their places [axes, n] behind them, where the runner asks for these."""
        if not self.vtok.original:
            return rows
        return torch.cat([rows, to_digits(local.to(rows.device), rows.dtype)], 1)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        rows = [x[:, : self.width] for x in multimodal_embeddings]
        positions, length = mrope_positions, mrope_positions.shape[1]
        if n := sum(map(len, rows)):
            positions = positions.clone()
            ids = torch.as_tensor(input_ids, device=positions.device)
            media = torch.isin(ids, torch.tensor(self.media_ids(), device=ids.device, dtype=ids.dtype))
            local = torch.cat([from_digits(x[:, self.width :].to(ids.device)) for x in multimodal_embeddings], 1)
            self.place_media(positions, places_of(media, num_computed_tokens, n), local.to(positions.dtype), media)
        return rows, positions, self.dense_length(positions) - length


class OneAxis(Served):
    """Of families whose RoPE has one position a token: the runner keeps three rows, see `prompt_positions`, and the
    model is given the first."""

    @abstractmethod
    def dense_rows(self, feature: Any) -> list[int]:
        """How many placeholders each run of those of a picture or clip of a request has in the dense prompt."""

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        runs = [
            Run(start, end - start + 1, dense)
            for feature in mm_features
            for (start, end), dense in zip(feature.mm_position.extract_embeds_range(), self.dense_rows(feature))
        ]
        positions, end = prompt_positions(len(input_tokens), runs)
        return positions, end - len(input_tokens)

    def place_media(self, positions: Tensor, at: Tensor, local: Tensor, media: Tensor) -> None:
        positions[0, at] = positions[1, at] + local[0]

    def dense_length(self, positions: Tensor) -> int:
        return int(positions[2, 0])

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(input_ids, positions[0] if self.vtok.original else positions, *args, **kwargs)


def keep_rows(
    settings: Settings,
    rows: Sequence[Tensor],
    layouts: Sequence[Layout],
    read: Sequence[dict[Read, Tensor]] | None = None,
    features: int | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Of each picture, given its rows [n_rows, D]: the rows that stay [k, D], and which they are [k]. Pictures of one
    layout are compressed together.

    read: what was read of its encoder. features: how many of the D enter the first layer, where what enters behind
    later ones (DeepStack) stands beside them; a merged token's are the mean of those it stands for, as in
    `vtok.stages.pre_llm`."""
    read = read or [{}] * len(rows)
    groups: dict[Layout, list[int]] = {}
    for i, layout in enumerate(layouts):
        groups.setdefault(layout, []).append(i)
    kept: list[Any] = [None] * len(rows)
    for layout, members in groups.items():
        encoder = {key: torch.stack([read[i][key] for i in members]) for key in read[members[0]]}
        whole = torch.stack([rows[i] for i in members])
        placed = place(settings.compressor, whole[..., :features], layout, encoder)
        keep, x = _as_on_rank_0(placed.keep.to(torch.uint8)).bool(), placed.rows
        if whole.shape[2] > x.shape[2]:
            late, into = whole[..., x.shape[2] :], placed.selection.merged_into
            if into is not None and placed.selection.features is not None:
                at = layout.place.to(late.device)
                late = late.index_copy(1, at, mean_of_members(late[:, at], into))
            x = torch.cat([x, late], 2)
        if settings.compressor.merges:
            x = _as_on_rank_0(x)
        for g, i in enumerate(members):
            at = torch.nonzero_static(keep[g], size=settings.rows(layout)).squeeze(1)
            kept[i] = x[g, at], at
    return kept


def _as_on_rank_0(x: Tensor) -> Tensor:
    """A rounding difference between ranks must not have them keep different tokens."""
    group = get_tp_group()
    return x if group.world_size == 1 else group.broadcast(x.contiguous(), src=0)


class VllmTower(Tower):
    """CLIP and SigLIP as vLLM has them: one projection for all three, which under tensor parallelism holds some of the
    heads."""

    def query(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        return _projected(attention, hidden, 0)

    def key(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        return _projected(attention, hidden, 1)


def _projected(attention: nn.Module, hidden: Tensor, which: int) -> Tensor:
    part = attention.qkv_proj(hidden)[0].chunk(3, -1)[which]
    return part if attention.tp_size == 1 else tensor_model_parallel_all_gather(part.contiguous(), dim=-1)


@contextmanager
def reading(compressor: Compressor, tower: Tower, blocks: Sequence[nn.Module]) -> Iterator[dict[Read, list[Tensor]]]:
    """What a compressor reads of a tower with these blocks, noted while it encodes."""
    seen: dict[Read, list[Tensor]] = {}
    with ExitStack() as stack:
        for need, layers in compressor.encoder_layers.items():
            for layer in layers:
                module, read = tower.probe(blocks, need, layer)
                noted = seen.setdefault((need, layer), [])
                note = lambda *call, noted=noted, read=read: noted.append(read(*call))
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield seen


def of_pictures(seen: dict[Read, list[Tensor]], tower: Tower, layouts: Sequence[Layout]) -> list[dict[Read, Tensor]]:
    """What was read, for each picture (need, layer) -> [V, P, ...]."""
    split = [tower.arrange(torch.cat(parts), layouts) for parts in seen.values()]
    return [dict(zip(seen, parts)) for parts in zip(*split)] if split else [{}] * len(layouts)

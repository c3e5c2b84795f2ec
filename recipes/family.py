"""What the recipe has to know of a model, and where the patches of its pictures lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from recipes import items
from recipes.items import Lexicon
from vtok.eval.tasks.task import Box, Item

if TYPE_CHECKING:
    from recipes.batches import Batch

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # of ChatML


class Family(ABC):
    """Patches, S of all media of a batch, lie in groups of `merge`, which the tower makes one visual token of.

    image, video: how a prompt says that one stands there; None where the model takes none.
    spells: whether codes and numbers are to be answered letter by letter, though its tokenizer has longer tokens.
    heard, watched: (layer, head) of the decoder that are taught what was asked about, and where that is.
    """

    merge: int
    image: str
    video: str | None
    spells: bool = False
    heard: tuple[tuple[int, int], ...] = ((2, 0),)
    watched: tuple[tuple[int, int], ...] = ((4, 0),)

    @abstractmethod
    def processor(self, lexicon: Lexicon) -> Any: ...

    @abstractmethod
    def model(self, tok, seed: int = 0) -> nn.Module:
        """A freshly initialised model, float32, for the tokens of `tok`."""

    @abstractmethod
    def tower(self, net: nn.Module) -> nn.Module:
        """All between pixels and decoder."""

    @abstractmethod
    def planes(self, item: Item) -> list[Plane]:
        """Where the patches of an item come from, in their order."""

    def tokens(self, item: Item) -> np.ndarray | None:
        """The group of patches that each visual token of an item shows, -1 for none, [N]; None: one after the other."""
        return None

    @abstractmethod
    def tower_states(self, net: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Last hidden states of the vision tower [S, D], all visual tokens [N, D'] and the states of CLS.

        These are [V, D] for views of S / V patches; None for a tower without CLS.
        """

    def places(self, net: nn.Module, batch: Batch) -> torch.Tensor:
        """Position ids of the prefix, [B, P] or [axes, B, P]."""
        return torch.arange(batch.prefix.shape[1], device=batch.prefix.device).expand_as(batch.prefix)


@dataclass(frozen=True)
class Plane:
    """A grid of patches that lies over one picture, or over some frames of a clip.

    frames: the pictures or frames. scale: patches a pixel across and down. order: its patches, numbered in raster
    order, [rows * columns] as they lie in the batch. sharp: whether it shows letters. start: where the picture begins,
    patches from the left and from the top.
    """

    frames: range
    rows: int
    columns: int
    scale: tuple[float, float]
    order: np.ndarray
    sharp: bool = True
    start: tuple[float, float] = (0.0, 0.0)

    def place(self, box: Box) -> list[float]:
        """Left, top, right and bottom of a box in patches."""
        return [edge * self.scale[i % 2] + self.start[i % 2] for i, edge in enumerate(box[1:])]

    def patches(self, box: Box) -> np.ndarray:
        """Those that show what is in a box, bool [rows * columns]."""
        if int(box[0]) not in self.frames:
            return np.zeros(len(self.order), dtype=bool)
        return items.covered((box[0], *self.place(box)), self.rows, self.columns, 1).ravel()[self.order]


def patches(planes: Sequence[Plane], box: Box) -> np.ndarray:
    """Which patches of an item show what lies in a box, bool [S]."""
    return np.concatenate([plane.patches(box) for plane in planes])


def letter(planes: Sequence[Plane], box: Box) -> tuple[np.ndarray, int]:
    """The one patch that a letter counts for, bool [S], and the half of it that its middle lies in."""
    found, half = [], 0
    for plane in planes:
        raster = np.zeros((plane.rows, plane.columns), dtype=bool)
        if plane.sharp and int(box[0]) in plane.frames:
            left, top, right, bottom = plane.place(box)
            x, y = (left + right) / 2, (top + bottom) / 2
            raster[int(y), int(x)] = True
            half = int(x % 1 >= 0.5)
        found.append(raster.ravel()[plane.order])
    return np.concatenate(found), half


def grouped(rows: int, columns: int, side: int) -> np.ndarray:
    """The cells of a grid in raster order, those of a square of `side` x `side` together, [rows * columns]."""
    index = np.arange(rows * columns).reshape(rows // side, side, columns // side, side)
    return index.transpose(0, 2, 1, 3).ravel()


def prepare(net, tok, max_new_tokens: int):
    """A fresh model, its decoder's attention started by matching, and how it generates: greedily, with these ids."""
    for layer in net.model.language_model.layers:
        start_by_matching(layer.self_attn)
    for name, value in token_ids(tok).items():
        setattr(net.generation_config, name, value)
    net.generation_config.max_new_tokens = max_new_tokens
    net.generation_config.do_sample = False
    return net


def token_ids(tok) -> dict[str, int | None]:
    return {"bos_token_id": None, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}


def decoder(tok, **more) -> dict[str, Any]:
    """Configuration of the decoder that all of them have."""
    sizes = {"hidden_size": 192, "intermediate_size": 384, "num_hidden_layers": 8, "max_position_embeddings": 4096}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return {"vocab_size": -(-len(tok) // 64) * 64} | sizes | heads | token_ids(tok) | more


@torch.no_grad()
def start_by_matching(attention: torch.nn.Module) -> None:
    """Initialise a decoder's attention so that a token looks at those like it and copies them, softly.

    Queries equal keys, and the output undoes the values: after Trockman and Kolter, "Mimetic initialization of
    self-attention layers" (2023). The words of a question so find the patches that show them from the start.
    """
    width = attention.q_proj.weight.shape[1]
    look, copy = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(2))
    attention.q_proj.weight.copy_(0.75 * look)
    attention.k_proj.weight.copy_(0.75 * look)
    attention.v_proj.weight.copy_(0.22 * copy)
    attention.o_proj.weight.copy_(0.22 * copy.T)

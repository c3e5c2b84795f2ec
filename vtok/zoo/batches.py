"""Scenes as training tensors: views cut as the processor does, dense labels, packed questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from vtok.zoo import scenes, sources
from vtok.zoo.architecture import PATCH, VIEW

GRID = VIEW // PATCH
IGNORE = -100
# What a patch can show. A letter counts by the half of the patch that its middle lies in: order is not lost.
GROUPS = {
    "shape": scenes.SHAPES,
    "colour": tuple(scenes.COLOURS),
    "left": tuple(scenes.ALPHABET),
    "right": tuple(scenes.ALPHABET),
    "digit": tuple("0123456789"),
    "plot": sources.TRENDS,
}
LABELS = tuple((group, name) for group, names in GROUPS.items() for name in names)
_LABEL = {label: i for i, label in enumerate(LABELS)}


@dataclass
class Batch:
    views: torch.Tensor  # uint8 [B, V, 3, VIEW, VIEW], thumbnail first
    labels: torch.Tensor  # bool [B, V, GRID * GRID, len(LABELS)]
    size: tuple[int, int]  # (height, width) of the pictures
    ids: torch.Tensor  # [B, Q] the questions and answers of a picture, one after the other
    block: torch.Tensor  # [B, Q] number of the question a token belongs to, -1 = padding
    offset: torch.Tensor  # [B, Q] place of the token in its question
    targets: torch.Tensor  # [B, Q] next token inside answers, else IGNORE
    categories: list[list[str]]  # [B][questions]


def canvas(width: int, height: int) -> tuple[int, int, int, int]:
    """Left and top padding, then rows and columns of crops, of a picture drawn in one of `scenes.LAYOUTS`."""
    columns, rows = -(-width // VIEW), -(-height // VIEW)
    return (columns * VIEW - width) // 2, (rows * VIEW - height) // 2, rows, columns


def views(images: torch.Tensor) -> torch.Tensor:
    """Thumbnail and crops as the processor makes them, uint8.

    [B, 3, H, W] -> [B, 1 + rows * columns, 3, VIEW, VIEW]
    """
    height, width = images.shape[-2:]
    left, top, rows, columns = canvas(width, height)
    thumbnail = tvF.resize(images, [VIEW, VIEW], interpolation=InterpolationMode.BICUBIC, antialias=True)
    padded = tvF.pad(images, [left, top, columns * VIEW - width - left, rows * VIEW - height - top])
    crops = padded.unflatten(-2, (rows, VIEW)).unflatten(
        -1, (columns, VIEW)
    )  # [B, 3, rows, VIEW, columns, VIEW]
    crops = crops.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, rows * columns, 3, VIEW, VIEW]
    return torch.cat([thumbnail[:, None], crops], dim=1)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float -1..1, the processor's mean and std of 0.5."""
    return pixels.float().div(127.5).sub(1)


def dense_labels(scene: scenes.Scene) -> np.ndarray:
    """What lies in every patch of every view, bool [V, GRID * GRID, len(LABELS)]."""
    width, height = scenes.LAYOUTS[scene.layout]
    left, top, rows, columns = canvas(width, height)
    legible = [
        t for t in scene.things if t.kind != "letter"
    ]  # letters are too small to read in the thumbnail
    thumbnail = _patches(legible, VIEW / width, VIEW / height, 0, 0, 1, 1)
    crops = _patches(scene.things, 1, 1, left, top, rows, columns)
    crops = crops.reshape(rows, GRID, columns, GRID, -1).transpose(0, 2, 1, 3, 4)
    return np.concatenate([thumbnail[None], crops.reshape(rows * columns, GRID, GRID, -1)]).reshape(
        1 + rows * columns, GRID * GRID, -1
    )


def _patches(things, scale_x, scale_y, left, top, rows, columns):
    """The same for one canvas of rows x columns views, bool [rows * GRID, columns * GRID, len(LABELS)]."""
    out = np.zeros((rows * GRID, columns * GRID, len(LABELS)), dtype=bool)
    for thing in things:
        x0, x1 = ((x * scale_x + left) / PATCH for x in thing.box[::2])  # in patches from here
        y0, y1 = ((y * scale_y + top) / PATCH for y in thing.box[1::2])
        if thing.kind == "letter":
            column, half = divmod((x0 + x1) / 2, 1)
            out[int((y0 + y1) / 2), int(column), _LABEL["left" if half < 0.5 else "right", thing.name]] = True
        elif thing.kind != "label":
            across = np.minimum(x1, np.arange(out.shape[1]) + 1) - np.maximum(x0, np.arange(out.shape[1]))
            down = np.minimum(y1, np.arange(out.shape[0]) + 1) - np.maximum(y0, np.arange(out.shape[0]))
            inside = np.outer(down.clip(0), across.clip(0)) >= 0.3 * min(1, (x1 - x0) * (y1 - y0))
            out[inside, _LABEL[thing.kind, thing.name]] = True
            if thing.colour:
                out[inside, _LABEL["colour", thing.colour]] = True
    return out


@cache
def _encode(tok, text: str) -> tuple[int, ...]:
    return tuple(tok(text, add_special_tokens=False)["input_ids"])


def encode(tok, question: scenes.Question) -> tuple[tuple[int, ...], int]:
    """Token ids of "question ASSISTANT: answer</s>", and how many of them are the prompt."""
    prompt = _encode(tok, f"{question.text} ASSISTANT:")
    return prompt + _encode(tok, f" {question.answer}</s>"), len(prompt)


def pack(tok, questions: list[list[scenes.Question]]) -> dict[str, torch.Tensor]:
    """Questions of B pictures as `ids`, `block`, `offset` and `targets` of Batch."""
    rows = [[encode(tok, q) for q in asked] for asked in questions]
    length = max(sum(len(ids) for ids, _ in row) for row in rows)
    length = -(-length // 32) * 32  # few lengths: a new shape costs a kernel compilation
    out = {
        name: torch.full((len(rows), length), fill)
        for name, fill in (("ids", tok.pad_token_id), ("block", -1))
    }
    out |= {"offset": torch.zeros_like(out["ids"]), "targets": torch.full_like(out["ids"], IGNORE)}
    for b, row in enumerate(rows):
        at = 0
        for n, (ids, prompt) in enumerate(row):
            end, ids = at + len(ids), torch.tensor(ids)
            out["ids"][b, at:end] = ids
            out["block"][b, at:end] = n
            out["offset"][b, at:end] = torch.arange(len(ids))
            out["targets"][b, at + prompt - 1 : end - 1] = ids[prompt:]
            at = end
    return out


def build(tok, split: str, seed: int, indices: list[int]) -> Batch:
    """A batch of scenes, which must share one layout."""
    drawn = [scenes.generate(split, seed, i) for i in indices]
    images = torch.from_numpy(np.stack([np.asarray(s.image) for s in drawn])).permute(0, 3, 1, 2)
    return Batch(
        views=views(images),
        labels=torch.from_numpy(np.stack([dense_labels(s) for s in drawn])),
        size=tuple(images.shape[-2:]),
        categories=[[q.category for q in s.questions] for s in drawn],
        **pack(tok, [s.questions for s in drawn]),
    )


class Steps(torch.utils.data.Dataset):
    """Batch of every training step: a pure function of seed and step, so a resumed run sees the same.

    The first `narrow` steps draw only the two smallest layouts.
    """

    def __init__(self, tok, split: str, seed: int, batch: int, stop: int, narrow: int = 0):
        self.tok, self.split, self.seed = tok, split, seed
        self.batch, self.stop, self.narrow = batch, stop, narrow

    def __len__(self):
        return self.stop

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1)
        layouts = 2 if step < self.narrow else len(scenes.LAYOUTS)
        layout = int(np.random.default_rng((self.seed, step)).integers(layouts))
        first = step * self.batch
        indices = [i * len(scenes.LAYOUTS) + layout for i in range(first, first + self.batch)]
        return build(self.tok, self.split, self.seed, indices)

"""Scenes as training tensors: views cut as the processor does, dense labels, packed questions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvF

from vtok.zoo import packed, scenes, sources
from vtok.zoo.architecture import PATCH, VIEW

GRID = VIEW // PATCH
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
    focus: torch.Tensor  # bool [B, Q, N] visual tokens that show what the target is about
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
    crops = padded.unflatten(-2, (rows, VIEW)).unflatten(-1, (columns, VIEW))  # [B, 3, rows, VIEW, columns, VIEW]
    crops = crops.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)  # [B, rows * columns, 3, VIEW, VIEW]
    return torch.cat([thumbnail[:, None], crops], dim=1)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float -1..1, the processor's mean and std of 0.5."""
    return pixels.float().div(127.5).sub(1)


def places(scene: scenes.Scene) -> np.ndarray:
    """Which patches show which thing, bool [things, V, GRID * GRID]. Letters are too small for the thumbnail."""
    width, height = scenes.LAYOUTS[scene.layout]
    left, top, rows, columns = canvas(width, height)
    out = np.zeros((len(scene.things), 1 + rows * columns, GRID * GRID), dtype=bool)
    for n, thing in enumerate(scene.things):
        if thing.kind != "letter":
            out[n, 0] = _covered(thing, VIEW / width, VIEW / height, 0, 0, 1, 1).ravel()
        crops = _covered(thing, 1, 1, left, top, rows, columns).reshape(rows, GRID, columns, GRID)
        out[n, 1:] = crops.transpose(0, 2, 1, 3).reshape(rows * columns, -1)
    return out


def _covered(thing, scale_x, scale_y, left, top, rows, columns):
    """Patches of a canvas of rows x columns views that show a thing, bool [rows * GRID, columns * GRID]."""
    x0, x1 = ((x * scale_x + left) / PATCH for x in thing.box[::2])  # in patches from here
    y0, y1 = ((y * scale_y + top) / PATCH for y in thing.box[1::2])
    if thing.kind == "letter":  # the patch its middle lies in, and no other
        x0, y0 = int((x0 + x1) / 2), int((y0 + y1) / 2)
        x1, y1 = x0 + 1, y0 + 1
    xs, ys = np.arange(columns * GRID), np.arange(rows * GRID)
    across = np.minimum(x1, xs + 1) - np.maximum(x0, xs)
    down = np.minimum(y1, ys + 1) - np.maximum(y0, ys)
    return np.outer(down.clip(0), across.clip(0)) >= 0.3 * min(1, (x1 - x0) * (y1 - y0))


def dense_labels(scene: scenes.Scene, where: np.ndarray) -> np.ndarray:
    """What every patch shows, bool [V, GRID * GRID, len(LABELS)], from `where` of `places`."""
    out = np.zeros((*where.shape[1:], len(LABELS)), dtype=bool)
    left = canvas(*scenes.LAYOUTS[scene.layout])[0]
    for thing, patches in zip(scene.things, where):
        if thing.kind == "letter":
            middle = ((thing.box[0] + thing.box[2]) / 2 + left) / PATCH
            out[patches, _LABEL["left" if middle % 1 < 0.5 else "right", thing.name]] = True
        elif thing.kind != "label":
            out[patches, _LABEL[thing.kind, thing.name]] = True
            if thing.colour:
                out[patches, _LABEL["colour", thing.colour]] = True
    return out


def in_order(where: np.ndarray, layout: int) -> np.ndarray:
    """[things, V, GRID * GRID] -> [things, N], in the order of the N visual tokens that the decoder gets."""
    left, top, rows, columns = canvas(*scenes.LAYOUTS[layout])
    crops = where[:, 1:].reshape(-1, rows, columns, GRID, GRID).transpose(0, 1, 3, 2, 4)
    crops = crops.reshape(len(where), rows * GRID, columns * GRID)
    crops = crops[:, top // PATCH : rows * GRID - top // PATCH, left // PATCH : columns * GRID - left // PATCH]
    crops = np.pad(crops, ((0, 0), (0, 0), (0, 1)))  # newline
    return np.concatenate([where[:, 0], crops.reshape(len(where), -1)], axis=1)


@cache
def _encode(tok, text: str) -> tuple[int, ...]:
    return tuple(tok(text, add_special_tokens=False)["input_ids"])


def encode(tok, question: scenes.Question) -> tuple[tuple[int, ...], int]:
    """Token ids of "question ASSISTANT: answer</s>", and how many of them are the prompt."""
    prompt = _encode(tok, f"{question.text} ASSISTANT:")
    return prompt + _encode(tok, f" {question.answer}</s>"), len(prompt)


def looks(question: scenes.Question) -> list[tuple[int, ...]]:
    """Things to look at for every token of " answer</s>"; a label is spelled letter by letter."""
    if question.category == "reading":
        first = question.about[0] + 1
        return [question.about, *((first + i,) for i in range(len(question.answer))), ()]
    return [question.about] * len(question.answer.split()) + [()]


def pack(tok, questions: list[list[scenes.Question]], where: list[np.ndarray]) -> dict[str, torch.Tensor]:
    """Questions of B pictures as `ids`, `block`, `offset`, `targets` and `focus` of Batch; `where` by `in_order`."""
    rows = [[encode(tok, q) for q in asked] for asked in questions]
    seen = [
        [np.stack([place[list(things)].any(0) for things in looks(q)]) for q in asked]
        for asked, place in zip(questions, where)
    ]
    return packed.pack(rows, seen, tok.pad_token_id)


def build(tok, split: str, seed: int, indices: list[int]) -> Batch:
    """A batch of scenes, which must share one layout."""
    drawn = [scenes.generate(split, seed, i) for i in indices]
    images = torch.from_numpy(np.stack([np.asarray(s.image) for s in drawn])).permute(0, 3, 1, 2)
    where = [places(s) for s in drawn]
    return Batch(
        views=views(images),
        labels=torch.from_numpy(np.stack([dense_labels(s, w) for s, w in zip(drawn, where)])),
        size=tuple(images.shape[-2:]),
        categories=[[q.category for q in s.questions] for s in drawn],
        **pack(tok, [s.questions for s in drawn], [in_order(w, s.layout) for s, w in zip(drawn, where)]),
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

    def layout(self, step: int) -> int:
        """That of all pictures of a step."""
        layouts = 2 if step < self.narrow else len(scenes.LAYOUTS)
        return int(np.random.default_rng((self.seed, step)).integers(layouts))

    def __getitem__(self, step: int) -> Batch:
        torch.set_num_threads(1)
        first, layout = step * self.batch, self.layout(step)
        indices = [i * len(scenes.LAYOUTS) + layout for i in range(first, first + self.batch)]
        return build(self.tok, self.split, self.seed, indices)

"""Items of the offline tasks as tensors: what the processor makes of them, questions, and what lies in every patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from recipes import items
from recipes.family import Family, letter, patches
from recipes.items import Lexicon
from recipes.packed import IGNORE, Encoded, pack
from recipes.text import taught
from vtok.eval.tasks.task import Item, Question, Task
from vtok.media import Clip

# Categories whose answer stands in its box, to be read, and the margin of the box in pixels.
READ = {
    ("scenes", "reading"): 2,
    ("needle", "code"): 3,
    ("documents", "code"): 2,
    ("documents", "number"): 2,
    ("documents", "cell"): 2,
    ("documents", "total"): 2,
    ("text", "letter"): 0,
}


@dataclass
class Batch:
    """Items of one task as tensors. The S patches of all media lie one after the other, see `Family`."""

    task: str
    media: dict[str, Any]  # as the processor has them
    labels: torch.Tensor  # bool [S, labels and characters]
    words: torch.Tensor  # bool [N, content words and characters] that each visual token shows
    prefix: torch.Tensor  # [B, P] ids up to the questions, padded on the right
    kinds: torch.Tensor  # [B, P] 0 = text, 1 = image, 2 = video
    there: torch.Tensor  # bool [B, P], False = padding
    ids: torch.Tensor  # [B, Q] and the following as `packed.pack` makes them
    block: torch.Tensor
    offset: torch.Tensor
    targets: torch.Tensor
    focus: torch.Tensor  # bool [B, Q, P]
    asked: torch.Tensor  # bool [B, Q, Q] words that matter of the question that a target answers
    categories: list[list[str]]  # [B][questions]

    def to(self, device: torch.device) -> Batch:
        move = lambda x: x.to(device, non_blocking=True) if isinstance(x, torch.Tensor) else x
        media = {name: move(x) for name, x in self.media.items()}
        return replace(self, **{name: move(x) for name, x in vars(self).items()} | {"media": media})


@cache
def _encode(tok, text: str) -> tuple[int, ...]:
    return tuple(tok(text, add_special_tokens=False)["input_ids"])


def encode(tok, question: Question, spelled: bool = False) -> Encoded:
    """Token ids of a question and its answer as the chat template writes them, and how many are the question's.

    spelled: the answer letter by letter, whatever longer tokens there are."""
    prompt = _encode(tok, f"{question.text}<|im_end|><|im_start|>assistant")
    if spelled:
        letters = tuple(_encode(tok, letter)[0] for letter in question.answer)
        return prompt + _encode(tok, " ") + letters + _encode(tok, "<|im_end|>"), len(prompt)
    return prompt + _encode(tok, f" {question.answer}<|im_end|>"), len(prompt)


def telling(tok, word: str) -> int:
    """The token that a word is known by: its first but for a bare space."""
    ids = _encode(tok, word)
    return next((i for i in ids if i not in _encode(tok, " ")), ids[0])


def _annotate(
    item: Item, task: str, lexicon: Lexicon, rows: list[Encoded], family: Family
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """labels [S, ...], words [N, ...] and, for each question, what to look at for each token of its answer."""
    size, known = len(lexicon.labels), len(lexicon.content)
    planes, order, looks = family.planes(item), family.tokens(item), []

    def tokens(patches: np.ndarray) -> np.ndarray:
        """Which visual tokens hold one of the patches, bool [N]."""
        shown = patches.reshape(-1, family.merge).any(-1)
        return shown if order is None else np.append(shown, False)[order]

    nothing = np.zeros(sum(len(plane.order) for plane in planes), dtype=bool)
    labels = np.zeros((len(nothing), size + 2 * len(lexicon.characters)), dtype=bool)
    words = np.zeros((len(tokens(nothing)), known + len(lexicon.characters)), dtype=bool)

    for q, (ids, prompt) in zip(item.questions, rows):
        seen = np.logical_or.reduce([nothing, *(patches(planes, box) for box in q.boxes)])
        look = np.repeat(tokens(seen)[None], len(ids) - prompt, axis=0)
        look[-1] = False  # nothing, for the end
        if items.single(q):
            label = lexicon.label.get((task, q.category, q.answer))
            if label is not None:
                labels[seen, label] = True
            read = (task, q.category) in READ
            for word in (*items.naming(q.text), *(() if read else items.pieces(f" {q.answer}"))):
                if word in lexicon.named:
                    words[tokens(seen), lexicon.named[word]] = True
            if read:
                spelled = len(ids) - prompt == len(q.answer) + 2
                for i, (said, box) in enumerate(items.letters(q, READ[task, q.category])):
                    patch, half = letter(planes, box)
                    if said in lexicon.characters:
                        n = lexicon.characters.index(said)
                        labels[patch, size + half * len(lexicon.characters) + n] = True
                        words[tokens(patch), known + n] = True
                    if spelled:
                        look[1 + i] = tokens(patch)
        looks.append(look)
    return labels, words, looks


def build(family: Family, kit, lexicon: Lexicon, task: str, some: Sequence[Item]) -> Batch:
    """A batch of items of one task, by the processor `kit`."""
    tok = kit.tokenizer
    rows = [[encode(tok, q, family.spells and (task, q.category) in READ) for q in item.questions] for item in some]
    notes = [_annotate(item, task, lexicon, row, family) for item, row in zip(some, rows)]
    packed = pack(rows, [looks for _, _, looks in notes], tok.pad_token_id)
    if some[0].media == "video":
        clips = [Clip(item.images, item.fps) for item in some]
        given = {"videos": [list(clip.frames) for clip in clips], "do_sample_frames": False}
        given["video_metadata"] = [clip.metadata for clip in clips]
        shown = [family.video] * len(some)
    else:
        given = {"images": [list(item.images) for item in some]}
        shown = [family.image * len(item.images) for item in some]
    texts = [f"<|im_start|>user\n{each}" for each in shown]
    media = dict(kit(text=texts, padding=True, padding_side="right", return_tensors="pt", **given))
    prefix, there = media.pop("input_ids"), media.pop("attention_mask").bool()
    kinds = (prefix == kit.image_token_id) + 2 * (prefix == getattr(kit, "video_token_id", -1))
    focus = torch.zeros(*packed["ids"].shape, prefix.shape[1], dtype=torch.bool)
    for b, visual in enumerate(kinds > 0):
        focus[b][:, visual] = packed["focus"][b, :, : int(visual.sum())]
    named = torch.tensor([telling(tok, word) for word in lexicon.content])
    told = torch.isin(packed["ids"], named) & (packed["targets"] == IGNORE)  # in questions: an answer is no help
    asked = (packed["block"][:, :, None] == packed["block"][:, None]) & told[:, None]
    return Batch(
        task=task,
        media=media,
        labels=torch.from_numpy(np.concatenate([labels for labels, _, _ in notes])),
        words=torch.from_numpy(np.concatenate([words for _, words, _ in notes])),
        prefix=prefix,
        kinds=kinds,
        there=there,
        asked=asked & (packed["targets"] != IGNORE)[..., None],
        categories=[[q.category for q in item.questions] for item in some],
        **packed | {"focus": focus},
    )


def shown_ids(tok, lexicon: Lexicon) -> torch.Tensor:
    """Token ids of what `Batch.words` tells of, [content words and characters]."""
    return torch.tensor([telling(tok, word) for word in (*lexicon.content, *lexicon.characters)])


class Parts:
    """The batch of every part of a training step: a function of seed and index, so a resumed run sees the same."""

    def __init__(
        self, family: Family, kit, lexicon: Lexicon, tasks: Mapping[str, tuple[float, int]], split: str, seed: int
    ):
        self.family, self.kit, self.lexicon, self.split, self.seed = family, kit, lexicon, split, seed
        self.tasks = [taught(name) for name in tasks]
        self.shares = np.array([share for share, _ in tasks.values()])
        self.sizes = {name: size for name, (_, size) in tasks.items()}

    def task(self, index: int) -> Task:
        """What a part is about."""
        pick = np.random.default_rng((self.seed, index)).choice(len(self.tasks), p=self.shares / self.shares.sum())
        return self.tasks[int(pick)]

    def kind(self, index: int) -> str:
        return self.task(index).name

    def __getitem__(self, index: int) -> Batch:
        return self.of(self.task(index), index)

    def of(self, task: Task, index: int) -> Batch:
        """A batch of that task."""
        drawn = items.draw(task, self.split, self.seed, index, self.sizes[task.name])
        return build(self.family, self.kit, self.lexicon, task.name, drawn)

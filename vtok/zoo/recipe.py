"""The recipe of the models for the offline tasks, pictures and clips; a `Family` says what is peculiar to one model.

First the vision tower alone, on what lies in every patch, then everything on questions. What lies where comes from the
boxes of the questions.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vtok import zoo
from vtok.eval.tasks import task as offline
from vtok.eval.tasks.task import Box, Item, Question, Task
from vtok.media import Clip
from vtok.zoo import items, loop
from vtok.zoo.items import Lexicon
from vtok.zoo.muon import Muon
from vtok.zoo.packed import IGNORE, PADDING, PREFIX, Encoded, focus_loss, pack, share_loss, visible
from vtok.zoo.text import taught

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # of ChatML
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


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    # task -> its share of the parts, and how many of its items go through the model together
    tasks: Mapping[str, tuple[float, int]] = field(
        default_factory=lambda: {
            "scenes": (1.5, 8),
            "needle": (2.0, 2),
            "existence": (1.0, 3),
            "documents": (2.5, 2),
            "charts": (1.5, 6),
            "video": (2.0, 4),
        }
    )
    # likewise what the first stage has besides, of tasks and of `text`
    tower_tasks: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    words: int = 400  # training items of each task, whose words the model knows
    tower_steps: int = 1200  # stage 1: dense labels
    steps: int = 1600  # stage 2: questions
    parts: int = 6  # a step
    lr: float = 2e-3  # of AdamW
    matrix_lr: float = 3e-3  # of Muon, scaled to updates of AdamW's size
    warmup: int = 100
    cooldown: float = 0.4  # the last share of a stage, in which the learning rate falls to 0
    decay: float = 0.05
    tower_lr: float = 0.5  # factor on the learning rate of the tower in stage 2: it knows something by then
    dense_weight: float = 0.2  # of the dense loss in stage 2
    word_weight: float = 0.5  # of the loss that ties visual tokens to words
    focus_weight: float = 0.5  # of the loss that teaches two heads where to look
    start: str = ""  # bundled model whose weights to begin with, its decoder's if of another family; fresh if empty


class Family(ABC):
    """What the recipe has to know of a model.

    Patches, S of all media of a batch, lie token by token: the `merge` patches of one visual token together.
    merge: patches of a visual token. image, video: how a prompt says that one stands there.
    """

    merge: int
    image: str
    video: str

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

    @abstractmethod
    def tower_states(self, net: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Last hidden states of the vision tower [S, D], the visual tokens [S / merge, D'] and the states of CLS.

        These are [V, D] for views of S / V patches; None for a tower without CLS.
        """

    @abstractmethod
    def places(self, net: nn.Module, batch: Batch) -> torch.Tensor:
        """Position ids of the prefix, [B, P] or [axes, B, P]."""


# ----------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Items of one task as tensors. The S patches of all media lie one after the other, see `Family`."""

    task: str
    media: dict[str, Any]  # as the processor has them
    labels: torch.Tensor  # bool [S, labels and characters]
    words: torch.Tensor  # bool [S / merge, content words and characters] that each visual token shows
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


@dataclass(frozen=True)
class Plane:
    """A grid of patches that lies over one picture, or over some frames of a clip.

    frames: the pictures or frames. scale: patches a pixel across and down. order: its patches, numbered in raster
    order, [rows * columns] as they lie in the batch. sharp: whether it shows letters.
    """

    frames: range
    rows: int
    columns: int
    scale: tuple[float, float]
    order: np.ndarray
    sharp: bool = True

    def patches(self, box: Box) -> np.ndarray:
        """Those that show what is in a box, bool [rows * columns]."""
        frame, *edges = box
        if int(frame) not in self.frames:
            return np.zeros(len(self.order), dtype=bool)
        left, top, right, bottom = (edge * self.scale[i % 2] for i, edge in enumerate(edges))
        seen = items.covered((frame, left, top, right, bottom), self.rows, self.columns, 1)
        return seen.ravel()[self.order]


class Ground:
    """Which patches of an item show what lies in a box."""

    def __init__(self, planes: Sequence[Plane]):
        self.planes = planes
        self.size = sum(len(plane.order) for plane in planes)

    def patches(self, box: Box) -> np.ndarray:
        """bool [S]"""
        return np.concatenate([plane.patches(box) for plane in self.planes])

    def letter(self, box: Box) -> tuple[np.ndarray, int]:
        """The one patch that a letter counts for, bool [S], and the half of it that its middle lies in."""
        frame, left, top, right, bottom = box
        out = np.zeros(self.size, dtype=bool)
        half = start = 0
        for plane in self.planes:
            if plane.sharp and int(frame) in plane.frames:
                x, y = (left + right) / 2 * plane.scale[0], (top + bottom) / 2 * plane.scale[1]
                raster = np.zeros((plane.rows, plane.columns), dtype=bool)
                raster[int(y), int(x)] = True
                out[start : start + len(plane.order)] = raster.ravel()[plane.order]
                half = int(x % 1 >= 0.5)
            start += len(plane.order)
        return out, half


def grouped(rows: int, columns: int, side: int) -> np.ndarray:
    """The cells of a grid in raster order, those of a square of `side` x `side` together, [rows * columns]."""
    index = np.arange(rows * columns).reshape(rows // side, side, columns // side, side)
    return index.transpose(0, 2, 1, 3).ravel()


@cache
def _encode(tok, text: str) -> tuple[int, ...]:
    return tuple(tok(text, add_special_tokens=False)["input_ids"])


def encode(tok, question: Question) -> Encoded:
    """Token ids of a question and its answer as the chat template writes them, and how many are the question's."""
    prompt = _encode(tok, f"{question.text}<|im_end|><|im_start|>assistant")
    return prompt + _encode(tok, f" {question.answer}<|im_end|>"), len(prompt)


def _annotate(
    item: Item, task: str, lexicon: Lexicon, rows: list[Encoded], ground: Ground, merge: int
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """labels [S, ...], words [S / merge, ...] and, for each question, what to look at for each token of its answer."""
    size, known = len(lexicon.labels), len(lexicon.content)
    labels = np.zeros((ground.size, size + 2 * len(lexicon.characters)), dtype=bool)
    words = np.zeros((ground.size // merge, known + len(lexicon.characters)), dtype=bool)
    looks = []

    def tokens(patches: np.ndarray) -> np.ndarray:
        """Which visual tokens hold one of the patches, bool [S / merge]."""
        return patches.reshape(-1, merge).any(-1)

    for q, (ids, prompt) in zip(item.questions, rows):
        seen = np.zeros(ground.size, dtype=bool)
        for box in q.boxes:
            seen |= ground.patches(box)
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
                for i, (letter, box) in enumerate(items.letters(q, READ[task, q.category])):
                    patch, half = ground.letter(box)
                    if letter in lexicon.characters:
                        n = lexicon.characters.index(letter)
                        labels[patch, size + half * len(lexicon.characters) + n] = True
                        words[tokens(patch), known + n] = True
                    if spelled:
                        look[1 + i] = tokens(patch)
        looks.append(look)
    return labels, words, looks


def build(family: Family, kit, lexicon: Lexicon, task: str, some: Sequence[Item]) -> Batch:
    """A batch of items of one task, by the processor `kit`."""
    tok = kit.tokenizer
    rows = [[encode(tok, q) for q in item.questions] for item in some]
    notes = [
        _annotate(item, task, lexicon, row, Ground(family.planes(item)), family.merge) for item, row in zip(some, rows)
    ]
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
    named = torch.tensor([_encode(tok, word)[0] for word in lexicon.content])
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
    return torch.tensor([_encode(tok, word)[0] for word in (*lexicon.content, *lexicon.characters)])


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


# ---------------------------------------------------------------------------------------------------- training


def question_states(family: Family, net, features: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Last hidden states of the decoder for `batch.ids`, [B, Q, D], from the visual tokens [S / merge, D]."""
    embed = net.get_input_embeddings()
    places = family.places(net, batch)
    # The prefix ends in text, so its last position is the highest.
    last = batch.there.sum(1, keepdim=True) - 1  # [B, 1]
    start = places.gather(-1, last.expand(*places.shape[:-1], 1)) + 1
    places = torch.cat([places, start + batch.offset], dim=-1)
    before = embed(batch.prefix)
    before = before.masked_scatter((batch.kinds > 0)[..., None], features.to(before.dtype))
    prefix = torch.full_like(batch.prefix, PREFIX).masked_fill(~batch.there, PADDING - 2)
    return net.model.language_model(
        inputs_embeds=torch.cat([before, embed(batch.ids)], dim=1),
        attention_mask=visible(batch.block, prefix),
        position_ids=places,
        use_cache=False,
    ).last_hidden_state[:, prefix.shape[1] :]


class Heads(nn.Module):
    """Read-outs for the dense labels; training only. For each label a score, for each group whether it has any.

    CLS is asked which things its view shows at all, which teaches its attention to look at them. Token selectors read
    that attention.
    """

    def __init__(self, width: int, lexicon: Lexicon):
        super().__init__()
        labels = len(lexicon.labels) + 2 * len(lexicon.characters)
        self.norm = nn.LayerNorm(width)
        self.which = nn.Linear(width, labels)
        self.some = nn.Linear(width, len(lexicon.groups) + 2)
        self.cls = nn.Linear(width, labels)


def groups_of(task: str, lexicon: Lexicon) -> list[tuple[int, list[int]]]:
    """(number of the group, its labels) of the groups that items of a task are labelled with."""
    found = [(n, labels) for n, ((name, _), labels) in enumerate(lexicon.groups.items()) if name == task]
    if any(name == task for name, _ in READ):
        first, size = len(lexicon.labels), len(lexicon.characters)
        found += [
            (len(lexicon.groups) + half, list(range(first + half * size, first + (half + 1) * size))) for half in (0, 1)
        ]
    return found


def dense_loss(
    heads: Heads, states: torch.Tensor, cls: torch.Tensor | None, batch: Batch, lexicon: Lexicon
) -> torch.Tensor:
    """Per group of labels: does the patch show one (all patches), which (patches that do), and which does the view."""
    states, loss = heads.norm(states), torch.zeros(())
    which, some = heads.which(states).float(), heads.some(states).float()
    seen = None if cls is None else heads.cls(heads.norm(cls)).float()
    for n, labels in groups_of(batch.task, lexicon):
        truth = batch.labels[:, labels]
        loss = loss + 5 * F.binary_cross_entropy_with_logits(some[:, n], truth.any(-1).float())
        loss = loss + share_loss(which[:, labels], truth)
        if seen is not None:
            there = truth.unflatten(0, (len(seen), -1)).any(1)
            loss = loss + 2 * F.binary_cross_entropy_with_logits(seen[:, labels], there.float())
    return loss


def word_loss(features: torch.Tensor, words: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Pulls the visual tokens, [N, D], towards the embeddings, [W, D], of the words for what they show.

    The decoder can then find a thing by its word and say what it finds; else it has to discover first that the two
    correspond, which takes longest.
    """
    return share_loss(12 * F.normalize(features.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T, truth)


def tower_loss(index: int, data: Parts, net, heads: Heads, words: torch.Tensor, recipe: Recipe):
    """Loss of one part of stage 1, and what the log says of it."""
    batch = data[index]
    with loop.autocast():
        states, features, cls = data.family.tower_states(net, batch)
        dense = dense_loss(heads, states, cls, batch, data.lexicon)
        named = word_loss(features, net.get_input_embeddings()(words), batch.words)
    answer = {"pictures": len(batch.there), f"dense {batch.task}": dense.item(), "words": named.item()}
    return dense + recipe.word_weight * named, answer


def question_loss(index: int, data: Parts, net, heads: Heads, words: torch.Tensor, recipe: Recipe):
    """The same of stage 2."""
    batch = data[index]
    with loop.autocast():
        states, features, cls = data.family.tower_states(net, batch)
        dense = dense_loss(heads, states, cls, batch, data.lexicon)
        named = word_loss(features, net.get_input_embeddings()(words), batch.words)
        wanted = batch.targets != IGNORE
        logits = net.lm_head(question_states(data.family, net, features, batch)[wanted]).float()
        asked = F.cross_entropy(logits, batch.targets[wanted])
        focus = focus_loss(net.model.language_model.layers, batch.asked, batch.focus)
    loss = asked + recipe.dense_weight * dense + recipe.word_weight * named + recipe.focus_weight * focus
    answer = {"dense": dense.item(), "words": named.item(), "focus": focus.item(), batch.task: asked.item()}
    return loss, answer | {"pictures": len(batch.there), "questions": sum(map(len, batch.categories))}


@torch.no_grad()
def accuracy(family: Family, net, batches: Sequence[Batch]) -> dict[str, float]:
    """Exact match per task and category; teacher-forced, which for greedy decoding is the same."""
    right: dict[str, list[bool]] = {}
    for batch in batches:
        with loop.autocast():
            states = question_states(family, net, family.tower_states(net, batch)[1], batch)
            best = net.lm_head(states).argmax(-1)
        good = (best == batch.targets) | (batch.targets == IGNORE)
        for b, categories in enumerate(batch.categories):
            for n, category in enumerate(categories):
                right.setdefault(f"{batch.task}/{category}", []).append(bool(good[b, batch.block[b] == n].all()))
    return {name: sum(hits) / len(hits) for name, hits in sorted(right.items())}


def optimisers(modules: Mapping[nn.Module, float], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for all else: patches, embeddings, read-outs, biases, norms."""
    inner, outer = [], []
    for module, scale in modules.items():
        weights = dict(module.named_parameters())
        linear = {f"{n}.weight" for n, part in module.named_modules() if isinstance(part, nn.Linear)}
        deep = [] if isinstance(module, Heads) else sorted(linear & weights.keys())
        rest = [p for n, p in weights.items() if n not in deep]
        if deep:
            inner.append({"params": [weights[n] for n in deep], "peak": recipe.matrix_lr * scale})
        for many in (True, False):
            some = [p for p in rest if (p.ndim > 1) == many]
            if some:
                outer.append({"params": some, "weight_decay": recipe.decay * many, "peak": recipe.lr * scale})
    found = [torch.optim.AdamW(outer, lr=recipe.lr, betas=(0.9, 0.98))]
    if inner:
        found.append(Muon(inner, lr=recipe.matrix_lr, weight_decay=recipe.decay))
    return found


def rate(step: int, total: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: a linear rise, a plateau, a linear fall to 0.

    Unlike a cosine it does not depend on the end until the fall begins, so a run can be made longer on the way.
    """
    return min(1.0, (step + 1) / recipe.warmup, (total - step) / max(1.0, recipe.cooldown * total))


@torch.no_grad()
def borrow(net, tok, other, other_tok) -> None:
    """Give a model the decoder of another: all its layers, and the embeddings of the tokens that both know.

    It can then read and answer from the first step, and has to learn only to see.
    """
    mine, theirs = net.model.language_model, other.model.language_model
    for part in ("layers", "norm"):
        getattr(mine, part).load_state_dict(getattr(theirs, part).state_dict())
    known = other_tok.get_vocab()
    both = {token: row for token, row in tok.get_vocab().items() if token in known}
    mine.embed_tokens.weight[list(both.values())] = theirs.embed_tokens.weight[[known[token] for token in both]]


def _lexicon(recipe: Recipe, file: Path) -> Lexicon:
    """The lexicon that the run began with: a resumed run has its words, whatever became of the tasks."""
    if not file.exists():
        made = items.lexicon([offline.get(name) for name in recipe.tasks], READ, recipe.words)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(made)))
    return Lexicon.of_lists(json.loads(file.read_text()))


def train(family: Family, out: Path, recipe: Recipe, workers: int = 2, check: int = 8, **options) -> None:
    """Train into the hub folder `out`; `options` are those of `loop.fit`.

    check: parts of each task that validation looks at.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the team forks
    torch.set_num_threads(1)
    lexicon = _lexicon(recipe, loop.state_file(out).with_name("lexicon.json"))
    kit = family.processor(lexicon)
    net = family.model(kit.tokenizer, recipe.seed)
    before = None
    if recipe.start:
        other, other_kit = zoo.load(recipe.start)
        borrow(net, kit.tokenizer, other, other_kit.tokenizer)
        if type(other) is type(net):
            family.tower(net).load_state_dict(family.tower(other).state_dict())
            before = json.loads((zoo.path(recipe.start) / "training.json").read_text())
    net.set_attn_implementation("zoo_packed")
    net.share_memory()
    heads = Heads(net.config.vision_config.hidden_size, lexicon).share_memory()
    words = shown_ids(kit.tokenizer, lexicon)
    known = {"net": net, "heads": heads, "words": words, "recipe": recipe}
    taught = recipe.tasks | recipe.tower_tasks, recipe.tasks
    data = [Parts(family, kit, lexicon, tasks, "train", recipe.seed + n) for n, tasks in enumerate(taught)]
    val = Parts(family, kit, lexicon, recipe.tasks, "val", recipe.seed)
    held = [val.of(task, part) for task in val.tasks for part in range(check)]
    tower, decoder = family.tower(net), net.model.language_model  # the head of the decoder is tied to its embeddings
    stages = [
        loop.Stage(
            "tower", recipe.tower_steps, recipe.parts, {tower: 1.0, heads: 1.0, decoder.embed_tokens: 1.0},
            partial(tower_loss, data=data[0], **known), data[0].kind,
        ),
        loop.Stage(
            "questions", recipe.steps, recipe.parts, {tower: recipe.tower_lr, heads: 1.0, decoder: 1.0},
            partial(question_loss, data=data[1], **known), data[1].kind, partial(accuracy, family, net, held),
        ),
    ]  # fmt: skip
    how = partial(optimisers, recipe=recipe), partial(rate, recipe=recipe)
    trained = loop.Trained(net, heads, kit, recipe, *how, before)
    loop.fit(trained, stages, out, workers, **options)

"""The recipe of vtok-tiny-qwen2.5-vl: a Qwen2.5-VL for the offline tasks, pictures and clips.

First the vision tower alone, on what lies in every patch, then everything on questions. What lies where comes from the
boxes of the questions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vtok.eval import task as offline
from vtok.eval.task import Box, Item, Question, Task
from vtok.zoo import items, loop
from vtok.zoo.architecture import prepare
from vtok.zoo.items import Lexicon
from vtok.zoo.packed import IGNORE, PADDING, PREFIX, Encoded, attend, focus_loss, pack, share_loss, visible
from vtok.zoo.words import tokenizer

NAME = "vtok-tiny-qwen2.5-vl"
PATCH, MERGE, FRAMES = 8, 2, 2  # pixels a patch, patches a token's side, frames a patch
WINDOW = 64  # pixels
# Temporal positions a second. With more, those of a clip at 4 frames a second lie beyond the end of a short question,
# and `generate` counts on from them, unlike a forward over question and answer.
PER_SECOND = 8
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
IMAGE, VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
# tests `type` rather than the presence of a key: datasets fill absent keys of content parts with None
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ ' ' if m['role'] == 'assistant' else '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}" + IMAGE + "{% elif c['type'] == 'video' %}" + VIDEO + "{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# Categories whose answer stands in its box, to be read, and the margin of the box in pixels.
READ = {
    ("scenes", "reading"): 2,
    ("needle", "code"): 3,
    ("documents", "code"): 2,
    ("documents", "number"): 2,
    ("documents", "cell"): 2,
    ("documents", "total"): 2,
}


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    # task -> its share of the parts, and how many of its items go through the model together
    tasks: Mapping[str, tuple[float, int]] = field(
        default_factory=lambda: {
            "scenes": (1.0, 2),
            "needle": (2.0, 2),
            "existence": (1.0, 2),
            "documents": (2.0, 2),
            "charts": (1.5, 6),
            "video": (2.0, 4),
        }
    )
    words: int = 400  # training items of each task, whose words the model knows
    tower_steps: int = 3000  # stage 1: dense labels
    steps: int = 12000  # stage 2: questions
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


# ------------------------------------------------------------------------------------------------ architecture


def processor(lexicon: Lexicon) -> Qwen2_5_VLProcessor:
    tok = tokenizer(lexicon.words, SPECIAL, end="<|im_end|>", pad="<|endoftext|>", template=TEMPLATE)
    pixels = {
        "size": {"shortest_edge": (PATCH * MERGE) ** 2, "longest_edge": 512**2},
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**pixels),
        tok,
        Qwen2VLVideoProcessor(**pixels),
        chat_template=TEMPLATE,
    )


def model(tok, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised model, float32, for the tokens of `tok`."""
    named = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    ids = {"bos_token_id": None, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id}
    vision = {
        "depth": 6,
        "hidden_size": 160,
        "intermediate_size": 320,
        "num_heads": 5,
        "out_hidden_size": 192,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "tokens_per_second": PER_SECOND,
        "window_size": WINDOW,
        "fullatt_block_indexes": [2, 5],
    }
    text = {
        "vocab_size": -(-len(tok) // 64) * 64,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        # A small base: the sections for height and width must tell 16 rows and columns apart.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [8, 12, 12]},
        **ids,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        **{f"{key}_token_id": tok.convert_tokens_to_ids(f"<|{name}|>") for key, name in named.items()},
    )
    torch.manual_seed(seed)
    net = Qwen2_5_VLForConditionalGeneration(config)
    return prepare(net, ids, max_new_tokens=12)


# ----------------------------------------------------------------------------------------------------- batches


@dataclass
class Batch:
    """Items of one task as tensors. The S patches of all media lie one after the other, in the processor's order."""

    task: str
    patches: torch.Tensor  # uint8 [S, 3 * FRAMES * PATCH * PATCH]
    grids: torch.Tensor  # [media, 3] frames, rows and columns of patches
    seconds: list[float]  # between two temporal positions of each clip
    labels: torch.Tensor  # bool [S, labels and characters]
    words: torch.Tensor  # bool [S / 4, content words] that each visual token shows
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


@cache
def _order(frames: int, rows: int, columns: int) -> np.ndarray:
    """Patches of a medium in raster order, as the processor orders them: the four of a token together."""
    index = np.arange(frames * rows * columns).reshape(frames, rows // MERGE, MERGE, columns // MERGE, MERGE)
    return index.transpose(0, 1, 3, 2, 4).ravel()


def patchify(frames: np.ndarray) -> torch.Tensor:
    """What the processor makes of frames, uint8 [F, H, W, 3] with F a multiple of FRAMES.

    Returns [S, 3 * FRAMES * PATCH * PATCH], still in 0..255.
    """
    t, h, w = len(frames) // FRAMES, frames.shape[1] // PATCH, frames.shape[2] // PATCH
    x = frames.reshape(t, FRAMES, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    x = x.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # t, rows, columns, 2, 2, 3, FRAMES, PATCH, PATCH
    return torch.from_numpy(np.ascontiguousarray(x).reshape(t * h * w, -1))


def media(item: Item) -> list[np.ndarray]:
    """The media of an item, each uint8 [F, H, W, 3] as the processor fills them up: a picture is there twice."""
    pictures = [np.asarray(image) for image in item.images]
    if item.media == "image":
        return [np.stack([picture] * FRAMES) for picture in pictures]
    return [np.stack(pictures + pictures[-1:] * (-len(pictures) % FRAMES))]


class Ground:
    """Which patches of an item show what lies in a box."""

    def __init__(self, video: bool, grids: Sequence[tuple[int, int, int]]):
        self.video, self.grids = video, grids
        self.starts = np.cumsum([0] + [t * h * w for t, h, w in grids])

    def patches(self, box: Box) -> np.ndarray:
        """bool [S]"""
        medium, frame = (0, int(box[0]) // FRAMES) if self.video else (int(box[0]), 0)
        t, h, w = self.grids[medium]
        seen = np.zeros((t, h, w), dtype=bool)
        seen[frame] = items.covered(box, h, w, PATCH)
        out = np.zeros(self.starts[-1], dtype=bool)
        out[self.starts[medium] : self.starts[medium + 1]] = seen.ravel()[_order(t, h, w)]
        return out

    def letter(self, box: Box) -> tuple[np.ndarray, int]:
        """The one patch that a letter counts for, bool [S], and the half of it that its middle lies in."""
        frame, left, top, right, bottom = box
        x, y = (left + right) / 2 / PATCH, (top + bottom) / 2 / PATCH
        cell = (frame, int(x) * PATCH, int(y) * PATCH, (int(x) + 1) * PATCH, (int(y) + 1) * PATCH)
        return self.patches(cell), int(x % 1 >= 0.5)


def tokens(patches: np.ndarray) -> np.ndarray:
    """Which visual tokens hold one of the patches, bool [..., S] -> [..., S / 4]."""
    return patches.reshape(*patches.shape[:-1], -1, MERGE**2).any(-1)


@cache
def _encode(tok, text: str) -> tuple[int, ...]:
    return tuple(tok(text, add_special_tokens=False)["input_ids"])


def encode(tok, question: Question) -> Encoded:
    """Token ids of a question and its answer as the chat template writes them, and how many are the question's."""
    prompt = _encode(tok, f"{question.text}<|im_end|><|im_start|>assistant")
    return prompt + _encode(tok, f" {question.answer}<|im_end|>"), len(prompt)


def _annotate(
    item: Item, task: str, lexicon: Lexicon, rows: list[Encoded], ground: Ground
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """labels [S, ...], words [S / 4, ...] and, for each question, what to look at for each token of its answer."""
    size = len(lexicon.labels)
    labels = np.zeros((ground.starts[-1], size + 2 * len(lexicon.characters)), dtype=bool)
    words = np.zeros((len(labels) // MERGE**2, len(lexicon.content)), dtype=bool)
    looks = []
    for q, (ids, prompt) in zip(item.questions, rows):
        seen = np.zeros(len(labels), dtype=bool)
        for box in q.boxes:
            seen |= ground.patches(box)
        look = np.repeat(tokens(seen)[None], len(ids) - prompt, axis=0)
        look[-1] = False  # nothing, for the end
        if items.single(q):
            label = lexicon.label.get((task, q.category, q.answer))
            if label is not None:
                labels[seen, label] = True
            for word in (*items.naming(q.text), *items.pieces(f" {q.answer}")):
                if word in lexicon.named:
                    words[tokens(seen), lexicon.named[word]] = True
            if (task, q.category) in READ:
                spelled = len(ids) - prompt == len(q.answer) + 2
                for i, (letter, box) in enumerate(items.letters(q, READ[task, q.category])):
                    patch, half = ground.letter(box)
                    if letter in lexicon.characters:
                        n = lexicon.characters.index(letter)
                        labels[patch, size + half * len(lexicon.characters) + n] = True
                    if spelled:
                        look[1 + i] = tokens(patch)
        looks.append(look)
    return labels, words, looks


def _prefix(tok, item: Item, grids: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a user's turn up to the question, as template and processor write them, and the kind of each, both [P]."""
    kind, name = (1, "image") if item.media == "image" else (2, "video")
    turn, start, stop, pad = (
        _encode(tok, text) for text in ("<|im_start|>user\n", "<|vision_start|>", "<|vision_end|>", f"<|{name}_pad|>")
    )
    ids, kinds = [*turn], [0] * len(turn)
    for t, h, w in grids:
        count = t * h * w // MERGE**2
        ids += [*start, *pad * count, *stop]
        kinds += [0, *[kind] * count, 0]
    return torch.tensor(ids), torch.tensor(kinds)


def build(tok, lexicon: Lexicon, task: str, some: Sequence[Item]) -> Batch:
    """A batch of items of one task."""
    shown = [media(item) for item in some]
    grids = [[(len(m) // FRAMES, m.shape[1] // PATCH, m.shape[2] // PATCH) for m in each] for each in shown]
    rows = [[encode(tok, q) for q in item.questions] for item in some]
    notes = [
        _annotate(item, task, lexicon, row, Ground(item.media == "video", each))
        for item, row, each in zip(some, rows, grids)
    ]
    prefixes, kinds = zip(*(_prefix(tok, item, each) for item, each in zip(some, grids)))
    prefix = nn.utils.rnn.pad_sequence(prefixes, batch_first=True, padding_value=tok.pad_token_id)
    kinds = nn.utils.rnn.pad_sequence(kinds, batch_first=True)
    packed = pack(rows, [looks for _, _, looks in notes], tok.pad_token_id)
    focus = torch.zeros(*packed["ids"].shape, prefix.shape[1], dtype=torch.bool)
    for b, visual in enumerate(kinds > 0):
        focus[b][:, visual] = packed["focus"][b, :, : int(visual.sum())]
    named = torch.tensor([_encode(tok, word)[0] for word in lexicon.content])
    told = torch.isin(packed["ids"], named) & (packed["targets"] == IGNORE)  # in questions: an answer is no help
    asked = (packed["block"][:, :, None] == packed["block"][:, None]) & told[:, None]
    return Batch(
        task=task,
        patches=torch.cat([patchify(m) for each in shown for m in each]),
        grids=torch.tensor([grid for each in grids for grid in each]),
        seconds=[FRAMES / item.fps for item in some if item.media == "video"],
        labels=torch.from_numpy(np.concatenate([labels for labels, _, _ in notes])),
        words=torch.from_numpy(np.concatenate([words for _, words, _ in notes])),
        prefix=prefix,
        kinds=kinds,
        there=torch.arange(prefix.shape[1]) < torch.tensor([len(ids) for ids in prefixes])[:, None],
        asked=asked & (packed["targets"] != IGNORE)[..., None],
        categories=[[q.category for q in item.questions] for item in some],
        **packed | {"focus": focus},
    )


class Parts:
    """The batch of every part of a training step: a function of seed and index, so a resumed run sees the same."""

    def __init__(self, tok, lexicon: Lexicon, recipe: Recipe, split: str, seed: int):
        self.tok, self.lexicon, self.recipe, self.split, self.seed = tok, lexicon, recipe, split, seed
        self.tasks = [offline.get(name) for name in recipe.tasks]
        self.shares = np.array([share for share, _ in recipe.tasks.values()])

    def __getitem__(self, index: int) -> Batch:
        pick = np.random.default_rng((self.seed, index)).choice(len(self.tasks), p=self.shares / self.shares.sum())
        return self.of(self.tasks[int(pick)], index)

    def of(self, task: Task, index: int) -> Batch:
        """A batch of that task."""
        drawn = items.draw(task, self.split, self.seed, index, self.recipe.tasks[task.name][1])
        return build(self.tok, self.lexicon, task.name, drawn)


# ------------------------------------------------------------------------------------------------------- model


@cache
def _windows(grid: tuple[int, int, int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of a medium window by window, and how many each window has. At the edges they are smaller."""
    t, h, w = grid[0], grid[1] // MERGE, grid[2] // MERGE
    index, side = np.arange(t * h * w).reshape(t, h, w), WINDOW // PATCH // MERGE
    cut = [
        index[f, y : y + side, x : x + side].ravel()
        for f in range(t)
        for y in range(0, h, side)
        for x in range(0, w, side)
    ]
    return tuple(np.concatenate(cut).tolist()), tuple(map(len, cut))


def _chunks(lengths: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of chunks that lie one after the other: their places [C, L], and what masks the filling, or None."""
    sizes = torch.tensor(lengths)
    starts, places = sizes.cumsum(0) - sizes, torch.arange(max(lengths))
    filled = places < sizes[:, None]
    mask = torch.zeros(filled.shape, dtype=torch.bfloat16).masked_fill(~filled, float("-inf"))[:, None, None]
    return (starts[:, None] + places).where(filled, starts[:, None]), None if filled.all() else mask


def _chunk_attention(attention, x, rotary, chunks):
    """Attention of a vision block within chunks, [S, D] -> [S, D]."""
    index, mask = chunks
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1))  # [S, 3, H, d]
    cos, sin = rotary
    half = qkv.shape[-1] // 2
    turned = qkv[:, :2] * cos + torch.cat([-qkv[:, :2, :, half:], qkv[:, :2, :, :half]], dim=-1) * sin
    q, k, v = turned[:, 0] * attention.scaling, turned[:, 1], qkv[:, 2]  # [S, H, d]
    if mask is None:
        q, k, v = (part.unflatten(0, index.shape).transpose(1, 2) for part in (q, k, v))  # [C, H, L, d]
        return attention.proj(attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1))
    q, k, v = (part.index_select(0, index.flatten()).unflatten(0, index.shape).transpose(1, 2) for part in (q, k, v))
    out = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # [C, L, D]
    return attention.proj(out[(mask == 0)[:, 0, 0]])


def tower_states(visual, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states of the vision tower and the visual tokens, [S, D] and [S / 4, D'], in the processor's order.

    What `visual` computes, without its loop over windows.
    """
    grids = [tuple(grid) for grid in batch.grids.tolist()]
    cuts = [_windows(grid) for grid in grids]
    before = np.cumsum([0] + [len(order) for order, _ in cuts])
    order = torch.cat([torch.tensor(cut) + int(n) for (cut, _), n in zip(cuts, before)])  # of tokens
    windows = _chunks([n * MERGE**2 for _, lengths in cuts for n in lengths])
    frames = _chunks([h * w for t, h, w in grids for _ in range(t)])
    places = []
    for t, h, w in grids:
        raster = torch.from_numpy(_order(1, h, w)).repeat(t)
        places.append(torch.stack([raster // w, raster % w], dim=-1))
    places = torch.cat(places).unflatten(0, (-1, MERGE**2))[order].flatten(0, 1)  # [S, 2]
    cos, sin = (table.to(torch.bfloat16)[:, None, None] for table in visual.rotary_pos_emb(batch.patches, places))
    pixels = batch.patches.float().div(127.5).sub(1).unflatten(0, (-1, MERGE**2))[order].flatten(0, 1)
    x = F.linear(pixels, visual.patch_embed.proj.weight.flatten(1))
    for n, block in enumerate(visual.blocks):
        chunks = frames if n in visual.fullatt_block_indexes else windows
        x = x + _chunk_attention(block.attn, block.norm1(x), (cos, sin), chunks)
        x = x + block.mlp(block.norm2(x))
    back = order.argsort()
    return x.unflatten(0, (-1, MERGE**2))[back].flatten(0, 1), visual.merger(x)[back]


def question_states(net, features: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Last hidden states of the decoder for `batch.ids`, [B, Q, D], from the visual tokens [S / 4, D]."""
    core, embed = net.model, net.get_input_embeddings()
    video = (batch.kinds == 2).any()
    grids = {"video_grid_thw" if video else "image_grid_thw": batch.grids}
    places, _ = core.get_rope_index(
        batch.prefix, batch.kinds, **grids, second_per_grid_ts=batch.seconds or None, attention_mask=batch.there
    )
    start = places[0].gather(1, batch.there.sum(1, keepdim=True) - 1) + 1  # [B, 1] where the questions begin
    places = torch.cat([places, (start + batch.offset).expand(3, -1, -1)], dim=-1)
    before = embed(batch.prefix)
    before = before.masked_scatter((batch.kinds > 0)[..., None], features.to(before.dtype))
    prefix = torch.full_like(batch.prefix, PREFIX).masked_fill(~batch.there, PADDING - 2)
    return core.language_model(
        inputs_embeds=torch.cat([before, embed(batch.ids)], dim=1),
        attention_mask=visible(batch.block, prefix),
        position_ids=places,
        use_cache=False,
    ).last_hidden_state[:, prefix.shape[1] :]


# ---------------------------------------------------------------------------------------------------- training


class Heads(nn.Module):
    """Read-outs for the dense labels; training only. For each label a score, for each group whether it has any."""

    def __init__(self, width: int, lexicon: Lexicon):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.which = nn.Linear(width, len(lexicon.labels) + 2 * len(lexicon.characters))
        self.some = nn.Linear(width, len(lexicon.groups) + 2)


def groups_of(task: str, lexicon: Lexicon) -> list[tuple[int, list[int]]]:
    """(number of the group, its labels) of the groups that items of a task are labelled with."""
    found = [(n, labels) for n, ((name, _), labels) in enumerate(lexicon.groups.items()) if name == task]
    if any(name == task for name, _ in READ):
        first, size = len(lexicon.labels), len(lexicon.characters)
        found += [
            (len(lexicon.groups) + half, list(range(first + half * size, first + (half + 1) * size))) for half in (0, 1)
        ]
    return found


def dense_loss(heads: Heads, states: torch.Tensor, batch: Batch, lexicon: Lexicon) -> torch.Tensor:
    """Per group of labels: does the patch show one (all patches), and which (patches that do)."""
    states, loss = heads.norm(states), torch.zeros(())
    which, some = heads.which(states).float(), heads.some(states).float()
    for n, labels in groups_of(batch.task, lexicon):
        truth = batch.labels[:, labels]
        loss = loss + 5 * F.binary_cross_entropy_with_logits(some[:, n], truth.any(-1).float())
        loss = loss + share_loss(which[:, labels], truth)
    return loss


def word_loss(features: torch.Tensor, words: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Pulls the visual tokens, [S / 4, D], towards the embeddings, [W, D], of the words for what they show.

    The decoder can then find a thing by its word and say what it finds; else it has to discover first that the two
    correspond, which takes longest.
    """
    return share_loss(12 * F.normalize(features.float(), dim=-1) @ F.normalize(words.float(), dim=-1).T, truth)


def tower_loss(index: int, data: Parts, net, heads: Heads, words: torch.Tensor, recipe: Recipe):
    """Loss of one part of stage 1, and what the log says of it."""
    batch = data[index]
    with torch.autocast("cpu", torch.bfloat16):
        states, features = tower_states(net.model.visual, batch)
        dense = dense_loss(heads, states, batch, data.lexicon)
        named = word_loss(features, net.get_input_embeddings()(words), batch.words)
    answer = {"pictures": len(batch.there), f"dense {batch.task}": dense.item(), "words": named.item()}
    return dense + recipe.word_weight * named, answer


def question_loss(index: int, data: Parts, net, heads: Heads, words: torch.Tensor, recipe: Recipe):
    """The same of stage 2."""
    batch = data[index]
    with torch.autocast("cpu", torch.bfloat16):
        states, features = tower_states(net.model.visual, batch)
        dense = dense_loss(heads, states, batch, data.lexicon)
        named = word_loss(features, net.get_input_embeddings()(words), batch.words)
        wanted = batch.targets != IGNORE
        logits = net.lm_head(question_states(net, features, batch)[wanted]).float()
        asked = F.cross_entropy(logits, batch.targets[wanted])
        focus = focus_loss(net.model.language_model.layers, batch.asked, batch.focus)
    loss = asked + recipe.dense_weight * dense + recipe.word_weight * named + recipe.focus_weight * focus
    answer = {"dense": dense.item(), "words": named.item(), "focus": focus.item(), batch.task: asked.item()}
    return loss, answer | {"pictures": len(batch.there), "questions": sum(map(len, batch.categories))}


@torch.no_grad()
def accuracy(net, batches: Sequence[Batch]) -> dict[str, float]:
    """Exact match per task and category; teacher-forced, which for greedy decoding is the same."""
    right: dict[str, list[bool]] = {}
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            states = question_states(net, tower_states(net.model.visual, batch)[1], batch)
            best = net.lm_head(states).argmax(-1)
        good = (best == batch.targets) | (batch.targets == IGNORE)
        for b, categories in enumerate(batch.categories):
            for n, category in enumerate(categories):
                right.setdefault(f"{batch.task}/{category}", []).append(bool(good[b, batch.block[b] == n].all()))
    return {name: sum(hits) / len(hits) for name, hits in sorted(right.items())}


def optimisers(modules, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for all else: patches, embeddings, read-outs, biases, norms."""
    inner, outer = [], []
    for module, scale in modules.items():
        weights = dict(module.named_parameters())
        deep = {n for n, p in weights.items() if p.ndim == 2 and any(s in n for s in ("blocks.", "layers.", "merger."))}
        rest = [p for n, p in weights.items() if n not in deep]
        if deep:
            inner.append({"params": [weights[n] for n in sorted(deep)], "peak": recipe.matrix_lr * scale})
        for many in (True, False):
            some = [p for p in rest if (p.ndim > 1) == many]
            if some:
                outer.append({"params": some, "weight_decay": recipe.decay * many, "peak": recipe.lr * scale})
    found = [torch.optim.AdamW(outer, lr=recipe.lr, betas=(0.9, 0.98))]
    if inner:
        found.append(
            torch.optim.Muon(inner, lr=recipe.matrix_lr, weight_decay=recipe.decay, adjust_lr_fn="match_rms_adamw")
        )
    return found


def rate(step: int, total: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: a linear rise, a plateau, a linear fall to 0.

    Unlike a cosine it does not depend on the end until the fall begins, so a run can be made longer on the way.
    """
    return min(1.0, (step + 1) / recipe.warmup, (total - step) / max(1.0, recipe.cooldown * total))


def _lexicon(recipe: Recipe, file: Path) -> Lexicon:
    """The lexicon that the run began with: a resumed run has its words, whatever became of the tasks."""
    if not file.exists():
        made = items.lexicon([offline.get(name) for name in recipe.tasks], READ, recipe.words)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(made)))
    return Lexicon.of_lists(json.loads(file.read_text()))


def train(out: Path, recipe: Recipe, workers: int = 2, check: int = 8, **options) -> None:
    """Train into the hub folder `out`; `options` are those of `loop.fit`.

    check: parts of each task that validation looks at.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the team forks
    torch.set_num_threads(1)
    lexicon = _lexicon(recipe, loop.state_file(out).with_name("lexicon.json"))
    kit = processor(lexicon)
    tok = kit.tokenizer
    net = model(tok, recipe.seed)
    net.set_attn_implementation("zoo_packed")
    net.share_memory()
    heads = Heads(net.config.vision_config.hidden_size, lexicon).share_memory()
    words = torch.tensor([_encode(tok, word)[0] for word in lexicon.content])
    known = {"net": net, "heads": heads, "words": words, "recipe": recipe}
    data = [Parts(tok, lexicon, recipe, "train", recipe.seed + stage) for stage in (0, 1)]
    val = Parts(tok, lexicon, recipe, "val", recipe.seed)
    held = [val.of(task, part) for task in val.tasks for part in range(check)]
    visual, decoder = net.model.visual, net.model.language_model  # the head of the decoder is tied to its embeddings
    stages = [
        loop.Stage(
            "tower", recipe.tower_steps, recipe.parts, {visual: 1.0, heads: 1.0, decoder.embed_tokens: 1.0},
            partial(tower_loss, data=data[0], **known),
        ),
        loop.Stage(
            "questions", recipe.steps, recipe.parts, {visual: recipe.tower_lr, heads: 1.0, decoder: 1.0},
            partial(question_loss, data=data[1], **known), check=partial(accuracy, net, held),
        ),
    ]  # fmt: skip
    trained = loop.Trained(net, heads, kit, recipe, partial(optimisers, recipe=recipe), partial(rate, recipe=recipe))
    loop.fit(trained, stages, out, workers, **options)

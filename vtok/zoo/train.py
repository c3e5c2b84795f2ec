"""The recipe of vtok-tiny-llava-next: the vision tower alone on dense labels, then everything on questions."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from vtok.zoo import architecture, batches, loop, scenes
from vtok.zoo.batches import GRID, GROUPS, Batch
from vtok.zoo.packed import IGNORE, PREFIX, focus_loss, visible

NAME = "vtok-tiny-llava-next"
CHECK_BATCHES = 12  # of validation pictures, looked at now and then


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    tower_steps: int = 4000  # stage 1: dense labels
    tower_batch: int = 10  # pictures
    steps: int = 6500  # stage 2: questions
    batch: int = 8
    part: int = 2  # pictures of one layout that go through the model together; divides both batches
    narrow_steps: int = 1500  # of stage 2, the first, on pictures of two crops: cheaper while little is known
    lr: float = 1e-3
    warmup: int = 150
    decay: float = 0.05
    tower_lr: float = 0.5  # factor on the learning rate of the tower in stage 2: it knows something by then
    dense_weight: float = 0.2  # of the dense loss in stage 2
    word_weight: float = 0.5  # of the loss that ties visual tokens to words
    focus_weight: float = 0.5  # of the loss that teaches two heads where to look

    def __post_init__(self):
        if self.batch % self.part or self.tower_batch % self.part:
            raise ValueError(f"part = {self.part} divides batch and tower_batch")


class Heads(nn.Module):
    """Read-outs for the dense labels; training only.

    CLS is asked which things its view shows at all, which teaches its attention to look at them. Token
    selectors read that attention.
    """

    def __init__(self, width: int):
        super().__init__()
        self.patch = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(batches.LABELS) + len(GROUPS)))
        self.cls = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(batches.LABELS))) for _ in range(2)
        )


def tower_states(model, views: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Hidden states of the tower, each [B * V, 1 + patches, D], for uint8 views [B, V, 3, VIEW, VIEW]."""
    pixels = batches.normalise(views.flatten(0, 1))
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states


def visual_tokens(model, states) -> torch.Tensor:
    """What the decoder gets, [B * V, patches, D], before packing."""
    return model.model.multi_modal_projector(states[-2][:, 1:])


def dense_loss(heads: Heads, states, labels: torch.Tensor) -> torch.Tensor:
    """Per group of labels: does the patch show one (all patches), and which (patches that do)."""
    labels = labels.flatten(0, 1)  # [B * V, patches, labels]
    which, there = heads.patch(states[-2][:, 1:]).float().split([len(batches.LABELS), len(GROUPS)], dim=-1)
    loss = torch.zeros(())
    sizes = [len(names) for names in GROUPS.values()]
    for n, (scores, truth) in enumerate(zip(which.split(sizes, dim=-1), labels.split(sizes, dim=-1))):
        some = truth.any(-1)
        loss = loss + 5 * F.binary_cross_entropy_with_logits(there[..., n], some.float())
        if some.any():
            share = truth[some].float()  # a patch on a border can show two
            loss = loss + F.cross_entropy(scores[some], share / share.sum(-1, keepdim=True))
    for head, layer in zip(heads.cls, (-2, -1)):
        seen = head(states[layer][:, 0]).float()
        loss = loss + 2 * F.binary_cross_entropy_with_logits(seen, labels.any(1).float())
    return loss


def word_ids(tok) -> list[torch.Tensor]:
    """Tokens of the names in each of GROUPS, then of the kinds of panel and of the sides."""
    spelled = [
        [name if group in ("left", "right") else f" {name}" for name in names] for group, names in GROUPS.items()
    ]
    spelled += [[" label", " digit", " plot"], [" top", " bottom"], [" left", " right"]]
    return [torch.tensor(tok(names, add_special_tokens=False)["input_ids"])[:, 0] for names in spelled]


def word_loss(features: torch.Tensor, embed: nn.Embedding, words: list[torch.Tensor], labels: torch.Tensor):
    """Pulls the visual tokens, [B * V, patches, D], towards the word embeddings of what they show.

    Those of thumbnails also towards the words for the side they lie on. The decoder can then find a thing by
    its word and say what it finds; else it has to discover first that the two correspond, which takes longest.
    """
    truths = list(labels.split([len(names) for names in GROUPS.values()], dim=-1))  # each [B, V, patches, names]
    shown = dict(zip(GROUPS, (truth.any(-1) for truth in truths)))
    truths.append(torch.stack([shown["left"] | shown["right"], shown["digit"], shown["plot"]], dim=-1))
    far = torch.arange(GRID) >= GRID // 2
    for beyond in (far.repeat_interleave(GRID), far.repeat(GRID)):  # below the middle, right of the middle
        side = torch.zeros(*labels.shape[:3], 2, dtype=torch.bool)
        side[:, 0] = torch.stack([~beyond, beyond], dim=-1)
        truths.append(side)
    features, loss = F.normalize(features.unflatten(0, labels.shape[:2]).float(), dim=-1), torch.zeros(())
    for ids, truth in zip(words, truths):
        some = truth.any(-1)
        if some.any():
            scores = 12 * features[some] @ F.normalize(embed(ids).float(), dim=-1).T
            share = truth[some].float()
            loss = loss + F.cross_entropy(scores, share / share.sum(-1, keepdim=True))
    return loss


def noun_ids(tok) -> torch.Tensor:
    """Tokens that tell what a question is about: shapes, colours, panels.

    Not " shape": of "Which shape is red?" it tells nothing, and a head that may look at it stops there.
    """
    nouns = {name.format(shape) for shape in scenes.SHAPES for name in (" {}", " {}s", " {}es")}
    nouns |= {f" {colour}" for colour in scenes.COLOURS} | {" shapes", " label", " digit", " plot", " curve"}
    return torch.tensor([ids[0] for ids in tok(sorted(nouns))["input_ids"] if len(ids) == 1])


def words_asked(nouns: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The nouns of the question that each target answers, bool [B, Q, Q]."""
    asked = (batch.block[:, :, None] == batch.block[:, None]) & torch.isin(batch.ids, nouns)[:, None]
    return asked & (batch.targets != IGNORE)[..., None]


def question_logits(model, prefix: tuple[torch.Tensor, torch.Tensor], features, batch: Batch) -> torch.Tensor:
    """Logits [B, Q, vocab] for `batch.ids`, from visual tokens [B * V, patches, D].

    `prefix` are the ids before and after the picture.
    """
    core = model.model
    count = len(batch.views)
    features = features.unflatten(0, (count, -1))
    packed, _ = core.pack_image_features(features, [batch.size] * count, "default", core.image_newline)
    embed = core.get_input_embeddings()
    before, after = (embed(ids).expand(count, -1, -1) for ids in prefix)
    asked = embed(batch.ids)
    tokens = torch.cat([before, torch.stack(list(packed)).to(asked.dtype), after, asked], dim=1)  # [B, P + Q, D]
    start = tokens.shape[1] - batch.ids.shape[1]
    mask = visible(batch.block, torch.full((count, start), PREFIX))
    positions = torch.cat([torch.arange(start).expand(count, -1), start + batch.offset], dim=1)
    hidden = core.language_model(
        inputs_embeds=tokens, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return model.lm_head(hidden[:, start:])


@torch.no_grad()
def accuracy(model, prefix, data: batches.Steps) -> dict[str, float]:
    """Exact match per category; teacher-forced, which for greedy decoding is the same."""
    right: dict[str, list[bool]] = {c: [] for c in scenes.CATEGORIES}
    for step in range(len(data)):
        batch = data[step]
        with loop.autocast():
            features = visual_tokens(model, tower_states(model, batch.views))
            best = question_logits(model, prefix, features, batch).argmax(-1)
        good = (best == batch.targets) | (batch.targets == IGNORE)
        for b, categories in enumerate(batch.categories):
            for n, category in enumerate(categories):
                right[category].append(bool(good[b, batch.block[b] == n].all()))
    return {c: sum(hits) / len(hits) for c, hits in right.items()}


def optimisers(modules: dict[nn.Module, float], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW over modules, each with a factor on the learning rate; no decay of biases and norms."""
    groups = []
    for module, scale in modules.items():
        for matrices in (True, False):
            weights = [p for p in module.parameters() if (p.ndim > 1) == matrices]
            groups.append({"params": weights, "weight_decay": recipe.decay * matrices, "peak": recipe.lr * scale})
    return [torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))]


def rate(step: int, total: int, recipe: Recipe) -> float:
    """Share of the learning rate: linear warm-up, then cosine down to a hundredth."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, total - recipe.warmup)
    return 0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, done))) / 2


def tower_loss(index: int, data: batches.Steps, model, heads: Heads, **_):
    """Loss of one part of stage 1, and what the log says of it."""
    batch = data[index]
    with loop.autocast():
        dense = dense_loss(heads, tower_states(model, batch.views), batch.labels)
    return dense, {"pictures": len(batch.views), "dense": dense.item()}


def question_loss(index: int, data: batches.Steps, model, heads: Heads, prefix, words, nouns, recipe: Recipe):
    """The same of stage 2."""
    batch = data[index]
    with loop.autocast():
        states = tower_states(model, batch.views)
        features = visual_tokens(model, states)
        dense = dense_loss(heads, states, batch.labels)
        named = word_loss(features, model.get_input_embeddings(), words, batch.labels)
        logits = question_logits(model, prefix, features, batch)
        wanted = batch.targets != IGNORE
        asked = F.cross_entropy(logits[wanted].float(), batch.targets[wanted])
        layers = model.model.language_model.layers
        focus = focus_loss(layers, words_asked(nouns, batch), batch.focus, before=len(prefix[0]))
    loss = asked + recipe.dense_weight * dense + recipe.word_weight * named + recipe.focus_weight * focus
    answer = {"dense": dense.item(), "words": named.item(), "focus": focus.item(), "answers": asked.item()}
    return loss, answer | {"pictures": len(batch.views), "questions": sum(map(len, batch.categories))}


def prefix_ids(tok) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids before and after the picture, as the chat template writes them."""
    return tuple(torch.tensor(tok(text, add_special_tokens=False)["input_ids"]) for text in ("<s>USER: ", "\n"))


def train(out: Path, recipe: Recipe, workers: int = 2, **options) -> None:
    """Train into the hub folder `out`; `options` are those of `loop.fit`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the team forks
    torch.set_num_threads(1)
    processor = architecture.processor()
    tok = processor.tokenizer
    model = architecture.model(tok, recipe.seed)
    model.set_attn_implementation("zoo_packed")
    model.share_memory()
    heads = Heads(model.config.vision_config.hidden_size).share_memory()
    prefix, words, nouns = prefix_ids(tok), word_ids(tok), noun_ids(tok)
    known = {"model": model, "heads": heads, "prefix": prefix, "words": words, "nouns": nouns, "recipe": recipe}
    check = batches.Steps(tok, "val", recipe.seed, 16, CHECK_BATCHES)

    tower = model.model.vision_tower
    rest = nn.ModuleList([model.model.multi_modal_projector, model.model.language_model])
    rest.newline = model.model.image_newline  # the head of the decoder is tied to its embeddings

    def stage(number: int, steps: int, batch: int, modules, loss, narrow: int = 0, **more) -> loop.Stage:
        parts = batch // recipe.part
        data = batches.Steps(tok, "train", recipe.seed + number, recipe.part, steps * parts, narrow * parts)
        work = partial(loss, data=data, **known)
        return loop.Stage(("tower", "questions")[number], steps, parts, modules, work, data.layout, **more)

    stages = [
        stage(0, recipe.tower_steps, recipe.tower_batch, {tower: 1.0, heads: 1.0}, tower_loss),
        stage(
            1,
            recipe.steps,
            recipe.batch,
            {tower: recipe.tower_lr, heads: 1.0, rest: 1.0},
            question_loss,
            recipe.narrow_steps,
            check=partial(accuracy, model, prefix, check),
        ),
    ]
    shares = partial(rate, recipe=recipe)
    trained = loop.Trained(model, heads, processor, recipe, partial(optimisers, recipe=recipe), shares)
    loop.fit(trained, stages, out, workers, **options)

"""The recipe of the bundled models; a `Family` says what is peculiar to one.

First the vision tower alone, on what lies in every patch, then everything on questions. What lies where comes from the
boxes of the questions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from recipes import items, loop
from recipes.batches import READ, Batch, Parts, shown_ids
from recipes.family import Family
from recipes.items import Lexicon
from recipes.muon import Muon
from recipes.packed import IGNORE, PADDING, PREFIX, focus_loss, share_loss, teach, visible
from vtok import zoo
from vtok.eval.tasks import task as offline


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


def _seen(data: Parts, batch: Batch, net, heads: Heads, words: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The visual tokens of a part, and the losses of what the tower and they say."""
    states, features, cls = data.family.tower_states(net, batch)
    dense = dense_loss(heads, states, cls, batch, data.lexicon)
    return features, dense, word_loss(features, net.get_input_embeddings()(words), batch.words)


def tower_loss(batch: Batch, data: Parts, net, heads: Heads, words: torch.Tensor, recipe: Recipe):
    """Loss of one part of stage 1, and what the log says of it."""
    with loop.autocast(net.device):
        _, dense, named = _seen(data, batch, net, heads, words)
    answer = {"pictures": len(batch.there), f"dense {batch.task}": dense.item(), "words": named.item()}
    return dense + recipe.word_weight * named, answer


def question_loss(batch: Batch, data: Parts, net, heads: Heads, words: torch.Tensor, recipe: Recipe):
    """The same of stage 2."""
    with loop.autocast(net.device):
        features, dense, named = _seen(data, batch, net, heads, words)
        wanted = batch.targets != IGNORE
        logits = net.lm_head(question_states(data.family, net, features, batch)[wanted]).float()
        asked = F.cross_entropy(logits, batch.targets[wanted])
        layers = net.model.language_model.layers
        focus = focus_loss(layers, data.family.heard, -batch.asked.shape[-1], batch.asked)
        focus = focus + focus_loss(layers, data.family.watched, 0, batch.focus)
    loss = asked + recipe.dense_weight * dense + recipe.word_weight * named + recipe.focus_weight * focus
    answer = {"dense": dense.item(), "words": named.item(), "focus": focus.item(), batch.task: asked.item()}
    return loss, answer | {"pictures": len(batch.there), "questions": sum(map(len, batch.categories))}


@torch.no_grad()
def accuracy(family: Family, net, batches: Sequence[Batch]) -> dict[str, float]:
    """Exact match per task and category; teacher-forced, which for greedy decoding is the same."""
    right: dict[str, list[bool]] = {}
    for batch in batches:
        batch = batch.to(net.device)
        with loop.autocast(net.device):
            states = question_states(family, net, family.tower_states(net, batch)[1], batch)
            best = net.lm_head(states).argmax(-1)
        good = ((best == batch.targets) | (batch.targets == IGNORE)).cpu()
        block = batch.block.cpu()
        for b, categories in enumerate(batch.categories):
            for n, category in enumerate(categories):
                right.setdefault(f"{batch.task}/{category}", []).append(bool(good[b, block[b] == n].all()))
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
    teach(net.model.language_model.layers, (*family.heard, *family.watched))
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
            data[0], partial(tower_loss, data=data[0], **known),
        ),
        loop.Stage(
            "questions", recipe.steps, recipe.parts, {tower: recipe.tower_lr, heads: 1.0, decoder: 1.0},
            data[1], partial(question_loss, data=data[1], **known), partial(accuracy, family, net, held),
        ),
    ]  # fmt: skip
    how = partial(optimisers, recipe=recipe), partial(rate, recipe=recipe)
    trained = loop.Trained(net, heads, kit, recipe, *how, before)
    loop.fit(trained, stages, out, workers, **options)

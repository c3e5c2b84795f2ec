"""The recipe: the vision tower alone on dense labels, then everything on questions. Resumable after a kill.

The questions of a picture share one sequence: a question sees the picture and itself, never another question,
and its positions start right after the picture. So each is trained just as it is asked at inference, at a
tenth of the cost.
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface

from vtok.zoo import architecture, batches, scenes
from vtok.zoo.batches import GRID, GROUPS, IGNORE, Batch
from vtok.zoo.team import Team

HEARD, WATCHED = 2, 4  # decoder layers whose first heads are taught what was asked about and where that is
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


def _attend(query, key, value, mask=None):
    scores = query @ key.transpose(-1, -2)  # [B, H, Q, K]
    if mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


def packed_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention as plain tensor operations: on CPU in bfloat16 twice as fast, both ways, as SDPA's kernel.

    `attention_mask`, if any, is additive [B, 1, Q, P + Q] and tells what the last Q tokens see; the P before
    them form the prefix, which is causal and never looks at them.
    """
    query = query * scaling
    if attention_mask is None:  # the vision tower
        return _attend(query, key, value).transpose(1, 2), None
    start = query.shape[2] - attention_mask.shape[2]
    causal = torch.full((start, start), float("-inf"), dtype=attention_mask.dtype).triu(1)
    prefix = _attend(query[:, :, :start], key[:, :, :start], value[:, :, :start], causal)
    asked = _attend(query[:, :, start:], key, value, attention_mask)
    if module.layer_idx in (HEARD, WATCHED):
        seen = query[:, 0, start:] @ key[:, 0].transpose(-1, -2) + attention_mask[:, 0]
        module.watched = seen.float().log_softmax(-1)  # [B, Q, P + Q] of the first head
    return torch.cat([prefix, asked], dim=2).transpose(1, 2), None


AttentionInterface.register("zoo_packed", packed_attention)


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


def focus_loss(model, before: int, nouns: torch.Tensor, batch: Batch) -> torch.Tensor:
    """How little two heads attend, before a word of an answer is said, to what they should.

    That is for one the nouns of the question, and for the other, later, the visual tokens of what they name.
    `before` is the number of tokens before the picture.
    """
    layers, loss = model.model.language_model.layers, torch.zeros(())
    asked = (batch.block[:, :, None] == batch.block[:, None]) & torch.isin(batch.ids, nouns)[:, None]  # [B, Q, Q]
    asked &= (batch.targets != IGNORE)[..., None]
    for layer, first, wanted in ((HEARD, -asked.shape[-1], asked), (WATCHED, before, batch.focus)):
        seen = layers[layer].self_attn.watched[..., first:][..., : wanted.shape[-1]]
        some = wanted.any(-1)
        loss = loss - seen[some].masked_fill(~wanted[some], float("-inf")).logsumexp(-1).mean()
    return loss


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
    start, places = tokens.shape[1] - batch.ids.shape[1], torch.arange(tokens.shape[1])
    block = F.pad(batch.block, (start, 0), value=-2)  # -2 = prefix
    seen = (block[:, start:, None] == block[:, None]) | (block[:, None] == -2)  # [B, Q, P + Q]
    seen &= places[start:, None] >= places
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, float("-inf"))[:, None]
    positions = torch.cat([places[:start].expand(count, -1), start + batch.offset], dim=1)
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
        with torch.autocast("cpu", torch.bfloat16):
            features = visual_tokens(model, tower_states(model, batch.views))
            best = question_logits(model, prefix, features, batch).argmax(-1)
        good = (best == batch.targets) | (batch.targets == IGNORE)
        for b, categories in enumerate(batch.categories):
            for n, category in enumerate(categories):
                right[category].append(bool(good[b, batch.block[b] == n].all()))
    return {c: sum(hits) / len(hits) for c, hits in right.items()}


def optimiser(modules: dict[nn.Module, float], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over modules, each with a factor on the learning rate; no decay of biases and norms."""
    groups = []
    for module, scale in modules.items():
        for matrices in (True, False):
            weights = [p for p in module.parameters() if (p.ndim > 1) == matrices]
            groups.append({"params": weights, "weight_decay": recipe.decay * matrices, "scale": scale})
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))


def rate(step: int, total: int, recipe: Recipe) -> float:
    """Learning rate: linear warm-up, then cosine down to a hundredth."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, total - recipe.warmup)
    return recipe.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * min(1.0, done))) / 2)


def tower_loss(index: int, data: batches.Steps, model, heads: Heads, **_):
    """Loss of one part of stage 1, and for the log (dense, words, focus, answers, questions)."""
    batch = data[index]
    with torch.autocast("cpu", torch.bfloat16):
        dense = dense_loss(heads, tower_states(model, batch.views), batch.labels)
    return dense, (dense.item(), 0.0, 0.0, 0.0, 0)


def question_loss(index: int, data: batches.Steps, model, heads: Heads, prefix, words, nouns, recipe: Recipe):
    """The same of stage 2."""
    batch = data[index]
    with torch.autocast("cpu", torch.bfloat16):
        states = tower_states(model, batch.views)
        features = visual_tokens(model, states)
        dense = dense_loss(heads, states, batch.labels)
        named = word_loss(features, model.get_input_embeddings(), words, batch.labels)
        logits = question_logits(model, prefix, features, batch)
        wanted = batch.targets != IGNORE
        asked = F.cross_entropy(logits[wanted].float(), batch.targets[wanted])
        focus = focus_loss(model, len(prefix[0]), nouns, batch)
    loss = asked + recipe.dense_weight * dense + recipe.word_weight * named + recipe.focus_weight * focus
    parts = (dense.item(), named.item(), focus.item(), asked.item())
    return loss, (*parts, sum(map(len, batch.categories)))


def prefix_ids(tok) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids before and after the picture, as the chat template writes them."""
    return tuple(torch.tensor(tok(text, add_special_tokens=False)["input_ids"]) for text in ("<s>USER: ", "\n"))


def train(
    out: Path,
    recipe: Recipe,
    workers: int = 2,
    stop_after: int | None = None,
    checkpoint_every: float = 180,
    log: Callable = print,
) -> None:
    """Train into the hub folder `out`. The state to go on from lies in `out`.ckpt.

    `stop_after` steps of this call it saves and returns, as if killed; `checkpoint_every` is in seconds.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the team forks
    torch.set_num_threads(1)
    processor = architecture.processor()
    tok = processor.tokenizer
    model = architecture.model(tok, recipe.seed)
    model.set_attn_implementation("zoo_packed")
    model.share_memory()
    heads = Heads(model.config.vision_config.hidden_size).share_memory()
    prefix, words, nouns = prefix_ids(tok), word_ids(tok), noun_ids(tok)
    path = out.with_name(out.name + ".ckpt") / "state.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"stage": 0, "step": 0, "pictures": 0, "questions": 0, "seconds": 0.0, "adam": None}
    if path.exists():
        state = torch.load(path)
        model.load_state_dict(state.pop("model"))
        heads.load_state_dict(state.pop("heads"))
        log(f"resumed at stage {state['stage']}, step {state['step']}")
    check = batches.Steps(tok, "val", recipe.seed, 16, CHECK_BATCHES)
    done = 0

    def save(adam):
        weights = {"model": model.state_dict(), "heads": heads.state_dict(), "adam": adam.state_dict()}
        torch.save(state | weights, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
        if state["stage"] == 1:
            export(model, processor, out)
            made = {k: state[k] for k in ("pictures", "questions", "seconds", "step")}
            made |= {"recipe": asdict(recipe), "parameters": sum(p.numel() for p in model.parameters())}
            made |= {"workers": workers, "torch": torch.__version__}
            (out / "training.json").write_text(json.dumps(made, indent=1) + "\n")

    stages = ("tower", recipe.tower_steps, recipe.tower_batch), ("questions", recipe.steps, recipe.batch)
    for stage, (name, total, size) in enumerate(stages):
        if stage < state["stage"]:
            continue
        tower = model.model.vision_tower
        if name == "tower":
            modules = {tower: 1.0, heads: 1.0}
        else:
            rest = nn.ModuleList([model.model.multi_modal_projector, model.model.language_model])
            rest.newline = model.model.image_newline  # the head of the decoder is tied to its embeddings
            modules = {tower: recipe.tower_lr, heads: 1.0, rest: 1.0}
        weights = [p for module in modules for p in module.parameters()]
        adam = optimiser(modules, recipe)
        if stage > state["stage"]:
            state |= {"stage": stage, "step": 0, "adam": None}
        if state["adam"]:
            adam.load_state_dict(state["adam"])
        parts = size // recipe.part
        narrow = recipe.narrow_steps * parts if name == "questions" else 0
        data = batches.Steps(tok, "train", recipe.seed + stage, recipe.part, total * parts, narrow)

        losses = question_loss if name == "questions" else tower_loss
        known = {"prefix": prefix, "words": words, "nouns": nouns, "recipe": recipe}
        work = partial(losses, data=data, model=model, heads=heads, **known)
        team = Team(workers, weights, work)
        clock = saved = began = time.time()
        sums = torch.zeros(4)
        for step in range(state["step"], total):
            for group in adam.param_groups:
                group["lr"] = rate(step, total, recipe) * group["scale"]
            answers = team.step(range(step * parts, (step + 1) * parts))
            nn.utils.clip_grad_norm_(weights, 1.0)
            adam.step()
            sums += torch.tensor(answers)[:, :4].mean(0)
            done += 1
            state["step"] = step + 1
            state["pictures"] += size
            state["seconds"], began = state["seconds"] + time.time() - began, time.time()
            state["questions"] += sum(answer[4] for answer in answers)
            if state["step"] % 50 == 0:
                speed, clock = 50 * size / (time.time() - clock), time.time()
                dense, named, focus, asked = (sums / 50).tolist()
                sums.zero_()
                log(
                    f"{time.strftime('%H:%M:%S')} {name} {state['step']}/{total} pictures/s {speed:.1f}"
                    f" dense {dense:.3f} words {named:.3f} focus {focus:.3f} answers {asked:.3f}"
                )
            if name == "questions" and state["step"] % 500 == 0:
                scores = accuracy(model, prefix, check)
                mean = sum(scores.values()) / len(scores)
                log(f"val {mean:.3f}  " + "  ".join(f"{c} {a:.2f}" for c, a in scores.items()))
                clock = time.time()
            if time.time() - saved > checkpoint_every or state["step"] == total or done == stop_after:
                save(adam)
                saved = time.time()
            if done == stop_after:
                break
        team.stop()
        if done == stop_after:
            return


def export(model, processor, out: Path) -> None:
    """Write the hub folder: float16 weights, configuration, tokenizer, processor, chat template."""
    half = copy.deepcopy(model).half()
    half.set_attn_implementation("sdpa")
    half.save_pretrained(out)
    processor.save_pretrained(out)

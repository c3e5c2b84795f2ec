"""vtok-smollm2-llava: SmolLM2's real weights behind the bundled InternVL's tower.

First the projector alone, towards the words for what every visual token shows; then the projector and low-rank updates
of the decoder, on questions, and beside them on text, of which they are to change nothing. Tower and weights stay as
they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from recipes import internvl, loop, recipe
from recipes.batches import Batch, Parts, shown_ids
from recipes.items import Lexicon
from recipes.packed import IGNORE, focus_loss, teach, visible
from vtok import backbone, models

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROSE = ("iris", "wine", "breast_cancer", "diabetes", "digits", "linnerud")  # whose descriptions scikit-learn carries
PROSE_TOKENS = 128  # of each
KEPT_TOKENS = 64  # of a passage on which the updates are to change nothing
BLANK = " nothing"  # what a visual token says that shows no thing


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    # task -> its share of the parts, and how many of its items go through the model together
    tasks: Mapping[str, tuple[float, int]] = field(
        default_factory=lambda: {
            "scenes": (3.0, 1),
            "existence": (1.5, 1),
            "charts": (1.5, 2),
            "needle": (1.5, 1),
            "documents": (1.5, 1),
            "video": (0.4, 1),  # eight frames a clip cost as much as four pictures
        }
    )
    tower_tasks: Mapping[str, tuple[float, int]] = field(default_factory=lambda: {"text": (1.0, 2)})
    many: int = 2  # times as many items: with one a fifth of the time is lost, and a GPU is idle
    tiles: int = 4  # of a picture at most, of 64 visual tokens each; with one, nothing small is seen
    words: int = 400  # training items of each task, whose words it is taught to see
    tower_steps: int = 400  # stage 1: the projector, on words
    steps: int = 4000  # stage 2: questions
    parts: int = 6  # a step
    rank: int = 16
    alpha: int = 32
    lr: float = 5e-4  # of the updates; 1e-3 is unstable
    projector_lr: float = 2e-3  # in stage 1
    tuned: float = 0.15  # factor on it in stage 2
    warmup: int = 30
    cooldown: float = 0.4  # the last share of a stage, in which the learning rate falls to 0
    word_weight: float = 0.2  # in stage 2
    focus_weight: float = 0.5  # of the loss that teaches some heads where to look
    text_weight: float = 4.0  # of the KL to SmolLM2 on text: without it the perplexity of prose rises fourfold
    start: str = ""  # bundled model or folder whose weights to begin with


class SmolLM2(internvl.InternVL):
    """InternVL with another decoder."""

    spells = True
    heard = ()  # it has learned to read
    # Of all heads behind the first layer these look most, before any training, at what holds the answer.
    watched = ((14, 3), (18, 6))

    def __init__(self, tiles: int = Recipe.tiles):
        self.tiles = tiles

    def processor(self, lexicon: Lexicon | None = None):
        return backbone.processor(self.language[1], self.tiles)

    def model(self, tok, seed: int = 0):
        torch.manual_seed(seed)
        return backbone.assemble(self.language[0], tok)

    @property
    def language(self) -> tuple[Any, Any]:
        """The language model and its tokenizer, read once."""
        if "_language" not in vars(self):
            self._language = models.smollm2()
        return self._language


class Learned(nn.Module):
    """What is trained of a model: its projector, and updates of its decoder, which this puts there."""

    def __init__(self, net: nn.Module, rank: int, alpha: int):
        super().__init__()
        net.requires_grad_(False)
        self.projector = net.model.multi_modal_projector.requires_grad_(True)
        self.updates = nn.ModuleDict()
        decoder = net.model.language_model
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=MATRICES), decoder)
        for name, part in decoder.named_modules():
            if isinstance(part, LoraLayer):
                pair = {"lora_A": part.lora_A["default"], "lora_B": part.lora_B["default"]}
                self.updates[name.replace(".", "/")] = nn.ModuleDict(pair)

    def named(self) -> dict[str, torch.Tensor]:
        """As the file has them."""
        found = {f"{backbone.PROJECTOR}{name}": w for name, w in self.projector.state_dict().items()}
        for place, pair in self.updates.items():
            found |= {f"{place.replace('/', '.')}.{name}": part.weight.detach() for name, part in pair.items()}
        return found


def word_loss(features: torch.Tensor, words: torch.Tensor, truth: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """Pulls the visual tokens, [N, D], to the sum of the embeddings, [W, D], of the words for what each shows.

    Two parts: which words (`recipe.word_loss`), and the direction and the length of the sum itself.
    """
    some = truth.any(-1)
    target = torch.where(some[:, None], truth.float() @ words, blank)  # [N, D]
    away = 1 - F.cosine_similarity(features.float(), target)
    away = (away * some).sum() / some.sum().clamp(min=1) + 0.1 * (away * ~some).sum() / (~some).sum().clamp(min=1)
    size = features.float().norm(dim=-1) / words.norm(dim=-1).mean()
    return recipe.word_loss(features, words, truth) + 4 * away + (size - 1).square().mean()


def _seen(batch: Batch, family: SmolLM2, net, words: torch.Tensor, blank: torch.Tensor):
    """The visual tokens of a part, and the loss of what they say."""
    embed, (_, features, _) = net.get_input_embeddings(), family.tower_states(net, batch)
    return features, word_loss(features, embed(words), batch.words, embed(blank))


def projector_loss(batch: Batch, family: SmolLM2, net, words: torch.Tensor, blank: torch.Tensor):
    """Loss of one part of stage 1, and what the log says of it."""
    with loop.autocast(net.device):
        features, loss = _seen(batch, family, net, words, blank)
    some = batch.words.any(-1)
    target = batch.words[some].float() @ net.get_input_embeddings()(words)
    near = F.cosine_similarity(features.detach()[some].float(), target).mean().item() if some.any() else 0.0
    return loss, {"pictures": len(batch.there), "words": loss.item(), f"cosine {batch.task}": near}


def updated(net) -> list[LoraLayer]:
    """The decoder's matrices that have updates."""
    return [part for part in net.modules() if isinstance(part, LoraLayer)]


@contextmanager
def without_updates(net) -> Iterator[None]:
    """Within, the decoder is SmolLM2's own."""
    places = updated(net)
    for part in places:
        part.enable_adapters(False)
    try:
        yield
    finally:
        for part in places:
            part.enable_adapters(True)


def passages(tok) -> torch.Tensor:
    """[passages, KEPT_TOKENS] ids of Python's own documentation: text that perplexity is not measured on."""
    ids = tok("\n".join(topics.values()), add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // KEPT_TOKENS * KEPT_TOKENS]).view(-1, KEPT_TOKENS)


def read(net, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the decoder alone, float32 [B, L, W], for text [B, L]."""
    states = net.model.language_model(
        inputs_embeds=net.get_input_embeddings()(ids),
        attention_mask=visible(torch.zeros_like(ids), ids[:, :0]),
        use_cache=False,
    ).last_hidden_state
    return net.lm_head(states).float()


def text_loss(net, ids: torch.Tensor) -> torch.Tensor:
    """KL of the decoder without updates to that with them, a mean over tokens."""
    with torch.no_grad(), without_updates(net):
        before = read(net, ids).log_softmax(-1)
    return F.kl_div(
        read(net, ids).log_softmax(-1).flatten(0, 1), before.flatten(0, 1), None, None, "batchmean", log_target=True
    )


def question_loss(
    batch: Batch, family: SmolLM2, net, words: torch.Tensor, blank: torch.Tensor, texts: torch.Tensor, settings: Recipe
):
    """The same of stage 2. texts: of which each part takes one, always the same."""
    with loop.autocast(net.device):
        features, named = _seen(batch, family, net, words, blank)
        wanted = batch.targets != IGNORE
        logits = net.lm_head(recipe.question_states(family, net, features, batch)[wanted]).float()
        asked = F.cross_entropy(logits, batch.targets[wanted])
        focus = focus_loss(net.model.language_model.layers, family.watched, 0, batch.focus)
        text = text_loss(net, texts[int(batch.ids.sum()) % len(texts)][None])
    loss = asked + settings.word_weight * named + settings.focus_weight * focus + settings.text_weight * text
    answer = {"words": named.item(), "focus": focus.item(), "text": text.item(), batch.task: asked.item()}
    return loss, answer | {"pictures": len(batch.there), "questions": sum(map(len, batch.categories))}


@torch.no_grad()
def perplexity(net, tok) -> float:
    """Of English prose out of scikit-learn, by the decoder alone."""
    from sklearn import datasets

    texts = [getattr(datasets, f"load_{name}")().DESCR for name in PROSE]
    ids = [tok(text, add_special_tokens=False)["input_ids"][:PROSE_TOKENS] for text in texts]
    ids = torch.tensor(ids, device=net.device)  # all are longer
    with loop.autocast(net.device):
        logits = read(net, ids)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()


def optimisers(modules: Mapping[nn.Module, float], settings: Recipe) -> list[torch.optim.Optimizer]:
    groups = [{"params": list(module.parameters()), "peak": peak} for module, peak in modules.items()]
    return [torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)]


def write(half: Learned, kit, out: Path, net: nn.Module, settings: Recipe) -> dict[str, Any]:
    """The hub folder: what was learned and how it goes into SmolLM2, and the configuration for whoever looks. Updates
    that change nothing yet are left out. Tells what they do to the perplexity of text."""
    how = {"format": "pt", "scale": str(settings.alpha / settings.rank), "tiles": str(settings.tiles)}
    begun = any(pair["lora_B"].weight.any() for pair in half.updates.values())
    weights = {name: w.cpu() for name, w in half.named().items() if begun or name.startswith(backbone.PROJECTOR)}
    save_file(weights, out / backbone.FILE, metadata=how)
    net.config.text_config.name_or_path = ""  # a place on this machine
    net.config.save_pretrained(out)
    found = {"with": perplexity(net, kit.tokenizer)}
    with without_updates(net):
        found["base"] = perplexity(net, kit.tokenizer)
    return {"perplexity": found}


def train(
    family: SmolLM2,
    out: Path,
    settings: Recipe,
    workers: int = 2,
    check: int = 8,
    device: torch.device | None = None,
    **options: Any,
) -> None:
    """As `recipe.train`; device: an accelerator, else the workers train on the CPU."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the team forks
    torch.set_num_threads(1)
    family = type(family)(settings.tiles)
    lexicon = recipe._lexicon(settings, loop.state_file(out).with_name("lexicon.json"))
    kit = family.processor(lexicon)
    net = family.model(kit.tokenizer, settings.seed)
    net.set_attn_implementation("zoo_packed")
    teach(net.model.language_model.layers, family.watched)
    learned, before = Learned(net, settings.rank, settings.alpha), None
    if settings.start:
        before = begin(learned, Path(models.place(settings.start)))
    net.to(device or "cpu")
    for part in updated(net):  # of what needs no gradient autocast keeps no copy: it would make one at every call
        part.base_layer.to(loop.dtype_on(net.device))
    if device is None:
        learned.share_memory()
    words = shown_ids(kit.tokenizer, lexicon).to(net.device)
    blank = torch.tensor(kit.tokenizer(BLANK, add_special_tokens=False)["input_ids"][:1], device=net.device)
    texts = passages(kit.tokenizer).to(net.device)
    known = {"family": family, "net": net, "words": words, "blank": blank}
    taught = settings.tasks | settings.tower_tasks, settings.tasks
    taught = [{name: (share, size * settings.many) for name, (share, size) in some.items()} for some in taught]
    data = [Parts(family, kit, lexicon, tasks, "train", settings.seed + n) for n, tasks in enumerate(taught)]
    val = Parts(family, kit, lexicon, settings.tasks, "val", settings.seed)
    held = [val.of(task, part) for task in val.tasks for part in range(check)]
    tuned = {learned.projector: settings.tuned * settings.projector_lr, learned.updates: settings.lr}
    stages = [
        loop.Stage(
            "projector", settings.tower_steps, settings.parts, {learned.projector: settings.projector_lr},
            data[0], partial(projector_loss, **known),
        ),
        loop.Stage(
            "questions", settings.steps, settings.parts, tuned, data[1],
            partial(question_loss, texts=texts, settings=settings, **known),
            partial(recipe.accuracy, family, net, held), 200,
        ),
    ]  # fmt: skip
    how = partial(optimisers, settings=settings), partial(recipe.rate, recipe=settings)
    trained = loop.Trained(
        learned, nn.Module(), kit, settings, *how, before, partial(write, net=net, settings=settings)
    )
    loop.fit(trained, stages, out, workers, device=device, **options)


def begin(learned: Learned, folder: Path) -> dict[str, Any]:
    """Begin with the weights of a folder; what made them."""
    old = load_file(folder / backbone.FILE)
    for name, weight in learned.named().items():
        if name in old:
            weight.copy_(old[name])
    return json.loads((folder / "training.json").read_text())


FAMILY = SmolLM2()

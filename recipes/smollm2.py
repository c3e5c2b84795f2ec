"""vtok-smollm2-llava: SmolLM2's real weights behind the bundled InternVL's tower.

First the projector alone, towards the words for what every visual token shows; then the projector and low-rank updates
of the decoder, on questions. Tower and weights stay as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

from recipes import internvl, loop, recipe
from recipes.batches import Parts, shown_ids
from recipes.family import Plane
from recipes.items import Lexicon
from recipes.packed import IGNORE, focus_loss, teach
from recipes.words import chatml
from vtok import backbone, models, zoo
from vtok.eval.tasks.task import Item

MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BLANK = " nothing"  # what a visual token says that shows no thing


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    # task -> its share of the parts, and how many of its items go through the model together
    tasks: Mapping[str, tuple[float, int]] = field(
        default_factory=lambda: {"scenes": (3.0, 1), "existence": (1.0, 1), "charts": (1.0, 2)}
    )
    tower_tasks: Mapping[str, tuple[float, int]] = field(default_factory=lambda: {"text": (1.0, 2)})
    words: int = 400
    tower_steps: int = 400  # stage 1: the projector, on words
    steps: int = 1000  # stage 2: questions
    parts: int = 8  # a step
    rank: int = 16
    alpha: int = 32
    lr: float = 5e-4  # of the updates
    projector_lr: float = 2e-3  # in stage 1
    tuned: float = 0.15  # factor on it in stage 2
    warmup: int = 30
    cooldown: float = 0.4
    word_weight: float = 0.2  # in stage 2
    focus_weight: float = 0.5
    start: str = ""  # folder or bundled model to begin with


class SmolLM2(internvl.InternVL):
    spells = True
    heard = ()
    watched = ((14, 0), (16, 0))

    def processor(self, lexicon: Lexicon | None = None) -> InternVLProcessor:
        template = chatml(self.image, self.video)
        tok = backbone.tokenizer(template)
        side = internvl.TILE
        pixels = {"size": {"height": side, "width": side}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        images = GotOcr2ImageProcessor(**pixels, crop_to_patches=True, max_patches=1)
        videos = InternVLVideoProcessor(**pixels)
        tokens = (internvl.GRID // internvl.MERGE) ** 2
        return InternVLProcessor(images, tok, videos, image_seq_length=tokens, chat_template=template)

    def model(self, tok, seed: int = 0):
        torch.manual_seed(seed)
        return backbone.assemble(models.load(models.SMOLLM2, "cpu", "float32")[0], tok)

    def planes(self, item: Item) -> list[Plane]:
        return [internvl._plane(n, image.size, 1, 1) for n, image in enumerate(item.images)]


class Learned(nn.Module):
    """What is trained of a model: its projector, and the updates of its decoder, which this puts there."""

    def __init__(self, net: nn.Module, rank: int, alpha: int):
        super().__init__()
        net.requires_grad_(False)
        self.projector = net.model.multi_modal_projector.requires_grad_(True)
        decoder, self.updates = net.model.language_model, nn.ModuleDict()
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=MATRICES), decoder)
        for name, part in decoder.named_modules():
            if isinstance(part, LoraLayer):
                pair = {"lora_A": part.lora_A["default"], "lora_B": part.lora_B["default"]}
                self.updates[name.replace(".", "/")] = nn.ModuleDict(pair)

    def named(self) -> dict[str, torch.Tensor]:
        """As the file has them."""
        found = {f"{backbone.PROJECTOR}{name}": w for name, w in self.projector.state_dict().items()}
        for place, pair in self.updates.items():
            found |= {f"{place.replace('/', '.')}.{name}": part.weight for name, part in pair.items()}
        return found


def word_loss(features: torch.Tensor, words: torch.Tensor, truth: torch.Tensor, blank: torch.Tensor) -> torch.Tensor:
    """Pulls the visual tokens, [N, D], to the sum of the embeddings, [W, D], of the words for what each shows.

    Two parts: which words (`recipe.word_loss`), and the direction and the length of the sum itself.
    """
    some = truth.any(-1)
    target = truth.float() @ words  # [N, D]
    target = torch.where(some[:, None], target, blank)
    size = words.norm(dim=-1).mean()
    away = 1 - F.cosine_similarity(features, target)
    away = away[some].mean() + 0.1 * away[~some].mean() if some.any() else 0.1 * away.mean()
    return recipe.word_loss(features, words, truth) + 4 * away + (features.norm(dim=-1) / size - 1).square().mean()


def _seen(data: Parts, index: int, net, words: torch.Tensor, blank: torch.Tensor):
    batch, embed = data[index], net.get_input_embeddings()
    _, features, _ = data.family.tower_states(net, batch)
    return batch, features, word_loss(features, embed(words), batch.words, embed(blank))


def projector_loss(index: int, data: Parts, net, words: torch.Tensor, blank: torch.Tensor):
    """Loss of one part of stage 1, and what the log says of it."""
    batch, features, loss = _seen(data, index, net, words, blank)
    with torch.no_grad():
        some = batch.words.any(-1)
        target = batch.words[some].float() @ net.get_input_embeddings()(words)
        near = F.cosine_similarity(features[some], target).mean().item() if some.any() else 0.0
    return loss, {"pictures": len(batch.there), "words": loss.item(), f"cosine {batch.task}": near}


def question_loss(index: int, data: Parts, net, words: torch.Tensor, blank: torch.Tensor, recipe_: Recipe):
    """The same of stage 2."""
    batch, features, named = _seen(data, index, net, words, blank)
    wanted = batch.targets != IGNORE
    logits = net.lm_head(recipe.question_states(data.family, net, features, batch)[wanted])
    asked = F.cross_entropy(logits, batch.targets[wanted])
    focus = focus_loss(net.model.language_model.layers, data.family.watched, 0, batch.focus)
    loss = asked + recipe_.word_weight * named + recipe_.focus_weight * focus
    answer = {"words": named.item(), "focus": focus.item(), batch.task: asked.item()}
    return loss, answer | {"pictures": len(batch.there), "questions": sum(map(len, batch.categories))}


def optimisers(modules: Mapping[nn.Module, float], settings: Recipe) -> list[torch.optim.Optimizer]:
    groups = [{"params": list(module.parameters()), "peak": peak} for module, peak in modules.items()]
    return [torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0)]


def write(half: Learned, out: Path, settings: Recipe) -> None:
    """The hub folder but for the processor: what was learned, and how it goes into SmolLM2."""
    out.mkdir(parents=True, exist_ok=True)
    how = {"format": "pt", "scale": str(settings.alpha / settings.rank)}
    save_file({name: w.contiguous() for name, w in half.named().items()}, out / backbone.FILE, metadata=how)


def train(family: SmolLM2, out: Path, settings: Recipe, workers: int = 2, check: int = 8, **options) -> None:
    """As `recipe.train`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the team forks
    torch.set_num_threads(1)
    lexicon = recipe._lexicon(settings, loop.state_file(out).with_name("lexicon.json"))
    kit = family.processor(lexicon)
    tok = kit.tokenizer
    net = family.model(tok, settings.seed)
    net.set_attn_implementation("zoo_packed")
    layers = net.model.language_model.layers
    teach(layers, (*family.heard, *family.watched))
    learned = Learned(net, settings.rank, settings.alpha).share_memory()
    before = None
    if settings.start:
        folder = Path(settings.start) if Path(settings.start).is_dir() else zoo.path(settings.start)
        old, own = load_file(folder / backbone.FILE), learned.named()
        for name, w in own.items():
            w.data.copy_(old[name])
        before = json.loads((folder / "training.json").read_text())
    words = shown_ids(tok, lexicon)
    blank = torch.tensor(tok(BLANK, add_special_tokens=False)["input_ids"][:1])
    known = {"net": net, "words": words, "blank": blank}
    taught = settings.tasks | settings.tower_tasks, settings.tasks
    data = [Parts(family, kit, lexicon, tasks, "train", settings.seed + n) for n, tasks in enumerate(taught)]
    val = Parts(family, kit, lexicon, settings.tasks, "val", settings.seed)
    held = [val.of(task, part) for task in val.tasks for part in range(check)]
    stages = [
        loop.Stage(
            "projector", settings.tower_steps, settings.parts, {learned.projector: settings.projector_lr},
            partial(projector_loss, data=data[0], **known), data[0].kind,
        ),
        loop.Stage(
            "questions", settings.steps, settings.parts,
            {learned.projector: settings.tuned * settings.projector_lr, learned.updates: settings.lr},
            partial(question_loss, data=data[1], recipe_=settings, **known), data[1].kind,
            partial(recipe.accuracy, family, net, held),
        ),
    ]  # fmt: skip
    how = partial(optimisers, settings=settings), partial(recipe.rate, recipe=settings)
    saved = loop.Trained(learned, nn.Module(), kit, settings, *how, before, partial(write, settings=settings))
    loop.fit(saved, stages, out, workers, **options)


FAMILY = SmolLM2()

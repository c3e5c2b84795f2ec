"""The trained router of R2R: from how a small model came to a token, whether a large one should decide it.

It is trained on features that were computed once (`features`), with a label for each token: 1 where the small model's
choice leads the text elsewhere. What the paper does to label: where the small model's choice is not the large one's
token (`differs`), the large model goes on from both to the end of the sentence, and a judge says whether they diverge.

Differs from the paper: the width of what is made of the logits is not told there, and is the hidden size here.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.errors import InvalidValue
from vtok.text.decoding.r2r import Proposal


@dataclass(frozen=True)
class Features:
    """What the router sees of N tokens: hidden [N, D] that the head was given, embedding [N, D] of the token that was
    chosen by it, and the highest logits [N, K], in order."""

    hidden: Tensor
    embedding: Tensor
    logits: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, rows: Tensor) -> Features:
        return Features(self.hidden[rows], self.embedding[rows], self.logits[rows])


@torch.no_grad()
def features(model: nn.Module, ids: Tensor, start: int, *, top: int = 100, **inputs: Any) -> Features:
    """Of a text that the large model wrote, ids [1, T]: what the small model would have chosen for each token from
    `start` on, T - start rows, on the CPU. inputs: as of the model's forward, such as pictures."""
    if not 1 <= start < ids.shape[1]:
        raise InvalidValue(f"The answer begins between 1 and {ids.shape[1] - 1}, not at {start}.")
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        logits = model(input_ids=ids, **inputs).logits[0, start - 1 : -1].float()
    finally:
        hook.remove()
    embedding = model.get_input_embeddings()(logits.argmax(-1))
    found = seen[-1][0, start - 1 : -1], embedding, logits.topk(min(top, logits.shape[1])).values
    return Features(*(x.float().cpu() for x in found))


@torch.no_grad()
def differs(model: nn.Module, ids: Tensor, start: int, **inputs: Any) -> Tensor:
    """[T - start] bool, where the model's own choice is another than the token of ids [1, T]. See `features`."""
    logits = model(input_ids=ids, **inputs).logits[0, start - 1 : -1]
    return logits.argmax(-1).cpu() != ids[0, start:].cpu()


class Block(nn.Module):
    """Pre-norm residual MLP, [N, width] -> [N, width]."""

    def __init__(self, width: int, expansion: int, dropout: float) -> None:
        super().__init__()
        inner = (
            nn.Linear(width, expansion * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(expansion * width, width),
        )
        self.mlp = nn.Sequential(nn.LayerNorm(width), *inner, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Router(nn.Module):
    """`Features` of N tokens -> [N] log-odds that the large model should decide.

    hidden: D of the small model. top: K, how many logits. About 56 million parameters for D = 1536."""

    def __init__(
        self,
        hidden: int,
        *,
        top: int = 100,
        width: int = 1024,
        blocks: int = 6,
        expansion: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.top = top
        self.of_logits = nn.Linear(top, hidden)
        self.into = nn.Linear(3 * hidden, width)
        self.blocks = nn.Sequential(*(Block(width, expansion, dropout) for _ in range(blocks)))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, seen: Features) -> Tensor:
        x = torch.cat([seen.hidden, seen.embedding, self.of_logits(seen.logits)], -1)
        return self.out(self.blocks(self.into(x)))[:, 0]


@dataclass(frozen=True)
class Learned:
    """The switch of a trained router: doubts with its probability. threshold: see `train`; 0 asks always, 2 never."""

    router: Router
    threshold: float

    @torch.no_grad()
    def doubt(self, proposal: Proposal) -> Tensor:
        device = next(self.router.parameters()).device
        highest = proposal.logits.topk(self.router.top).values
        seen = (x.float().to(device) for x in (proposal.hidden, proposal.embedding, highest))
        return self.router(Features(*seen)).sigmoid()


def train(
    router: Router,
    seen: Features,
    labels: Tensor,
    *,
    validation: float = 0.1,
    recall: float = 0.95,
    lr: float = 5e-5,
    weight_decay: float = 5e-4,
    batch: int = 1024,
    epochs: int = 50,
    patience: int = 10,
    seed: int = 0,
) -> Learned:
    """Train a router in place, by binary cross entropy with the rarer label weighted up. labels: [N], 1 to route.

    validation: share of the tokens that are held out; training stops after `patience` epochs without a better loss on
    them, and the best weights are kept. recall: of the held-out tokens to route, so many are; the threshold is the
    largest that does it. Raises `InvalidValue` where either part lacks tokens of a kind."""
    order = torch.randperm(len(seen), generator=torch.Generator().manual_seed(seed))
    held, rest = order.split([math.ceil(validation * len(seen)), len(seen) - math.ceil(validation * len(seen))])
    labels = labels.float()
    for name, part in (("validation", held), ("training", rest)):
        if not 0 < labels[part].sum() < len(part):
            raise InvalidValue(
                f"The {name} part, {len(part)} tokens, has only one kind of label: more tokens are needed."
            )
    weight = (1 - labels[rest]).sum() / labels[rest].sum()
    loss = lambda part: F.binary_cross_entropy_with_logits(router(seen[part]), labels[part], pos_weight=weight)
    optimizer = torch.optim.AdamW(router.parameters(), lr=lr, weight_decay=weight_decay)
    best, kept, waited = math.inf, copy.deepcopy(router.state_dict()), 0
    for _ in range(epochs):
        router.train()
        for part in rest[torch.randperm(len(rest))].split(batch):
            optimizer.zero_grad()
            loss(part).backward()
            optimizer.step()
        router.eval()
        with torch.no_grad():
            now = loss(held).item()
        if now < best:
            best, kept, waited = now, copy.deepcopy(router.state_dict()), 0
        elif (waited := waited + 1) >= patience:
            break
    router.load_state_dict(kept)
    router.eval()
    with torch.no_grad():
        return Learned(router, largest_threshold(router(seen[held]).sigmoid(), labels[held].bool(), recall))


def largest_threshold(doubts: Tensor, labels: Tensor, recall: float) -> float:
    """The largest threshold at which at least this share of the labelled doubts is at or above it."""
    wanted = doubts[labels].sort(descending=True).values
    return wanted[math.ceil(recall * len(wanted)) - 1].item()

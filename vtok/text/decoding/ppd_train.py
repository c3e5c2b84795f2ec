"""Training the embeddings of parallel prompt decoding: the model teaches them its own next tokens, itself unchanged."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.engine.cache import tree_mask
from vtok.errors import InvalidValue

DECAY = 0.8  # the weight of a guess against that of the one before it


def loss(model: nn.Module, prompts: Tensor, ids: Tensor, places: Tensor) -> Tensor:
    """sum_i 0.8^i KL(teacher at t + i || student at prompt token i) / n, the mean over the places t.

    prompts: [n, D]. ids: [1, T], text. places: [M], each below T - n: the tokens behind which prompts are put. One
    forward over T + M n columns: prompt token i of a place sees the text up to it and the prompt tokens before it, and
    has position t + i; the text sees no prompt token. Raises `InvalidValue`."""
    n, length, device = len(prompts), ids.shape[1], ids.device
    if len(places) == 0 or int(places.min()) < 0 or int(places.max()) >= length - n:
        raise InvalidValue(f"Prompts can stand behind tokens 0 to {length - n - 1} of {length}, not {places.tolist()}.")
    steps = torch.arange(1, n + 1, device=device)
    positions = torch.cat([torch.arange(length, device=device), (places[:, None] + steps).flatten()])
    seen = torch.zeros(len(positions), len(positions), dtype=torch.bool, device=device)
    seen[:length, :length] = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    seen[length:, :length] = (torch.arange(length, device=device) <= places[:, None]).repeat_interleave(n, 0)
    own = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    seen[length:, length:] = torch.block_diag(*[own] * len(places))
    with torch.no_grad():
        text = model.get_input_embeddings()(ids)
    embeds = torch.cat([text, prompts.to(text.dtype).repeat(len(places), 1)[None]], 1)
    mask = tree_mask(seen, torch.ones(1, len(positions), dtype=torch.bool, device=device), embeds.dtype)
    logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions[None], use_cache=False).logits[0]
    student = logits[length:].float().log_softmax(-1).view(len(places), n, -1)
    teacher = logits[(places[:, None] + steps)].detach().float().log_softmax(-1)  # [M, n, V]
    apart = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)  # [M, n]
    return (DECAY**steps * apart).sum(1).mean() / n


def train(
    model: nn.Module,
    texts: Iterable[Tensor],
    *,
    n: int = 3,
    places: int = 32,
    steps: int = 1000,
    accumulate: int = 4,
    lr: float = 1e-2,
    seed: int = 0,
) -> Tensor:
    """[n, D] prompts in fp32 for `PPD`, trained on texts [1, T] of the model's kind, best of its own making.

    places: random tokens of a text behind which prompts are put. steps: of the optimizer, each over `accumulate` texts,
    with a cosine from `lr` down; fewer where the texts end before. Texts of no more than n tokens are left out. Only
    the prompts get gradients. Raises `InvalidValue` where no text is long enough."""
    table = model.get_input_embeddings().weight
    chance = torch.Generator().manual_seed(seed)
    begin = torch.randint(len(table), (n,), generator=chance).to(table.device)
    prompts = table[begin].detach().float().clone().requires_grad_()
    optimizer = torch.optim.AdamW([prompts], lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
    gradient, read, done = torch.zeros_like(prompts), 0, 0
    for ids in texts:
        if ids.shape[1] <= n:
            continue
        some = torch.randperm(ids.shape[1] - n, generator=chance)[:places].to(ids.device)
        gradient += torch.autograd.grad(loss(model, prompts, ids, some), prompts)[0] / accumulate
        read += 1
        if read % accumulate == 0:
            prompts.grad, gradient = gradient, torch.zeros_like(gradient)
            optimizer.step()
            schedule.step()
            done += 1
            if done == steps:
                break
    if not done:
        raise InvalidValue(f"Of {accumulate} texts longer than {n} tokens that a step needs there were {read}.")
    return prompts.detach()

"""TL-Training: calls of tools, by weighted tokens and by reward (https://arxiv.org/abs/2412.15495)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtok.errors import InvalidValue

MOST = 9.0  # of a key token's weight
KINDS = {  # hallucinated, redundant, missing -> reward of parameters' names
    (True, True, True): -1.8,
    (True, True, False): -1.3,
    (True, False, True): -1.3,
    (False, True, True): -1.0,
    (True, False, False): -0.8,
    (False, True, False): -0.5,
    (False, False, True): -0.5,
}


def weighted_nll(logp: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """[B] the weighted mean of negative log-probabilities over each answer's supervised tokens; 0 where all weigh 0.

    logp, mask, weights: [B, T]; weights >= 0. With weights of 1 it is the mean over tokens."""
    weights = weights.masked_fill(~mask, 0)
    return -(weights * logp.masked_fill(~mask, 0)).sum(1) / weights.sum(1).clamp(min=1e-12)


def key_weights(key: Tensor, parameters: Tensor, mask: Tensor) -> Tensor:
    """[B, T] weights of tokens: 1, but for key tokens so much that they weigh what all others do, at most 9.

    key: [B, T] bool, of `key_tokens`. parameters: [B, T] bool, of a call's arguments, which weigh 1 and are not counted
    as others. mask: [B, T] bool, supervised. Counted in each row; where there is no key token all weigh 1."""
    keys = (key & mask).sum(1, keepdim=True)
    others = (mask & ~key & ~parameters).sum(1, keepdim=True)
    weight = torch.where((keys > 0) & (keys < others), (others / keys.clamp(min=1)).clamp(max=MOST), 1.0)
    return torch.where(key & mask, weight, 1.0)


def key_tokens(name: Sequence[int], others: Collection[Sequence[int]]) -> list[int]:
    """The places in a tool's name, as token ids, at which it is decided: the first, and for each other tool's name the
    one behind what both begin with, if there is one."""
    places = {0}
    for other in others:
        same = next((i for i, (a, b) in enumerate(zip(name, other)) if a != b), min(len(name), len(other)))
        if same < len(name):
            places.add(same)
    return sorted(places)


def tool_call_reward(call: Any, gold: Mapping[str, Any], tools: Mapping[str, Collection[str]]) -> float:
    """From -2 to 1, how right a call is.

    call: {"name": ..., "arguments": {...}} as parsed; anything else, such as None, is no call. gold: the right one.
    tools: name -> names of its parameters.

    1 if right; -0.25 a wrong value; -0.5 a parameter redundant (known to the tool, not in the right call) or missing;
    -0.8 one hallucinated (unknown to the tool); both redundant and missing -1.0, hallucinated and either -1.3, all
    three -1.8; another tool -1.5; an unknown one or no call -2. Raises `InvalidValue` where gold's tool is unknown."""
    if gold["name"] not in tools:
        raise InvalidValue(f"The right call is of {gold['name']!r}, which is not among the tools.")
    if not isinstance(call, Mapping) or not isinstance(call.get("arguments"), Mapping) or call.get("name") not in tools:
        return -2.0
    if call["name"] != gold["name"]:
        return -1.5
    given, wanted, known = set(call["arguments"]), set(gold["arguments"]), set(tools[gold["name"]])
    kinds = (bool(given - known), bool(given & known - wanted), bool(wanted - given))
    if any(kinds):
        return KINDS[kinds]
    return 1.0 if dict(call["arguments"]) == dict(gold["arguments"]) else -0.25

"""Positions within the cache: the first columns move up to the latest ones when what was between them is gone.

RoPE sees how far positions are apart. So the latest columns and all tokens to come may keep their positions, and only
the first ones' keys are turned on, by as many positions as columns are gone. They are turned from what they were given,
so that rounding does not add up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vtok.adapter import modelling_file
from vtok.engine.cache import CompressedCache, take
from vtok.errors import Unsupported

GROWING = ("dynamic", "longrope")  # kinds of RoPE whose angles depend on how long the text is


def refuse(name: str, config: Any, layers: nn.ModuleList) -> None:
    """Raise `Unsupported` where keys cannot be turned on."""
    rope, reason = getattr(config.get_text_config(), "rope_parameters", None) or {}, None
    attention = [getattr(layer, "self_attn", None) for layer in layers]
    if "mrope_section" in rope:
        reason = "M-RoPE counts rows and columns of pictures, not columns of the cache"
    elif rope.get("rope_type") in GROWING:
        reason = f"the angles of {rope['rope_type']} RoPE depend on the length of the text"
    elif not rope or rope.get("partial_rotary_factor", 1.0) != 1.0 or None in map(_turn, attention):
        reason = "it needs a decoder whose keys are turned by RoPE as a whole"
    elif not all(getattr(each, "use_rope", True) for each in attention):
        reason = "some layers have no positions"
    if reason is not None:
        raise Unsupported(f"{name}(renumber=True) is not for this model: {reason}. Leave renumber off.")


def _turn(attention: nn.Module | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The function by which a family turns queries and keys."""
    return attention and getattr(modelling_file(attention), "apply_rotary_pos_emb", None)


def move_up(
    decoder: nn.Module, cache: CompressedCache, valid: Tensor, gone: Tensor, given: dict[int, Tensor], count: int
) -> None:
    """Turn the keys of the `count` first columns in all layers of a cache, by as many positions as columns are gone.

    valid: [B, L] bool, the columns that are no padding, alike in all layers. gone: [B] how many columns were dropped
    behind the first ones. given: layer -> [B, G, count, d] what these keys were; rows of which nothing is gone yet are
    noted there."""
    first = (~valid).sum(1, keepdim=True) + torch.arange(count, device=valid.device)  # padding is on the left
    first = first.clamp(max=valid.shape[1] - 1)
    rotary = decoder.rotary_emb
    cos, sin = rotary(cache.layers[0].keys, gone[:, None].expand_as(first))
    scale = getattr(rotary, "attention_scaling", 1.0)  # is in the keys already
    for i, layer in enumerate(cache.layers):
        held, turn = layer.keys, _turn(decoder.layers[i].self_attn)
        index = first.to(held.device)[:, None].expand(-1, held.shape[1], -1)
        now = take(held, index)
        whole = (gone == 0).to(held.device)[:, None, None, None]
        given[i] = torch.where(whole, now, given[i]) if i in given else now
        turned = turn(given[i], given[i], (cos / scale).to(held), (sin / scale).to(held))[1]
        index = index[..., None].expand_as(turned)
        layer.keys = held.scatter(2, index, torch.where(whole, now, turned))

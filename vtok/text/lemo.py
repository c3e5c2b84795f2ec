"""LeMo: fine-tuning in which uninformative tokens pass decoder layers by (https://arxiv.org/abs/2501.09767, ATC'25).

with vtok.text.lemo.sparsify(model, keep=0.5):
    trainer.train()

A layer looks at its prompt in blocks of 64 tokens. A block is informative where its tokens and those of other blocks
attend to each other; only the most informative blocks go through attention, at their own positions, and the others keep
what the residual stream holds. So what attention keeps for the backward pass is that of fewer tokens.

Differs from the paper: blocks are scored exactly, without the trained predictor, which would only save time; a share of
the blocks stays in each layer, where the paper profiles a threshold a layer; the last block always stays, since the
answer ends there. `skip="layer"` is ours: the FFN is passed by, too. The cut of the FFN's channels is left out, and the
loss in segments is a library's (TRL's `loss_type="chunked_nll"`, Liger).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vtok import adapter as adapters
from vtok import options
from vtok.engine.cache import cache_in, gather, with_cache
from vtok.engine.probe import KEYWORD, TREE
from vtok.engine.seams import Seams
from vtok.errors import InvalidValue, Unsupported
from vtok.options import AtLeast1, Share

DENSE = 15 / 32  # of the depth, from the bottom: the released code's 15 of 32 layers


@dataclass(frozen=True)
class Settings:
    keep: Share
    block: AtLeast1
    skip: Literal["attention", "layer"]


@dataclass
class Sparse:
    """The handle of a model whose layers are sparse; `remove`, or the end of a `with`, makes it dense again.

    kept: layer -> [B, L'] the tokens that its last training forward worked on, in order.
    """

    settings: Settings
    layers: tuple[int, ...]
    kept: dict[int, Tensor] = field(default_factory=dict)
    _seams: Seams = field(default_factory=Seams, repr=False)

    def remove(self) -> None:
        self._seams.remove()

    def __enter__(self) -> Sparse:
        return self

    def __exit__(self, *error: Any) -> None:
        self.remove()


def sparsify(
    model: nn.Module,
    keep: float = 0.5,
    *,
    block: int = 64,
    skip: Literal["attention", "layer"] = "attention",
    layers: Sequence[int] | None = None,
) -> Sparse:
    """Let decoder layers work on the informative tokens alone, in train mode; in eval mode nothing changes.

    model: a vision-language or causal language model, also one with LoRA, or patched by methods that act before the
    decoder. keep: the share of the blocks that stay, (0, 1], rounded up; 1.0 is the dense model. block: tokens in one.
    skip: what the others pass by, attention (the paper) or the whole layer. layers: which are sparse; left out, those
    from 15/32 of the depth on but the last.

    The loss and the gradients are not those of the dense model. Raises `InvalidValue` for values out of range, and
    `Unsupported` for layers without attention."""
    settings = Settings(keep, block, skip)
    options.check_all(settings)
    vlm, adapter = adapters.find(model)
    found = adapter.layers(adapter.core(vlm))
    chosen = range(math.ceil(DENSE * len(found)), len(found) - 1) if layers is None else layers
    if not chosen or not all(0 <= i < len(found) for i in chosen):
        raise InvalidValue(f"layers={layers} of a decoder that has layers 0 to {len(found) - 1}.")
    sparse = Sparse(settings, tuple(chosen))
    for i in sparse.layers:
        if not hasattr(found[i], "self_attn") or not hasattr(found[i], "input_layernorm"):
            raise Unsupported(
                f"Decoder layer {i} ({type(found[i]).__name__}) has no self_attn behind an input_layernorm."
            )
    for i in sparse.layers:
        whole = skip == "layer"
        sparse._seams.stand_in(found[i] if whole else found[i].self_attn, "forward", _forward(sparse, i, found[i]))
    sparse._seams.observe(vlm, found[0].self_attn.config._attn_implementation)
    return sparse


def _forward(sparse: Sparse, index: int, layer: nn.Module) -> Any:
    """What stands in for the forward of a decoder layer, or of its attention."""
    attention = layer.self_attn

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        dense = forward.previous or type(module).forward.__get__(module)
        hidden = args[0] if args else kwargs["hidden_states"]
        settings, length = sparse.settings, hidden.shape[1]
        blocks = math.ceil(length / settings.block)
        count = math.ceil(settings.keep * blocks - 1e-9)
        generating = cache_in(kwargs) is not None and not torch.is_grad_enabled()
        if not module.training or generating or count == blocks:
            return dense(*args, **kwargs)
        _check(attention, kwargs)
        kwargs = {k: v for k, v in with_cache(kwargs, None).items() if k != "hidden_states"}
        kwargs["position_ids"] = None  # only read to find packed sequences, which gaps would look like
        with torch.no_grad():
            enters, attend = (layer.input_layernorm(hidden), attention.forward) if module is layer else (hidden, dense)
            kept = choose(_scores(attend, enters, kwargs, settings.block), count, length, settings.block)
        sparse.kept[index] = kept
        output = dense(gather(hidden, kept), *args[1:], **_gathered(kwargs, kept))
        there = kept[..., None].expand(-1, -1, hidden.shape[2])
        first = output[0] if isinstance(output, tuple) else output
        full = (hidden if module is layer else torch.zeros_like(hidden)).scatter(1, there, first)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    return forward


def _check(attention: nn.Module, kwargs: dict[str, Any]) -> None:
    if KEYWORD in kwargs:
        raise Unsupported("LeMo and a method that acts in the same decoder layers: take one that acts before them.")
    if kwargs.get("cu_seq_lens_q") is not None:
        raise Unsupported("LeMo does not know packed sequences: pad the batch instead (packing=False).")
    mask = kwargs.get("attention_mask")
    if (mask is None or mask.ndim == 2) and getattr(attention, "sliding_window", None) is not None:
        raise Unsupported("LeMo under FlashAttention does not know sliding windows: use attn_implementation='sdpa'.")


def _scores(attend: Callable[..., Any], hidden: Tensor, kwargs: dict[str, Any], block: int) -> Tensor:
    """[B, N] of the blocks of what enters attention, [B, S, D]. attend: the forward of that attention."""
    seen: list[Tensor] = []

    def look(
        forward: Any, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, *args: Any, **how: Any
    ):
        scaling = how.get("scaling")
        scaling = module.head_dim**-0.5 if scaling is None else scaling
        seen.append(informative(query, key, scaling, _valid(mask, key), block))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    attend(hidden_states=hidden, **kwargs, **{TREE: look})
    return seen[0]


def _valid(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """[B, S] bool, which tokens are no padding: those that see themselves."""
    if mask is None or mask.ndim == 2:
        return None if mask is None else mask.bool()
    own = mask.diagonal(dim1=-2, dim2=-1)[:, 0]
    return own if own.dtype == torch.bool else own == 0


def informative(query: Tensor, key: Tensor, scaling: float, valid: Tensor | None, block: int) -> Tensor:
    """[B, N] how informative each block of tokens is (Section 4.1).

    query: [B, H, S, d]. key: [B, G, S, d]. valid: [B, S] bool, or None. Of two blocks, the largest of
    sum_heads relu(q k^T * scaling) over their pairs of tokens in causal order; of a block, the sum over all others and
    itself. Never more than [B, H, block, S] at once."""
    b, _, s, d = query.shape
    n = math.ceil(s / block)
    query = query.view(b, key.shape[1], -1, s, d)
    pairs = query.new_zeros(b, n, n, dtype=torch.float32)
    for i in range(n):
        rows, end = slice(i * block, min(s, (i + 1) * block)), min(s, (i + 1) * block)
        logits = torch.einsum("bghqd,bgkd->bghqk", query[..., rows, :], key[..., :end, :]).float() * scaling
        logits = logits.relu().sum((1, 2))  # [B, Q, K]
        logits = logits.tril(i * block)
        if valid is not None:
            logits = logits * (valid[:, rows, None] & valid[:, None, :end])
        most = nn.functional.pad(logits.amax(1), (0, (i + 1) * block - end))
        pairs[:, i, : i + 1] = most.view(b, i + 1, block).amax(-1)
    return (pairs + pairs.tril(-1).transpose(1, 2)).sum(1)


def choose(scores: Tensor, count: int, length: int, block: int) -> Tensor:
    """[B, L'] the tokens, in order, of the `count` blocks with the largest scores [B, N], the last one among them."""
    scores = scores.clone()
    scores[:, -1] = torch.inf
    blocks = scores.topk(count, dim=1).indices.sort(1).values
    tokens = blocks[..., None] * block + torch.arange(block, device=scores.device)
    return tokens.flatten(1)[:, : count * block - (scores.shape[1] * block - length)]


def _gathered(kwargs: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """A layer's keywords for the kept tokens."""
    kwargs = dict(kwargs)
    if (tables := kwargs.get("position_embeddings")) is not None:
        kwargs["position_embeddings"] = tuple(gather(table, kept) for table in tables)
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs
    mask = mask.expand(kept.shape[0], *mask.shape[1:])
    if mask.ndim == 2:
        kwargs["attention_mask"] = mask.gather(1, kept)
        return kwargs
    rows = mask.gather(2, kept[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    kwargs["attention_mask"] = rows.gather(3, kept[:, None, None, :].expand(-1, mask.shape[1], rows.shape[2], -1))
    return kwargs

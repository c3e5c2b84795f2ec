"""Seeing a layer's queries, keys and values after RoPE, under any attention implementation.

While at least one patched model needs it, the entry of `ALL_ATTENTION_FUNCTIONS` for that model's implementation is
overridden by a wrapper under the same name (a new name would lose its mask function). The wrapper acts only on calls
that carry a `vtok_pass`, which the engine hands down as a keyword, or a `vtok_tree`, an attention of drafts that is
handed down likewise (vtok/text/decoding), so other models pass through untouched.
"""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Collection, Iterable

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtok.adapter import modelling_file
from vtok.errors import Unsupported

UNSEEN = (
    "Decoder layer {layer} was not observed: its attention did not run as when the model was patched. Patch again "
    "after changing the attention implementation."
)
KEYWORD, TREE = "vtok_pass", "vtok_tree"
_lock = threading.Lock()
_users: Counter[str] = Counter()
_previous: dict[str, object] = {}  # what the local mapping held before us, where it held something


def check_shown(layers: Iterable[int], shown: Collection[int]) -> None:
    """Raise `Unsupported` where one of these decoder layers ran, and its attention was not among those shown."""
    for layer in layers:
        if layer not in shown:
            raise Unsupported(UNSEEN.format(layer=layer))


def _wrapper(implementation: str, original):
    def attention(module, query, key, value, attention_mask, *args, **kwargs):
        forward = original
        if forward is None:  # "eager" is not in the registry: each modelling file has its own
            forward = modelling_file(module).eager_attention_forward
        if (tree := kwargs.pop(TREE, None)) is not None:
            forward = functools.partial(tree, forward)
        if (carried := kwargs.pop(KEYWORD, None)) is None:
            return forward(module, query, key, value, attention_mask, *args, **kwargs)
        p = carried.running
        scaling = kwargs.get("scaling")
        scaling = module.head_dim**-0.5 if scaling is None else scaling
        parts = p.observe(module.layer_idx, query, key, value, attention_mask, scaling)
        outputs = [forward(module, *part, *args, **kwargs) for part in parts]
        p.attended(module.layer_idx)
        return outputs[0] if len(outputs) == 1 else (torch.cat([out for out, _ in outputs], 1), None)

    attention.vtok_implementation = implementation
    return attention


def acquire(implementation: str) -> None:
    """Start observing calls of `implementation`."""
    with _lock:
        if _users[implementation] == 0:
            local = ALL_ATTENTION_FUNCTIONS._local_mapping
            if implementation in local:
                _previous[implementation] = local[implementation]
            original = ALL_ATTENTION_FUNCTIONS.get(implementation)
            ALL_ATTENTION_FUNCTIONS[implementation] = _wrapper(implementation, original)
        _users[implementation] += 1


def release(implementation: str) -> None:
    """Undo one `acquire`; the last one puts the registry back as it was."""
    with _lock:
        _users[implementation] -= 1
        if _users[implementation] == 0:
            del _users[implementation]
            current = ALL_ATTENTION_FUNCTIONS._local_mapping.get(implementation)
            if not hasattr(current, "vtok_implementation"):
                return  # somebody overrode the entry after us: theirs to undo, and ours passes calls through
            if implementation in _previous:
                ALL_ATTENTION_FUNCTIONS[implementation] = _previous.pop(implementation)
            else:
                del ALL_ATTENTION_FUNCTIONS[implementation]

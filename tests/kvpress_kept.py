"""Which columns kvpress keeps, for `tests/test_kv.py`. It takes no transformers from 5.3 on: an environment of its own.

pip install torch transformers==5.2.0 kvpress==0.5.5
python tests/kvpress_kept.py tests/kvpress_kept.json
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHAPE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8}
LENGTH, RATIO = 160, 0.5  # tokens of the prompt, and the part of it that goes


def model() -> LlamaForCausalLM:
    """The same in every version of transformers: weights by name and shape, from a sine."""
    built = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=4, attn_implementation="sdpa")).eval()
    for i, (_, weight) in enumerate(sorted(built.named_parameters())):
        n = torch.arange(weight.numel(), dtype=torch.float64)
        wave = torch.sin(12.9898 * (n + 1) + 78.233 * i) * 43758.5453
        value = (wave - wave.floor() - 0.5).view(weight.shape) * 0.4
        weight.data.copy_(1 + value if weight.ndim == 1 else value)
    return built


def prompt() -> torch.Tensor:
    return (torch.arange(LENGTH) ** 2 * 7 % 97)[None]


def kept(reference: LlamaForCausalLM, ids: torch.Tensor, press) -> list[list[list[int]]]:
    """[layers][heads] the columns that stay: those of the dense cache whose keys are there."""
    with torch.no_grad():
        dense = reference(ids, use_cache=True).past_key_values
        with press(reference):
            short = reference(ids, use_cache=True).past_key_values
    found = []
    for whole, part in zip(dense.layers, short.layers):
        same = (part.keys[0][:, :, None] == whole.keys[0][:, None]).all(-1)  # [G, K, L]
        assert (same.sum(-1) == 1).all()
        found.append([sorted(head.int().argmax(-1).tolist()) for head in same])
    return found


if __name__ == "__main__":
    from kvpress import SnapKVPress, StreamingLLMPress

    presses = {
        "snapkv": SnapKVPress(RATIO, window_size=32, kernel_size=5),
        "streaming_llm": StreamingLLMPress(RATIO, n_sink=4),
    }
    told = {name: kept(model(), prompt(), press) for name, press in presses.items()}
    with open(sys.argv[1], "w") as file:
        json.dump(told, file)

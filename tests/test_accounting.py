"""FLOPs and KV bytes: against AIM's published table, PyTorch's own counter and a real cache."""

import copy
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SiglipVisionConfig,
)

from vtok import adapter as adapters
from vtok.engine import accounting
from vtok.engine.accounting import TextShape, decode_flops, encoder_flops, kv_bytes, prefill_flops
from vtok.errors import InvalidValue, Unsupported
from vtok.tower import Tower

QWEN2_7B = TextShape(28, 3584, 18944, 3584, 512, 28, 152064)
TOWERS = {
    "clip": CLIPVisionConfig,
    "siglip": lambda **sizes: SiglipVisionConfig(vision_use_head=False, **sizes),  # as in LLaVA-OneVision
}
VICUNA_7B = TextShape(32, 4096, 11008, 4096, 4096, 32, 32000)


def aim_counts(shape, visual, text, start=None, end=None):
    """Tokens at each layer as AIM's table was computed: at layer l the share r_l that its code decides after
    that layer, so one layer early (`analyze_flex_prefill_only.py`)."""

    def share(layer):
        return 1.0 if start is None or layer < start else max(0.0, 1 - (layer - start + 1) / (end - start))

    return [math.floor(visual * share(layer) + 1e-9) + text for layer in range(shape.layers)]


@pytest.mark.parametrize(
    ("shape", "visual", "text", "pruning", "published"),
    [
        (QWEN2_7B, 32 * 196, 100, (), 99.63),  # LLaVA-OneVision-7B, 32 frames, dense
        (QWEN2_7B, 32 * 98, 100, (), 46.48),
        (QWEN2_7B, 32 * 49, 100, (), 22.90),
        (QWEN2_7B, 32 * 24, 100, (), 11.64),
        (QWEN2_7B, 32 * 6, 100, (), 3.85),
        (QWEN2_7B, 32 * 49, 100, (14, 22), 14.76),
        (QWEN2_7B, 32 * 49, 100, (14, 15), 12.10),
        (QWEN2_7B, 32 * 49, 100, (7, 8), 6.71),
        (QWEN2_7B, 192 * 49, 100, (14, 22), 99.27),  # 192 frames
        (VICUNA_7B, 576, 40, (), 8.18),  # LLaVA-1.5-7B, dense
        (VICUNA_7B, 252, 40, (13, 21), 2.22),
    ],
)
def test_published_aim_table(shape, visual, text, pruning, published):
    tera = prefill_flops(shape, aim_counts(shape, visual, text, *pruning)) / 1e12
    assert f"{tera:.2f}" == f"{published:.2f}"


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=99, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, attn_implementation="eager",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def matmuls_alone(shape, n, pairs, head_rows):
    """What to add to the formula to get matrix products alone: no softmax, the head at 2 d V a row."""
    small = shape.layers * (accounting.SOFTMAX * shape.heads * pairs + accounting.SMALL * n * shape.hidden)
    return shape.hidden * shape.vocab * (2 * head_rows - 1) - small


@torch.no_grad()
def test_prefill_and_decode_against_flop_counter(llama):
    shape, n = TextShape.of(llama.config), 37
    assert shape == TextShape(3, 64, 112, 96, 48, 4, 99)
    ids = torch.arange(n)[None]
    with FlopCounterMode(display=False) as counter:
        cache = llama(ids, use_cache=True, logits_to_keep=1).past_key_values
    formula = prefill_flops(shape, [n] * 3) + matmuls_alone(shape, n, n * n, 1)
    assert counter.get_total_flops() == formula
    with FlopCounterMode(display=False) as counter:
        llama(ids[:, :1], past_key_values=cache, use_cache=True)
    formula = decode_flops(shape, [n] * 3) + matmuls_alone(shape, 1, n + 1, 1)
    assert counter.get_total_flops() == formula


def test_a_causal_prefill_costs_what_its_tokens_cost_one_by_one():
    steps = [decode_flops(QWEN2_7B, [cached] * QWEN2_7B.layers) for cached in range(50)]
    heads = 49 * QWEN2_7B.hidden * QWEN2_7B.vocab  # a prefill needs that of its last token alone
    assert prefill_flops(QWEN2_7B, [50] * QWEN2_7B.layers, causal=True) == sum(steps) - heads


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kv_bytes_of_a_real_cache(llama, dtype):
    cache, counts = DynamicCache(config=llama.config), [17, 17, 17]
    llama.to(dtype)(torch.arange(17)[None], past_key_values=cache, use_cache=True)
    llama.float()
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(TextShape.of(llama.config), counts, dtype.itemsize) == held
    uneven = kv_bytes(TextShape.of(llama.config), [17, 9, 4], dtype.itemsize)
    assert uneven * 3 * 17 == held * (17 + 9 + 4)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_plain_encoder_against_flop_counter(tower):
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = TOWERS[tower](image_size=28, patch_size=7, **sizes)
    text = LlamaConfig(vocab_size=64, num_key_value_heads=4, **{**sizes, "hidden_size": 48})
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text)).eval()
    model.set_attn_implementation("eager")
    shape = adapters.of(model.config).tower(model.config).shape()
    assert shape.projector == (32, 48, 48)
    pixels = torch.rand(3, 3, 28, 28)
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(pixels, vision_feature_select_strategy="default")
    n = 16 + shape.cls_tokens
    small = shape.layers * (accounting.SOFTMAX * shape.heads * n * n + accounting.SMALL * n * 32)
    # "default" throws the first token away: a patch, where there is no CLS.
    cut = 2 * (32 * 48 + 48 * 48) if tower == "siglip" else 0
    assert counter.get_total_flops() == encoder_flops(shape, [(4, 4)] * 3) - 3 * (small + cut)


@torch.no_grad()
def test_windowed_encoder_against_flop_counter():
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 3, "hidden_size": 32, "intermediate_size": 56, "num_heads": 4, "patch_size": 4,
            "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 48,
        },
        text_config={
            "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
        },
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.set_attn_implementation("eager")
    shape = adapters.of(config).tower(config).shape()
    grid = (2, 6, 10)  # two temporal patches of 6 x 10 patches each, windows of 4 x 4
    assert (shape.window, shape.full_layers, shape.merge) == (4, 1, 2)
    pixels = torch.rand(math.prod(grid), shape.patch_values)
    with FlopCounterMode(display=False) as counter:
        model.model.get_video_features(pixels, torch.tensor([grid]))
    pairs = 60 * 60 + 2 * sum((rows * cols) ** 2 for rows in (4, 2) for cols in (4, 4, 2))
    small = accounting.SOFTMAX * shape.heads * pairs + accounting.SMALL * 3 * 60 * 32
    formula = encoder_flops(shape, [grid[1:]] * grid[0]) - 2 * small
    assert formula <= counter.get_total_flops() <= formula * 1.01  # the rest: the table of rotary angles


def test_what_cannot_be_counted_is_refused(llama):
    shape = TextShape.of(llama.config)
    with pytest.raises(InvalidValue, match="3 layers, but 2"):
        prefill_flops(shape, [5, 5])
    with pytest.raises(InvalidValue, match="at least 0"):
        kv_bytes(shape, [5, 5, -1], 2)
    with pytest.raises(Unsupported, match="vision tower"):
        Tower(config=llama.config).shape()
    with pytest.raises(Unsupported, match="No family has the model_type 'llama'"):
        adapters.of(llama.config)
    experts = copy.deepcopy(llama.config)
    experts.num_local_experts = 8
    unknown = TextShape.of(experts)  # a mixture, but how many of them a token passes is not known
    with pytest.raises(Unsupported, match="FFN is of a kind"):
        prefill_flops(unknown, [5, 5, 5])
    with pytest.raises(Unsupported, match="FFN is of a kind"):
        decode_flops(unknown, [5, 5, 5])
    assert kv_bytes(unknown, [5, 5, 5], 2) == kv_bytes(shape, [5, 5, 5], 2)
    experts.kv_lora_rank = 16
    with pytest.raises(Unsupported, match="latent"):
        TextShape.of(experts)


SIZES = {
    "vocab_size": 99, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2, "attn_implementation": "eager",
}  # fmt: skip
QWEN = {**SIZES, "num_experts": 6, "moe_intermediate_size": 40, "mlp_only_layers": [2], "decoder_sparse_step": 1}
MIXED = {  # every layer; all but one; every second layer, with a shared expert and its gate
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=5),
    "qwen3_moe": lambda: Qwen3MoeConfig(**QWEN, head_dim=24),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **{**QWEN, "mlp_only_layers": [], "decoder_sparse_step": 2}, shared_expert_intermediate_size=72
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", MIXED)
def test_mixtures_of_experts_against_flop_counter(kind):
    """A token pays for the router, for the experts that it is sent to and for those that all share."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXED[kind]()).eval()
    model.set_experts_implementation("eager")
    shape, n = TextShape.of(model.config), 37
    assert len(shape.experts.layers) == {"mixtral": 4, "qwen3_moe": 3, "qwen2_moe": 2}[kind]
    with FlopCounterMode(display=False) as counter:
        cache = model(torch.arange(n)[None], use_cache=True, logits_to_keep=1).past_key_values
    assert counter.get_total_flops() == prefill_flops(shape, [n] * 4) + matmuls_alone(shape, n, n * n, 1)
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([[1]]), past_key_values=cache, use_cache=True)
    assert counter.get_total_flops() == decode_flops(shape, [n] * 4) + matmuls_alone(shape, 1, n + 1, 1)

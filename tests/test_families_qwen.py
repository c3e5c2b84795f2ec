"""The Qwen-VL families: DeepStack, clips with timestamps, M-RoPE. Beside the contract, which runs on each of them."""

import math

import numpy as np
import pytest
import torch
from contract import Entered, Masked, batch, double, mark, mixed, picture, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import vtok
from vtok import adapter as adapters
from vtok.adapters.qwen2_5_vl import stretch_frames
from vtok.engine import accounting
from vtok.engine.accounting import encoder_flops
from vtok.errors import Unsupported
from vtok.types import Layout, Plane, mean_of_members

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
METHODS = {
    "uniform": lambda: [vtok.Uniform(keep=0.5)],
    "pool": lambda: [vtok.Pool(keep=0.3)],
    "aim_merge": lambda: [vtok.AIMMerge(keep=0.4)],
    "downsample": lambda: [vtok.Downsample(keep=0.3)],
    "fastv-1": lambda: [vtok.FastV(keep=0.5, layer=1)],  # DeepStack adds behind layers 0, 1 and 2: after this one too
    "fastv-2": lambda: [vtok.FastV(keep=0.5, layer=2)],
    "aim_prune": lambda: [vtok.AIMPrune(start=0, end=3)],  # in each of the layers with DeepStack
    "all stages": lambda: [vtok.Downsample(keep=0.5), vtok.AIMMerge(keep=0.5), vtok.FastV(keep=0.5, layer=1)],
}


def media(processor, prompts, pictures=(), frames=(), side="left"):
    """Inputs for prompts in which "#" stands for the next picture and "@" for the next clip (of so many frames)."""
    processor.tokenizer.padding_side = side
    texts = [p.replace("#", mark(processor)).replace("@", mark(processor, "video")) for p in prompts]
    clips = [np.random.default_rng(i).integers(0, 255, (t, 64, 96, 3)).astype("uint8") for i, t in enumerate(frames)]
    metadata = [{"fps": 2.0, "total_num_frames": t, "frames_indices": list(range(t))} for t in frames]
    options = {"video_metadata": metadata, "do_sample_frames": False} if frames else {}
    images = list(pictures) or None
    return processor(text=texts, images=images, videos=clips or None, padding=True, return_tensors="pt", **options)


def everything(processor, side="left"):
    """Pictures and clips in one batch, one sample with both, one with neither."""
    prompts = ["a @ then # what moves?", "no picture at all", "# and @ yes", "@"]
    return media(processor, prompts, [picture(64, 96, 1), picture(96, 64, 2)], [4, 2, 6], side)


def logits(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra}).logits


# ---- DeepStack ---------------------------------------------------------------------------------------------------
def test_mean_of_members():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3)
    into = torch.tensor([[1, 1, -1, 1, 4], [0, 1, 2, -1, 2]])
    expected = x.clone()
    for b in range(2):
        for target in range(5):
            members = [x[b, i] for i in range(5) if into[b, i] == target]
            if members:
                expected[b, target] = sum(members) / len(members)
    torch.testing.assert_close(mean_of_members(x, into), expected)
    assert torch.equal(mean_of_members(x, into)[1, :2], x[1, :2])  # alone: not touched
    low = mean_of_members(torch.ones(1, 3000, 1, dtype=torch.bfloat16), torch.zeros(1, 3000, dtype=torch.long))
    assert low[0, 0] == 1  # a sum in bfloat16 would stop at 256


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_deepstack_is_masking(method, side):
    """Pictures and clips: the unpatched model with the dropped columns masked, which runs its own DeepStack."""
    model, processor = tiny("qwen3_vl")
    model, inputs = double(model, everything(processor, side))
    with vtok.patch(model, METHODS[method]()) as patch, Entered(model, patch) as entered:
        pruned = logits(model, inputs)
    trace = patch.trace
    assert trace.n_kept_at(3) < trace.n_visual
    with Masked(model, trace, entered.embeds):
        masked = logits(model, inputs)
    entered.embeds.levels = [torch.zeros_like(level) for level in entered.embeds.levels]
    with Masked(model, trace, entered.embeds):
        without = logits(model, inputs)
    present = trace.present_at(3)
    torch.testing.assert_close(pruned[present], masked[present], atol=1e-6, rtol=1e-6)  # merging is done in fp32
    assert (pruned - without)[present].abs().max() > 0.1  # DeepStack counts


def test_pruning_falls_below_the_last_level():
    """What the oracle above is about: tokens are gone before the last features are added."""
    model, processor = tiny("qwen3_vl")
    assert model.config.vision_config.deepstack_visual_indexes == [0, 1, 2]
    with vtok.patch(model, vtok.AIMPrune(start=0, end=3)) as patch:
        logits(model, everything(processor))
    kept = [sum(patch.trace.n_kept_at(layer)) for layer in range(4)]
    assert kept[0] > kept[1] > kept[2] > kept[3] == 0


@pytest.mark.parametrize("method", ["pool", "aim_merge", "uniform", "fastv-1", "all stages"])
def test_gradients_of_deepstack_features(method):
    """They flow to every member of a merged token, to kept tokens, and to no others, as through the oracle."""
    model, processor = tiny("qwen3_vl")
    model, inputs = double(model, media(processor, ["a # what?", "@ yes # no"], [picture(64, 96, 1)] * 2, [4]))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    leaves = []

    def replace(module, args, kwargs):
        leaves[:] = [level.clone().requires_grad_() for level in kwargs["deepstack_visual_embeds"]]
        return args, {**kwargs, "deepstack_visual_embeds": list(leaves)}

    with vtok.patch(model, METHODS[method]()) as patch, Entered(model, patch) as entered:
        handle = model.model.language_model.register_forward_pre_hook(replace, with_kwargs=True, prepend=True)
        model(**inputs, use_cache=True).logits[:, -1].pow(2).sum().backward()
        handle.remove()
    pruned = [leaf.grad for leaf in leaves]

    entered.embeds.levels = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    with Masked(model, patch.trace, entered.embeds):
        model(**inputs, use_cache=True).logits[:, -1].pow(2).sum().backward()
    for ours, leaf in zip(pruned, entered.embeds.levels):
        torch.testing.assert_close(ours, leaf.grad, atol=1e-5 * leaf.grad.abs().max().item(), rtol=1e-5)
    if method in ("pool", "aim_merge"):
        assert all((grad != 0).any(1).all() for grad in pruned)  # nothing is dropped without a trace
    else:
        assert all(not (grad != 0).any(1).all() for grad in pruned)


def test_deepstack_features_of_a_smaller_picture():
    """The encoder sees few patches, once, also of a clip; each level is repeated over the cells of the dense layout."""
    model, processor = tiny("qwen3_vl")
    inputs = media(processor, ["a # what?", "@ and #"], [picture(128, 192, 1), picture(192, 64, 2)], [4])
    seen, given = [], {}

    def encoded(module, args, kwargs, output):
        seen.append((kwargs["grid_thw"].tolist(), list(output.deepstack_features)))

    model.model.visual.register_forward_hook(encoded, with_kwargs=True)
    entering = model.model.language_model.register_forward_pre_hook
    with vtok.patch(model, vtok.Downsample(keep=0.25)) as patch:
        entering(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True, prepend=True)
        logits(model, inputs)
    assert [grids for grids, _ in seen] == [[[1, 4, 6], [1, 6, 2]], [[2, 2, 2]]]  # halves of 4 x 6, 6 x 2, 2 x 3 tokens
    place = given["visual_pos_masks"].flatten().nonzero().flatten().tolist()
    pictures = iter(patch.trace.pictures)
    for grids, levels in seen:
        start = 0
        for t, h, w in grids:
            own = next(pictures)
            rows, cols = own.dense.planes[0].rows, own.dense.planes[0].cols
            expected = [
                start + (frame * h // 2 + y * (h // 2) // rows) * (w // 2) + x * (w // 2) // cols
                for frame in range(t)
                for y in range(rows)
                for x in range(cols)
            ]
            start += t * h * w // 4
            here = [place.index(i) for i in own.rows.tolist()]
            for level, dense in zip(levels, given["deepstack_visual_embeds"], strict=True):
                assert torch.equal(dense[here], level[expected])


def test_stretch_frames():
    layout = Layout((Plane(2, 4, "frame"), Plane(2, 4, "frame")), modality="video")
    small = torch.arange(4.0)[:, None]  # two frames of 1 x 2 cells
    (features,) = stretch_frames([small], [layout], [(1, 2)])
    assert features.squeeze(1).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]


def test_deepstack_behind_the_last_layer_is_refused():
    model, _ = tiny("qwen3_vl")
    vision = model.config.vision_config
    before = vision.deepstack_visual_indexes
    vision.deepstack_visual_indexes = [0, 1, 2, 3]
    try:
        with pytest.raises(Unsupported, match="at least 5 layers"):
            vtok.patch(model, "uniform")
    finally:
        vision.deepstack_visual_indexes = before


def test_a_sample_as_if_alone():
    """No DeepStack feature lands in another sample, and the padding of the batch moves none."""
    model, processor = tiny("qwen3_vl")
    model, _ = double(model, {})
    _, together = double(model, mixed(processor))
    _, alone = double(model, batch(processor, ["last 0 1 2 #"], [picture(56, 140, 4)]))
    with vtok.patch(model, [vtok.AIMMerge(keep=0.5), vtok.FastV(keep=0.5, layer=1)]):
        whole = logits(model, together)[-1, -1]
        single = logits(model, alone)[0, -1]
    assert whole.shape == single.shape
    torch.testing.assert_close(whole, single, atol=1e-5, rtol=1e-5)


# ---- clips -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_are_the_placeholders(family):
    model, processor = tiny(family)
    inputs = everything(processor)
    with vtok.patch(model, "uniform") as patch:
        logits(model, inputs)
    pictures = patch.trace.pictures
    assert [p.modality for p in pictures] == ["image", "image", "video", "video", "video"]
    for modality in ("image", "video"):
        token = getattr(model.config, f"{modality}_token_id")
        rows = torch.cat([p.rows for p in pictures if p.modality == modality])
        assert torch.equal(rows, (inputs["input_ids"].flatten() == token).nonzero().flatten())
        grids = inputs[f"{modality}_grid_thw"].tolist()
        own = [p.dense for p in pictures if p.modality == modality]
        assert [[len(x.planes), 2 * x.planes[0].rows, 2 * x.planes[0].cols] for x in own] == grids
    runs = [int((p.rows.diff() > 1).sum()) + 1 for p in pictures if p.modality == "video"]
    assert runs == ([2, 1, 3] if family == "qwen3_vl" else [1, 1, 1])  # Qwen3-VL: timestamps between the frames
    assert patch.trace.samples == (0, 2, 0, 2, 3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_tokens_keep_their_positions(family, side):
    """What enters the language model has the M-RoPE positions that the whole prompt gives it."""
    model, processor = tiny(family)
    inputs = everything(processor, side)
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask", "second_per_grid_ts")
    whole, _ = model.model.get_rope_index(inputs["input_ids"], **{k: inputs[k] for k in names if k in inputs})
    entered = {}
    with vtok.patch(model, vtok.Random(keep=0.3)) as patch:
        model.model.language_model.register_forward_pre_hook(lambda m, a, k: entered.update(k), with_kwargs=True)
        logits(model, inputs)
    for sample, positions in enumerate(patch.trace.positions):
        ours = entered["position_ids"][:, sample, -len(positions) :]
        assert torch.equal(ours, whole[:, sample, positions])
        assert (ours != ours[:1]).any() == (sample != 1)  # three different axes where there is something to see


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_and_clips_together(family, method):
    model, processor = tiny(family)
    inputs = everything(processor)
    with vtok.patch(model, METHODS[method]()) as patch, Entered(model, patch) as entered:
        pruned = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2)
        trace = patch.trace
    assert len(trace.pictures) == 10  # two beams
    assert trace.n_kept_at(3) < trace.n_visual
    with Masked(model, trace, entered.embeds):
        masked = model.generate(**inputs, max_new_tokens=5, do_sample=False, num_beams=2)
    assert torch.equal(pruned, masked)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_in_the_second_turn(family, method):
    """On a cache that holds a compressed picture, with the positions of the whole conversation."""
    model, processor = tiny(family)
    model, first = double(model, media(processor, ["a # what colour?"], [picture(64, 96, 1)]))
    _, second = double(model, media(processor, [" yes, and in @ what moves?"], frames=[4]))
    n1, n2 = first["input_ids"].shape[1], second["input_ids"].shape[1]
    both = {k: torch.cat([first[k], second[k]], 1) for k in ("input_ids", "mm_token_type_ids")}
    positions, _ = model.model.get_rope_index(
        both["input_ids"],
        mm_token_type_ids=both["mm_token_type_ids"],
        image_grid_thw=first["image_grid_thw"],
        video_grid_thw=second["video_grid_thw"],
    )
    first["position_ids"], second["position_ids"] = positions[:, :, :n1], positions[:, :, n1:]
    second["attention_mask"] = torch.ones(1, n1 + n2, dtype=torch.long)
    del second["mm_token_type_ids"]

    with torch.no_grad():
        with vtok.patch(model, METHODS[method]()) as patch:
            with Entered(model, patch) as a:
                cache = model(**first, use_cache=True).past_key_values
            one = patch.trace
            with Entered(model, patch) as b:
                pruned = model(**second, past_key_values=cache).logits
            two = patch.trace
        assert two.layouts[0].modality == "video"
        assert two.n_kept_at(3) < two.n_visual
        with Masked(model, one, a.embeds):
            cache = model(**first, use_cache=True).past_key_values
        oracle = Masked(model, two, b.embeds)
        oracle.present = [torch.cat([one.present_at(i), two.present_at(i)], 1) for i in range(4)]
        with oracle:
            masked = model(**second, past_key_values=cache).logits
    here = two.present_at(3)
    torch.testing.assert_close(pruned[here], masked[here], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_clip_is_encoded_once(family):
    """Qwen3-VL's video method calls its image method, which must not take the clip for a picture."""
    model, processor = tiny(family)
    inputs = media(processor, ["@ what?"], frames=[4])
    calls = []
    hook = model.model.visual.register_forward_hook(lambda *_: calls.append(1))
    with vtok.patch(model, [vtok.Downsample(keep=0.5), vtok.Uniform(keep=0.5)]) as patch:
        logits(model, inputs)
        assert [p.modality for p in patch.trace.pictures] == ["video"]
        assert len(calls) == 1
        with torch.no_grad():  # and on its own, as `generate` calls it
            features = model.model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    assert features._vtok_encoded.modality == "video"
    assert "get_image_features" not in vars(model.model)
    hook.remove()


# ---- accounting --------------------------------------------------------------------------------------------------
TEXT = {
    "vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 1e4},
}  # fmt: skip
TOWERS = {
    "qwen2_vl": (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        {"depth": 3, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2, "num_heads": 4, "patch_size": 4},
    ),
    "qwen3_vl": (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        {
            "depth": 3, "hidden_size": 32, "intermediate_size": 56, "num_heads": 4, "patch_size": 4,
            "out_hidden_size": 48, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2],
        },
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", TOWERS)
def test_encoder_against_flop_counter(family):
    configure, build, vision = TOWERS[family]
    text = {k: v for k, v in TEXT.items() if family == "qwen3_vl" or k != "head_dim"}
    config = configure(vision_config=vision, text_config=text)
    model = build(config).eval()
    model.set_attn_implementation("eager")
    shape = adapters.of(config).tower(config).shape()
    assert (shape.hidden, shape.window, shape.full_layers) == (32, 0, 3)
    assert shape.projectors == (3 if family == "qwen3_vl" else 1)
    grid = (2, 6, 10)
    pixels = torch.rand(math.prod(grid), shape.patch_values)
    with FlopCounterMode(display=False) as counter:
        model.model.get_video_features(pixels, torch.tensor([grid]))
    small = accounting.SOFTMAX * shape.heads * 3 * 60 * 60 + accounting.SMALL * 3 * 60 * 32
    formula = encoder_flops(shape, [grid[1:]] * grid[0]) - 2 * small
    assert formula <= counter.get_total_flops() <= formula * 1.01  # the rest: the table of rotary angles

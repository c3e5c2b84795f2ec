"""PixelPrune: which cells stay, against golden grids and a serial rewrite; and the encoder that runs on them alone,
against the dense one in which the others are masked."""

import types

import numpy as np
import pytest
import torch
from contract import batch, clip, page, picture, run, tiny
from PIL import Image

import vtok
from vtok.compressors.pixelprune import PixelPrune
from vtok.errors import InvalidValue, Unsupported


def anchors(values, tau=0.0):
    """Of a grid of cells [rows, cols, V], or [rows, cols] of four equal values each: the anchor of each, flat."""
    cells = values[..., None].repeat(1, 1, 4) if values.ndim == 2 else values
    return PixelPrune(tau=tau, std=1.0).anchors(cells[None]).flatten().tolist()


def kept(values, tau=0.0):
    return [i for i, anchor in enumerate(anchors(values, tau)) if i == anchor]


ROW, COL = torch.meshgrid(torch.arange(4.0), torch.arange(6.0), indexing="ij")
GOLDEN = {
    "blank": (0 * ROW, 0.0, [0]),
    "rectangle": (1 - ((ROW >= 1) & (ROW <= 2) & (COL >= 2) & (COL <= 4)).float(), 0.0, [0, 8, 11, 20]),
    "vertical": (COL % 2, 0.0, [0, 1, 2, 3, 4, 5]),
    "horizontal": (ROW % 2, 0.0, [0, 6, 12, 18]),
    "checkerboard": ((ROW + COL) % 2, 0.0, list(range(24))),
    "gradient": (0.02 * COL, 0.0, [0, 1, 2, 3, 4, 5]),
    "gradient, anchored": (0.02 * COL, 0.05, [0, 3]),
    "noise": (1 + 0.01 * torch.sin(3 * ROW + 5 * COL), 0.0, list(range(24))),
    "noise within": (1 + 0.01 * torch.sin(3 * ROW + 5 * COL), 0.02, [0]),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    values, tau, expected = GOLDEN[name]
    assert kept(values, tau) == expected


def serial(x, tau):
    """Cell by cell, with what was decoded so far; x [rows, cols, V]."""
    rows, cols, _ = x.shape
    near = lambda a, b: np.abs(a - b).max() <= tau
    decoded, anchor = x.copy(), np.arange(rows * cols).reshape(rows, cols)
    for y in range(rows):
        for z in range(cols):
            if y == z == 0:
                continue
            by_upper = z == 0
            if y and z:
                corner = decoded[y - 1, z - 1]
                by_upper = near(corner, decoded[y, z - 1]) and not near(corner, decoded[y - 1, z])
            at = (y - 1, z) if by_upper else (y, z - 1)
            if near(x[y, z], decoded[at]):
                decoded[y, z], anchor[y, z] = decoded[at], anchor[at]
    return decoded, anchor


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (6, 1), (7, 5)])
def test_the_rule(shape, tau):
    """And what the kept cells tell is the picture: at tau 0 to the bit, else to tau."""
    for seed in range(5):
        x = np.random.default_rng(seed).integers(0, 3, (*shape, 2)) * 0.25
        decoded, expected = serial(x, tau)
        found = np.array(anchors(torch.tensor(x), tau)).reshape(shape)
        assert (found == expected).all()
        assert np.abs(x.reshape(-1, 2)[found] - x).max() <= tau
        assert (found.flat[found] == found).all() and (decoded == x.reshape(-1, 2)[found]).all()


def test_frames_are_pictures_of_their_own():
    x = torch.zeros(3, 2, 2, 4)
    assert PixelPrune().anchors(x).flatten().tolist() == [0] * 4 + [4] * 4 + [8] * 4


def masked_attention(attention, kept, hidden, cu_seqlens, position_embeddings, **kwargs):
    """A tower's attention, in which nothing looks at a patch that is not kept."""
    q, k, v = attention.qkv(hidden).unflatten(1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)  # [H, S, d]
    cos, sin = (x.float() for x in position_embeddings)
    turned = lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)
    q, k = (x * cos + turned(x) * sin for x in (q, k))
    part = torch.bucketize(torch.arange(len(hidden)), cu_seqlens[1:].long(), right=True)
    allowed = (part[:, None] == part) & kept
    allowed |= torch.eye(len(hidden), dtype=torch.bool)  # so that what is masked has something to look at
    out = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~allowed, -torch.inf).softmax(-1) @ v
    return attention.proj(out.transpose(0, 1).flatten(1))


def in_order_of_the_tower(model, grids, kept):
    """[patches] bool of [cells] bool in raster order."""
    visual = model.model.visual
    if hasattr(visual, "window_size"):
        from transformers.vision_utils import get_vision_window_index

        kept = kept[get_vision_window_index(grids, 2, visual.window_size, visual.patch_size)[0]]
    return kept.repeat_interleave(4)


@pytest.mark.parametrize("made", ["pages", "clips"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_the_encoder_runs_on_what_is_kept(family, made):
    model, processor = tiny(family)
    still = np.repeat(clip(112, 168, 3, frames=2), 3, 0)
    still[:, :80] = 200
    shown = [still] if made == "clips" else [page(70, 112, 1), picture(56, 56, 2), page(112, 70, 3)]
    inputs = batch(processor, [" and ".join("#" * len(shown))], shown)
    modality, values = ("video", "_videos") if made == "clips" else ("image", "")
    grids, pixels = inputs[f"{modality}_grid_thw"], inputs[f"pixel_values{values}"]
    encode = lambda *given: getattr(model.model, f"get_{modality}_features")(*given)
    with torch.no_grad(), vtok.patch(model, "pixelprune") as patch:
        sparse = encode(pixels, grids)
        run(model, inputs)
    own = [into == torch.arange(len(into)) for into in patch.trace.merged_into]
    assert [int(keep.sum()) for keep in own] == patch.trace.n_kept
    assert sum(patch.trace.n_kept) < 0.8 * sum(patch.trace.n_visual)
    mask = in_order_of_the_tower(model, grids, torch.cat(own))
    for block in model.model.visual.blocks:
        block.attn.forward = types.MethodType(
            lambda self, x, **kwargs: masked_attention(self, mask, x, **kwargs), block.attn
        )
    with torch.no_grad():
        dense = encode(pixels, grids)
    of = lambda output: [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    pairs = [[torch.cat(list(x)) if isinstance(x, tuple) else x for x in pair] for pair in zip(of(sparse), of(dense))]
    whole = torch.cat(own)
    for ours, theirs in pairs:
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours[whole], theirs[whole], atol=1e-4, rtol=1e-4)
    into, start = [], 0
    for one in patch.trace.merged_into:
        into.append(one + start)
        start += len(one)
    assert torch.equal(pairs[0][0], pairs[0][0][torch.cat(into)])  # the others have the feature of what stands for them


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_sampled_frames(family):
    """What is encoded is what the encoder makes of a clip of these frames alone."""
    model, processor = tiny(family)
    inputs = batch(processor, ["# ?"], [clip(112, 168, 3, frames=8)])
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    encode = lambda *given: torch.cat(list(model.model.get_video_features(*given).pooler_output))
    with torch.no_grad():
        alone = encode(
            pixels.unflatten(0, (4, -1))[[1, 3]].flatten(0, 1), torch.cat([grid[:, :1] // 2, grid[:, 1:]], 1)
        )
        with vtok.patch(model, "sampled_frames", keep=0.5) as patch:
            sparse = encode(pixels, grid).unflatten(0, (4, -1))
            run(model, inputs)
    torch.testing.assert_close(sparse[[1, 3]].flatten(0, 1), alone, atol=1e-5, rtol=1e-4)
    assert torch.equal(sparse[0], sparse[1]) and torch.equal(sparse[2], sparse[1])
    assert patch.trace.n_visual == [2 * len(alone)] and patch.trace.n_kept == [len(alone)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_photo_is_left_as_it_is(family):
    model, processor = tiny(family)
    inputs = batch(processor, ["# and #"], [picture(112, 168), picture(56, 56)])
    dense = run(model, inputs).logits
    with vtok.patch(model, "pixelprune") as patch:
        assert torch.equal(run(model, inputs).logits, dense)
        assert patch.trace.n_kept == patch.trace.n_visual


def test_a_white_page_is_one_token_and_the_encoder_is_spared():
    model, processor = tiny("qwen3_vl")
    inputs = batch(processor, ["# What?"], [Image.new("RGB", (256, 192), "white")])
    seen = []
    model.model.visual.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    with vtok.patch(model, "pixelprune") as patch:
        run(model, inputs)
    assert patch.trace.n_visual == [48] and patch.trace.n_kept == [1] and seen == [4]
    flops = patch.trace.flops()
    assert flops["compressed"]["encoder"] < flops["dense"]["encoder"] / 40


def test_what_it_goes_with():
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["# What?"], [page(112, 112)])
    with vtok.patch(model, "pixelprune") as patch:
        run(model, inputs)
        cells = patch.trace.n_kept[0]
    with vtok.patch(model, [PixelPrune(), vtok.DivPrune(keep=0.5), vtok.FastV(keep=0.5)]) as patch:
        run(model, inputs)
        assert patch.trace.n_kept_at(0) == [cells // 2]
        with patch.using("divprune", keep=2):
            run(model, inputs)
            assert patch.trace.n_kept_at(0) == [2]
            assert patch.trace.pictures[0].layout.n == cells  # pixelprune acts as before
        with pytest.raises(Unsupported, match="swap"), patch.using("pixelprune", tau=0.5):
            pass
    for other, words in (
        (vtok.VisionZip(importance="received"), "of whole views"),
        (vtok.EVS(), "frames of whole views"),
        (vtok.Downsample(), "another method in the encoder"),
    ):
        with pytest.raises(Unsupported, match=words):
            vtok.patch(model, [PixelPrune(), other])
    with pytest.raises(InvalidValue, match="no budget"):
        vtok.patch(model, "pixelprune", budget=0.5)
    for family in ("llava", "llava_onevision", "internvl"):
        with pytest.raises(Unsupported, match="patch_list"):
            vtok.patch(tiny(family)[0], "pixelprune")

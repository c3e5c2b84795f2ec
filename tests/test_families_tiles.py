"""InternVL and LLaVA-OneVision: layouts against transformers' own packing, clips, smaller pictures, what is refused."""

import itertools
import math

import numpy as np
import pytest
import torch
from contract import Entered, Masked, batch, mark, mixed, picture, tiny
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

import vtok
from vtok import adapter as adapters
from vtok.adapter import Placed, shrink
from vtok.adapters.internvl import arrangement, tiled
from vtok.adapters.llava_next import anyres_layout
from vtok.adapters.llava_onevision import limited
from vtok.compressors.globalcom2 import crop_index, crop_sizes, mosaic_index
from vtok.engine import accounting
from vtok.engine.accounting import encoder_flops
from vtok.errors import Unsupported
from vtok.types import Layout, VisualTokens

SIZES = [(112, 112), (70, 112), (112, 70), (30, 200), (200, 30), (56, 57), (333, 97), (20, 20)]


def run(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra})


def clip(processor, prompts, clips, frames=3):
    """Inputs with `clips` clips of equal length, as both families' processors need them."""
    texts = [prompt.replace("#", mark(processor, "video")) for prompt in prompts]
    videos = [np.random.default_rng(i).integers(0, 255, (frames, 56, 84, 3)).astype("uint8") for i in range(clips)]
    return processor(text=texts, videos=videos, return_tensors="pt", padding=True)


# ---- LLaVA-OneVision -----------------------------------------------------------------------------------------------
def packed_ramps(core, size, limit):
    """What transformers makes of a picture whose features are (view, row, column), with newlines of -1."""
    grid = get_anyres_image_grid_shape(size, core.config.image_grid_pinpoints, 56)
    y, x = torch.meshgrid(torch.arange(grid[0] * 4.0), torch.arange(grid[1] * 4.0), indexing="ij")
    mosaic = torch.stack([torch.ones_like(y), y, x])  # [3, rows, cols]
    crops = mosaic.unflatten(1, (grid[0], 4)).unflatten(3, (grid[1], 4)).permute(1, 3, 2, 4, 0).reshape(-1, 16, 3)
    own = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))[None]  # the thumbnail's
    features, _ = core.pack_image_features(
        [torch.cat([own, crops])], torch.tensor([size]), torch.full((3,), -1.0), f"anyres_max_{limit}"
    )
    return features[0]


@pytest.mark.parametrize("limit", [1, 2, 3, 9])
@pytest.mark.parametrize("size", SIZES)
def test_anyres_max_is_transformers_own(size, limit):
    core = tiny("llava_onevision")[0].model
    grid = get_anyres_image_grid_shape(size, core.config.image_grid_pinpoints, 56)
    layout, packed = limited(anyres_layout(4, grid, size), limit), packed_ramps(core, size, limit)
    assert layout.n_rows == len(packed)
    assert (packed[layout.separator_place] == -1).all()
    tokens = packed[layout.place]
    assert tokens[:16].tolist() == [[0, y, x] for y in range(4) for x in range(4)]
    crops = layout.planes[1]
    y, x = torch.meshgrid(crops.mosaic_rows(), crops.mosaic_cols(), indexing="ij")
    torch.testing.assert_close(tokens[16:, 0], torch.ones(crops.size))
    if any(crops.resampled):  # a bilinear mix of the two places nearest to the middle of the cell
        assert crops.size < math.prod(crops.resampled)
        assert (tokens[16:, 1] - y.flatten()).abs().max() <= 0.51
        assert (tokens[16:, 2] - x.flatten()).abs().max() <= 0.51
    else:
        assert torch.equal(tokens[16:, 1:], torch.stack([y.flatten(), x.flatten()], 1).float())


def test_crops_of_a_resampled_mosaic():
    """A resampled token belongs to the crop in which its middle lies."""
    layout = limited(anyres_layout(6, (3, 2), (160, 100)), 2)
    crops = layout.planes[1]
    (rows, cols), (top, left) = crops.resampled, crops.offset
    assert (rows, cols) != (crops.rows, crops.cols)
    expected = []
    for y, x in itertools.product(range(crops.rows), range(crops.cols)):
        middle = top + (y + 0.5) * rows / crops.rows, left + (x + 0.5) * cols / crops.cols
        expected.append(int(middle[0] // 6) * 2 + int(middle[1] // 6))
    assert crop_index(crops).tolist() == expected
    assert crop_sizes(crops).tolist() == [expected.count(c) for c in range(6)]
    assert (mosaic_index(crops) // 36).tolist() == expected
    assert sum((b.stop - b.start) for b in crops.crop_slices[0]) == crops.rows
    assert len(mosaic_index(crops).unique()) == crops.size  # coarser than the encoder's: no two read the same patch


def embeddings(model, inputs):
    """What the language model of an unpatched model is given, with newlines of 7."""
    noted = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: noted.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model.model.image_newline.fill_(7.0)
    run(model, inputs)
    hook.remove()
    return noted[0]


def test_newlines_of_onevision():
    """One picture a sample, several, and a clip: separators are where transformers puts the newline's embedding."""
    model, processor = tiny("llava_onevision")
    texts = ["one <image> here", "two <image> and <image>", "moves <video> ?"]
    images = [[picture(112, 70)], [picture(112, 112), picture(70, 112)]]
    video = np.random.default_rng(0).integers(0, 255, (3, 56, 84, 3)).astype("uint8")
    inputs = processor(text=texts, images=images, videos=[video], return_tensors="pt", padding=True)
    assert inputs["batch_num_images"].tolist() == [1, 2]
    newline = (embeddings(model, inputs) == 7).all(-1)
    with vtok.patch(model, "uniform", keep=0.5) as patch:
        run(model, inputs)
    shapes = [(layout.modality, len(layout.planes), layout.tail) for layout in patch.trace.layouts]
    assert shapes == [("image", 2, 0), ("image", 1, 1), ("image", 1, 1), ("video", 3, 1)]
    assert patch.trace.samples == (0, 1, 1, 2)
    assert patch.trace.n_visual[1:] == [16, 16, 3 * 4]
    separators = torch.cat([p.rows[p.dense.separator_place] for p in patch.trace.pictures])
    assert separators.sort().values.tolist() == newline.flatten().nonzero().squeeze(1).tolist()
    assert patch.trace.present_at(0)[newline].all()
    with Masked(model, patch.trace):
        masked = run(model, inputs).logits
    with vtok.patch(model, "uniform", keep=0.5):
        pruned = run(model, inputs).logits
    present = patch.trace.present_at(0)
    torch.testing.assert_close(pruned[present], masked[present], atol=1e-5, rtol=1e-5)


def test_pooled_frames_are_transformers_own():
    model, _ = tiny("llava_onevision")
    core = model.model
    ramps = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0), torch.arange(4.0)).view(3, 16, 3)
    pooled = core.apply_pooling(ramps).flatten(0, 1)  # [3 * 4, (frame, y, x)]
    adapter = vtok.adapter.find(model)[1]
    (layout,) = adapter.layouts(core.config, "video", {"pixel_values_videos": torch.zeros(1, 3, 3, 56, 56)})
    assert layout.n == len(pooled) == layout.n_rows - 1
    for i, (plane, start) in enumerate(zip(layout.planes, layout.starts)):
        y, x = torch.meshgrid(plane.mosaic_rows(), plane.mosaic_cols(), indexing="ij")
        frame = pooled[start : start + plane.size]
        assert (frame[:, 0] == i).all()
        assert ((frame[:, 1] - y.flatten()).abs() <= 0.5).all() and ((frame[:, 2] - x.flatten()).abs() <= 0.5).all()


def test_smaller_frames_are_pooled_on_their_own_grid():
    model, processor = tiny("llava_onevision")
    core, inputs = model.model, clip(processor, ["# ?"], 1)
    with vtok.patch(model, vtok.Downsample(keep=0.6)) as patch, Entered(model, patch) as entered:
        run(model, inputs)
    with torch.no_grad():
        pixels = torch.nn.functional.interpolate(
            inputs["pixel_values_videos"][0], size=3 * 14, mode="bicubic", antialias=True
        )
        hidden = core.vision_tower(pixels, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states[-1]
        grid = core.multi_modal_projector(hidden).transpose(1, 2).reshape(3, -1, 3, 3)
        small = torch.nn.functional.interpolate(grid, size=1, mode="bilinear").flatten(1)  # floor(2 * 3 / 4) a side
    assert patch.trace.n_kept == [3]
    kept = entered.embeds[0, patch.trace.pictures[0].tokens]
    torch.testing.assert_close(kept, small, atol=1e-4, rtol=1e-4)


# ---- InternVL --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 3), (3, 2), (4, 3)])
def test_tiles_and_pixel_shuffle_are_transformers_own(grid):
    """Encode each patch's place on the mosaic in its features, let transformers shuffle them, and read them back."""
    core = tiny("internvl")[0].model
    rows, cols = grid[0] * 8, grid[1] * 8  # patches
    place = torch.arange(rows * cols, dtype=torch.float).view(rows, cols)
    tiles = place.view(grid[0], 8, grid[1], 8).transpose(1, 2).reshape(-1, 8, 8, 1)
    tiles = torch.cat([tiles, torch.full((1, 8, 8, 1), -1.0)])  # the thumbnail comes last
    packed = core.pixel_shuffle(tiles, core.config.downsample_ratio).flatten(0, 2)  # [placeholders, 4]
    layout = tiled(4, grid)
    assert layout.n_rows == layout.n == len(packed)
    tokens = packed[layout.place]
    crops, thumbnail = layout.planes
    for i, (y, x) in enumerate(itertools.product(range(crops.rows), range(crops.cols))):
        block = place[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        assert sorted(tokens[i].tolist()) == sorted(block.flatten().tolist())
    assert (tokens[layout.starts[1] :] == -1).all() and thumbnail.size == 16
    small, source = shrink(layout, (2, 2))
    assert [plane.size for plane in small.planes] == [4 * math.prod(grid), 4]
    assert {int(i) for i in crop_index(crops)[source[source < crops.size]]} == set(range(math.prod(grid)))


def natural(height, width, seed):
    """A picture with structure at all scales, as photographs have."""
    rng = np.random.default_rng(seed)
    layers = [rng.normal(size=(3, s, s)) for s in (2, 5, 16)]
    size = (height, width)
    image = sum(torch.nn.functional.interpolate(torch.tensor(a)[None], size, mode="bilinear") for a in layers)[0]
    image = (image - image.amin()) / (image.amax() - image.amin())
    return Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy())


def test_arrangement_of_tiles():
    """The processor knows in how many rows and columns it cut a picture; the adapter sees it."""
    _, processor = tiny("internvl")
    seen = set()
    for i, (height, width) in enumerate(itertools.product((60, 100, 120, 150, 230, 400), repeat=2)):
        for image in (natural(height, width, i), picture(height, width, i)):
            pixels = processor.image_processor(image, crop_to_patches=True, max_patches=12)["pixel_values"]
            pixels = torch.nn.functional.adaptive_avg_pool2d(torch.as_tensor(np.stack(pixels)), 16)
            if len(pixels) > 1:
                cols, rows = get_optimal_tiled_canvas((height, width), (56, 56), 1, 12)
                assert arrangement(pixels[:-1], pixels[-1]) == (rows, cols)
                seen.add((rows, cols))
    assert len(seen) >= 8 and {(2, 3), (3, 2)} <= seen
    assert arrangement(torch.ones(6, 3, 4, 4), torch.ones(3, 4, 4)) in ((2, 3), (3, 2))


def test_views_of_one_picture():
    """Those whose placeholders follow each other, but not from the end of a row to the start of the next."""
    where = torch.tensor([2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 16, 17])  # rows of 10: 9 ends the first, 10 starts the next
    unbroken = lambda where, sizes: Placed(where, sizes, 10, lambda places: places).unbroken()
    assert unbroken(where, [2] * 6) == [[0, 1], [2], [3, 4], [5]]
    assert unbroken(where, [4, 2, 4, 2]) == [[0], [1], [2], [3]]
    assert unbroken(torch.tensor([4, 5]), [2]) == [[0]]


def test_globalcom2_does_not_care_where_the_thumbnail_is():
    """InternVL's layout against LLaVA-NeXT's, with the same tokens; four patches' logits count as their mean."""
    torch.manual_seed(0)
    grid, side = (2, 3), 4
    behind, features = tiled(side, grid), torch.randn(2, 7 * 16, 8)
    front = Layout((behind.planes[1], behind.planes[0]))
    logits = torch.randn(2, 7, 16, 4)
    grouped = VisualTokens(features.roll(16, 1), front, logits.mean(3).roll(1, 1))
    whole = VisualTokens(features, behind, logits.flatten(2))
    for source in ("cls_logits", "cls_probs", "neg_cos_mean"):
        compressor = vtok.GlobalCom2(keep=0.3, score_source=source)
        assert torch.equal(compressor.select(whole).keep.roll(16, 1), compressor.select(grouped).keep), source


def test_cls_logits_of_internvl():
    """Against the attention that the encoder itself computes; views in the order of the planes."""
    model, processor = tiny("internvl", "eager")
    inputs = batch(processor, ["# and #"], [picture(70, 112, 1), picture(56, 56, 2)])
    weights, seen = [], []
    layer = model.model.vision_tower.encoder.layer[-1].attention
    hook = layer.register_forward_hook(lambda module, args, output: weights.append(output[1]))

    class Seeing(vtok.GlobalCom2):
        def select(self, tokens):
            seen.append(tokens)
            return super().select(tokens)

    with vtok.patch(model, Seeing(keep=0.5)):
        run(model, inputs)
    hook.remove()
    logits = torch.log(weights[0][:, :, 0, 1:]).mean(1)  # [4 tiles, 64], up to a constant
    logits = logits.view(4, 4, 2, 4, 2).transpose(2, 3).flatten(3).flatten(1, 2)  # [4, 16, 4]
    ours = torch.cat([tokens.cls_attention[0] for tokens in seen]).unflatten(1, (16, 4))
    assert [len(tokens.cls_attention[0]) for tokens in seen] == [3, 1]
    centred = lambda x: x - x.mean((1, 2), keepdim=True)
    torch.testing.assert_close(centred(ours), centred(logits), atol=1e-4, rtol=1e-4)


def test_smaller_tiles():
    model, processor = tiny("internvl")
    core, inputs = model.model, batch(processor, ["# ?"], [natural(70, 112, 0)])
    with vtok.patch(model, vtok.Downsample(keep=0.3)) as patch, Entered(model, patch) as entered:
        run(model, inputs)
    pixels = torch.nn.functional.interpolate(inputs["pixel_values"], size=2 * 14, mode="bicubic", antialias=True)
    with torch.no_grad():
        small = core.get_image_features(pixels).pooler_output  # [3, 4, D]
    small_layout = tiled(2, (1, 2))
    kept = entered.embeds[0, patch.trace.pictures[0].tokens]
    torch.testing.assert_close(kept, small.flatten(0, 1)[small_layout.place], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_internvl_encoder_against_flop_counter():
    model, _ = tiny("internvl", "eager")
    shape = adapters.of(model.config).tower(model.config).shape()
    assert (shape.merge, shape.cls_tokens, shape.projector) == (2, 1, (128, 64, 64))
    with FlopCounterMode(display=False) as counter:
        model.model.get_image_features(torch.rand(3, 3, 56, 56))
    n = 64 + 1
    small = shape.layers * (accounting.SOFTMAX * shape.heads * n * n + accounting.SMALL * n * shape.hidden)
    assert counter.get_total_flops() == encoder_flops(shape, [(8, 8)] * 3) - 3 * small


# ---- both ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["uniform", "pool", "downsample", "fastv", "aim"])
@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_clips(family, method):
    model, processor = tiny(family)
    inputs = clip(processor, ["see # what moves?", "# and #"], 3)
    with vtok.patch(model, method) as patch, Entered(model, patch) as entered:
        pruned = run(model, inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    trace = patch.trace
    clips = [0, 1, 1] if family == "llava_onevision" else [0] * 3 + [1] * 6  # InternVL: each frame is a picture
    assert list(trace.samples) == clips
    assert sum(trace.n_visual) == 9 * (4 if family == "llava_onevision" else 16)
    assert sum(trace.n_kept_at(3)) < sum(trace.n_visual)
    patches = 4 if family == "llava_onevision" else 8
    dense = encoder_flops(adapters.of(model.config).tower(model.config).shape(), [(patches, patches)] * 9)
    assert trace.flops()["dense"]["encoder"] == dense
    assert (trace.flops()["compressed"]["encoder"] < dense) == (method == "downsample")
    with Masked(model, trace, entered.embeds):
        masked = run(model, inputs).logits
        masked_tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    present = trace.present_at(3)
    torch.testing.assert_close(pruned[present], masked[present], atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, masked_tokens)


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_beams_see_their_own_pictures(family):
    """transformers repeats a sample's features for its beams; what goes with them follows."""
    model, processor = tiny(family)
    inputs = mixed(processor) if family == "internvl" else clip(processor, ["# ?", "# and #", "none"], 3)
    source = "cls_logits" if family == "internvl" else "neg_cos_mean"
    method = vtok.GlobalCom2(keep=0.3, score_source=source) if family == "internvl" else vtok.Pool(keep=0.5)
    kept = []
    for beams in (1, 3):
        with vtok.patch(model, method) as patch:
            model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=beams)
        kept.append([positions.tolist() for positions in patch.trace.positions])
    assert kept[1] == [positions for positions in kept[0] for _ in range(3)]


def test_what_is_refused():
    def changed(family, **changes):
        model, _ = tiny(family)
        for name, value in changes.items():
            setattr(model.config, name, value)
        return model

    with pytest.raises(Unsupported, match="drop CLS"):
        vtok.patch(changed("internvl", vision_feature_select_strategy="full"), "uniform")
    with pytest.raises(Unsupported, match="downsample_ratio"):
        vtok.patch(changed("internvl", downsample_ratio=0.4), "uniform")
    with pytest.raises(Unsupported, match="vision_aspect_ratio"):
        vtok.patch(changed("llava_onevision", vision_aspect_ratio="pad"), "uniform")
    clip_tower = changed("llava_onevision", vision_feature_select_strategy="default")
    clip_tower.config.vision_config = tiny("llava")[0].config.vision_config
    with pytest.raises(Unsupported, match="SigLIP"):
        vtok.patch(clip_tower, "uniform")
    with pytest.raises(Unsupported, match="cls_attention"):
        vtok.patch(tiny("llava_onevision")[0], "globalcom2")
    model, processor = tiny("llava_onevision")
    globalcom2 = vtok.GlobalCom2(keep=0.5, score_source="neg_cos_mean")
    with vtok.patch(model, globalcom2), pytest.raises(Unsupported, match="video"):
        run(model, clip(processor, ["# ?"], 1))

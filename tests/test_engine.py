"""Parts of the engine on their own: compaction, the cache, layouts against transformers, traces, compile, video."""

import numpy as np
import pytest
import torch
from contract import FAMILIES, INSIDE, Entered, Masked, able, batch, mark, mixed, picture, seam, tiny
from drafts import right_and_wrong
from torch._dynamo.utils import counters
from transformers import DynamicCache

import vtok
from vtok.adapter import shrink, stretch
from vtok.adapters.llava_next import anyres_layout
from vtok.engine.cache import CompressedCache, Rows
from vtok.errors import Unsupported
from vtok.stages.pre_llm import Shift
from vtok.types import Layout, Plane, keep_count


def logits(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra}).logits


def test_keep_count():
    assert [keep_count(576, k) for k in (0.25, 0.1, 1.0, 1, 700)] == [144, 57, 576, 1, 576]
    assert keep_count(30, 0.1) == 3  # 0.1 * 30 is a little more than 3, 0.29 * 100 a little less than 29
    assert keep_count(100, 0.29) == 29
    assert keep_count(3, 0.01) == 1


def test_rows_keep_the_order_and_restore():
    keep = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    rows = Rows.of(keep, [3, 1])
    assert rows.padded
    assert rows.index[0].tolist() == [0, 2, 3]
    assert rows.valid.tolist() == [[True] * 3, [False, False, True]]
    assert rows.index[1, 2] == 3
    hidden = torch.arange(1.0, 7).view(2, 3, 1)
    assert rows.restore(hidden, 5).squeeze(-1).tolist() == [[1, 0, 2, 3, 0], [0, 0, 0, 6, 0]]
    hidden[1, 0] = torch.nan  # padding holds anything
    assert rows.restore(hidden, 5).isfinite().all()
    narrower, columns = rows.narrow(torch.tensor([[True, False, True], [False, False, True]]), [2, 1])
    assert narrower.index[0].tolist() == [0, 3]
    assert columns[0].tolist() == [0, 2]
    assert narrower.valid.tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("size", [(112, 112), (70, 112), (112, 70), (30, 200), (200, 30), (56, 57), (333, 97)])
def test_anyres_layout_is_transformers_own(size):
    """Encode each token's place in its features, let transformers cut and join, and read the places back."""
    model, _ = tiny("llava_next")
    core = model.model
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    grid = get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, 56)
    views, side = 1 + grid[0] * grid[1], 4
    features = torch.arange(views * side * side, dtype=torch.float).view(views, side * side, 1)
    packed, (count,) = core.pack_image_features([features], torch.tensor([size]), "default", torch.tensor([-1.0]))
    layout = anyres_layout(side, grid, size)
    assert layout.n_rows == count
    crops = layout.planes[1]
    expected = list(range(side * side))
    for row in range(crops.rows):
        for col in range(crops.cols):
            y, x = row + crops.offset[0], col + crops.offset[1]
            view = 1 + (y // side) * grid[1] + x // side
            expected.append(view * side * side + (y % side) * side + x % side)
    assert packed[0][layout.place, 0].tolist() == expected
    separators = torch.ones(count, dtype=torch.bool).index_fill_(0, layout.place, False)
    assert (packed[0][separators] == -1).all()


def test_shrunk_layouts_partition_the_dense_one():
    layout = anyres_layout(6, (2, 2), (70, 112))
    small, source = shrink(layout, (3, 3))
    assert small.n == len(source) == len(set(source.tolist()))
    assert small.planes[0].size == 9
    assert small.planes[1].rows <= 6
    assert stretch(Plane(4, 4), (2, 2)).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3]
    same, all_of_them = shrink(layout, (6, 6))
    assert same == layout
    assert all_of_them.tolist() == list(range(layout.n))


def test_boxes_tile_the_picture():
    boxes = Layout((Plane(2, 3),)).boxes
    expected = [(x / 3, y / 2, (x + 1) / 3, (y + 1) / 2) for y in range(2) for x in range(3)]
    torch.testing.assert_close(boxes, torch.tensor(expected))


def test_compressed_cache_follows_batch_operations():
    cache = DynamicCache()
    cache.update(torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4), 0)
    cache = CompressedCache.adopt(cache, torch.tensor([[True, True, True], [False, True, True]]))
    cache.seen, cache.states["pre_llm"] = 7, Shift(torch.tensor([1, 2]))
    assert cache.get_seq_length() == 7
    assert cache.columns(0) == 3
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.valid[0].tolist() == [[False, True, True], [True, True, True]]
    assert cache.states["pre_llm"].amount.tolist() == [2, 1]
    cache.batch_repeat_interleave(2)
    assert cache.valid[0].shape == (4, 3)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.valid[0].tolist() == [[False, True, True]]
    cache.crop(-1)
    assert cache.get_seq_length() == 6
    assert cache.columns(0) == 2
    assert cache.valid[0].tolist() == [[False, True]]
    cache.reset()
    assert cache.get_seq_length() == cache.columns(0) == 0


@pytest.mark.parametrize("family", INSIDE)
def test_assisted_decoding(family):
    """A draft model's wrong tokens are cropped from the compressed cache again."""
    model, processor = tiny(family)
    inputs = batch(processor, ["a # What colour?"], [picture(70, 112)])
    with vtok.patch(model, [vtok.Uniform(keep=0.5), vtok.FastV(keep=0.5)]):
        plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        with right_and_wrong(plain):
            drafted = model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, drafted)


def test_renumbered_positions():
    """Tokens of the language model that really had no gaps: cut the prompt's ids and features by hand."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour is it?", "# yes"], [picture(56, 56, 1), picture(56, 56, 2)])

    with vtok.patch(model, "uniform", keep=0.25, renumber=True) as patch, Entered(model, patch) as entered:
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    trace = patch.trace
    rows = trace.rows_at(0)
    with torch.no_grad():
        embeds = entered.embeds.gather(1, rows.index[..., None].expand(-1, -1, entered.embeds.shape[2]))
    short = model.generate(inputs_embeds=embeds, attention_mask=rows.valid.long(), max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1] :], short)
    with vtok.patch(model, vtok.Uniform(keep=0.25)):
        gaps = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert trace.n_kept == [4, 4]
    assert not torch.equal(gaps, tokens)  # else this has shown little
    qwen, _ = tiny("qwen2_5_vl")
    with pytest.raises(Unsupported, match="M-RoPE"):
        vtok.patch(qwen, "uniform", keep=0.25, renumber=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_given_as_embeddings(family):
    """Placeholders are then found as transformers finds them, by their embedding."""
    model, processor = tiny(family)
    inputs = dict(mixed(processor))
    if hasattr(model.model, "get_rope_index"):
        position_ids, _ = model.model.get_rope_index(
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            image_grid_thw=inputs["image_grid_thw"],
            attention_mask=inputs["attention_mask"],
        )
        inputs["position_ids"] = position_ids
    with vtok.patch(model, able(family, vtok.Uniform(keep=0.5), vtok.FastV())):
        by_ids = logits(model, inputs)
        ids = inputs.pop("input_ids")
        by_embeds = logits(model, {**inputs, "inputs_embeds": model.get_input_embeddings()(ids)})
    assert torch.equal(by_ids, by_embeds)


KINDS = {seam(family): family for family in reversed(FAMILIES)}  # the first family of each kind of seam


@pytest.mark.parametrize("family", KINDS.values())
def test_compile_after_patch(family):
    """Of two decoder layers, and with both stages at once: each alone is in `test_compile.py`."""
    torch._dynamo.reset()  # else what other tests compiled so often that it is given up is not compiled here
    counters.clear()
    model, processor = tiny(family, layers=2)
    inputs = batch(processor, ["a # What colour?"], [picture(112, 112)])
    other = batch(processor, ["a # What colour?"], [picture(112, 112, 5)])
    with vtok.patch(model, able(family, vtok.Uniform(keep=0.5), vtok.FastV(keep=0.5, layer=1))) as patch:
        eager = [logits(model, x) for x in (inputs, other)]
        compiled = torch.compile(model, backend="aot_eager")
        for x, expected in zip((inputs, other), eager):
            torch.testing.assert_close(logits(compiled, x), expected, atol=1e-5, rtol=1e-5)
        assert patch.trace.mean_keep < 1
    assert counters["stats"]["unique_graphs"] > 1


def video(processor, prompts, frames, side="left"):
    processor.tokenizer.padding_side = side
    texts = [prompt.replace("#", mark(processor, "video")) for prompt in prompts]
    clips = [np.random.default_rng(i).integers(0, 255, (t, 56, 84, 3)).astype("uint8") for i, t in enumerate(frames)]
    metadata = [{"fps": 2.0, "total_num_frames": t, "frames_indices": list(range(t))} for t in frames]
    return processor(
        text=texts, videos=clips, video_metadata=metadata, do_sample_frames=False, padding=True, return_tensors="pt"
    )


@pytest.mark.parametrize("method", ["uniform", "pool", "downsample", "fastv", "aim_merge", "aim"])
def test_video(method):
    model, processor = tiny("qwen2_5_vl")
    inputs = video(processor, ["see # what moves?", "# and #"], [4, 6, 2])
    with vtok.patch(model, method) as patch, Entered(model, patch) as entered:
        pruned = logits(model, inputs)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    trace = patch.trace
    assert [len(layout.planes) for layout in trace.layouts] == [2, 3, 1]
    assert sum(trace.n_kept_at(3)) < sum(trace.n_visual)
    with Masked(model, trace, entered.embeds):
        masked = logits(model, inputs)
        masked_tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    present = trace.present_at(3)
    torch.testing.assert_close(pruned[present], masked[present], atol=1e-5, rtol=1e-5)
    assert torch.equal(tokens, masked_tokens)


@pytest.mark.parametrize("family", INSIDE)
def test_trace(family):
    import json

    model, processor = tiny(family)
    inputs = mixed(processor)
    with vtok.patch(model, [vtok.Uniform(keep=0.5), vtok.FastV(keep=0.5, layer=2)]) as patch:
        logits(model, inputs)
    trace = patch.trace
    assert trace.samples == (0, 1, 1, 3, 4)
    assert sum(trace.n_visual) == int(sum(layout.n for layout in trace.layouts))
    assert trace.n_kept_per_sample[2] == 0
    halves = [keep_count(n, 0.5) for n in trace.n_visual]
    extra = [n - h for n, h in zip(trace.n_kept, halves)]
    assert all(e in (0, 1) for e in extra)  # one more where a picture ends the prompt and its last token was dropped
    for sample, positions in enumerate(trace.positions_at(3)):
        assert set(positions.tolist()) <= set(trace.positions[sample].tolist())
        assert (positions.diff() > 0).all()
    flops = trace.flops()
    assert flops["compressed"]["prefill"] < flops["dense"]["prefill"]
    assert flops["compressed"]["encoder"] == flops["dense"]["encoder"]
    assert trace.kv_bytes()["compressed"] < trace.kv_bytes()["dense"]
    assert json.loads(json.dumps(trace.to_dict()))["n_kept"] == trace.n_kept
    with pytest.raises(IndexError, match="layers 0 to 3"):
        trace.positions_at(4)
    before = sum(trace.n_kept) * 2 + sum(trace.n_kept_at(2)) * 2
    assert trace.mean_keep == pytest.approx(before / (4 * sum(trace.n_visual)))

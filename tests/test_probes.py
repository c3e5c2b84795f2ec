"""What compressors read of the vision encoder (vtok/tower.py), against the encoder's own outputs and slow rewrites."""

import functools
import gc
import weakref

import numpy as np
import pytest
import torch
from contract import ADAPTERS, FAMILIES, SIZES, batch, mark, mixed, picture, tiny
from test_undo import snapshot

import vtok
from vtok.adapters.qwen2_5_vl import Qwen25VLAdapter, QwenTower, window_order
from vtok.engine.seams import Seam
from vtok.errors import InvalidValue, Unsupported
from vtok.tower import NEEDS, OF_CLS, OF_PATCHES, Tower, layer_index, received
from vtok.types import Layout, Plane

SEEING = [family for family in FAMILIES if ADAPTERS[family].provides >= OF_PATCHES]
APART = [family for family in SEEING if not isinstance(ADAPTERS[family], Qwen25VLAdapter)]
PACKED = [family for family in SEEING if family.startswith("qwen")]


def spy(layers, keep=0.5, grad=False):
    """A compressor that reads `layers` (need -> layers) and notes what it gets."""

    class Spy(vtok.Uniform):
        needs = frozenset(layers)
        merges = grad
        encoder_layers = property(lambda self: layers)
        seen = []

        def select(self, tokens):
            Spy.seen.append(tokens)
            return super().select(tokens)

    return Spy(keep=keep)


def of_pictures(compressor, trace):
    """For each picture of the trace what the spy got, {(need, layer): [V, P, ...]}: it gets pictures group by group."""
    groups = {}
    for i, p in enumerate(trace.pictures):
        groups.setdefault((p.modality, p.dense, p.layout), []).append(i)
    result = [None] * len(trace.pictures)
    for members, tokens in zip(groups.values(), compressor.seen):
        for g, i in enumerate(members):
            result[i] = {key: x[g] for key, x in tokens.encoder.items()}
    return result


def read(family, layers, inputs=None, model=None):
    """(what was read of each picture, the trace, the model, the inputs)."""
    fresh, processor = tiny(family, "eager")
    model = fresh if model is None else model
    inputs = mixed(processor) if inputs is None else inputs(processor)
    compressor = spy(layers)
    with torch.no_grad(), vtok.patch(model, compressor) as patch:
        model(**inputs, use_cache=True)
    return of_pictures(compressor, patch.trace), patch.trace, model, inputs


def everything(family, layers):
    return dict.fromkeys(NEEDS & ADAPTERS[family].provides, layers)


def ungrouped(x, layout, merge):
    """[V, P, ...] with the patches of a token together -> in raster order, by loops."""
    rows, cols = layout.planes[0].view_shape
    out = torch.empty_like(x)
    for token in range(rows * cols):
        for inner in range(merge * merge):
            y, x_ = token // cols * merge + inner // merge, token % cols * merge + inner % merge
            out[:, y * cols * merge + x_] = x[:, token * merge * merge + inner]
    return out


# ---- encoders that see views apart -------------------------------------------------------------------------
@pytest.mark.parametrize("family", APART)
def test_views_apart(family):
    """All needs at every layer, against attention maps and hidden states that the tower itself gives."""
    found, trace, model, inputs = read(family, everything(family, (0, 1, -1, None)))
    core, adapter = model.model, ADAPTERS[family]
    projected, states, maps, normed = [], {}, {}, {}
    layers = adapter.encoder_layers(core)
    tower = adapter.tower(core.config)

    def note(store, key, pick):
        def hook(module, args, kwargs, out):
            store[key] = pick(args, kwargs, out)

        return hook

    projector = core.get_submodule(adapter.projector)
    hooks = [projector.register_forward_pre_hook(lambda module, args: projected.append(args[0]))]
    for i, layer in enumerate(layers):
        attention = getattr(layer, tower.attention)
        first = lambda args, kwargs, out: args[0] if args else kwargs["hidden_states"]
        hooks += [
            layer.register_forward_hook(note(states, i, first), with_kwargs=True),
            layer.register_forward_hook(note(states, i + 1, lambda args, kwargs, out: out), with_kwargs=True),
            attention.register_forward_hook(note(normed, i, first), with_kwargs=True),
            attention.register_forward_hook(note(maps, i, lambda args, kwargs, out: out[1]), with_kwargs=True),
        ]
    try:
        with torch.no_grad():
            model(**inputs, use_cache=True)
    finally:
        for hook in hooks:
            hook.remove()
    n, skip = len(layers), tower.skip
    views = [sum(plane.views for plane in layout.planes) for layout in trace.layouts]
    for key in found[0]:
        need, layer = key
        ours = [ungrouped(x[key], layout, tower.merge) for x, layout in zip(found, trace.layouts)]
        made = tower.features[0] % (n + 1)
        state = made if layer is None else layer % (n + 1)
        index = made - 1 if layer is None else layer % n
        attention = getattr(layers[index], tower.attention)
        if need == "encoder_states":
            theirs = states[state][:, skip:]
            if layer is None and tower.merge == 1:
                torch.testing.assert_close(
                    torch.cat([x.flatten(0, 1) for x in ours]), projected[0].reshape(-1, theirs.shape[-1])
                )
        elif need in ("encoder_keys", "encoder_mean_keys"):
            theirs = (
                attention.k_norm(attention.k_proj(normed[index]))
                if hasattr(attention, "k_norm")
                else attention.k_proj(normed[index])
            )
            theirs = theirs[:, skip:]
            if need == "encoder_mean_keys":
                theirs = sum(theirs.chunk(attention.num_heads, -1)) / attention.num_heads
        elif need == "encoder_attention":
            theirs = maps[index].mean(1).sum(1)[:, skip:]
        elif need == "cls_probs":
            theirs = maps[index].mean(1)[:, 0, 1:]
        else:
            assert need == "cls_attention"
            logits = maps[index].log()[:, :, 0]  # up to a constant of each head
            theirs = (logits - logits[:, :, 1:].mean(-1, keepdim=True)).mean(1)[:, 1:]
            ours = [x - x.mean(-1, keepdim=True) for x in ours]
        for mine, other in zip(ours, theirs.split(views)):
            torch.testing.assert_close(mine, other, atol=2e-5, rtol=1e-4)


def test_a_tower_without_cls():
    """LLaVA on SigLIP shows keys, states and the attention received, and refuses CLS with the reason."""
    import transformers as T

    base, _ = tiny("llava")
    config = base.config.to_dict()
    config["vision_config"] = {**config["vision_config"], "model_type": "siglip_vision_model", "vision_use_head": False}
    config["vision_feature_select_strategy"], config["vision_feature_layer"] = "full", -1
    torch.manual_seed(0)
    model = T.LlavaForConditionalGeneration(T.LlavaConfig.from_dict(config)).eval()
    model.set_attn_implementation("eager")
    for need in OF_CLS:
        with pytest.raises(Unsupported, match=f"{need}, which this llava model does not have"):
            vtok.patch(model, spy({need: (0,)}))
    pixels = torch.rand(2, 3, 56, 56)
    ids = torch.full((2, 20), model.config.image_token_id)
    ids[:, 16:] = 7
    compressor = spy(dict.fromkeys(OF_PATCHES, (1, None)))
    with torch.no_grad():
        with vtok.patch(model, compressor):
            model(input_ids=ids, pixel_values=pixels)
        out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    seen = compressor.seen[0].encoder
    torch.testing.assert_close(seen["encoder_states", None].squeeze(1), out.hidden_states[-1])
    torch.testing.assert_close(seen["encoder_states", 1].squeeze(1), out.hidden_states[1])
    torch.testing.assert_close(seen["encoder_attention", 1].squeeze(1), out.attentions[1].mean(1).sum(1))
    torch.testing.assert_close(seen["encoder_attention", None].squeeze(1), out.attentions[-1].mean(1).sum(1))


# ---- encoders that see all pictures in one sequence --------------------------------------------------------
def video(processor):
    processor.tokenizer.padding_side = "left"
    frames, prompts = (4, 6, 2), ("see # what moves?", "# and #")
    texts = [prompt.replace("#", mark(processor, "video")) for prompt in prompts]
    clips = [np.random.default_rng(i).integers(0, 255, (t, 56, 84, 3)).astype("uint8") for i, t in enumerate(frames)]
    metadata = [{"fps": 2.0, "total_num_frames": t, "frames_indices": list(range(t))} for t in frames]
    return processor(
        text=texts, videos=clips, video_metadata=metadata, do_sample_frames=False, padding=True, return_tensors="pt"
    )


def wide(processor):
    """Pictures of several windows, with windows cut by the border."""
    return batch(processor, ["a # b", "# c #"], [picture(140, 196, 1), picture(84, 84, 2), picture(196, 84, 3)])


@pytest.mark.parametrize("make", [wide, mixed, video], ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", PACKED)
def test_packed_sequences(family, make):
    """The last states make the model's own tokens, in their order; keys and attention follow from the states."""
    found, trace, model, _ = read(family, everything(family, (0, 1, None)) | {"encoder_states": (0, 1, -1, None)}, make)
    visual, config = model.model.visual, model.config.vision_config
    merge, heads = config.spatial_merge_size, visual.blocks[0].attn.num_heads
    features = []
    compressor = spy({})
    with torch.no_grad(), vtok.patch(model, compressor):
        model(**make(tiny(family)[1]), use_cache=True)
    groups = {}
    for i, p in enumerate(trace.pictures):
        groups.setdefault((p.modality, p.dense), []).append(i)
    features = [None] * len(found)
    for members, tokens in zip(groups.values(), compressor.seen):
        for g, i in enumerate(members):
            features[i] = tokens.features[g]
    for x, layout, tokens in zip(found, trace.layouts, features):
        frames, plane = len(layout.planes), layout.planes[0]
        assert x["encoder_states", -1].shape[:2] == (frames, plane.size * merge * merge)
        torch.testing.assert_close(x["encoder_states", -1], x["encoder_states", None])
        torch.testing.assert_close(visual.merger(x["encoder_states", -1].flatten(0, 1)), tokens, atol=1e-4, rtol=1e-4)
        coordinates = []
        for token in range(plane.size):
            for inner in range(merge * merge):
                y, x_ = token // plane.cols * merge + inner // merge, token % plane.cols * merge + inner % merge
                coordinates.append((y, x_))
        for layer in (0, 1):
            block = visual.blocks[layer]
            qkv = block.attn.qkv(block.norm1(x["encoder_states", layer])).detach()  # [frames, P, 3 C]
            q, k, _ = qkv.chunk(3, -1)
            torch.testing.assert_close(x["encoder_keys", layer], k, atol=1e-5, rtol=1e-4)
            mean = sum(k.chunk(block.attn.num_heads, -1)) / block.attn.num_heads
            torch.testing.assert_close(x["encoder_mean_keys", layer], mean, atol=1e-5, rtol=1e-4)
            windowed = family == "qwen2_5_vl" and layer not in config.fullatt_block_indexes
            side = getattr(config, "window_size", 0) // config.patch_size
            together = torch.tensor(
                [
                    [not windowed or (a // side, b // side) == (c // side, d // side) for c, d in coordinates]
                    for a, b in coordinates
                ]
            )
            for frame in range(frames):
                total = torch.zeros(len(coordinates))
                for h in range(heads):
                    one = lambda v: rotated(v[frame].unflatten(-1, (heads, -1))[:, h], coordinates)  # noqa: B023
                    logits = one(q) @ one(k).T * one(k).shape[-1] ** -0.5
                    total += logits.masked_fill(~together, -torch.inf).softmax(-1).sum(0) / heads
                torch.testing.assert_close(x["encoder_attention", layer][frame], total, atol=1e-4, rtol=1e-3)
                assert x["encoder_attention", layer][frame].mean() == pytest.approx(1, abs=1e-4)


def rotated(v, coordinates):
    """2-D rotary embedding of Qwen's encoders: the first half of the angles turns with y, the second with x."""
    d = v.shape[-1]
    angles = torch.empty(len(coordinates), d // 2)
    for i, (y, x) in enumerate(coordinates):
        for j in range(d // 4):
            angles[i, j], angles[i, d // 4 + j] = y * 10000 ** (-4 * j / d), x * 10000 ** (-4 * j / d)
    a, b = v[:, : d // 2], v[:, d // 2 :]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_window_order_is_transformers_own(window):
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as modeling

    layouts = [
        Layout((Plane(5, 7),)),
        Layout((Plane(2, 3, "frame"),) * 3),
        Layout((Plane(1, 1),)),
        Layout((Plane(4, 8),)),
    ]
    grid = torch.tensor([[1, 10, 14], [3, 4, 6], [1, 2, 2], [1, 8, 16]])
    order, _ = modeling.get_vision_window_index(
        grid, spatial_merge_size=2, window_size=window * 28, patch_size=14, kwargs={}
    )
    assert window_order(layouts, window).tolist() == order.tolist()


# ---- the engine's side -------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", SEEING)
def test_each_picture_as_if_alone(family):
    """Whatever the batch, padding, beams or `generate`, which encodes up front."""
    layers = everything(family, (0,))
    together, _, model, inputs = read(family, layers)
    alone = []
    for prompt, n in (("a # What colour is it?", 1), ("two # and # yes", 2), ("# first", 1), ("0 #", 1)):
        pictures = [picture(*SIZES[seed], seed) for seed in range(len(alone), len(alone) + n)]
        alone += read(family, layers, functools.partial(batch, prompts=[prompt], pictures=pictures))[0]
    # GLM's own rule gives the beams of a sample each picture twice in a row, and so other pictures than the sample's
    own_rule = "_expand_multimodal_outputs" in type(model).__dict__
    for beams in (1,) if own_rule else (1, 2):
        compressor = spy(layers)
        with vtok.patch(model, compressor) as patch:
            model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=beams)
        generated = of_pictures(compressor, patch.trace)
        first = [i for i, sample in enumerate(patch.trace.samples) if sample % beams == 0]
        for one, other in zip(together, [generated[i] for i in first]):
            for key in one:
                torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-4)
    for one, other in zip(together, alone):
        for key in one:
            torch.testing.assert_close(one[key], other[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", SEEING)
def test_after_a_smaller_picture(family):
    """An encoder-stage compressor: what is read has the small picture's shape, a token's patches next to each other."""
    model, processor = tiny(family)
    compressor = spy(everything(family, (0, None)))
    with torch.no_grad(), vtok.patch(model, [vtok.Downsample(keep=0.5), compressor]) as patch:
        model(**mixed(processor), use_cache=True)
    merge = ADAPTERS[family].tower(model.config).merge
    for tokens in compressor.seen:
        views = [plane for plane in tokens.layout.planes for _ in range(plane.views)]
        for (need, _), x in tokens.encoder.items():
            size = views[0].view_shape[0] * views[0].view_shape[1]
            assert x.shape[:3] == (len(tokens.features), len(views), size * merge * merge), need
    assert len(compressor.seen) and patch.trace.mean_keep < 0.5


@pytest.mark.parametrize("family", SEEING)
def test_nothing_is_added_for_nobody_and_undo_is_exact(family):
    model, processor = tiny(family)
    inputs = mixed(processor)
    tower = ADAPTERS[family].encoder_layers(model.model)
    ours = lambda hooks: sum(isinstance(hook, Seam) for hook in hooks.values())
    hooks = lambda: sum(ours(m._forward_hooks) + ours(m._forward_pre_hooks) for m in tower.modules())
    with torch.no_grad():
        dense, before = model(**inputs, use_cache=True).logits, snapshot(model)
        with vtok.patch(model, "uniform"):
            assert hooks() == 0
        with vtok.patch(model, spy({"encoder_keys": (0,)}, keep=1.0)):
            assert hooks() == 0  # nor for one who drops nothing
        compressor = spy({"encoder_keys": (0, 1), "encoder_states": (1,)})
        patch = vtok.patch(model, compressor)
        assert hooks() == 3
        model(**inputs, use_cache=True)
        patch.remove()
        assert snapshot(model) == before
        assert torch.equal(model(**inputs, use_cache=True).logits, dense)
        with pytest.raises(InvalidValue, match="layers 0 to"):
            vtok.patch(model, spy({"encoder_keys": (0, 99)}))
        assert snapshot(model) == before


def test_two_models_read_their_own():
    (one, processor), (two, _) = tiny("llava"), tiny("llava_next")
    with torch.no_grad():
        for parameter in two.model.vision_tower.parameters():
            parameter.mul_(1.1)
    (first, second), inputs = (spy({"encoder_keys": (0,)}), spy({"encoder_keys": (0,)})), mixed(processor)
    next_inputs = mixed(tiny("llava_next")[1])
    with torch.no_grad():
        a, b = vtok.patch(one, first), vtok.patch(two, second)
        one(**inputs, use_cache=True)
        two(**next_inputs, use_cache=True)
        assert (len(first.seen), len(second.seen)) == (1, len({p.layout for p in b.trace.pictures}))
        a.remove()
        two(**next_inputs, use_cache=True)
        assert len(first.seen) == 1
        assert len(second.seen) == 2 * len({p.layout for p in b.trace.pictures})
        b.remove()
    assert first.seen[0].encoder["encoder_keys", 0].shape == (5, 1, 16, 32)


def test_states_carry_gradient_and_scores_do_not():
    model, processor = tiny("llava")

    class Replace(vtok.Uniform):
        needs = frozenset({"encoder_states", "encoder_keys"})
        merges = True

        def select(self, tokens):
            assert not tokens.read("encoder_keys").requires_grad
            base = super().select(tokens)
            states = tokens.read("encoder_states").flatten(1, 2)  # [B, N, C]
            return vtok.Selection(base.keep, base.n_kept, features=states.repeat(1, 1, 2))

    inputs = batch(processor, ["# What?"], [picture(56, 56)])
    embedding = (
        model.model.vision_tower.embeddings
        if hasattr(model.model.vision_tower, "embeddings")
        else (model.model.vision_tower.vision_model.embeddings)
    )
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        with vtok.patch(model, Replace(keep=0.5)):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(embedding.patch_embedding.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients)


def test_the_trace_holds_nothing_of_the_encoder():
    model, processor = tiny("llava")
    compressor = spy({"encoder_states": (0,)})
    with torch.no_grad(), vtok.patch(model, compressor) as patch:
        model(**batch(processor, ["# What?"], [picture(56, 56)]), use_cache=True)
        trace = patch.trace
    probed = weakref.ref(compressor.seen.pop().encoder["encoder_states", 0])
    gc.collect()
    assert trace.n_kept == [8]
    assert probed() is None


def test_reading_what_was_not_asked_for():
    tokens = vtok.VisualTokens(torch.zeros(1, 4, 2), Layout((Plane(2, 2),)))
    with pytest.raises(Unsupported, match="no encoder_keys at layer 3 for this image"):
        tokens.read("encoder_keys", 3)


def test_layers():
    assert [layer_index(x, 24) for x in (0, 23, -1, -24, 0.0, 1.0, 2 / 23, 0.5)] == [0, 23, 23, 0, 0, 23, 2, 12]
    assert layer_index(0.5, 2) == 1  # halves go up
    for layer in (24, -25):
        with pytest.raises(InvalidValue, match=r"layers 0 to 23 \(or -24 to -1\)"):
            layer_index(layer, 24)


def test_received_in_steps(monkeypatch):
    query, key = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    slow = torch.zeros(2, 7)
    for b in range(2):
        for h in range(3):
            for i in range(7):
                row = torch.stack([query[b, h, i] @ key[b, h, j] * 0.3 for j in range(7)]).softmax(0)
                slow[b] += row / 3
    torch.testing.assert_close(received(query, key, 0.3), slow)
    monkeypatch.setattr("vtok.tower.ROWS", 100)
    torch.testing.assert_close(received(query, key, 0.3), slow)
    torch.testing.assert_close(received(query[0], key[0], 0.3), slow[0])


def test_pixel_shuffle_order():
    layout = Layout((Plane(2, 3),))
    raster = torch.arange(24).view(1, 24)  # 4 rows of 6 patches
    (x,) = Tower(merge=2).arrange(raster, [layout])
    assert x[0].tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23]
    assert torch.equal(ungrouped(x, layout, 2), raster)
    with pytest.raises(Unsupported, match="saw 1 views where 2 were expected"):
        Tower().arrange(raster, [layout, layout])
    packed = QwenTower(merge=2, window=0).arrange(torch.arange(24), [layout])
    assert packed[0].tolist() == [list(range(24))]

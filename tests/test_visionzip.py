"""VisionZip against a slow rewrite from the paper's description, on every kind of layout; and inside models."""

import math

import pytest
import torch
from contract import batch, mixed, picture, tiny

import vtok
from vtok.errors import InvalidValue, Unsupported
from vtok.types import Layout, Plane, VisualTokens, ranks, share
from vtok.views import Views, unit

CROPS = Plane(5, 8, "crops", crop_grid=(2, 2), crop_shape=(4, 4), offset=(1, 0))  # a row of padding above and two below
LAYOUTS = {
    "square": Layout((Plane(4, 4),)),
    "line": Layout((Plane(1, 7),)),
    "token": Layout((Plane(1, 1),)),
    "crops": Layout((Plane(4, 4, "thumbnail"), CROPS), separators=(0, 1)),
    "behind": Layout((CROPS, Plane(4, 4, "thumbnail"))),
    "padding only": Layout((Plane(4, 4, "thumbnail"), Plane(3, 8, "crops", (0, 0, 1, 1), (2, 2), (4, 4), (0, 0)))),
    "resampled": Layout((Plane(3, 3, "frame", resampled=(4, 4)),) * 3, modality="video"),
}


def seen(layout, b=2, group=1, width=6, channels=5, layer=None, seed=0):
    """Random tokens with all that VisionZip may read."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)
    v = sum(plane.views for plane in layout.planes)
    rows, cols = layout.planes[0].view_shape
    p = rows * cols * group
    encoder = {
        ("cls_probs", layer): rand(b, v, p).softmax(-1),
        ("encoder_attention", layer): rand(b, v, p).abs(),
        ("encoder_keys", layer): rand(b, v, p, channels),
        ("encoder_mean_keys", layer): rand(b, v, p, channels),
    }
    return VisualTokens(rand(b, layout.n, width), layout, None, encoder)


def by_view(layout):
    """For each view the [(token, place in the view)] that it holds, in raster order, by walking over the mosaics."""
    views, token = [], 0
    for plane in layout.planes:
        high, wide = plane.view_shape
        mine = [[] for _ in range(plane.views)]
        for row in range(plane.rows):
            for col in range(plane.cols):
                y = plane.offset[0] + math.floor((row + 0.5) * plane.span[0] / plane.rows)
                x = plane.offset[1] + math.floor((col + 0.5) * plane.span[1] / plane.cols)
                crop = y // high * plane.crop_grid[1] + x // wide
                mine[crop].append((token, y % high * wide + x % wide))
                token += 1
        views += [sorted(view, key=lambda pair: pair[1]) for view in mine]
    return views


def slow(tokens, compressor, group=1):
    """For each picture (kept tokens, {kept token: new feature}, {token: into})."""
    layout = tokens.layout
    views = by_view(layout)
    name = {"cls": "cls_probs", "received": "encoder_attention"}[compressor.importance]
    need = "encoder_mean_keys" if compressor.official else "encoder_keys"
    attention, keys = tokens.encoder[name, compressor.layer], tokens.encoder[need, compressor.layer]
    n = layout.n
    total = min(n, max(1, compressor.keep if isinstance(compressor.keep, int) else math.floor(n * compressor.keep)))
    counts = share(total, [len(view) for view in views])
    results = []
    for b in range(len(tokens.features)):
        kept, new, into = [], {}, {}
        for v, (view, k) in enumerate(zip(views, counts)):
            m = min(max(0, k - 1), math.floor(k * compressor.contextual + 0.5))
            score, key = {}, {}
            for token, place in view:
                mine = range(place * group, (place + 1) * group)
                score[token] = sum(float(attention[b, v, i]) for i in mine)
                mean = sum(keys[b, v, i].double() / keys[b, v, i].double().norm() for i in mine) / group
                key[token] = mean / mean.norm()
            names = [token for token, _ in view]
            top = sorted(names, key=lambda token: (-score[token], names.index(token)))[: k - m]
            rest = [token for token in names if token not in top]
            step = max(1, len(rest) // max(1, m))
            targets = rest[::step][:m]
            members = {target: [] for target in targets}
            for token in rest:
                if token not in targets and targets:
                    best = max(targets, key=lambda target: (float(key[token] @ key[target]), -targets.index(target)))
                    members[best].append(token)
                    into[token] = best
            for target, others in members.items():
                x = tokens.features[b].double()
                if compressor.merging == "mean" and not compressor.official:
                    new[target] = (x[target] + sum(x[o] for o in others)) / (1 + len(others))
                else:
                    new[target] = x[target] + (sum(x[o] for o in others) / len(others) if others else 0)
            for token in top + targets:
                into[token] = token
            kept += top + targets
            new |= {token: tokens.features[b, token].double() for token in top}
        results.append((sorted(kept), new, into))
    return results


def check(tokens, compressor, group=1):
    selection = compressor.select(tokens)
    for b, (kept, new, into) in enumerate(slow(tokens, compressor, group)):
        assert selection.keep[b].nonzero().squeeze(1).tolist() == kept
        assert selection.n_kept == len(kept)
        if selection.features is None:
            assert all(token == target for token, target in into.items())
            continue
        for token in kept:
            torch.testing.assert_close(selection.features[b, token].double(), new[token], atol=1e-5, rtol=1e-5)
        assert selection.merged_into[b].tolist() == [into.get(token, -1) for token in range(tokens.layout.n)]
    return selection


@pytest.mark.parametrize("keep", [1, 5, 0.3, 0.8, 1000])
@pytest.mark.parametrize("name", LAYOUTS)
def test_against_a_slow_rewrite(name, keep):
    tokens = seen(LAYOUTS[name])
    check(tokens, vtok.VisionZip(keep=keep))
    check(tokens, vtok.VisionZip(keep=keep, contextual=0.5, importance="received", merging="add"))
    check(tokens, vtok.VisionZip(keep=keep, contextual=0.5, official=True))


@pytest.mark.parametrize("group", [4, 9])
def test_groups_of_patches(group):
    check(seen(LAYOUTS["square"], group=group), vtok.VisionZip(keep=0.5, contextual=0.4), group)
    check(seen(LAYOUTS["crops"], group=group), vtok.VisionZip(keep=0.5, contextual=0.4), group)


def test_the_papers_counts():
    assert [vtok.VisionZip(keep=k).counts((576,)) for k in (64, 128, 192)] == [
        ([54], [10]),
        ([108], [20]),
        ([162], [30]),
    ]
    assert vtok.VisionZip(keep=1).counts((576,)) == ([1], [0])
    assert vtok.VisionZip(keep=2, contextual=0.99).counts((576,)) == ([1], [1])
    dominant, contextual = vtok.VisionZip(keep=0.25).counts((576, 500, 0, 24))
    assert [d + c for d, c in zip(dominant, contextual)] == [144, 125, 0, 6]


def test_ties_and_degenerate_inputs():
    layout = LAYOUTS["square"]
    tokens = seen(layout)
    flat = {key: torch.ones_like(x) for key, x in tokens.encoder.items()}
    selection = check(VisualTokens(tokens.features, layout, None, flat), vtok.VisionZip(keep=6, contextual=0.34))
    assert selection.keep[0].nonzero().squeeze(1).tolist() == [0, 1, 2, 3, 4, 10]  # the first four; 12 others, step 6
    assert (selection.merged_into[0, 5:10] == 4).all()  # all keys are equal: the first target
    nothing = {key: torch.zeros_like(x) for key, x in tokens.encoder.items()}
    assert vtok.VisionZip(keep=6).select(VisualTokens(tokens.features, layout, None, nothing)).features.isfinite().all()
    broken = {key: torch.full_like(x, torch.nan) for key, x in tokens.encoder.items()}
    selection = vtok.VisionZip(keep=6).select(VisualTokens(tokens.features, layout, None, broken))
    assert selection.keep.sum(1).tolist() == [6, 6]
    assert selection.features.isfinite().all()


def test_no_picture_changes_another():
    tokens = seen(LAYOUTS["crops"], b=3)
    together = vtok.VisionZip(keep=0.4).select(tokens)
    for b in range(3):
        alone = {key: x[b : b + 1] for key, x in tokens.encoder.items()}
        one = vtok.VisionZip(keep=0.4).select(VisualTokens(tokens.features[b : b + 1], tokens.layout, None, alone))
        assert torch.equal(one.keep[0], together.keep[b])
        assert torch.equal(one.merged_into[0], together.merged_into[b])
        torch.testing.assert_close(one.features[0], together.features[b])


def test_gradient_reaches_all_that_is_merged():
    tokens = seen(LAYOUTS["crops"])
    features = tokens.features.clone().requires_grad_()
    selection = vtok.VisionZip(keep=0.4).select(VisualTokens(features, tokens.layout, None, tokens.encoder))
    selection.features[selection.keep].sum().backward()
    assert torch.equal(features.grad.abs().sum(-1) > 0, selection.merged_into >= 0)


def test_half_precision_is_rounded_once():
    tokens = seen(LAYOUTS["square"])
    half = VisualTokens(tokens.features.bfloat16(), tokens.layout, None, tokens.encoder)
    wide = VisualTokens(half.features.float(), tokens.layout, None, tokens.encoder)
    compressor = vtok.VisionZip(keep=4, contextual=0.5)
    assert torch.equal(compressor.select(half).features, compressor.select(wide).features.bfloat16())


def test_selecting_reads_no_values_back():
    """On the meta device there is nothing to wait for."""
    tokens = seen(LAYOUTS["crops"])
    encoder = {key: x.to("meta") for key, x in tokens.encoder.items()}
    selection = vtok.VisionZip(keep=0.4).select(VisualTokens(tokens.features.to("meta"), tokens.layout, None, encoder))
    assert selection.keep.shape == (2, tokens.layout.n)
    assert selection.n_kept == int(tokens.layout.n * 0.4)


def test_views():
    for layout in LAYOUTS.values():
        views, expected = Views.of(layout), by_view(layout)
        assert views.sizes == tuple(len(view) for view in expected)
        t = views.valid.shape[1]
        for v, view in enumerate(expected):
            assert views.valid[v].nonzero().squeeze(1).tolist() == [place for _, place in view]
            for token, place in view:
                assert views.place[token] == v * t + place
        x = torch.randn(2, layout.n, 3)
        assert torch.equal(views.collect(views.spread(x)), x)
        assert (views.spread(x)[:, ~views.valid] == 0).all()
    with pytest.raises(Unsupported, match=r"different sizes: \(2, 2\), \(3, 2\)"):
        Views.of(Layout((Plane(2, 2), Plane(3, 2))))
    with pytest.raises(Unsupported, match="15 patches of 1 views, where 1 views of 16"):
        Views.of(LAYOUTS["square"]).patches(torch.zeros(1, 1, 15))
    assert ranks(torch.tensor([[1.0, 3.0, 3.0, -math.inf]])).tolist() == [[2, 0, 1, 3]]
    assert unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [math.nan, 1.0]])).tolist() == [
        [0.6000000238418579, 0.800000011920929],
        [0, 0],
        [0, 0],
    ]


def test_options():
    for options in (
        {"contextual": 1.0},
        {"contextual": -0.1},
        {"contextual": True},
        {"layer": "deep"},
        {"importance": "text"},
        {"merging": "sum"},
        {"keep": 0.0},
    ):
        with pytest.raises(InvalidValue, match=next(iter(options))):
            vtok.VisionZip(**options)
    assert vtok.VisionZip(layer=3).encoder_layers == {"cls_probs": (3,), "encoder_keys": (3,)}
    assert vtok.VisionZip(importance="received").needs_now == {"encoder_attention", "encoder_keys"}
    qwen, _ = tiny("qwen2_5_vl")
    with pytest.raises(Unsupported, match="cls_probs.*importance='received'"):
        vtok.patch(qwen, "visionzip")


def test_in_a_model():
    """What is dominant is what the tower's own attention maps say, at the layer that the projector reads."""
    model, processor = tiny("llava", "eager")
    inputs = batch(processor, ["# What?", "and # here"], [picture(56, 56, 1), picture(56, 56, 2)])
    with torch.no_grad():
        maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions[-2]
        with vtok.patch(model, vtok.VisionZip(keep=6, contextual=0.0)) as patch:
            model(**inputs, use_cache=True)
    for mask, row in zip(patch.trace.keep_masks, maps.sum(1)[:, 0, 1:]):
        assert mask.nonzero().squeeze(1).tolist() == row.topk(6).indices.sort().values.tolist()


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
def test_families(family):
    model, processor = tiny(family)
    inputs = mixed(processor)
    importance = "received" if family == "qwen2_5_vl" else "cls"
    with torch.no_grad(), vtok.patch(model, vtok.VisionZip(keep=0.5, importance=importance)) as patch:
        assert model(**inputs, use_cache=True).logits.isfinite().all()
    extra = [kept - math.floor(n * 0.5) for kept, n in zip(patch.trace.n_kept, patch.trace.n_visual)]
    assert all(e in (0, 1) for e in extra)  # one more where a picture ends the prompt

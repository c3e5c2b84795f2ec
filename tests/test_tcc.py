"""TCC against a slow rewrite from the specification, its properties, and the calibration on a model."""

import math

import numpy as np
import pytest
import torch
from contract import batch, mixed, picture, tiny
from PIL import Image
from test_visionzip import LAYOUTS, by_view

import vtok
from vtok.compressors.tcc import TCC, calibrate, cut, fold, gumbel, near_duplicates, outliers
from vtok.errors import InvalidValue, Unsupported
from vtok.types import VisualTokens

BASE = {"sim_threshold": 0.6, "count_threshold": 1, "low_layer": 0, "deep_layer": 1, "k": 4}  # something happens


def seen(layout, b=2, group=1, width=6, channels=4, seed=0):
    """Tokens with keys in a few clusters and attention with a few large entries."""
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=generator)
    v = sum(plane.views for plane in layout.planes)
    rows, cols = layout.planes[0].view_shape
    p = rows * cols * group
    encoder = {("encoder_keys", 0): rand(b, v, p, channels) + 1.5 * rand(b, v, 1, channels)}
    for need in ("cls_probs", "encoder_attention"):
        encoder[need, 0] = (2 * rand(b, v, p)).softmax(-1) * 0.9
        encoder[need, 1] = (2 * rand(b, v, p)).softmax(-1) * 0.7
    return VisualTokens(rand(b, layout.n, width), layout, None, encoder)


def quantile(values, q):
    values = sorted(values)
    at = q * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def slow(tokens, c, group=1):
    """For each picture (kept tokens, {kept: feature}, {token: into}), by loops from section 1 of the specification."""
    layout, views = tokens.layout, by_view(tokens.layout)
    kinds = [plane.kind for plane in layout.planes for _ in range(plane.views)]
    name = {"cls": "cls_probs", "received": "encoder_attention"}[c.importance]
    noise = gumbel(len(views), tokens.encoder[name, 0].shape[2] // group, c.seed)
    results = []
    for b in range(len(tokens.features)):
        chosen, first, whole_of, everything = {}, {}, {}, {}
        for v, view in enumerate(views):
            whole = kinds[v] == "thumbnail" and {*kinds} != {"thumbnail"}
            names = [token for token, _ in view]
            patches = {token: range(place * group, (place + 1) * group) for token, place in view}
            key = {i: tokens.encoder["encoder_keys", c.low_layer][b, v, i].double() for t in names for i in patches[t]}
            key = {i: x / x.norm() for i, x in key.items()}
            attention = {}
            for layer in (c.low_layer, c.deep_layer):
                a = {i: float(tokens.encoder[name, layer][b, v, i]) for i in key}
                total = sum(a.values())
                attention[layer] = {i: x / total for i, x in a.items()}
            low, deep = attention[c.low_layer], attention[c.deep_layer]
            beta = c.count_threshold
            if isinstance(beta, float):
                beta = math.floor(beta * len(key) + 0.5)
            redundant = 0
            for i in key:
                others = sum(float(key[i] @ key[j]) > c.sim_threshold for j in key if j != i)
                redundant += others > beta
            density = 1 - redundant / len(key) if key else 0
            wanted = max(math.ceil(density * len(names) - 1e-9), min(c.min_tokens, len(names)))
            p = {t: sum(low[i] for i in patches[t]) for t in names}
            place_of = dict(view)
            drawn = p if c.sample == "topk" else {t: math.log(p[t]) + float(noise[v, place_of[t]]) for t in names}
            order = sorted(names, key=lambda t: -drawn[t])
            local = order[:wanted]
            if key:
                q1, q3 = quantile(deep.values(), 0.25), quantile(deep.values(), 0.75)
                limit = q3 + max(c.iqr_factor * (q3 - q1), c.iqr_eps / len(key))
            out = [t for t in names if any(deep[i] > limit for i in patches[t])]
            chosen[v] = names if whole else [t for t in names if t in local or t in out]
            priority = sorted(out, key=lambda t: -sum(deep[i] for i in patches[t])) + [t for t in order if t not in out]
            first[v] = [t for t in priority if t in chosen[v]]
            whole_of[v] = whole
            everything[v] = (names, patches, key, deep)
        if c.keep is not None:
            n = layout.n
            limit = min(n, max(1, c.keep if isinstance(c.keep, int) else math.floor(n * c.keep + 1e-9)))
            thumbnails = sum(len(views[v]) for v in whole_of if whole_of[v])
            crops = [v for v in whole_of if not whole_of[v]]
            bound = max(limit - thumbnails, limit * (n - thumbnails) // n)
            counts = slow_cut([len(chosen[v]) for v in crops], bound)
            for v, count in zip(crops, counts):
                chosen[v] = first[v][:count]
            for v in whole_of:
                if whole_of[v]:
                    chosen[v] = first[v][: limit - sum(counts)]
        kept, new, into = [], {}, {}
        for v, (names, patches, key, deep) in everything.items():
            kept += chosen[v]
            token_key = {t: sum(key[i] for i in patches[t]) for t in names}
            token_key = {t: x / x.norm() for t, x in token_key.items()}
            similar = {}
            for t in chosen[v]:
                into[t] = t
                if whole_of[v] or c.merge == "none":
                    new[t] = tokens.features[b, t].double()
                    continue
                near = sorted(
                    names, key=lambda o: (o != t, -round(float(token_key[t] @ token_key[o]), 9), names.index(o))
                )
                near = near[: c.k]
                weight = {o: sum(deep[i] for i in patches[o]) for o in near}
                new[t] = sum(weight[o] / sum(weight.values()) * tokens.features[b, o].double() for o in near)
                for o in near:
                    if o not in chosen[v]:
                        similar.setdefault(o, []).append((-float(token_key[t] @ token_key[o]), t))
            for o, options in similar.items():
                into[o] = min(options)[1]
        results.append((sorted(kept), new, into))
    return results


def slow_cut(counts, total):
    if sum(counts) <= total:
        return counts
    exact = [c * total / sum(counts) for c in counts]
    floors = [math.floor(x + 1e-9) for x in exact]
    order = sorted(range(len(counts)), key=lambda i: -round(exact[i] - floors[i], 9))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return floors


def check(tokens, compressor, group=1):
    selection = compressor.select(tokens)
    assert selection.n_kept is None
    for b, (kept, new, into) in enumerate(slow(tokens, compressor, group)):
        assert selection.keep[b].nonzero().squeeze(1).tolist() == kept
        if compressor.merge == "none":
            assert selection.features is None
            continue
        for token in kept:
            torch.testing.assert_close(selection.features[b, token].double(), new[token], atol=1e-5, rtol=1e-5)
        assert selection.merged_into[b].tolist() == [into.get(t, -1) for t in range(tokens.layout.n)]
    return selection


VARIANTS = {
    "default": {},
    "topk": {"sample": "topk", "count_threshold": 0.1},
    "received": {"importance": "received", "seed": 3, "k": 1},
    "no merge": {"merge": "none", "iqr_factor": 0.2},
    "floor": {"sim_threshold": -1.0, "min_tokens": 3, "iqr_factor": 1e6},
    "bound": {"keep": 0.3, "k": 100},
    "count": {"keep": 4},
    "one": {"keep": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_against_a_slow_rewrite(name, variant):
    compressor = TCC(**{**BASE, **VARIANTS[variant]})
    tokens = seen(LAYOUTS[name], seed=len(name))
    selection = check(tokens, compressor)
    if compressor.keep is not None:
        n = tokens.layout.n
        limit = compressor.keep if isinstance(compressor.keep, int) else max(1, math.floor(n * compressor.keep))
        assert selection.keep.sum(1).max() <= limit


@pytest.mark.parametrize("group", [4, 9])
@pytest.mark.parametrize("name", ["square", "crops", "behind"])
def test_groups_of_patches(name, group):
    check(seen(LAYOUTS[name], group=group), TCC(**{**BASE, "count_threshold": 0.2}), group)
    check(
        seen(LAYOUTS[name], group=group), TCC(**{**BASE, "count_threshold": 0.2, "keep": 0.4, "sample": "topk"}), group
    )


def test_in_small_blocks(monkeypatch):
    monkeypatch.setattr("vtok.compressors.tcc.BLOCK", 40)
    check(seen(LAYOUTS["crops"]), TCC(**BASE))
    check(seen(LAYOUTS["square"], group=4), TCC(**BASE), 4)


# ---- the properties of the specification (1.12) ------------------------------------------------------------
ALL = torch.ones(1, dtype=torch.bool)


def density(keys, threshold=0.9, beta=0):
    valid = torch.ones(keys.shape[-2], dtype=torch.bool)
    return 1 - (near_duplicates(keys, valid, threshold) > beta).float().mean(-1)


def test_density():
    torch.manual_seed(0)
    keys = torch.randn(3, 40, 6)
    assert density(torch.ones(20, 5)) == 0  # identical keys
    assert density(torch.eye(20)) == 1  # orthonormal ones
    equal = torch.randn(200, 1, 64).expand(-1, 3, -1)
    assert (density(equal, threshold=1.0) == 1).all()  # nothing is above the largest cosine, whatever the rounding
    assert torch.equal(density(keys * torch.rand(3, 40, 1).exp() * 100, 0.5, 2), density(keys, 0.5, 2))
    order = torch.randperm(40)
    assert torch.equal(
        near_duplicates(keys[:, order], ALL.expand(40), 0.5), near_duplicates(keys, ALL.expand(40), 0.5)[:, order]
    )
    assert near_duplicates(torch.zeros(5, 3), ALL.expand(5), 0.5).tolist() == [0] * 5
    valid = torch.tensor([True, True, False, True])
    assert near_duplicates(torch.ones(4, 2), valid, 0.5).tolist()[:2] == [2, 2]  # neither itself nor padding


def test_outliers():
    torch.manual_seed(0)
    one_hot = torch.zeros(1, 30)
    one_hot[0, 17] = 1
    assert outliers(one_hot, ALL.expand(30), 1.5, 1e-3).nonzero().tolist() == [[0, 17]]
    even = torch.full((1, 30), 1 / 30) * (1 + 1e-6 * torch.randn(1, 30))
    assert not outliers(even, ALL.expand(30), 1.5, 1e-3).any()
    assert outliers(even, ALL.expand(30), 0.0, 0.0).any()  # what the margin is for
    valid = torch.ones(30, dtype=torch.bool)
    valid[17] = False
    assert not outliers(one_hot, valid, 1.5, 1e-3).any()
    assert not outliers(one_hot, ~valid & False, 1.5, 1e-3).any()
    assert not outliers(torch.ones(1, 1), ALL, 1.5, 1e-3).any()


def test_blank_crops_keep_the_floor():
    """A blank crop repeats itself: as many tokens as `min_tokens`, and attention of zero everywhere is no obstacle."""
    layout = LAYOUTS["crops"]
    tokens = seen(layout, b=1)
    encoder = {
        key: torch.ones_like(x) if key[0] == "encoder_keys" else torch.zeros_like(x)
        for key, x in tokens.encoder.items()
    }
    views = [len(view) for view in by_view(layout)]
    for floor in (0, 1, 5, 100):
        compressor = TCC(low_layer=0, deep_layer=1, min_tokens=floor)
        selection = compressor.select(VisualTokens(tokens.features, layout, None, encoder))
        assert selection.keep.sum() == views[0] + sum(min(floor, size) for size in views[1:])
        assert selection.features.isfinite().all()
        assert selection.keep[0, : views[0]].all()
        assert torch.equal(selection.features[0, : views[0]], tokens.features[0, : views[0]])  # the thumbnail


def test_all_information_changes_nothing():
    tokens = seen(LAYOUTS["square"])
    compressor = TCC(**{**BASE, "sim_threshold": 1.0, "merge": "none"})
    assert compressor.select(tokens).keep.all()
    folded = TCC(**{**BASE, "sim_threshold": 1.0, "k": 1}).select(tokens)
    torch.testing.assert_close(folded.features, tokens.features)
    assert torch.equal(folded.merged_into, torch.arange(16).expand(2, -1))


def test_broken_numbers():
    tokens = seen(LAYOUTS["crops"])
    broken = {key: x.clone() for key, x in tokens.encoder.items()}
    for x in broken.values():
        x[:, 1, ::2] = math.nan
        x[:, 2] = math.inf
    selection = TCC(**BASE).select(VisualTokens(tokens.features, tokens.layout, None, broken))
    assert selection.features.isfinite().all()
    assert (selection.keep.sum(1) >= 16 + 4).all()


def test_the_draw_depends_on_seed_and_view_alone():
    layout, compressor = LAYOUTS["crops"], TCC(**{**BASE, "iqr_factor": 1e9})
    tokens = seen(layout, b=3)
    together = compressor.select(tokens)
    for b in (2, 0):
        encoder = {key: x[b : b + 1] for key, x in tokens.encoder.items()}
        alone = compressor.select(VisualTokens(tokens.features[b : b + 1], layout, None, encoder))
        assert torch.equal(alone.keep[0], together.keep[b])
        torch.testing.assert_close(alone.features[0], together.features[b])
    assert not torch.equal(TCC(**{**BASE, "iqr_factor": 1e9, "seed": 1}).select(tokens).keep, together.keep)
    assert torch.equal(gumbel(3, 50, 7), gumbel(5, 50, 7)[:3])  # another crop changes none of the others
    assert not torch.equal(gumbel(2, 50, 7)[0], gumbel(2, 50, 7)[1])
    changed = {key: x.clone() for key, x in tokens.encoder.items()}
    for x in changed.values():
        x[:, 3:] = x[:, 3:].flip(2)  # other crops' content
    other = compressor.select(VisualTokens(tokens.features, layout, None, changed))
    first_two = [token for view in by_view(layout)[:3] for token, _ in view]
    assert torch.equal(other.keep[:, first_two], together.keep[:, first_two])


def test_the_draw_follows_the_probabilities():
    """The first drawn is each token as often as its probability says; a token of probability zero comes last."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = (p.clamp(min=1e-38).log() + gumbel(4000, 5, 0)).argsort(dim=1, descending=True)
    assert (draws[:, 4] == 4).all()
    expected = [sum(p[i] * p[j] / (1 - p[i]) for i in range(4) if i != j) for j in range(5)]
    for place, wanted in enumerate((p, torch.tensor(expected))):
        share = torch.bincount(draws[:, place], minlength=5) / 4000
        assert ((share - wanted).abs() <= 4 * (wanted * (1 - wanted) / 4000).sqrt()).all()


def test_cut():
    counts = torch.tensor([[10, 0, 5, 5], [1, 1, 1, 0], [7, 7, 7, 7]])
    for total in (0, 1, 2, 3, 10, 19, 20, 27, 28, 40):
        ours = cut(counts, torch.full((3, 1), total))
        assert ours.tolist() == [slow_cut(row, total) for row in counts.tolist()]


def test_fold_ties_and_zero_weights():
    x = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
    keys, ones = torch.ones(4, 2) / 2**0.5, torch.ones(4, dtype=torch.bool)
    kept = torch.tensor([False, True, False, True])
    y, into = fold(x, keys, torch.zeros(4), ones, kept, 2)
    assert y[:, 0].tolist() == [1.5, 1.5, 2.5, 4.5]  # itself, and the first of the equal others
    assert into.tolist() == [1, 1, -1, 3]  # of two means the earlier
    y, _ = fold(x, keys, torch.tensor([3.0, 1.0, 0, 0]), ones, kept, 2)
    torch.testing.assert_close(y[1], torch.tensor([1.25]))


def test_gradient():
    tokens = seen(LAYOUTS["square"])
    features = tokens.features.clone().requires_grad_()
    selection = TCC(**BASE).select(VisualTokens(features, tokens.layout, None, tokens.encoder))
    selection.features[selection.keep].sum().backward()
    reached = features.grad.abs().sum(-1) > 0
    assert torch.equal(reached, selection.merged_into >= 0)
    assert reached.sum() > selection.keep.sum()


def test_options():
    for options in (
        {"sim_threshold": 1.1},
        {"sim_threshold": True},
        {"count_threshold": 1.5},
        {"count_threshold": -1},
        {"iqr_factor": -1},
        {"iqr_eps": math.nan},
        {"k": 0},
        {"min_tokens": -1},
        {"min_tokens": 1.0},
        {"seed": -1},
        {"sample": "random"},
        {"merge": True},
        {"importance": "text"},
        {"low_layer": 2.5},
        {"deep_layer": "deep"},
        {"keep": 0.0},
        {"keep": True},
    ):
        with pytest.raises(InvalidValue, match=next(iter(options))):
            TCC(**options)
    assert TCC(keep=1.0).is_identity
    assert not TCC().is_identity
    assert TCC().encoder_layers == {"encoder_keys": (2 / 23,), "cls_probs": (2 / 23, None)}
    assert TCC(low_layer=1, deep_layer=1).encoder_layers["cls_probs"] == (1,)
    assert TCC(seed=4).with_budget(0.4, 32) == TCC(seed=4, keep=0.4)
    from vtok.tower import layer_index

    assert layer_index(TCC().low_layer, 24) == 2
    with pytest.raises(Unsupported, match="cls_probs.*importance='received'"):
        vtok.patch(tiny("qwen2_5_vl")[0], "tcc")


# ---- inside models -----------------------------------------------------------------------------------------
OPTIONS = {"llava": {}, "llava_next": {}, "qwen2_5_vl": {"importance": "received"}}


@pytest.mark.parametrize("family", OPTIONS)
def test_ragged_counts(family):
    """Pictures of different content keep different counts, each what it keeps alone."""
    model, processor = tiny(family)
    compressor = TCC(count_threshold=1, sim_threshold=0.97, low_layer=1, **OPTIONS[family])
    with torch.no_grad(), vtok.patch(model, compressor) as patch:
        model(**mixed(processor))
        together = patch.trace.n_kept
        grey = [picture(70, 112, 1).convert("L").point(lambda v: 128).convert("RGB"), picture(70, 112, 1)]
        model(**batch(processor, ["# What?", "# What?"], grey))
        blank, busy = patch.trace.n_kept
        alone = []
        for image in grey:
            model(**batch(processor, ["# What?"], [image]))
            alone += patch.trace.n_kept
    assert len(together) == 5
    assert alone == [blank, busy]
    assert blank < busy


def test_selecting_reads_no_values_back():
    """On the meta device there is nothing to wait for: the engine alone waits, for the counts."""
    tokens = seen(LAYOUTS["crops"])
    encoder = {key: x.to("meta") for key, x in tokens.encoder.items()}
    for keep in (None, 0.3):
        selection = TCC(**BASE, keep=keep).select(
            VisualTokens(tokens.features.to("meta"), tokens.layout, None, encoder)
        )
        assert selection.features.device.type == "meta"


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5])
def test_budget(budget):
    model, processor = tiny("llava_next")
    with torch.no_grad(), vtok.patch(model, "tcc", budget=budget) as patch:
        model(**batch(processor, ["# What?", "a # b"], [picture(70, 112, 1), picture(112, 112, 2)]))
    for kept, n in zip(patch.trace.n_kept, patch.trace.n_visual):
        assert 1 <= kept <= budget * n
    assert patch.trace.mean_keep <= budget


def test_calibration():
    model, processor = tiny("llava_next")
    scenes = [picture(70, 112, 1), picture(112, 112, 2), picture(112, 70, 3)]
    ramp = np.linspace(0, 255, 112).astype("uint8")[None, :, None].repeat(112, 0).repeat(3, 2)
    scenes.append(Image.fromarray(ramp))
    batches = [batch(processor, ["# What?", "a # b"], scenes[:2]), batch(processor, ["# What?"] * 2, scenes[2:])]
    start = TCC(low_layer=1, count_threshold=2, sample="topk", iqr_factor=3.0)
    before = model.model.vision_tower._forward_hooks.copy()
    shares = {}
    for keep in (0.45, 0.6, 0.8):
        solved = calibrate(model, batches, keep, start)
        kept = whole = 0
        with torch.no_grad(), vtok.patch(model, solved) as patch:
            for inputs in batches:
                model(**inputs)
                kept, whole = kept + sum(patch.trace.n_kept), whole + sum(patch.trace.n_visual)
        shares[keep] = kept / whole
        assert kept / whole <= keep
        assert solved == TCC(**{**vars(start), "sim_threshold": solved.sim_threshold})
    assert shares[0.45] < shares[0.6] < shares[0.8]
    assert shares[0.8] > 0.7
    assert model.model.vision_tower._forward_hooks == before
    with pytest.raises(InvalidValue, match=r"at least 0\.\d+ of their tokens.*TCC\(keep=0.1\)"):
        calibrate(model, batches, 0.1, start)
    for keep in (0, 1.0, True, 12):
        with pytest.raises(InvalidValue, match="fraction"):
            calibrate(model, batches, keep)
    with pytest.raises(InvalidValue, match="no picture"):
        calibrate(model, [], 0.5)

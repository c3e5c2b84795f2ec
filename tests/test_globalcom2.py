"""GlobalCom2 against a slow rewrite from the formulas, its invariants and the published counts."""

import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from contract import Masked, batch, picture, tiny
from torch.utils._python_dispatch import TorchDispatchMode

import vtok
from vtok.adapters.llava_next import anyres_layout
from vtok.compressors.globalcom2 import (
    allocate,
    cos_to_view_mean,
    crop_index,
    crop_ratios,
    crop_sizes,
    global_map,
    mosaic_index,
    speaks_for,
    token_scores,
)
from vtok.errors import InvalidValue, Unsupported
from vtok.types import Layout, Plane, VisualTokens, ranks

# (side, grid, picture size): exact fit, padding above, padding at the sides, one crop, odd remainders, outer
# crops that are half padding, outer crops of padding alone, the first
# of these upright, a strip of two rows, one-token crops
CASES = [
    (4, (2, 2), (8, 8)),
    (6, (2, 2), (70, 112)),
    (6, (2, 2), (112, 70)),
    (5, (1, 3), (50, 150)),
    (5, (3, 1), (90, 30)),
    (5, (1, 1), (9, 9)),
    (7, (2, 2), (10, 99)),
    (6, (1, 3), (336, 700)),
    (4, (1, 3), (400, 100)),
    (6, (3, 1), (110, 80)),
    (8, (2, 2), (3, 40)),
    (1, (2, 2), (2, 2)),
]


def tokens(side, grid, size, b=2, seed=0, spread=3.0, width=8):
    layout = anyres_layout(side, grid, size)
    generator = torch.Generator().manual_seed(seed)
    views = 1 + grid[0] * grid[1]
    attention = torch.randn(b, views, side * side, generator=generator) * spread
    return VisualTokens(torch.randn(b, layout.n, width, generator=generator), layout, attention)


def bilinear(grid, y, x, high, wide):
    """The value of a list of rows at cell (y, x) of a high x wide resampling, pixel centres as areas."""
    rows, cols = len(grid), len(grid[0])

    def at(i, n_out, n_in):
        place = max(0.0, (i + 0.5) * n_in / n_out - 0.5)
        low = min(int(place), n_in - 1)
        return low, min(low + 1, n_in - 1), place - low

    y0, y1, fy = at(y, high, rows)
    x0, x1, fx = at(x, wide, cols)
    top = grid[y0][x0] * (1 - fx) + grid[y0][x1] * fx
    bottom = grid[y1][x0] * (1 - fx) + grid[y1][x1] * fx
    return top * (1 - fy) + bottom * fy


def slow_counts(wanted, sizes, total):
    """Fill the crops little by little in proportion, then round by largest remainder."""
    quota, left = [0.0] * len(sizes), float(total)
    while left > 1e-9:
        room = [i for i in range(len(sizes)) if sizes[i] - quota[i] > 1e-9]
        step = min(left / sum(wanted[i] for i in room), *((sizes[i] - quota[i]) / wanted[i] for i in room))
        for i in room:
            quota[i] += step * wanted[i]
            left -= step * wanted[i]
    counts = [math.floor(q + 1e-9) for q in quota]
    order = sorted(range(len(sizes)), key=lambda i: (-round(quota[i] - counts[i], 7), i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def slow(t, keep, tau=10.0, alpha=0.5, budget_map="centred", exact=False):
    """The first picture's kept tokens, and its crops' ratios and counts, one at a time, as the paper says."""
    thumb, crops = t.layout.planes
    side, (rows, cols), (top, left) = thumb.rows, crops.crop_grid, crops.offset
    a = t.cls_attention[0].tolist()
    n_crops = rows * cols
    groups = [[] for _ in range(n_crops)]
    for j, value in enumerate(a[0]):
        y, x = divmod(j, side)
        if budget_map == "official":
            cy, cx = min(y // max(side // rows, 1), rows - 1), min(x // max(side // cols, 1), cols - 1)
        else:  # a patch speaks for the crop in which its centre lies
            cy = int((Fraction(2 * y + 1, 2) * crops.rows / side + top) // side)
            cx = int((Fraction(2 * x + 1, 2) * crops.cols / side + left) // side)
        groups[cy * cols + cx].append(value)

    members, local, large = ([[] for _ in range(n_crops)] for _ in range(3))
    grid = [a[0][r * side : (r + 1) * side] for r in range(side)]
    for i in range(crops.size):
        y, x = divmod(i, crops.cols)
        my, mx = y + top, x + left
        c = (my // side) * cols + mx // side
        members[c].append(side * side + i)
        local[c].append(a[1 + c][(my % side) * side + mx % side])
        large[c].append(bilinear(grid, y, x, crops.rows, crops.cols))

    if budget_map == "official":
        sums = {c: sum(groups[c]) for c in range(n_crops)}
    else:
        everything = sum(a[0]) / len(a[0])
        there = [c for c in range(n_crops) if members[c]]
        means = {c: sum(groups[c]) / len(groups[c]) if groups[c] else everything for c in there}
        sums = {c: mean * side * side / len(there) for c, mean in means.items()}
    weights = {c: math.exp((s - max(sums.values())) / tau) for c, s in sums.items()}
    whole = sum(weights.values())
    ratios = [0.0] * n_crops
    for c, w in weights.items():
        ratios[c] = min(1.0, keep * (1 + w / whole - 1 / len(weights)))

    sizes = [len(m) for m in members]
    counts = [int(n * r + 1e-9) for n, r in zip(sizes, ratios)]
    if exact:
        wanted = [n * r for n, r in zip(sizes, ratios)]
        counts = slow_counts(wanted, sizes, max(1, int(crops.size * keep + 1e-9)))
    k_thumb = max(1, int(side * side * keep + 1e-9))
    kept = set(sorted(range(side * side), key=lambda j: (-a[0][j], j))[:k_thumb])
    for c in range(n_crops):
        nl = max(math.sqrt(sum(v * v for v in local[c])), 1e-12)
        ng = max(math.sqrt(sum(v * v for v in large[c])), 1e-12)
        score = [alpha * g / ng + (1 - alpha) * v / nl for g, v in zip(large[c], local[c])]
        order = sorted(range(sizes[c]), key=lambda i: (-score[i], i))
        kept |= {members[c][i] for i in order[: counts[c]]}
    return kept, ratios, counts


@pytest.mark.parametrize("budget_map", ["centred", "official"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "floors"])
@pytest.mark.parametrize(("side", "grid", "size"), CASES)
def test_against_the_slow_rewrite(side, grid, size, exact, budget_map):
    for keep in (0.1, 0.25, 0.7, 0.95):
        t = tokens(side, grid, size, seed=side + grid[0])
        method = vtok.GlobalCom2(keep=keep, exact_count=exact, budget_map=budget_map, tau=7.0, alpha=0.4)
        selection = method.select(t)
        expected, ratios, counts = slow(t, keep, 7.0, 0.4, budget_map, exact)
        assert set(selection.keep[0].nonzero().squeeze(1).tolist()) == expected
        crops = t.layout.planes[1]
        in_crop = selection.keep[0, side * side :].long()
        assert torch.zeros(len(counts)).long().index_add(0, crop_index(crops), in_crop).tolist() == counts
        membership = speaks_for(*t.layout.planes, budget_map)
        even = budget_map == "centred"
        ours = crop_ratios(t.cls_attention[:, 0], membership, crop_sizes(crops), keep, 7.0, even)
        torch.testing.assert_close(ours[0], torch.tensor(ratios, dtype=torch.float64))


@pytest.mark.parametrize(("side", "grid", "size"), CASES)
def test_exact_counts(side, grid, size):
    for keep in (0.1, 0.25, 0.5, 0.9, 1, 7):
        t = tokens(side, grid, size, b=3)
        selection = vtok.GlobalCom2(keep=keep).select(t)
        counts = selection.keep.sum(1)
        assert (counts == selection.n_kept).all()
        if isinstance(keep, int):
            assert selection.n_kept == min(keep, t.layout.n)
        else:
            assert selection.n_kept == sum(max(1, int(p.size * keep + 1e-9)) for p in t.layout.planes)
        floors = vtok.GlobalCom2(keep=keep, exact_count=False).select(t)
        assert floors.n_kept is None
        assert (floors.keep.sum(1) <= counts + grid[0] * grid[1]).all()


def test_published_counts():
    """R = 0.25, 672 x 672: 144 of the thumbnail, 573 to 576 of the crops; 1000 x 600: 144 and 334 to 336."""
    square, wide = anyres_layout(24, (2, 2), (672, 672)), anyres_layout(24, (2, 2), (600, 1000))
    assert (square.n_rows, wide.n_rows) == (2928, 1948)
    assert (wide.planes[1].rows, wide.planes[1].cols) == (28, 48)
    generator = torch.Generator().manual_seed(0)
    for layout, low, crops in ((square, 573, 576), (wide, 333, 336)):
        attention = torch.randn(16, 5, 576, generator=generator) * 2
        t = VisualTokens(torch.zeros(16, layout.n, 1), layout, attention)
        exact = vtok.GlobalCom2(keep=0.25).select(t)
        assert exact.n_kept == 144 + crops
        assert (exact.keep[:, :576].sum(1) == 144).all()
        floored = vtok.GlobalCom2(keep=0.25, exact_count=False).select(t).keep.sum(1) - 144
        assert ((floored >= low) & (floored <= crops)).all()


def test_ratios():
    score, membership, sizes = torch.randn(3, 36) * 4, torch.arange(36) % 4, torch.tensor([9, 9, 9, 9])
    for even in (True, False):
        ratios = crop_ratios(score, membership, sizes, 0.25, 10.0, even)
        torch.testing.assert_close(ratios.sum(1), torch.full((3,), 4 * 0.25, dtype=torch.float64))
        assert (ratios >= 0.25 * (1 - 1 / 4)).all() and (ratios <= 0.25 * (2 - 1 / 4)).all()
        shuffle = torch.tensor([2, 0, 3, 1])
        moved = crop_ratios(score, shuffle[membership], sizes, 0.25, 10.0, even)
        torch.testing.assert_close(moved[:, shuffle], ratios)
        assert crop_ratios(score * 1e3, membership, sizes, 0.9, 10.0, even).max() == 1.0
    # the crops have equally many patches
    torch.testing.assert_close(ratios, crop_ratios(score, membership, sizes, 0.25, 10.0, even=True))


def test_probabilities_are_too_small_for_the_temperature():
    """After softmax over the patches the shares are equal to two digits; with logits they are not."""
    attention = torch.randn(8, 576, generator=torch.Generator().manual_seed(1)) * 2
    member = speaks_for(*anyres_layout(24, (2, 2), (672, 672)).planes, "official")
    sizes = torch.full((4,), 576)
    flat = crop_ratios(attention.softmax(-1), member, sizes, 0.25, 10.0)
    assert (flat - 0.25).abs().max() < 5e-3
    spread = (crop_ratios(attention, member, sizes, 0.25, 10.0) - 0.25).abs().amax(1)
    assert (spread > 0.02).all()


@pytest.mark.parametrize(("side", "grid", "size"), CASES)
def test_probabilities_are_the_softmax_of_each_view(side, grid, size):
    t = tokens(side, grid, size)
    soft = VisualTokens(t.features, t.layout, t.cls_attention.double().softmax(-1))  # padding's patches included
    for exact_count in (True, False):
        probs = vtok.GlobalCom2(keep=0.3, score_source="cls_probs", exact_count=exact_count).select(t)
        assert torch.equal(probs.keep, vtok.GlobalCom2(keep=0.3, exact_count=exact_count).select(soft).keep)


@pytest.mark.parametrize(("side", "grid", "size"), CASES)
def test_a_constant_on_the_logits_changes_nothing(side, grid, size):
    """Logits mean something up to a constant; with plain sums it decides where crops have unequal patches."""
    thumb, crops = anyres_layout(side, grid, size).planes
    score = torch.randn(2, side * side, generator=torch.Generator().manual_seed(0))
    sizes, membership = crop_sizes(crops), speaks_for(thumb, crops, "centred")
    ratios = crop_ratios(score, membership, sizes, 0.25, 10.0)
    moved = crop_ratios(score.double() + 5, membership, sizes, 0.25, 10.0)
    torch.testing.assert_close(moved, ratios)
    assert (ratios[:, sizes == 0] == 0).all()
    present = int((sizes > 0).sum())
    torch.testing.assert_close(ratios.sum(1), torch.full((2,), present * 0.25, dtype=torch.float64))


def test_crops_swap_with_their_thumbnails_part():
    t = tokens(6, (2, 2), (8, 8), spread=2.0)
    swapped = t.cls_attention[:, [0, 2, 1, 4, 3]].clone()
    swapped[:, 0] = swapped[:, 0].view(2, 6, 2, 3).flip(2).flatten(1)
    method = vtok.GlobalCom2(keep=0.25, exact_count=False, alpha=0.0)

    def per_crop(attention):
        keep = method.select(VisualTokens(t.features, t.layout, attention)).keep[:, 36:]
        return keep.view(2, 2, 6, 2, 6).transpose(2, 3).flatten(3).flatten(1, 2)  # [B, C, 36]

    before, after = per_crop(t.cls_attention), per_crop(swapped)
    assert torch.equal(after, before[:, [1, 0, 3, 2]])
    assert len(before.sum(2)[0].unique()) > 1


def test_uniform_allocation():
    for case in CASES:
        t = tokens(*case)
        sizes = crop_sizes(t.layout.planes[1])
        keep = vtok.GlobalCom2(keep=0.25, exact_count=False, allocation="uniform").select(t).keep
        crop_of = crop_index(t.layout.planes[1])
        counts = torch.zeros(2, len(sizes)).index_add(1, crop_of, keep[:, case[0] ** 2 :].float())
        assert torch.equal(counts, (sizes * 0.25).floor().expand(2, -1))
        exact = vtok.GlobalCom2(keep=0.25, allocation="uniform").select(t)
        assert (exact.keep.sum(1) == exact.n_kept).all()


def test_allocate():
    sizes = torch.tensor([10, 0, 4, 6])
    wanted = torch.tensor([[9, 0, 9, 2], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)
    for total in range(21):
        counts = allocate(wanted, sizes, total)
        assert counts.sum(1).tolist() == [total] * 3
        assert ((counts >= 0) & (counts <= sizes)).all()
        assert counts[0].tolist() == slow_counts([9.0, 1e-9, 9.0, 2.0], sizes.tolist(), total)
    equal = torch.full((1, 3), 1 / 3, dtype=torch.float64)
    assert allocate(equal, torch.tensor([5, 5, 5]), 4).tolist() == [[2, 1, 1]]
    assert allocate(equal, torch.tensor([1, 5, 5]), 8).tolist() == [[1, 4, 3]]
    assert allocate(equal + torch.tensor([[0, 1e-15, 0]]), torch.tensor([5, 5, 5]), 4).tolist() == [[2, 1, 1]]


def test_allocate_at_random():
    generator = torch.Generator().manual_seed(3)
    for crops in (1, 2, 5, 12):
        sizes = torch.randint(0, 9, (crops,), generator=generator)
        wanted = torch.rand(4, crops, generator=generator, dtype=torch.float64) * 9 + 0.01
        for total in range(int(sizes.sum()) + 1):
            expected = [slow_counts(row, sizes.tolist(), total) for row in wanted.tolist()]
            assert allocate(wanted, sizes, total).tolist() == expected


@pytest.mark.parametrize(("side", "grid", "size"), CASES)
def test_maps_of_the_mosaic(side, grid, size):
    thumb, crops = anyres_layout(side, grid, size).planes
    mosaic = torch.arange(grid[0] * grid[1] * side * side).view(*grid, side, side).permute(0, 2, 1, 3)
    mosaic = mosaic.reshape(grid[0] * side, grid[1] * side)
    top, left = crops.offset
    valid = mosaic[top : top + crops.rows, left : left + crops.cols].flatten()
    assert torch.equal(mosaic_index(crops), valid)
    assert torch.equal(crop_index(crops), valid // (side * side))
    assert torch.equal(crop_sizes(crops), crop_index(crops).bincount(minlength=grid[0] * grid[1]))
    if crops.offset == (0, 0) and side % grid[0] == side % grid[1] == 0:
        assert torch.equal(speaks_for(thumb, crops, "official"), speaks_for(thumb, crops, "centred"))
    assert global_map(torch.ones(2, side, side), crops).eq(1).all()


def test_ranks():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0, 5.0]])
    assert ranks(score).tolist() == [[4, 1, 2, 3, 0]]
    assert ranks(score, torch.tensor([1, 0, 1, 0, 1]), torch.tensor([2, 3])).tolist() == [[2, 0, 1, 1, 0]]


def test_token_scores():
    local, large = torch.tensor([[3.0, 4.0, 5.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    score = token_scores(local, large, torch.tensor([0, 0, 1]), 2, 0.25)
    torch.testing.assert_close(score, torch.tensor([[0.75 * 0.6, 0.25 + 0.75 * 0.8, 0.75]]))


def test_ties_and_equal_scores():
    """Equal scores: equal shares, and in each view the lower indices."""
    t = tokens(6, (2, 2), (8, 8), b=3)
    flat = VisualTokens(t.features, t.layout, torch.ones_like(t.cls_attention))
    keep = vtok.GlobalCom2(keep=0.25).select(flat).keep
    first = torch.arange(36) < 9
    assert torch.equal(keep[:, :36], first.expand(3, -1))
    crops = keep[:, 36:].view(3, 2, 6, 2, 6).transpose(2, 3).flatten(3)  # [B, 2, 2, 36]
    assert torch.equal(crops, first.expand(3, 2, 2, -1))


def test_keep_everything():
    for case in CASES:
        t = tokens(*case)
        for options in ({"keep": 1.0}, {"keep": t.layout.n}, {"keep": 10**6}):
            selection = vtok.GlobalCom2(**options).select(t)
            assert selection.keep.all() and selection.n_kept == t.layout.n


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("source", ["cls_logits", "cls_probs", "neg_cos_mean"])
def test_broken_scores_come_last(source, bad):
    """A token with no finite score is kept only where there is nothing else, and spoils no other score."""
    t = tokens(6, (2, 2), (8, 8), b=3)
    method = vtok.GlobalCom2(keep=0.7, score_source=source)
    attention, features = t.cls_attention.clone(), t.features.clone()
    attention[1, :, :10] = bad  # of each view the first 10
    features[1, :10] = bad
    crops = features[1, 36:].view(2, 6, 2, 6, -1)
    crops[:, :1], crops[:, 1:2, :, :4] = bad, bad
    attention[2], features[2] = bad, bad
    selection = method.select(VisualTokens(features, t.layout, attention))
    assert (selection.keep.sum(1) == selection.n_kept).all()
    assert torch.equal(selection.keep[0], method.select(t).keep[0])
    kept = selection.keep[1, 36:].view(2, 6, 2, 6).transpose(1, 2).flatten(2)  # [2, 2, 36]
    assert not selection.keep[1, :10].any()
    counts = kept.sum(2)
    assert (kept[..., :10].sum(2) == (counts - 26).clamp(min=0)).all()
    assert (counts <= 26).any()


@pytest.mark.parametrize("source", ["cls_logits", "cls_probs", "neg_cos_mean"])
def test_nothing_waits_for_the_device(source):
    """On the meta device there is no value to read; and what is made on the host would have to be copied."""

    class Places(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                places.add(out.device.type)
            return out

    t = tokens(6, (1, 3), (336, 700))
    meta, places = VisualTokens(t.features.to("meta"), t.layout, t.cls_attention.to("meta")), set()
    words = {"budget_map": "official", "allocation": "uniform"}
    for options in ({}, {"keep": 9}, words, {"budget_map": "official"}, {"exact_count": False}):
        with Places():
            selection = vtok.GlobalCom2(score_source=source, **options).select(meta)
        assert (selection.n_kept is None) == ("exact_count" in options)
    assert places == {"meta"}


def test_pictures_without_crops():
    thin = anyres_layout(4, (2, 2), (1, 40))  # all its rows are cut away
    assert thin.planes[1].size == 0
    tall = Layout((Plane(4, 0, "crops", crop_grid=(2, 2), crop_shape=(4, 4), offset=(0, 4)), Plane(4, 4, "thumbnail")))
    generator = torch.Generator().manual_seed(0)
    for layout, view in ((Layout((Plane(4, 4),)), 0), (Layout((Plane(4, 4, "thumbnail"),)), 0), (thin, 0), (tall, 4)):
        views = sum(plane.views for plane in layout.planes)
        attention = torch.randn(2, views, 64, generator=generator)  # four patches a token
        attention[0, view, 8:12] = math.nan
        t = VisualTokens(torch.randn(2, 16, 3, generator=generator), layout, attention)
        score = attention[:, view].view(2, 16, 4).mean(2).nan_to_num(-math.inf)
        for keep, n in ((0.25, 4), (5, 5), (10**6, 16)):
            best = torch.zeros(2, 16, dtype=torch.bool).scatter(1, score.topk(n).indices, True)
            for source in ("cls_logits", "cls_probs"):
                selection = vtok.GlobalCom2(keep=keep, score_source=source).select(t)
                assert selection.n_kept == n
                assert torch.equal(selection.keep, best) or source == "cls_probs"
            odd = vtok.GlobalCom2(keep=keep, score_source="neg_cos_mean").select(t)
            cosine = F.cosine_similarity(t.features, t.features.mean(1, keepdim=True), dim=-1)
            assert torch.equal(odd.keep, torch.zeros_like(best).scatter(1, (-cosine).topk(n).indices, True))
    video = Layout((Plane(2, 2, kind="frame"),), modality="video")
    with pytest.raises(Unsupported, match="video"):
        vtok.GlobalCom2().select(VisualTokens(torch.zeros(1, 4, 3), video))


def test_attention_of_other_views_is_refused():
    t = tokens(6, (2, 2), (8, 8))
    for attention in (t.cls_attention[:, :3], t.cls_attention[:, :, :35], None):
        with pytest.raises(Unsupported, match="CLS|cls_attention"):
            vtok.GlobalCom2().select(VisualTokens(t.features, t.layout, attention))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_are_made_in_full_precision(dtype):
    t = tokens(6, (2, 2), (70, 112))
    small = VisualTokens(t.features.to(dtype), t.layout, t.cls_attention.to(dtype))
    large = VisualTokens(small.features.float(), t.layout, small.cls_attention.float())
    for source in ("cls_logits", "neg_cos_mean"):
        method = vtok.GlobalCom2(keep=0.3, score_source=source)
        assert torch.equal(method.select(small).keep, method.select(large).keep)


@pytest.mark.parametrize("source", ["cls_logits", "cls_probs", "neg_cos_mean"])
def test_pictures_do_not_mix(source):
    t = tokens(6, (2, 2), (70, 112), b=3)
    method = vtok.GlobalCom2(keep=0.3, score_source=source)
    together = method.select(t).keep
    for i in range(3):
        one = VisualTokens(t.features[i : i + 1], t.layout, t.cls_attention[i : i + 1])
        assert torch.equal(method.select(one).keep[0], together[i])


def test_score_without_cls():
    """-cos to the mean of the token's own view: the odd ones out of each view are kept."""
    layout = anyres_layout(4, (1, 2), (4, 8))
    features = torch.zeros(1, layout.n, 3)
    features[..., 0] = 1.0
    odd = [5, 16 + 0, 16 + 7]  # one of the thumbnail, one of each crop (the plane is 4 x 8)
    features[0, odd] = torch.tensor([0.0, 1.0, 0.0])
    selection = vtok.GlobalCom2(keep=3, score_source="neg_cos_mean").select(VisualTokens(features, layout))
    assert selection.keep[0].nonzero().squeeze(1).tolist() == odd


def test_cosine_to_the_mean_of_the_view():
    crops = anyres_layout(6, (1, 3), (336, 700)).planes[1]
    x = torch.randn(2, crops.size, 5)
    ours = cos_to_view_mean(x.unflatten(1, (crops.rows, crops.cols)), crops).flatten(1)
    for c in range(3):
        view = x[:, crop_index(crops) == c]
        expected = F.cosine_similarity(view, view.mean(1, keepdim=True), dim=-1)
        torch.testing.assert_close(ours[:, crop_index(crops) == c], expected)


def test_alpha_and_tau():
    t = tokens(6, (2, 2), (8, 8))
    local = vtok.GlobalCom2(keep=0.25, alpha=0.0).select(t).keep
    moved = VisualTokens(t.features, t.layout, t.cls_attention.clone())
    moved.cls_attention[:, 0] = moved.cls_attention[:, 0].view(2, 6, 6).flip(2).flatten(1)
    even = vtok.GlobalCom2(keep=0.25, alpha=0.0, tau=1e9)
    assert torch.equal(even.select(t).keep[:, 36:], even.select(moved).keep[:, 36:])
    assert not torch.equal(local, vtok.GlobalCom2(keep=0.25, alpha=1.0).select(t).keep)


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.0},
        {"tau": math.nan},
        {"tau": "10"},
        {"alpha": 1.5},
        {"alpha": True},
        {"alpha": math.nan},
        {"score_source": "cls"},
        {"allocation": "softmax"},
        {"budget_map": "best"},
        {"exact_count": 1},
        {"renumber": None},
        {"keep": 0.0},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(InvalidValue, match=next(iter(options))):
        vtok.GlobalCom2(**options)


def test_on_a_model():
    model, processor = tiny("llava_next")
    pictures = [picture(112, 112, 1), picture(56, 112, 2), picture(112, 60, 3)]
    inputs = batch(processor, ["# one", "# and #"], pictures)
    with vtok.patch(model, "globalcom2", keep=0.25) as patch, torch.no_grad():
        model(**inputs)
    for layout, kept in zip(patch.trace.layouts, patch.trace.n_kept):
        assert kept == sum(max(1, p.size // 4) for p in layout.planes)
    alone = batch(processor, ["# one"], [picture(112, 112, 1)])
    masks = patch.trace.keep_masks
    with vtok.patch(model, "globalcom2", keep=0.25) as patch, torch.no_grad():
        model(**alone)
    assert torch.equal(patch.trace.keep_masks[0], masks[0])  # its own scores, whatever else is in the batch


def test_models_that_cannot():
    llava, _ = tiny("llava")
    with pytest.raises(Unsupported, match="globalcom2 needs crops"):
        vtok.patch(llava, vtok.GlobalCom2(score_source="neg_cos_mean"))


def test_a_model_whose_encoder_has_no_cls():
    """LLaVA-NeXT on a SigLIP tower: refused with what to do, and then it works, batch or not."""
    import transformers as T

    base, processor = tiny("llava_next")
    processor = copy.deepcopy(processor)  # shared with the other tests
    config = base.config.to_dict()
    config["vision_config"] = {**config["vision_config"], "model_type": "siglip_vision_model"}
    config["vision_config"]["vision_use_head"] = False
    config["vision_feature_select_strategy"] = "full"
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    torch.manual_seed(0)
    model = T.LlavaNextForConditionalGeneration(T.LlavaNextConfig.from_dict(config)).eval()
    with pytest.raises(Unsupported, match="cls_attention.*neg_cos_mean"):
        vtok.patch(model, "globalcom2")
    inputs = batch(processor, ["# one", "# two"], [picture(112, 112, 1), picture(112, 70, 2)])
    with vtok.patch(model, "globalcom2", keep=0.25, score_source="neg_cos_mean") as patch, torch.no_grad():
        logits = model(**inputs).logits
    assert patch.trace.n_kept == [4 + 16, 4 + sum(p.size for p in patch.trace.layouts[1].planes[1:]) // 4]
    with Masked(model, patch.trace), torch.no_grad():
        masked = model(**inputs).logits
    present = patch.trace.present_at(3)
    torch.testing.assert_close(logits[present], masked[present], atol=1e-5, rtol=1e-5)

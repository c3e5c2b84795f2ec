"""GlobalCom2 against a slow rewrite from the formulas, its invariants and the published counts."""

import copy
import math

import pytest
import torch
from contract import Masked, batch, picture, tiny

import vtok
from vtok.adapters.llava_next import anyres_layout
from vtok.compressors.globalcom2 import allocate, crop_index, crop_ratios, global_map, mosaic_index, ranks, speaks_for
from vtok.errors import InvalidValue, Unsupported
from vtok.selection import VisualTokens

# (side, grid, picture size): exact fit, padding above, padding at the sides, one crop, odd remainders
CASES = [
    (4, (2, 2), (8, 8)),
    (6, (2, 2), (70, 112)),
    (6, (2, 2), (112, 70)),
    (5, (1, 3), (50, 150)),
    (5, (3, 1), (90, 30)),
    (5, (1, 1), (9, 9)),
    (7, (2, 2), (10, 99)),
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


def slow(t, keep, tau=10.0, alpha=0.5):
    """The kept tokens of the first picture, and the crops' ratios, one at a time, as the paper says; floors."""
    thumb, crops = t.layout.planes
    side, (rows, cols), (top, left) = thumb.rows, crops.crop_grid, crops.offset
    a = t.cls_attention[0].tolist()
    n_crops = rows * cols
    sums = [0.0] * n_crops
    for j, value in enumerate(a[0]):
        y, x = divmod(j, side)  # a patch speaks for the crop in which its centre lies
        cy = (y + 0.5) * crops.rows / side + top
        cx = (x + 0.5) * crops.cols / side + left
        sums[min(int(cy // side), rows - 1) * cols + min(int(cx // side), cols - 1)] += value
    weights = [math.exp((s - max(sums)) / tau) for s in sums]
    ratios = [min(1.0, keep * (1 + w / sum(weights) - 1 / n_crops)) for w in weights]
    kept = set(sorted(range(side * side), key=lambda j: (-a[0][j], j))[: int(side * side * keep + 1e-9)])
    grid = [a[0][r * side : (r + 1) * side] for r in range(side)]
    for c in range(n_crops):
        members, local, large = [], [], []
        for i in range(crops.size):
            y, x = divmod(i, crops.cols)
            my, mx = y + top, x + left
            if (my // side) * cols + mx // side == c:
                members.append(side * side + i)
                local.append(a[1 + c][(my % side) * side + mx % side])
                large.append(bilinear(grid, y, x, crops.rows, crops.cols))
        nl = max(math.sqrt(sum(v * v for v in local)), 1e-12)
        ng = max(math.sqrt(sum(v * v for v in large)), 1e-12)
        score = [alpha * g / ng + (1 - alpha) * v / nl for g, v in zip(large, local)]
        order = sorted(range(len(members)), key=lambda i: (-score[i], i))
        kept |= {members[i] for i in order[: int(len(members) * ratios[c] + 1e-9)]}
    return kept, ratios


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.7])
@pytest.mark.parametrize(("side", "grid", "size"), CASES)
def test_against_the_slow_rewrite(side, grid, size, keep):
    t = tokens(side, grid, size, seed=side + grid[0])
    selection = vtok.GlobalCom2(keep=keep, exact_count=False).select(t)
    expected, ratios = slow(t, keep)
    if int(side * side * keep) >= 1:
        assert set(selection.keep[0].nonzero().squeeze(1).tolist()) == expected
    membership = speaks_for(*t.layout.planes, "centred")
    ours = crop_ratios(t.cls_attention[:, 0], membership, grid[0] * grid[1], keep, 10.0)
    torch.testing.assert_close(ours[0], torch.tensor(ratios, dtype=torch.float64))


@pytest.mark.parametrize(("side", "grid", "size"), CASES)
def test_exact_counts(side, grid, size):
    for keep in (0.1, 0.25, 0.5, 0.9, 7):
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
    """672 x 672 at R = 0.25: 144 of the thumbnail and 573 to 576 of the crops; 1000 x 600: 144 and about 334."""
    square, wide = anyres_layout(24, (2, 2), (672, 672)), anyres_layout(24, (2, 2), (600, 1000))
    assert (square.n_rows, wide.n_rows) == (2928, 1948)
    for layout, crops in ((square, 576), (wide, 336)):
        attention = torch.randn(4, 5, 576) * 2
        t = VisualTokens(torch.randn(4, layout.n, 4), layout, attention)
        assert vtok.GlobalCom2(keep=0.25).select(t).n_kept == 144 + crops
        floored = vtok.GlobalCom2(keep=0.25, exact_count=False).select(t).keep.sum(1) - 144
        assert ((floored > crops - 5) & (floored <= crops)).all()


def test_ratios():
    score, membership = torch.randn(3, 36) * 4, torch.arange(36) % 4
    ratios = crop_ratios(score, membership, 4, 0.25, 10.0)
    torch.testing.assert_close(ratios.sum(1), torch.full((3,), 4 * 0.25, dtype=torch.float64))
    assert (ratios >= 0.25 * (1 - 1 / 4)).all()
    shuffle = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(crop_ratios(score, shuffle[membership], 4, 0.25, 10.0)[:, shuffle], ratios)
    assert crop_ratios(torch.tensor([[1e4, 0.0, 0.0, 0.0]]), torch.arange(4), 4, 0.9, 10.0).max() == 1.0
    # after softmax over the patches, the shares are the same to three digits; with logits they are not
    attention = torch.randn(1, 576) * 2
    member = speaks_for(*anyres_layout(24, (2, 2), (672, 672)).planes, "official")
    flat = crop_ratios(attention.softmax(-1), member, 4, 0.25, 10.0)
    assert (flat - 0.25).abs().max() < 1e-2
    assert (crop_ratios(attention, member, 4, 0.25, 10.0) - 0.25).abs().max() > 0.02


def test_allocate():
    sizes = torch.tensor([10, 0, 4, 6])
    wanted = torch.tensor([[9.0, 0.0, 9.0, 2.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    for total in range(21):
        counts = allocate(wanted, sizes, total)
        assert counts.sum(1).tolist() == [total] * 3
        assert ((counts >= 0) & (counts <= sizes)).all()
    assert allocate(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([5, 5, 5]), 4).tolist() == [[2, 1, 1]]


@pytest.mark.parametrize(("side", "grid", "size"), CASES)
def test_maps_of_the_mosaic(side, grid, size):
    thumb, crops = anyres_layout(side, grid, size).planes
    mosaic = torch.arange(grid[0] * grid[1] * side * side).view(*grid, side, side).permute(0, 2, 1, 3)
    mosaic = mosaic.reshape(grid[0] * side, grid[1] * side)
    top, left = crops.offset
    valid = mosaic[top : top + crops.rows, left : left + crops.cols].flatten()
    assert torch.equal(mosaic_index(crops), valid)
    assert torch.equal(crop_index(crops), valid // (side * side))
    if crops.offset == (0, 0) and side % max(grid) == 0:
        assert torch.equal(speaks_for(thumb, crops, "official"), speaks_for(thumb, crops, "centred"))
    assert global_map(torch.ones(2, side, side), crops).eq(1).all()


def test_ranks():
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0, 5.0]])
    assert ranks(score).tolist() == [[4, 1, 2, 3, 0]]
    assert ranks(score, torch.tensor([1, 0, 1, 0, 1]), torch.tensor([2, 3])).tolist() == [[2, 0, 1, 1, 0]]


def test_ties_equal_scores_and_broken_ones():
    t = tokens(6, (2, 2), (70, 112), b=3)
    flat = VisualTokens(t.features, t.layout, torch.zeros_like(t.cls_attention))
    selection = vtok.GlobalCom2(keep=0.25).select(flat)
    assert selection.keep[:, :9].all()  # the lower indices
    assert not selection.keep[:, 9:36].any()
    broken = t.cls_attention.clone()
    broken[1] = torch.nan
    broken[2, 2, :5] = torch.inf
    mixed = vtok.GlobalCom2(keep=0.25).select(VisualTokens(t.features, t.layout, broken))
    assert (mixed.keep.sum(1) == mixed.n_kept).all()
    assert torch.equal(mixed.keep[0], vtok.GlobalCom2(keep=0.25).select(t).keep[0])


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


def test_alpha_and_tau():
    t = tokens(6, (2, 2), (8, 8))
    local = vtok.GlobalCom2(keep=0.25, alpha=0.0).select(t).keep
    moved = VisualTokens(t.features, t.layout, t.cls_attention.clone())
    moved.cls_attention[:, 0] = moved.cls_attention[:, 0].view(2, 6, 6).flip(2).flatten(1)
    even = vtok.GlobalCom2(keep=0.25, alpha=0.0, tau=1e9)
    assert torch.equal(even.select(t).keep[:, 36:], even.select(moved).keep[:, 36:])
    assert not torch.equal(local, vtok.GlobalCom2(keep=0.25, alpha=1.0).select(t).keep)


@pytest.mark.parametrize("options", [{"tau": 0.0}, {"alpha": 1.5}, {"score_source": "cls"}, {"budget_map": "best"}])
def test_options_are_checked(options):
    with pytest.raises(InvalidValue, match=next(iter(options))):
        vtok.GlobalCom2(**options)


def test_on_a_model():
    model, processor = tiny("llava_next")
    inputs = batch(processor, ["# one", "# and #"], [picture(112, 112, 1), picture(56, 112, 2), picture(112, 60, 3)])
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

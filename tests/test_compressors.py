"""The baselines and FastV on their own, and what holds for every registered compressor."""

import dataclasses
import math

import pytest
import torch
from contract import batch, picture, tiny
from torch._subclasses.fake_tensor import FakeTensorMode

import vtok
from vtok.compressor import load_all
from vtok.compressors.pool import cells, coarser
from vtok.errors import InvalidValue
from vtok.stages import ORDER
from vtok.types import Attention, Layout, Plane, VisualTokens, share

REGISTRY = load_all()
LAYOUTS = [
    Layout((Plane(6, 6),)),
    Layout((Plane(1, 7),)),
    Layout((Plane(1, 1),)),
    Layout((Plane(4, 4, "thumbnail"), Plane(5, 8, "crops")), separators=(0, 1)),
    Layout((Plane(3, 5, "frame"),) * 4, modality="video"),
]


def tokens(layout, b=3, width=4):
    return VisualTokens(torch.randn(b, layout.n, width), layout)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_compressor_says_what_it_is(name):
    cls = REGISTRY[name]
    assert cls.name == name
    assert cls.paper
    assert "Differs from the paper:" in cls.__doc__
    assert isinstance(cls.needs, frozenset)
    if cls.trained:
        with pytest.raises(InvalidValue, match="trained"):
            cls()
        return
    assert all(part.stage in ORDER for part in cls().parts())
    assert cls.stage == "+".join(part.stage for part in cls().parts())
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().keep = 0.5


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.99, 1, 3, 1000])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", [n for n, c in REGISTRY.items() if c.stage == "pre_llm" and not c.needs])
def test_selections_are_sound(name, layout, keep):
    t = tokens(layout)
    selection = REGISTRY[name](keep=keep).select(t)
    counts = selection.keep.sum(1)
    assert selection.keep.shape == (3, layout.n)
    assert (counts == selection.n_kept).all()
    limit = keep if isinstance(keep, int) else max(len(layout.planes), math.floor(layout.n * keep + 1e-9))
    assert 1 <= counts.max() <= max(1, limit)
    if selection.features is not None:
        assert selection.features.shape == t.features.shape
        into = selection.merged_into
        stands = into >= 0
        assert selection.keep.gather(1, into.clamp(min=0))[stands].all()
        kept = selection.keep.nonzero()
        assert (into[kept[:, 0], kept[:, 1]] == kept[:, 1]).all()


def test_uniform_is_even():
    for n, k in ((576, 144), (100, 7), (5, 5), (9, 2)):
        t = tokens(Layout((Plane(1, n),)), b=1)
        index = vtok.Uniform(keep=k).select(t).keep[0].nonzero().squeeze(1)
        assert len(index) == k
        gaps = index.diff()
        assert gaps.numel() == 0 or gaps.max() - gaps.min() <= 1
        assert abs(int(index[0]) - (n - 1 - int(index[-1]))) <= 1  # centred


def test_random_depends_on_the_seed_and_the_count_alone():
    t = tokens(LAYOUTS[0])
    one, again = vtok.Random(keep=9).select(t).keep, vtok.Random(keep=9).select(tokens(LAYOUTS[0])).keep
    assert torch.equal(one, again)
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one, vtok.Random(keep=9, seed=1).select(t).keep)
    assert (vtok.Random(keep=12, seed=3).select(t).keep[0] & one[0]).sum() < 9


def slow_cells(plane, rows, cols):
    """{(row, col) of the coarser grid: tokens of the plane in it}, raster order."""
    members = {}
    for y in range(plane.rows):
        for x in range(plane.cols):
            members.setdefault((y * rows // plane.rows, x * cols // plane.cols), []).append(y * plane.cols + x)
    return members


def test_pool_means():
    t = tokens(Layout((Plane(4, 4, "thumbnail"), Plane(3, 6, "crops"), Plane(1, 1))), b=2)
    selection = vtok.Pool(keep=0.32).select(t)  # 11 tokens: 5, 6 and none, which becomes 1
    expected = set()
    for plane, start, grid in zip(t.layout.planes, t.layout.starts, ((2, 2), (2, 3), (1, 1))):
        for members in slow_cells(plane, *grid).values():
            ys, xs = [m // plane.cols for m in members], [m % plane.cols for m in members]
            centre = (min(ys) + max(ys)) / 2, (min(xs) + max(xs)) / 2
            off = [math.dist(centre, (y, x)) for y, x in zip(ys, xs)]
            place = start + members[off.index(min(off))]
            expected.add(place)
            for b in range(2):
                mean = sum(t.features[b, start + m] for m in members) / len(members)
                torch.testing.assert_close(selection.features[b, place], mean)
                assert (selection.merged_into[b, [start + m for m in members]] == place).all()
    for b in range(2):
        assert set(selection.keep[b].nonzero().squeeze(1).tolist()) == expected


def test_pool_leaves_no_plane_empty():
    t = tokens(Layout((Plane(3, 5, "frame"),) * 4, modality="video"))
    assert (vtok.Pool(keep=0.01).select(t).keep.view(3, 4, 15).sum(2) == 1).all()
    assert vtok.Pool(keep=3).select(t).n_kept == 3  # a count is a count


def test_pool_rounds_half_precision_once():
    t = tokens(Layout((Plane(32, 32),)))
    half = VisualTokens(t.features.bfloat16(), t.layout)
    features = vtok.Pool(keep=4).select(half).features
    exact = vtok.Pool(keep=4).select(VisualTokens(half.features.float(), t.layout)).features
    assert torch.equal(features, exact.bfloat16())


def test_pool_gives_every_token_its_gradient():
    features = torch.randn(2, 35, 3, requires_grad=True)
    selection = vtok.Pool(keep=0.3).select(VisualTokens(features, Layout((Plane(5, 7),))))
    selection.features[selection.keep].sum().backward()
    assert (features.grad > 0).all()
    torch.testing.assert_close(features.grad.sum(), torch.tensor(2.0 * 3 * selection.n_kept))


def test_pool_grids():
    assert coarser(Plane(24, 24), 144) == (12, 12)
    assert coarser(Plane(24, 24), 575) == (23, 24)
    assert coarser(Plane(40, 2), 59) == (29, 2)
    assert coarser(Plane(24, 24), 1) == (1, 1)
    assert coarser(Plane(24, 24), 17) == (4, 4)  # not a stripe of 17
    used = []
    for plane in (Plane(r, c) for r in range(1, 17) for c in range(1, 17)):
        for count in range(1, plane.size + 1):
            rows, cols = coarser(plane, count)
            assert 1 <= rows <= plane.rows and 1 <= cols <= plane.cols and rows * cols <= count
            if count >= 10:
                used.append(rows * cols / count)
    assert min(used) >= 0.8
    assert sum(used) / len(used) > 0.95
    assert coarser(Plane(1, 7), 3) == (1, 3)
    assert coarser(Plane(28, 48), 336) == (14, 24)
    for plane, grid in ((Plane(5, 7), (2, 3)), (Plane(6, 6), (6, 6)), (Plane(1, 9), (1, 4)), (Plane(3, 3), (1, 1))):
        cell, middle, size = cells(plane, *grid)
        for i, members in enumerate(slow_cells(plane, *grid).values()):
            assert (cell == i).nonzero().squeeze(1).tolist() == members
            assert size[i] == len(members)
        assert torch.equal(cell[middle], torch.arange(grid[0] * grid[1]))


def test_share():
    assert share(10, [1, 1, 1]) == [4, 3, 3]
    assert share(0, [3, 5]) == [0, 0]
    assert share(8, [3, 5]) == [3, 5]
    for total in range(30):
        parts = share(total, [7, 11, 12])
        assert sum(parts) == total
        assert all(p <= s for p, s in zip(parts, [7, 11, 12]))


def test_downsample_takes_a_fraction():
    assert vtok.Downsample(keep=0.25).scale() == 0.5
    with pytest.raises(InvalidValue, match="fraction"):
        vtok.Downsample(keep=64)


def test_fastv_score_is_the_anchors_attention():
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, :2] = False
    attention = Attention(query, key, 0.4, valid, valid, torch.tensor([6, 4]))
    score = vtok.FastV().score(attention)
    for b, anchor in enumerate((6, 4)):
        rows = []
        for h in range(4):
            seen = [j for j in range(anchor + 1) if valid[b, j]]
            logits = torch.stack([query[b, h, anchor] @ key[b, h // 2, j] * 0.4 for j in seen])
            rows.append(torch.zeros(7).index_copy(0, torch.tensor(seen), logits.softmax(0)))
        torch.testing.assert_close(score[b], torch.stack(rows).mean(0))


def test_fastv_options():
    assert vtok.FastV(layer=3, keep=0.4).schedule(10) == {2: 0.4}
    solved = vtok.FastV(layer=2).with_budget(0.5, 32)
    assert (2 + 30 * solved.keep) / 32 == pytest.approx(0.5)
    assert vtok.FastV(layer=2).with_budget(1.0, 32).keep == 1.0
    solved = vtok.FastV(layer=4).with_budget(0.1, 32)  # 4 layers of 32 alone are more than that
    assert solved.layer == 2 and (2 + 30 * solved.keep) / 32 == pytest.approx(0.1)  # 3 would leave next to nothing
    with pytest.raises(InvalidValue, match="cannot be met"):
        vtok.FastV().with_budget(0.1, 8)
    for options in ({"layer": 0}, {"layer": True}, {"anchor": "last"}):
        with pytest.raises(InvalidValue):
            vtok.FastV(**options)
    for layer in (4, 40):  # nothing would be dropped
        with pytest.raises(InvalidValue, match="number of decoder layers, 4"):
            vtok.FastV(layer=layer).schedule(4)
        with pytest.raises(InvalidValue, match="number of decoder layers, 4"):
            vtok.FastV(layer=layer).with_budget(0.5, 4)


@pytest.mark.parametrize("name", [n for n, c in REGISTRY.items() if c.stage == "pre_llm" and not c.needs])
def test_no_picture_changes_another(name):
    t = tokens(LAYOUTS[3])
    compressor = REGISTRY[name](keep=0.3)
    together = compressor.select(t)
    for b in range(3):
        alone = compressor.select(VisualTokens(t.features[b : b + 1], t.layout))
        assert torch.equal(alone.keep[0], together.keep[b])
        if alone.features is not None:
            torch.testing.assert_close(alone.features[0], together.features[b])
            assert torch.equal(alone.merged_into[0], together.merged_into[b])


@pytest.mark.parametrize("name", [n for n, c in REGISTRY.items() if c.stage == "pre_llm" and not c.needs])
def test_selecting_reads_no_values_back(name):
    """Contract 10: shapes alone decide what is computed; a fake tensor has no values to wait for."""
    layout = LAYOUTS[3]
    compressor = REGISTRY[name](keep=0.3)
    layout.place, layout.boxes  # noqa: B018  made once per layout, outside
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        features = mode.from_tensor(torch.randn(2, layout.n, 4))
        assert compressor.select(VisualTokens(features, layout)).keep.shape == (2, layout.n)


def test_fastv_keeps_what_eager_attention_says():
    """The probe's rows are the model's own probabilities."""
    model, processor = tiny("llava", "eager")
    inputs = batch(processor, ["a # What colour?"], [picture(56, 56)])
    with torch.no_grad():
        probabilities = model(**inputs, output_attentions=True).attentions[1].mean(1)[0, -1]
        with vtok.patch(model, vtok.FastV(keep=5, layer=2)) as patch:
            model(**inputs)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(1)
    best = image[probabilities[image].topk(5).indices].sort().values
    kept = patch.trace.positions_at(2)[0]
    assert torch.equal(kept[torch.isin(kept, image)], best)

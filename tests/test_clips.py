"""Methods for clips against golden numbers and slow rewrites from the formulas; and what they make of odd clips."""

import itertools
import math

import numpy as np
import pytest
import torch
from clips import attention, frames_of, golden, kept, noise, seen, shown_to, slow_clusters
from contract import batch, clip, picture, run, tiny

import vtok
from vtok import compressor as compressors
from vtok.compressors import evs, holitom, vidcom2
from vtok.density import clusters
from vtok.errors import Unsupported
from vtok.types import Layout, Plane, VisualTokens

NAMES = [name for name, cls in compressors.load_all().items() if "frames" in cls.needs and cls.stage == "pre_llm"]


# ---- golden numbers --------------------------------------------------------------------------------------------------
def test_golden_vidcom2():
    assert golden().sum().item() == pytest.approx(-4.300075, abs=1e-4)
    of_clip, of_frame = vidcom2.commonness(golden()[None])
    assert of_clip[0, 0, :4].tolist() == pytest.approx([2.011119, 2.013253, 1.962609, 1.863067], abs=1e-5)
    assert of_frame[0, 0, :4].tolist() == pytest.approx([2.187675, 2.151549, 2.086427, 1.906123], abs=1e-5)
    assert vidcom2.frame_counts(of_clip, 0.5, 0.01).tolist() == [[7, 8, 9, 8, 9, 7, 7, 8]]
    assert vidcom2.frame_counts(of_clip, 0.3, 0.01).sum() == 37
    first, middle, last = [6, 7, 14, 15], [6, 7, 10, 14], [5, 9, 12, 13]
    expected = [first, first, first, middle, last, [2, 9, 12, 13], [2, 5, 9, 13], [2, 5, 6, 9]]
    assert kept(vtok.VidCom2(keep=0.25), golden()) == expected
    assert [len(row) for row in kept(vtok.VidCom2(keep=0.3), golden())] == [4, 5, 5, 5, 5, 4, 5, 5]


def test_golden_evs():
    change = evs.changes(golden()[None])[0]
    assert change[4, :4].tolist() == pytest.approx([1.424760, 1.464656, 1.434696, 0.131735], abs=1e-5)
    assert change[1, :3].tolist() == pytest.approx([0.915072, 0.927293, 0.001136], abs=1e-5)
    whole = list(range(16))
    cut = [p for p in whole if p not in (3, 10)]
    assert kept(vtok.EVS(keep=0.25), golden()) == [whole, [], [], [], cut, [5], [6], []]
    assert [len(row) for row in kept(vtok.EVS(keep=0.5), golden())] == [16, 5, 6, 6, 16, 5, 5, 5]
    assert [len(row) for row in kept(vtok.EVS(keep=0.1), golden())] == [16] + [0] * 7


def test_golden_frames():
    whole = lambda n, keep: [t for t, row in enumerate(kept(vtok.Frames(keep=keep), noise(n, 3))) if len(row) == 3]
    assert whole(8, 0.25) == [2, 6]
    assert whole(32, 0.25) == list(range(2, 32, 4))
    assert whole(7, 0.5) == [1, 3, 5]
    assert whole(7, 0.01) == [3]
    assert whole(7, 11) == [1, 3, 5]  # 11 tokens are three frames of 3


GOLDEN_HOLITOM = [  # tau, keep, windows, saved, tokens of each window
    (0.8, 0.25, [(0, 3), (4, 7)], 72, [19, 19]),
    (0.98, 0.25, [(0, 3), (4, 7)], 69, [19, 18]),
    (0.65, 0.1, [(0, 3), (4, 7)], 72, [7, 7]),
    (0.9999, 0.25, [(0, 3), (4, 4), (5, 5), (6, 6), (7, 7)], 3, [16, 5, 5, 5, 5]),
]


@pytest.mark.parametrize(("tau", "keep", "found", "saved", "counts"), GOLDEN_HOLITOM)
def test_golden_holitom(tau, keep, found, saved, counts):
    table = holitom.longest(holitom.runs(golden()[None], tau))[0].tolist()
    assert holitom.windows(table) == (found, saved)
    tokens = seen(golden(), layout=frames_of(8), encoder={("encoder_attention", -1): attention()})
    chosen = vtok.HoliTom(keep=keep, tau=tau).select(tokens)
    assert [int(chosen.keep.view(8, 16)[a : z + 1].sum()) for a, z in found] == counts
    if tau == 0.8:
        first = chosen.features[0, :64][chosen.keep[0, :64]]
        assert first.sum().item() == pytest.approx(4.1495, abs=1e-3)


def test_golden_clusters():
    centre = clusters(golden()[0], 4, 7)
    assert sorted(set(centre.tolist())) == [0, 9, 11, 14]
    weight = holitom.weights(centre, 0.6)
    row = (golden()[0] * weight[:, None])[centre == 0].sum(0)
    assert row[:3].tolist() == pytest.approx([0.856184, 0.526729, -0.696074], abs=1e-5)


# ---- slow rewrites ---------------------------------------------------------------------------------------------------
def slow_vidcom2(x, keep):
    t, p, d = x.shape
    x = x.double().numpy()
    steady = np.argsort(x.reshape(-1, d).var(0), kind="stable")[: d // 2]
    x = x[..., steady] / np.linalg.norm(x[..., steady], axis=-1, keepdims=True)
    near = lambda z, c: sum(math.exp(-((z - c) ** 2).sum() / (2 * s)) for s in (1 / 8, 1 / 4, 1 / 2, 1, 2))
    clip_mean = x.reshape(t * p, -1).mean(0)
    of_clip = np.array([[near(z, clip_mean) for z in frame] for frame in x])
    common = of_clip + np.array([[near(z, frame.mean(0)) for z in frame] for frame in x])
    share = np.exp(-of_clip.mean(1) / 0.01)
    share = share / share.sum()
    stay, order = set(), [(common[i, j], i, j) for i in range(t) for j in range(p)]
    for i in range(t):
        count = max(1, round(min(1.0, keep * (1 + share[i] - share.mean())) * p))
        stay |= set(sorted(one for one in order if one[1] == i)[:count])
    target = min(t * p, max(t, int(t * p * keep + 1e-9)))
    while len(stay) > target:
        stay.remove(max(stay))
    while len(stay) < target:
        stay.add(min(set(order) - stay))
    return [sorted(j for _, frame, j in stay if frame == i) for i in range(t)]


@pytest.mark.parametrize("keep", [0.1, 0.26, 0.5, 0.9])
@pytest.mark.parametrize(("t", "p"), [(1, 9), (3, 7), (8, 5), (12, 1)])
def test_vidcom2_is_its_formula(t, p, keep):
    clips = [noise(t, p, 9, seed) for seed in range(3)]
    method = vtok.VidCom2(keep=keep)
    found = method.select(seen(*clips))
    for x, row in zip(clips, found.keep):
        assert [frame.nonzero().flatten().tolist() for frame in row.view(t, p)] == slow_vidcom2(x, keep)
    assert found.n_kept == method.count(frames_of(t, 1, p))


@pytest.mark.parametrize("keep", [0.1, 0.4, 1.0, 11])
@pytest.mark.parametrize(("t", "p"), [(1, 9), (3, 7), (8, 5), (12, 1)])
def test_evs_is_its_formula(t, p, keep):
    clips = [noise(t, p, 6, seed) for seed in range(3)]
    count = max(p, keep if isinstance(keep, int) else int(t * p * keep + 1e-9))
    for x, row in zip(clips, vtok.EVS(keep=keep).select(seen(*clips)).keep):
        change = {(0, j): math.inf for j in range(p)}
        for i in range(1, t):
            for j in range(p):
                change[i, j] = 1 - torch.cosine_similarity(x[i, j], x[i - 1, j], dim=0).item()
        best = sorted(change, key=lambda one: (-change[one], one))[:count]
        assert row.nonzero().flatten().tolist() == sorted(i * p + j for i, j in best)


def test_vidcom2_counts():
    for t, p in ((2, 196), (7, 13), (33, 30)):
        for keep in (0.1, 0.25, 0.3, 0.77):
            assert vtok.VidCom2(keep=keep).select(seen(noise(t, p))).keep.sum() == int(t * p * keep + 1e-9)


def test_vidcom2_does_not_know_the_order_of_frames():
    x, order = noise(6, 10), torch.tensor([3, 0, 5, 1, 4, 2])
    there = kept(vtok.VidCom2(keep=0.3), x)
    assert kept(vtok.VidCom2(keep=0.3), x[order]) == [there[i] for i in order]


@pytest.mark.parametrize("t", [1, 2, 5, 8])
def test_windows_are_the_best_of_all(t):
    for seed in range(10):
        still = torch.rand(t, 7, generator=torch.Generator().manual_seed(seed)) < 0.7
        still[0] = False
        run = torch.zeros(t, 7, dtype=torch.long)
        for i in range(1, t):
            run[i] = torch.where(still[i], run[i - 1] + 1, 0)
        saves = lambda a, z, still=still: int(still[a + 1 : z + 1].all(0).sum()) * (z - a)
        cuts = [[0, *(i + 1 for i in some), t] for n in range(t) for some in itertools.combinations(range(t - 1), n)]
        totals = [sum(saves(a, z - 1) for a, z in itertools.pairwise(ends)) for ends in cuts]
        found, saved = holitom.windows(holitom.longest(run[None])[0].tolist())
        assert saved == max(totals) == sum(saves(a, z) for a, z in found)
        assert [i for a, z in found for i in range(a, z + 1)] == list(range(t))


def slow_holitom(x, gets, keep, tau, beta):
    """{place: row} of a clip [T, P, D]."""
    t, p, _ = x.shape
    near = torch.cosine_similarity(x[1:], x[:-1], dim=-1) > tau
    saves = lambda a, z: int(near[a:z].all(0).sum()) * (z - a) if a < z else 0
    best, first = [0], []
    for z in range(t):
        options = [(best[a] + saves(a, z), a) for a in range(z, -1, -1)]
        best.append(max(options)[0])
        first.append(next(a for saved, a in options if saved == best[-1]))
    share, out, z = min(1.0, keep / (1 - best[-1] / (t * p))), {}, t - 1
    while z >= 0:
        a = first[z]
        static = near[a:z].all(0) if a < z else torch.zeros(p, dtype=torch.bool)
        moving, places = [i for i in range(p) if not static[i]], [i for i in range(p) if static[i]]
        for frame in range(a, z + 1):
            ranked = sorted(moving, key=lambda i: -gets[frame, i])
            out |= {frame * p + i: x[frame, i] for i in ranked[: math.ceil(len(moving) * share - 1e-9)]}
        mean, n = x[a : z + 1, places].mean(0), max(round(len(places) * share), int(not moving))
        centres, of = slow_clusters(mean, n) if n else ((), ())
        for c in centres:
            others = [mean[i] for i in range(len(places)) if of[i] == c and i != c]
            row = beta * mean[c] + (1 - beta) * torch.stack(others).mean(0) if others else mean[c]
            out[a * p + places[c]] = row
        z = a - 1
    return out


@pytest.mark.parametrize(("keep", "tau"), [(0.3, 0.5), (0.6, 0.0), (0.1, 0.9), (1, 0.3)])
def test_holitom_is_its_description(keep, tau):
    steps = [noise(7, 10, 6, seed) for seed in range(3)]
    clips = [torch.cat([step[:1], step[:1] + (0.3 + 0.1 * i) * step[1:].cumsum(0)]) for i, step in enumerate(steps)]
    gets = noise(7, 10, 3, 9).abs().permute(2, 0, 1)
    found = vtok.HoliTom(keep=keep, tau=tau).select(seen(*clips, encoder={("encoder_attention", -1): gets}))
    for i, x in enumerate(clips):
        expected = slow_holitom(x, gets[i], keep if isinstance(keep, float) else keep / 70, tau, 0.6)
        assert found.keep[i].nonzero().flatten().tolist() == sorted(expected)
        rows = torch.stack([expected[at] for at in sorted(expected)])
        torch.testing.assert_close(found.features[i][found.keep[i]], rows, atol=1e-5, rtol=1e-5)
        assert found.keep[i][found.merged_into[i][found.merged_into[i] >= 0]].all()


# ---- odd clips -------------------------------------------------------------------------------------------------------
def test_a_still_clip():
    x = noise(1, 10).expand(6, -1, -1)
    of_clip, _ = vidcom2.commonness(x[None])
    assert vidcom2.frame_counts(of_clip, 0.4, 0.01).tolist() == [[4] * 6]
    assert [len(row) for row in kept(vtok.VidCom2(keep=0.4), x)] == [4] * 6
    gets = {("encoder_attention", -1): noise(6, 10, 1, 5).abs().squeeze(2)[None]}
    assert [len(row) for row in kept(vtok.HoliTom(keep=0.1), x, encoder=gets)] == [6, 0, 0, 0, 0, 0]
    assert kept(vtok.EVS(keep=0.4), x) == [[*range(10)], [*range(10)], [*range(4)], [], [], []]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_features_that_are_no_numbers(name, bad):
    x = noise(4, 6)
    x[1, 2], x[3] = bad, bad
    method = compressors.build(name, keep=0.5)
    found = method.select(seen(x, encoder=shown_to(method, 4, 6)))
    count = method.count(frames_of(4, 1, 6))
    assert found.keep.sum() == count if count is not None else 0 < found.keep.sum() <= 24


@pytest.mark.parametrize("name", NAMES)
def test_frames_of_other_sizes_are_refused(name):
    method = compressors.build(name)
    unequal = Layout((Plane(2, 3, "frame"), Plane(3, 2, "frame")), modality="video")
    crops = Layout((Plane(2, 2, "thumbnail"), Plane(2, 4, "crops", crop_grid=(1, 2), crop_shape=(2, 2))))
    for layout, complaint in ((unequal, r"different sizes: \(2, 3\), \(3, 2\)"), (crops, "no frames")):
        with pytest.raises(Unsupported, match=complaint):
            method.select(VisualTokens(torch.zeros(1, layout.n, 4), layout))


@pytest.mark.parametrize("name", NAMES)
def test_families_without_clips_are_refused(name):
    for family in ("llava", "llava_next", "internvl"):
        with pytest.raises(Unsupported, match="frames"):
            vtok.patch(tiny(family)[0], name)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_a_clip_of_one_frame(name):
    model, processor = tiny("qwen2_5_vl")
    with vtok.patch(model, name, keep=0.5) as patch:
        for one in (picture(112, 112), clip(112, 112, frames=2)):  # two pictures of a clip are one frame of Qwen's
            run(model, batch(processor, ["# what?"], [one]))
            assert patch.trace.n_visual == [16]
            assert patch.trace.n_kept == [16 if name in ("evs", "frames") else 8]

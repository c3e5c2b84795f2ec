"""Methods for clips against golden numbers and slow rewrites from the formulas; and what they make of odd clips."""

import math

import numpy as np
import pytest
import torch
from contract import batch, clip, picture, run, tiny

import vtok
from vtok import compressor as compressors
from vtok.compressors import evs, vidcom2
from vtok.errors import Unsupported
from vtok.types import Layout, Plane, VisualTokens

NAMES = [name for name, cls in compressors.load_all().items() if "frames" in cls.needs]


def frames_of(t, rows=4, cols=4):
    return Layout((Plane(rows, cols, "frame"),) * t, modality="video")


def golden():
    """[8, 16, 8]: a cut between frames 3 and 4, and one token that changes in each frame."""
    t, p, j = torch.meshgrid(*(torch.arange(n).double() for n in (8, 16, 8)), indexing="ij")
    return torch.sin(0.7 * p + 1.3 * j + 0.19 * p * j + 0.05 * t + 2 * (t >= 4) + 1.5 * (p == t)).float()


def noise(t, p, d=6, seed=0):
    return torch.randn(t, p, d, generator=torch.Generator().manual_seed(seed))


def seen(*clips, layout=None, **fields):
    """Clips [T, P, D] of one size, as a method sees them."""
    t, p, _ = clips[0].shape
    return VisualTokens(torch.stack(clips).flatten(1, 2), layout or frames_of(t, 1, p), **fields)


def kept(method, x, **fields):
    """The places that stay, frame by frame, of one clip [T, P, D]."""
    keep = method.select(seen(x, **fields)).keep.view(x.shape[:2])
    return [row.nonzero().flatten().tolist() for row in keep]


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


# ---- odd clips -------------------------------------------------------------------------------------------------------
def test_a_still_clip():
    x = noise(1, 10).expand(6, -1, -1)
    of_clip, _ = vidcom2.commonness(x[None])
    assert vidcom2.frame_counts(of_clip, 0.4, 0.01).tolist() == [[4] * 6]
    assert [len(row) for row in kept(vtok.VidCom2(keep=0.4), x)] == [4] * 6
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


def shown_to(method, t, p, seed=0):
    """What a method reads of the encoder, at random."""
    layers = method.encoder_layers.items()
    return {(need, at[0]): noise(t, p, 1, seed).abs().squeeze(2)[None] for need, at in layers}


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

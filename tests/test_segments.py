"""FlashVID and FastVID, and the segments that both cut clips into, against golden numbers and slow rewrites."""

import math
from itertools import pairwise

import pytest
import torch
from clips import attention, frames_of, golden, kept, noise, seen, slow_clusters
from contract import batch, clip, run, tiny

import vtok
from vtok.compressors import flashvid
from vtok.density import clusters
from vtok.segments import Segments, transitions
from vtok.views import unit

RECEIVED = ("encoder_attention", -1)


def shown(x, **how):
    return seen(x, layout=frames_of(8), encoder={RECEIVED: attention()}, **how)


def places(mask):
    return [row.nonzero().flatten().tolist() for row in mask]


# ---- golden numbers --------------------------------------------------------------------------------------------------
def test_golden_segments():
    similar = transitions(golden()[None])[0].tolist()
    assert similar == pytest.approx([0.5805, 0.2389, 0.1500, -0.7175, 0.3349, 0.5753, 0.6643], abs=1e-4)
    assert Segments.of(golden()[None], 0.0, 1).length.tolist() == [[4] * 8]
    assert Segments.of(golden()[None], 0.0, 3).length.tolist() == [[3, 3, 3, 1, 4, 4, 4, 4]]
    assert Segments.of(golden()[None], -1.0, 99).length.tolist() == [[1] * 8]


def test_golden_attended_and_diverse():
    x, gets = golden()[None], attention()
    by_attention = [[0, 2, 7, 8], [0, 1, 6, 13], [0, 6, 12, 13], [0, 6, 12, 13], [0, 6, 13, 14], [5, 11, 13, 14]]
    by_attention += [[4, 6, 11, 12], [0, 4, 5, 11]]
    assert places(flashvid.diverse(x, gets, 4)[0]) == by_attention
    order = flashvid.farthest_points(x[0], 4, gets[0])
    assert order[[0, 4]].tolist() == [[2, 7, 0, 8], [0, 13, 6, 14]]
    product = flashvid.relevance(x, Segments.of(x, -1.0, 1))
    assert (product == 0).any()  # the smallest in the released code is -0.065
    by_event = [[0, 2, 5, 11], [1, 5, 11, 12], [1, 5, 11, 12], [1, 5, 11, 12], [0, 8, 14, 15], [0, 8, 9, 14]]
    by_event += [[0, 6, 9, 14], [0, 4, 7, 9]]
    assert places(flashvid.diverse(x, gets * product, 4)[0]) == by_event


def test_golden_trees():
    x = golden()[None]
    every, whole = torch.ones(1, 8, 16, dtype=torch.bool), Segments.of(x, -1.0, 1)
    root = flashvid.trees(unit(x), every, whole, 0.8, 16)[0]
    remain = (root == torch.arange(128)).view(8, 16)
    assert remain.sum(1).tolist() == [16, 1, 1, 1, 5, 1, 1, 1]
    assert places(remain)[1:5] == [[0], [1], [2], [0, 1, 2, 4, 10]]


@pytest.mark.parametrize(("keep", "counts"), [(0.25, [7, 5, 5, 5, 7, 5, 5, 5]), (0.5, None)])
def test_golden_flashvid(keep, counts):
    """The released code gives 44 of 128 for a plan of 40, and 81 for 80."""
    method = vtok.FlashVIDMerge(keep=keep * 1.25, segments=1, segment_tau=0.0)
    found = method.select(shown(golden())).keep[0].view(8, 16)
    if counts is None:
        assert found.sum() == 81
    else:
        assert found.sum(1).tolist() == counts
        # frames of one mean, whose place random numbers choose there: left out
        whole = places(found)
        assert whole[2] == [0, 1, 6, 12, 13] and whole[3] == [0, 2, 6, 12, 13] and whole[6] == [4, 5, 6, 11, 12]


def test_golden_clusters_of_flashvid():
    """The released code divides a root by one more than its children, whatever hangs below these. With such numbers in
    place of means the centres are its own, and so is the sum of all features."""
    x, gets = golden()[None], attention()
    chosen, segments = flashvid.diverse(x, gets, 4), Segments.of(x, 0.0, 1)
    root = flashvid.trees(unit(x), ~chosen, segments, 0.8, 11)[0]
    flat, index, free = x[0].flatten(0, 1), torch.arange(128), ~chosen[0]
    is_root = (root == index).view(8, 16) & free
    children = torch.zeros(128)
    for frame in range(1, 8):
        similar = (unit(x)[0, frame] @ unit(x)[0, frame - 1].mT).masked_fill(~free[frame - 1], -torch.inf)
        for place in range(16):
            if free[frame, place] and not is_root[frame, place]:
                children[(frame - 1) * 16 + similar[place].argmax()] += 1
    sums = torch.stack([flat[root == i].sum(0) for i in range(128)])
    rows = (sums / (1 + children)[:, None]).view(8, 16, 8)
    total = flat[chosen.flatten()].sum()
    for frame, centres in zip(range(8), [[6, 12, 13], None, None, None, [5, 7, 10], None, None, None]):
        at = is_root[frame].nonzero().flatten()
        centre = at[clusters(rows[frame, at], 3 if centres else 1)]
        if centres:
            assert sorted(set(centre.tolist())) == centres
        total += sum(rows[frame, at][centre == one].mean(0).sum() for one in centre.unique())
    assert total.item() == pytest.approx(1.0658, abs=1e-4)


def test_golden_fastvid():
    found = kept(vtok.FastVID(keep=0.25, segments=2, tau=0.0), golden(), encoder={RECEIVED: attention()})
    assert [len(row) for row in found] == [3, 3, 3, 7, 3, 3, 3, 7]
    assert found[:4] == [[0, 7, 14], [0, 7, 14], [0, 6, 13], [3, 6, 9, 11, 12, 13, 14]]


# ---- slow rewrites ---------------------------------------------------------------------------------------------------
def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=-1).item()


def slow_segments(x, tau, least):
    """The frames of each segment of a clip [T, P, D]."""
    mean = x.mean(1)
    similar = [cosine(a, b) for a, b in pairwise(mean)]
    cuts = [i for i, s in enumerate(similar) if s < tau]
    others = sorted((i for i in range(len(similar)) if i not in cuts), key=lambda i: similar[i])
    cuts = sorted(cuts + others[: max(0, least - 1 - len(cuts))])
    ends = [-1, *cuts, len(x) - 1]
    return [list(range(a + 1, z + 1)) for a, z in pairwise(ends)]


def slow_flashvid(x, gets, method):
    """{place: row} of a clip [T, P, D]; gets: [T, P]."""
    p = x.shape[1]
    m = math.ceil(p * method.keep - 1e-9)
    attended, out = math.ceil(m * method.alpha - 1e-9), {}
    for frames in slow_segments(x, method.segment_tau, method.segments):
        mean = x[frames].mean((0, 1))
        chosen = {}
        for f in frames:
            far = lambda a, b, f=f: 1 - cosine(x[f, a], x[f, b])
            w = [gets[f, j].item() * (max(0.0, (x[f, j] @ mean).item()) if method.event else 1.0) for j in range(p)]
            picks = [max(range(p), key=lambda j: w[j] * min([far(j, i) for i in range(p) if i != j], default=1.0))]
            while len(picks) < attended:
                left = [j for j in range(p) if j not in picks]
                picks.append(max(left, key=lambda j: w[j] * min(far(j, i) for i in picks)))
            chosen[f] = picks = picks[:attended]
            out |= {f * p + j: x[f, j] for j in picks}
        free = {f: [j for j in range(p) if j not in chosen[f]] for f in frames}
        links = []  # similarity, token, parent
        for f in frames[1:]:
            for j in free[f] if free[f - 1] else ():
                best = max(free[f - 1], key=lambda i: cosine(x[f, j], x[f - 1, i]))
                links.append((cosine(x[f, j], x[f - 1, best]), (f, j), (f - 1, best)))
        links = sorted((one for one in links if one[0] > method.tau), key=lambda one: (-one[0], one[1]))
        parent = {token: above for _, token, above in links[: len(frames) * (p - m)]}
        trees = {(f, j): [] for f in frames for j in free[f] if (f, j) not in parent}
        for f in frames:
            for j in free[f]:
                root = (f, j)
                while root in parent:
                    root = parent[root]
                trees[root].append(x[f, j])
        for f in frames:
            roots = [root for root in trees if root[0] == f]
            rows = [torch.stack(trees[root]).mean(0) for root in roots]
            n = min(len(roots), math.ceil(len(roots) * (m - attended) * len(frames) / max(1, len(trees)) - 1e-9))
            centres, of = slow_clusters(torch.stack(rows), n) if n else ((), ())
            for c in centres:
                out[f * p + roots[c][1]] = torch.stack([row for row, o in zip(rows, of) if o == c]).mean(0)
    return out


def drifting(seed, t=7, p=10):
    steps = noise(t, p, 6, seed)
    return torch.cat([steps[:1], steps[:1] + (0.2 + 0.1 * seed) * steps[1:].cumsum(0)])


CASES = [
    {"keep": 0.4},
    {"keep": 0.4, "tau": 0.3, "segments": 2, "segment_tau": 0.0},
    {"keep": 0.7, "tau": -1.0, "segments": 1, "segment_tau": -1.0},  # more links than the plan leaves room for
    {"keep": 0.6, "alpha": 0.0, "tau": 0.5, "segments": 1, "segment_tau": -1.0},
    {"keep": 0.3, "alpha": 1.0},
    {"keep": 0.3, "segments": 99, "event": True},
    {"keep": 0.5, "tau": 0.2, "segments": 1, "segment_tau": 0.2, "event": True},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize(("t", "p"), [(7, 10), (1, 9), (5, 1)])
def test_flashvid_is_its_description(t, p, options):
    clips, gets = [drifting(seed, t, p) for seed in range(3)], noise(t, p, 3, 9).abs().permute(2, 0, 1)
    method = vtok.FlashVIDMerge(**options)
    against(method, clips, gets, [slow_flashvid(x, one, method) for x, one in zip(clips, gets)])


def slow_fastvid(x, gets, method):
    p = x.shape[1]
    n = max(1, math.floor(p * method.keep + 1e-9))
    context = math.floor(n * method.context + 1e-9)
    out = {}
    for frames in slow_segments(x, method.tau, method.segments):
        anchors = frames[:: -method.every]  # the last one first
        targets = dict.fromkeys(frames, 0)
        for i in range(context * len(frames)):
            targets[anchors[i % len(anchors)]] += 1
        targets = {f: min(c, p - n + context) for f, c in targets.items()}
        attended = dict.fromkeys(frames, n - context)
        others = [f for f in frames if f not in anchors]
        for i in range(context * len(frames) - sum(targets.values())):
            attended[others[i % len(others)]] += 1
        centres, rest = [], []
        for f in frames:
            order = sorted(range(p), key=lambda j: -gets[f, j].item())
            out |= {f * p + j: x[f, j] for j in order[: attended[f]]}
            left = sorted(order[attended[f] :])
            best, _ = slow_clusters(x[f, left], targets[f], k=4) if left and targets[f] else ((), ())
            centres += [(f, left[c]) for c in best]
            rest += [(f, j) for j in left if (f, j) not in centres]
        members = {c: [x[c]] for c in centres}
        for token in rest if centres else ():
            members[max(centres, key=lambda c: cosine(x[token], x[c]))].append(x[token])
        for c, rows in members.items():
            w = max(method.beta, 1 / (len(rows) + 1))
            out[c[0] * p + c[1]] = w * x[c] + (1 - w) * torch.stack(rows).mean(0)
    return out


FAST = [
    {"keep": 0.4},
    {"keep": 0.4, "segments": 2, "tau": -1.0},
    {"keep": 0.5, "segments": 1, "tau": -1.0, "every": 3, "beta": 0.1},
    {"keep": 0.9, "segments": 1, "tau": -1.0, "context": 0.7},  # more targets than their frames have tokens
    {"keep": 0.7, "segments": 1, "tau": 0.2, "every": 1},
    {"keep": 0.6, "context": 1.0},
    {"keep": 0.3, "context": 0.0},
]


@pytest.mark.parametrize("options", FAST)
@pytest.mark.parametrize(("t", "p"), [(7, 10), (1, 9), (5, 1), (9, 6)])
def test_fastvid_is_its_description(t, p, options):
    clips, gets = [drifting(seed, t, p) for seed in range(3)], noise(t, p, 3, 9).abs().permute(2, 0, 1)
    method = vtok.FastVID(**options)
    found = against(method, clips, gets, [slow_fastvid(x, one, method) for x, one in zip(clips, gets)])
    assert found.n_kept == method.count(frames_of(t, 1, p)) == t * max(1, math.floor(p * method.keep + 1e-9))


def against(method, clips, gets, expected):
    found = method.select(seen(*clips, encoder={RECEIVED: gets}))
    for keep, features, into, slow in zip(found.keep, found.features, found.merged_into, expected):
        assert keep.nonzero().flatten().tolist() == sorted(slow)
        rows = torch.stack([slow[at] for at in sorted(slow)])
        torch.testing.assert_close(features[keep], rows, atol=1e-5, rtol=1e-5)
        assert keep[into[into >= 0]].all()
    return found


# ---- odd clips -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["flashvid_merge", "fastvid"])
@pytest.mark.parametrize("kind", ["still", "one colour", "black"])
def test_clips_without_change(name, kind):
    """Frames that are equal, and tokens that are: of ties the earlier."""
    x = {"still": noise(1, 12).expand(6, -1, -1), "one colour": torch.ones(6, 12, 6), "black": torch.zeros(6, 12, 6)}
    method = vtok.compressor.build(name, keep=0.5)
    for gets in (torch.ones(1, 6, 12), torch.zeros(1, 6, 12)):
        found = method.select(seen(x[kind], encoder={RECEIVED: gets}))
        assert found.keep.view(6, 12).any(1)[0] and found.features.isfinite().all()
        if name == "fastvid":
            assert found.keep.sum() == 36
        else:  # segments of 1, 1, 1 and 3 frames, or cut elsewhere by rounding
            assert 5 * 6 <= found.keep.sum() <= 7 * 6
        if kind != "still":
            torch.testing.assert_close(found.features[found.keep], x[kind].flatten(0, 1)[: int(found.keep.sum())])


def test_flashvid_in_the_decoder():
    """More enter than `keep`, and fewer leave: of four layers three see all of them."""
    model, processor = tiny("qwen2_5_vl")
    inputs = batch(processor, ["# what?"], [clip(112, 112, frames=8)])
    counts = {}
    for method in (vtok.FlashVIDMerge(keep=0.5), vtok.FlashVID(keep=0.4)):
        with vtok.patch(model, method) as patch:
            run(model, inputs)
            counts[method.name] = [sum(patch.trace.n_kept_at(layer)) for layer in range(4)]
    entering = counts["flashvid_merge"][0]
    assert counts == {"flashvid_merge": [entering] * 4, "flashvid": [entering] * 3 + [math.floor(entering * 0.3)]}
    for budget in (0.3, 0.6, 0.99):
        before, inside = vtok.FlashVID().with_budget(budget, 30).parts()
        assert before.keep * (21 + 0.3 * 9) / 30 == pytest.approx(min(budget, 0.79))
        assert inside.schedule(30) == {20: 0.3}
    assert vtok.FlashVID().with_budget(0.25, 28).keep == pytest.approx(0.25)
    assert all(part.is_identity for part in vtok.FlashVID(keep=1.0).parts())

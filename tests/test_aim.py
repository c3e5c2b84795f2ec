"""AIM: merging against a slow rewrite, published lengths and counts, and what must not mix."""

import math

import pytest
import torch
from contract import batch, picture, tiny

import vtok
from vtok.compressors.aim import AIM, AIMMerge, AIMPrune, merge
from vtok.errors import InvalidValue
from vtok.kernels.pagerank import pagerank
from vtok.types import Attention, Layout, Plane, VisualTokens, keep_count


def slow_merge(x, count, weighting):
    """One sequence [t, D], one token at a time: {place: (feature, members)}."""
    alive = [(i, x[i].double(), 1, [i]) for i in range(len(x))]
    while len(alive) > count:
        r = min(len(alive) // 2, len(alive) - count)
        even, odd = alive[::2], alive[1::2]
        unit = lambda v: v / max(float(v.norm()), 1e-12)
        best = []
        for e, (_, feature, _, _) in enumerate(even):
            values = [float(unit(feature) @ unit(other[1])) for other in odd]
            best.append((-max(values), e, values.index(max(values))))
        best.sort()
        moves = {e: o for _, e, o in best[:r]}
        merged = []
        for o, (place, feature, weight, members) in enumerate(odd):
            parts = [(feature, weight, members)] + [even[e][1:] for e in sorted(moves) if moves[e] == o]
            w = [p[1] if weighting == "size" else 1 for p in parts]
            mean = sum(p[0] * wi for p, wi in zip(parts, w)) / sum(w)
            merged.append((place, mean, sum(p[1] for p in parts), [m for p in parts for m in p[2]]))
        alive = sorted([e for i, e in enumerate(even) if i not in moves] + merged, key=lambda token: token[0])
    return {place: (feature, members) for place, feature, _, members in alive}


@pytest.mark.parametrize("weighting", ["plain", "size"])
@pytest.mark.parametrize(("t", "count"), [(8, 4), (8, 2), (9, 3), (16, 5), (7, 6), (5, 1), (1, 1), (6, 6)])
def test_merge_against_the_slow_rewrite(t, count, weighting):
    x = torch.randn(3, t, 5)
    alive, features, into, _ = merge(x, count, weighting)
    for b in range(3):
        expected = slow_merge(x[b], count, weighting)
        assert alive[b].nonzero().squeeze(1).tolist() == sorted(expected)
        for place, (feature, members) in expected.items():
            torch.testing.assert_close(features[b, place], feature.float(), atol=1e-5, rtol=1e-5)
            assert sorted((into[b] == place).nonzero().squeeze(1).tolist()) == sorted(members)


def slow_official(x, count):
    """The groups of one sequence [t, D] as the released code's two functions make them, written anew: behind a round
    come first the even tokens without a partner, most similar first, then the odd ones; one list of members each."""
    alive = [(x[i].double(), [i]) for i in range(len(x))]
    most = len(x)
    while len(alive) > count:
        most = max(1, most // 2)
        r = min(most, len(alive) // 2, len(alive) - count)
        unit = torch.stack([feature / feature.norm() for feature, _ in alive])
        odd = range(1, len(alive), 2)
        similar = (unit @ unit.T).tolist()
        best = [(max(odd, key=similar[e].__getitem__), e) for e in range(0, len(alive), 2)]
        ranked = sorted(((similar[e][o], o, e) for o, e in best), reverse=True)
        ranked = [(o, e) for _, o, e in ranked]
        merged, rest = ranked[:r], ranked[r:]
        after = [alive[e] for _, e in rest]
        for o in odd:
            joined = [alive[o]] + [alive[e] for target, e in merged if target == o]
            mean = sum(feature for feature, _ in joined) / len(joined)
            after.append((mean, [m for _, members in joined for m in members]))
        alive = after
    return {frozenset(members): feature for feature, members in alive}


@pytest.mark.parametrize(("t", "count"), [(8, 4), (9, 3), (27, 7), (27, 14), (25, 6), (13, 3), (6, 6)])
def test_official_merges_what_the_released_code_merges(t, count):
    differs = False
    for seed in range(4):
        x = torch.randn(2, t, 5, generator=torch.Generator().manual_seed(seed))
        alive, features, into, _ = merge(x, count, official=True)
        for b in range(2):
            expected = slow_official(x[b], count)
            groups = {
                frozenset((into[b] == p).nonzero().flatten().tolist()): p for p in alive[b].nonzero().flatten().tolist()
            }
            assert groups.keys() == expected.keys()
            for members, place in groups.items():
                torch.testing.assert_close(features[b, place], expected[members].float(), atol=1e-5, rtol=1e-5)
        differs |= not torch.equal(into, merge(x, count)[2])
    assert differs == ((t, count) not in ((8, 4), (27, 14), (6, 6)))  # where all that is left is odd, order is raster


def test_official_counts():
    """729 tokens at a quarter: 364, then 182, and one for the exact count."""
    x = torch.randn(1, 729, 4)
    assert int(merge(x, 182, official=True)[0].sum()) == 182
    assert AIM(official=True).parts()[0].official and not AIM().parts()[0].official


def test_a_full_halving_is_a_plain_mean():
    x = torch.randn(1, 6, 4)
    x[0, 2], x[0, 4] = x[0, 1] * 2, x[0, 1] * 3  # both go to token 1
    x[0, 0] = x[0, 5] * 0.5
    alive, features, *_ = merge(x, 3)
    assert alive[0].tolist() == [False, True, False, True, False, True]
    torch.testing.assert_close(features[0, 1], (x[0, 1] + x[0, 2] + x[0, 4]) / 3)
    torch.testing.assert_close(features[0, 5], (x[0, 5] + x[0, 0]) / 2)


def test_published_lengths():
    """Rounds of t0 // 2^i: a round halves what is left, rounding up."""
    for lengths in ([196, 98, 49, 25, 13, 7, 4], [143, 72, 37], [169, 85, 43], [729, 365, 183]):
        t0 = lengths[0]
        left = t0
        for i, expected in enumerate(lengths[1:], 1):
            left -= min(t0 // 2**i, left // 2)
            assert left == expected
            assert merge(torch.randn(1, t0, 3), left)[0].sum() == left
    assert AIMMerge(keep=0.25).select(clip(32, 14, 14)).n_kept == 32 * 49
    one = VisualTokens(torch.randn(1, 576, 4), Layout((Plane(24, 24),)))
    assert AIMMerge(keep=252).select(one).n_kept == 252  # LLaVA-1.5's 43.75 %
    assert keep_count(576, 0.4375) == 252


def clip(frames, rows, cols, b=1, width=4, seed=0):
    layout = Layout((Plane(rows, cols, "frame"),) * frames, modality="video")
    features = torch.randn(b, layout.n, width, generator=torch.Generator().manual_seed(seed))
    return VisualTokens(features, layout)


def test_frames_never_mix():
    tokens = clip(3, 3, 4, b=2)
    selection = AIMMerge(keep=0.3).select(tokens)
    changed = tokens.features.clone()
    changed[:, 12:24] = torch.randn(2, 12, 4)
    other = AIMMerge(keep=0.3).select(VisualTokens(changed, tokens.layout))
    for part in (slice(0, 12), slice(24, 36)):
        assert torch.equal(selection.keep[:, part], other.keep[:, part])
        assert torch.equal(selection.features[:, part], other.features[:, part])
    frame = torch.arange(36) // 12
    assert torch.equal(frame[selection.merged_into], frame.expand(2, -1))
    assert (selection.keep.view(2, 3, 12).sum(2) == 3).all()
    assert selection.keep.gather(1, selection.merged_into).all()


def test_planes_of_different_sizes():
    layout = Layout((Plane(2, 2, "thumbnail"), Plane(3, 5, "crops"), Plane(2, 2, "frame")))
    features = torch.randn(2, layout.n, 4)
    selection = AIMMerge(keep=0.5).select(VisualTokens(features, layout))
    for start, size, count in ((0, 4, 2), (4, 15, 7), (19, 4, 2)):
        part = slice(start, start + size)
        alive, merged, into, _ = merge(features[:, part], count)
        assert torch.equal(selection.keep[:, part], alive)
        torch.testing.assert_close(selection.features[:, part], merged)
        assert torch.equal(selection.merged_into[:, part], into + start)


def test_degenerate_features():
    for x in (torch.ones(2, 9, 3), torch.zeros(2, 9, 3), torch.full((2, 9, 3), torch.nan)):
        alive, features, into, _ = merge(x, 4)
        assert (alive.sum(1) == 4).all()
        assert alive.gather(1, into).all()
        torch.testing.assert_close(features[alive], x[alive], equal_nan=True)


@pytest.mark.parametrize("weighting", ["plain", "size"])
def test_half_precision_is_rounded_once(weighting):
    x = torch.randn(2, 512, 8).bfloat16()
    alive, features, into, _ = merge(x, 8, weighting)
    exact = merge(x.float(), 8, weighting)
    assert torch.equal(alive, exact[0])
    assert torch.equal(into, exact[2])
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, exact[1].bfloat16())


def test_autocast_merges_the_same():
    tokens = clip(2, 6, 6, b=2)
    outside = AIMMerge(keep=0.3).select(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        inside = AIMMerge(keep=0.3).select(tokens)
    assert torch.equal(inside.keep, outside.keep)
    assert torch.equal(inside.features, outside.features)


def test_a_count_is_shared_by_the_planes():
    layout = Layout((Plane(2, 2, "thumbnail"), Plane(3, 4, "crops"), Plane(2, 2, "frame")))
    tokens = VisualTokens(torch.randn(2, layout.n, 4), layout)
    for keep, counts in ((5, [1, 3, 1]), (10, [2, 6, 2]), (2, [0, 1, 1]), (1000, [4, 12, 4])):
        selection = AIMMerge(keep=keep).select(tokens)
        parts = selection.keep.split([4, 12, 4], 1)
        if keep == 2:
            counts = [int(part[0].sum()) for part in parts]  # which of two equal planes goes is `share`'s business
            assert sum(counts) == 2
        assert [part.sum(1).tolist() for part in parts] == [[count, count] for count in counts]
        gone = selection.merged_into < 0
        assert torch.equal(gone, torch.cat([torch.full((2, n), c == 0) for n, c in zip([4, 12, 4], counts)], 1))


def test_a_picture_of_one_token():
    tokens = VisualTokens(torch.randn(2, 1, 4), Layout((Plane(1, 1),)))
    for keep in (0.1, 1, 7):
        selection = AIMMerge(keep=keep).select(tokens)
        assert selection.keep.all()
        assert torch.equal(selection.features, tokens.features)


def test_gradient_reaches_every_source():
    x = torch.randn(1, 8, 3, requires_grad=True)
    alive, features, *_ = merge(x, 2)
    features[alive].sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()
    torch.testing.assert_close(x.grad.sum(), torch.tensor(2.0 * 3))  # two means of three channels
    tokens = VisualTokens(torch.randn(1, 9, 3, requires_grad=True), Layout((Plane(3, 3),)))
    selection = AIMMerge(keep=1).select(tokens)
    selection.features[selection.keep].sum().backward()
    assert (tokens.features.grad.abs().sum(-1) > 0).all()


def test_published_schedule():
    """14 to 22 of 28 layers, 26 visual and 14 other tokens: 36, 33, 30, 27, 23, 20, 17, 14 after layers 14 to 21."""
    schedule = AIMPrune().schedule(28)
    assert list(schedule) == list(range(14, 22))
    assert [14 + int(26 * r + 1e-9) for r in schedule.values()] == [36, 33, 30, 27, 23, 20, 17, 14]
    assert AIMPrune(start=13, end=21).layers(32) == (13, 21)
    assert AIMPrune().layers(56) == (28, 44)
    assert AIMPrune(start=3, end=4).schedule(28) == {3: 0.0}
    for start, end in ((3, 3), (0.5, 0.5), (0.6, 0.5), (15, 0.5)):
        with pytest.raises(InvalidValue, match="must come after"):
            AIMPrune(start=start, end=end).schedule(28)
    for n_layers in range(1, 65):  # also where both fractions round to one layer
        schedule = AIMPrune().schedule(n_layers)
        assert min(schedule) == round(n_layers / 2)
        assert list(schedule.values())[-1] == 0.0
        assert list(schedule.values()) == sorted(schedule.values(), reverse=True)


def test_score_hands_its_options_on():
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    valid, anchor = torch.ones(2, 9, dtype=torch.bool), torch.tensor([8, 5])
    valid[0, :2] = False
    options = {"tau": 0.5, "iters": 3, "damping": 0.2, "head_reduce": "mean"}
    score = AIMPrune(**options).score(Attention(query, key, 0.35, valid, valid, anchor))
    assert torch.equal(score, pagerank(query, key, 0.35, valid, anchor, **options))
    assert not torch.equal(score, pagerank(query, key, 0.35, valid, anchor))
    part = AIM(keep=0.5, weighting="size", start=1, end=2, **options).parts()
    assert part == (AIMMerge(keep=0.5, weighting="size"), AIMPrune(start=1, end=2, **options))


def test_votes_of_the_instruction_are_the_score_of_schedule():
    torch.manual_seed(1)
    query, key, valid = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    anchor, instruction = torch.tensor([8, 7]), torch.tensor([[6, 7, 8], [-1, 6, 7]])
    attention = Attention(query, key, 0.35, valid, valid, anchor, instruction)
    guided = AIMPrune(votes="instruction").score(attention)
    assert torch.equal(guided, vtok.Schedule().score(attention))
    assert not torch.equal(guided.argsort(1), AIMPrune().score(attention).argsort(1))
    assert AIM(votes="instruction").parts()[1].votes == "instruction"


def test_counts_on_a_model_of_28_layers():
    import transformers as T

    from vtok.adapters.llava import LlavaAdapter

    torch.manual_seed(0)
    model, processor = LlavaAdapter().tiny(layers=28, hidden=32)
    assert isinstance(model, T.LlavaForConditionalGeneration)
    inputs = batch(processor, ["a # What colour is it?"], [picture(56, 56)])
    text = inputs["input_ids"].shape[1] - 16
    with vtok.patch(model.eval(), "aim_prune") as patch, torch.no_grad():
        model(**inputs, use_cache=True)
    counts = patch.trace.counts()["compressed"][0]
    expected = [16] * 15 + [int(16 * (1 - i / 8)) for i in range(1, 9)] + [0] * 5
    assert [n - text for n in counts] == expected


def test_budgets():
    for n_layers, budget in ((8, 0.2), (28, 0.5), (32, 0.05)):
        moved = AIM().with_budget(budget, n_layers)
        assert moved.keep * AIMPrune.mean_keep(moved, n_layers) == pytest.approx(budget)
    assert AIM().with_budget(0.9, 28).keep == 1.0  # the schedule alone is within it
    for budget in (0.2, 0.4, 0.6, 0.99):
        moved = AIMPrune().with_budget(budget, 28)
        later = AIMPrune(start=moved.start + 1, end=moved.end + 1)
        assert moved.mean_keep(28) <= budget < later.mean_keep(28)
        assert moved.end - moved.start == 8
    assert AIMPrune().with_budget(1.0, 28).mean_keep(28) == 1.0
    assert AIMPrune(start=0, end=4).mean_keep(8) == pytest.approx((1 + 0.75 + 0.5 + 0.25) / 8)
    with pytest.raises(InvalidValue, match="Merge before"):
        AIMPrune().with_budget(0.02, 28)


@pytest.mark.parametrize(
    "options",
    [
        *({"start": -1}, {"start": "a"}, {"start": math.nan}, {"end": 1.5}, {"end": True}, {"end": None}),
        *({"tau": 0}, {"tau": "x"}, {"tau": math.inf}, {"iters": 0}, {"iters": 2.5}, {"iters": True}),
        *({"damping": -0.1}, {"damping": None}, {"head_reduce": "max"}, {"anchor": "x"}),
    ],
)
def test_options_are_checked(options):
    for cls in (AIMPrune, AIM):
        with pytest.raises(InvalidValue, match=next(iter(options))):
            cls(**options)
    with pytest.raises(InvalidValue, match="weighting"):
        AIM(weighting="median")


def test_a_schedule_has_no_keep():
    model, _ = tiny("llava")
    with pytest.raises(InvalidValue, match="no option keep"):
        vtok.patch(model, "aim_prune", keep=0.5)

"""SparseVLM against numbers that the official functions gave (float64 inputs) and a slow rewrite from the formula."""

import math
from itertools import pairwise

import pytest
import torch
from clips import slow_clusters
from contract import batch, picture, run, tiny
from golden import WORDS, X

import vtok
from vtok.compressors.sparsevlm import raters, recycled
from vtok.errors import InvalidValue
from vtok.types import Attention, Entered, ranks


def entered(words=WORDS, pads=0):
    """Two tokens of the system, 16 visual ones, the words; in poisoned memory."""
    rows = [torch.full((pads, 8), torch.nan), torch.ones(2, 8), X, words]
    start, length = pads + 18, pads + 18 + len(words)
    visual = torch.zeros(1, length, dtype=torch.bool)
    visual[0, pads + 2 : start] = True
    return Entered(torch.cat(rows)[None], visual, torch.arange(start, length)[None])


def attention(pads=0, heads=2, shift=1.0):
    """Logits sin(0.3 i + 0.5 j + shift h) between queries i and keys j, pads on the left that hold no number."""
    i, h = torch.arange(21.0), torch.arange(float(heads))[:, None]
    angle = 0.3 * i + shift * h
    query = torch.stack([angle.sin(), angle.cos()], -1)  # [H, 21, 2]
    key = torch.stack([(0.5 * i).cos(), (0.5 * i).sin()], -1).expand(heads, -1, -1)
    pad = lambda x: torch.cat([torch.full((heads, pads, 2), torch.nan), x], 1)[None]
    seen = entered(pads=pads)
    valid = torch.arange(21 + pads)[None] >= pads
    anchor = torch.tensor([20 + pads])
    return Attention(pad(query), pad(key), 1.0, valid, seen.visual, anchor, seen.instruction, None, [10], seen)


def share(words):
    """z of each word, one element at a time."""
    total = [0.0] * len(words)
    for token in X.double():
        weights = [math.exp(float(token @ word)) for word in words.double()]
        total = [t + w / sum(weights) / 16 for t, w in zip(total, weights)]
    return total


def test_golden_raters():
    assert share(WORDS) == pytest.approx([0.349952, 0.317990, 0.332058], abs=1e-6)
    assert raters(entered()).tolist() == [[True, False, False]]
    more = torch.cat([WORDS, 2 * X[3:6]])
    z = share(more)
    assert raters(entered(more)).tolist() == [[value > sum(z) / len(z) for value in z]]


def test_golden_scores():
    seen = attention()
    score = vtok.SparseVLM().score(seen)[0, 2:18]
    torch.testing.assert_close(score[:4], torch.tensor([0.064515, 0.081632, 0.088059, 0.080713]), atol=1e-6, rtol=0)
    assert (ranks(score) < 10).nonzero().squeeze(1).tolist() == [*range(6), *range(12, 16)]
    torch.testing.assert_close(vtok.SparseVLM().score(attention(pads=3))[0, 5:21], score)


def test_one_word_and_equal_words_all_rate():
    assert raters(entered(WORDS[:1])).tolist() == [[True]]
    assert raters(entered(WORDS[:1].expand(3, -1))).tolist() == [[True] * 3]
    some = entered(torch.cat([10 * X[:1], WORDS]))
    some = Entered(some.embeds, some.visual, torch.tensor([[-1, 19, 20, 21]]))
    assert raters(some).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize(("heads", "count"), [(0.01, 1), (0.44, 2), (0.75, 3)])
def test_the_heads_that_look_at_the_picture(heads, count):
    seen = attention(heads=4)
    logits = seen.query[0] @ seen.key[0].mT
    rows = logits[:, 18, :19].softmax(-1)  # [H, 19] of the one rater
    best = rows[:, 2:18].sum(1).argsort(descending=True)[:count]
    got = vtok.SparseVLM(heads=heads).score(seen)[0, 2:18]
    torch.testing.assert_close(got, rows[best, 2:18].mean(0))
    assert not torch.allclose(got, vtok.SparseVLM().score(seen)[0, 2:18], atol=1e-4)


def test_published_counts():
    """576 tokens, 32 layers: behind layers 2, 6 and 15, and what enters the layers in the mean."""
    method = vtok.SparseVLM()
    assert {i: method.remaining(576, rate, 1) for i, rate in method.schedule(32).items()} == {2: 300, 6: 200, 15: 118}
    for rates, entering in (
        ((300, 200, 118), 206.8),
        ((238, 108, 60), 144.1),
        ((246, 54, 28), 113.9),
        ((66, 34, 20), 81.8),
    ):
        method = vtok.SparseVLM(rates=tuple(n / 576 for n in rates))
        assert sum(method.rates_at(32)) / 32 * 576 == pytest.approx(entering, abs=0.06)


def test_schedules_of_other_depths_and_budgets():
    assert list(vtok.SparseVLM().schedule(28)) == [2, 5, 13] and list(vtok.SparseVLM().schedule(4)) == [0, 1, 2]
    assert vtok.SparseVLM().schedule(1) == {} and len(vtok.SparseVLM().schedule(2)) == 1
    for budget in (0.2, 0.5, 0.9):
        assert sum(vtok.SparseVLM().with_budget(budget, 32).rates_at(32)) / 32 == pytest.approx(budget)
    with pytest.raises(InvalidValue, match="leaves next to nothing"):
        vtok.SparseVLM().with_budget(0.1, 32)
    with pytest.raises(InvalidValue, match="cannot be met"):
        vtok.SparseVLM(keep=0.05).schedule(32)
    with pytest.raises(InvalidValue, match="rates must be 3 fractions from the largest down"):
        vtok.SparseVLM(rates=(0.2, 0.3, 0.1))


def test_raters_stay_the_same_while_tokens_go(monkeypatch):
    """Behind each layer the visual tokens that entered the first say who rates."""
    model, processor = tiny("llava")
    seen = []
    score = vtok.SparseVLM.score
    monkeypatch.setattr(vtok.SparseVLM, "score", lambda self, a: seen.append(a) or score(self, a))
    prompts = ["a # What colour is it?", "two # and # yes"]
    inputs = batch(processor, prompts, [picture(70, 112, i) for i in range(3)])
    with vtok.patch(model, [vtok.DivPrune(keep=0.75), vtok.SparseVLM()]) as patch:
        run(model, inputs)
    assert [a.visual.sum(1).tolist() for a in seen] == [[12, 24], [6, 12], [4, 8]]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    for a in seen:
        assert a.entered.visual.sum(1).tolist() == [12, 24]
        assert torch.equal(raters(a.entered), raters(seen[0].entered))
        for b, places in enumerate(patch.trace.positions_at(0)):
            words = a.instruction[b] >= 0
            assert torch.equal(words, a.entered.instruction[b] >= 0)
            columns = a.entered.instruction[b][words] - (a.entered.embeds.shape[1] - len(places))
            assert torch.equal(a.entered.embeds[b][a.entered.instruction[b][words]], embeds[b, places[columns]])
    assert (seen[2].instruction[0] >= 0).sum() > 3


# ---- recycling -----------------------------------------------------------------------------------------------------
def test_published_counts_of_recycling():
    """v1.5 of the released code keeps 300, 200 and 110 of 576, and what it makes of the rest comes beside them."""
    assert [recycled(576, 309), recycled(309, 204), recycled(204, 113)] == [(300, 83, 9), (200, 33, 4), (110, 29, 3)]
    for kept, left in (((303, 110, 36), (312, 117, 39)), ((66, 30, 17), (82, 32, 18))):  # for 128 and for 64
        assert [recycled(n, m)[0] for n, m in pairwise((576, *left))] == list(kept)
    assert recycled(10, 0) == (0, 0, 0) and recycled(10, 10) == (10, 0, 0) and recycled(5, 1) == (0, 2, 1)
    for there in range(1, 120):
        for remaining in range(1, there):
            kept, pool, merged = recycled(there, remaining)
            assert kept + merged == remaining and merged <= pool <= there - kept


def test_recycling_is_its_description():
    hidden, lengths = torch.randn(2, 60, 5, generator=torch.Generator().manual_seed(0)), (52, 40)
    score, rank = torch.rand(2, 60, generator=torch.Generator().manual_seed(1)), torch.full((2, 60), 60)
    for b, n in enumerate(lengths):  # visual tokens from the fourth on
        rank[b, 3 : 3 + n] = ranks(score[b, 3 : 3 + n])
    remaining = [12, 39]
    into = vtok.SparseVLM(recycle=True).join(hidden, rank, lengths, remaining)
    for b, n in enumerate(lengths):
        kept = max(k for k in range(remaining[b] + 1) if k + (int(0.3 * (n - k)) + 1) // 10 + 1 <= remaining[b])
        order = (3 + score[b, 3 : 3 + n].argsort(descending=True)).tolist()
        pool = order[kept : kept + int(0.3 * (n - kept)) + 1]
        _, of = slow_clusters(hidden[b, pool], remaining[b] - kept, k=remaining[b] - kept)
        expected = dict.fromkeys(range(60), -1) | {i: i for i in order[:kept]}
        expected |= {i: pool[c] for i, c in zip(pool, of)}
        assert dict(enumerate(into[b].tolist())) == expected
        assert len(set(into[b].tolist()) - {-1}) == remaining[b]
    assert (vtok.SparseVLM().join(hidden, rank, lengths, remaining) >= 0).sum(1).tolist() == remaining


@pytest.mark.parametrize("prompts", [["# What colour is it?"], ["a # What colour is it?", "# and # yes"]])
def test_recycled_tokens_are_means(prompts):
    """What enters a layer is the mean of what the layer before gave; the contract has the rest of the forward."""
    model, processor = tiny("qwen2_5_vl")
    layers = model.model.language_model.layers
    inputs = batch(processor, prompts, [picture(224, 224, i) for i in range("".join(prompts).count("#"))])
    seen = {}
    with vtok.patch(model, "sparsevlm", recycle=True, rates=(0.5, 0.3, 0.1)) as patch:
        layers[0].register_forward_hook(lambda module, args, out: seen.update(left=out))
        layers[1].register_forward_pre_hook(
            lambda module, args, kw: seen.update(entered=(*args, *kw.values())[0]), with_kwargs=True
        )
        run(model, inputs)
        trace = patch.trace
    shares = [sum(trace.n_kept_at(i)) / sum(trace.n_visual) for i in range(4)]
    assert shares == pytest.approx([1, 0.5, 0.3, 0.1], abs=0.02)
    assert [trace.joined_at(i) is None for i in range(4)] == [True, False, False, False]
    left, entered = (trace.rows_at(i).restore(seen[key], trace.length) for i, key in enumerate(("left", "entered")))
    merged = 0
    for b, into in enumerate(trace.joined_at(1)):
        for place in trace.positions_at(1)[b].tolist():
            members = left[b, into == place] if place in into else left[b, place, None]
            torch.testing.assert_close(entered[b, place], members.mean(0))
            merged += len(members) > 1
    assert merged > 0
    assert not vtok.SparseVLM(recycle=True).replays and vtok.SparseVLM().replays

"""Greedy coverage and greedy DPP against the definitions, in float64 and a candidate at a time."""

import pytest
import torch

from vtok.kernels import greedy_coverage as coverage
from vtok.kernels import greedy_dpp as dpp
from vtok.kernels.greedy_coverage import greedy_coverage
from vtok.kernels.greedy_dpp import greedy_dpp


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smooth(n):
    """Tokens that change slowly from one to the next, [n, 8]."""
    i, j = torch.arange(n)[:, None], torch.arange(8)
    return torch.sin(0.03 * i * (j + 1) + 1.3 * j)


def cosines(x):
    unit = x / x.norm(dim=-1, keepdim=True)
    return unit @ unit.mT


def slow_coverage(covers, k, weight=None, valid=None):
    """By the definition; strict comparison, so the lower index wins ties. covers [N, R] -> list of k."""
    n = len(covers)
    covers, weight = covers.double(), [1.0] * n if weight is None else weight.tolist()
    covered, picks = torch.zeros(covers.shape[1], dtype=torch.double), []
    while len(picks) < k:
        score = {
            v: weight[v] * float((covers[v] - covered).clamp(min=0).sum()) if valid is None or valid[v] else -1.0
            for v in range(n)
            if v not in picks
        }
        picks.append(max(score, key=score.get))
        covered = torch.maximum(covered, covers[picks[-1]])
    return picks


def slow_dpp(x, k, quality=None):
    """The pick is the one whose determinant with those before it is the largest. Within the rank."""
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    unit = unit if quality is None else unit * quality.double()[:, None]
    kernel, picks = unit @ unit.T, []
    while len(picks) < k:
        left = [v for v in range(len(x)) if v not in picks]
        picks.append(max(left, key=lambda v: torch.linalg.det(kernel[[*picks, v]][:, [*picks, v]])))
    return picks


# ---- coverage -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize(("n", "r"), [(1, 4), (2, 1), (33, 33), (60, 20)])
def test_coverage(monkeypatch, block, n, r):
    monkeypatch.setattr(coverage, "BLOCK", block)
    covers, weight, valid = draw(3, n, r, seed=n), draw(3, n, seed=1).abs(), draw(3, n, seed=2) < 0.7
    for k in {1, n // 3, n}:
        assert greedy_coverage(covers, k).tolist() == [slow_coverage(c, k) for c in covers]
        picks = greedy_coverage(covers, k, weight, valid)
        assert picks.tolist() == [slow_coverage(*case, *more) for case, more in
                                  zip(((c, k) for c in covers), zip(weight, valid))]  # fmt: skip


@pytest.mark.parametrize("block", [3, 32])
@pytest.mark.parametrize("kind", ["noise", "smooth", "corners"])
def test_lazy_is_exact(monkeypatch, block, kind):
    """Not only nearly: a bound that were rounded below the score would change a pick."""
    monkeypatch.setattr(coverage, "BLOCK", block)
    x = {"noise": draw(300, 8), "smooth": smooth(300), "corners": draw(300, 4).sign()}[kind]
    covers, weight, valid = cosines(x)[None], draw(1, 300, seed=1).abs(), draw(1, 300, seed=2) < 0.8
    for given in ((torch.ones(1, 300), torch.ones_like(valid)), (weight, valid)):
        assert torch.equal(coverage.coverage_picks(covers, *given, 300), coverage._full(covers, *given, 300))


def test_lazy_scores_few_again(monkeypatch):
    scored, select = [], torch.index_select
    monkeypatch.setattr(torch, "index_select", lambda x, d, i, out: scored.append(len(i)) or select(x, d, i, out=out))
    greedy_coverage(cosines(smooth(576))[None], 64)
    assert 0 < sum(scored) < 0.2 * 64 * 576


def test_coverage_ties_and_nothing_to_gain():
    whole = torch.randint(-1, 3, (40, 5), generator=torch.Generator().manual_seed(0)).float()
    assert greedy_coverage(whole[None], 40)[0].tolist() == slow_coverage(whole, 40)
    assert greedy_coverage(torch.ones(1, 9, 9), 4)[0].tolist() == [0, 1, 2, 3]
    valid = torch.arange(9)[None] > 5
    assert greedy_coverage(torch.ones(1, 9, 9), 5, valid=valid)[0].tolist() == [6, 7, 8, 0, 1]
    assert greedy_coverage(-torch.ones(1, 9, 9), 3)[0].tolist() == [0, 1, 2]
    assert greedy_coverage(torch.ones(0, 9, 9), 3).shape == (0, 3)
    assert greedy_coverage(torch.ones(2, 9, 9), 0).shape == (2, 0)


# ---- determinants -------------------------------------------------------------------------------------------------
@pytest.fixture(params=[2**26, 1000], ids=["matrix", "rows"])
def cache(request, monkeypatch):
    """Room for all of L, or for none: a row is then made for each pick."""
    monkeypatch.setattr(dpp, "CACHE", request.param)


@pytest.mark.parametrize("n", [1, 2, 33, 60])
def test_determinants(n, cache):
    x, quality = draw(3, n, 12, seed=n), draw(3, n, seed=1).abs()
    for k in {1, min(n, 5), min(n, 11)}:
        assert greedy_dpp(x, k, quality).tolist() == [slow_dpp(v, k, q) for v, q in zip(x, quality)]


def test_without_quality_the_first_token_is_first(cache):
    """All have the length 1, so the choice is by index; rounding must not make it."""
    x = draw(5, 40, 12)
    picks = greedy_dpp(x, 9)
    assert picks[:, 0].tolist() == [0] * 5
    better = torch.ones(5, 40).index_fill(1, torch.tensor(7), 1.001)
    assert greedy_dpp(x, 9, better)[:, 0].tolist() == [7] * 5
    assert picks.tolist() == [slow_dpp(v, 9, 1 + 1e-6 * (torch.arange(40) == 0)) for v in x]


def test_where_the_rank_runs_out(cache):
    """Fast greedy MAP as published divides by the root of a number below 0 there, and picks one token again."""
    x, quality = draw(2, 40, 8), draw(2, 40, seed=1).abs()
    picks = greedy_dpp(x, 40, quality)
    assert picks.sort(1).values.tolist() == [list(range(40))] * 2
    assert picks[:, :8].tolist() == [slow_dpp(v, 8, q) for v, q in zip(x, quality)]
    for row, q in zip(picks, quality):
        assert (q[row[8:]].diff() <= 0).all()  # the rest by quality
    assert greedy_dpp(torch.ones(1, 40, 4), 4)[0].tolist() == [0, 1, 2, 3]


def test_length_and_broken_features_do_not_count(cache):
    x = draw(1, 40, 8)
    scale = 2.0 ** torch.randint(-8, 8, (1, 40, 1))
    assert torch.equal(greedy_dpp(x * scale, 12), greedy_dpp(x, 12))
    x[0, 3], x[0, 5], x[0, 6, 1] = 0, torch.nan, torch.inf
    picks = greedy_dpp(x, 40)[0].tolist()
    assert sorted(picks) == list(range(40)) and sorted(picks[-3:]) == [3, 5, 6]


def test_autocast_and_batches(cache):
    x, quality = draw(4, 40, 8), draw(4, 40, seed=1).abs()
    plain = greedy_dpp(x, 8, quality)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(greedy_dpp(x, 8, quality), plain)
    assert torch.equal(plain, torch.cat([greedy_dpp(v[None], 8, q[None]) for v, q in zip(x, quality)]))
    assert greedy_dpp(x, 0).shape == (4, 0) and greedy_dpp(x[:0], 3).shape == (0, 3)

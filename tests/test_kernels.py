"""Kernels against slow rewrites from the formulas."""

import math

import pytest
import torch

from vtok.kernels.attention_rows import attention_rows
from vtok.kernels.bipartite_match import bipartite_match
from vtok.kernels.pagerank import pagerank


def heads(b=2, h=4, groups=2, n=11, d=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda k: torch.randn(b, k, n, d, generator=generator).to(dtype)
    return draw(h), draw(groups)


def softmax(values):
    top = max(values)
    weights = [math.exp(v - top) for v in values]
    return [w / sum(weights) for w in weights]


def slow_row(query, key, scaling, valid, b, h, row, past=0, tau=1.0, upto=None):
    """The softmax of one query over the valid keys before it, by hand; {key index: weight}."""
    group = h // (query.shape[1] // key.shape[1])
    seen = [j for j in range(row + 1) if valid[b, j] and j >= past and (upto is None or j <= upto)]
    q = query[b, h, row - (key.shape[2] - query.shape[2])].double()
    return dict(zip(seen, softmax([float(q @ key[b, group, j].double()) * scaling / tau for j in seen])))


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_rows(past, dtype):
    query, key = heads(dtype=dtype)
    query = query[:, :, past:]
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, :2] = False
    rows = torch.tensor([[10, 5], [7, 4]])
    got = attention_rows(query, key, rows, 0.3, valid)
    assert got.shape == (2, 4, 2, 11)
    assert got.dtype == torch.float32
    for b in range(2):
        for h in range(4):
            for i, row in enumerate(rows[b].tolist()):
                expected = torch.zeros(11)
                for j, w in slow_row(query, key, 0.3, valid, b, h, row).items():
                    expected[j] = w
                torch.testing.assert_close(got[b, h, i], expected, atol=1e-5, rtol=1e-4)


def slow_pagerank(query, key, scaling, valid, anchor, tau, iters, damping, reduce):
    b, h, q, _ = query.shape
    length = key.shape[2]
    past = length - q
    score = torch.zeros(b, length)
    for s in range(b):
        part = [j for j in range(past, length) if valid[s, j] and j <= anchor[s]]
        per_head = []
        for head in range(h):
            matrix = {i: slow_row(query, key, scaling, valid, s, head, i, past, tau, int(anchor[s])) for i in part}
            u = dict.fromkeys(part, 1 / len(part))
            for _ in range(iters):
                new = dict.fromkeys(part, damping / len(part))
                for i in part:
                    for j, w in matrix[i].items():
                        new[j] += (1 - damping) * u[i] * w
                u = new
            per_head.append(u)
        for j in part:
            values = [u[j] for u in per_head]
            score[s, j] = math.sqrt(sum(v * v for v in values) / h) if reduce == "rms" else sum(values) / h
    return score


@pytest.mark.parametrize("options", [{}, {"damping": 0.15}, {"head_reduce": "mean", "tau": 1.0, "iters": 2}])
@pytest.mark.parametrize("past", [0, 4])
def test_pagerank(options, past):
    query, key = heads(seed=1)
    query = query[:, :, past:]
    valid = torch.ones(2, 11, dtype=torch.bool)
    valid[0, :5] = False
    valid[1, 9:] = False
    anchor = torch.tensor([10, 7])
    full = {"tau": 0.1, "iters": 5, "damping": 0.0, "head_reduce": "rms"} | options
    expected = slow_pagerank(query, key, 0.35, valid, anchor, *full.values())
    got = pagerank(query, key, 0.35, valid, anchor, **options)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    assert (got[0, :5] == 0).all()
    assert (got[1, 8:] == 0).all()


def test_pagerank_blocks_and_memory(monkeypatch):
    query, key = heads(n=37, seed=2)
    valid, anchor = torch.ones(2, 37, dtype=torch.bool), torch.tensor([36, 30])
    whole = pagerank(query, key, 0.35, valid, anchor)
    torch.testing.assert_close(pagerank(query, key, 0.35, valid, anchor, block=5), whole)
    monkeypatch.setattr("vtok.kernels.pagerank.CACHE", 0)  # nothing is kept between iterations
    torch.testing.assert_close(pagerank(query, key, 0.35, valid, anchor, block=5), whole)


def test_pagerank_padding_changes_nothing():
    query, key = heads(b=1, n=9, seed=3)
    valid = torch.ones(1, 9, dtype=torch.bool)
    plain = pagerank(query, key, 0.35, valid, torch.tensor([8]))
    pad = torch.nn.functional.pad
    left = pagerank(
        pad(query, (0, 0, 4, 0), value=torch.nan),
        pad(key, (0, 0, 4, 0), value=torch.nan),
        0.35,
        pad(valid, (4, 0)),
        torch.tensor([12]),
    )
    torch.testing.assert_close(left[:, 4:], plain)
    right = pagerank(
        pad(query, (0, 0, 0, 4), value=9.0),
        pad(key, (0, 0, 0, 4), value=9.0),
        0.35,
        pad(valid, (0, 4)),
        torch.tensor([8]),
    )
    torch.testing.assert_close(right[:, :9], plain)


def test_pagerank_depends_on_the_prompt_alone():
    query, key = heads(n=12, seed=4)
    anchor, valid = torch.tensor([7, 7]), torch.ones(2, 12, dtype=torch.bool)
    prompt = pagerank(query[:, :, :8], key[:, :, :8], 0.35, valid[:, :8], anchor)
    torch.testing.assert_close(pagerank(query, key, 0.35, valid, anchor)[:, :8], prompt)


@pytest.mark.parametrize("t", [1, 2, 5, 8, 9])
def test_bipartite_match(t):
    metric = torch.randn(3, t, 6)
    for r in range(t // 2 + 1):
        source, target = bipartite_match(metric, r)
        assert source.shape == target.shape == (3, r)
        for b in range(3):
            unit = torch.nn.functional.normalize(metric[b].double(), dim=-1)
            best = []
            for i in range(0, t, 2):
                values = [float(unit[i] @ unit[j]) for j in range(1, t, 2)]
                if values:
                    best.append((-max(values), i, 2 * values.index(max(values)) + 1))
            best.sort()
            assert source[b].tolist() == [i for _, i, _ in best[:r]]
            assert target[b].tolist() == [j for _, _, j in best[:r]]


def test_bipartite_match_ties_zeros_and_blocks(monkeypatch):
    source, target = bipartite_match(torch.ones(1, 7, 3), 3)
    assert source.tolist() == [[0, 2, 4]]
    assert target.tolist() == [[1, 1, 1]]
    zero = torch.randn(1, 6, 3)
    zero[0, 2] = 0
    source, _ = bipartite_match(torch.cat([zero, zero.abs()], 0), 3)
    assert sorted(source[1].tolist()) == [0, 2, 4]
    assert source[1, -1] == 2  # similar to nothing
    assert bipartite_match(torch.full((1, 4, 2), torch.nan), 2)[0].tolist() == [[0, 2]]
    metric = torch.randn(2, 21, 4)
    whole = bipartite_match(metric, 6)
    monkeypatch.setattr("vtok.kernels.bipartite_match.BLOCK", 3)
    assert all(torch.equal(a, b) for a, b in zip(bipartite_match(metric, 6), whole))

"""Kernels against slow rewrites from the formulas."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vtok.kernels.attention_rows import attention_rows
from vtok.kernels.bipartite_match import bipartite_match
from vtok.kernels.pagerank import pagerank
from vtok.kernels.tree_attention import tree_attention


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


class Made(TorchDispatchMode):
    """Notes how many values each new tensor has, and the most that were there at once; views are none."""

    def __enter__(self):
        self.sizes, self.peak, self.alive = [], 0, []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor) and made.untyped_storage()._cdata not in old:
                self.sizes.append(made.numel())
                self.alive = [ref for ref in self.alive if ref() is not None] + [weakref.ref(made)]
                self.peak = max(self.peak, sum(ref().numel() for ref in self.alive))
        return out


# room for all heads, for both groups one after the other, for three heads, for one head, for none
@pytest.mark.parametrize("fits", [12, 6, 3, 1, 0])
@pytest.mark.parametrize("block", [1, 5, 37, 1000])
def test_pagerank_of_any_block_and_memory(monkeypatch, fits, block):
    query, key = heads(h=12, groups=2, n=37, seed=2)
    valid, anchor = torch.ones(2, 37, dtype=torch.bool), torch.tensor([36, 30])
    valid[1, :3] = False
    for reduce in ("rms", "mean"):
        whole = pagerank(query, key, 0.35, valid, anchor, head_reduce=reduce)
        with monkeypatch.context() as patched:
            for name in ("CACHE", "ALONE"):
                patched.setattr(f"vtok.kernels.pagerank.{name}", fits * (2 * 37 * 37 // 2))
            patched.setattr("vtok.kernels.pagerank.BLOCK", block)
            got = pagerank(query, key, 0.35, valid, anchor, head_reduce=reduce)
        torch.testing.assert_close(got, whole, atol=1e-6, rtol=1e-4)


def test_pagerank_makes_neither_the_matrix_nor_repeated_keys(monkeypatch):
    query, key = heads(b=1, h=8, groups=1, n=96, d=32)
    valid, anchor = torch.ones(1, 96, dtype=torch.bool), torch.tensor([95])
    monkeypatch.setattr("vtok.kernels.pagerank.BLOCK", 8)
    for name in ("CACHE", "ALONE"):
        monkeypatch.setattr(f"vtok.kernels.pagerank.{name}", 0)
    with Made() as made:
        pagerank(query, key, 0.35, valid, anchor)
    assert max(made.sizes) == 96 * 32  # the queries or keys of one head
    for name in ("CACHE", "ALONE"):
        monkeypatch.setattr(f"vtok.kernels.pagerank.{name}", 8 * 96 * 96 // 2)
    with Made() as made:
        pagerank(query, key, 0.35, valid, anchor)
    assert max(made.sizes) == 8 * 96 * 32  # the queries of all heads, times the scale and masked
    assert made.sizes.count(8 * 96 * 32) == 2
    query, key = query[..., :2].contiguous(), key[..., :2].contiguous()
    for name, value in (("CACHE", 0), ("ALONE", 0), ("BLOCK", 1)):
        monkeypatch.setattr(f"vtok.kernels.pagerank.{name}", value)
    with Made() as made:
        pagerank(query, key, 0.35, valid, anchor)
    assert made.peak < 96 * 96 // 2  # one head's triangle
    with Made() as made:
        attention_rows(query, key, anchor[:, None], 0.35, valid)
    assert max(made.sizes) == 8 * 96  # the answer


def test_pagerank_hands_all_of_itself_on():
    """Each head's ranks sum to one, and under causality drain towards the first token."""
    query, key = heads(b=3, n=40, seed=5)
    valid, anchor = torch.ones(3, 40, dtype=torch.bool), torch.tensor([39, 20, 39])
    valid[2, :7] = False
    for options in ({}, {"damping": 0.3}, {"iters": 1}):
        score = pagerank(query, key, 0.35, valid, anchor, head_reduce="mean", **options)
        torch.testing.assert_close(score.sum(1), torch.ones(3))
    flat = pagerank(torch.zeros_like(query), key, 0.35, valid, anchor)
    assert (flat[0].diff() < 0).all()
    assert flat[0].argmax() == 0
    assert flat[2].argmax() == 7


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_pagerank_with_shared_keys(groups):
    query, key = heads(groups=groups, seed=6)
    valid, anchor = torch.ones(2, 11, dtype=torch.bool), torch.tensor([10, 10])
    repeated = pagerank(query, key.repeat_interleave(4 // groups, 1), 0.35, valid, anchor)
    torch.testing.assert_close(pagerank(query, key, 0.35, valid, anchor), repeated)


def test_pagerank_of_one_token():
    query, key = heads(n=1)
    one = torch.ones(2, 1, dtype=torch.bool)
    assert pagerank(query, key, 0.35, one, torch.zeros(2, dtype=torch.long)).tolist() == [[1.0], [1.0]]
    nothing = pagerank(query, key, 0.35, ~one, torch.zeros(2, dtype=torch.long))
    assert nothing.tolist() == [[0.0], [0.0]]


def test_huge_logits():
    """Logits over tau beyond what half precision and the masks of transformers can hold."""
    query, key = heads(n=9, seed=7)
    valid, anchor = torch.ones(2, 9, dtype=torch.bool), torch.tensor([8, 8])
    valid[0, :3] = False
    score = pagerank(query * 1e4, key * 1e4, 0.35, valid, anchor)
    assert score.isfinite().all()
    assert (score[0, :3] == 0).all()


def test_autocast_does_not_reach_in():
    """A trainer's autocast must not choose other tokens than the rollout did."""
    query, key = heads(n=40, seed=8)
    valid, anchor = torch.ones(2, 40, dtype=torch.bool), torch.tensor([39, 30])
    metric = torch.randn(2, 60, 16)
    calls = (
        lambda: pagerank(query, key, 0.35, valid, anchor),
        lambda: attention_rows(query, key, anchor[:, None], 0.35, valid),
        lambda: torch.stack(bipartite_match(metric, 20)),
    )
    for call in calls:
        outside = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), outside)


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


def test_attention_rows_padding_changes_nothing():
    query, key = heads(b=1, n=9, seed=6)
    valid, pad = torch.ones(1, 9, dtype=torch.bool), torch.nn.functional.pad
    plain = attention_rows(query, key, torch.tensor([[8, 3]]), 0.35, valid)
    padded = attention_rows(
        pad(query, (0, 0, 4, 2), value=torch.nan),
        pad(key, (0, 0, 4, 2), value=torch.nan),
        torch.tensor([[12, 7]]),
        0.35,
        pad(valid, (4, 2)),
    )
    torch.testing.assert_close(padded[..., 4:-2], plain)
    assert (padded[..., :4] == 0).all() and (padded[..., -2:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_dtype_comes_in_and_fp32_decides(dtype):
    query, key = heads(dtype=dtype, seed=10)
    valid, anchor = torch.ones(2, 11, dtype=torch.bool), torch.tensor([10, 8])
    ranked = pagerank(query.requires_grad_(), key, 0.35, valid, anchor)
    assert ranked.dtype == torch.float32 and not ranked.requires_grad
    torch.testing.assert_close(ranked, pagerank(query.float(), key.float(), 0.35, valid, anchor))
    rows = attention_rows(query, key, anchor[:, None], 0.35, valid)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, attention_rows(query.float(), key.float(), anchor[:, None], 0.35, valid))
    metric = torch.randn(4, 201, 4, generator=torch.Generator().manual_seed(11)).to(dtype)  # near ties in 16 bits
    for got, expected in zip(bipartite_match(metric, 80), bipartite_match(metric.float(), 80)):
        assert torch.equal(got, expected)


def test_pagerank_depends_on_the_prompt_alone():
    query, key = heads(n=12, seed=4)
    anchor, valid = torch.tensor([7, 7]), torch.ones(2, 12, dtype=torch.bool)
    prompt = pagerank(query[:, :, :8], key[:, :, :8], 0.35, valid[:, :8], anchor)
    torch.testing.assert_close(pagerank(query, key, 0.35, valid, anchor)[:, :8], prompt)


@pytest.mark.parametrize("t", [1, 2, 5, 8, 9, 60])
def test_bipartite_match(t):
    metric = torch.randn(3, t, 6)
    for r in {0, min(1, t // 2), t // 3, t // 2}:
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
    assert source[1, -1] == 2  # a cosine of 0, below all of positive features
    for value in (torch.nan, torch.inf, 1e-30):  # as if zero; the squares of the last one vanish
        metric = zero.abs()
        metric[0, 2] = value
        metric[0, 5] = value
        source, target = bipartite_match(metric, 3)
        assert source[0, -1] == 2
        assert 5 not in target[0]
    assert bipartite_match(torch.full((1, 4, 2), torch.nan), 2)[0].tolist() == [[0, 2]]
    metric = torch.randn(2, 21, 4)
    whole = bipartite_match(metric, 6)
    monkeypatch.setattr("vtok.kernels.bipartite_match.BLOCK", 3)
    assert all(torch.equal(a, b) for a, b in zip(bipartite_match(metric, 6), whole))


def slow_tree(query, key, value, tree, scaling, valid, b, h, i):
    """What one draft sees, by hand: the valid cached columns, and of the drafts those that the tree says."""
    group, n = h // (query.shape[1] // key.shape[1]), len(tree)
    past = key.shape[2] - n
    cached = [j for j in range(past) if valid is None or valid.expand(len(key), key.shape[1], -1)[b, group, j]]
    seen = cached + [past + j for j in range(n) if tree[i, j]]
    weights = softmax([float(query[b, h, i].double() @ key[b, group, j].double()) * scaling for j in seen])
    return sum(w * value[b, group, j].double() for w, j in zip(weights, seen))


@pytest.mark.parametrize("padded", [None, "rows", "groups"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tree_attention(padded, dtype, monkeypatch):
    """Several blocks of the cache, one of them all padding; values of another width than keys."""
    monkeypatch.setattr("vtok.kernels.tree_attention.BLOCK", 4)
    generator = torch.Generator().manual_seed(0)
    draw = lambda k, n, d: torch.randn(2, k, n, d, generator=generator).to(dtype)
    query, key, value = draw(6, 4, 8), draw(2, 15, 8), draw(2, 15, 5)
    tree = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
    valid = None
    if padded:
        valid = torch.rand(2, 2, 11, generator=generator) < 0.6
        valid[0, 1] = False
        valid[1, :, :4] = False
        valid = valid[:, 0] if padded == "rows" else valid
    shown = valid if padded != "rows" else valid[:, None]
    got = tree_attention(query, key, value, tree, 0.3, valid)
    assert got.shape == (2, 6, 4, 5) and got.dtype == dtype
    for b in range(2):
        for h in range(6):
            for i in range(4):
                expected = slow_tree(query, key, value, tree, 0.3, shown, b, h, i).to(dtype)
                torch.testing.assert_close(got[b, h, i], expected, atol=1e-5, rtol={2: 8e-3, 4: 1e-5}[dtype.itemsize])


def test_tree_attention_behind_nothing():
    query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    chain = torch.ones(3, 3, dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(tree_attention(query, key, value, chain, 0.5), expected)

"""Triton kernels against their torch twins. `test_triton.py` runs this file in a process of its own, under Triton's
interpreter on the CPU, and on a GPU where there is one."""

import os

import pytest
import torch

from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.kernels.attention_rows import attention_rows
from vtok.kernels.bipartite_match import best_partners, bipartite_match
from vtok.kernels.bipartite_match_triton import best_partners as triton_partners
from vtok.kernels.compact_sequence import compact_sequence
from vtok.kernels.compact_sequence_triton import BLOCKS
from vtok.kernels.farthest_points import farthest_points
from vtok.kernels.greedy_coverage import greedy_coverage
from vtok.kernels.greedy_dpp import greedy_dpp
from vtok.kernels.merge import merge
from vtok.kernels.pagerank import pagerank
from vtok.kernels.redundancy_counts import redundancy_counts
from vtok.kernels.sparse_ffn import ACTIVATIONS, gather_neurons, gathered_ffn, sparse_ffn
from vtok.kernels.tree_attention import tree_attention

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
FULL, HALF, BRAIN = DTYPES = torch.float32, torch.float16, torch.bfloat16


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def inside(x):
    """The same values as a view into memory that is NaN all around them."""
    frame = torch.full([n + 3 for n in x.shape], torch.nan, device=x.device).to(x.dtype)
    view = frame[tuple(slice(1, n + 1) for n in x.shape)]
    return view.copy_(x)


def both(function, *args):
    return function(*args, backend="torch"), function(*args, backend="triton")


# ---- bipartite_match --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("t", "width", "protected", "dtype"),
    [(2, 5, 0, FULL), (3, 33, 1, HALF), (150, 37, 0, BRAIN), (67, 64, 2, HALF), (150, 40, 3, FULL), (35, 8, 5, BRAIN)],
)
def test_matches(t, width, protected, dtype):
    metric = inside(draw(2, t, width, seed=t, dtype=dtype))
    metric[1, t // 2] = 0
    for r in {0, (t - protected) // 2}:
        torch_, triton = both(bipartite_match, metric, r, protected)
        assert torch.equal(torch_[0], triton[0]) and torch.equal(torch_[1], triton[1])
        assert triton[0].dtype == triton[1].dtype == torch.long


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_matches(dtype):
    metric = draw(2, 50, 37, seed=1, dtype=dtype)
    torch.testing.assert_close(triton_partners(metric, 1, 0)[0], best_partners(metric, 1, 0)[0], atol=1e-6, rtol=1e-5)


def test_equal_matches_go_to_the_lower_index():
    """Corners of a cube: cosines are exact, and most are equal, within a block of columns and between blocks."""
    metric = torch.randint(0, 2, (1, 300, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2.0 - 1
    torch_, triton = both(bipartite_match, metric, 140, 3)
    assert torch.equal(torch_[0], triton[0]) and torch.equal(torch_[1], triton[1])
    source, target = bipartite_match(torch.ones(1, 300, 4, device=DEVICE), 150, backend="triton")
    assert source[0].tolist() == list(range(0, 300, 2)) and target[0].tolist() == [1] * 150


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf, 1e-30, 3e38])
def test_matches_with_broken_tokens(value):
    """A cosine of 0 with them, whatever they hold, below all of one sample and above all of the other; protected ones
    are not even compared."""
    metric = draw(2, 41, 8, seed=2).abs()
    metric[1, 1::2] *= -1
    metric[:, 4], metric[:, 7, 3], metric[:, 0], metric[:, 1] = value, value, torch.nan, torch.nan
    torch_, triton = both(bipartite_match, metric, 19, 2)
    assert torch.equal(torch_[0], triton[0]) and torch.equal(torch_[1], triton[1])
    if value not in (0.0, 1e-30):  # one such value makes no broken token
        assert triton[0][1].tolist() == list(range(2, 40, 2)) and triton[1][1].tolist() == [7, 3] + [7] * 17


# ---- attention --------------------------------------------------------------------------------------------------
# batch, heads, groups, queries, keys, width: plain; grouped, odd everywhere, a past; more keys than a part; one of all
SHAPES = [(2, 2, 2, 16, 16, 16), (2, 6, 2, 70, 83, 20), (1, 2, 1, 40, 200, 8), (1, 1, 1, 1, 1, 3)]
CASES = pytest.mark.parametrize(
    ("shape", "dtype"), [*zip(SHAPES, (FULL, HALF, BRAIN, FULL)), (SHAPES[1], BRAIN), (SHAPES[1], FULL)]
)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    """Two blocks of keys a part from 193 keys on: more than one part, and more than one block in it."""
    monkeypatch.setattr("vtok.kernels.attention_rows_triton.SPLITS", 2)


def attention(shape, dtype, seed=0):
    """Queries and keys in poisoned memory, padding on the left, in the middle and on the right, itself poisoned."""
    batch, heads, groups, queries, length, width = shape
    query, key = draw(batch, heads, queries, width, seed=seed), draw(batch, groups, length, width, seed=seed + 1)
    valid = torch.ones(batch, length, dtype=torch.bool, device=DEVICE)
    if length > 9:
        valid[0, :3], valid[-1, 5:7], valid[-1, -2:] = False, False, False
    key[(~valid)[:, None].expand(-1, groups, -1)] = torch.nan
    query[(~valid)[:, None, length - queries :].expand(-1, heads, -1)] = torch.nan
    return inside(query.to(dtype)), inside(key.to(dtype)), valid


def some_rows(valid, queries, count):
    """[B, count] places of queries, in no order and some of them twice."""
    places = [row.nonzero().squeeze(1) for row in valid.cpu()]
    places = [p[p >= valid.shape[1] - queries] for p in places]
    pick = lambda p: p[torch.randint(len(p), (count,), generator=torch.Generator().manual_seed(count))]
    return torch.stack([pick(p) for p in places]).to(DEVICE)


@CASES
def test_rows(shape, dtype):
    query, key, valid = attention(shape, dtype)
    for count in (1, 12):
        rows = some_rows(valid, shape[3], count)
        torch_, triton = both(attention_rows, query, key, rows, 0.7, valid)
        torch.testing.assert_close(triton, torch_, atol=1e-6, rtol=1e-4)
        places = torch.arange(valid.shape[1], device=DEVICE)
        unseen = ~valid[:, None] | (places > rows[..., None])
        assert (triton[unseen[:, None].expand_as(triton)] == 0).all()


@CASES
def test_column_sums(shape, dtype):
    query, key, valid = attention(shape, dtype, seed=3)
    for count in (1, 30):
        rows = some_rows(valid, shape[3], count)
        rows[0, :: count - 1 or 2] = -1
        torch_, triton = both(attention_column_sums, query, key, rows, 0.7, valid)
        torch.testing.assert_close(triton, torch_, atol=1e-6 * count, rtol=1e-4)
        torch.testing.assert_close(triton.sum(1), (rows >= 0).sum(1).float(), atol=1e-5 * count, rtol=1e-5)


def test_logits_of_any_size():
    """Far beyond the range of exp: the highest of each row is what counts."""
    query, key, valid = attention((1, 2, 1, 70, 83, 20), FULL, seed=5)
    rows = some_rows(valid, 70, 8)
    for scaling in (300.0, -300.0, 0):
        for function in (attention_rows, attention_column_sums):
            torch_, triton = both(function, query, key, rows, scaling, valid)
            torch.testing.assert_close(triton, torch_, atol=1e-4, rtol=1e-3)


def test_rows_of_broken_queries_and_of_queries_that_see_nothing():
    query, key, valid = attention((2, 2, 1, 12, 12, 8), FULL, seed=7)
    rows = torch.tensor([[2, 3, 11], [4, 7, 6]], device=DEVICE)  # padding, after padding; and a padded query
    torch_, triton = both(attention_rows, query, key, rows, 0.7, valid)
    assert torch_[0, :, 0].isnan().all() and torch_[1, :, 2].isnan().all()
    torch.testing.assert_close(triton, torch_, atol=1e-6, rtol=1e-4, equal_nan=True)


def test_types_may_differ():
    query, key, valid = attention(SHAPES[0], FULL)
    rows = some_rows(valid, 16, 5)
    for q, k in ((query.half(), key), (query.bfloat16(), key.half()), (query.double(), key)):
        torch.testing.assert_close(*both(attention_rows, q, k, rows, 0.7, valid), atol=1e-6, rtol=1e-4)


def test_no_rows_and_no_batch():
    query, key, valid = attention(SHAPES[0], FULL)
    none = torch.empty(2, 0, dtype=torch.long, device=DEVICE)
    assert attention_rows(query, key, none, 1.0, valid, "triton").shape == (2, 2, 0, 16)
    assert torch.equal(attention_column_sums(query, key, none, 1.0, valid, "triton"), torch.zeros_like(valid).float())
    empty = (x[:0] for x in (query, key, none, valid))
    query, key, none, valid = empty
    assert attention_column_sums(query, key, none, 1.0, valid, "triton").shape == (0, 16)


# ---- farthest_points --------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "dtype"), [(1, FULL), (2, HALF), (33, BRAIN), (130, FULL)])
def test_picks(n, dtype):
    x = draw(2, n, 8, seed=n, dtype=dtype)
    for k in {0, min(n, 33)}:
        for weight in (None, inside(draw(2, n, seed=1).abs())):
            torch_, triton = both(farthest_points, x, k, weight)
            assert torch.equal(torch_, triton) and triton.dtype == torch.long


def test_equal_picks_go_to_the_lower_index():
    x = torch.randint(0, 2, (2, 40, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2.0 - 1
    x[0, 3], x[0, 5], x[1] = 0, torch.nan, 1
    torch_, triton = both(farthest_points, x, 40)
    assert torch.equal(torch_, triton)
    assert triton[1].tolist() == list(range(40))
    weight = torch.arange(80.0, device=DEVICE).view(2, 40) % 3  # some are zero, and each value is there often
    torch_, triton = both(farthest_points, x, 40, weight)
    assert torch.equal(torch_, triton)
    assert sorted(triton[1].tolist()) == list(range(40))


# ---- greedy_coverage and greedy_dpp -------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "r", "dtype"), [(1, 1, FULL), (5, 3, HALF), (33, 150, BRAIN), (130, 130, FULL)])
def test_coverage(n, r, dtype):
    covers = inside(draw(2, n, r, seed=n, dtype=dtype))
    weight, valid = inside(draw(2, n, seed=1).abs()), inside(draw(2, n, seed=2) < 0.8)
    for k in {0, min(n, 20), n}:
        torch_, triton = (greedy_coverage(covers, k, weight, valid, b) for b in ("torch", "triton"))
        assert torch.equal(torch_, triton) and triton.dtype == torch.long
        assert all(len(set(row)) == k for row in triton.tolist())


def test_equal_coverage_goes_to_the_lower_index():
    """Sums of small whole numbers are exact, and many are equal: within a program's candidates and between programs."""
    covers = torch.randint(-1, 3, (2, 70, 9), generator=torch.Generator().manual_seed(0)).to(DEVICE).float()
    covers[1] = 1
    torch_, triton = both(greedy_coverage, covers, 70)
    assert torch.equal(torch_, triton)
    assert triton[1].tolist() == list(range(70))


@pytest.mark.parametrize(("n", "dtype"), [(1, FULL), (2, HALF), (33, BRAIN), (130, FULL)])
def test_volumes(n, dtype):
    """Of twelve dimensions, so that the rank runs out among the picks."""
    x, quality = draw(2, n, 12, seed=n, dtype=dtype), draw(2, n, seed=1).abs()
    for k in {0, min(n, 9), min(n, 33)}:
        torch_, triton = (greedy_dpp(x, k, quality, b) for b in ("torch", "triton"))
        assert torch.equal(torch_, triton) and triton.dtype == torch.long
        assert all(len(set(row)) == k for row in triton.tolist())


def test_equal_volumes_go_to_the_lower_index():
    x = torch.eye(4, device=DEVICE)[torch.arange(40, device=DEVICE) % 4].expand(2, -1, -1).clone()
    x[0, 3], x[0, 5], x[1] = 0, torch.nan, 1
    torch_, triton = both(greedy_dpp, x, 40)
    assert torch.equal(torch_, triton)
    assert triton[0].tolist()[:4] == [0, 1, 2, 7] and triton[1].tolist() == list(range(40))


# ---- redundancy_counts ------------------------------------------------------------------------------------------
def clear(keys, threshold):
    """`threshold`, moved to the middle of the widest gap between cosines near it, where rounding decides nothing."""
    unit = torch.nn.functional.normalize(keys.double(), dim=-1)
    cosines = (unit @ unit.mT).flatten().sort().values
    near = cosines[(cosines - threshold).abs() < 0.05]
    gap = near.diff().argmax()
    return float(near[gap] + near[gap + 1]) / 2


@pytest.mark.parametrize(
    ("n", "width", "dtype"), [(1, 5, FULL), (7, 33, HALF), (70, 37, BRAIN), (64, 16, HALF), (131, 40, FULL)]
)
def test_counts(n, width, dtype):
    keys = draw(2, n, width, seed=n, dtype=dtype) + draw(2, 1, width, seed=n + 1, dtype=dtype)
    valid = draw(2, n, seed=n + 2) < 0.8
    at = clear(keys, 0.5) if n > 1 else 0.5
    keys[~valid] = torch.nan
    torch_, triton = both(redundancy_counts, inside(keys), inside(valid), at)
    assert torch.equal(torch_, triton) and triton.dtype == torch.long
    assert n < 10 or (triton.unique().numel() > 3 and (triton[~valid] == 0).all())


def test_counts_at_the_threshold():
    """Corners of a cube: cosines are exact, and many are equal to the threshold; more than a block of them."""
    keys = torch.randint(0, 2, (2, 150, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2.0 - 1
    keys[1] *= torch.arange(1, 151, device=DEVICE)[:, None] % 4 + 1
    valid = torch.ones(1, 150, dtype=torch.bool, device=DEVICE).expand(2, -1)
    for threshold in (-1.0, -0.5, 0.0, 0.5, 1.0):
        torch_, triton = both(redundancy_counts, keys, valid, threshold)
        assert torch.equal(torch_, triton)
    assert not triton.any()
    equal = draw(1, 1, 37).expand(-1, 80, -1) * 3
    assert not redundancy_counts(equal, valid[:1, :80], 1.0, "triton").any()


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf, 3e38])
def test_counts_of_broken_keys(value):
    """A cosine of 0 with them: above a negative threshold, not above 0."""
    keys = draw(1, 41, 8, seed=2).abs()
    keys[:, 4], keys[:, 7, 3] = value, value
    valid = torch.ones(1, 41, dtype=torch.bool, device=DEVICE)
    for threshold in (-0.5, 0.0):
        torch_, triton = both(redundancy_counts, keys, valid, threshold)
        assert torch.equal(torch_, triton)
        assert triton[0, 4] == (40 if threshold < 0 else 0)


# ---- pagerank ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shape", "dtype", "options"),
    [
        (SHAPES[0], FULL, {}),
        (SHAPES[1], HALF, {"damping": 0.2}),
        (SHAPES[1], FULL, {"head_reduce": "mean", "tau": 1.0, "iters": 2}),
        ((1, 2, 1, 140, 150, 8), BRAIN, {"iters": 3}),
        (SHAPES[3], FULL, {}),
    ],
)
def test_ranks(shape, dtype, options):
    query, key, valid = attention(shape, dtype, seed=11)
    anchor = torch.full((shape[0],), shape[4] - 1, device=DEVICE)
    anchor[-1] -= shape[4] // 4
    torch_, triton = (pagerank(query, key, 0.35, valid, anchor, **options, backend=b) for b in ("torch", "triton"))
    torch.testing.assert_close(triton, torch_, atol=1e-5, rtol=1e-4)
    out = ~valid | (torch.arange(shape[4], device=DEVICE) > anchor[:, None])
    out[:, : shape[4] - shape[3]] = True
    assert (triton[out] == 0).all() and (triton[~out] > 0).any()


def test_ranks_of_nothing_and_of_any_size():
    query, key, valid = attention(SHAPES[1], FULL, seed=12)
    # Exact products, since a scale of 300 enlarges their rounding.
    query, key = (inside((4 * x).round() / 4) for x in (query, key))
    anchor = torch.tensor([82, 82], device=DEVICE)
    valid[1] = False
    for scaling in (0.35, 300.0, 0.0):
        torch_, triton = both(pagerank, query, key, scaling, valid, anchor)
        torch.testing.assert_close(triton, torch_, atol=1e-4, rtol=1e-3)
        assert not triton[1].any()
    empty = pagerank(query[:0], key[:0], 0.35, valid[:0], anchor[:0], backend="triton")
    assert empty.shape == (0, 83)


# ---- sparse_ffn -------------------------------------------------------------------------------------------------
def network(b, t, d, f, k, dtype):
    """x, weights and neurons, all in poisoned memory; the neurons that are not chosen are poisoned too."""
    x, gate, up, down = (draw(*s, seed=i) / 2 for i, s in enumerate([(b, t, d), (f, d), (f, d), (d, f)]))
    index = draw(b, f, seed=k).argsort(1)[:, :k]
    other = torch.ones(f, dtype=torch.bool, device=DEVICE).index_fill(0, index.flatten(), False)
    gate[other], up[other], down[:, other] = torch.nan, torch.nan, torch.nan
    return *(inside(v.to(dtype)) for v in (x, gate, up, down)), index


@pytest.mark.parametrize(
    ("shape", "activation", "dtype"),
    [
        ((1, 1, 5, 7, 3), "silu", FULL),
        ((2, 3, 33, 70, 19), "gelu", FULL),
        ((3, 1, 16, 400, 140), "gelu_tanh", FULL),
        ((1, 17, 130, 40, 40), "relu", FULL),
        ((2, 5, 70, 200, 131), "silu", HALF),
        ((1, 16, 130, 64, 33), "gelu_tanh", BRAIN),
    ],
)
def test_sparse_networks(shape, activation, dtype):
    x, *weights, index = network(*shape, dtype)
    exact = gathered_ffn(x.double(), *gather_neurons(*(w.double() for w in weights), index), activation, "torch")
    torch_, triton = both(sparse_ffn, x, *weights, index, activation)
    assert triton.dtype == dtype and exact.isfinite().all()
    if dtype is FULL:
        torch.testing.assert_close(triton, exact.float(), atol=1e-5, rtol=1e-4)
    assert (triton - exact).norm() <= 1.05 * (torch_ - exact).norm() + 1e-5


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_of_any_size(name):
    """One neuron that hands x on to the activation, and is multiplied by 1."""
    x = torch.tensor([-1e4, -90, -20, -3, -0.5, -0.0, 0, 1e-3, 1, 6, 90, 1e4, torch.nan], device=DEVICE)
    x = torch.stack([x, torch.ones_like(x)], 1)[None]  # [1, 13, 2]
    rows = torch.eye(2, device=DEVICE)
    y = gathered_ffn(x, rows[None, :1], rows[None, 1:], rows[None, :1], name, "triton")
    torch.testing.assert_close(y[..., 0], ACTIVATIONS[name](x[..., 0]), atol=1e-6, rtol=1e-5, equal_nan=True)


def test_networks_of_broken_tokens():
    """What is not finite stays in its token, and is there what it is in torch."""
    x, *weights, index = (v.abs() for v in network(2, 4, 8, 9, 5, FULL))  # weights above 0: infinity stays so
    x[0, 1, 2], x[1, 0], x[1, 3, 0] = torch.inf, torch.nan, -torch.inf
    torch_, triton = both(sparse_ffn, x, *weights, index, "relu")
    torch.testing.assert_close(triton, torch_, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert triton[0, 0].isfinite().all() and triton[1, 1].isfinite().all() and triton.isinf().any()


def test_networks_of_no_neurons_and_no_tokens():
    x, *weights, index = network(2, 3, 8, 9, 4, FULL)
    assert torch.equal(sparse_ffn(x, *weights, index[:, :0], "silu", "triton"), torch.zeros_like(x))
    assert sparse_ffn(x[:, :0], *weights, index, "silu", "triton").shape == (2, 0, 8)


# ---- merge and compact_sequence ---------------------------------------------------------------------------------
@pytest.fixture
def poison():
    """New memory is filled with NaN, or the largest number."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1, device=DEVICE).isnan()
    yield
    torch.use_deterministic_algorithms(before)


def turned(x):
    """The same values, of other strides."""
    return x.mT.contiguous().mT


def with_gradient(function, x, *args):
    """Results of both versions, for each also the gradient of x, where the one that comes back is of odd strides."""
    answers = []
    for backend in ("torch", "triton"):
        leaf = x.detach().requires_grad_()
        results = function(leaf, *args, backend=backend)
        (out,) = [r for r in results if r.requires_grad]
        answers.append((*results, *torch.autograd.grad(out, leaf, turned(draw(*out.shape, seed=9).to(out.dtype)))))
    return answers


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("tokens", "n", "width", "dtype"),
    [(1, 1, 3, FULL), (9, 4, 37, HALF), (40, 11, 1030, BRAIN), (23, 40, 20, FULL), (33, 1, 8, HALF), (12, 5, 6, FULL)],
)
def test_means_of_groups(tokens, n, width, dtype, weighted, poison):
    """With tokens of no group, groups of none, and one group of many."""
    generator = torch.Generator().manual_seed(tokens)
    group = turned(torch.randint(-1, n, (3, tokens), generator=generator)).to(DEVICE)
    group[2] = n - 1
    size = turned(torch.randint(1, 5, (3, tokens), generator=generator).float()).to(DEVICE) if weighted else None
    x = inside(draw(3, tokens, width, seed=tokens, dtype=dtype))
    x[:, 0][group[:, 0] < 0] = torch.nan
    (mean, total, grad), (fast_mean, fast_total, fast_grad) = with_gradient(merge, x, group, n, size)
    rtol = {FULL: 1e-5, HALF: 1e-3, BRAIN: 8e-3}[dtype]
    for a, b in ((fast_mean, mean), (fast_grad, grad)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=rtol)
    assert torch.equal(fast_total, total)
    assert not (fast_mean[fast_total == 0].any() or fast_grad[group < 0].any())


def test_a_mean_is_the_same_in_any_batch_and_each_time():
    x, group = draw(5, 64, 40, seed=3), torch.arange(64, device=DEVICE).expand(5, -1) % 3
    whole = merge(x, group, 3, backend="triton")[0]
    assert torch.equal(merge(x, group, 3, backend="triton")[0], whole)
    for b in range(5):
        assert torch.equal(merge(x[b : b + 1], group[b : b + 1], 3, backend="triton")[0], whole[b : b + 1])


def test_means_in_double_precision():
    x, group = draw(2, 9, 5, dtype=torch.float64), torch.arange(9, device=DEVICE).expand(2, -1) % 4
    for a, b in zip(*with_gradient(merge, x, group, 4, None)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-14)


def test_nothing_to_merge():
    for shape, n in (((0, 4, 3), 2), ((2, 0, 3), 2), ((2, 4, 3), 0)):
        group = torch.full(shape[:2], -1, device=DEVICE)
        for a, b in zip(*with_gradient(merge, draw(*shape), group, n, None)):
            assert a.shape == b.shape and torch.equal(a, b)


def moved(x, keep, length, positions, visual, backend):
    return compact_sequence(keep, length, x, positions, visual, backend)


@pytest.mark.parametrize(("axes", "rows"), [((), 1), ((), 3), ((3,), 1), ((4,), 3)])
@pytest.mark.parametrize(("places", "width", "dtype"), [(1, 2, FULL), (45, 30, BRAIN), (32, 70, HALF)])
def test_sequences(places, width, dtype, axes, rows, poison, monkeypatch):
    """Several blocks of tokens, of counted ones and of channels."""
    for name, size in {"TOKENS": 16, "CHANNELS": 16, "SPAN": 32, "COUNTED": 16}.items():
        monkeypatch.setitem(BLOCKS, name, size)
    generator = torch.Generator().manual_seed(places)
    keep = turned(torch.rand(3, places, generator=generator) < 0.4).to(DEVICE)
    keep[1], keep[2, 0] = False, True
    visual = turned(torch.rand(3, places, generator=generator) < 0.5).to(DEVICE)
    positions = turned(torch.randint(0, 99, (*axes, rows, places), generator=generator)).to(DEVICE)
    x = inside(draw(3, places, width, seed=places, dtype=dtype))
    most = int(keep.sum(1).max())
    for length in {most, (most + places) // 2}:
        torch_, triton = with_gradient(moved, x, keep, length, positions, visual)
        for a, b in zip(torch_, triton):
            assert torch.equal(a, b) and a.dtype == b.dtype


def test_sequences_of_nothing():
    for batch, places in ((0, 5), (2, 0)):
        flags = torch.zeros(batch, places, dtype=torch.bool, device=DEVICE)
        positions = torch.arange(places, device=DEVICE)[None]
        for a, b in zip(*with_gradient(moved, draw(batch, places, 3), flags, 0, positions, flags)):
            assert torch.equal(a, b)


# ---- tree_attention -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("padded", [None, "rows", "groups"])
@pytest.mark.parametrize(
    ("heads", "groups", "drafts", "past", "width", "wide", "dtype"),
    [
        (2, 2, 1, 3, 5, 5, FULL),
        (9, 3, 7, 150, 16, 16, HALF),
        (6, 2, 23, 70, 33, 20, BRAIN),
        (4, 1, 81, 130, 8, 8, FULL),
    ],
)
def test_trees(heads, groups, drafts, past, width, wide, dtype, padded, poison, monkeypatch):
    """Parts of several blocks; parts in which nothing is seen; drafts in two parts."""
    monkeypatch.setattr("vtok.kernels.tree_attention_triton.SPLITS", 2)
    monkeypatch.setattr("vtok.kernels.tree_attention.BLOCK", 40)
    query, key = (
        inside(draw(2, k, n, width, seed=k, dtype=dtype)) for k, n in ((heads, drafts), (groups, past + drafts))
    )
    value = inside(draw(2, groups, past + drafts, wide, seed=3, dtype=dtype))
    generator = torch.Generator().manual_seed(drafts)
    tree = (torch.rand(drafts, drafts, generator=generator) < 0.3).tril() | torch.eye(drafts, dtype=torch.bool)
    valid = torch.rand(2, groups, past, generator=generator) < 0.5
    valid[0] = False
    valid = {None: None, "rows": turned(valid[:, 0]).to(DEVICE), "groups": turned(valid).to(DEVICE)}[padded]
    torch_, triton = both(tree_attention, query, key, value, turned(tree).to(DEVICE), width**-0.5, valid)
    assert triton.dtype == dtype
    atol, rtol = {FULL: (2e-6, 1e-5), HALF: (2e-3, 1e-3), BRAIN: (4e-3, 8e-3)}[dtype]
    torch.testing.assert_close(triton, torch_, atol=atol, rtol=rtol)

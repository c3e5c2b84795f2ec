"""Triton kernels against their torch twins. `test_triton.py` runs this file in a process of its own, under Triton's
interpreter on the CPU, and on a GPU where there is one."""

import os

import pytest
import torch

from vtok.kernels.attention_column_sums import attention_column_sums
from vtok.kernels.attention_rows import attention_rows
from vtok.kernels.bipartite_match import best_partners, bipartite_match
from vtok.kernels.bipartite_match_triton import best_partners as triton_partners
from vtok.kernels.farthest_points import farthest_points

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
        torch_, triton = both(farthest_points, x, k)
        assert torch.equal(torch_, triton) and triton.dtype == torch.long


def test_equal_picks_go_to_the_lower_index():
    x = torch.randint(0, 2, (2, 40, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE) * 2.0 - 1
    x[0, 3], x[0, 5], x[1] = 0, torch.nan, 1
    torch_, triton = both(farthest_points, x, 40)
    assert torch.equal(torch_, triton)
    assert triton[1].tolist() == list(range(40))

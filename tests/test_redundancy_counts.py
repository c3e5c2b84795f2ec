"""Redundancy counts against loops, and what must not decide them."""

import math

import pytest
import torch

from vtok.kernels.redundancy_counts import redundancy_counts


def cosine(x, y):
    """0 with zeros and with what is not finite."""
    square = sum(a * a for a in x), sum(b * b for b in y)
    if not all(map(math.isfinite, square)) or 0 in square:
        return 0.0
    return min(1.0, sum(a * b for a, b in zip(x, y)) / math.sqrt(square[0] * square[1]))


def slow(keys, valid, threshold):
    """By the definition, a pair at a time."""
    counts = []
    for rows, here in zip(keys.double().tolist(), valid.tolist()):
        pairs = [[here[i] and here[j] and i != j for j in range(len(rows))] for i in range(len(rows))]
        close = [[cosine(x, y) > threshold for y in rows] for x in rows]
        counts.append([sum(p and c for p, c in zip(*both)) for both in zip(pairs, close)])
    return counts


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 17, 40])
@pytest.mark.parametrize("block", [1, 70, 2**24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_equals_loops(monkeypatch, n, block, dtype):
    monkeypatch.setattr("vtok.kernels.redundancy_counts.BLOCK", block)
    keys = (draw(2, n, 7, seed=n) + draw(2, 1, 7)).to(dtype)
    valid = draw(2, n, seed=n + 1) < 0.8
    for threshold in (-0.3, 0.51, 0.9):
        counts = redundancy_counts(keys, valid, threshold)
        assert counts.dtype == torch.long
        assert counts.tolist() == slow(keys, valid, threshold)


@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.0, 0.5, 1.0, 1])
def test_equal_to_the_threshold_is_not_above_it(threshold):
    """Corners of a cube, whose cosines are exact."""
    keys = torch.randint(0, 2, (2, 30, 4), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    counts = redundancy_counts(keys, torch.ones(2, 30, dtype=torch.bool), threshold)
    assert counts.tolist() == slow(keys, torch.ones(2, 30, dtype=torch.bool), threshold)
    assert bool(counts.any()) == (threshold < 1)


def test_rounding_lifts_no_cosine_above_one():
    keys = draw(200, 1, 64).expand(-1, 3, -1)
    assert not redundancy_counts(keys, torch.ones(200, 3, dtype=torch.bool), 1.0).any()


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf, -torch.inf])
def test_broken_keys_are_like_zeros(value):
    keys = draw(1, 9, 5).abs()
    keys[0, 4] = value
    valid = torch.ones(1, 9, dtype=torch.bool)
    assert redundancy_counts(keys, valid, 0.0).tolist() == [[7] * 4 + [0] + [7] * 4]
    assert redundancy_counts(keys, valid, -0.1).tolist() == [[8] * 9]


def test_padding_changes_nothing():
    keys, valid = draw(2, 12, 6, seed=3), torch.ones(2, 12, dtype=torch.bool)
    plain = redundancy_counts(keys, valid, 0.2)
    padded = torch.cat([torch.full((2, 3, 6), torch.nan), keys, torch.full((2, 2, 6), torch.inf)], 1)
    counts = redundancy_counts(padded, torch.nn.functional.pad(valid, (3, 2)), 0.2)
    assert torch.equal(counts[:, 3:-2], plain) and not counts[:, :3].any() and not counts[:, -2:].any()
    assert plain.any()


def test_strides_gradients_and_autocast():
    """A trainer's autocast must not choose other tokens than the rollout did."""
    keys, valid = draw(2, 200, 8, seed=4), torch.ones(1, 200, dtype=torch.bool).expand(2, -1)
    plain = redundancy_counts(keys, valid, 0.3)
    assert torch.equal(redundancy_counts(keys.mT.contiguous().mT.requires_grad_(), valid, 0.3), plain)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(redundancy_counts(keys, valid, 0.3), plain)


def test_no_keys():
    assert redundancy_counts(draw(2, 0, 4), torch.ones(2, 0, dtype=torch.bool), 0.5).shape == (2, 0)
    assert redundancy_counts(draw(0, 3, 4), torch.ones(0, 3, dtype=torch.bool), 0.5).shape == (0, 3)

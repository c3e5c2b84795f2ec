"""`merge` and `compact_sequence` in torch against slow rewrites, and their gradients against finite differences."""

import pytest
import torch
from torch.autograd import gradcheck

from vtok.kernels.compact_sequence import compact_sequence
from vtok.kernels.merge import merge, sizes


# ---- merge --------------------------------------------------------------------------------------------------------
def slow_merge(x, group, n, size):
    """Means and sizes, one token after the other, in double precision."""
    batch, tokens, width = x.shape
    mean, total = torch.zeros(batch, n, width, dtype=torch.float64), torch.zeros(batch, n)
    for b in range(batch):
        for g in range(n):
            members = [t for t in range(tokens) if group[b, t] == g]
            total[b, g] = sum(float(size[b, t]) for t in members)
            if members:
                mean[b, g] = sum(x[b, t].double() * float(size[b, t]) for t in members) / float(total[b, g])
    return mean, total


def tokens_and_groups(batch, tokens, n, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, width, generator=generator).to(dtype)
    group = torch.randint(-1, n, (batch, tokens), generator=generator)
    return x, group, torch.randint(1, 6, (batch, tokens), generator=generator).float()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "tokens", "n", "width"), [(1, 1, 1, 1), (3, 17, 5, 7), (2, 6, 20, 3), (2, 40, 1, 4)])
def test_means_and_sizes(batch, tokens, n, width, dtype, weighted):
    x, group, size = tokens_and_groups(batch, tokens, n, width, dtype, seed=tokens)
    size = size if weighted else None
    mean, total = merge(x, group, n, size)
    expected, count = slow_merge(x, group, n, torch.ones(batch, tokens) if size is None else size)
    assert mean.dtype == dtype and total.dtype == torch.float32 and mean.shape == (batch, n, width)
    assert torch.equal(total, count)
    torch.testing.assert_close(mean, expected.to(dtype), atol=1e-6, rtol=1e-5 if dtype.itemsize > 2 else 8e-3)
    assert torch.equal(sizes(torch.ones(batch, tokens) if size is None else size, group, n), count)


def test_means_are_taken_in_fp32_and_rounded_once():
    x = torch.randn(1, 4096, 3).bfloat16() + 1
    mean, total = merge(x, torch.zeros(1, 4096, dtype=torch.long), 1)
    assert total.item() == 4096
    torch.testing.assert_close(mean[0, 0].float(), x[0].double().mean(0).float(), atol=0, rtol=2**-8)
    with torch.autocast("cpu", torch.bfloat16):
        wide = merge(x.float(), torch.zeros(1, 4096, dtype=torch.long), 1)[0]
    torch.testing.assert_close(wide[0, 0], x[0].double().mean(0).float(), atol=1e-6, rtol=1e-6)


def test_groups_do_not_touch_each_other():
    """Broken tokens spoil their own group, those of no group none at all, and samples stay apart."""
    x, group, size = tokens_and_groups(2, 12, 4, 5)
    group[0, :3] = torch.tensor([-1, 2, 0])
    before = merge(x, group, 4, size)[0]
    x[0, 0], x[0, 1] = torch.inf, torch.nan
    x.requires_grad_()
    after = merge(x, group, 4, size)[0]
    assert after[0, 2].isnan().all()
    assert torch.equal(after[0, [0, 1, 3]], before[0, [0, 1, 3]]) and torch.equal(after[1], before[1])
    after[1].sum().backward()
    assert x.grad.isfinite().all() and not x.grad[0].any()


def test_a_mean_is_the_same_bits_in_any_batch_and_with_any_strides():
    x, group, size = tokens_and_groups(6, 50, 7, 33)
    mean, total = merge(x, group, 7, size)
    for b in range(6):
        assert torch.equal(merge(x[b : b + 1], group[b : b + 1], 7, size[b : b + 1])[0], mean[b : b + 1])
    turned = [a.transpose(0, 1).contiguous().transpose(0, 1) for a in (x, group, size)]
    channels = x.mT.contiguous().mT
    for other in (merge(turned[0], turned[1], 7, turned[2]), merge(channels, group, 7, size)):
        assert torch.equal(other[0], mean) and torch.equal(other[1], total)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_of_means(weighted):
    x, group, size = tokens_and_groups(2, 7, 4, 3, torch.float64)
    group[0] = torch.tensor([0, 0, -1, 2, 2, 2, 0])  # two groups of none
    x.requires_grad_()
    size = size.requires_grad_() if weighted else None
    mean = lambda x: merge(x, group, 4, size)[0]
    assert gradcheck(mean, (x,))
    (grad,) = torch.autograd.grad(mean(x).sum(), x)
    assert not grad[group < 0].any()
    if weighted:
        assert not merge(x.detach(), group, 4, size)[0].requires_grad


def test_nothing_to_merge():
    for shape, n in (((0, 4, 3), 2), ((2, 0, 3), 2), ((2, 4, 3), 0), ((2, 4, 3), 2)):
        mean, total = merge(torch.randn(shape), torch.full(shape[:2], -1), n)
        assert torch.equal(mean, torch.zeros(shape[0], n, 3)) and torch.equal(total, torch.zeros(shape[0], n))


# ---- compact_sequence ---------------------------------------------------------------------------------------------
def sequence(batch, places, width, axes=(), rows=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep, visual = torch.rand(2, batch, places, generator=generator) < 0.5
    positions = torch.randint(0, 99, (*axes, rows or batch, places), generator=generator)
    return keep, torch.randn(batch, places, width, generator=generator).to(dtype), positions, visual


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("axes", [(), (3,), (4,)])
@pytest.mark.parametrize("places", [1, 2, 13])
def test_sequences(places, axes, rows, dtype):
    keep, embeds, positions, visual = sequence(3, places, 5, axes, rows, dtype, seed=places)
    keep[1] = False  # a row of nothing but padding
    most = int(keep.sum(1).max())
    for length in range(most, places + 1):
        index, valid, rows_, moved, flags = compact_sequence(keep, length, embeds, positions, visual)
        assert index.shape == valid.shape == flags.shape == (3, length) and rows_.dtype == dtype
        assert moved.shape == (*((3,) if axes else ()), 3, length)
        for b in range(3):
            kept = [s for s in range(places) if keep[b, s]]
            pads = length - len(kept)
            assert valid[b].tolist() == [False] * pads + [True] * len(kept)
            assert index[b, pads:].tolist() == kept
            assert len(set(index[b].tolist())) == length and not keep[b, index[b, :pads]].any()
            assert flags[b].tolist() == [False] * pads + [bool(visual[b, s]) for s in kept]
            every = positions[-3:] if axes else positions[None]  # of four, the first is dropped
            for i, s in enumerate(index[b].tolist()):
                assert torch.equal(rows_[b, i], embeds[b, s])
                ids = [int(row[b if len(row) > 1 else 0, s]) for row in every]
                assert ids == (moved[:, b, i].tolist() if axes else [int(moved[b, i])])


def test_dropped_tokens_may_hold_anything():
    keep, embeds, positions, visual = sequence(3, 9, 4)
    keep[:, 0] = True
    embeds[~keep] = torch.nan
    _, valid, rows, _, _ = compact_sequence(keep, int(keep.sum(1).max()), embeds, positions, visual)
    assert rows[valid].isfinite().all()


def test_sequences_of_any_strides():
    keep, embeds, positions, visual = sequence(3, 11, 4, (3,))
    expected = compact_sequence(keep, 11, embeds, positions, visual)
    turned = [a.mT.contiguous().mT for a in (keep, embeds, positions, visual)]
    shared = embeds[:1].expand(3, -1, -1)
    assert all(map(torch.equal, compact_sequence(turned[0], 11, *turned[1:]), expected))
    rows = compact_sequence(keep, 11, shared, positions, visual)[2]
    assert torch.equal(rows, shared.gather(1, expected[0][..., None].expand(-1, -1, 4)))


def test_gradient_of_sequences():
    """It goes back to where a token was, and none to tokens that are gone."""
    keep, embeds, positions, visual = sequence(2, 6, 3, dtype=torch.float64)
    length = int(keep.sum(1).max())
    embeds.requires_grad_()
    rows = lambda x: compact_sequence(keep, length, x, positions, visual)[2]
    assert gradcheck(rows, (embeds,))
    index, valid, out, moved, flags = compact_sequence(keep, length, embeds, positions, visual)
    assert not any(a.requires_grad for a in (index, valid, moved, flags))
    weights = torch.randn(out.shape, dtype=out.dtype)
    (out * weights)[valid].sum().backward()
    expected = torch.zeros_like(embeds)
    for b in range(2):
        for i in range(length):
            if valid[b, i]:
                expected[b, index[b, i]] = weights[b, i]
    assert torch.equal(embeds.grad, expected)


def test_no_rows():
    for batch, places in ((0, 5), (2, 0)):
        keep, embeds, positions, visual = sequence(batch, places, 3, rows=1)
        index, valid, rows, moved, flags = compact_sequence(keep, 0, embeds, positions, visual)
        assert index.shape == valid.shape == moved.shape == flags.shape == (batch, 0) and rows.shape == (batch, 0, 3)

"""DivPrune and its kernel against a slow rewrite of greedy max-min selection."""

import pytest
import torch
from contract import batch, picture, tiny

import vtok
from vtok.kernels import farthest_points as kernel
from vtok.kernels.farthest_points import farthest_points
from vtok.types import Layout, Plane, VisualTokens


def slow(x, k, weight=None):
    """Definition: distance 1 - cos; first the point farthest from its nearest neighbour, then the point farthest from
    its nearest pick. Strict comparison, so the lower index wins ties. x [N, D] -> list of k. weight: [N], of distances
    to others."""
    dot = (x.double() @ x.double().T).nan_to_num(0.0).tolist()
    n = len(x)
    length = [max(dot[i][i] ** 0.5, 1e-12) for i in range(n)]
    distance = [[1 - dot[min(i, j)][max(i, j)] / (length[i] * length[j]) for j in range(n)] for i in range(n)]
    picks = []
    while len(picks) < k:
        best, best_value = None, None
        for i in range(n):
            if i in picks:
                continue
            others = picks or [j for j in range(n) if j != i]
            value = min((distance[i][j] for j in others), default=0.0) * (1.0 if weight is None else weight[i])
            if best is None or value > best_value:
                best, best_value = i, value
        picks.append(best)
    return picks


@pytest.fixture(params=[2**26, 1000], ids=["matrix", "blocks"])
def cache(request, monkeypatch):
    """Room for all similarities, or for none: rows are then made again."""
    monkeypatch.setattr(kernel, "CACHE", request.param)
    monkeypatch.setattr(kernel, "BLOCK", 7)


@pytest.mark.parametrize("n", [1, 2, 3, 33, 60])
def test_picks(n, cache):
    x = torch.randn(3, n, 8, generator=torch.Generator().manual_seed(n))
    for k in {1, n // 3, n}:
        assert farthest_points(x, k).tolist() == [slow(v, k) for v in x]


@pytest.mark.parametrize("n", [1, 2, 3, 33, 60])
def test_weighted_picks(n, cache):
    x = torch.randn(3, n, 8, generator=torch.Generator().manual_seed(n))
    weight = torch.rand(3, n, generator=torch.Generator().manual_seed(n))
    weight[0, n // 2 :: 2] = 0
    weight[1] = 0.5
    for k in {1, n // 3, n}:
        expected = [slow(v, k, w) for v, w in zip(x, weight.tolist())]
        assert farthest_points(x, k, weight).tolist() == expected
    assert torch.equal(farthest_points(x, n, torch.ones(3, n)), farthest_points(x, n))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, cache):
    x = torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = [slow(v, 15) for v in x.float()]
    assert farthest_points(x, 15).tolist() == expected
    with torch.autocast("cpu", torch.bfloat16):
        assert farthest_points(x, 15).tolist() == expected


def corners(n, seed=0):
    """[n, 4] of +-1: lengths and cosines are exact in any precision, and most distances are equal."""
    return torch.randint(0, 2, (n, 4), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1


@pytest.mark.parametrize("seed", range(5))
def test_ties_go_to_the_lower_index(seed, cache):
    x = corners(40, seed)
    assert farthest_points(x[None], 40)[0].tolist() == slow(x, 40)


def test_equal_features(cache):
    assert farthest_points(torch.ones(1, 40, 4), 7)[0].tolist() == list(range(7))
    x = torch.cat([torch.ones(39, 4), -torch.ones(1, 4)])
    assert farthest_points(x[None], 3)[0].tolist() == slow(x, 3) == [39, 0, 1]


def test_length_does_not_count(cache):
    x = torch.randn(1, 40, 8, generator=torch.Generator().manual_seed(3))
    scale = 2.0 ** torch.randint(-8, 8, (1, 40, 1))
    assert torch.equal(farthest_points(x * scale, 12), farthest_points(x, 12))


def test_zero_and_broken_features(cache):
    x = corners(40)
    x[3] = 0
    x[5] = torch.nan
    picks = farthest_points(x[None], 40)[0]
    assert picks.tolist() == slow(x, 40)
    assert picks.sort().values.tolist() == list(range(40))


def test_batch_is_one_at_a_time(cache):
    x = torch.randn(5, 40, 8, generator=torch.Generator().manual_seed(4))
    assert torch.equal(farthest_points(x, 9), torch.cat([farthest_points(v[None], 9) for v in x]))


def test_nothing_to_pick():
    assert farthest_points(torch.randn(2, 5, 3), 0).shape == (2, 0)
    assert farthest_points(torch.randn(0, 5, 3), 2).shape == (0, 2)


@pytest.mark.parametrize(("keep", "count"), [(0.25, 7), (5, 5), (1000, 31), (0.01, 1)])
def test_compressor(keep, count):
    layout = Layout((Plane(4, 4, "thumbnail"), Plane(3, 5, "crops")), separators=(0, 1))
    x = torch.randn(2, 31, 8, generator=torch.Generator().manual_seed(5))
    selection = vtok.DivPrune(keep=keep).select(VisualTokens(x, layout))
    assert selection.n_kept == count
    for kept, v in zip(selection.keep, x):
        assert kept.nonzero().squeeze(1).tolist() == sorted(slow(v, count))


def test_in_a_model():
    """It sees the features that the language model would get."""
    model, processor = tiny("llava_next")
    inputs = batch(processor, ["a # What colour?"], [picture(70, 112)])
    entered = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda m, a, kwargs: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        with vtok.patch(model, "divprune", keep=0.3) as patch:
            model(**inputs)
    layout = patch.trace.layouts[0]
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(1)
    features = entered[0][0, image[layout.place]]
    kept = patch.trace.keep_masks[0].nonzero().squeeze(1).tolist()
    assert kept == sorted(slow(features, int(layout.n * 0.3)))

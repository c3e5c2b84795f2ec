"""SCOPE against numbers that the official function gave (float64 inputs) and a slow rewrite from the formula."""

import pytest
import torch
from contract import batch, picture, run, tiny
from golden import LAYOUT, X
from golden import SALIENCY as A

import vtok
from vtok.compressors.scope import salient_cover
from vtok.errors import InvalidValue
from vtok.kernels.greedy_coverage import first_scores
from vtok.types import Layout, Plane, VisualTokens
from vtok.views import unit


def picks(alpha, x=X, a=A, k=6):
    return salient_cover(unit(x)[None], a[None], torch.ones(1, len(x), dtype=torch.bool), alpha, k)[0].tolist()


def shown(x=X, a=A, layout=LAYOUT, **encoder):
    """Pictures [B, N, D], with a [B, V, P]."""
    batch, views = x.view(-1, layout.n, x.shape[-1]), sum(plane.views for plane in layout.planes)
    a = a.view(len(batch), views, -1)
    return VisualTokens(batch, layout, encoder={("cls_probs", None): a, ("encoder_attention", None): a} | encoder)


def slow(x, a, k, alpha=1.0):
    """One view, a candidate at a time; the lower index wins ties."""
    x = x.double() / x.double().norm(dim=1, keepdim=True)
    cosine, covered, picked = x @ x.T, torch.zeros(len(x), dtype=torch.double), []
    while len(picked) < k:
        gain = {
            v: float((cosine[:, v] - covered).clamp(min=0).sum()) * float(a[v]) ** alpha
            for v in range(len(x))
            if v not in picked
        }
        picked.append(max(gain, key=gain.get))
        covered = torch.maximum(covered, cosine[:, picked[-1]])
    return picked


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, [14, 8, 6, 0, 1, 12]),
        (0.5, [14, 8, 6, 0, 12, 1]),
        (2.0, [14, 8, 6, 0, 1, 13]),
        (0.0, [9, 10, 7, 15, 13, 0]),
    ],
)
def test_golden_picks(alpha, expected):
    assert picks(alpha) == slow(X, A, 6, alpha) == expected
    kept = vtok.Scope(keep=6, alpha=alpha).select(shown()).keep[0]
    assert kept.nonzero().squeeze(1).tolist() == sorted(expected)


def test_golden_scores_and_coverage():
    cosine = unit(X) @ unit(X).T
    scores = first_scores(cosine[None], A[None], torch.ones(1, 16, dtype=torch.bool))[0, :5]
    expected = torch.tensor([0.155933, 0.147799, 0.129114, 0.058028, 0.055823])
    torch.testing.assert_close(scores, expected, atol=2e-6, rtol=0)
    assert cosine[picks(1.0)].clamp(min=0).amax(0).mean().item() == pytest.approx(0.67298, abs=1e-5)


def test_an_equal_token_is_not_taken_twice():
    x, a = X.clone(), A.clone()
    x[5], a[5] = x[14], a[14]
    assert picks(1.0, x, a) == [5, 8, 6, 0, 1, 13]


def test_the_scale_of_saliency_does_not_count_and_all_can_be_kept():
    assert torch.equal(*(vtok.Scope(keep=6).select(shown(a=a)).keep for a in (A, 8 * A)))
    assert vtok.Scope(keep=16).select(shown()).keep.all()


def test_each_view_has_its_share():
    """A thumbnail of 16 and a mosaic of 2 x 1 crops, of which padding left 3 rows each: 16 + 12 + 12."""
    layout = Layout(
        (Plane(4, 4, "thumbnail"), Plane(6, 4, "crops", crop_grid=(2, 1), crop_shape=(4, 4), offset=(1, 0)))
    )
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    a = torch.rand(2, 3, 16, generator=torch.Generator().manual_seed(1))
    selection = vtok.Scope(keep=13).select(shown(x, a, layout))
    assert selection.n_kept == 13 and selection.keep.sum(1).tolist() == [13, 13]
    where = [slice(0, 16), slice(16, 28), slice(28, 40)]
    cells = [range(16), range(4, 16), range(12)]  # of each view that are no padding
    for kept, own, saliency in zip(selection.keep, x, a):
        for tokens, cell, row, count in zip(where, cells, saliency, (5, 4, 4)):
            assert kept[tokens].nonzero().squeeze(1).tolist() == sorted(slow(own[tokens], row[list(cell)], count))
    whole = vtok.Scope(keep=13, per_view=False).select(shown(x, a, layout))
    for kept, own, saliency in zip(whole.keep, x, a):
        saliency = torch.cat([row[list(cell)] for cell, row in zip(cells, saliency)])
        assert kept.nonzero().squeeze(1).tolist() == sorted(slow(own, saliency, 13))


def test_encoder_features_of_several_patches_are_averaged():
    patches = torch.randn(1, 1, 64, 6, generator=torch.Generator().manual_seed(0))
    a = torch.rand(1, 1, 64, generator=torch.Generator().manual_seed(1))
    seen = shown(a=a)
    seen.encoder["encoder_states", None] = patches
    kept = vtok.Scope(keep=6, features="encoder").select(seen).keep[0]
    mean, total = patches[0, 0].view(16, 4, 6).mean(1), a[0, 0].view(16, 4).sum(1)
    assert kept.nonzero().squeeze(1).tolist() == sorted(slow(mean, total, 6))


def test_padding_of_the_mosaic_covers_nothing():
    """The encoder saw it, and no token stands for it."""
    layout = Layout((Plane(3, 4, "crops", crop_grid=(1, 1), crop_shape=(4, 4), offset=(1, 0)),))
    patches = torch.randn(1, 1, 16, 6, generator=torch.Generator().manual_seed(0))
    patches[..., :4, :] = patches[..., 15:, :]  # as one of the tokens looks
    a = torch.ones(1, 1, 16)
    a[..., 15] = 0.5  # so it is the first to be kept only if the four count
    seen = shown(torch.zeros(12, 8), a, layout)
    seen.encoder["encoder_states", None] = patches
    kept = vtok.Scope(keep=1, features="encoder").select(seen).keep[0]
    assert kept.nonzero().squeeze(1).tolist() == slow(patches[0, 0, 4:], a[0, 0, 4:], 1) != [11]


@pytest.mark.parametrize("keep", [1, 4, 0.5])
def test_a_picture_of_one_colour_and_a_single_token(keep):
    for per_view in (True, False):
        method = vtok.Scope(keep=keep, per_view=per_view)
        selection = method.select(shown(torch.ones(16, 8), torch.full((16,), 1 / 16)))
        assert selection.keep.sum() == selection.n_kept == method.count(LAYOUT)
        zeros = method.select(shown(torch.zeros(16, 8), torch.full((16,), torch.nan)))
        assert zeros.keep.sum() == selection.n_kept
        one = Layout((Plane(1, 1),))
        assert method.select(shown(torch.ones(1, 8), torch.ones(1), one)).keep.tolist() == [[True]]


def test_in_a_model():
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour?"], [picture(70, 112)])
    with vtok.patch(model, "scope", keep=5) as patch:
        run(model, inputs)
    assert patch.trace.n_kept == [5]
    with pytest.raises(vtok.VtokError, match="importance='received'"):
        vtok.patch(tiny("qwen2_5_vl")[0], "scope")
    with pytest.raises(InvalidValue, match="alpha must be"):
        vtok.Scope(alpha=-1.0)

"""DART against a slow rewrite of its definition."""

import dataclasses

import pytest
import torch
from contract import batch, picture, tiny

import vtok
from vtok.compressors.dart import least_duplicated
from vtok.errors import InvalidValue
from vtok.types import Attention


def slow(hidden, size, visual, text, count, visual_pivots, text_pivots):
    """One sample, by lists. Sorting is stable, so that the lower index wins ties."""
    hidden = hidden.double().nan_to_num(0.0)
    by_size = lambda members: sorted(members, key=lambda i: -float(size[i]))
    seen = [i for i in range(len(visual)) if visual[i]]
    read = [i for i in range(len(text)) if text[i]]
    count = min(count, len(seen))
    images, words = by_size(seen)[: min(visual_pivots, count)], by_size(read)[:text_pivots]
    kept, pivots = list(images), images + words
    if not pivots:
        return set()
    share, extra = divmod(count - len(kept), len(pivots))
    for turn, pivot in enumerate(pivots):

        def similarity(i, pivot=pivot):
            lengths = float(hidden[i].norm() * hidden[pivot].norm())
            return float(hidden[i] @ hidden[pivot]) / lengths if lengths else 0.0

        candidates = sorted((i for i in seen if i not in kept), key=similarity)
        kept += candidates[: share + (turn < extra)]
    return set(kept)


def sample(seed, b=4, n=40, d=8):
    generator = torch.Generator().manual_seed(seed)
    hidden, size = torch.randn(b, n, d, generator=generator), torch.rand(b, n, generator=generator)
    kind = torch.randint(0, 3, (b, n), generator=generator)
    return hidden, size, kind == 1, kind == 2


def same(hidden, size, visual, text, count, *pivots):
    kept = least_duplicated(hidden, size, visual, text, torch.tensor(count), *pivots)
    for b in range(len(hidden)):
        expected = slow(hidden[b], size[b], visual[b], text[b], count[b], *pivots)
        assert set(kept[b].nonzero().squeeze(1).tolist()) == expected
        if pivots[0] and visual[b].any():
            assert len(expected) == min(count[b], int(visual[b].sum()))
    return kept


@pytest.mark.parametrize("pivots", [(4, 4), (1, 0), (0, 2), (3, 50), (50, 3)])
@pytest.mark.parametrize("count", [[1, 3, 5, 9], [7, 10, 11, 12], [40, 2, 0, 8]])
def test_picks(count, pivots):
    for seed in range(3):
        same(*sample(seed), count, *pivots)


def test_ties_go_to_the_lower_index():
    """Corners of a cube: cosines are exact and many are equal."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(5):
        _, size, visual, text = sample(seed)
        hidden = torch.randint(0, 2, (4, 40, 4), generator=generator) * 2.0 - 1
        same(hidden, (size * 3).round(), visual, text, [5, 6, 7, 8], 2, 2)


def test_equal_features():
    hidden, size = torch.ones(1, 20, 4), torch.ones(1, 20)
    visual = torch.arange(20)[None] >= 5
    assert same(hidden, size, visual, ~visual, [6], 2, 2)[0].nonzero().squeeze(1).tolist() == list(range(5, 11))


def test_no_text_no_visual_tokens_one_token():
    hidden, size, visual, text = sample(3)
    text[0] = False
    visual[1] = False
    visual[2] = torch.arange(40) == 7
    kept = same(hidden, size, visual, text, [9, 9, 9, 9], 4, 4)
    assert kept.sum(1).tolist() == [9, 0, 1, 9]


def test_zero_and_broken_features():
    hidden, size, visual, text = sample(4)
    size[:, ::7] = 0
    hidden[:, ::3] = 0
    same(hidden, size, visual, text, [9] * 4, 4, 4)
    hidden[:, ::3] = torch.nan
    same(hidden, size, visual, text, [9] * 4, 4, 4)
    size[0, 5] = torch.nan
    assert least_duplicated(hidden, size, visual, text, torch.tensor([9] * 4), 4, 4).sum(1).tolist() == [9] * 4


def attention(past=3, n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 4, n, 6, generator=generator), torch.randn(2, 2, past + n, 6, generator=generator)
    valid = torch.ones(2, past + n, dtype=torch.bool)
    visual = torch.zeros_like(valid)
    visual[0, past + 1 : past + 7] = True
    visual[1, past + 3 : past + 9] = True
    visual[1, past + 5] = False  # text between two pictures
    instruction = torch.tensor([[past + 7, past + 8, past + 9], [-1, past + 5, past + 9]])
    return Attention(
        query, key, 0.4, valid, visual, torch.tensor([past + 9, past + 9]), instruction,
        torch.randn(2, n, 10, generator=generator), (4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("past", [0, 3])
def test_score(past, norm):
    """Pivots by the norm of the keys over all heads; text is the instruction; a past on the cache has no part."""
    a = attention(past)
    score = vtok.DART(visual_pivots=1, text_pivots=2, norm=norm).score(a)
    assert score.shape == (2, past + 12)
    assert (score[:, :past] == 0).all()
    for b in range(2):
        power = int(norm[1])
        size = [sum(float(v.abs()) ** power for h in range(2) for v in a.key[b, h, past + i]) for i in range(12)]
        text = torch.zeros(12, dtype=torch.bool)
        for i in a.instruction[b].tolist():
            if i >= 0:
                text[i - past] = True
        expected = slow(a.hidden[b], torch.tensor(size), a.visual[b, past:], text, a.remaining[b], 1, 2)
        assert set(score[b, past:].nonzero().squeeze(1).tolist()) == expected


def test_what_comes_after_the_anchor_has_no_say():
    a = attention()
    changed = dataclasses.replace(a, key=a.key.clone(), hidden=a.hidden.clone())
    changed.key[:, :, -2:] = 100.0
    changed.hidden[:, -2:] = 100.0
    assert torch.equal(vtok.DART().score(a), vtok.DART().score(changed))


def test_options():
    assert vtok.DART().schedule(32) == {1: 128 / 576}
    assert vtok.DART(keep=64, layer=3).schedule(8) == {2: 64}
    assert isinstance(vtok.DART().with_budget(0.5, 32), vtok.DART)
    for options in (
        {"visual_pivots": -1},
        {"text_pivots": True},
        {"visual_pivots": 0, "text_pivots": 0},
        {"norm": "max"},
    ):
        with pytest.raises(InvalidValue, match=next(iter(options))):
            vtok.DART(**options)


@pytest.mark.parametrize("keep", [0.4, 3])
def test_in_a_model(keep):
    """The hidden states and keys are the layer's own; two pictures share one ranking."""
    model, processor = tiny("llava", "eager")
    inputs = batch(processor, ["two # and # yes"], [picture(56, 56, 1), picture(56, 56, 2)])
    layer, seen = model.model.language_model.layers[1], {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda m, args, kwargs: seen.update(hidden=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    ]
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
        with vtok.patch(model, "dart", keep=keep, layer=2) as patch:
            model(**inputs, use_cache=True)
    image = inputs["input_ids"][0] == model.config.image_token_id
    place = torch.arange(len(image))
    size = cache.layers[1].keys[0].square().sum((0, 2))
    text = ~image & (place > int(image.nonzero()[0]))
    count = int(32 * keep) if isinstance(keep, float) else 2 * keep
    expected = slow(seen["hidden"][0], size, image, text, count, 4, 4)
    kept = patch.trace.positions_at(2)[0]
    assert set(kept[image[kept]].tolist()) == expected
    assert len(expected) == count

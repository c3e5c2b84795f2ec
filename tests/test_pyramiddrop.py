"""PyramidDrop: its stages by hand, its picks by the unpatched model's attention."""

import pytest
import torch
from contract import INSIDE, Entered, Masked, mixed, tiny

import vtok
from vtok.errors import InvalidValue
from vtok.types import Attention


def run(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra})


def test_stages():
    assert vtok.PyramidDrop().schedule(32) == {7: 0.5, 15: 0.25, 23: 0.125}
    assert vtok.PyramidDrop(keep=0.4, stages=2).schedule(5) == {1: 0.4}
    assert vtok.PyramidDrop(stages=5).starts(13) == [2, 5, 7, 10]
    assert vtok.PyramidDrop(stages=4).starts(4) == [1, 2, 3]
    with pytest.raises(InvalidValue, match="number of decoder layers, 3"):
        vtok.PyramidDrop().schedule(3)
    for options in ({"stages": 1}, {"stages": True}, {"keep": 3}, {"keep": 0.0}, {"anchor": "last"}):
        with pytest.raises(InvalidValue, match=next(iter(options))):
            vtok.PyramidDrop(**options)


def test_published_memory_ratios():
    assert vtok.PyramidDrop().mean_keep(32) == 0.46875
    assert vtok.PyramidDrop(stages=3).mean_keep(24) == pytest.approx(0.583, abs=5e-4)  # InternVL2-1B: layers 8 and 16
    for stages, n in ((4, 32), (3, 10), (5, 13)):
        method, present, total = vtok.PyramidDrop(stages=stages, keep=0.3), 1.0, 0.0
        for layer in range(n):
            total += present
            present = method.schedule(n).get(layer, present)
        assert method.mean_keep(n) == pytest.approx(total / n)


def test_budgets():
    for budget in (0.26, 0.4, 0.9, 1.0):
        assert vtok.PyramidDrop().with_budget(budget, 32).mean_keep(32) == pytest.approx(budget, abs=1e-9)
    assert vtok.PyramidDrop().with_budget(1.0, 32).is_identity
    shorter = vtok.PyramidDrop().with_budget(0.25, 32)  # four stages: the first alone would be 0.25
    assert (shorter.stages, shorter.starts(32)[0]) == (5, 6)
    assert shorter.mean_keep(32) == pytest.approx(0.25, abs=1e-9)
    with pytest.raises(InvalidValue, match="above 0.031"):
        vtok.PyramidDrop().with_budget(1 / 32, 32)
    model, processor = tiny("llava_next")
    with vtok.patch(model, "pyramiddrop", budget=0.5) as patch:
        run(model, mixed(processor))
        assert 0.4 < patch.trace.mean_keep <= 0.5


def test_the_score_is_the_anchors_attention():
    torch.manual_seed(0)
    query, key, valid = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    valid[0, :2] = False
    score = vtok.PyramidDrop().score(Attention(query, key, 0.4, valid, valid, torch.tensor([6, 4])))
    for b, anchor in enumerate((6, 4)):
        seen, mean = [j for j in range(anchor + 1) if valid[b, j]], torch.zeros(7)
        for h in range(4):
            logits = torch.stack([query[b, h, anchor] @ key[b, h // 2, j] * 0.4 for j in seen])
            mean[seen] += logits.softmax(0) / 4
        torch.testing.assert_close(score[b], mean)


@pytest.mark.parametrize("family", INSIDE)
def test_pruning_is_masking_and_picks_are_the_models(family):
    model, processor = tiny(family, "eager")
    inputs = mixed(processor)
    with vtok.patch(model, "pyramiddrop") as patch, Entered(model, patch) as entered:
        pruned = run(model, inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    trace = patch.trace
    with Masked(model, trace, entered.embeds):
        masked = run(model, inputs, output_attentions=True)
        assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    here = trace.present_at(3)
    torch.testing.assert_close(pruned[here], masked.logits[here], atol=1e-5, rtol=1e-5)
    image = torch.zeros_like(here)
    for p in trace.pictures:
        image.view(-1)[p.tokens] = True
    image[:, -1] = False  # stays beside the budget where a picture ends the prompt
    for layer, share in ((1, 0.5), (2, 0.25), (3, 0.125)):
        before, now = trace.present_at(layer - 1), trace.present_at(layer)
        for b in range(len(image)):
            score = masked.attentions[layer - 1][b].mean(0)[-1]
            there = (image[b] & before[b]).nonzero().squeeze(1).tolist()
            best = sorted(there, key=lambda p: (-float(score[p]), p))[: int(share * int(image[b].sum()))]
            assert sorted(best) == (image[b] & now[b]).nonzero().squeeze(1).tolist()

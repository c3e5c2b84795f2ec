"""In-LLM methods of several layers whose scores say how many tokens stay, alone and beside counts: against masking, and
against their rule applied to the attention of the unpatched model."""

from dataclasses import dataclass

import pytest
import torch
from contract import Masked, mixed, run, tiny

import vtok
from vtok.compressor import _REGISTRY
from vtok.kernels.attention_rows import attention_rows
from vtok.stages.llm import InLLM


@pytest.fixture
def above_mean():
    """Behind each layer of `after` those visual tokens stay that get more of the anchor's attention than the mean of
    those that are there, or as many as a count says."""

    @dataclass(frozen=True, kw_only=True)
    class AboveMean(InLLM):
        name, paper, adaptive, needs = "above_mean", "test", True, frozenset({"attention"})
        after: tuple = ((0, None), (2, None))

        def schedule(self, n_layers):
            return dict(self.after)

        def score(self, seen):
            at = seen.anchor[:, None]
            row = attention_rows(seen.query, seen.key, at, seen.scaling, seen.valid).mean(1).squeeze(1)
            mean = (row * seen.visual).sum(1, keepdim=True) / seen.visual.sum(1, keepdim=True).clamp(min=1)
            return row - mean

    yield AboveMean
    del _REGISTRY["above_mean"]


@pytest.mark.parametrize("after", [((0, None), (2, None)), ((0, None), (1, 0.4)), ((0, 0.9), (1, None), (2, None))])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_each_layer_acts(above_mean, family, after):
    model, processor = tiny(family, "eager")
    inputs = mixed(processor)
    with vtok.patch(model, above_mean(after=after)) as patch:
        pruned = run(model, inputs).logits
    trace = patch.trace
    with Masked(model, trace):
        masked = run(model, inputs, output_attentions=True)
    last = trace.present_at(3)
    torch.testing.assert_close(pruned[last], masked.logits[last], atol=1e-5, rtol=1e-5)
    visual = torch.zeros_like(last)
    for picture in trace.pictures:
        visual.view(-1)[picture.tokens] = True
    visual[:, -1] = False  # a picture at the prompt's end keeps its last token beside the budget
    acted = 0
    for layer, share in after:
        before, now = trace.present_at(layer), trace.present_at(layer + 1)
        for b in range(len(last)):
            there = (visual[b] & before[b]).nonzero().squeeze(1).tolist()
            score = masked.attentions[layer][b].mean(0)[-1]
            if share is None:
                mean = sum(float(score[p]) for p in there) / max(1, len(there))
                best = [p for p in there if float(score[p]) > mean]
            else:
                n = share if isinstance(share, int) else int(share * int(visual[b].sum()))
                best = sorted(there, key=lambda p: (-float(score[p]), p))[:n]
            assert sorted(best) == (visual[b] & now[b]).nonzero().squeeze(1).tolist(), (layer, b)
            acted += len(best) < len(there)
    assert acted > len(after)  # each of them drops something in several samples

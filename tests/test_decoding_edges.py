"""Decoding with drafts where things end, fail or change on the way, against plain `generate`."""

import copy
import pickle

import pytest
import torch
from test_decoding import decoder, prompt, refused, same, text_model
from transformers import DynamicCache, FalconConfig, FalconForCausalLM, StoppingCriteria

import vtok
from vtok.errors import NothingToReport
from vtok.text.decoding import token_recycling


class Broken(StoppingCriteria):
    """Raises where a text is so long."""

    def __init__(self, length):
        self.length = length

    def __call__(self, ids, scores, **kwargs):
        if ids.shape[1] == self.length:
            raise RuntimeError("broken")
        return torch.tensor([False])


@pytest.mark.parametrize("at", [14, 20, 23, 30])
def test_an_error_leaves_no_drafts_in_the_callers_cache(at):
    model = text_model()
    how = {"max_new_tokens": 40, "do_sample": False}
    whole = model.generate(prompt(), **how)
    for drafted in (decoder(), vtok.NGram(adapt=False)):
        model.generate(prompt(), **how, custom_generate=drafted)
        cache = DynamicCache()
        with pytest.raises(RuntimeError, match="broken"):
            model.generate(
                prompt(),
                **how,
                past_key_values=cache,
                stopping_criteria=[Broken(at)],
                custom_generate=drafted,
            )
        assert 12 <= cache.get_seq_length() < at
        rest = whole.shape[1] - at
        again = model.generate(whole[:, :at], past_key_values=cache, max_new_tokens=rest, do_sample=False)
        assert torch.equal(again, whole)
        same(model, {"input_ids": prompt()}, drafted, times=1)


def test_an_end_takes_no_more_draws_than_plain_sampling():
    """Also where drafts behind the end would be accepted: what is drawn next is the same."""
    model, hot, inside = text_model(), decoder(), 0
    plain = model.generate(prompt(), max_new_tokens=40, do_sample=False)
    model.generate(prompt(), max_new_tokens=40, do_sample=False, custom_generate=hot)
    how = {"max_new_tokens": 40, "do_sample": True, "temperature": 0.3, "pad_token_id": 0}
    for seed in range(8):
        end = int(plain[0, 16 + seed])
        torch.manual_seed(seed)
        expected = model.generate(prompt(), **how, eos_token_id=end), torch.rand(())
        torch.manual_seed(seed)
        got = model.generate(prompt(), **how, eos_token_id=end, custom_generate=hot), torch.rand(())
        assert all(map(torch.equal, got, expected))
        inside += hot.stats.accepted
    assert inside > 10


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 24, "rope_theta": 1e4, "factor": 4.0}
SCALED = {
    "longrope": {**LONG, "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)]},
    "dynamic": {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize("length", [12, 30])
@pytest.mark.parametrize("kind", SCALED)
def test_rotary_frequencies_that_follow_from_the_length(kind, length):
    """They change at 24 tokens, once or with each further one. A model of its own each time: it remembers lengths."""
    fresh = lambda: text_model(max_position_embeddings=24, rope_parameters=SCALED[kind])
    how = {"max_new_tokens": 40, "do_sample": False}
    expected = fresh().generate(prompt(length), **how)
    learned = decoder()
    fresh().generate(prompt(length), **how, custom_generate=learned)
    for drafted in (learned, vtok.NGram(adapt=False)):
        assert torch.equal(fresh().generate(prompt(length), **how, custom_generate=drafted), expected)
    assert (learned.stats.drafted > 0) == (kind == "longrope" or length < 24)


def test_windows_and_masks_that_tell_positions_are_refused():
    """A window is one of the caller's plain cache, too."""
    windowed = text_model("mistral", sliding_window=8)
    refused("sliding windows", windowed, past_key_values=DynamicCache())
    sizes = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    refused("ALiBi", FalconForCausalLM(FalconConfig(**sizes, alibi=True)).eval())


def test_what_the_prompt_would_take_is_counted_once(monkeypatch):
    """Not at each step that waits for it: counting a model's weights takes as long as a layer."""
    counted, inner = [], token_recycling.weights
    monkeypatch.setattr(token_recycling, "weights", lambda model: counted.append(model) or inner(model))
    waiting = vtok.TokenRecycling()
    monkeypatch.setattr(waiting._running.payoff, "once", lambda share, work: None if share else 0.0)
    text_model().generate(prompt(), max_new_tokens=9, do_sample=False, custom_generate=waiting)
    assert waiting.stats.steps > 3 and len(counted) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda drafted: pickle.loads(pickle.dumps(drafted))])
def test_a_copy_knows_what_was_learned_and_is_free(copied):
    model, drafted = text_model(), decoder()
    same(model, {"input_ids": prompt()}, drafted)
    learned = drafted.stats.accepted
    with drafted._running.lock:  # as while it decodes for another thread
        other = copied(drafted)
        with pytest.raises(NothingToReport):
            _ = other.stats
        same(model, {"input_ids": prompt()}, other, times=1)
    assert other.stats.accepted >= learned > 5
    new = decoder()
    same(model, {"input_ids": prompt()}, new, times=1)
    assert new.stats.accepted < learned

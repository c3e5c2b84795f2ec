"""SkipDecode: which layers run when, and that nothing else changes."""

import itertools
import threading
from collections import Counter

import pytest
import torch
from contract import batch, language_model, picture, tiny

import vtok
from vtok.engine.cache import NAME, cache_in
from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.text.decoding.skipdecode import SkipDecode

LAYERS = 6


@pytest.fixture(scope="module")
def model():
    return language_model(40, layers=LAYERS)


HOW = SkipDecode(min_layers=2, steps=6)
PADDED = {
    "input_ids": torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "step"])
@pytest.mark.parametrize("most", [None, 5])
def test_the_schedule_falls(schedule, most):
    how = SkipDecode(min_layers=3, max_layers=most, steps=7, schedule=schedule, warmup=2)
    depths = [how.depth(step, LAYERS) for step in range(12)]
    assert depths[0] == (most or LAYERS) and set(depths[7:]) == {3}
    assert all(a >= b for a, b in itertools.pairwise(depths))
    sets = [{layer for layer in range(LAYERS) if how.runs(layer, depth, LAYERS)} for depth in depths]
    assert [len(s) for s in sets] == depths
    assert all(later <= earlier and {0, 1, LAYERS - 1} <= later for earlier, later in itertools.pairwise(sets))
    assert how.mean_depth(12, LAYERS) == pytest.approx(sum(depths) / 12)


def test_golden_numbers_of_the_linear_schedule():
    """n(t) = round(Lmax - (Lmax - Lmin) min(t, T) / T): 6 to 2 over 8 steps."""
    how = SkipDecode(min_layers=2, steps=8)
    assert [how.depth(t, 6) for t in range(10)] == [6, 6, 5, 5, 4, 4, 3, 3, 2, 2]


def test_layers_run_as_often_as_the_schedule_says(model):
    counts, hooks = Counter(), []
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.self_attn.register_forward_hook(lambda *_, i=i: counts.update([i])))
    out = model.generate(**PADDED, max_new_tokens=8, custom_generate=HOW, return_dict_in_generate=True)
    for hook in hooks:
        hook.remove()
    depths = [6, 5, 5, 4, 3, 3, 2, 2]  # of the prompt and seven tokens: 6 - 4 t / 6
    assert depths == [HOW.depth(step, LAYERS) for step in range(8)]
    # layer 0 warms up; of the others, layer l runs where depth - 1 >= 6 - l
    assert [counts[i] for i in range(LAYERS)] == [
        8,
        *(sum(d - 1 >= LAYERS - i for d in depths) for i in range(1, LAYERS)),
    ]
    held = [cache_in(out).layers[i].get_seq_length() for i in range(LAYERS)]
    assert held == [12, 5, 7, 8, 10, 12]


def test_all_layers_are_the_model(model):
    how = {**PADDED, "max_new_tokens": 10}
    assert torch.equal(
        model.generate(**how, custom_generate=SkipDecode(min_layers=LAYERS, steps=3)), model.generate(**how)
    )


def test_decoding_is_what_tuning_sees(model):
    """Logits of each step, from the cache, against one forward over all positions without a cache."""
    out = model.generate(
        **PADDED, max_new_tokens=9, custom_generate=HOW, output_logits=True, return_dict_in_generate=True
    )
    mask = torch.cat([PADDED["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad(), HOW.tuning(model, torch.tensor([5, 5])):
        full = model(out.sequences, attention_mask=mask, position_ids=positions).logits
    with torch.no_grad():
        dense = model(out.sequences, attention_mask=mask, position_ids=positions).logits
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(logits, full[:, 4 + step], atol=1e-4, rtol=1e-4)
    assert (full - dense)[:, 6:].abs().max() > 0.1 and (full - dense)[:, :5].abs().max() < 1e-4


def test_tuning_trains(model):
    ids = torch.randint(0, 40, (2, 10))
    with HOW.tuning(model, torch.tensor([3, 5])):
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


def test_layers_are_what_they_were(model):
    before = [dict(vars(layer)) for layer in model.model.layers]
    hooks = len(model.model._forward_pre_hooks)

    def stops(ids, scores):
        raise KeyboardInterrupt

    model.generate(**PADDED, max_new_tokens=3, custom_generate=HOW)
    with pytest.raises(KeyboardInterrupt):
        model.generate(**PADDED, max_new_tokens=3, custom_generate=HOW, logits_processor=[stops])
    assert [dict(vars(layer)) for layer in model.model.layers] == before
    assert len(model.model._forward_pre_hooks) == hooks
    own = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    layer = model.model.layers[3]
    layer.forward = own  # as accelerate does
    with HOW.tuning(model, torch.tensor([3])):
        assert layer.forward is not own
    assert layer.forward is own
    del layer.forward


def test_other_threads(model):
    """A plain forward in another thread sees all layers; a second decoding with skips is refused."""
    expected, seen = model.generate(**PADDED, max_new_tokens=4), []

    def elsewhere(custom):
        try:
            seen.append(model.generate(**PADDED, max_new_tokens=4, custom_generate=custom))
        except PatchStateError as error:
            seen.append(error)

    def meanwhile(ids, scores):
        for custom in (None, HOW) if not seen else ():
            thread = threading.Thread(target=elsewhere, args=(custom,))
            thread.start()
            thread.join()
        return scores

    out = model.generate(**PADDED, max_new_tokens=8, custom_generate=HOW, logits_processor=[meanwhile])
    assert torch.equal(seen[0], expected) and isinstance(seen[1], PatchStateError)
    assert torch.equal(out, model.generate(**PADDED, max_new_tokens=8, custom_generate=HOW))


def test_no_second_turn(model):
    out = model.generate(**PADDED, max_new_tokens=8, custom_generate=HOW, return_dict_in_generate=True)
    turn = {
        "input_ids": torch.cat([out.sequences, torch.tensor([[3], [4]])], 1),
        "max_new_tokens": 2,
        NAME: cache_in(out),
    }
    with pytest.raises(Unsupported, match="whole conversation as a new prompt"):
        model.generate(**turn, custom_generate=HOW)
    with pytest.raises(PatchStateError, match="filled by SkipDecode"):
        model.generate(**turn)
    plain = model.generate(**PADDED, max_new_tokens=2, return_dict_in_generate=True)
    turn |= {"input_ids": torch.cat([plain.sequences, torch.tensor([[3], [4]])], 1), NAME: cache_in(plain)}
    with pytest.raises(Unsupported, match="whole conversation"):
        model.generate(**turn, custom_generate=HOW)


def test_a_streamer_gets_all(model):
    class Streamer:
        tokens, ended = [], False

        def put(self, value):
            self.tokens.append(value.tolist())

        def end(self):
            self.ended = True

    one, streamer = torch.tensor([[1, 2, 3]]), Streamer()
    out = model.generate(one, max_new_tokens=4, custom_generate=HOW, streamer=streamer)
    assert streamer.ended and streamer.tokens == [[[1, 2, 3]], *([i] for i in out[0, 3:].tolist())]


def test_what_is_refused(model):
    for wrong in ({"num_beams": 2}, {"prefill_chunk_size": 2}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(Unsupported, match="no beam search"):
            model.generate(**PADDED, max_new_tokens=2, custom_generate=HOW, **wrong)
    with pytest.raises(Unsupported, match="leave the cache unset"):
        model.generate(**PADDED, max_new_tokens=2, custom_generate=HOW, cache_implementation="static")
    for wrong in (
        {"min_layers": 1},
        {"min_layers": 7},
        {"min_layers": 3, "max_layers": 2},
        {"min_layers": 2, "warmup": 2},
    ):
        with pytest.raises(InvalidValue, match="must hold"):
            model.generate(**PADDED, max_new_tokens=2, custom_generate=SkipDecode(**{"steps": 4, **wrong}))
    with pytest.raises(InvalidValue, match="schedule"):
        SkipDecode(min_layers=2, steps=4, schedule="random")


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "qwen3_vl"])
def test_pictures(family):
    model, processor = tiny(family)
    inputs = batch(processor, ["# what?", "a longer prompt: #"], [picture(56, 84), picture(56, 56)])
    how = {**inputs, "max_new_tokens": 6, "do_sample": False}
    every = SkipDecode(min_layers=len(model.get_decoder().layers), steps=2)
    plain = model.generate(**how)
    assert torch.equal(model.generate(**how, custom_generate=every), plain)
    fewer = model.generate(**how, custom_generate=SkipDecode(min_layers=2, steps=2))
    assert fewer.shape == plain.shape and not torch.equal(fewer, plain)
    assert torch.equal(model.generate(**how), plain)
    with vtok.patch(model, "divprune", keep=0.5), pytest.raises(Unsupported, match="compressed prompt"):
        model.generate(**how, custom_generate=every)

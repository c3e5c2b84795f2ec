"""The cache as people use it: odd budgets, caches that were filled otherwise, cropped ones, padding between two turns,
and what the errors and the handle say."""

from __future__ import annotations

import copy

import pytest
import torch
from contract import batch, language_model, picture, tiny

import vtok
from vtok.engine.cache import NAME, cache_in
from vtok.errors import InvalidValue, PatchStateError, Unsupported

GREEDY = {"max_new_tokens": 5, "do_sample": False}
IDS = torch.randint(5, 90, (1, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return language_model(96)


def run(model, ids, cache=None, **extra):
    with torch.no_grad():
        return model(ids, use_cache=True, **({} if cache is None else {NAME: cache}), **extra)


def generate(model, ids=IDS, **extra):
    return model.generate(ids, **GREEDY, return_dict_in_generate=True, **extra)


def places(cache) -> list[int]:
    """Of the first layer's first head group."""
    return cache.states["kv"].layers[0].place[0, 0].tolist()


# ---- budgets ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (vtok.H2O(keep=6, recent=1.0, sinks=2), [0, 1, 30, 31, 32, 33]),
        (vtok.H2O(keep=10, recent=0.9, sinks=4), [0, 1, 2, 3, 28, 29, 30, 31, 32, 33]),
        (vtok.StreamingLLM(visual=0.5, text=0.1), [0, 1, 2, 3, 33]),
    ],
)
def test_the_latest_columns_stay_beside_the_first(model, part, expected):
    """Where both take the whole budget, or a small share of text."""
    with vtok.patch(model, part):
        assert places(cache_in(generate(model))) == expected


@pytest.mark.parametrize("name", ["h2o", "keyformer"])
def test_a_small_share_of_text_holds_the_latest(name):
    """The latest columns are a part of the whole budget: more than the text's, of which an answer is."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # b"], [picture(56, 84)])
    part = vtok.compressor.build(name, visual=0.9, text=2, recent=0.6)
    with vtok.patch(model, part):
        cache = cache_in(model.generate(**inputs, **GREEDY, return_dict_in_generate=True))
    for record in cache.states["kv"].layers.values():
        text = [sorted(row[~seen].tolist()) for row, seen in zip(record.place[0], record.visual[0])]
        assert text == [[cache.seen - 2, cache.seen - 1]] * len(text)


def test_the_latest_are_counted_in_whole_numbers(model):
    """84 % of 75 are 63; in float32 the product is 62.99."""
    ids = torch.randint(5, 90, (1, 100))
    with vtok.patch(model, vtok.H2O(keep=75, recent=0.84)), pytest.MonkeyPatch.context() as patched:
        patched.setattr(vtok.H2O, "score", lambda self, seen: -seen.place.float())  # the first come first
        assert places(cache_in(run(model, ids))) == [*range(12), *range(37, 100)]


def test_a_share_of_text_below_the_sinks_is_refused():
    with pytest.raises(InvalidValue, match="text must be above sinks, 4, got 3"):
        vtok.StreamingLLM(visual=0.5, text=3)
    vtok.StreamingLLM(keep=3, visual=0.5, text=8)  # what `keep` says is not asked


def test_a_budget_and_shares_are_not_both(model):
    with pytest.raises(InvalidValue, match="leave visual and text of h2o out"):
        vtok.patch(model, vtok.H2O(visual=0.2, text=0.9), budget=0.1)


# ---- caches of another life ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["h2o", "streaming_llm", "keyformer", "snapkv"])
def test_a_prompt_that_was_read_whole_stays_whole(model, name):
    """While paused, or before the patch; the next prompt is cut with it."""
    dense = run(model, IDS)
    expected = run(model, IDS[:, :1], copy.deepcopy(cache_in(dense))).logits
    with vtok.patch(model, name, keep=0.3) as patch:
        with patch.paused():
            paused = cache_in(run(model, IDS))
        for cache in (cache_in(dense), paused):
            torch.testing.assert_close(run(model, IDS[:, :1], cache).logits, expected)
            assert cache.columns(0) == 31
            run(model, IDS[:, :9], cache)
            assert cache.columns(0) == int(0.3 * 40)


def test_budgets_that_begin_apart_later_are_refused(model):
    with vtok.patch(model, "h2o", keep=0.3) as patch:
        cache = cache_in(run(model, IDS))
        with patch.using(visual=0.2), pytest.raises(PatchStateError, match="Start a new conversation"):
            run(model, IDS[:, :4], cache)


def test_budgets_that_end_apart_are_of_all(model):
    with vtok.patch(model, "h2o", text=0.5) as patch:
        cache = cache_in(run(model, IDS))
        with patch.using(text=None, keep=0.25):
            run(model, IDS[:, :1], cache)  # an answer: as the prompt was cut
            assert cache.columns(0) == 15
            run(model, IDS[:, :9], cache)
            assert cache.columns(0) == 10


@pytest.mark.parametrize(("name", "whole"), [("h2o", 4), ("snapkv", 4 + 4), ("kvzip", 4)])
def test_what_was_evicted_cannot_be_cropped(model, name, whole):
    """The last columns are not those of the last tokens then. An answer of four tokens, and windows of four."""
    with vtok.patch(model, name, keep=0.3):
        cache = cache_in(generate(model))
        held = cache.columns(1)
        with pytest.raises(PatchStateError, match="dropped already"):
            cache.crop(-20)
        assert (cache.get_seq_length(), cache.columns(1)) == (34, held)
        cache.crop(-whole)
        assert (cache.get_seq_length(), cache.columns(1)) == (34 - whole, held - whole)


@pytest.mark.parametrize("method", ["divprune", vtok.FastV(keep=0.5, layer=1), vtok.GemFilter(keep=0.5, last=2)])
def test_what_did_not_enter_cannot_be_cropped(method):
    """The text behind a picture is there, of the picture a part."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour is it?"], [picture(56, 84)])
    visual = inputs["input_ids"][0] == model.config.image_token_id
    behind = 2 if isinstance(method, vtok.GemFilter) else int((~visual).flip(0).long().cumprod(0).sum())
    with vtok.patch(model, method):
        cache = cache_in(model.generate(**inputs, **GREEDY, return_dict_in_generate=True))
        with pytest.raises(PatchStateError, match="dropped already"):
            cache.crop(-(4 + behind + 6))
        held = cache.columns(3)
        cache.crop(-(4 + behind))
        assert cache.columns(3) == held - 4 - behind


def test_a_cropped_cache_goes_on(model):
    """What stays are the columns that would have been there, and they are known by their places."""
    part = vtok.StreamingLLM(keep=12, sinks=2)
    with vtok.patch(model, part):
        cache = cache_in(run(model, IDS))
        cache.crop(-3)
        for token in IDS[0, :2]:
            run(model, token.view(1, 1), cache)
        assert places(cache) == [0, 1, *range(20, 29)]
        run(model, IDS[:, :7], cache)
        assert places(cache) == [0, 1, *range(26, 36)]


def test_a_cache_that_was_reset_begins_anew(model):
    with vtok.patch(model, vtok.GemFilter(keep=0.4, first=1, last=2)):
        cache = cache_in(run(model, IDS))
        cache.reset()
        run(model, IDS, cache)
        assert cache.columns(0) == 12


@pytest.mark.parametrize("name", ["h2o", "snapkv"])
def test_a_smaller_cache_assists(model, name):
    """transformers lets the assistant draft anew from each text, and crops what was not accepted."""
    helper = language_model(96)
    plain = model.generate(IDS, max_new_tokens=12, do_sample=False)
    with vtok.patch(helper, name, keep=0.3):
        assert torch.equal(model.generate(IDS, max_new_tokens=12, do_sample=False, assistant_model=helper), plain)


def test_votes_are_not_used_again_behind_an_eviction(model, monkeypatch):
    """H2O moves columns at each token, and votes are of columns."""
    from vtok.compressors import tokenselect

    calls, inner = [], tokenselect.votes
    monkeypatch.setattr(tokenselect, "votes", lambda *a: calls.append(1) or inner(*a))
    for first, expected in (("h2o", 2 * 4), ("snapkv", 2)):
        calls.clear()
        part = vtok.TokenSelect(keep=3, initial=1, latest=2, theta=-1.0)
        with vtok.patch(model, [vtok.compressor.build(first, keep=0.5), part]):
            generate(model)
        assert len(calls) == expected


# ---- two turns of a padded batch -------------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "part",
    [
        vtok.SnapKV(keep=0.5, window=4),
        vtok.KVzip(keep=0.4, sinks=1, chunk=7),
        vtok.H2O(keep=0.4),
        vtok.TokenSelect(keep=3, initial=1, latest=2, chunk=4, theta=None),
    ],
    ids=lambda part: part.name,
)
def test_a_padded_second_turn_is_its_samples(model, part, side):
    """Padding lies between two prompts of a row then, or behind both."""
    ids, new = torch.randint(5, 90, (2, 24)), torch.randint(5, 90, (2, 12))
    mask, there = torch.ones_like(ids), torch.ones_like(new)
    mask[0, :9] = 0
    there[1, slice(7) if side == "left" else slice(-7, None)] = 0
    all_there = torch.cat([mask, there], 1)
    at = all_there.cumsum(1).sub(1).clamp(min=0)
    token, after = torch.full((2, 1), 7), torch.cat([all_there, torch.ones(2, 1, dtype=torch.long)], 1)
    with vtok.patch(model, part):
        cache = cache_in(run(model, ids, attention_mask=mask, position_ids=at[:, :24]))
        read = run(model, new, cache, attention_mask=all_there, position_ids=at[:, 24:]).logits
        said = run(model, token, cache, attention_mask=after, position_ids=all_there.sum(1, keepdim=True)).logits
        for row in range(2):
            alone = cache_in(run(model, ids[row][mask[row].bool()][None]))
            logits = run(model, new[row][there[row].bool()][None], alone).logits
            torch.testing.assert_close(read[row][there[row].bool()], logits[0], atol=1e-4, rtol=1e-4)
            logits = run(model, token[:1], alone).logits
            torch.testing.assert_close(said[row], logits[0], atol=1e-4, rtol=1e-4)


# ---- words -----------------------------------------------------------------------------------------------------------
def test_a_text_without_a_prompt(model):
    with vtok.patch(model, "h2o"):
        assert model.generate(max_new_tokens=3, bos_token_id=1).shape == (1, 4)


@pytest.mark.parametrize("how", [{"use_cache": False}, {"assistant_model": None}])
def test_what_generate_cannot_do_is_named(model, how):
    """A cache that is not there, and drafts that come in one forward with the prompt."""
    if "assistant_model" in how:
        how = {"assistant_model": language_model(96, seed=1)}
    with (
        vtok.patch(model, "snapkv"),
        pytest.raises(Unsupported, match="use_cache=False, and assistant_model"),
    ):
        generate(model, **how)


def test_the_decoder_alone_is_refused(model):
    """Past the patched model nothing acts: it would be dense without a word."""
    with torch.no_grad():
        dense = model.model(IDS).last_hidden_state
        with vtok.patch(model, "snapkv", keep=6) as patch:
            with pytest.raises(Unsupported, match="LlamaModel was called on its own"):
                model.model(IDS)
            with patch.paused():
                assert model.model(IDS).last_hidden_state.equal(dense)


def test_a_prepared_mask_is_refused(model):
    with vtok.patch(model, "h2o"), pytest.raises(Unsupported, match="prepared attention mask"):
        run(model, IDS, attention_mask=torch.zeros(1, 1, 30, 30))


def test_words_that_the_model_does_not_have(model):
    with pytest.raises(InvalidValue, match=r"ids of the model's 96 tokens, got \[96\]"):
        vtok.patch(model, vtok.KVzip(ask=(3, 96)))
    with pytest.raises(InvalidValue, match="ask must be"):
        vtok.KVzip(ask=(-1,))


def test_a_language_model_is_not_told_of_pictures(model):
    with vtok.patch(model, "snapkv", keep=0.5) as patch:
        assert "no prompt yet" in repr(patch)
        with pytest.raises(AttributeError, match="on a prompt first"):
            patch.trace  # noqa: B018
        run(model, IDS)
        assert "100.0% of the FLOPs, 50.0% of the cache" in repr(patch)


# ---- decoders that do not show what a method needs to see --------------------------------------------------
def test_attention_of_a_registry_of_its_own_is_refused():
    """Doge's is never shown, so that nothing would be dropped; and a language model is not told of divprune."""
    with pytest.raises(Unsupported, match=r"registry, or is handed no keywords\. No method of vtok works on this"):
        vtok.patch(language_model(96, kind="Doge"), "h2o")


@pytest.mark.parametrize("name", ["h2o", "kvzip"])
def test_layers_that_attend_twice_are_refused(name):
    """DiffLlama's; columns would be counted twice."""
    model = language_model(96, kind="DiffLlama")
    with vtok.patch(model, name), pytest.raises(Unsupported, match="attend more than once"):
        run(model, IDS)


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_families_with_windows_or_states_are_told_why(family):
    with pytest.raises(Unsupported, match="windows or states, .* Methods before the language model work here"):
        vtok.patch(tiny(family)[0], "h2o")


@pytest.mark.parametrize(
    "part", [vtok.H2O(), vtok.SnapKV(), vtok.GemFilter(), vtok.TokenSelect(keep=2, initial=1, latest=1)]
)
def test_another_attention_implementation_is_another_patch(model, part):
    with vtok.patch(model, part):
        model.set_attn_implementation("eager")
        with pytest.raises(Unsupported, match="Patch again after changing the attention"):
            generate(model)
    with vtok.patch(model, part):
        generate(model)


# ---- the trace -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "part", [vtok.SnapKV(keep=0.5, window=4), vtok.H2O(visual=0.3, text=0.8), vtok.KVzip(keep=0.5)]
)
def test_a_later_trace_is_of_the_later_prompt(part):
    """Columns of its own alone, as the dense ones that they are held against."""
    model, processor = tiny("llava")
    first = batch(processor, ["a # What colour is it?"], [picture(56, 84)])
    second = batch(processor, ["# b"], [picture(56, 56, 1)])
    n, new = first["input_ids"].shape[1], second["input_ids"].shape[1]
    second["attention_mask"] = torch.ones(1, n + new, dtype=torch.long)
    with vtok.patch(model, part) as patch, torch.no_grad():
        cache = cache_in(model(**first, use_cache=True))
        model(**second, use_cache=True, **{NAME: cache})
        trace = patch.trace
    held = [(record.place >= n) & there_in(cache, i) for i, record in cache.states["kv"].layers.items()]
    assert trace.to_dict()["kv_columns"] == {str(i): layer.sum(2).tolist() for i, layer in enumerate(held)}
    text = model.config.get_text_config()
    width = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4
    widest = sum(int(layer.sum(2).max()) for layer in held)
    assert trace.kv_bytes() == {"dense": width * 4 * new, "compressed": width * widest}


def there_in(cache, layer: int) -> torch.Tensor:
    """[B, G, L] bool, which columns of a layer are no padding."""
    valid, place = cache.valid_at(layer), cache.states["kv"].layers[layer].place
    if valid is None:
        return torch.ones_like(place, dtype=torch.bool)
    return valid if valid.ndim == 3 else valid[:, None].expand_as(place)

"""The engine's contract (docs/design.md, section 3) on every family, against the oracle "pruning is masking", or, where
that does not hold, the unpatched model on fewer tokens."""

import dataclasses

import pytest
import torch
from contract import (
    FAMILIES,
    PROMPTS,
    REFUSED,
    STACKS,
    Entered,
    able,
    batch,
    cells,
    compressors,
    dense,
    drops,
    example,
    masks,
    matrix,
    mixed,
    oracle,
    picture,
    run,
    shown,
    tiny,
)

import vtok
import vtok.types
from vtok import options
from vtok.errors import Unsupported


class First(vtok.Uniform):
    """Keeps the first tokens, so that a picture's last one is always dropped."""

    def select(self, tokens):
        index = torch.arange(vtok.types.keep_count(tokens.features.shape[1], self.keep))
        return vtok.Selection.of_indices(index.expand(len(tokens.features), -1), tokens.features.shape[1])


def patched(model, label):
    return vtok.patch(model, example(model, label))


def all_kept(parts):
    """The parts at keep=1.0, or nothing where that is not the identity."""
    if any(part.trained or part.keep is None or "keep" not in options.of(type(part)) for part in parts):
        return []
    whole = [dataclasses.replace(part, keep=1.0) for part in parts]
    return whole if all(part.is_identity for part in whole) else []


def with_word(word, given):
    """Cells with one word more each."""
    return [pytest.param(*cell.values, word, id=f"{cell.id}-{word}") for cell in given]


def test_every_method_is_in_the_matrix():
    assert {method.partition("-")[0] for _, method in matrix()} - STACKS.keys() == set(compressors.load_all())
    for scope in ("kinds", "some"):
        assert {cell.values[1] for cell in cells(scope)} == {method for _, method in matrix()}
        assert {cell.values[0] for cell in cells(scope)} >= {"gemma3", "internvl", "llava", "qwen3_5", "qwen3_vl"}


@pytest.mark.parametrize(("family", "method"), REFUSED)
def test_what_is_not_in_the_matrix_is_refused(family, method):
    model, processor = tiny(family)
    with patched(model, method), pytest.raises(Unsupported, match=REFUSED[family, method]):
        run(model, mixed(processor, label=method))


@pytest.mark.parametrize(
    ("family", "method", "side"), with_word("left", cells("all", masks)) + with_word("right", cells("some", masks))
)
def test_pruning_is_masking(family, method, side):
    """Contract 2, 3, 4, 5: ragged batch with no, one and two pictures, picture first and last, either padding."""
    model, processor = tiny(family)
    inputs = mixed(processor, side, method)
    with patched(model, method) as patch, Entered(model, patch) as entered:
        pruned = run(model, inputs, output_hidden_states=True)
    trace = patch.trace
    dropped = drops(matrix()[family, method])
    assert dropped == (sum(trace.n_kept_at(3)) < sum(trace.n_visual))
    with oracle(model, trace, entered.embeds):
        masked = run(model, inputs, output_hidden_states=True)
    present = trace.present_at(3)
    whole, _ = dense(family, side, method)
    assert pruned.logits.shape == whole.shape
    close(pruned.logits[present], masked.logits[present])
    assert not dropped or (pruned.logits[~present] == 0).all()
    assert not torch.allclose(pruned.logits[present], whole[present], atol=1e-2)  # the oracle is not vacuous
    for i, (ours, theirs) in enumerate(zip(pruned.hidden_states, masked.hidden_states)):
        here = trace.present_at(max(0, i - 1))
        assert ours.shape == theirs.shape
        close(ours[here], theirs[here])
        assert not dropped or (ours[~here] == 0).all()


def close(ours, theirs):
    """To 1e-5 of the largest number: what scaled-up random weights give is not of order 1, and rounding goes by it."""
    size = theirs.abs().max().item()
    torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, size), rtol=1e-5)


GENERATION = {"greedy": {}, "beams": {"num_beams": 3}, "samples": {"do_sample": True, "num_return_sequences": 3}}


@pytest.mark.parametrize(
    ("family", "method", "how"),
    [cell for how in GENERATION for cell in with_word(how, cells("kinds" if how == "greedy" else "some", masks))],
)
def test_generate(family, method, how):
    """Contract 2, 3, 5: the same tokens as the unpatched model with masked columns, and the full prompt ids."""
    model, processor = tiny(family)
    inputs = mixed(processor, label=method)
    options = {"max_new_tokens": 4, "do_sample": False} | GENERATION[how]
    torch.manual_seed(0)
    with patched(model, method) as patch, Entered(model, patch) as entered:
        pruned = model.generate(**inputs, **options)
    torch.manual_seed(0)
    with oracle(model, patch.trace, entered.embeds):
        masked = model.generate(**inputs, **options)
    assert torch.equal(pruned, masked)
    prompt = inputs["input_ids"].repeat_interleave(len(pruned) // len(inputs["input_ids"]), 0)
    assert torch.equal(pruned[:, : prompt.shape[1]], prompt)


@pytest.mark.parametrize(("family", "method"), cells("kinds"))
def test_a_batch_is_its_samples(family, method):
    """Contract 5: each row as if it were alone."""
    model, processor = tiny(family)
    prompts = ["a # What colour is it?", "two # and # yes", "no picture at all"]
    pictures = [shown(method, 70, 112, 1), shown(method, 56, 56, 2), shown(method, 112, 70, 3)]
    with patched(model, method) as patch:
        together = run(model, batch(processor, prompts, pictures)).logits
        counts = patch.trace.n_kept_at(3)
        alone_counts = []
        for i, part in enumerate([pictures[:1], pictures[1:], []]):
            inputs = batch(processor, [prompts[i]], part)
            alone = run(model, inputs)
            alone_counts += patch.trace.n_kept_at(3) if part else []
            n = alone.logits.shape[1]
            # bare forwards count padding as positions, so only relative positions agree: logits to rounding
            torch.testing.assert_close(together[i, -1], alone.logits[0, n - 1], atol=2e-4, rtol=2e-4)
    assert counts == alone_counts


@pytest.mark.parametrize(("family", "method"), cells("kinds", all_kept))
def test_keep_all_is_the_identity(family, method):
    """Contract 1."""
    model, processor = tiny(family)
    inputs = mixed(processor, label=method)
    logits, tokens = dense(family, label=method)
    with vtok.patch(model, all_kept(matrix()[family, method])) as patch:
        assert torch.equal(run(model, inputs).logits, logits)
        assert patch.trace.n_kept == patch.trace.n_visual
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize(("family", "method"), cells("kinds", drops))
def test_the_cache_shrinks(family, method):
    """Contract 6: each layer holds the columns that the trace says, and no more."""
    model, processor = tiny(family)
    inputs = mixed(processor, label=method)
    with patched(model, method) as patch:
        output = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    cache, length = output.past_key_values, inputs["input_ids"].shape[1]
    counts = patch.trace.counts()["compressed"]
    held = [i for i, layer in enumerate(cache.layers) if hasattr(layer, "keys")]  # layers with linear attention do not
    assert held[-1] == 3
    for layer in held:
        columns, window = cache.layers[layer].keys.shape[-2], getattr(cache.layers[layer], "sliding_window", 1 << 30)
        given = max(sample[layer] for sample in counts) + 2  # two of the three new tokens were fed back
        assert columns == min(given, window - 1)
    assert cache.get_seq_length() == length + 2
    assert cache.layers[3].keys.shape[-2] < length
    single = batch(processor, ["# What?"], [shown(method, 70, 112)])
    with patched(model, method) as patch:
        cache = run(model, single, use_cache=True).past_key_values
    held = sum(cache.layers[i].keys.nbytes + cache.layers[i].values.nbytes for i in held)
    assert held == patch.trace.kv_bytes()["compressed"] < patch.trace.kv_bytes()["dense"]


@pytest.mark.parametrize("attention", ["eager"])
@pytest.mark.parametrize(("family", "method"), cells("some"))
def test_attention_implementations_agree(family, method, attention):
    """Contract 7."""
    logits, kept = [], []
    for implementation in ("sdpa", attention):
        model, processor = tiny(family, implementation)
        inputs = mixed(processor, label=method)
        with patched(model, method) as patch:
            logits.append(run(model, inputs).logits[inputs["attention_mask"].bool()])  # rows of padding are anything
            kept.append(patch.trace.positions_at(3))
    assert all(torch.equal(a, b) for a, b in zip(*kept))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "method"), cells("kinds", masks))
def test_a_second_picture_on_an_old_cache(family, method):
    """Contract 5: it is compressed too, and only its own columns."""
    model, processor = tiny(family)
    first = batch(processor, ["a # What colour is it?"], [shown(method, 70, 112, 1)])
    second = batch(processor, [" yes and # now?"], [shown(method, 112, 70, 2)])
    n1, n2 = first["input_ids"].shape[1], second["input_ids"].shape[1]
    second["attention_mask"] = torch.ones(1, n1 + n2, dtype=torch.long)
    if "token_type_ids" in first:  # as long as the mask
        second["token_type_ids"] = torch.cat([first["token_type_ids"], second["token_type_ids"]], 1)

    third = {
        "input_ids": torch.full((1, 3), 40),
        "attention_mask": torch.ones(1, n1 + n2 + 3, dtype=torch.long),
    }
    for turn, start in ((second, n1), (third, n1 + n2)):  # as `generate` does; M-RoPE cannot make them from a cache
        positions = torch.arange(start, start + turn["input_ids"].shape[1])[None]
        turn["position_ids"] = positions.expand(3, 1, -1) if family.startswith("qwen") else positions

    with patched(model, method) as patch:
        with Entered(model, patch) as a:
            one = run(model, first, use_cache=True)
        trace_one, embeds_one = patch.trace, a.embeds
        with Entered(model, patch) as b:
            two = run(model, second, use_cache=True, past_key_values=one.past_key_values)
        trace_two, embeds_two = patch.trace, b.embeds
        three = run(model, third, past_key_values=two.past_key_values)
    assert two.past_key_values.get_seq_length() == n1 + n2 + 3

    with oracle(model, trace_one, embeds_one):
        dense_one = run(model, first, use_cache=True)
    both = oracle(model, trace_two, embeds_two)
    both.present = [torch.cat([trace_one.present_at(i), trace_two.present_at(i)], 1) for i in range(4)]
    with both:
        dense_two = run(model, second, use_cache=True, past_key_values=dense_one.past_key_values)
        dense_three = run(model, third, past_key_values=dense_two.past_key_values)
    here = trace_two.present_at(3)
    # 2e-5: three forwards on one cache, logits up to 6, so that rounding alone comes to 1e-5
    torch.testing.assert_close(two.logits[here], dense_two.logits[here], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(three.logits, dense_three.logits, atol=2e-5, rtol=1e-5)


def counted(parts):
    return len(parts) == 1 and parts[0].stage in ("pre_llm", "pixels")


@pytest.mark.parametrize(("family", "method"), cells("all", counted))
def test_the_count_is_known_beforehand(family, method, monkeypatch):
    """`count` tells what stays of a layout, or None exactly where the content decides. The engine adds no token but the
    prompt's last one."""
    model, processor = tiny(family)
    (part,) = example(model, method)
    seen, select = [], getattr(type(part), "select", None)
    if select is not None:
        monkeypatch.setattr(type(part), "select", lambda self, tokens: seen.append(tokens) or select(self, tokens))
    with vtok.patch(model, part) as patch:
        run(model, mixed(processor, label=method))
    monkeypatch.undo()
    trace = patch.trace
    for sample, one, kept in zip(trace.samples, trace.pictures, trace.n_kept):
        count = part.count(one.dense)
        assert (count is None) == part.adaptive_now
        beside = sample == len(PROMPTS) - 1  # whose prompt ends with a picture
        assert count is None or count <= kept <= count + beside
    keeps = [k for k in (1, 4, 0.1, 0.77) if "keep" in options.of(type(part)) and (part.stage != "pixels" or k < 1)]
    for other in [dataclasses.replace(part, keep=keep) for keep in keeps]:
        for tokens in seen:
            count = other.count(tokens.layout)
            assert (count is None) == other.adaptive_now
            assert count is None or (other.select(tokens).keep.sum(1) == count).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_at_the_end_of_the_prompt(family):
    """The row that predicts the first answer token is there, whatever the compressor thinks of it."""
    model, processor = tiny(family)
    inputs = mixed(processor)
    method = able(family, First(keep=0.5), vtok.FastV(keep=1, layer=2))
    with vtok.patch(model, method) as patch, Entered(model, patch) as entered:
        logits = run(model, inputs).logits[:, -1]
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert (logits != 0).any(1).all()
    with oracle(model, patch.trace, entered.embeds):
        torch.testing.assert_close(logits, run(model, inputs).logits[:, -1], atol=1e-5, rtol=1e-5)
        assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_mask_nor_cache(family):
    """Gaps in the positions are then not read as packed sequences."""
    model, processor = tiny(family)
    inputs = dict(batch(processor, ["a # What colour is it?"], [picture(112, 70)]))
    del inputs["attention_mask"]
    with vtok.patch(model, able(family, vtok.Uniform(keep=0.3), vtok.FastV(keep=0.5, anchor="after_visual"))):
        cached = run(model, inputs, use_cache=True).logits
        torch.testing.assert_close(run(model, inputs, use_cache=False).logits, cached, atol=1e-5, rtol=1e-5)


def test_what_an_in_llm_compressor_sees_on_an_old_cache():
    model, processor = tiny("llava")
    first = batch(processor, ["a # What colour is it?"], [picture(70, 112, 1)])
    second = batch(processor, [" yes and # now?"], [picture(112, 70, 2)])
    n1, n2 = first["input_ids"].shape[1], second["input_ids"].shape[1]
    second["attention_mask"] = torch.ones(1, n1 + n2, dtype=torch.long)
    seen = []

    class Spy(vtok.FastV):
        def score(self, attention):
            seen.append(attention)
            return super().score(attention)

    with vtok.patch(model, [vtok.Uniform(keep=0.5), Spy(keep=0.5)]):
        cache = run(model, first, use_cache=True).past_key_values
        run(model, second, past_key_values=cache)
    old, new = n1 - 8, n2 - 8
    assert seen[1].query.shape[2] == new
    assert seen[1].key.shape[2] == old + new
    assert seen[1].visual.sum() == 8
    assert not seen[1].visual[:, :old].any()
    assert seen[1].valid.all()
    assert seen[1].anchor.tolist() == [old + new - 1]

"""What a prefill kept is kept again, in other batches and whatever the scores say."""

import pytest
import torch
from contract import batch, cells, example, mixed, picture, run, tiny

import vtok
from vtok.engine.replay import Kept

CHOICES = {"pre_llm": "select", "llm": "score", "decode": "neurons"}  # stage -> where its compressors choose
replayed = lambda parts: all(isinstance(part, type) or part.replays for part in parts)


def forbid(monkeypatch, patch):
    """Compressors that are replayed must not choose."""
    for part in patch.compressors:
        if part.replays and part.stage in CHOICES:

            def refuse(*args, **kwargs):
                raise AssertionError("chosen anew")

            monkeypatch.setattr(type(part), CHOICES[part.stage], refuse)


@pytest.mark.parametrize(("family", "label"), cells("some", replayed))
def test_a_prefill_is_done_again(family, label, monkeypatch):
    model, processor = tiny(family)
    inputs = mixed(processor, label=label)
    with vtok.patch(model, example(model, label)) as patch:
        expected, kept = run(model, inputs).logits, patch.trace.kept()
        before = patch.trace.to_dict()
        forbid(monkeypatch, patch)
        with patch.replaying(kept):
            again = run(model, inputs).logits
        after = patch.trace.to_dict()
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    for name in ("n_kept", "positions", "merged_into", "neurons"):
        assert after[name] == before[name], name
    assert max(before["n_kept"]) > 0


def answers(processor, inputs, prompts, of, order):
    """Labels of right-padded rows, on what stands behind their prompts."""
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    for row, i in enumerate(order):
        labels[row, : batch(processor, [prompts[i]], of[i])["input_ids"].shape[1]] = -100
    return labels


@pytest.mark.parametrize("label", ["divprune", "aim_merge", "fastv", "core_tokens", "core_neurons"])
def test_rows_replay_in_another_batch(label, monkeypatch):
    """Other padding, other neighbours, an answer behind the prompt and no labels that say where it begins."""
    model, processor = tiny("qwen2_5_vl")
    prompts, sizes = ["# what is it?", "a longer prompt: # and #", "#"], [(56, 84), (84, 56), (56, 56), (112, 56)]
    pictures = [picture(h, w, i) for i, (h, w) in enumerate(sizes)]
    of = [pictures[:1], pictures[1:3], pictures[3:]]
    with vtok.patch(model, example(model, label)) as patch:
        run(model, batch(processor, prompts, pictures))
        kept = patch.trace.kept()
        alone = []
        for prompt, mine in zip(prompts, of):
            inputs = batch(processor, [prompt + " yes it is"], mine)
            ends = batch(processor, [prompt], mine)["input_ids"].shape[1]
            with torch.no_grad(), patch.prompt(ends):
                alone.append(model(**inputs).logits[0])
        forbid(monkeypatch, patch)
        order = [2, 0, 1]
        texts, seen = [prompts[i] + " yes it is" for i in order], [one for i in order for one in of[i]]
        inputs = batch(processor, texts, seen, "right")
        labels = answers(processor, inputs, prompts, of, order) if label == "core_neurons" else None
        with torch.no_grad(), patch.replaying([kept[i] for i in order]):
            together = model(**inputs, labels=labels).logits
    for row, i in enumerate(order):
        here = inputs["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][here], alone[i], atol=2e-5, rtol=1e-4)


def test_another_choice_is_replayed():
    """What another engine kept: a record made by hand."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["# what?"], [picture(56, 56)])
    with vtok.patch(model, "random", keep=0.5, seed=3) as patch:
        expected = run(model, inputs).logits
        kept = Kept({0: (patch.trace.keep_masks[0].clone(),)})
    with vtok.patch(model, "random", keep=0.5, seed=4) as patch:
        assert not torch.equal(run(model, inputs).logits, expected)
        with patch.replaying([kept]):
            assert torch.equal(run(model, inputs).logits, expected)


def test_records_that_do_not_fit_are_refused():
    model, processor = tiny("llava")
    inputs = batch(processor, ["# what?"], [picture(56, 56)])
    with vtok.patch(model, "divprune", keep=0.5) as patch:
        run(model, inputs)
        kept = patch.trace.kept()
        with pytest.raises(vtok.VtokError, match="1 records of what to keep were not used"), patch.replaying(kept * 2):
            run(model, inputs)
        with pytest.raises(vtok.VtokError, match="0 records"), patch.replaying([]):
            run(model, inputs)
        with pytest.raises(vtok.VtokError, match="not in one order"), patch.replaying([Kept()]):
            run(model, inputs)
        text = processor.tokenizer(["no picture"], return_tensors="pt")
        with patch.replaying([Kept(), *kept]):
            run(model, text)
            run(model, inputs)

"""Contract 14, 15 and 16: where prompts end is known or asked for, rows that count are there, threads do not meet."""

import sys
import threading

import pytest
import torch
from contract import ADAPTERS, Entered, Masked, batch, picture, tiny
from drafts import right_and_wrong

import vtok
from vtok.engine.cache import cache_in
from vtok.errors import Unsupported

FAMILIES = ["llava", "qwen2_5_vl"]  # one-dimensional RoPE, and M-RoPE with a token before and behind each picture
READERS = {
    "fastv": lambda: vtok.FastV(keep=0.3, layer=1),
    "pyramiddrop": lambda: vtok.PyramidDrop(),
    "dart": lambda: vtok.DART(keep=0.4, layer=1, visual_pivots=1, text_pivots=2),
    "schedule": lambda: vtok.Schedule(rates=(1, 0.5, 0.5, 0.3)),
}


def visual(model, family, ids, trace, row=0, layer=3):
    """The places of the pictures' tokens that are left behind a layer."""
    token = ADAPTERS[family].token_id(model.config, "image")
    return [i for i in trace.positions_at(layer)[row].tolist() if i < ids.shape[1] and ids[row, i] == token]


def joined(first, answer, second):
    """One row: a prompt, its answer, what is said then with pictures of its own; and labels on the answer alone."""
    ids = torch.cat([first["input_ids"], answer, second["input_ids"]], 1)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("pixel_values", "image_grid_thw"):
        if name in first:
            row[name] = torch.cat([first[name], second[name]])
    if "mm_token_type_ids" in first:
        row["mm_token_type_ids"] = torch.cat([first["mm_token_type_ids"], 0 * answer, second["mm_token_type_ids"]], 1)
    labels = torch.full_like(ids, -100)
    start = first["input_ids"].shape[1]
    labels[:, start : start + answer.shape[1]] = answer
    return row, labels


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", READERS)
def test_answers_in_one_row_are_turns_of_their_own(family, method):
    """Each picture is compressed for the prompt that brought it, as in a conversation on a cache."""
    model, processor = tiny(family)
    first = batch(processor, ["a # What colour is it?"], [picture(112, 112, 1)])
    second = batch(processor, [" user and # yes or no?"], [picture(112, 112, 2)])
    answer = torch.tensor([[40, 41, 42]])
    row, labels = joined(first, answer, second)
    n1, n2 = first["input_ids"].shape[1], second["input_ids"].shape[1]
    with torch.no_grad(), vtok.patch(model, READERS[method]()) as patch:
        out = model(**first, use_cache=True)
        kept = visual(model, family, first["input_ids"], patch.trace)
        seen, cache = n1, cache_in(out)
        for ids, extra in ((answer, {}), (second["input_ids"], second)):
            places = torch.arange(seen, seen + ids.shape[1])[None]
            extra = {k: v for k, v in extra.items() if k not in ("input_ids", "attention_mask")}
            extra |= {"position_ids": places.expand(3, 1, -1) if family != "llava" else places}
            mask = torch.ones(1, seen + ids.shape[1], dtype=torch.long)
            model(input_ids=ids, attention_mask=mask, past_key_values=cache, **extra)
            seen += ids.shape[1]
        kept += [i + n1 + 3 for i in visual(model, family, second["input_ids"], patch.trace)]
        # positions of the one row made alike: M-RoPE would else count the second turn from the picture's sides
        places = torch.arange(n1 + 3 + n2)[None]
        given = {} if family == "llava" else {"position_ids": positions_of(model, first, places)}
        model(**row, labels=labels, **given)
        assert visual(model, family, row["input_ids"], patch.trace) == kept
        model(**row, use_cache=True, **given)
        assert visual(model, family, row["input_ids"], patch.trace) != kept  # one prompt: its end ranks both pictures


def positions_of(model, first, places):
    """M-RoPE positions of the first prompt, then text's, as the test's turns on the cache have them."""
    positions, _ = model.model.get_rope_index(
        first["input_ids"],
        mm_token_type_ids=first["mm_token_type_ids"],
        image_grid_thw=first["image_grid_thw"],
        attention_mask=first["attention_mask"],
    )
    n = positions.shape[-1]
    return torch.cat([positions, places[:, n:].expand(3, 1, -1)], -1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rollout_labels_and_told_lengths_keep_the_same(family, side):
    model, processor = tiny(family)
    prompts, pictures = ["a # What colour?", "two # yes no"], [picture(112, 112, 1), picture(84, 84, 2)]
    inputs = batch(processor, prompts, pictures, side)
    answer = torch.tensor([[40, 41], [42, 43]])
    ends = inputs["input_ids"].shape[1] * torch.ones(2).long() if side == "left" else inputs["attention_mask"].sum(1)
    follow = lambda x, more: torch.stack([torch.cat([r[:n], m, r[n:]]) for r, n, m in zip(x, ends.tolist(), more)])
    full = {**inputs, "input_ids": follow(inputs["input_ids"], answer)}
    full["attention_mask"] = follow(inputs["attention_mask"], torch.ones_like(answer))
    if "mm_token_type_ids" in full:
        full["mm_token_type_ids"] = follow(full["mm_token_type_ids"], 0 * answer)
    labels = follow(torch.full_like(inputs["input_ids"], -100), answer)

    def kept(call):
        call()
        return [visual(model, family, full["input_ids"], patch.trace, row) for row in range(2)]

    with torch.no_grad(), vtok.patch(model, READERS["fastv"]()) as patch:
        want = kept(lambda: model.generate(**inputs, max_new_tokens=2, do_sample=False))
        assert kept(lambda: model(**full, labels=labels)) == want
        assert kept(lambda: model(**inputs, use_cache=True)) == want
        with patch.prompt(ends):
            assert kept(lambda: model(**full)) == want
        with patch.prompt():
            other = kept(lambda: model(**full))
            assert kept(lambda: model(**inputs)) == want
        assert other != want  # the answer's end would have kept others


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_forward_that_does_not_say_where_the_prompt_ends_is_refused(family, mode):
    model, processor = tiny(family)
    inputs = batch(processor, ["a # What colour is it?"], [picture(112, 112)])
    model.train(mode == "train")
    with torch.no_grad():
        for method in READERS.values():
            told = pytest.raises(Unsupported, match=r"labels.*use_cache=True.*patch\.prompt")
            with vtok.patch(model, method()), told:
                model(**inputs)
        whole = inputs["input_ids"].clone()  # as TRL's collator labels them
        with vtok.patch(model, READERS["fastv"]()), pytest.raises(Unsupported, match="completion_only_loss=True"):
            model(**inputs, labels=whole)
        for method in (vtok.Uniform(keep=0.3), vtok.FastV(keep=0.3, layer=1, anchor="after_visual")):
            with vtok.patch(model, method) as patch:
                model(**inputs, labels=whole)
                assert patch.trace.mean_keep < 1


def test_what_cannot_tell_turns_apart_is_refused():
    model, processor = tiny("llava")
    first = batch(processor, ["a # What colour is it?"], [picture(56, 56, 1)])
    second = batch(processor, [" user and # yes or no?"], [picture(56, 56, 2)])
    row, labels = joined(first, torch.tensor([[40]]), second)
    for method in (vtok.CoreTokens(layer=1), vtok.AIMPrune(start=1, end=3), vtok.CoreNeurons()):
        with vtok.patch(model, method), pytest.raises(Unsupported, match="a row of its own"):
            model(**row, labels=labels)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["uniform", "fastv"])
def test_rows_that_predict_supervised_tokens_are_there(family, method):
    """Text right behind a picture is supervised: the row of the picture's last token predicts it."""
    model, processor = tiny(family)
    inputs = batch(processor, ["a # red # blue yes no"], [picture(56, 56, 1), picture(56, 84, 2)], "right")
    image = ADAPTERS[family].token_id(model.config, "image")
    labels = inputs["input_ids"].clone()
    labels[:, :1] = -100
    unlabelled = labels.masked_fill(labels == image, -100)
    parts = vtok.Uniform(keep=0.25) if method == "uniform" else vtok.FastV(keep=0.25, layer=1, anchor="after_visual")
    with torch.no_grad(), vtok.patch(model, parts) as patch, Entered(model, patch) as entered:
        out = model(**inputs, labels=unlabelled)
        with_pictures = model(**inputs, labels=labels)
    with torch.no_grad(), Masked(model, patch.trace, entered.embeds):
        oracle = model(**inputs, labels=unlabelled)
    torch.testing.assert_close(out.loss, oracle.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_pictures.loss, out.loss)  # a placeholder is never an answer
    zero = (out.logits == 0).all(-1)
    assert not (zero[:, :-1] & (unlabelled[:, 1:] != -100)).any()
    assert zero.any()


def test_placeholders_that_nothing_fills_are_refused():
    for family in FAMILIES:
        model, processor = tiny(family)
        inputs = batch(processor, ["a # What?"], [picture(56, 56)])
        alone = {k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        with vtok.patch(model, "uniform"):
            for call in (model, model.generate):
                with pytest.raises(Unsupported, match="nothing fills"):
                    call(**alone)
            with pytest.raises(Unsupported, match="generate_batch"):
                model.generate_batch([inputs["input_ids"][0].tolist()])


@pytest.mark.parametrize("method", ["fastv", "schedule"])
def test_drafts_behind_the_prompt_do_not_move_its_end(method):
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour is it? yes no yes no yes no yes"], [picture(112, 112)])
    options = {"max_new_tokens": 8, "do_sample": False}
    with vtok.patch(model, READERS[method]()) as patch:
        plain = model.generate(**inputs, **options)
        kept = visual(model, "llava", inputs["input_ids"], patch.trace)
        with right_and_wrong(plain):
            drafted = model.generate(**inputs, prompt_lookup_num_tokens=3, **options)
        assert visual(model, "llava", inputs["input_ids"], patch.trace) == kept
    assert torch.equal(plain, drafted)


@pytest.mark.parametrize(
    ("family", "method"),  # tome acts in the blocks of CLIP and SigLIP towers
    [*((family, method) for family in FAMILIES for method in ("fastv", "stack")), ("llava", "tome")],
)
def test_two_threads_give_what_one_gives(family, method):
    parts = {
        "fastv": [vtok.FastV(keep=0.3, layer=1)],
        "stack": [vtok.Downsample(keep=0.5), vtok.FastV(keep=0.5, layer=1)],
        "tome": [vtok.ToMe(r=3, carry=True), vtok.Uniform(keep=0.5)],
    }[method]
    model, processor = tiny(family)
    prompts = [("a # What colour is it?", 56, 112), ("Describe # the clip. yes no 1 2 3", 112, 56)]
    jobs = [batch(processor, [p], [picture(h, w, i)]) for i, (p, h, w) in enumerate(prompts)]
    answers, kept, before = {}, {}, sys.getswitchinterval()

    def work(i):
        for turn in range(3):
            answers[i, turn] = model.generate(**jobs[i], max_new_tokens=4, do_sample=False)
            kept[i, turn] = [p.tolist() for p in patch.trace.positions_at(3)]

    with vtok.patch(model, parts) as patch:
        want, told = [], []
        for job in jobs:
            want.append(model.generate(**job, max_new_tokens=4, do_sample=False))
            told.append([p.tolist() for p in patch.trace.positions_at(3)])
        sys.setswitchinterval(1e-5)
        try:
            threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
    assert len(answers) == 6
    for (i, turn), answer in answers.items():
        assert torch.equal(answer, want[i])
        assert kept[i, turn] == told[i]  # each thread reads its own trace

"""Probabilities of bytes against brute force over tokens."""

import itertools
import math

import pytest
import torch
from contract import language_model, tiny
from outcomes import outcomes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vtok.errors import InvalidValue, Unsupported
from vtok.text.decoding.byte_level import (
    END,
    ByteModel,
    HealingProcessor,
    Vocabulary,
    behind,
    covers,
    cut_back,
    whole,
)

TOY = ["a", "b", "ab", "ba", "abb"]
EOS = len(TOY)


@pytest.fixture(scope="module")
def toy():
    """A BPE tokenizer of five tokens and an end."""
    bpe = models.BPE(vocab={text: i for i, text in enumerate(TOY)}, merges=[("a", "b"), ("ab", "b"), ("b", "a")])
    backend = Tokenizer(bpe)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>"))


def table(vocabulary, context):
    """[6] a distribution that depends on all of the context; non-canonical tokens have none of it."""
    seed = sum((i + 1) * 7**k for k, i in enumerate(context))
    p = torch.rand(len(TOY) + 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for i, text in enumerate(TOY):
        joined = "".join(TOY[j] for j in context) + text
        if list(vocabulary.encode(joined.encode())) != [*context, i]:
            p[i] = 0
    return p / p.sum()


def brute(vocabulary, n):
    """text of up to n tokens, "$" behind what ended -> its probability."""
    texts = {}
    for sequence in itertools.product(range(EOS + 1), repeat=n):
        likely, context = 1.0, ()
        for i in sequence:
            if context[-1:] == (EOS,):
                likely *= i == EOS  # once ended, ended
            else:
                likely *= table(vocabulary, context)[i].item()
                context += (i,)
            if likely == 0:
                break
        if likely:
            text = "".join("$" if i == EOS else TOY[i] for i in context)
            texts[text] = texts.get(text, 0.0) + likely
    return texts


@pytest.fixture(scope="module")
def truth(toy):
    return brute(toy, 5)


@pytest.fixture(scope="module")
def model(toy):
    return ByteModel(toy, lambda contexts: torch.stack([table(toy, context) for context in contexts]).log())


@pytest.mark.parametrize("start", ["", "a", "b", "ab", "ba", "abb", "aba", "bbab", "abab", "bb"])
def test_a_beginning_has_the_sum_of_its_texts(model, truth, start):
    """The lemma. Four bytes are within any five tokens."""
    assert sum(truth.values()) == pytest.approx(1)
    expected = sum(likely for text, likely in truth.items() if text.startswith(start))
    assert math.exp(model.logp(start.encode())) == pytest.approx(expected, abs=1e-12)
    if len(start) < 4:
        found = model.next_byte(start.encode()).exp()
        for byte, sign in ((ord("a"), "a"), (ord("b"), "b"), (END, "$")):
            longer = sum(likely for text, likely in truth.items() if text.startswith(start + sign))
            assert found[byte].item() == pytest.approx(longer / expected, abs=1e-12)
        assert found.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("start", ["a", "ab", "abb", "babab", "bbb"])
def test_covers_are_all_there_are(toy, start):
    found = set()
    for n in range(1, len(start) + 1):
        for sequence in itertools.product(range(len(TOY)), repeat=n):
            texts = ["".join(TOY[i] for i in sequence[:k]) for k in (n - 1, n)]
            if texts[1].startswith(start) and len(texts[0]) < len(start) and toy.canonical(sequence):
                found.add(sequence)
    assert sorted(covers(toy, start.encode())) == sorted(found)


def test_what_no_text_begins_with(model):
    assert model.logp(b"c") == -math.inf
    for call in (lambda: model.next_byte(b"ac"), lambda: model.draw(b"c", None)):
        with pytest.raises(InvalidValue, match="No text of this vocabulary begins with"):
            call()


def test_a_drawn_cover_is_one_by_its_probability(model):
    found = outcomes(lambda chance: model.draw(b"ab", chance))
    expected = {cover: math.exp(logp - model.logp(b"ab")) for cover, logp in model.cover_logps(b"ab").items()}
    assert len(expected) > 1 and found == pytest.approx(expected)


@pytest.fixture(scope="module")
def real():
    """A byte-level tokenizer with its regular expression, and a small model behind it."""
    _, processor = tiny("qwen2_5_vl")
    tokenizer = processor.tokenizer
    return tokenizer, language_model(len(tokenizer), hidden=16, ffn=32, eos=2)


@pytest.mark.parametrize("text", ["what is it?", "  two spaces", "it's 1234", "é中🙂 x", "", "\n\n"])
def test_bytes_are_encoded_as_the_tokenizer_does(real, text):
    tokenizer, _ = real
    vocabulary = Vocabulary.of(tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert vocabulary.encode(text.encode()) == ids and vocabulary.spell(ids) == text.encode()
    assert vocabulary.canonical(ids)


def test_cut_characters(real):
    vocabulary = Vocabulary.of(real[0])
    for sign in ("é", "中", "🙂", "\u0800", "\U00010000", "\ud7ff", "\U0010ffff"):
        data = sign.encode()
        for n in range(1, len(data)):
            assert whole(data[:n])[1] == len(data) - n
            assert vocabulary.spell(vocabulary.encode(b"a " + data[:n])) == b"a " + data[:n]
            assert any(vocabulary.spell(cover) == data[:n] for cover in covers(vocabulary, data[:n]))
    for wrong in (b"\xff", b"a\x80", b"\xe4a", b"\xc3\x28 "):
        assert whole(wrong)[0] is None and vocabulary.encode(wrong) is None


def test_a_model_behind_a_prompt(real):
    """One batch of ragged contexts is each of them alone; bytes sum to 1, and follow the chain rule."""
    tokenizer, model = real
    vocabulary = Vocabulary.of(tokenizer)
    prompt = tokenizer("is it", return_tensors="pt")["input_ids"]
    next_logp = behind(model, prompt, rows=2)
    contexts = [(), (5,), (7, 9, 11), (3, 4)]
    found = next_logp(contexts)
    for row, context in zip(found, contexts):
        with torch.no_grad():
            ids = torch.cat([prompt, torch.tensor([context], dtype=torch.long)], 1)
            torch.testing.assert_close(row, model(ids).logits[0, -1].log_softmax(-1), atol=1e-5, rtol=1e-5)
    exact = ByteModel(vocabulary, next_logp)
    then = exact.next_byte(b" a")
    assert then.exp().sum().item() == pytest.approx(1)
    ratio = exact.logp(b" ab") - exact.logp(b" aa")
    assert (then[ord("b")] - then[ord("a")]).item() == pytest.approx(ratio, abs=1e-5)
    with pytest.raises(InvalidValue, match="one row and one token"):
        behind(model, prompt[:, :0])


def test_healing(real):
    tokenizer, model = real
    vocabulary = Vocabulary.of(tokenizer)
    prompt = tokenizer("what is i", add_special_tokens=False)["input_ids"]
    ids, tail = cut_back(vocabulary, prompt)
    assert vocabulary.spell(ids) + tail == b"what is i"
    healing = HealingProcessor(vocabulary, tail, len(ids))
    out = model.generate(torch.tensor([ids]), max_new_tokens=3, logits_processor=[healing], eos_token_id=None)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    fit = [i for i, text in vocabulary.tokens.items() if text.startswith(tail)]
    assert len(fit) > 1 and out[0, len(ids)] == max(fit, key=lambda i: logits[i])
    free = model.generate(out[:, : len(ids) + 1], max_new_tokens=2, eos_token_id=None)
    assert torch.equal(out, free)  # what comes behind is not constrained
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    with pytest.raises(InvalidValue, match="no text"):
        cut_back(vocabulary, [*ids, image])
    with pytest.raises(InvalidValue, match="can be cut"):
        cut_back(vocabulary, ids[:1])
    with pytest.raises(InvalidValue, match="No token begins"):
        HealingProcessor(vocabulary, b"what is it?", 3)


def test_other_tokenizers_are_refused():
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(Unsupported, match="byte-level BPE"):
        Vocabulary.of(PreTrainedTokenizerFast(tokenizer_object=words))

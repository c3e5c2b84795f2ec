"""SmolLM2's pictures of words: what the decoder sees is what it would read as text. On a small random decoder."""

import pytest
import torch
from contract import language_model
from PIL import Image

import vtok
from vtok.adapters._tiny import tokenizer
from vtok.errors import InvalidValue, Unsupported
from vtok.eval.tasks import needle_text
from vtok.eval.tasks.answers import media
from vtok.prompts import ask, encode
from vtok.words import PATCH, PLACEHOLDER, SIDE, build, picture

WORDS = (" red", " green", " blue", " yes", " no")


@pytest.fixture(scope="module")
def words():
    tok = tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>", PLACEHOLDER), image="")
    decoder = language_model(len(tok), layers=4, scale=3.0)
    decoder.config.max_position_embeddings = 512
    model, processor = build(decoder, tok)
    return model, processor, decoder


def test_rows_are_the_words(words):
    model, processor, decoder = words
    tok = processor.tokenizer
    text = [WORDS[i % 5] for i in (0, 3, 1, 4, 2, 2)]
    inputs = encode(processor, [ask("yes no", picture(text)), ask("no", picture(text[:2]))])
    read = [tok.encode(word, add_special_tokens=False) for word in text]
    assert all(len(ids) == 1 for ids in read)  # else the oracle below is none
    blank = tok.encode(" ", add_special_tokens=False)
    ids = (
        [i for one in read for i in one]
        + blank * (SIDE**2 - len(text))
        + tok.encode("\n\nyes no", add_special_tokens=False)
    )
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits[:1], decoder(torch.tensor([ids])).logits)
        with vtok.patch(model, "fastv", keep=0.1, layer=2) as patch:
            model(**inputs, use_cache=True)
            assert patch.trace.n_kept_at(3) == [10, 10]
            assert patch.trace.flops()["dense"]["encoder"] == 0
    assert media(processor) == ("words",)
    with vtok.patch(model, "divprune", keep=0.5), pytest.raises(Unsupported, match="no token"):
        model(**encode(processor, [ask("yes", Image.new("RGB", (SIDE * PATCH, SIDE * PATCH), "red"))]))
    with pytest.raises(Unsupported, match="cls_probs"):
        vtok.patch(model, "visionzip")


def test_pictures_that_cannot_be():
    with pytest.raises(InvalidValue, match="up to 100 words of up to 16 bytes"):
        picture([" a"] * 101)
    with pytest.raises(InvalidValue, match="up to 16 bytes"):
        picture([" antidisestablishmentarianism"])


def test_the_box_is_the_fact():
    for index in range(8):
        item = needle_text.TASK.test_item(index)
        (question,) = item.questions
        ((_, left, top, *_),) = question.boxes
        patch = item.images[0].convert("L").crop((left, top, left + PATCH, top + 1))
        assert patch.tobytes().rstrip(b"\0").decode() == f" {question.answer}"
        assert question.text == f"The name of the {question.category} is"

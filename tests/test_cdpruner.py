"""CDPruner and DPP against numbers that the official function gave (float64 inputs), and what that code gets wrong."""

import pytest
import torch
import transformers
from contract import batch, picture, run, tiny
from golden import LAYOUT, WORDS, X

import vtok
from vtok.compressors.cdpruner import mean_cosine, quality
from vtok.errors import InvalidValue, Unsupported
from vtok.kernels.greedy_dpp import greedy_dpp
from vtok.modules.clip_text import ClipText
from vtok.types import Question, VisualTokens
from vtok.views import unit

RELEVANCE = mean_cosine(unit(X)[None], unit(WORDS)[None], torch.ones(1, 3, dtype=torch.bool))
ALL = torch.ones(1, 3, dtype=torch.bool)


def shown(x=X, words=WORDS, valid=ALL, **more):
    question = Question(valid.expand(len(x.view(-1, 16, 8)), -1), words.expand(len(x.view(-1, 16, 8)), -1, -1))
    return VisualTokens(x.view(-1, 16, 8), LAYOUT, question=question, **more)


def kept(method, tokens):
    return [row.nonzero().squeeze(1).tolist() for row in method.select(tokens).keep]


@pytest.mark.parametrize(
    ("sign", "theta", "expected"),
    [
        (-1, 1.0, [6, 7, 8, 5, 0, 4]),
        (-1, 0.5, [6, 7, 8, 0, 3, 2]),
        (-1, 0.8, [6, 7, 8, 5, 0, 4]),
        (1, 1.0, [1, 2, 11, 12, 13, 0]),
        (1, 0.5, [1, 2, 11, 12, 13, 0]),
        (1, 0.8, [1, 2, 11, 12, 13, 0]),
    ],
)
def test_golden_picks(sign, theta, expected):
    assert greedy_dpp(X[None], 6, quality(sign * RELEVANCE, theta))[0].tolist() == expected
    if sign == 1:
        assert kept(vtok.CDPruner(keep=6, theta=theta), shown()) == [sorted(expected)]


def test_golden_relevance():
    official = quality(-RELEVANCE, 1.0)[0, :5]
    torch.testing.assert_close(
        official, torch.tensor([0.539773, 0.0000019, 0.193090, 0.550926, 0.744021]), atol=2e-6, rtol=0
    )
    openvino = torch.tensor([0.460228, 0.999998, 0.806911, 0.449075])
    torch.testing.assert_close(quality(RELEVANCE, 1.0)[0, :4], openvino, atol=3e-6, rtol=0)
    assert quality(RELEVANCE, 0.5)[0, 1] == pytest.approx(torch.tensor(0.5).exp().item(), abs=1e-6)


def test_golden_volume():
    """All tokens are of length 1, and in the published numbers rounding makes token 6 the first."""
    first = torch.ones(1, 16).index_fill(1, torch.tensor(6), 1 + 1e-6)
    assert greedy_dpp(X[None], 6, first)[0].tolist() == [6, 2, 11, 1, 5, 0]
    assert kept(vtok.DPP(keep=6), shown()) == [sorted(greedy_dpp(X[None], 6)[0].tolist())]


def test_without_a_word_it_is_the_volume_alone():
    plain = kept(vtok.DPP(keep=6), shown())
    assert kept(vtok.CDPruner(keep=6), shown(valid=~ALL)) == plain != kept(vtok.CDPruner(keep=6), shown())
    assert kept(vtok.CDPruner(keep=6), shown(words=torch.zeros(3, 8))) == plain
    assert kept(vtok.CDPruner(keep=6, theta=0.0), shown()) == plain


def test_padding_of_the_question_does_not_count():
    padded = torch.cat([WORDS, torch.full((2, 8), 3.0)])
    there = torch.tensor([[True, True, True, False, False]])
    torch.testing.assert_close(mean_cosine(unit(X)[None], unit(padded)[None], there), RELEVANCE)
    assert kept(vtok.CDPruner(keep=6), shown(words=padded, valid=there)) == kept(vtok.CDPruner(keep=6), shown())


def test_a_picture_does_not_depend_on_its_neighbours():
    """The official code takes the range of relevance of the whole batch."""
    other = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    wide = torch.cat([RELEVANCE, 9 * RELEVANCE - 4])
    torch.testing.assert_close(quality(wide, 1.0), quality(RELEVANCE, 1.0).expand(2, -1), atol=1e-5, rtol=0)
    method = vtok.CDPruner(keep=6, theta=1.0)
    assert kept(method, shown(torch.cat([X, other]))) == [*kept(method, shown()), *kept(method, shown(other))]


@pytest.mark.parametrize("keep", [1, 4, 12])
@pytest.mark.parametrize("theta", [None, 1.0])
def test_one_colour_and_more_tokens_than_dimensions(keep, theta):
    for x in (torch.ones(16, 8), torch.zeros(16, 8), X):
        for method in (vtok.CDPruner(keep=keep, theta=theta), vtok.DPP(keep=keep)):
            assert method.select(shown(x)).keep.sum() == keep
    best = quality(RELEVANCE, 1.0).argmax().item()
    assert kept(vtok.CDPruner(keep=1), shown()) == [[best]]


# ---- CLIP's text tower --------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def towered():
    """A tiny LLaVA, a CLIP of the same vision width, whose texts are five tokens at most, and the tower of both."""
    model, processor = tiny("llava")
    vision = model.config.vision_config
    torch.manual_seed(3)
    text = transformers.CLIPTextConfig(
        vocab_size=len(processor.tokenizer) + 2,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=5,
        bos_token_id=len(processor.tokenizer),
        eos_token_id=len(processor.tokenizer) + 1,
        projection_dim=12,
    )
    config = transformers.CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    clip = transformers.CLIPModel(config).eval()
    return model, processor, ClipText(clip, processor.tokenizer, processor.tokenizer)


def test_relevance_by_the_text_tower(towered):
    """By hand: the question's words in pieces of three between begin and end; minus the mean cosine; r itself."""
    model, processor, tower = towered
    clip, words = tower.clip, "What colour is it now?"
    inputs = batch(processor, [f"a #{words}"], [picture(70, 112)])
    states = []
    with vtok.patch(model, vtok.CDPruner(keep=5, text_tower=tower)) as patch, torch.no_grad():
        run(model, inputs)
    with torch.no_grad():
        taken = model.config.vision_feature_layer
        seen = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[taken][:, 1:]
        features = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        ids, config = tower.tokenizer(words, add_special_tokens=False).input_ids, clip.config.text_config
        for i in range(0, len(ids), 3):
            piece = torch.tensor([[config.bos_token_id, *ids[i : i + 3], config.eos_token_id]])
            states.append(clip.text_projection(clip.text_model(input_ids=piece).pooler_output)[0])
        patches = clip.visual_projection(clip.vision_model.post_layernorm(seen[0]))
        cosine = torch.nn.functional.cosine_similarity(patches[:, None], torch.stack(states)[None], dim=-1).mean(1)
    assert len(states) > 1
    r = (cosine.max() - cosine) / (cosine.max() - cosine.min())
    expected = greedy_dpp(features[None], 5, r[None])[0].sort().values
    assert torch.equal(patch.trace.keep_masks[0].nonzero().squeeze(1), expected)


def test_what_a_text_tower_cannot_do(towered):
    *_, tower = towered
    with pytest.raises(InvalidValue, match="text_tower must be a ClipText or None"):
        vtok.CDPruner(text_tower="clip")
    with pytest.raises(InvalidValue, match="width 32, this model's encoder 48: text_tower must be"):
        tower.patches(torch.zeros(1, 1, 4, 48))
    none = Question(ALL, WORDS[None])
    with pytest.raises(Unsupported, match="needs input_ids"):
        tower.texts(none)
    empty = Question(~ALL, WORDS[None], None, torch.zeros(1, 3, dtype=torch.long))
    text, there = tower.texts(empty)
    assert not there.any() and text.isfinite().all()

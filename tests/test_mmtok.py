"""MMTok against numbers that the official function gave (float64 inputs) and a slow rewrite from the formula."""

import math

import pytest
import torch
from golden import LAYOUT, WORDS, X

import vtok
from vtok.types import Layout, Plane, Question, VisualTokens

ALL = torch.ones(1, 3, dtype=torch.bool)


def shown(x=X, states=None, words=WORDS, valid=ALL, layout=LAYOUT):
    """One picture; states [P, C] of its patches, the tokens themselves where left out."""
    states = (x if states is None else states).view(1, 1, -1, (x if states is None else states).shape[-1])
    encoder = {("encoder_states", None): states}
    return VisualTokens(x[None], layout, encoder=encoder, question=Question(valid, words[None]))


def kept(method, tokens):
    selection = method.select(tokens)
    assert selection.n_kept == selection.keep.sum()
    return selection.keep[0].nonzero().squeeze(1).tolist()


def slow(x, states, words, k, text=0.02, visual=0.2, balance=0.5):
    """One element at a time."""
    x, states, words = x.double(), states.double(), words.double()
    cosine = lambda a, b: float(a @ b / max(1e-12, float(a.norm() * b.norm())))
    rows = []
    for sources, targets, temperature, share in ((words, x, text, 1.0), (states, states, visual, balance)):
        for source in sources:
            weights = [math.exp(cosine(source, target) / temperature) for target in targets]
            rows.append([share * w / sum(weights) / len(sources) for w in weights])
    covered, picks = [0.0] * len(rows), []
    while len(picks) < k:
        gain = {v: sum(max(0.0, row[v] - c) for row, c in zip(rows, covered)) for v in range(len(x)) if v not in picks}
        picks.append(max(gain, key=gain.get))
        covered = [max(row[picks[-1]], c) for row, c in zip(rows, covered)]
    return sorted(picks)


@pytest.mark.parametrize("temperature", [0.01, 0.02])
@pytest.mark.parametrize("features", ["encoder", "projected"])
def test_golden_picks(temperature, features):
    method = vtok.MMTok(keep=6, text_temperature=temperature, features=features)
    assert kept(method, shown()) == slow(X, X, WORDS, 6, temperature) == [0, 1, 2, 7, 9, 10]


def test_the_encoder_says_what_is_alike():
    """Several patches of a token are averaged."""
    patches = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    mean = patches.view(16, 4, 6).mean(1)
    found = []
    for balance in (0.05, 0.8, 20.0):
        found.append(kept(vtok.MMTok(keep=3, balance=balance, visual_temperature=0.3), shown(states=patches)))
        assert found[-1] == slow(X, mean, WORDS, 3, 0.02, 0.3, balance)
    assert found[0] != found[2] and found[1] != found[2]
    projected = kept(vtok.MMTok(keep=6, features="projected"), shown(states=patches))
    assert projected == slow(X, X, WORDS, 6) != kept(vtok.MMTok(keep=6), shown(states=patches))


def test_words_count_and_padding_does_not():
    padded, there = torch.cat([WORDS, 3 * X[:2]]), torch.tensor([[True, True, True, False, False]])
    assert kept(vtok.MMTok(keep=6), shown(words=padded, valid=there)) == kept(vtok.MMTok(keep=6), shown())
    assert kept(vtok.MMTok(keep=3), shown(words=X[12:15])) == slow(X, X, X[12:15], 3)
    assert kept(vtok.MMTok(keep=3), shown(words=X[12:15])) != kept(vtok.MMTok(keep=3), shown())


def test_without_a_word_the_picture_is_covered():
    assert kept(vtok.MMTok(keep=6), shown(valid=~ALL)) == slow(X, X, WORDS[:0], 6)


@pytest.mark.parametrize("keep", [1, 4, 16])
def test_one_colour_and_a_single_token(keep):
    for x in (torch.ones(16, 8), torch.zeros(16, 8)):
        assert len(kept(vtok.MMTok(keep=keep), shown(x))) == keep
    assert kept(vtok.MMTok(keep=keep), shown(torch.ones(1, 8), layout=Layout((Plane(1, 1),)))) == [0]

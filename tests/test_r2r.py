"""R2R: which model decides what, by what each would say alone."""

import copy
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from contract import batch, language_model, picture, tiny

import vtok
from vtok.engine.cache import cache_in
from vtok.errors import InvalidValue, Unsupported
from vtok.text.decoding.r2r import R2R, Aleatoric, Entropy, entropy, uncertainties
from vtok.text.decoding.router import Features, Learned, Router, differs, features, largest_threshold, train

PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


def model(seed, layers, vocabulary=40):
    return language_model(vocabulary, layers, seed=seed)


@pytest.fixture(scope="module")
def small():
    return model(0, 2)


@pytest.fixture(scope="module")
def large():
    return model(1, 3)


@dataclass(frozen=True)
class At:
    """Doubts at some lengths of the text, whatever the model says."""

    steps: tuple[int, ...]
    threshold: float = 0.5

    def doubt(self, proposal):
        at = self.seen[0]
        self.seen[0] += 1
        return torch.tensor([float(at in self.steps)])

    def __post_init__(self):
        object.__setattr__(self, "seen", [0])


def highest(model, ids):
    with torch.no_grad():
        return model(ids).logits[0, -1].argmax().item()


def test_golden_numbers_of_the_uncertainties():
    x = torch.tensor([0.1, 5, 4, 3, -7, 2, 1, 0.5, 0.4, 0.3, 0.2, -1])
    aleatoric, epistemic = uncertainties(x)
    assert aleatoric.item() == pytest.approx(1.5949, abs=5e-5)
    assert epistemic.item() == pytest.approx(0.3774, abs=5e-5)
    for poles in (torch.full((3, 12), -1.0), torch.full((3, 12), -2.0), torch.tensor([[-1.0, -3.0, 2.0]])):
        assert all(value.isfinite().all() for value in uncertainties(poles))


def test_entropy():
    assert entropy(torch.zeros(8)).item() == pytest.approx(2.0794415)
    assert entropy(torch.tensor([0.0, -torch.inf])).item() == 0


def test_the_ends_are_either_model(small, large):
    how = {"max_new_tokens": 12}
    never = small.generate(PROMPT, **how, custom_generate=R2R(large=large, switch=Entropy(float("inf"))))
    assert torch.equal(never, small.generate(PROMPT, **how))
    always = small.generate(PROMPT, **how, custom_generate=R2R(large=large, switch=Entropy(0.0)))
    assert torch.equal(always, large.generate(PROMPT, **how))
    assert not torch.equal(never, always)


@pytest.mark.parametrize("steps", [(0, 1, 2), (3,), (2, 3, 7), (0, 5, 11)])
def test_each_decides_its_tokens(small, large, steps):
    """Token by token, against full forwards of the model that decides it; the large one runs where it is asked."""
    counts, logits = Counter(), []
    hooks = [
        m.register_forward_hook(lambda *_, name=name: counts.update([name])) for name, m in (("s", small), ("l", large))
    ]
    keep = lambda ids, scores: logits.append((ids, scores.clone())) or scores
    out = small.generate(
        PROMPT, max_new_tokens=12, custom_generate=R2R(large=large, switch=At(steps)), logits_processor=[keep],
        return_dict_in_generate=True,
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    assert out.routed[0].nonzero()[:, 0].tolist() == list(steps) and out.doubts.shape == (1, 12)
    for i, routed in enumerate(out.routed[0].tolist()):
        assert out.sequences[0, 5 + i] == highest(large if routed else small, out.sequences[:, : 5 + i])
    # its prompt is a forward of its own where the small model wrote first
    assert counts == {"s": 12, "l": len(steps) + (steps[0] > 0)}
    of_both = iter(logits)
    for i, routed in enumerate(out.routed[0].tolist()):
        for m in (small, large) if routed else (small,):
            ids, scores = next(of_both)
            with torch.no_grad():
                torch.testing.assert_close(scores, m(ids).logits[:, -1], atol=1e-4, rtol=1e-4)
        assert ids.shape[1] == 5 + i
    assert cache_in(out).get_seq_length() == 16


def test_switches_route_by_what_the_small_model_says(small, large):
    for switch, middle in ((Entropy, 2.03), (partial(Aleatoric, top=5), 1.44), (Aleatoric, 2.0)):
        switch = switch(middle)
        out = small.generate(
            PROMPT, max_new_tokens=16, custom_generate=R2R(large=large, switch=switch), return_dict_in_generate=True
        )
        for i, (doubt, routed) in enumerate(zip(out.doubts[0].tolist(), out.routed[0].tolist())):
            with torch.no_grad():
                logits = small(out.sequences[:, : 5 + i]).logits[0, -1]
            expected = entropy(logits) if isinstance(switch, Entropy) else uncertainties(logits, switch.top)[0]
            assert doubt == pytest.approx(expected.item(), abs=1e-3)
            assert routed == (doubt >= switch.threshold)
        assert out.routed.any() and not out.routed.all()


def test_sampling_draws_from_the_model_that_decides(small, large):
    """One token, often, against the processed distribution."""
    for switch, decides in ((Entropy(0.0), large), (Entropy(float("inf")), small)):
        torch.manual_seed(0)
        n, counts = 200, torch.zeros(40)
        for _ in range(n):
            how = R2R(large=large, switch=switch)
            out = small.generate(
                PROMPT, max_new_tokens=1, do_sample=True, top_k=3, temperature=3.0, custom_generate=how
            )
            counts[out[0, -1]] += 1
        with torch.no_grad():
            logits = decides(PROMPT).logits[0, -1] / 3
        top = logits.topk(3)
        p = torch.zeros(40).index_copy(0, top.indices, top.values.softmax(0))
        assert ((counts / n - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()


def test_stopping_and_streaming(small, large):
    class Streamer:
        tokens, ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    free = small.generate(PROMPT, max_new_tokens=10, custom_generate=R2R(large=large, switch=At((2, 3))))
    streamer, eos = Streamer(), free[0, 9].item()
    out = small.generate(
        PROMPT, max_new_tokens=10, eos_token_id=eos, custom_generate=R2R(large=large, switch=At((2, 3))),
        streamer=streamer,
    )  # fmt: skip
    end = 5 + free[0, 5:].tolist().index(eos) + 1
    assert torch.equal(out, free[:, :end])
    assert streamer.ended and streamer.tokens == out[0].tolist()


def test_tables_of_different_lengths(small):
    """Padded tables of one tokenizer go together when told; otherwise they are refused."""
    wide = model(1, 3, vocabulary=48)
    with pytest.raises(Unsupported, match=r"40 and 48 tokens.*vocabulary=len\(tokenizer\)"):
        small.generate(PROMPT, max_new_tokens=2, custom_generate=R2R(large=wide))
    with pytest.raises(Unsupported, match="more than the models"):
        small.generate(PROMPT, max_new_tokens=2, custom_generate=R2R(large=wide, vocabulary=41))
    out = small.generate(PROMPT, max_new_tokens=8, custom_generate=R2R(large=wide, switch=Entropy(0.0), vocabulary=38))
    for i in range(8):
        with torch.no_grad():
            assert out[0, 5 + i] == wide(out[:, : 5 + i]).logits[0, -1, :38].argmax()


def test_what_is_refused(small, large):
    how = R2R(large=large)
    for inputs, reason in (
        ({"inputs": PROMPT.repeat(2, 1)}, "one prompt a call"),
        ({"inputs": PROMPT, "num_beams": 2}, "no beam search"),
        ({"inputs": PROMPT, "prompt_lookup_num_tokens": 3}, "no prompt lookup"),
        ({"inputs": PROMPT, "return_dict_in_generate": True, "output_scores": True}, "leave output_scores off"),
        ({"inputs": PROMPT, "use_cache": False}, "leave use_cache on"),
        ({"inputs_embeds": torch.randn(1, 3, 32)}, "embeddings of their own"),
    ):
        with pytest.raises(Unsupported, match=reason):
            small.generate(**inputs, max_new_tokens=2, custom_generate=how)
    with pytest.raises(Unsupported, match="is the small one"):
        large.generate(PROMPT, max_new_tokens=2, custom_generate=how)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("patched", [False, True])
def test_pictures(family, patched):
    """Both models see the picture, each with its own tower; and each may be patched."""
    small, processor = tiny(family)
    large, _ = tiny(family, layers=5)
    inputs = batch(processor, ["# what?"], [picture(56, 84)])
    if patched:
        vtok.patch(large, "fastv", keep=0.5, layer=2)
    how = {**inputs, "max_new_tokens": 8, "do_sample": False}
    of_large, of_small = large.generate(**how), small.generate(**how)
    assert not torch.equal(of_large, of_small)
    assert torch.equal(small.generate(**how, custom_generate=R2R(large=large, switch=Entropy(0.0))), of_large)
    out = small.generate(**how, custom_generate=R2R(large=large, switch=At((3,))))
    start = inputs["input_ids"].shape[1]
    assert torch.equal(out[:, : start + 3], of_small[:, : start + 3])
    if not patched:
        more = dict(inputs) | {"input_ids": out[:, : start + 3]}
        more["attention_mask"] = torch.ones_like(more["input_ids"])
        if "mm_token_type_ids" in more:
            more["mm_token_type_ids"] = torch.nn.functional.pad(more["mm_token_type_ids"], (0, 3))
        assert torch.equal(out[:, start + 3], large.generate(**more, max_new_tokens=1, do_sample=False)[:, -1])


# ---- the router ------------------------------------------------------------------------------------------------------
def test_the_routers_size():
    """About 56 million parameters for a hidden size of 1536; built without memory."""
    with torch.device("meta"):
        router = Router(1536)
    assert 54e6 < sum(p.numel() for p in router.parameters()) < 57e6


def test_features_are_what_the_switch_sees(small, large):
    """Of a text, in one forward; and token by token while decoding."""
    seen = []

    class Watch:
        threshold = 1.0

        def doubt(self, proposal):
            seen.append(proposal)
            return torch.zeros(1)

    out = small.generate(PROMPT, max_new_tokens=6, custom_generate=R2R(large=large, switch=Watch()))
    found = features(small, out, 5, top=7)
    assert len(found) == 6 and not differs(small, out, 5).any()
    for i, proposal in enumerate(seen):
        torch.testing.assert_close(found.hidden[i], proposal.hidden[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.embedding[i], proposal.embedding[0])
        torch.testing.assert_close(found.logits[i], proposal.logits[0].topk(7).values, atol=1e-4, rtol=1e-4)
    other = large.generate(PROMPT, max_new_tokens=6)
    expected = [highest(small, other[:, : 5 + i]) != other[0, 5 + i] for i in range(6)]
    assert differs(small, other, 5).tolist() == expected and any(expected)
    with pytest.raises(InvalidValue, match="answer begins"):
        features(small, out, 0)


def test_a_router_learns_and_routes(small, large):
    """Labels that follow from the features: found again, with the recall asked for; and a switch of it decodes."""
    torch.manual_seed(0)
    n = 600
    seen = Features(torch.randn(n, 32), torch.randn(n, 32), torch.randn(n, 20).sort(descending=True).values)
    labels = seen.hidden[:, 0] > 0.8
    router = Router(32, top=20, width=32, blocks=2)
    before = copy.deepcopy(router.state_dict())
    switch = train(router, seen, labels, validation=0.3, recall=0.9, lr=3e-3, batch=64, epochs=30)
    assert any(not torch.equal(before[name], value) for name, value in router.state_dict().items())
    with torch.no_grad():
        doubts = router(seen).sigmoid()
    routed = doubts >= switch.threshold
    assert routed[labels].float().mean() > 0.85 and routed[~labels].float().mean() < 0.15
    for threshold, decides in ((1.1, small), (0.0, large)):
        out = small.generate(
            PROMPT, max_new_tokens=8, custom_generate=R2R(large=large, switch=Learned(router, threshold))
        )
        assert torch.equal(out, decides.generate(PROMPT, max_new_tokens=8))
    with pytest.raises(InvalidValue, match="only one kind of label"):
        train(router, seen, torch.zeros(n))


def test_the_largest_threshold_of_a_recall():
    doubts, labels = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.95]), torch.tensor([1, 1, 1, 1, 0, 0]).bool()
    assert largest_threshold(doubts, labels, 1.0) == pytest.approx(0.6)
    assert largest_threshold(doubts, labels, 0.75) == pytest.approx(0.7)
    assert largest_threshold(doubts, labels, 0.6) == pytest.approx(0.7)

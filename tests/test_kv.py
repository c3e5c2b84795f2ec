"""The cache: what is dropped is masked, what is chosen is what the papers say, and what cannot be is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import kvpress_kept
import pytest
import torch
from contract import batch, mixed, noise, picture, run, tiny
from drafts import right_and_wrong

import vtok
from vtok.adapters.causal_lm import CausalLM
from vtok.engine.cache import NAME, CompressedCache, cache_in
from vtok.engine.columns import Columns, chosen, uniform
from vtok.errors import InvalidValue, Unsupported
from vtok.stages.kv import KV
from vtok.types import best

TEXT = "causal_lm"
KVPRESS = Path(kvpress_kept.__file__).with_suffix(".json")
METHODS = {
    "h2o": vtok.H2O(keep=0.4),
    "keyformer": vtok.Keyformer(keep=0.4),
    "streaming_llm": vtok.StreamingLLM(keep=0.4, sinks=2),
    "random_kv": vtok.RandomKV(keep=0.4),
    "snapkv": vtok.SnapKV(keep=0.4, window=4),
    "kvzip": vtok.KVzip(keep=0.4, chunk=11),
    "kvzip even": vtok.KVzip(keep=0.4, even=True),
    "apart": vtok.SnapKV(visual=0.2, text=0.6, window=2),
}


def model_of(family: str, attention: str = "sdpa"):
    """A tiny model and inputs of one prompt and of a padded batch."""
    if family != TEXT:
        model, processor = tiny(family, attention)
        one = batch(processor, ["a # What colour is it? two # yes"], [picture(56, 84), picture(84, 56, 1)])
        return model, one, mixed(processor)
    torch.manual_seed(3)
    model, _ = CausalLM().tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    model.eval().set_attn_implementation(attention)
    model.generation_config.eos_token_id = None
    ids = torch.randint(5, 300, (3, 33))
    mask = torch.ones_like(ids)
    mask[0, :9] = mask[2, :1] = 0
    return model, {"input_ids": ids[1:2]}, {"input_ids": ids, "attention_mask": mask}


def decoder(model):
    return model.get_decoder() if hasattr(model.model, "layers") else model.model.language_model


def positions(model, inputs, step: int):
    """Position ids of the answer's token `step`, as `generate` counts them."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    text = mask.sum(1, keepdim=True) + step
    deltas = getattr(model.model, "rope_deltas", None)
    return text if deltas is None else (text + deltas).expand(3, -1, -1)


def forward(model, inputs, step: int, tokens: torch.Tensor, cache, **extra):
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    mask = torch.cat([mask, mask.new_ones(len(mask), step + 1)], 1)
    with torch.no_grad():
        return model(
            input_ids=tokens[:, step : step + 1],
            attention_mask=mask,
            position_ids=positions(model, inputs, step),
            **{NAME: cache},
            **extra,
        )


def held(cache: CompressedCache, length: int, pads: torch.Tensor) -> list[torch.Tensor]:
    """Layer -> [B, G, length] bool: the columns of the padded sequence that each head group holds."""
    layers = []
    for i, record in cache.states["kv"].layers.items():
        valid = cache.valid_at(i)
        groups = record.place.shape[1]
        there = torch.zeros(len(pads), groups, length, dtype=torch.bool)
        width = record.place.shape[2]
        late = cache.columns(i) - width  # of answers, which no method touched
        ok = torch.ones(len(pads), groups, width, dtype=torch.bool)
        if valid is not None:
            ok = (valid if valid.ndim == 3 else valid[:, None].expand(-1, groups, -1))[..., :width]
        at = (record.place + pads[:, None, None]).clamp(max=length - 1)
        for b in range(len(pads)):
            for g in range(groups):
                there[b, g, at[b, g][ok[b, g]]] = True
        if late:
            there[..., length - late :] = True
        layers.append(there)
    return layers


class PerHead:
    """Hides columns of each layer's cache from the heads of a group, in forwards of one token."""

    def __init__(self, model, heads: int) -> None:
        self.layers, self.heads, self.present = decoder(model).layers, heads, None

    def __enter__(self):
        self.hooks = [
            layer.register_forward_pre_hook(lambda m, a, k, i=i: self.hide(i, a, k), with_kwargs=True)
            for i, layer in enumerate(self.layers)
        ]
        return self

    def __exit__(self, *exc) -> None:
        for hook in self.hooks:
            hook.remove()

    def hide(self, i, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.present is None or hidden.shape[1] > 1:
            return args, kwargs
        seen = self.present[i].repeat_interleave(self.heads // self.present[i].shape[1], 1)[:, :, None]
        bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": bias}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [TEXT, "llava", "qwen2_5_vl"])
@pytest.mark.parametrize("which", ["one", "padded"])
def test_evicting_is_masking(family, method, which):
    """Step by step, against the unpatched model whose heads do not see what their group has dropped by then."""
    model, one, padded = model_of(family)
    inputs = one if which == "one" else padded
    tokens = torch.randint(5, 90, (len(inputs["input_ids"]), 4), generator=torch.Generator().manual_seed(1))
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    pads, prompt = (mask == 0).sum(1), mask.shape[1]
    with vtok.patch(model, METHODS[method]) as patch:
        out = run(model, inputs)
        ours, there = [out.logits[:, -1]], []
        for step in range(4):
            there.append(held(cache_in(out), prompt + step, pads))
            out = forward(model, inputs, step, tokens, cache_in(out))
            ours.append(out.logits[:, -1])
        counted = patch.trace.to_dict()["kv_columns"]
    assert any(not bool(layer.all()) for layer in there[0])  # something was dropped
    assert {int(n) for n in counted} == set(range(4))
    heads = model.config.get_text_config().num_attention_heads
    with PerHead(model, heads) as hidden:
        out = run(model, inputs)
        theirs = [out.logits[:, -1]]
        for step in range(4):
            hidden.present = [torch.nn.functional.pad(layer, (0, 1), value=True) for layer in there[step]]
            out = forward(model, inputs, step, tokens, cache_in(out))
            theirs.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [*METHODS, "tokenselect", "gemfilter"])
def test_a_padded_batch_of_text_is_its_samples(method):
    model, _, padded = model_of(TEXT)
    others = {
        "tokenselect": vtok.TokenSelect(keep=0.2, initial=1, latest=2),
        "gemfilter": vtok.GemFilter(keep=0.4, first=1, last=2),
    }
    with vtok.patch(model, METHODS.get(method) or others[method]):
        whole = model.generate(**padded, max_new_tokens=6, do_sample=False)
        for row, (ids, mask) in enumerate(zip(padded["input_ids"], padded["attention_mask"])):
            alone = model.generate(ids[mask.bool()][None], max_new_tokens=6, do_sample=False)
            assert torch.equal(alone[0, -6:], whole[row, -6:])


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_above_the_prompt_changes_nothing(method):
    model, one, _ = model_of("qwen2_5_vl")
    dense = model.generate(**one, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    options = {"visual": 500, "text": 500} if method == "apart" else {"keep": 500}
    part = vtok.compressor.build(METHODS[method].name, **options)
    with vtok.patch(model, part):
        ours = model.generate(
            **one, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert torch.equal(torch.stack(dense.logits), torch.stack(ours.logits))


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_freed(method):
    """What the cache holds is what the trace says, padding of heads that hold fewer included, and a bounded one does
    not grow."""
    model, one, _ = model_of(TEXT)
    uneven = method in ("kvzip", "apart")  # layers and heads share a budget; here all is text, of which 60 % stay
    with vtok.patch(model, METHODS[method]) as patch:
        cache = cache_in(run(model, one))
        size = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
        told = patch.trace.kv_bytes()
        assert size == told["compressed"] < (0.9 if uneven else 0.41) * told["dense"]
        out = model.generate(**one, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    grown = [layer.keys.shape[2] - 13 for layer in cache_in(out).layers]
    assert uneven or grown == [0 if METHODS[method].bounded else 8] * 4
    assert cache_in(out).get_seq_length() == 33 + 8


# ---- what is chosen --------------------------------------------------------------------------------------------------
def table(heads: int, n: int, d: int, a: float) -> torch.Tensor:
    """The spec's made-up queries and keys."""
    h, i, j = torch.meshgrid(torch.arange(heads), torch.arange(n), torch.arange(d), indexing="ij")
    h, i, j = h.double(), i.double(), j.double()
    return 2 * torch.sin(a * (h + 1) + 0.37 * i * (j + 1) + 1.3 * j + 0.05 * i**2)


def seen_of(query, key, budget: int, before=None, step: int = 0) -> Columns:
    groups, length = key.shape[1:3]
    place = torch.arange(length).expand(1, groups, -1)
    return Columns(
        query,
        key,
        key,
        key.shape[3] ** -0.5,
        torch.ones(1, groups, length, dtype=torch.bool),
        place,
        torch.arange(length - query.shape[2], length)[None],
        torch.tensor([budget]),
        torch.zeros(1, groups, length) if before is None else before,
        0,
        step,
    )


def kept(method: KV, seen: Columns) -> list[list[int]]:
    score = method.score(seen).masked_fill(method.stays(seen), torch.inf)
    keep = chosen(score, seen.valid, seen.budget[:, None])[0]
    return [row.nonzero().flatten().tolist() for row in keep]


def test_snapkv_golden():
    """`kv_baselines.md`, section 4."""
    method = vtok.SnapKV(keep=8, window=4, kernel=3)
    seen = seen_of(table(4, 20, 4, 0.9)[None], table(2, 20, 4, 1.7)[None], 8)
    first = [0.204006, 0.243420, 0.202241, 0.098084, 0.079060, 0.074580, 0.062116, 0.198517]
    second = [0.187083, 0.255287, 0.209001, 0.111419, 0.061399, 0.111825, 0.145028, 0.182895]
    torch.testing.assert_close(method.score(seen)[0, :, :8], torch.tensor([first, second]), atol=2e-6, rtol=0)
    assert kept(method, seen) == [[0, 1, 8, 9, 16, 17, 18, 19], [1, 10, 11, 12, 16, 17, 18, 19]]


def test_the_best_are_those_of_a_sort():
    score = torch.randint(0, 4, (5, 3, 17), generator=torch.Generator().manual_seed(0)).float()
    score[0, 0, 5:] = -torch.inf
    for count in (0, 1, 6, 17):
        wanted = score.argsort(dim=-1, descending=True, stable=True)[..., :count]
        same = torch.zeros(score.shape, dtype=torch.bool).scatter_(-1, wanted, True)
        assert torch.equal(best(score, torch.full((5, 3, 1), count), max(count, 1)), same)
        assert torch.equal(best(score, torch.full((5, 3, 1), count), 17), same)


@pytest.mark.parametrize("name", ["snapkv", "streaming_llm"])
def test_what_stays_is_what_kvpress_keeps(name):
    model = kvpress_kept.model()
    with vtok.patch(model, name, keep=1 - kvpress_kept.RATIO) as patch, torch.no_grad():
        model(kvpress_kept.prompt(), use_cache=True)
    for layer, heads in enumerate(json.loads(KVPRESS.read_text())[name]):
        ours = patch.trace.parts["kv"].positions[layer][0].sort().values
        assert ours.tolist() == heads


def test_kvzip_golden():
    """A repeat of 24 rows over columns 2 to 19 behind two sinks; `kv_baselines.md`, section 4."""
    query = table(4, 24, 4, 0.9)[None] + 0.1
    key = torch.cat([table(2, 20, 4, 1.7), table(2, 24, 4, 1.7) - 0.2], 1)[None]
    score = vtok.KVzip(sinks=2).score(seen_of(query, key, 0))[..., :20]
    first = [0.241184, 0.325226, 0.106680, 0.505577, 0.072077, 0.397229, 0.268366, 0.222225]
    second = [0.300617, 0.283252, 0.475104, 0.044511, 0.499031, 0.330308, 0.170548, 0.203607]
    torch.testing.assert_close(score[0, :, 2:10], torch.tensor([first, second]), atol=2e-6, rtol=0)
    score[..., :2] = torch.inf
    best = chosen(score.flatten(1)[:, None], torch.ones(1, 1, 40, dtype=torch.bool), torch.tensor([[12]]))
    assert best[0, 0, :20].nonzero().flatten().tolist() == [0, 1, 5, 7, 13, 14, 16]
    assert best[0, 0, 20:].nonzero().flatten().tolist() == [0, 1, 4, 6, 12]
    even = chosen(score, torch.ones(1, 2, 20, dtype=torch.bool), torch.tensor([[6]]))[0]
    assert [row.nonzero().flatten().tolist() for row in even] == [[0, 1, 5, 7, 13, 14], [0, 1, 4, 6, 12, 15]]


def test_kvzip_scores_are_the_best_of_all_rows():
    """Against the whole matrix: more rows than are in memory at a time, columns that none sees, and padding behind."""
    groups, queries, length, padding = 2, 150, 260, 70
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, queries, 8), torch.randn(2, groups, length, 8)
    valid = torch.ones(2, groups, length, dtype=torch.bool)
    valid[:, :, 2:60] = valid[0, 1, 60:80] = False
    rows = torch.arange(length - queries, length).repeat(2, 1)
    rows[1, -padding:], valid[1, :, -padding:] = -1, False
    seen = replace(seen_of(query, key, 0), valid=valid, rows=rows)
    logits = query.unflatten(1, (groups, 2)) @ key[:, :, None].transpose(-1, -2) / 8**0.5  # [B, G, H / G, Q, L]
    sees = valid[:, :, None, None] & (torch.arange(length) <= rows[:, None, None, :, None])
    attention = logits.masked_fill(~sees, -torch.inf).softmax(-1).nan_to_num(0.0)  # a row of padding sees none
    torch.testing.assert_close(vtok.KVzip().score(seen), attention.amax((2, 3)), atol=1e-6, rtol=0)


def test_h2o_by_hand():
    """Column sums 3, 1, 2, .5: of one heavy hitter and the two latest, columns 0, 2 and 3 stay."""

    class Given(vtok.H2O):
        def score(self, seen):
            return torch.tensor([[[3.0, 1.0, 2.0, 0.5]]])

    seen = seen_of(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 3)
    assert kept(Given(keep=3, recent=0.67), seen) == [[0, 2, 3]]
    assert kept(vtok.StreamingLLM(keep=3, sinks=1), seen) == [[0, 2, 3]]


@pytest.mark.parametrize("method", ["h2o", "keyformer"])
def test_heavy_hitters_by_a_slow_rewrite(method):
    """Head by head, query by query, with Python's numbers, over a prompt and three tokens of an answer."""
    part = {
        "h2o": vtok.H2O(keep=0.3),
        "keyformer": vtok.Keyformer(keep=0.3, noise=0.0, steps=10),
    }[method]
    model, one, _ = model_of(TEXT, "eager")
    tokens = torch.tensor([[40, 41, 42]])
    layers, groups, heads = 4, 2, 4
    n = one["input_ids"].shape[1]
    budget, sums = int(n * 0.3), [[{} for _ in range(groups)] for _ in range(layers)]
    alive = [[list(range(n)) for _ in range(groups)] for _ in range(layers)]
    queries: dict[int, tuple] = {}

    def observe(layer, query, key, tau):
        """Add softmax(q k / tau) of each new query over what its group holds, and evict."""
        for g in range(groups):
            score, held = sums[layer][g], alive[layer][g]
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                for t in range(query.shape[2]):
                    at = key.shape[2] - query.shape[2] + t
                    visible = [j for j in held if j <= at]
                    x = [float(query[0, h, t] @ key[0, g, j]) / math.sqrt(query.shape[3]) / tau for j in visible]
                    top = max(x)
                    e = [math.exp(v - top) for v in x]
                    for j, v in zip(visible, e):
                        score[j] = score.get(j, 0.0) + v / sum(e)
            latest = held[len(held) - int(budget * part.recent) :]
            rest = sorted((j for j in held if j not in latest), key=lambda j: (-score[j], j))
            alive[layer][g] = sorted(rest[: budget - len(latest)] + latest)

    with vtok.patch(model, part) as patch:
        stage = patch._engine.installed[0]
        inner = type(stage).attention

        def noted(self, p, layer, seen):
            queries[layer] = seen.query.clone(), seen.key[:, :, -seen.query.shape[2] :].clone()
            return inner(self, p, layer, seen)

        type(stage).attention = noted
        try:
            out, keys = run(model, one), {}
            for step in range(4):
                for layer, (query, new) in queries.items():
                    keys[layer] = torch.cat([keys[layer], new], 2) if step else new
                    observe(layer, query, keys[layer], part.temperature(step) if method == "keyformer" else 1.0)
                ours = [layer.place[0].tolist() for layer in cache_in(out).states["kv"].layers.values()]
                assert ours == alive
                if step < 3:
                    for layer in range(layers):
                        for g in range(groups):
                            alive[layer][g].append(n + step)
                    out = forward(model, one, step, tokens, cache_in(out))
        finally:
            type(stage).attention = inner


def test_keyformer_without_noise_is_h2o():
    seen = seen_of(torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), 6)
    plain = vtok.Keyformer(keep=6, noise=0.0, tau_end=1.0).score(seen)
    torch.testing.assert_close(plain, vtok.H2O(keep=6).score(seen), atol=1e-5, rtol=1e-5)
    flat = vtok.Keyformer(keep=6, noise=0.0, tau=1e6, tau_end=1e6).score(seen)  # each query's share is even
    share = torch.tensor([sum(2.0 / (t + 1) for t in range(j, 20)) for j in range(20)])
    torch.testing.assert_close(flat[0, 0], share, atol=1e-3, rtol=1e-3)
    method = vtok.Keyformer(tau=1.0, tau_end=2.0, steps=100)
    assert [method.temperature(t) for t in (0, 1, 100, 500)] == pytest.approx([1.0, 1.01, 2.0, 2.0])


def test_noise_is_uniform_and_repeatable():
    index = torch.arange(200_000)
    u = uniform(3, index)
    assert torch.equal(u[1000:2000], uniform(3, index[1000:2000]))
    assert 0 < float(u.min()) < 1e-4 and 1 - 1e-4 < float(u.max()) < 1
    counts = torch.histc(u, 20, 0, 1)
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 43.8  # chi-square of 19 at one in a thousand
    for lag in (1, 2, 64):  # neighbours know nothing of each other
        assert abs(float(torch.corrcoef(torch.stack([u[:-lag], u[lag:]]))[0, 1])) < 0.01
    assert abs(float(torch.corrcoef(torch.stack([u, uniform(4, index)]))[0, 1])) < 0.01


def test_keyformer_draws_with_its_seed():
    model, one, _ = model_of(TEXT)
    found = []
    for seed in (0, 0, 1):
        with vtok.patch(model, vtok.Keyformer(keep=0.3, seed=seed)) as patch:
            run(model, one)
            found.append(patch.trace.parts["kv"].positions[2])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# ---- attention to some columns ---------------------------------------------------------------------------------------
def test_tokenselect_by_a_slow_rewrite():
    """Each head votes with a softmax; a head with large logits does not decide alone; all heads read one set."""
    from vtok.compressors.tokenselect import votes

    query, key = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 30, 8)
    query[:, 0] *= 100
    candidates = torch.ones(2, 30, dtype=torch.bool)
    candidates[:, :3] = candidates[:, -5:] = False
    expected = torch.zeros(2, 30)
    for b in range(2):
        for h in range(4):
            x = torch.tensor([float(query[b, h, 0] @ key[b, h // 2, j]) for j in range(3, 25)]).double()
            expected[b, 3:25] += x.softmax(0).float()
    torch.testing.assert_close(votes(query, key, candidates), expected, atol=1e-5, rtol=1e-5)
    raw = (query.view(2, 2, 2, 8) @ key.transpose(2, 3)).sum((1, 2)).masked_fill(~candidates, -torch.inf)
    assert not torch.equal(raw.topk(4, 1).indices.sort(1).values, expected.topk(4, 1).indices.sort(1).values)


@pytest.mark.parametrize("family", [TEXT, "qwen2_5_vl"])
def test_selecting_is_masking(family):
    """Against the unpatched model that does not see the columns which were not selected."""
    model, _, padded = model_of(family)
    mask = padded["attention_mask"]
    tokens = torch.randint(5, 90, (len(mask), 3), generator=torch.Generator().manual_seed(1))
    sets: list[dict[int, torch.Tensor]] = []
    method = vtok.TokenSelect(keep=4, initial=2, latest=3, theta=None)
    inner = vtok.TokenSelect.select

    def noted(self, seen, valid, before):
        answer = inner(self, seen, valid, before)
        sets[-1][len(sets[-1])] = answer[0]
        return answer

    with pytest.MonkeyPatch.context() as patched, vtok.patch(model, method):
        patched.setattr(vtok.TokenSelect, "select", noted)
        out = run(model, padded)
        ours = []
        for step in range(3):
            sets.append({})
            out = forward(model, padded, step, tokens, cache_in(out))
            ours.append(out.logits[:, -1])
    assert all(int(layer[0].sum()) == 9 for layer in sets[0].values())
    with PerHead(model, model.config.get_text_config().num_attention_heads) as hidden:
        out = run(model, padded)
        theirs = []
        for step in range(3):
            hidden.present = [sets[step][i][:, None] for i in range(4)]
            out = forward(model, padded, step, tokens, cache_in(out))
            theirs.append(out.logits[:, -1])
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunks_of_a_prompt_read_what_they_choose(attention):
    """Against the unpatched model under a mask that is written chunk by chunk, row by row, by the votes of each layer's
    own keys. A row of a padded batch has its own chunks."""
    from vtok.compressors.tokenselect import votes

    model, _, padded = model_of(TEXT, attention)
    part = vtok.TokenSelect(keep=5, initial=2, latest=3, chunk=8, theta=None)
    valid, n = padded["attention_mask"].bool(), padded["input_ids"].shape[1]
    shown: dict[int, tuple] = {}

    def masked(layer):
        """What layer `layer` lets each query see, [B, 1, n, n]."""
        query, key = shown[layer]
        sees = torch.ones(n, n, dtype=torch.bool).tril() & valid[:, None]
        for b in range(len(valid)):
            for end in range(n, 0, -8):
                start = max(0, end - 8)
                real = [j for j in range(start) if valid[b, j]]
                if start <= 2 + 5 + 3:  # as many as are chosen
                    continue
                ends = {*real[:2], *real[-3:]}
                own = [j for j in range(start, end) if valid[b, j]]
                candidates = torch.tensor([[j in real and j not in ends for j in range(start)]])
                mean = query[b : b + 1, :, own].mean(2, keepdim=True)
                vote = votes(mean, key[b : b + 1, :, :start], candidates)[0]
                best = sorted((j for j in real if j not in ends), key=lambda j: -vote[j])[:5]
                for j in range(start):
                    if j not in ends and j not in best:
                        sees[b, start:end, j] = False
        return torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)[:, None]

    def rotated(layer, args, kwargs):
        own, hidden = decoder(model).layers[layer].self_attn, args[0] if args else kwargs["hidden_states"]
        hidden = decoder(model).layers[layer].input_layernorm(hidden)
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        q, k = (f(hidden).view(*hidden.shape[:2], -1, own.head_dim).transpose(1, 2) for f in (own.q_proj, own.k_proj))
        shown[layer] = apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        return args, {**kwargs, "attention_mask": masked(layer)}

    with vtok.patch(model, part):
        ours = run(model, padded).logits
        text = model.generate(**padded, max_new_tokens=4, do_sample=False)
        for row, (ids, mask) in enumerate(zip(padded["input_ids"], valid)):
            alone = model.generate(ids[mask][None], max_new_tokens=4, do_sample=False)
            assert torch.equal(alone[0, -4:], text[row, -4:])
    hooks = [
        layer.register_forward_pre_hook(lambda m, a, k, i=i: rotated(i, a, k), with_kwargs=True)
        for i, layer in enumerate(decoder(model).layers)
    ]
    theirs = run(model, padded).logits
    for hook in hooks:
        hook.remove()
    dense = run(model, padded).logits
    torch.testing.assert_close(ours[:, -1], theirs[:, -1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-5, rtol=1e-5)
    assert (ours[:, -1] - dense[:, -1]).abs().max() > 0.01  # else this has shown little
    with vtok.patch(model, vtok.TokenSelect(keep=40, initial=2, latest=3, chunk=8)):
        assert torch.equal(run(model, padded).logits[:, -1], dense[:, -1])


def test_a_selection_is_used_again_while_queries_are_alike(monkeypatch):
    from vtok.compressors import tokenselect

    calls, inner = [], tokenselect.votes
    monkeypatch.setattr(tokenselect, "votes", lambda *a: calls.append(1) or inner(*a))
    model, one, _ = model_of(TEXT)
    for theta, expected in ((-1.0, 4), (1.0, 4 * 5), (None, 4 * 5)):
        calls.clear()
        with vtok.patch(model, vtok.TokenSelect(keep=4, initial=2, latest=3, theta=theta)):
            model.generate(**one, max_new_tokens=6, do_sample=False)
        assert len(calls) == expected


# ---- the prompt ------------------------------------------------------------------------------------------------------
def test_gemfilter_is_a_shorter_prompt():
    """The unpatched model on the kept tokens, with their own positions; and the choice by its formula."""
    model, one, _ = model_of(TEXT)
    method = vtok.GemFilter(keep=0.5, depth=2, first=2, last=3)
    found: dict[str, torch.Tensor] = {}

    def keep_inputs(module, args, kwargs):
        found["x"], found["rope"] = kwargs["hidden_states"], kwargs["position_embeddings"]

    attention = decoder(model).layers[2].self_attn
    hook = attention.register_forward_pre_hook(keep_inputs, with_kwargs=True)
    run(model, one)
    hook.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    shape = (1, 33, -1, 16)
    q, k = (f(found["x"]).view(shape).transpose(1, 2) for f in (attention.q_proj, attention.k_proj))
    q, k = apply_rotary_pos_emb(q, k, *found["rope"])
    raw = [sum(float(q[0, h, -1] @ k[0, h // 2, j]) for h in range(4)) for j in range(33)]
    padded = [0.0, 0.0, *raw, 0.0, 0.0]
    smooth = [sum(padded[j : j + 5]) / 5 for j in range(33)]
    always = [0, 1, 30, 31, 32]
    rest = sorted((j for j in range(33) if j not in always), key=lambda j: (-smooth[j], j))
    expected = sorted(always + rest[: 16 - 5])
    with vtok.patch(model, method) as patch:
        ours = run(model, one).logits[:, -1]
        assert patch.trace.positions[0].tolist() == expected
        flops = patch.trace.flops()
        text = model.generate(**one, max_new_tokens=4, do_sample=False)
    index = torch.tensor([expected])
    theirs = model(input_ids=one["input_ids"].gather(1, index), position_ids=index, use_cache=True).logits[:, -1]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert text.shape[1] == 37
    assert flops["compressed"]["prefill"] > 0.5 * flops["dense"]["prefill"] > 0  # the first pass counts


def streamed(model, ids, tokens, keep: int, sinks: int) -> torch.Tensor:
    """[steps, V] logits of an answer in the words of the paper: cached keys are those before RoPE, and each step counts
    positions within the cache, one column more than stays."""
    config, layers = model.config, model.model.layers
    heads, groups, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    caches, hooks = [([], []) for _ in layers], []
    for layer, cache in zip(layers, caches):
        for module, kept in zip((layer.self_attn.k_proj, layer.self_attn.v_proj), cache):
            hooks.append(
                module.register_forward_hook(lambda m, a, out, kept=kept: kept.extend(out[0].view(-1, groups, d)))
            )
    with torch.no_grad():
        said = [model(ids).logits[0, -1]]
        for hook in hooks:
            hook.remove()

        def cut(cache):
            for kept in cache:
                del kept[sinks : sinks + max(0, len(kept) - keep)]

        def turned(x, at):  # [n, heads, d], by complex numbers
            rate = config.rope_parameters["rope_theta"] ** (-torch.arange(0, d, 2) / d)
            turn = torch.polar(torch.ones(len(at), d // 2), at[:, None] * rate)[:, None]
            y = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * turn
            return torch.cat([y.real, y.imag], -1)

        [cut(cache) for cache in caches]
        for token in tokens:
            x = model.model.embed_tokens(token[None])
            for layer, (keys, values) in zip(layers, caches):
                h, own = layer.input_layernorm(x), layer.self_attn
                keys.append(own.k_proj(h).view(groups, d))
                values.append(own.v_proj(h).view(groups, d))
                n = len(keys)
                q = turned(own.q_proj(h).view(1, heads, d), torch.tensor([n - 1.0]))[0]
                k, v = turned(torch.stack(keys), torch.arange(float(n))), torch.stack(values)
                out = []
                for head in range(heads):
                    g = head * groups // heads
                    out.append(((k[:, g] @ q[head]) * d**-0.5).softmax(0) @ v[:, g])
                x = x + own.o_proj(torch.cat(out)[None])
                x = x + layer.mlp(layer.post_attention_layernorm(x))
                cut((keys, values))
            said.append(model.lm_head(model.model.norm(x))[0])
    return torch.stack(said)


def test_positions_within_the_cache():
    """By the rewrite, alone and in a padded batch in which a short row is not cut at first, over two prompts."""
    model, one, padded = model_of(TEXT)
    part, n = vtok.StreamingLLM(keep=12, sinks=3, renumber=True), 14
    padded["attention_mask"][2, :-2] = 0
    how = {"max_new_tokens": n, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    for inputs in (one, padded):
        with vtok.patch(model, part):
            out = model.generate(**inputs, **how)
        ours = torch.stack(out.logits, 1)
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        for row, text in enumerate(out.sequences):
            ids, answer = text[: mask.shape[1]][mask[row]][None], text[mask.shape[1] :]
            expected = streamed(model, ids, answer[:-1], 12, 3)
            torch.testing.assert_close(ours[row], expected, atol=2e-5, rtol=1e-4)
    with vtok.patch(model, vtok.StreamingLLM(keep=12, sinks=3)):  # else this has shown little
        other = torch.stack(model.generate(**padded, **how).logits, 1)
    assert (other[0] - ours[0]).abs().max() > 0.01
    with vtok.patch(model, part):
        first = model.generate(**one, **how)
        ids = torch.cat([first.sequences, torch.randint(5, 90, (1, 6))], 1)
        ours = torch.stack(model.generate(ids, **{**how, "max_new_tokens": 1}, **{NAME: cache_in(first)}).logits, 1)
        beams = model.generate(**padded, **{**how, "num_beams": 3, "max_new_tokens": 5}, output_scores=True)
    assert torch.isfinite(ours).all() and torch.isfinite(beams.sequences_scores).all()


def test_positions_within_the_cache_are_refused_where_they_mean_nothing():
    with pytest.raises(InvalidValue, match="not visual and text"):
        vtok.StreamingLLM(renumber=True, visual=0.2)
    part = vtok.StreamingLLM(renumber=True)
    with pytest.raises(Unsupported, match="M-RoPE"):
        vtok.patch(tiny("qwen2_5_vl")[0], part)
    with pytest.raises(Unsupported, match="no other method"):
        vtok.patch(tiny("llava")[0], ["divprune", part])
    for rope, reason in (
        ({"rope_type": "dynamic", "factor": 2.0}, "length of the text"),
        ({"partial_rotary_factor": 0.5}, "as a whole"),
    ):
        model = model_of(TEXT)[0]
        model.config.rope_parameters |= rope
        with pytest.raises(Unsupported, match=reason):
            vtok.patch(model, part)


# ---- turns, beams, threads of life -----------------------------------------------------------------------------------
@pytest.mark.parametrize("method", METHODS)
def test_a_second_turn_goes_on(method):
    """A prompt on an old cache is cut with it: the budget is of all that the sequence has had."""
    model, one, _ = model_of(TEXT)
    with vtok.patch(model, METHODS[method]):
        first = model.generate(**one, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([first.sequences, torch.randint(5, 90, (1, 20))], 1)
        second = model.generate(
            ids, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, **{NAME: cache_in(first)}
        )
    cache, n = cache_in(second), ids.shape[1]
    assert cache.get_seq_length() == n
    if method != "kvzip":
        share = 0.6 if method == "apart" else 0.4
        assert [cache.columns(i) for i in range(4)] == [int(share * n)] * 4


@pytest.mark.parametrize(
    "part",
    [vtok.H2O(keep=0.3, recent=0.2), METHODS["kvzip"], vtok.TokenSelect(keep=4, initial=2, latest=3, theta=-1.0)],
    ids=lambda part: part.name,
)
def test_beams(part):
    """The score of each beam is that of its own text, token by token, of its row alone."""
    model, _, padded = model_of(TEXT)
    n = 12
    how = {"max_new_tokens": n, "num_beams": 4, "num_return_sequences": 4, "do_sample": False}
    with vtok.patch(model, part):
        found = model.generate(**padded, **how, output_scores=True, return_dict_in_generate=True)
        for i, (text, score) in enumerate(zip(found.sequences, found.sequences_scores)):
            one = {"input_ids": padded["input_ids"][i // 4][padded["attention_mask"][i // 4].bool()][None]}
            answer, total, out = text[None, -n:], 0.0, run(model, one)
            for step in range(n):
                total += float(out.logits[0, -1].log_softmax(-1)[answer[0, step]])
                out = forward(model, one, step, answer, cache_in(out))
            assert total / n == pytest.approx(float(score), abs=1e-5)


@pytest.mark.parametrize("method", ["h2o", "kvzip", "tokenselect"])
def test_several_answers_are_rows(method):
    """As many answers of a prompt as its row repeated as often, drawn alike."""
    model, _, padded = model_of(TEXT)
    part = METHODS.get(method) or vtok.TokenSelect(keep=4, initial=2, latest=3)
    texts = []
    with vtok.patch(model, part):
        for rows, answers in ((1, 3), (3, 1)):
            torch.manual_seed(0)
            inputs = {name: x[:1].expand(rows, -1) for name, x in padded.items()}
            texts.append(model.generate(**inputs, max_new_tokens=4, do_sample=True, num_return_sequences=answers))
    assert torch.equal(*texts)
    assert len({tuple(text.tolist()) for text in texts[0]}) > 1


def test_composed_with_visual_methods():
    model, one, _ = model_of("qwen2_5_vl")
    with vtok.patch(model, ["divprune", vtok.H2O(keep=0.5)]) as patch:
        out = model.generate(**one, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        entered = len(patch.trace.positions[0])
        assert [layer.keys.shape[2] for layer in cache_in(out).layers] == [entered // 2] * 4
    with vtok.patch(model, [vtok.FastV(keep=0.5, layer=1), vtok.SnapKV(keep=0.5, window=2)]) as patch:
        cache = cache_in(run(model, one))
        lengths = [len(patch.trace.positions_at(i)[0]) for i in range(4)]
    assert [layer.keys.shape[2] for layer in cache.layers] == [n // 2 for n in lengths]
    assert lengths[0] > lengths[1]


def test_pictures_and_text_apart():
    model, one, _ = model_of("qwen2_5_vl")
    with vtok.patch(model, vtok.RandomKV(visual=0.25, text=1.0)) as patch:
        run(model, one)
        positions = patch.trace.parts["kv"].positions[1][0]
    visual = one["input_ids"][0] == model.config.image_token_id
    for row in positions.tolist():
        kept = [j for j in row if j >= 0]
        assert sum(bool(visual[j]) for j in kept) == int(0.25 * int(visual.sum()))
        assert sum(not bool(visual[j]) for j in kept) == int((~visual).sum())


def test_assisted_decoding_where_answers_are_left_whole():
    """Drafts behind an eviction are cropped from its end; where each token of an answer evicts they are refused."""
    model, one, _ = model_of(TEXT)
    how = {"max_new_tokens": 8, "do_sample": False}
    with vtok.patch(model, METHODS["snapkv"]):
        plain = model.generate(**one, **how)
        with right_and_wrong(plain, first=False):
            assert torch.equal(model.generate(**one, **how, prompt_lookup_num_tokens=3), plain)
    with vtok.patch(model, METHODS["h2o"]), pytest.raises(Unsupported, match="several at once"):
        model.generate(**one, **how, prompt_lookup_num_tokens=3)


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", [vtok.H2O(), vtok.TokenSelect(keep=2, initial=1, latest=1)])
def test_a_forward_must_say_that_it_is_a_prompt(method):
    model, one, _ = model_of(TEXT)
    ids = one["input_ids"]
    with vtok.patch(model, method) as patch:
        with pytest.raises(Unsupported, match=r"does not say whether it is one"):
            model(ids)
        with pytest.raises(Unsupported, match="an answer in one forward with its prompt"):
            model(ids, labels=ids)
        with patch.prompt(20), pytest.raises(Unsupported, match="an answer in one forward with its prompt"):
            model(ids)
        with pytest.raises(Unsupported, match="in chunks"):
            model.generate(ids, max_new_tokens=2, prefill_chunk_size=8)
        with patch.paused():
            assert model(ids, labels=ids).loss is not None
        with patch.prompt(33):
            model(ids)


def test_gemfilter_trains_on_answers():
    """An answer in one forward with its prompt has the log-probabilities of the answer on the prompt's cache."""
    model, one, _ = model_of(TEXT)
    ids, answer = one["input_ids"], torch.tensor([[40, 41, 42]])
    whole = torch.cat([ids, answer], 1)
    labels = whole.clone()
    labels[:, :33] = -100
    with vtok.patch(model, vtok.GemFilter(keep=0.4, first=1, last=2)) as patch:
        out = run(model, one)
        rolled = [out.logits[:, -1]]
        for step in range(2):
            out = forward(model, one, step, answer, cache_in(out))
            rolled.append(out.logits[:, -1])
        logits = model(whole, labels=labels).logits
        assert len(patch.trace.positions[0]) == 13 + 3
        torch.testing.assert_close(logits[:, 32:35], torch.stack(rolled, 1), atol=1e-5, rtol=1e-5)
        with pytest.raises(Unsupported, match="begin with the prompt"):
            model(whole, labels=whole)
        with pytest.raises(Unsupported, match="does not say"):
            model(whole)
        with pytest.raises(Unsupported, match="in chunks"):
            model.generate(ids, max_new_tokens=2, prefill_chunk_size=8)


def test_what_cannot_be():
    model, one, _ = model_of(TEXT)
    with pytest.raises(Unsupported, match="Llama"):
        vtok.patch(model, "divprune")
    with pytest.raises(InvalidValue, match="no default"):
        vtok.patch(model)
    with pytest.raises(InvalidValue, match="one compressor that drops visual tokens, not for h2o"):
        vtok.patch(tiny("llava")[0], "h2o", budget=0.3)
    vtok.patch(model, "h2o", budget=0.3).remove()  # of the cache
    with pytest.raises(InvalidValue, match="above sinks"):
        vtok.StreamingLLM(keep=4)
    with pytest.raises(InvalidValue, match="odd"):
        vtok.SnapKV(kernel=4)
    with vtok.patch(model, "h2o") as patch:
        with pytest.raises(Unsupported, match="DynamicCache"):
            model.generate(**one, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(Unsupported, match="compiled"):
            patch.compile()
    model.config.sliding_window, model.config.layer_types = 8, ["sliding_attention"] * 4
    with pytest.raises(Unsupported, match="sliding"):
        vtok.patch(model, "h2o")


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
}
STAGES = {"kv": vtok.H2O(keep=0.4), "attend": vtok.TokenSelect(keep=4, initial=1, latest=2), "prompt": vtok.GemFilter()}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind", ["falcon_h1", "lfm2", "gemma2", "gpt_oss"])
def test_decoders_with_states_and_windows_are_refused(kind, stage):
    """A layer with states beside its attention, layers with states in its place, and windows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {
        "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "gemma2": {"head_dim": 8},
        "gpt_oss": {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **own[kind]})).eval()
    with pytest.raises(Unsupported, match="sliding|states|does not show"):
        vtok.patch(model, STAGES[stage])
    with pytest.raises(Unsupported, match="plain DynamicCache"):
        model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=2, custom_generate=vtok.TokenRecycling())


@pytest.mark.parametrize("stage", STAGES)
def test_other_caches_are_refused(stage):
    """Static, quantized (its package is not here: a stand-in), offloaded; and one of something else than keys."""
    from transformers import DynamicCache

    class QuantizedCache(DynamicCache):
        pass

    model, one, _ = model_of(TEXT)
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True
    with vtok.patch(model, STAGES[stage]):
        for how in ({"cache_implementation": "static"}, {NAME: QuantizedCache()}, {NAME: offloaded}):
            with pytest.raises(Unsupported, match="DynamicCache"):
                model.generate(**one, max_new_tokens=2, **how)


def test_a_latent_cache_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    own = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    own |= {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **SMALL, **own)).eval()
    for part in (vtok.H2O(keep=0.4), vtok.KVzip(keep=0.4), vtok.StreamingLLM(keep=0.5)):
        with vtok.patch(model, part), pytest.raises(Unsupported, match="caches something else"):
            model.generate(torch.arange(3, 30)[None], max_new_tokens=2)


@pytest.mark.parametrize("part", [vtok.SnapKV(), vtok.KVzip(), vtok.GemFilter(), vtok.TokenSelect()])
def test_a_prompt_below_all_windows_is_answered_as_ever(part):
    """Fewer tokens than a window, than the first ones that stay, than the best that are chosen."""
    model, one, _ = model_of(TEXT)
    short = {"input_ids": one["input_ids"][:, :2]}
    expected = model.generate(**short, max_new_tokens=6, do_sample=False)
    with vtok.patch(model, part):
        assert torch.equal(model.generate(**short, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.parametrize("name", ["h2o", "keyformer", "snapkv", "kvzip", "streaming_llm", "random_kv", "gemfilter"])
def test_a_budget_below_one_column_keeps_what_the_method_needs(name):
    model, one, _ = model_of(TEXT)
    for keep in (0, 0.0, -1, 1.5):
        with pytest.raises(InvalidValue, match="keep must be"):
            vtok.compressor.build(name, keep=keep)
    part = vtok.compressor.build(name, keep=1e-9)
    with vtok.patch(model, part):
        cache = cache_in(model.generate(**one, max_new_tokens=2, do_sample=False, return_dict_in_generate=True))
    grows = 0 if getattr(part, "bounded", False) else 1
    assert max(cache.columns(i) for i in range(4)) <= 8 + grows
    assert min(cache.columns(i) for i in range(4)) >= 1


def test_undone_exactly():
    model, one, _ = model_of(TEXT)
    before = model.generate(**one, max_new_tokens=5, do_sample=False)
    for method in (*METHODS.values(), vtok.TokenSelect(keep=2, initial=1, latest=1), vtok.GemFilter(keep=0.3)):
        with vtok.patch(model, method):
            model.generate(**one, max_new_tokens=5, do_sample=False)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert "generate" not in vars(model)
    assert torch.equal(model.generate(**one, max_new_tokens=5, do_sample=False), before)


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Mistral", "Gemma", "Phi3", "Olmo2"])
def test_other_language_models(kind):
    import transformers as T

    options = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    options |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    options |= {"sliding_window": None} if kind in ("Mistral", "Phi3") else {}
    torch.manual_seed(0)
    model = getattr(T, f"{kind}ForCausalLM")(getattr(T, f"{kind}Config")(**options)).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(5, 120, (1, 30))
    for method in (vtok.H2O(keep=0.4), vtok.KVzip(keep=0.4), vtok.GemFilter(keep=0.4)):
        with vtok.patch(model, method):
            out = model.generate(ids, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        assert out.sequences.shape[1] == 33
        assert cache_in(out).columns(1) < 24


def test_noise_batches_do_not_change_a_draw():
    model, processor = tiny("llava")
    inputs = noise(processor, ["# yes", "a # What colour is it?"], [(56, 56), (56, 56)])
    with vtok.patch(model, vtok.RandomKV(keep=0.5)) as patch:
        run(model, inputs)
        both = patch.trace.parts["kv"].counts[0]
        assert both.tolist() == [[int(n * 0.5)] * 2 for n in inputs["attention_mask"].sum(1).tolist()]


@pytest.mark.parametrize("method", [vtok.SnapKV(keep=0.5), vtok.H2O(keep=0.5), vtok.KVzip(keep=0.5, even=True)])
def test_a_smaller_cache_drafts_for_the_whole(method):
    """The text is the dense model's, and drafts of the smaller cache are accepted now and then."""
    torch.manual_seed(0)
    model, _ = CausalLM().tiny()
    model.eval().generation_config.eos_token_id = None
    ids = torch.randint(5, 300, (1, 60))
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    decoder = vtok.SelfSpeculation(draft=[method], adapt=False, length=3, ngram=False)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, custom_generate=decoder), plain)
    assert decoder.stats.accepted > 0

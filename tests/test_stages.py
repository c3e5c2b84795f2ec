"""A stage is one file: new ones arrive with nothing else touched, and see all that a cache stage will need."""

import dataclasses
import sys
import textwrap

import pytest
import torch
from contract import batch, mixed, picture, tiny

import vtok
import vtok.stages
from vtok.engine.cache import CompressedCache, cache_in
from vtok.errors import PatchStateError

LAST = '''
from dataclasses import dataclass

import torch

from vtok.compressor import Compressor
from vtok.stages.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Last(Compressor):
    """Each layer's cache keeps its last columns alone."""

    name, stage, paper = "last", "last", "test"
    keep: int = 6


class LastStage(Stage):
    name, in_layers = "last", True

    def begin(self, prefill, p):
        p.groups |= set(range(self.layers))

    def __init__(self, compressor, site):
        super().__init__(compressor, site)
        self.layers = len(site.layers)

    observes = True

    def watches(self, p, layer):
        return True

    def attended(self, p, layer):
        held = p.cache.columns(layer) if p.cache is not None else 0
        if held > self.compressor.keep:
            place = torch.arange(held - self.compressor.keep, held)
            p.cache.keep(layer, place.expand(p.batch, -1))
'''


@pytest.fixture
def last(tmp_path, monkeypatch):
    """The stage `last`, as one file beside the others and its place in their order."""
    (tmp_path / "last.py").write_text(textwrap.dedent(LAST))
    monkeypatch.setattr(vtok.stages, "__path__", [*vtok.stages.__path__, str(tmp_path)])
    monkeypatch.setattr(vtok.stages, "ORDER", (*vtok.stages.ORDER, "last"))
    from vtok import compressor
    from vtok.stages import stage

    yield __import__("vtok.stages.last", fromlist=["Last"]).Last
    for registry in (compressor._REGISTRY, stage._REGISTRY):
        registry.pop("last", None)
    sys.modules.pop("vtok.stages.last", None)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_a_new_stage_is_one_file(last, family):
    """It evicts in the prefill and in decoding, layer by layer, also behind methods that drop tokens."""
    model, processor = tiny(family)
    inputs = mixed(processor)
    for before in ([], [vtok.Uniform(keep=0.5)], [vtok.FastV(keep=0.5, layer=1)]):
        with vtok.patch(model, [*before, last(keep=6)]) as patch:
            out = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        cache = cache_in(out)
        assert isinstance(cache, CompressedCache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [6] * 4
        assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 3
        assert repr(last(keep=6)) in repr(patch)


def test_eviction_is_masking(last):
    """Against the unpatched model with a mask over the columns that are gone, step by step."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour is it?"], [picture(56, 56)])
    with torch.no_grad(), vtok.patch(model, last(keep=6)):
        out = model(**inputs, use_cache=True)
        step = {"input_ids": torch.tensor([[40]]), "position_ids": torch.tensor([[inputs["input_ids"].shape[1]]])}
        ours = model(**step, past_key_values=cache_in(out))
        step = {"input_ids": torch.tensor([[41]]), "position_ids": step["position_ids"] + 1}
        ours = model(**step, past_key_values=cache_in(ours)).logits[:, -1]
    n = inputs["input_ids"].shape[1]
    allowed = torch.ones(n + 2, n + 2).tril().bool()
    allowed[n, : n - 6] = allowed[n + 1, : n - 5] = False
    bias = torch.zeros(1, 1, n + 2, n + 2).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": bias}

    hooks = [x.register_forward_pre_hook(mask, with_kwargs=True) for x in model.model.language_model.layers]
    ids = torch.cat([inputs["input_ids"], torch.tensor([[40, 41]])], 1)
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[:, -1]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_head_groups_may_keep_columns_of_their_own(last):
    """Each key-value head of each layer keeps others, of a padded batch: equal to masking them, head by head."""
    model, processor = tiny("llava")
    inputs = batch(processor, ["a # What colour is it?", "# yes"], [picture(56, 56, 1), picture(56, 56, 2)])
    torch.manual_seed(0)
    n = inputs["input_ids"].shape[1]
    picks = [torch.stack([torch.randperm(n)[:9].sort().values for _ in range(4)]).view(2, 2, 9) for _ in range(4)]

    class PerHead(vtok.stages.stage._REGISTRY["last"]):
        name = "last"

        def attended(self, p, layer):
            if p.prompts is not None:
                p.cache.keep(layer, picks[layer])

    places = inputs["attention_mask"].sum(1, keepdim=True)
    token = torch.tensor([[40], [41]])
    with torch.no_grad(), vtok.patch(model, dataclasses.replace(last(), keep=9)):
        out = model(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
        step = {"input_ids": token, "attention_mask": mask, "position_ids": places}
        ours = model(**step, past_key_values=cache_in(out)).logits[:, -1]

    def hide(layer, module, args, kwargs):
        if kwargs["hidden_states" if not args else "attention_mask"] is None and not args:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            return args, kwargs
        kept = torch.zeros(2, 2, n + 1, dtype=torch.bool).scatter_(2, picks[layer], True)
        kept[..., -1] = True
        kept &= mask.bool()[:, None]
        bias = torch.zeros(2, 4, 1, n + 1).masked_fill(
            ~kept.repeat_interleave(2, 1)[:, :, None], torch.finfo(torch.float32).min
        )
        return args, {**kwargs, "attention_mask": bias}

    with torch.no_grad():
        out = model(**inputs, use_cache=True)
        hooks = [
            x.register_forward_pre_hook(lambda m, a, k, i=i: hide(i, m, a, k), with_kwargs=True)
            for i, x in enumerate(model.model.language_model.layers)
        ]
        theirs = model(**step, past_key_values=cache_in(out)).logits[:, -1]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_layer_that_shares_its_record_cannot_be_cut():
    cache = CompressedCache.adopt(vtok.engine.cache.DynamicCache(), None)
    cache.open = True
    for layer in range(2):
        cache.update(torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4), layer)
    with pytest.raises(PatchStateError, match="split the cache first"):
        cache.keep(0, torch.tensor([[1, 2]]))
    cache.split(1)
    cache.keep(0, torch.tensor([[1, 2]]))
    assert [cache.columns(layer) for layer in range(2)] == [2, 3]


def test_stages_can_be_asked_without_a_prompt():
    """What a serving engine calls: the rows of an encoder, separators among them."""
    from vtok.adapters.llava_next import anyres_layout
    from vtok.stages.pre_llm import place

    layout = anyres_layout(4, (1, 2), (56, 100))
    rows = torch.randn(2, layout.n_rows, 8)
    placed = place(vtok.Uniform(keep=0.5), rows, layout)
    kept = placed.keep[:, layout.place].sum(1)
    assert kept.tolist() == [layout.n // 2] * 2
    assert placed.keep[:, layout.separator_place].all()
    assert torch.equal(placed.rows, rows)
    merged = place(vtok.Pool(keep=0.25), rows, layout)
    assert not torch.equal(merged.rows, rows)
    assert torch.equal(merged.rows[:, layout.separator_place], rows[:, layout.separator_place])


FAMILY = """
from vtok.adapters.llava import LlavaAdapter


class TwinAdapter(LlavaAdapter):
    family = "twin"
    model_types = ("twin",)

    def tiny(self, **options):
        model, processor = super().tiny(**options)
        model.config.model_type = "twin"
        return model, processor
"""


def test_a_new_family_is_one_file(tmp_path, monkeypatch):
    """It is patched, listed by `vtok.available()`, and has its column in the table of methods."""
    from typer.testing import CliRunner

    import vtok.adapters
    from vtok import adapter, cli

    (tmp_path / "twin.py").write_text(FAMILY)
    monkeypatch.setattr(vtok.adapters, "__path__", [*vtok.adapters.__path__, str(tmp_path)])
    try:
        twin, processor = adapter.load_all()["twin"].tiny()
        inputs = batch(processor, ["a # What colour is it?"], [picture(56, 56)])
        with vtok.patch(twin) as patch:
            twin.generate(**inputs, max_new_tokens=1)
        assert patch.family == "twin"
        assert patch.trace.n_kept == [4]
        assert "twin" in vtok.available()["adapters"]
        assert "twin" in CliRunner().invoke(cli.app, ["methods", "--markdown"]).output
    finally:
        adapter._REGISTRY.pop("twin", None)
        sys.modules.pop("vtok.adapters.twin", None)

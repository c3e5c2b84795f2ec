"""ToMe against slow rewrites of its formulas, on every kind of tower and inside LLaVA models."""

import copy
import gc
import math
import weakref

import pytest
import torch
from contract import ADAPTERS, INSIDE, Entered, Masked, able, batch, mixed, oracle, picture, tiny
from test_undo import HOOKS
from torch import nn
from torch._dynamo.utils import counters

import vtok
from vtok import tower as towers
from vtok.compressors.tome import match, merge
from vtok.engine import groups as vits
from vtok.errors import InvalidValue, PatchStateError, Unsupported
from vtok.kernels.merge import sizes
from vtok.types import Layout, Plane

# ---- the mathematics, alone ------------------------------------------------------------------------------------


def slow_match(key, r, protected):
    """One view [N, C] -> (groups in the order of the merged sequence, each a list of tokens)."""
    n = len(key)
    unit = key / key.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    even = [i for i in range(n) if i % 2 == 0 and i >= protected]
    odd = [i for i in range(n) if i % 2 == 1 and i >= protected]
    edges = []
    for i in even:
        best = max(odd, key=lambda j: (round(float(unit[i] @ unit[j]), 6), -j))
        edges.append((-round(float(unit[i] @ unit[best]), 6), i, best))
    joined = {i: j for _, i, j in sorted(edges)[:r]}
    groups = [[i] for i in range(protected)] + [[i] for i in even if i not in joined]
    return groups + [[*sorted(i for i in joined if joined[i] == j), j] for j in odd]


@pytest.mark.parametrize("protected", [0, 1, 2, 5])
@pytest.mark.parametrize("n", [7, 14])
def test_matching_and_merging(n, protected):
    torch.manual_seed(n)
    key, x = torch.randn(3, n, 5), torch.randn(3, n, 4)
    size = torch.randint(1, 5, (3, n)).float()
    for r in range((n - protected) // 2 + 1):
        if r == 0:
            continue
        group = match(key, r, protected)
        merged, total = merge(x, size, group, n - r), sizes(size, group, n - r)
        for b in range(3):
            expected = slow_match(key[b], r, protected)
            assert len(expected) == n - r
            for row, members in enumerate(expected):
                assert (group[b] == row).nonzero().squeeze(1).tolist() == sorted(members)
                weights = size[b, members]
                assert total[b, row] == weights.sum()
                mean = (x[b, members] * weights[:, None]).sum(0) / weights.sum()
                torch.testing.assert_close(merged[b, row], mean)
        back = vits.gather(merged, group)  # each token gets its group's row
        assert all(torch.equal(back[b, i], merged[b, group[b, i]]) for b in range(3) for i in range(n))


def test_ties_and_odd_keys():
    """Equal, zero and broken keys: the lower index first, and nothing is lost."""
    assert match(torch.ones(1, 6, 3), 2).tolist() == [[1, 1, 1, 2, 0, 3]]  # 0 and 2 go into 1
    assert match(torch.ones(1, 7, 3), 2, protected=1).tolist() == [[0, 2, 2, 3, 2, 4, 1]]
    assert sorted(set(match(torch.zeros(1, 6, 3), 3).flatten().tolist())) == [0, 1, 2]
    key = torch.randn(2, 8, 4)
    key[0, 3] = torch.nan
    assert match(key, 4).max() == 3


def test_merging_twice_is_the_mean_over_all_patches():
    x = torch.randn(2, 10, 3)
    groups = vits.Groups.alone(x)
    rows = x
    for r in (4, 3):
        group = match(torch.randn(2, rows.shape[1], 4), r)
        rows, groups = merge(rows, groups.size, group, rows.shape[1] - r), groups.join(group, rows.shape[1] - r)
    assert groups.size.sum() == 20
    for b in range(2):
        for row in range(3):
            members = (groups.row[b] == row).nonzero().squeeze(1)
            assert groups.first[b, row] == members[0]
            assert groups.size[b, row] == len(members)
            torch.testing.assert_close(rows[b, row], x[b, members].mean(0))


def test_merging_gives_every_token_its_gradient():
    x = torch.randn(1, 6, 2, requires_grad=True)
    merge(x, torch.tensor([[1.0, 2, 1, 1, 1, 3]]), torch.tensor([[0, 1, 1, 2, 1, 2]]), 3)[0, 1].sum().backward()
    torch.testing.assert_close(x.grad[0, :, 0], torch.tensor([0.0, 0.5, 0.25, 0, 0.25, 0]))


def test_half_precision_is_rounded_once():
    x = torch.randn(1, 300, 4).bfloat16()
    group = torch.zeros(1, 300, dtype=torch.long)
    mean = merge(x, torch.ones(1, 300), group, 1)
    assert torch.equal(mean[0, 0], x[0].float().sum(0).div(300).bfloat16())


def test_proportional_attention_is_attention_over_the_copies():
    """Tokens that stand for s equal ones attend, and are attended to, as s tokens would be."""
    size = torch.tensor([[1.0, 3, 1, 2]])
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    copies = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    sdpa = nn.functional.scaled_dot_product_attention
    bias = vtok.ToMe().bias(size)[:, None, None]
    wide = sdpa(query[:, :, copies], key[:, :, copies], value[:, :, copies])
    torch.testing.assert_close(sdpa(query, key, value, attn_mask=bias), wide[:, :, [0, 1, 4, 5]])
    assert vtok.ToMe(proportional=False).bias(size) is None


def test_how_many_are_merged():
    merged = lambda n_blocks, patches, **options: vtok.ToMe(**options).merged_at(n_blocks, patches)
    assert merged(12, 196, r=8) == [8] * 12
    assert merged(3, 10, r=8) == [5, 2, 1]  # at most half at once
    assert merged(2, 1, r=8) == [0, 0]
    assert merged(4, 100, r=6, decreasing=True) == [12, 8, 4, 0]
    assert merged(1, 100, r=6, decreasing=True) == [6]
    assert merged(3, 100, r=(1, 0, 7)) == [1, 0, 7]
    for n_blocks, r in ((12, 8), (24, 7), (15, 29), (1, 6)):  # the released code's, rewritten: of 29, 15 it makes a 28
        step = -2 * r / (n_blocks - 1) if n_blocks > 1 else 0
        slow = [math.trunc(2 * r + step * i) for i in range(n_blocks)] if n_blocks > 1 else [r]
        assert merged(n_blocks, 4000, r=r, decreasing=True, official=True) == slow
    assert sum(merged(12, 196, r=8, decreasing=True, official=True)) == 91 < 96
    assert merged(12, 196, r=8, official=True) == [8] * 12
    for keep in (0.1, 0.25, 0.9, 3, 1.0):
        for n_blocks in (4, 23):
            for patches in (9, 196, 577):
                for decreasing in (False, True):
                    total = sum(merged(n_blocks, patches, keep=keep, decreasing=decreasing))
                    left = keep if isinstance(keep, int) else max(1, math.floor(patches * keep + 1e-9))
                    assert total == patches - left or n_blocks < math.log2(patches / left)
    assert merged(2, 16, keep=0.25) == [8, 4]
    assert merged(2, 16, keep=0.5) == [4, 4]
    assert merged(3, 100, keep=0.1) == [50, 25, 12]  # three blocks can do no more
    assert merged(23, 196, keep=3)[-3:] == [12, 6, 3]  # halving at the end, so that it is met
    with pytest.raises(InvalidValue, match="3 entries, but 2 blocks"):
        merged(2, 10, r=(1, 2, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"r": -1},
        {"r": True},
        {"r": 2.0},
        {"r": ()},
        {"r": (1, -1)},
        {"r": 4, "keep": 0.5},
        {"keep": 0.0},
        {"keep": True},
    ]
    + [{"r": (1, 2), "decreasing": True}],
)
def test_options_out_of_range(options):
    with pytest.raises(InvalidValue):
        vtok.ToMe(**options)


def test_options():
    assert vtok.ToMe().r == 8
    assert vtok.ToMe(r=[1, 2]).r == (1, 2)
    assert vtok.ToMe(r=0).is_identity and vtok.ToMe(r=(0, 0)).is_identity and vtok.ToMe(keep=1.0).is_identity
    assert not vtok.ToMe(keep=1).is_identity and not vtok.ToMe(r=(0, 1)).is_identity
    with pytest.raises(InvalidValue, match="carry=True"):
        vtok.ToMe().with_budget(0.5, 4)
    assert vtok.ToMe(carry=True).with_budget(0.5, 4) == vtok.ToMe(keep=0.5, carry=True)


# ---- towers alone ------------------------------------------------------------------------------------------------
SIDE = 64  # of a picture; 4 x 4 patches of 16


def _timm(**options):
    timm = pytest.importorskip("timm")
    size = {"img_size": SIDE, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**{**size, **options})


def _eva(**options):
    pytest.importorskip("timm")
    from timm.models.eva import Eva

    size = {"img_size": SIDE, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    return Eva(**{**size, **options})


def _open_clip(**options):
    open_clip = pytest.importorskip("open_clip")
    size = {"image_size": SIDE, "patch_size": 16, "width": 32, "layers": 4, "heads": 2, "mlp_ratio": 2.0}
    return open_clip.transformer.VisionTransformer(**{**size, "output_dim": 8, **options})


def _transformers(name, **options):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE, patch_size=16
    )
    config._attn_implementation = options.get("attention", "sdpa")
    return getattr(transformers, f"{name}Model")(config)


def _timm_wrapper():
    pytest.importorskip("timm")
    import transformers

    size = {"img_size": SIDE, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
    return transformers.TimmWrapperModel(
        transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=size, do_pooling=True)
    )


TOWERS = {
    "clip": lambda: _transformers("CLIPVision"),
    "clip eager": lambda: _transformers("CLIPVision", attention="eager"),
    "siglip": lambda: _transformers("SiglipVision"),
    "timm": _timm,
    "timm registers, no class token": lambda: _timm(class_token=False, reg_tokens=4, global_pool="avg"),
    "timm class token and registers": lambda: _timm(reg_tokens=3, qk_norm=True, init_values=0.3, global_pool="map"),
    "timm eva": lambda: _eva(use_rot_pos_emb=False, init_values=0.2),
    "timm wrapper": _timm_wrapper,
    "open_clip": _open_clip,
    "open_clip mean": lambda: _open_clip(pool_type="avg", ls_init_value=0.4),
}
PROTECTED = {"siglip": 0, "timm registers, no class token": 4, "timm class token and registers": 4}


def build(name):
    torch.manual_seed(3)
    tower = TOWERS[name]().eval()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.mul_(2.0)
    return tower


def pictures(n=2):
    return torch.randn(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def pooled(output):
    return output if isinstance(output, torch.Tensor) else output.pooler_output


class Slow:
    """The tower with its tokens never merged: all tokens of a group are kept equal by averaging after attention, so
    that its own attention over the copies is proportional attention."""

    def __init__(self, tower, r):
        found, family = towers.find(tower)
        self.blocks, self.family, self.r = list(family.blocks(found)), family, r
        self.protected = family.skip

    def __enter__(self):
        self.hooks, self.groups = [], None
        for i, block in enumerate(self.blocks):
            parts = self.family.parts(block)
            module, read = parts.key
            self.hooks.append(module.register_forward_hook(lambda m, a, out, read=read: self._keys(read(m, a, out))))
            self.hooks.append(block.register_forward_pre_hook(lambda m, a, i=i: self._start(i, a[0])))
            self.hooks.append(parts.second.register_forward_pre_hook(lambda m, a: (self._average(a[0]),)))
            self.hooks.append(block.register_forward_hook(lambda m, a, out: self._average(out)))
        return self

    def __exit__(self, *exc):
        for hook in self.hooks:
            hook.remove()

    def _start(self, i, x):
        if i == 0:
            self.groups = [[[t] for t in range(x.shape[1])] for _ in x]

    def _keys(self, key):
        for b, groups in enumerate(self.groups):
            rows = torch.stack([key[b, members[0]] for members in groups]).float()
            r = min(self.r, (len(groups) - self.protected) // 2)
            merged = slow_match(rows, r, self.protected)
            self.groups[b] = [sorted(t for g in joined for t in groups[g]) for joined in merged]

    def _average(self, x):
        x = x.clone()
        for b, groups in enumerate(self.groups):
            for members in groups:
                x[b, members] = x[b, members].mean(0)
        return x


@pytest.mark.parametrize("name", TOWERS)
def test_towers_against_copies(name):
    """The whole forward equals that of the plain tower in which the tokens of a group are made equal, not fewer."""
    tower, x = build(name), pictures()
    with torch.no_grad():
        dense = tower(x)
        with vtok.patch(tower, "tome", r=2) as patch:
            merged = tower(x)
        with Slow(tower, 2) as slow:
            expected = tower(x)
    scale = pooled(expected).norm()
    assert (pooled(merged) - pooled(expected)).norm() < 1e-5 * scale < 1e-2 * (pooled(dense) - pooled(merged)).norm()
    protected = PROTECTED.get(name, 1)
    assert patch.trace.merged_at == (2, 2, 2, 2)
    assert patch.trace.tokens == tuple(16 + protected - 2 * i for i in range(5))
    groups = patch.trace.groups
    for b in range(2):
        assert groups[b, :protected].tolist() == list(range(protected))
        assert (groups[b, protected:] >= protected).all()  # class and register tokens are nobody's partner
        found = {tuple((groups[b] == row).nonzero().squeeze(1).tolist()) for row in range(protected + 8)}
        assert found == {tuple(members) for members in slow.groups[b]}


@pytest.mark.parametrize("name", TOWERS)
def test_outer_shapes_and_batches(name):
    tower, x = build(name), pictures(3)
    with torch.no_grad():
        dense = tower(x)
        with vtok.patch(tower, "tome", r=3):
            together = tower(x)
            alone = [pooled(tower(x[i : i + 1]))[0] for i in range(3)]
            assert torch.equal(pooled(tower(x)), pooled(together))
    assert pooled(together).shape == pooled(dense).shape
    assert pooled(together).isfinite().all()
    torch.testing.assert_close(pooled(together), torch.stack(alone), atol=1e-4, rtol=1e-4)
    if not isinstance(dense, torch.Tensor):
        assert together.last_hidden_state.shape == dense.last_hidden_state.shape


def state(model):
    found = {}
    for name, module in model.named_modules():
        hooks = {kind: list(getattr(module, kind).values()) for kind in HOOKS}
        found[name] = hooks, {k: id(v) for k, v in module.__dict__.items() if k not in HOOKS}, module.forward.__func__
    return found


@pytest.mark.parametrize("name", TOWERS)
def test_undo_and_identity(name):
    tower, x = build(name), pictures()
    with torch.no_grad():
        dense, before = pooled(tower(x)), state(tower)
        for options in ({"r": 0}, {"keep": 1.0}):
            with vtok.patch(tower, "tome", **options):
                assert torch.equal(pooled(tower(x)), dense)
                assert state(tower) == before
        patch = vtok.patch(tower, "tome", r=2)
        assert "ToMe(" in repr(patch) and "removed" not in repr(patch)
        assert not torch.equal(pooled(tower(x)), dense)
        with pytest.raises(PatchStateError, match="already patched"):
            vtok.patch(tower, "tome")
        with pytest.raises(PatchStateError, match="unpatch it first"):
            copy.deepcopy(tower)
        vtok.unpatch(tower)
        patch.remove()
        assert "removed" in repr(patch)
        assert state(tower) == before
        assert torch.equal(pooled(tower(x)), dense)
        with pytest.raises(PatchStateError, match="not patched"):
            vtok.unpatch(tower)
        with pytest.raises(RuntimeError, match="expected input|Expected|channels|size"), vtok.patch(tower, "tome"):
            tower(x[:, :2])
        assert state(tower) == before


@pytest.mark.parametrize("name", ["clip", "siglip", "timm", "open_clip"])
def test_two_towers_and_garbage(name):
    one, two, x = build(name), build(name), pictures()
    with torch.no_grad():
        dense = pooled(two(x))
        first = vtok.patch(one, "tome", r=2)
        alone = pooled(one(x))
        second = vtok.patch(two, "tome", r=4)
        other = pooled(two(x))
        assert not torch.equal(other, alone)
        assert torch.equal(pooled(one(x)), alone)
        second.remove()
        assert torch.equal(pooled(two(x)), dense)
        assert torch.equal(pooled(one(x)), alone)
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert not first.active
    first.remove()


@pytest.mark.parametrize("name", ["clip", "siglip", "timm", "open_clip"])
def test_gradients_also_with_checkpointing(name):
    """And with a second forward before the first one's backward."""
    tower, grads = build(name).train(), []
    enable = getattr(tower, "gradient_checkpointing_enable", None) or tower.set_grad_checkpointing
    with vtok.patch(tower, "tome", r=2):
        for checkpointing in (False, True):
            if checkpointing:
                enable()
            x = pictures().requires_grad_()
            tower.zero_grad()
            loss = pooled(tower(x)).square().sum()
            with torch.no_grad():
                tower(pictures(3).flip(0, 3))
            loss.backward()
            grads.append([x.grad, *(p.grad for p in tower.parameters() if p.grad is not None)])
    assert all(g.isfinite().all() for g in grads[0])
    assert (grads[0][0].abs().flatten(1).sum(1) > 0).all()
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_reentrant_checkpointing_is_refused():
    tower = build("clip").train()
    tower.gradient_checkpointing_enable({"use_reentrant": True})
    x = pictures().requires_grad_()
    with vtok.patch(tower, "tome", r=2), pytest.raises(Unsupported, match="use_reentrant=False"):
        pooled(tower(x)).sum().backward()


def test_hidden_states_have_all_tokens():
    """Also where transformers' own hooks were there first."""
    for warm in (False, True):
        tower, x = build("clip"), pictures()
        with torch.no_grad():
            if warm:
                tower(x, output_hidden_states=True)
            with vtok.patch(tower, "tome", r=2) as patch:
                states = tower(x, output_hidden_states=True).hidden_states
        assert [h.shape for h in states] == [(2, 17, 32)] * 5
        groups = patch.trace.groups
        for row in groups[0].unique():
            members = states[-1][0, groups[0] == row]
            assert torch.equal(members, members[:1].expand_as(members))
        assert len(states[1][0].unique(dim=0)) == 15


def test_timm_intermediates():
    tower, x = build("timm"), pictures()
    with torch.no_grad(), vtok.patch(tower, "tome", r=2):
        last, states = tower.forward_intermediates(x)
        assert [h.shape for h in states] == [(2, 32, 4, 4)] * 4
        assert torch.equal(last, tower.forward_features(x))


def test_an_open_clip_model_and_its_timm_tower():
    pytest.importorskip("open_clip")
    from open_clip.model import CLIP

    vision = {"image_size": SIDE, "patch_size": 16, "width": 64, "layers": 3, "head_width": 32}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    timm_vision = {"image_size": SIDE, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
    for chosen in (vision, timm_vision):
        model = CLIP(16, chosen, text).eval()
        words = torch.randint(0, 32, (2, 8))
        with torch.no_grad():
            dense, said = model.encode_image(pictures()), model.encode_text(words)
            with vtok.patch(model, "tome", r=2) as patch:
                merged = model.encode_image(pictures())
                assert torch.equal(model.encode_text(words), said)
            assert patch.trace.merged_at[0] == 2
            assert merged.shape == dense.shape and not torch.allclose(merged, dense, atol=1e-4)
            assert torch.equal(model.encode_image(pictures()), dense)


def test_a_whole_clip_model():
    import transformers

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config={**size, "vocab_size": 50}, vision_config={**size, "image_size": SIDE, "patch_size": 16}
    )
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():
        dense = model.get_image_features(pictures()).pooler_output
        with vtok.patch(model, "tome", r=3) as patch:
            assert not torch.equal(model.get_image_features(pictures()).pooler_output, dense)
        assert patch.trace.tokens == (17, 14, 11)
        assert torch.equal(model.get_image_features(pictures()).pooler_output, dense)


def test_bf16_and_autocast():
    for name in ("clip", "timm", "open_clip"):
        tower = build(name)
        with torch.no_grad(), vtok.patch(tower, "tome", r=2):
            with torch.autocast("cpu", torch.bfloat16):
                assert pooled(tower(pictures())).isfinite().all()
            tower.bfloat16()
            assert pooled(tower(pictures().bfloat16())).dtype == torch.bfloat16


def test_compile_after_patch():
    tower, x = _timm(depth=2).eval(), pictures()
    with torch.no_grad(), vtok.patch(tower, "tome", r=2):
        eager = tower(x)
        torch._dynamo.reset()
        counters.clear()
        torch.testing.assert_close(torch.compile(tower, backend="eager")(x), eager)
    assert counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


def test_towers_that_are_refused():
    tower = build("clip")
    with pytest.raises(Unsupported, match="no vision-language model"):
        vtok.patch(tower, "uniform")
    with pytest.raises(Unsupported, match="no vision-language model"):
        vtok.patch(tower)
    with pytest.raises(Unsupported, match="no vision-language model"):
        vtok.patch(nn.Linear(2, 2), "tome")
    with pytest.raises(Unsupported, match="a vision transformer alone does not have"):
        vtok.patch(tower, "tome", carry=True)
    with pytest.raises(InvalidValue, match="2 entries, but 4 blocks"):
        vtok.patch(tower, "tome", r=(1, 2))
    with pytest.raises(InvalidValue, match="no budget"):
        vtok.patch(tower, "tome", budget=0.5)
    tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(Unsupported, match="additive mask"):
        vtok.patch(tower, "tome")
    vtok.patch(tower, "tome", proportional=False).remove()
    with pytest.raises(Unsupported, match="holds 2 vision towers"):
        vtok.patch(nn.ModuleList([build("clip"), build("siglip")]), "tome")
    assert not any(hooks for module in state(tower).values() for hooks in module[0].values())


def test_timm_towers_that_are_refused():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(Unsupported, match="no place between the two"):
        vtok.patch(_timm(block_fn=ParallelScalingBlock), "tome")
    with pytest.raises(Unsupported, match="rotates its keys"):
        vtok.patch(_eva(use_rot_pos_emb=True), "tome")
    tower = _timm()
    with vtok.patch(tower, "tome", r=1), pytest.raises(Unsupported, match="given an attention mask"):
        tower(pictures(), attn_mask=torch.zeros(17, 17))


def test_open_clip_towers_that_are_refused():
    pytest.importorskip("open_clip")
    with pytest.raises(Unsupported, match="MultiheadAttention"):
        vtok.patch(_open_clip(qk_norm=True), "tome")


# ---- inside LLaVA ------------------------------------------------------------------------------------------------
FAMILIES = [family for family, adapter in ADAPTERS.items() if "token_blocks" in adapter.provides]


def run(model, inputs, **extra):
    with torch.no_grad():
        return model(**inputs, **{"use_cache": True, **extra})


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tokens_come_back(family):
    """Unmerged, the language model sees what the tower alone says, at all places; it is not touched itself."""
    model, processor = tiny(family)
    inputs = mixed(processor)
    dense = run(model, inputs).logits
    with vtok.patch(model.model.vision_tower, "tome", r=2):
        expected = run(model, inputs).logits
        with pytest.raises(PatchStateError, match="patched already"):
            vtok.patch(model, "tome", r=2)
    blocks = 2
    with vtok.patch(model, "tome", r=(2,) * blocks) as patch:
        merged = run(model, inputs, output_attentions=False).logits
        assert patch.trace.n_kept == patch.trace.n_visual
        flops = patch.trace.flops()
        assert flops["compressed"]["encoder"] < flops["dense"]["encoder"]
        assert flops["compressed"]["prefill"] == flops["dense"]["prefill"]
        with pytest.raises(PatchStateError, match="patched already"):
            vtok.patch(model.model.vision_tower, "tome", r=2)
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged, dense, atol=1e-2)
    assert torch.equal(run(model, inputs).logits, dense)


def test_llava_with_a_timm_tower():
    """transformers 5.23 cannot run it as it is: its TimmWrapper gives pictures, and LLaVA wants tokens. Once that is
    mended the tower is patched alone, and all tokens come back."""
    pytest.importorskip("timm")
    import functools

    import transformers

    size = {"img_size": SIDE, "patch_size": 16, "embed_dim": 32, "depth": 4, "num_heads": 2}
    vision = {"model_type": "timm_wrapper", "architecture": "vit_tiny_patch16_224", "model_args": size}
    plain, processor = tiny("llava")
    config = copy.deepcopy(plain.config).to_dict() | {"vision_feature_select_strategy": "full"}
    config |= {"vision_config": vision | {"hidden_size": 32}}
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**config)).eval()
    tower = model.model.vision_tower.timm_model
    inputs = dict(batch(processor, ["a # what?", "# b"], [picture(56, 56, 1), picture(56, 56, 2)]))
    inputs["pixel_values"] = pictures()
    with pytest.raises(RuntimeError, match="shapes"):
        run(model, inputs)
    tower.forward_intermediates = functools.partial(tower.forward_intermediates, output_fmt="NLC")
    dense = run(model, inputs).logits
    with pytest.raises(Unsupported, match="the tower alone"):
        vtok.patch(model, "tome")
    with vtok.patch(model.model.vision_tower, "tome", r=2) as patch:
        merged = run(model, inputs).logits
        assert patch.trace.tokens == (17, 15, 13, 11, 9)
    assert merged.shape == dense.shape and (merged - dense).abs().max() > 1e-3
    assert torch.equal(run(model, inputs).logits, dense)


def test_only_blocks_that_matter_merge():
    """LLaVA reads the state before the last block."""
    model, processor = tiny("llava")
    with pytest.raises(InvalidValue, match="3 entries, but 2 blocks"):
        vtok.patch(model, "tome", r=(1, 1, 1))
    with vtok.patch(model, "tome", keep=0.5) as patch:
        run(model, mixed(processor))
        assert patch.trace.parts["blocks"].grouping.local.tokens == [17, 13, 9, 9]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_carried_tokens_stand_at_true_places(family, side):
    """One token a group, its group's feature, at the place of the group's first patch that is in the prompt."""
    model, processor = tiny(family)
    inputs = mixed(processor, side)
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with vtok.patch(model, "tome", r=2):
        run(model, inputs)
    hook.remove()
    whole = seen[0]
    with vtok.patch(model, "tome", r=2, carry=True) as patch, Entered(model, patch) as entered:
        pruned = run(model, inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False) if side == "left" else None
    trace = patch.trace
    assert 0 < sum(trace.n_kept) < sum(trace.n_visual)
    present = trace.present_at(0)
    torch.testing.assert_close(entered.embeds[present], whole[present])
    for i, (layout, into, kept) in enumerate(zip(trace.layouts, trace.merged_into, trace.keep_masks)):
        assert len(into) == layout.n
        rows = whole.flatten(0, 1)[trace.pictures[i].rows][layout.place]
        torch.testing.assert_close(rows, rows[into])  # all of a group have one feature
        leaders = into.unique()
        assert (into[leaders] == leaders).all() and (into <= torch.arange(layout.n)).all()
        assert kept[leaders].all()
        assert kept.sum() - len(leaders) in (0, 1)  # the prompt's last token is never dropped
    with Masked(model, trace, entered.embeds):
        torch.testing.assert_close(pruned[present], run(model, inputs).logits[present], atol=1e-5, rtol=1e-5)
        assert tokens is None or torch.equal(tokens, model.generate(**inputs, max_new_tokens=4, do_sample=False))
    assert (pruned[~present] == 0).all()


def test_carried_counts():
    model, processor = tiny("llava")
    inputs = batch(processor, ["# a?", "b # c"], [picture(56, 56, 1), picture(56, 56, 2)])
    for options, left in (({"r": 2}, 12), ({"keep": 0.5}, 8), ({"keep": 6}, 6), ({"r": 100}, 4)):
        with vtok.patch(model, "tome", carry=True, **options) as patch:
            run(model, inputs)
            assert patch.trace.n_kept == [left, left]
    with vtok.patch(model, "tome", carry=True, budget=0.4) as patch:
        run(model, inputs)
        assert 0.3 < patch.trace.mean_keep <= 0.4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("carry", [False, True])
def test_later_stages_compose(family, carry):
    if carry and "token_per_patch" not in ADAPTERS[family].provides:
        pytest.skip("has no token a patch")
    model, processor = tiny(family)
    inputs = mixed(processor)
    stack = able(family, vtok.ToMe(r=2, carry=carry), vtok.AIMMerge(keep=0.5), vtok.FastV(keep=0.5, layer=2))
    with vtok.patch(model, stack) as patch, Entered(model, patch) as entered:
        pruned = run(model, inputs).logits
    trace = patch.trace
    assert sum(trace.n_kept) < sum(trace.n_visual)
    assert (sum(trace.n_kept_at(3)) < sum(trace.n_kept)) == (family in INSIDE)
    with oracle(model, trace, entered.embeds):
        masked = run(model, inputs).logits
    present = trace.present_at(3)
    torch.testing.assert_close(pruned[present], masked[present], atol=1e-5, rtol=1e-5)
    for into, kept in zip(trace.merged_into, trace.keep_masks):
        assert (into >= 0).all() and kept[into].all()


def test_probes_see_all_patches():
    """GlobalCom2 scores by the last block's CLS attention: over groups, but for each patch."""
    model, processor = tiny("llava_next")
    inputs = mixed(processor)
    seen = []

    class Spy(vtok.GlobalCom2):
        def select(self, tokens):
            seen.append(tokens.cls_attention)
            return super().select(tokens)

    with vtok.patch(model, [vtok.ToMe(r=3), Spy(keep=0.4)]) as patch:
        run(model, inputs)
        groups = patch.trace.parts["blocks"].grouping.trace.groups[:, 1:]
    kept = [logits for cls in seen for view in cls for logits in view]
    assert kept and all(logits.shape == (16,) for logits in kept)
    assert all(len(logits.unique()) <= 10 for logits in kept)
    assert len(groups[0].unique()) == 10
    with pytest.raises(Unsupported, match="globalcom2 needs .* of whole views"):
        vtok.patch(model, [vtok.ToMe(r=3, carry=True), vtok.GlobalCom2(keep=0.4)])


def test_what_llava_is_refused():
    for family in FAMILIES:
        if "token_per_patch" not in ADAPTERS[family].provides:
            with pytest.raises(Unsupported, match="tome needs token_per_patch.*carry=False"):
                vtok.patch(tiny(family)[0], "tome", carry=True)
    qwen, _ = tiny("qwen2_5_vl")
    with pytest.raises(Unsupported, match="tome needs token_blocks.*It acts in the blocks of CLIP"):
        vtok.patch(qwen, "tome")
    model, _ = tiny("llava")
    with pytest.raises(InvalidValue, match="carry=True"):
        vtok.patch(model, "tome", budget=0.5)
    with pytest.raises(Unsupported, match="smaller picture and merging inside the encoder"):
        vtok.patch(model, ["tome", "downsample"])
    vtok.patch(model, "tome").remove()


@pytest.mark.parametrize("cut", [False, True])
def test_leaders(cut):
    """A mosaic of 1 x 2 crops of 2 x 3 patches behind a thumbnail, whole or with a column cut away on both sides."""
    crops = Plane(2, 4 if cut else 6, "crops", crop_grid=(1, 2), crop_shape=(2, 3), offset=(0, 1 if cut else 0))
    layout = Layout((Plane(2, 3, "thumbnail"), crops), separators=(0, 1))
    row = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 1, 0, 2, 0], [2, 1, 0, 2, 1, 0]])
    small, source, leader = vits.leaders(layout, row, 3)
    at = {(0, y, x): (0, y, x) for y in range(2) for x in range(3)}  # (plane, y, x) of a token -> (view, y, x)
    at |= {(1, y, x): (1 + (x + cut) // 3, y, (x + cut) % 3) for y in range(2) for x in range(crops.cols)}
    groups = {}
    for n, (view, y, x) in enumerate(at.values()):
        groups.setdefault((view, int(row[view, 3 * y + x])), []).append(n)
    assert source.tolist() == sorted(members[0] for members in groups.values())
    assert all(leader[n] == members[0] for members in groups.values() for n in members)
    assert [plane.size for plane in small.planes] == [3, len(groups) - 3]
    assert len(groups) == (8 if cut else 9)


def test_gradients_in_llava():
    model, processor = tiny("llava")
    inputs = mixed(processor)
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    for carry in (False, True):
        model.zero_grad()
        with vtok.patch(model, "tome", r=2, carry=carry):
            model(**inputs, labels=labels).loss.backward()
        embedding = model.model.vision_tower.embeddings.patch_embedding.weight
        assert embedding.grad.isfinite().all() and embedding.grad.abs().sum() > 0

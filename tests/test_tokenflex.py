"""TokenFLEX: golden numbers of the released function, a slow rewrite, places on the grid, and the model around it."""

import functools
import itertools
import math

import pytest
import torch
from contract import batch, picture, tiny

import vtok
from vtok.compressors.tokenflex import TokenFLEX, places
from vtok.errors import InvalidValue, Unsupported
from vtok.modules.tokenflex import TokenFlexProjector, TokenSampler, pool_grid
from vtok.types import Layout, Plane, VisualTokens


@pytest.mark.parametrize(
    ("n", "first", "total"),
    [
        (64, (35.2258065, 38.5806452, 41.9354839), 23296),
        (144, (20.8, 23.0285714, 25.2571429), 52416),
        (256, (11.7419355, 13.4193548, 15.0967742), 93184),
        (576, (7.7446809, 8.8510638, 9.9574468), 209664),
        (729, (0, 1, 2), 265356),
        (1024, (0, 0.8387097, 1.6774194), 372736),
        (100, (25.1034483, 27.7931034, 30.4827586), 36400),
    ],
)
def test_pooling_is_that_of_the_released_code(n, first, total):
    side = math.isqrt(n)
    pooled = pool_grid(torch.arange(729).view(1, 27, 27, 1), (side, side)).flatten()
    torch.testing.assert_close(pooled[:3], torch.tensor(first, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    assert pooled.sum().item() == pytest.approx(total, rel=1e-5)


def test_adaptive_pooling_is_another():
    x = torch.arange(729).view(1, 27, 27, 1)
    assert pool_grid(x, (8, 8), "adaptive").flatten()[0].item() == pytest.approx(42.0)


def test_pooling_a_rectangle_by_hand():
    """5 x 7 to 2 x 3: resized to 6 x 9 with aligned corners, then means of 3 x 3 cells."""
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)

    def at(b, y, x_):  # bilinear
        y0, x0 = min(int(y), 3), min(int(x_), 5)
        dy, dx = y - y0, x_ - x0
        top = x[b, y0, x0] * (1 - dx) + x[b, y0, x0 + 1] * dx
        return top * (1 - dy) + (x[b, y0 + 1, x0] * (1 - dx) + x[b, y0 + 1, x0 + 1] * dx) * dy

    for b in range(2):
        for r in range(2):
            for c in range(3):
                cell = [at(b, (3 * r + i) * 4 / 5, (3 * c + j) * 6 / 8) for i in range(3) for j in range(3)]
                expected = torch.stack(cell).mean(0).float()
                torch.testing.assert_close(pool_grid(x, (2, 3))[b, r, c], expected, rtol=1e-5, atol=1e-5)


def ramp(module):
    with torch.no_grad():
        for layer in (module.gate, module.up, module.down):
            for p in (layer.weight, layer.bias):
                p.copy_((torch.arange(p.numel()) % 13 - 6).view_as(p) / 50)
    return module


def test_projector_regression_values():
    module = ramp(TokenFlexProjector(8, 4).double())
    x = ((torch.arange(5832) % 11).double() / 11 - 0.5).view(1, 27, 27, 8)
    y = module(x, (8, 8))
    expected = torch.tensor([-0.1240291356, -0.0915896386, -0.0669400986, -0.0569665780], dtype=torch.float64)
    torch.testing.assert_close(y[0, 0, 0], expected, rtol=1e-5, atol=1e-6)  # pooling is in fp32
    for side, total in ((8, -23.1045058398), (12, -52.2334486), (16, -93.7242629774)):
        assert module(x, (side, side)).sum().item() == pytest.approx(total, rel=1e-5)


def test_released_names_and_own_file(tmp_path):
    from safetensors.torch import save_file

    module = ramp(TokenFlexProjector(8, 4, pool="adaptive"))
    names = {"norm": "layernorm", "gate": "f1", "up": "f2", "down": "g"}
    state = {f"projector.mlp.{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in module.state_dict().items()}
    others = {"language_model.model.norm.weight": torch.ones(3)}  # a whole checkpoint holds more
    save_file(state | others, tmp_path / "released.safetensors")
    loaded = TokenFlexProjector.load(tmp_path / "released.safetensors")
    assert loaded.pool == "resize"  # what the released code does
    module.save(tmp_path / "own.safetensors")
    again = TokenFlexProjector.load(tmp_path / "own.safetensors")
    assert again.pool == "adaptive"
    for name, value in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value) and torch.equal(again.state_dict()[name], value)
    save_file({"mlp.f1.weight": torch.ones(2, 2)}, tmp_path / "part.safetensors")
    with pytest.raises(InvalidValue, match="no TokenFLEX projector: down.bias"):
        TokenFlexProjector.load(tmp_path / "part.safetensors")
    with pytest.raises(InvalidValue, match="no file"):
        TokenFlexProjector.load(tmp_path / "none.safetensors")


def test_sampler():
    sampler = TokenSampler((64, 144, 256), (0.2, 0.3, 0.5), seed=3)
    assert sampler.mean == pytest.approx(184)
    drawn = [sampler.at(step) for step in range(4000)]
    for count, share in zip(sampler.counts, sampler.probabilities):
        assert drawn.count(count) / 4000 == pytest.approx(share, abs=0.03)
    other = TokenSampler((64, 144, 256), (0.2, 0.3, 0.5), seed=3)  # another process
    assert [other.at(step) for step in range(50)] == drawn[:50]
    assert [TokenSampler((64, 144), (0.5, 0.5), seed=4).at(s) for s in range(50)] != [
        TokenSampler((64, 144), (0.5, 0.5), seed=5).at(s) for s in range(50)
    ]
    runs = sum(a == b for a, b in itertools.pairwise(drawn)) / 3999  # of independent draws: .04 + .09 + .25
    assert runs == pytest.approx(0.38, abs=0.04)
    for counts, shares in (((60,), (1.0,)), ((64,), (0.5,)), ((64, 144), (1.0,)), ((), ()), ((64, 144), (1.5, -0.5))):
        with pytest.raises(InvalidValue):
            TokenSampler(counts, shares)


def test_options():
    with pytest.raises(InvalidValue, match="trained projector"):
        vtok.TokenFLEX(keep=0.25)
    module = TokenFlexProjector(8, 4)
    for keep in (15, 2):
        with pytest.raises(InvalidValue, match="perfect square"):
            vtok.TokenFLEX(keep=keep, weights=module)
    method = TokenFLEX(keep=0.25, weights=module)
    assert method.grid(8, 8) == (4, 4) and method.grid(6, 10) == (3, 5) and method.grid(1, 1) == (1, 1)
    assert TokenFLEX(keep=16, weights=module).grid(4, 6) == (4, 4)
    with pytest.raises(InvalidValue, match="do not fit"):
        TokenFLEX(keep=16, weights=module).grid(3, 6)
    assert not TokenFLEX(keep=1.0, weights=module).is_identity
    with pytest.raises(InvalidValue, match="pool"):
        TokenFlexProjector(8, 4, pool="max")


def test_places_of_crops():
    """2 x 2 crops of 4 x 4, the mosaic's first two columns cut away: each cell's middle, or nothing."""
    plane = Plane(8, 6, "crops", crop_grid=(2, 2), crop_shape=(4, 4), offset=(0, 2))
    at = places(plane, (2, 2)).view(4, 2, 2)
    for crop in range(4):
        for r in range(2):
            for c in range(2):
                y, x = crop // 2 * 4 + 2 * r + 1, crop % 2 * 4 + 2 * c + 1 - 2
                assert at[crop, r, c] == (y * 6 + x if 0 <= x < 6 else -1)
    assert places(Plane(3, 5), (3, 5)).tolist() == list(range(15))


def test_selection_by_hand_with_merged_patches():
    """Tokens of 2 x 2 patches: the projector reads the patches in raster order."""
    layout = Layout((Plane(2, 3, "frame"), Plane(2, 3, "frame")), modality="video")
    module = ramp(TokenFlexProjector(5, 4))
    raster = torch.randn(2, 2, 4, 6, 5)  # [B, V, rows, cols, C] of patches
    states = torch.empty(2, 2, 24, 5)
    for token in range(6):
        for patch in range(4):
            y, x = token // 3 * 2 + patch // 2, token % 3 * 2 + patch % 2
            states[:, :, token * 4 + patch] = raster[:, :, y, x]
    features = torch.randn(2, 12, 4)
    tokens = VisualTokens(features, layout, encoder={("encoder_states", None): states})
    selection = TokenFLEX(keep=0.5, weights=module).select(tokens)  # a grid of 1 x 2 a frame
    assert selection.n_kept == 4 and selection.keep.sum(1).tolist() == [4, 4]
    for b in range(2):
        expected = torch.cat([module(raster[b : b + 1, v], (1, 2)).flatten(0, 2) for v in range(2)])
        torch.testing.assert_close(selection.features[b][selection.keep[b]], expected)
    assert torch.equal(selection.features[~selection.keep], features[~selection.keep])
    squeezed = VisualTokens(features, Layout((Plane(2, 3, resampled=(4, 6)),)), encoder=tokens.encoder)
    with pytest.raises(Unsupported, match="anyres-max"):
        TokenFLEX(weights=module).select(squeezed)


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


class AsOwn(torch.nn.Module):
    """A model's own projector, dressed up as a flexible one: at the full grid both must give the same."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, x, grid):
        assert grid == tuple(x.shape[1:3])
        return self.own(x.flatten(1, 2)).unflatten(1, grid)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_at_the_full_grid_the_models_own_projector_gives_its_own_logits(family):
    model, processor = tiny(family)
    inputs = batch(processor, ["# what?", "and # this", "no picture"], [picture(112, 112), picture(56, 112)])
    dense = logits(model, inputs)
    own = AsOwn(model.model.multi_modal_projector)
    with vtok.patch(model, TokenFLEX(keep=1.0, weights=own)) as handle:
        torch.testing.assert_close(logits(model, inputs), dense, rtol=1e-5, atol=1e-5)
        assert handle.trace.mean_keep == 1.0


@functools.cache
def flexible(family):
    torch.manual_seed(1)
    model, _ = tiny(family)
    core, config = model.model, model.config
    own = getattr(core, "multi_modal_projector", None)
    width = own.linear_1.in_features if own is not None else config.vision_config.hidden_size
    return TokenFlexProjector(width, config.get_text_config().hidden_size)


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl"])
@pytest.mark.parametrize("keep", [4, 0.25])
def test_batches_are_equal_to_single_samples_and_gradient_reaches_the_projector(family, keep):
    model, processor = tiny(family)
    module = flexible(family)
    prompts, pictures = ["# what?", "and # this one"], [picture(112, 112), picture(56, 112, 1)]
    with vtok.patch(model, "tokenflex", keep=keep, weights=module) as handle:
        together = logits(model, batch(processor, prompts, pictures))
        kept = handle.trace.n_kept
        assert all(0 < k < n for k, n in zip(kept, handle.trace.n_visual))
        for i, (prompt, image) in enumerate(zip(prompts, pictures)):
            alone = logits(model, batch(processor, [prompt], [image]))
            torch.testing.assert_close(together[i, -1], alone[0, -1], rtol=1e-4, atol=1e-5)
            assert handle.trace.n_kept == [kept[i]]
        inputs = batch(processor, prompts, pictures)
        labels = inputs["input_ids"].clone()
        labels[:, :-2] = -100
        model.train()
        model(**inputs, labels=labels).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    module.zero_grad()
    model.zero_grad()


def test_the_recipe(tmp_path):
    """Alignment brings the tokens closer to the model's own; then each step of a trainer draws its number."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from vtok.modules.training import Projected, align, tokenflex_for

    model, processor = tiny("llava")
    sampler = TokenSampler((1, 4), (0.5, 0.5), seed=2)
    torch.manual_seed(0)
    projector = tokenflex_for(model)
    inputs = batch(processor, ["# what?", "and # this"], [picture(56, 56), picture(56, 56, 1)])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = align(model, projector, sampler, [inputs] * 60, 60, lr=1e-2)
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    kept = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            kept.append(flexible.patch.trace.n_kept)

    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    rows = [{name: value[i] for name, value in inputs.items()} | {"labels": labels[i]} for i in range(2)]
    flexible = Projected(projector, lambda step: TokenFLEX(keep=sampler.at(step), weights=projector))
    flexible.attach(model)
    frozen = projector.down.weight.detach().clone()
    settings = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=rows * 6, callbacks=[flexible, Watch()])
    trainer.train()
    assert kept == [[sampler.at(step)] * 2 for step in range(6)] and len({k[0] for k in kept}) == 2
    assert not torch.equal(projector.down.weight, frozen)  # the trainer's optimiser had it
    assert set(model.state_dict()) == set(before)  # and the model is its old self
    vtok.patch(model, "uniform").remove()

"""Optimisers: golden numbers of the official ones, slow rewrites of the formulas, state, resuming, and trainers."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import vtok
from vtok.errors import InvalidValue, Unsupported
from vtok.text.optim import OPTIMIZERS, state_bytes, without_backward, zeroth
from vtok.text.optim.apollo import Apollo
from vtok.text.optim.base import newton_schulz
from vtok.text.optim.frugal import Frugal
from vtok.text.optim.lionk import LionK
from vtok.text.optim.zeroth import ZerothOrder

create = vtok.optim.create
WITH_GRADIENTS = sorted(set(OPTIMIZERS) - {"mezo", "forward_gradient"})


def spec(k, shape=(8, 6), dtype=torch.float32):
    """The inputs B of the spec: the weights, or the gradient of step k."""
    i = torch.arange(math.prod(shape), dtype=dtype).reshape(shape)
    return torch.sin(0.7 * i) if k is None else torch.cos(0.3 * i + 0.9 * k)


def trained(make, steps, spike=None, shape=(8, 6), dtype=torch.float32, gradient=spec):
    weight = nn.Parameter(spec(None, shape, dtype))
    optimizer = make([weight])
    for k in range(steps):
        weight.grad = gradient(k, shape, dtype)
        if k == spike:
            weight.grad[0, 0] = 1e4
        optimizer.step()
    return weight.detach(), optimizer


class Columns(Frugal):
    """With the columns that the official code drew."""

    def place(self, *_):
        return slice(None), torch.tensor([2, 3, 5])


@pytest.mark.parametrize(
    ("make", "steps", "spike", "wanted"),
    [
        (partial(create, "lion", lr=0.01, weight_decay=0.1), 5, None, (1.8606476, 4.8741904, 0.0100399)),
        (partial(create, "spam", lr=0.01), 30, None, (1.7222971, 4.8906575, -0.0276223)),
        (partial(create, "spam", lr=0.01), 30, 25, (1.6989145, 4.8908454, -0.0510049)),
        (partial(create, "stable_spam", lr=0.01), 30, None, (1.7213349, 4.8908846, -0.0280182)),
        (partial(create, "frugal", lr=0.01, density=0.0), 5, None, (1.7292368, 4.8952881, 0.01)),
        (partial(Columns, lr=0.01, density=0.5), 5, None, (1.7323394, 4.8751049, 0.01)),
    ],
)
def test_golden_numbers_of_the_official_code(make, steps, spike, wanted):
    weight, _ = trained(make, steps, spike)
    found = (weight.sum().item(), weight.norm().item(), weight[0, 0].item())
    assert found == pytest.approx(wanted, abs=4e-6)


# ---- slow rewrites ---------------------------------------------------------------------------------------------------
def slow_apollo(weight, gradients, projection, tensor, lr, scale):
    """Row by row, with rows along the longer side."""
    flip = weight.shape[0] < weight.shape[1]
    w = weight.T.clone() if flip else weight.clone()
    mean = square = 0.0
    before = None
    for t, g in enumerate(gradients, 1):
        g = g.T if flip else g
        r = torch.stack([row @ projection for row in g])
        mean, square = 0.9 * mean + 0.1 * r, 0.999 * square + 0.001 * r**2
        a = mean / (square**0.5 + 1e-6)
        rows = [g[i] * (a[i].norm() / r[i].norm()) for i in range(len(g))]
        u = g * (a.norm() / r.norm()) if tensor else torch.stack(rows)
        if before is not None and u.norm() > 1.01 * before:
            u = u * (1.01 * before / u.norm())
        before = u.norm()
        w = w - lr * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * scale**0.5 * u
        w = w - lr * 0.1 * w
    return w.T if flip else w


@pytest.mark.parametrize("shape", [(8, 6), (6, 8)])
@pytest.mark.parametrize(("name", "rank"), [("apollo", 2), ("apollo_mini", 1)])
def test_apollo_is_its_formula(shape, name, rank):
    grown = lambda k, shape, dtype: (1 + k) * spec(k, shape, dtype)  # so that the limit of growth is met
    make = partial(create, name, lr=0.01, rank=rank, weight_decay=0.1)
    found, optimizer = trained(make, 6, shape=shape, dtype=torch.float64, gradient=grown)
    (group,) = optimizer.param_groups
    gradients = [grown(k, shape, torch.float64) for k in range(6)]
    drawn = Apollo.projection(gradients[0], 1, group, (0, 0))
    assert drawn.shape == (6, rank)
    wanted = slow_apollo(
        spec(None, shape, torch.float64), gradients, drawn, name == "apollo_mini", 0.01, group["scale"]
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    later = Apollo.projection(gradients[0], 201, group, (0, 0))
    assert drawn.equal(Apollo.projection(gradients[0], 200, group, (0, 0))) and not drawn.equal(later)
    wide = Apollo.projection(torch.zeros(600, 500), 1, group | {"rank": 400}, (0, 0))
    assert wide.square().mean().item() * 400 == pytest.approx(1, abs=0.02)


def random_gradient(k, shape, dtype):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(k))


def test_cosmos_is_its_formula():
    lr, b, r = 0.01, 0.9, 2
    make = partial(create, "cosmos", lr=lr, betas=(b, b), rank=r, weight_decay=0.1)
    found, _ = trained(make, 5, dtype=torch.float64, gradient=random_gradient)
    w, m, v = spec(None, dtype=torch.float64), 0.0, 0.0
    for t in range(1, 6):
        g = random_gradient(t - 1, (8, 6), torch.float64)
        m = b * m + g
        if t == 1:
            p, s = torch.linalg.eigh(g.T @ g).eigenvectors[:, -r:], torch.zeros(r, r, dtype=torch.float64)
        else:
            q = torch.linalg.qr(b * p @ s + (1 - b) * g.T @ g @ p).Q
            s, p = (p.T @ q).T @ s @ (p.T @ q), q
        s = b * s + (1 - b) * (g @ p).T @ (g @ p)
        v = (b * v if t == 1 else b * v @ torch.eye(r, dtype=torch.float64)) + (1 - b) * (g @ p) ** 2
        k = (1 - b**t) / (1 - b)
        ahead = (g + b * m) / (1 + b * k)
        if t == 1:  # eigenvectors come in another order
            p, s, v = p.flip(1), s.flip(0, 1), v.flip(1)
        rest = newton_schulz(ahead - ahead @ p @ p.T)
        d = (ahead @ p / ((v / (1 - b**t)) ** 0.5 + 1e-8)) @ p.T + 0.2 * rest * 48**0.5 / rest.norm()
        w = w * (1 - lr * 0.1) - lr * 0.2 * 48**0.5 * d / d.norm()
    torch.testing.assert_close(found, w, rtol=1e-6, atol=1e-8)


def test_each_step_of_cosmos_has_its_size():
    before = spec(None)
    for gradient in (random_gradient, spec):  # of `spec` all is in the leading directions
        after, _ = trained(partial(create, "cosmos", lr=0.01, weight_decay=0.0, rank=2), 1, gradient=gradient)
        assert (after - before).square().mean().sqrt().item() == pytest.approx(0.01 * 0.2, rel=1e-4)


def slow_spam(weight, gradients, lr, gap, warmup, threshold):
    w = [float(x) for x in weight.flatten()]
    for i in range(len(w)):
        m = v = 0.0
        for t, g in enumerate((float(g.flatten()[i]) for g in gradients), 1):
            turn, since = (t - 1) // gap, (t - 1) % gap
            if since == 0:
                m = v = 0.0
            if since >= 20 and g * g > threshold * v:
                g = math.copysign(math.sqrt(threshold * v), g)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            now = lr
            if turn and since < warmup:
                now *= 1 - 0.99 * 0.5 * (1 + math.cos(math.pi * since / warmup))
            w[i] -= now * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (math.sqrt(v) + 1e-6)
    return torch.tensor(w, dtype=torch.float64).reshape(weight.shape)


def test_spam_over_resets_is_its_formula():
    make = partial(create, "spam", lr=0.01, gap=30, warmup=8, threshold=40.0)
    spiky = lambda k, shape, dtype: spec(k, shape, dtype) * (100 if k in (25, 57) else 1)
    found, _ = trained(make, 65, shape=(3, 2), dtype=torch.float64, gradient=spiky)
    gradients = [spiky(k, (3, 2), torch.float64) for k in range(65)]
    torch.testing.assert_close(found, slow_spam(spec(None, (3, 2), torch.float64), gradients, 0.01, 30, 8, 40.0))


def test_stable_spam_forgets_after_its_gap():
    """Adam's moments begin anew, the running maxima and norms do not."""
    whole, _ = trained(partial(create, "stable_spam", lr=0.01, gap=4), 5, dtype=torch.float64)
    four, optimizer = trained(partial(create, "stable_spam", lr=0.01, gap=4), 4, dtype=torch.float64)
    (state,) = optimizer.state.values()
    step = whole - four
    torch.testing.assert_close(step.abs(), torch.full_like(step, 0.01), rtol=1e-3, atol=0)  # Adam's first
    assert state["step"] == 4 and state["exp_avg"].any()


@pytest.mark.parametrize("share", ["columns", "rows", "entries", "blocks"])
def test_frugal_is_adam_in_its_share_and_signs_elsewhere(share):
    weights = [nn.Parameter(spec(None) + i) for i in range(4)]
    start = [w.detach().clone() for w in weights]
    optimizer = create("frugal", weights, lr=0.01, density=0.5, share=share, sign_scale=0.1, gap=3)
    for k in range(3):
        for w in weights:
            w.grad = spec(k)
        optimizer.step()
    twin = nn.Parameter(spec(None))
    adam = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.0)
    for k in range(3):
        twin.grad = spec(k)
        adam.step()
    by_adam, by_sign = (twin - spec(None)).detach(), -0.001 * sum(spec(k).sign() for k in range(3))
    places = [optimizer.place(spec(0), 0, optimizer.param_groups[0], (0, i)) for i in range(4)]
    masks = [torch.zeros(8, 6, dtype=torch.bool) for _ in weights]
    for w, old, place, mask in zip(weights, start, places, masks):
        mask[place] = True
        torch.testing.assert_close(w.detach() - old, by_adam.where(mask, by_sign), rtol=1e-3, atol=2e-6)
    assert torch.stack(masks).float().mean() == 0.5 and not all(m.equal(masks[0]) for m in masks)
    assert state_bytes(optimizer) == 0.5 * state_bytes(adam_on(weights))
    again = optimizer.place(spec(0), 1, optimizer.param_groups[0], (0, 0))
    assert share == "blocks" or not all(torch.equal(a, b) for a, b in zip(places[0], again) if a != slice(None))


def adam_on(weights):
    """AdamW after a step, without its step counters."""
    optimizer = torch.optim.AdamW(weights)
    optimizer.step()
    for state in optimizer.state.values():
        del state["step"]
    return optimizer


def test_frugal_of_all_is_adamw_and_so_are_plain_groups():
    adam, _ = trained(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), 7)
    full, _ = trained(partial(create, "frugal", lr=0.01, density=1.0, weight_decay=0.1), 7)
    torch.testing.assert_close(full, adam)
    for name in ("apollo", "lion", "spam", "stable_spam", "frugal", "cosmos"):
        make = lambda params, name=name: create(
            name, [{"params": params, "plain": True, "betas": (0.9, 0.999), "eps": 1e-8}], lr=0.01, weight_decay=0.1
        )
        torch.testing.assert_close(trained(make, 7)[0], adam)


# ---- Lion-K ----------------------------------------------------------------------------------------------------------
def test_lion_stays_in_its_box():
    target = torch.tensor([5.0, -0.2, 0.3])
    x = nn.Parameter(torch.zeros(3))
    optimizer = create("lion", [x], lr=0.01, weight_decay=2.0)
    for _ in range(400):
        x.grad = (x - target).detach()
        optimizer.step()
    assert x[0].item() == pytest.approx(0.5, abs=0.011)  # 1 / weight_decay
    assert x[1:].tolist() == pytest.approx([-0.2, 0.3], abs=0.03)


def test_the_kernels_of_lion_k():
    step = lambda kernel, g, **given: (
        -trained(
            partial(LionK, lr=1.0, betas=(0.0, 0.0), kernel=kernel, **given), 1, gradient=lambda *_: g, shape=g.shape
        )[0]
        + spec(None, g.shape)
    )
    g = torch.tensor([[3.0, -0.05], [0.0, 0.4]])
    torch.testing.assert_close(step("huber", g, threshold=0.1), torch.tensor([[1.0, -0.5], [0.0, 1.0]]))
    torch.testing.assert_close(step("soft", g, threshold=0.1), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(step("group", g), g / g.norm(dim=1, keepdim=True))
    values = torch.linalg.svdvals(step("nuclear", random_gradient(0, (6, 4), torch.float32)))
    assert (values > 0.6).all() and (values < 1.3).all()


# ---- state -----------------------------------------------------------------------------------------------------------
def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 6)).to(dtype)


def steps(net, optimizer, numbers):
    for k in numbers:
        for p in net.parameters():
            p.grad = random_gradient(k, p.shape, p.dtype)
        optimizer.step()


SMALL = {"apollo": {"rank": 2, "gap": 2}, "frugal": {"gap": 2}, "cosmos": {"rank": 2}, "spam": {"gap": 4, "warmup": 2}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in WITH_GRADIENTS if name != "muon"])
def test_resuming_gives_the_same_next_steps(name, dtype, tmp_path):
    make = lambda net: create(name, net, lr=0.01, **SMALL.get(name, {}))
    whole, part, resumed = model(dtype), model(dtype), model(dtype)
    steps(whole, make(whole), range(6))
    first = make(part)
    steps(part, first, range(3))
    torch.save([part.state_dict(), first.state_dict()], tmp_path / "saved.pt")
    weights, state = torch.load(tmp_path / "saved.pt")
    resumed.load_state_dict(weights)
    second = make(resumed)
    second.load_state_dict(state)
    steps(resumed, second, range(3, 6))
    assert all(a.equal(b) for a, b in zip(resumed.parameters(), whole.parameters()))
    if name != "adamw":
        tensors = [v for s in second.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        assert {v.dtype for v in tensors} == {torch.float32}


def test_state_bytes_are_those_of_the_formulas():
    m, n, r = 12, 8, 2
    sizes = {
        "adamw": 2 * m * n + 1,  # torch keeps the step as a tensor
        "apollo": 2 * r * m + 1,
        "apollo_mini": 2 * m + 1,
        "cosmos": m * n + n * r + m * r + r * r,
        "frugal": 2 * m * n // 4,
        "lion": m * n,
        "spam": 2 * m * n,
        "stable_spam": 2 * m * n + 3,
    }
    for name, floats in sizes.items():
        options = {"rank": r} if name in ("apollo", "cosmos") else {}
        for shape in ((m, n), (n, m)) if name.startswith("apollo") else ((m, n),):
            _, optimizer = trained(partial(create, name, **options), 2, shape=shape, gradient=random_gradient)
            assert state_bytes(optimizer) == 4 * floats, name


def test_small_steps_are_not_lost_in_bf16():
    for rounding, moved in ((True, 1e-3 * 30), (False, 0.0)):
        weight = nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
        optimizer = create("lion", [weight], lr=1e-3, stochastic_rounding=rounding)
        for _ in range(30):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        assert 1 - weight.float().mean().item() == pytest.approx(moved, abs=3e-4)


def test_a_models_parameters_are_grouped():
    net = model()
    net[3].bias.requires_grad_(False)
    optimizer = create("apollo", net, weight_decay=0.1)
    found = [[tuple(p.shape) for p in g["params"]] for g in optimizer.param_groups]
    assert found == [[(6, 8), (6, 6)], [(10, 8)], [(6,), (6,), (6,)]]
    assert [(g["plain"], g["weight_decay"]) for g in optimizer.param_groups] == [(False, 0.1), (True, 0.1), (True, 0.0)]


def test_what_cannot_be_is_refused():
    matrix, vector = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(3))
    with pytest.raises(InvalidValue, match=r"no optimiser 'adm'.*apollo"):
        create("adm", [matrix])
    for name in ("apollo", "cosmos", "frugal", "muon"):
        with pytest.raises(InvalidValue, match="matri"):
            create(name, [matrix, vector])
    with pytest.raises(InvalidValue, match="matri"):
        create("lion_k", [vector], kernel="nuclear")
    bad = [("apollo", {"rank": 0}), ("apollo", {"per": "row"}), ("frugal", {"density": 2.0}), ("lion", {"lr": -1.0})]
    bad += [("frugal", {"share": "some"}), ("lion_k", {"kernel": "l2"}), ("stable_spam", {"theta": 1.0})]
    bad += [
        ("mezo", {"rule": "adam"}),
        ("mezo", {"eps": 0.0}),
        ("spam", {"betas": (1.0, 0.9)}),
    ]
    for name, options in bad:
        with pytest.raises(InvalidValue, match=next(iter(options))):
            create(name, [matrix], **options)
    with pytest.raises(InvalidValue, match="give it, as model"):
        create("forward_gradient", [matrix])
    with pytest.raises(InvalidValue, match="no option 'rnk'"):
        create("apollo", [{"params": [matrix], "rnk": 4}])
    lookup = nn.Embedding(4, 2, sparse=True)
    lookup(torch.tensor([1])).sum().backward()
    with pytest.raises(Unsupported, match="sparse"):
        create("spam", lookup.parameters()).step()
    with pytest.raises(InvalidValue, match="no parameter"):
        create("spam", nn.ReLU())


# ---- zeroth order ----------------------------------------------------------------------------------------------------
@pytest.fixture
def seeded(monkeypatch):
    """Directions as in the spec: of a generator that the step's number seeds."""
    monkeypatch.setattr(zeroth, "drawn", lambda like, seed, step, *_: torch.Generator().manual_seed(step))


def bowl():
    theta = nn.Parameter(torch.linspace(-1, 1, 10).double())
    scale = torch.arange(1, 11, dtype=torch.float64)
    return theta, lambda: 0.5 * (scale * (theta - 0.3) ** 2).sum()


def test_golden_numbers_of_mezo(seeded):
    for estimate, slope in (("two_sided", 2.4869788178), ("one_sided", 2.5113478)):
        theta, loss = bowl()
        before = theta.detach().clone()
        optimizer = create("mezo", [theta], lr=0.01, estimate=estimate)
        assert loss().item() == pytest.approx(8.1787039)
        optimizer.estimate(loss)
        assert float(optimizer._slopes[0]) == pytest.approx(slope, rel=1e-7)
        torch.testing.assert_close(theta.detach(), before, rtol=0, atol=1e-15)
    theta, loss = bowl()
    optimizer = create("mezo", [theta], lr=0.01)
    for _ in range(300):
        optimizer.step(loss)
    assert loss().item() == pytest.approx(1.5236e-3, rel=1e-4)
    assert state_bytes(optimizer) == 0


def test_forward_gradients_are_exact_and_leave_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight  # tied
    net[0].bias.requires_grad_(False)
    before, x = dict(net.named_parameters()), random_gradient(0, (5, 4), torch.float64)
    loss = lambda: net(x).square().sum()
    optimizer = create("forward_gradient", net)
    optimizer.estimate(loss)
    loss().backward()
    wanted = sum((p.grad * z).sum() for p, z in optimizer._directions(0))
    assert float(optimizer._slopes[0]) == pytest.approx(wanted.item(), rel=1e-9)
    after = dict(net.named_parameters())
    assert list(after) == list(before) and all(after[name] is p for name, p in before.items())


def test_half_precision_weights_come_back_exactly():
    net = nn.Linear(40, 40).to(torch.bfloat16)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = create("mezo", net, lr=0.0)
    for _ in range(20):
        optimizer.step(lambda: net(torch.ones(1, 40, dtype=torch.bfloat16)).float().sum())
    assert all(a.equal(b) for a, b in zip(net.parameters(), before))


def test_variants_of_zeroth_order():
    theta, loss = bowl()
    optimizer = create("mezo", [theta], density=0.3, queries=2)
    (_, z), (_, other) = (next(optimizer._directions(query)) for query in (0, 1))
    assert 0 < (z != 0).sum() < 10 and not z.equal(other)
    parts = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    optimizer = create("mezo", parts, blocks=2)
    moved = []
    for _ in range(2):
        moved.append([next(i for i, q in enumerate(parts) if q is p) for p, _ in optimizer._directions(0)])
        optimizer.step(lambda: sum(p.sum() for p in parts))
    assert moved == [[0, 1], [2, 3]]
    theta, loss = bowl()
    optimizer = create("mezo", [theta], lr=0.05, rule="conservative")
    losses = [optimizer.step(loss).item() and loss().item() for _ in range(30)]
    assert all(b <= a + 1e-12 for a, b in pairwise(losses)) and losses[-1] < 0.5 * losses[0]
    theta, loss = bowl()
    optimizer = create("mezo", [theta], lr=0.01, rule="sign")
    (_, z), before = next(optimizer._directions(0)), theta.detach().clone()
    optimizer.estimate(loss)
    sign = math.copysign(1, float(optimizer._slopes[0]))
    optimizer.step()
    torch.testing.assert_close(theta.detach(), before - 0.01 * sign * z)


def test_dropout_is_the_same_in_both_forwards():
    net = nn.Sequential(nn.Linear(30, 30), nn.Dropout(0.5)).double()
    x = random_gradient(0, (1, 30), torch.float64)
    optimizer = create("mezo", net, eps=1e-6)
    optimizer.estimate(lambda: net(x).sum())
    slope = float(optimizer._slopes[0])
    torch.manual_seed(0)  # of the first step
    net(x).sum().backward()
    wanted = sum((p.grad * z).sum() for p, z in optimizer._directions(0)).item()
    assert slope == pytest.approx(wanted, rel=1e-6)


# ---- trainers --------------------------------------------------------------------------------------------------------
class Line(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x, y):
        return {"loss": (self.layer(x) - y).square().mean()}


def trainer_of(name, folder, batch=4, **given):
    rows = [{"x": random_gradient(i, (3,), torch.float32), "y": torch.tensor([0.5, -0.5])} for i in range(24)]
    args = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    args |= {"per_device_train_batch_size": batch, "max_steps": 6, "save_steps": 3, "logging_steps": 1, **given}
    net = Line()
    optimizer = create(name, net, lr=0.02, **({"rank": 2} if name == "apollo" else {}))
    trainer = Trainer(net, TrainingArguments(str(folder), **args), train_dataset=rows, optimizers=(optimizer, None))
    return without_backward(trainer) if isinstance(optimizer, ZerothOrder) else trainer


@pytest.mark.parametrize("name", ["apollo", "mezo"])
def test_a_trainer_takes_them_accumulates_and_resumes(name, tmp_path):
    whole = trainer_of(name, tmp_path)
    whole.train()
    start = Line().layer.weight
    assert not whole.model.layer.weight.allclose(start)
    parts = trainer_of(name, tmp_path / "parts", batch=2, gradient_accumulation_steps=2, save_strategy="no")
    parts.train()
    torch.testing.assert_close(parts.model.layer.weight, whole.model.layer.weight, atol=1e-5, rtol=1e-5)
    resumed = trainer_of(name, tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(resumed.model.layer.weight, whole.model.layer.weight, atol=1e-7, rtol=0)
    with pytest.raises(InvalidValue, match="optimizer is a"):
        without_backward(trainer_of("lion", tmp_path))


def test_the_share_of_frugal_begins_anew_after_its_gap():
    """With density 1 the third step of gap=2 is Adam's first: each entry moves by the learning rate."""
    two, three = (trained(partial(create, "frugal", lr=0.01, density=1.0, gap=2), n)[0] for n in (2, 3))
    torch.testing.assert_close((three - two).abs(), torch.full_like(two, 0.01), rtol=1e-3, atol=0)

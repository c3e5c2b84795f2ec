"""Token-level losses: golden numbers, identities, and gradients against the plain formulas."""

import math

import numpy as np
import pytest
import torch

from vtok.errors import InvalidValue
from vtok.text.align import ift as ifts
from vtok.text.align import rto, spo
from vtok.text.align import tl_training as tl
from vtok.text.align.aligndistil import aligndistil
from vtok.text.align.cdpo import critical_token, critical_weights
from vtok.text.align.implicit import token_rewards, values
from vtok.text.align.logo import logo, simpo, spread_positions
from vtok.text.align.rrpo import rrpo
from vtok.text.align.sparsepo import MaskHead, activation_mask, sparsepo
from vtok.text.align.stats import token_stats
from vtok.text.align.tdpo import tdpo
from vtok.text.align.treg import contrast_scores, treg
from vtok.text.align.weighted import weighted_dpo

near = lambda found, wanted, atol=2e-7: np.testing.assert_allclose(found.detach().numpy(), wanted, atol=atol)


def spec_a():
    """The inputs A of the spec: logits of policy, reference, and two more models; labels."""
    b, t, v = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (4, 6, 7)), indexing="ij")
    labels = (torch.arange(4)[:, None] + 2 * torch.arange(6)) % 7
    labels[:, :2], labels[3, 5] = -100, -100
    z, z0 = 2 * torch.sin(0.7 * b + 0.3 * t + 1.1 * v), 2 * torch.cos(0.5 * b - 0.2 * t + 0.9 * v)
    return z, z0, 2 * torch.sin(0.4 * b + 0.6 * t + 0.8 * v), 2 * torch.cos(0.3 * b + 0.7 * t + 0.5 * v), labels


@pytest.fixture
def a():
    return spec_a()


def behind(values):
    """[B, T-1] of rows that predict as [B, T] of tokens."""
    return torch.nn.functional.pad(values, (1, 0))


# ---- golden numbers --------------------------------------------------------------------------------------------------
def test_tdpo(a):
    z, z0, _, _, labels = a
    z.requires_grad_()
    for version, losses, norm in ((1, [0.8657092, 0.8953639], 0.1163614), (2, [0.8602284, 0.8730566], 0.1106730)):
        found, metrics = tdpo(token_stats(z, z0, labels), beta=0.1, alpha=0.5, version=version)
        near(found, losses)
        (gradient,) = torch.autograd.grad(found.mean(), z)
        near(gradient.norm(), norm)
        near(metrics["rewards/chosen"], [0.0273665, 0.1183279])
        near(metrics["rewards/rejected"], [0.3470493, 0.4886676])
    with pytest.raises(InvalidValue, match="version"):
        tdpo(token_stats(z, z0, labels), version=3)


def test_sparsepo(a):
    z, z0, _, _, labels = a
    stats = token_stats(z, z0, labels)
    ones = torch.ones_like(stats.kl)
    near(sparsepo(stats, ones, ones, beta=0.1)[0], [0.8657092, 0.8953639])
    b, t = torch.meshgrid(torch.arange(4.0).double(), torch.arange(5.0).double(), indexing="ij")
    mask = torch.sin(b + 1.3 * t).relu()
    near((mask * stats.mask).sum(1), [1.4790596, 0.7457052, 0.7936677, 0.5784395], 3e-7)  # the spec's are fp32
    near(sparsepo(stats, mask, mask, beta=0.1)[0], [0.7677355, 0.7915548])
    near(sparsepo(stats, mask, mask, beta=0.1, l1_rewards=1e-3)[0], [0.7700082, 0.7928790])
    found, metrics = sparsepo(stats, mask, mask, l1_rewards=5e-4, l1_kl=5e-4)
    near(found, [0.7700082, 0.7928790])
    assert (metrics["mask/active"] < 1).all()


def test_rrpo_dpo_and_treg(a):
    z, z0, better, worse, labels = a
    stats = token_stats(z, z0, labels)
    ones = torch.ones_like(labels, dtype=torch.float64)
    near(weighted_dpo(stats, ones, beta=0.1)[0], [0.8547695, 0.8511005])
    near(rrpo(stats, labels * 0 + 1, alpha=0.0, beta=0.1)[0], [0.8547695, 0.8511005])
    of = lambda logits: token_stats(logits, None, labels).logp
    scores = behind(contrast_scores(of(better), of(worse)))
    near(scores[0, 2:], [-0.0387846, -0.3233440, 0.3304791, -0.2746916])
    found, metrics = treg(stats, scores, alpha=0.25, beta=0.1)
    near(found, [0.8230212, 0.8301199])
    near(metrics["regularizer"], [-0.1600760 - 0.0609283, -0.1155617 - 0.0308861])
    near(treg(stats, scores, alpha=0.0, beta=0.1)[0], [0.8547695, 0.8511005])
    near(treg(stats, scores, alpha=0.0, beta=2.0, simpo_margin=0.5)[0], simpo(stats, beta=2.0, gap=0.25)[0].detach())


def test_cdpo(a):
    z, z0, right, wrong, labels = a
    weights = critical_weights(right, wrong, labels, chunk=3).double()
    near(1 - weights[2, 2:], [0.0201510, 0.1687475, 0.0009720, 0.2183466])
    weights[:2] = 1
    near(weighted_dpo(token_stats(z, z0, labels), weights, beta=0.1)[0], [0.8333333, 0.8217938])


def test_aligndistil(a):
    z, _, dpo, swapped, labels = a
    # the golden numbers are with labels that were not shifted: each is put one place further, behind a row more
    longer = lambda x: torch.cat([x, x[:, :1]], 1)
    late = behind(labels)
    late[:, 0] = -100
    args = (longer(z), longer(dpo), longer(swapped), late)
    near(aligndistil(*args, strength=10.0)[0], [0.1368025, 0.1301321, 0.1356533, 0.1667822])
    near(aligndistil(*args, strength=10.0, teacher="adaptive")[0], [0.1161601, 0.1071681, 0.1047102, 0.1196244])
    tvd = torch.tensor([0.8721744, 0.8044277, 0.5554472, 1.2703825, 0.7713828, 0.5754109])
    weight = aligndistil(*args, strength=10.0)[1]["teacher_weight"]
    near(weight[0], float((10 * tvd[2:] + 1e-3).mean()), 1e-6)
    with pytest.raises(InvalidValue, match="teacher"):
        aligndistil(*args, teacher="none")


def test_rto(a):
    z, z0, dpo, _, labels = a
    stats, of_dpo = token_stats(z, z0, labels), token_stats(dpo, z0, labels)
    outcome = torch.tensor([1.5, -20.0, 3.0, 12.0], dtype=torch.float64)
    found = rto.shaped_rewards(of_dpo.logp, stats.ref_logp, stats.logp, stats.mask, outcome)
    near(found[0], [0, 0.0325864, -0.0588442, -0.0304435, 1.4660866])
    near(found[1, -1], -9.9676838)
    near(found[3, 3:], [9.9966271, 0])


def test_ift(a):
    z, _, _, _, labels = a
    stats = token_stats(z, None, labels)
    near(ifts.ift(stats.logp, stats.mask), [3.2784976, 2.6627140, 2.4633292, 2.8028943])
    # weights, as what the loss grows by with a token's own, once they are held
    logp = stats.logp.clone().requires_grad_()
    ifts.ift(logp, stats.mask, detach=True)[0].backward()
    near(-4 * logp.grad[0, 1:], [1.5553456, 0.9499831, 0.8109869, 0.6836843])
    near(ifts.ift(stats.logp, stats.mask, gamma=0.0), -(stats.logp.sum(1) / stats.mask.sum(1)))


def test_logo(a):
    rows = torch.tensor([[-0.5], [-0.9], [-1.2], [-1.0], [-0.8], [-1.4]], dtype=torch.float64).expand(6, 3)
    z, _, _, _, labels = a
    stats = token_stats(z.repeat(2, 1, 1)[:6, :4], None, (labels.repeat(2, 1)[:6, :4] * 0))
    stats = type(stats)(rows, stats.ref_logp, stats.kl, torch.ones_like(stats.mask))
    near(logo(stats, sft=0.0)[0], [0.1269280, math.log(2)])  # the spec's second is fp32: .6931469
    near(logo(stats, beta=2.0, gap=0.25, sft=0.0)[0], [0.4740770, 0.6443966])
    near(logo(stats)[0], [0.1269280 + 0.05, math.log(2) + 0.09])
    with pytest.raises(InvalidValue, match="rejected"):
        logo(stats, rejected=3)


def test_spo():
    chances = torch.tensor([0.5, 0.95, 0.7, 0.99, 0.6, 0.8, 0.85, 0.3, 0.92, 0.5])
    found = spo.chain_advantages(chances, {-1: 0.25, 2: 0.5, 6: 0.125}, 1.0)
    near(found, [0.25, 0, 0.25, 0, -0.375, -0.375, -0.375, 0.875, 0, 0.875])
    near(spo.chain_advantages(chances, {2: 0.5, 6: 0.125}, 1.0)[:4], [0, 0, 0, 0])
    assert spo.cut_points(chances, interval=2) == [-1, 3, 5, 8] and spo.cut_points(chances + 1) == []
    assert not spo.chain_advantages(chances, {}, 1.0).any()
    with pytest.raises(InvalidValue, match="Cuts"):
        spo.chain_advantages(chances, {10: 0.5}, 1.0)
    leaf = lambda i, score: spo.Node((i,), score=score)
    good, bad = (
        spo.Node((1, 2), (leaf(5, 1.0), leaf(6, 1.0))),
        spo.Node((3,), (leaf(7, 0.0), leaf(8, 0.0))),
    )
    root = spo.Node((), (good, bad))
    assert root.value == 0.5 and root.std == 0.5
    edges = spo.tree_edges(root)
    assert edges == [spo.Edge((), (1, 2), 0.5), spo.Edge((), (3,), -0.5)]
    assert spo.tree_edges(root, scale=True)[0].advantage == pytest.approx(0.99999998, abs=1e-9)
    mixed = spo.tree_edges(spo.Node((), (spo.Node((4,), (leaf(5, 1.0), leaf(6, 0.0))),)))
    assert mixed == [spo.Edge((4,), (5,), 0.5), spo.Edge((4,), (6,), -0.5)]
    ids, mask, gains = spo.in_rows([*edges, *mixed], prompt=[9, 9], pad=0)
    assert ids.tolist() == [[9, 9, 1, 2], [9, 9, 3, 0], [9, 9, 4, 5], [9, 9, 4, 6]]
    assert mask.sum(1).tolist() == [2, 1, 1, 1] and gains[2].tolist() == [0, 0, 0, 0.5]


TOOLS = {"search": ("query", "limit", "lang"), "open": ("url",)}
GOLD = {"name": "search", "arguments": {"query": "cat", "limit": "3"}}


@pytest.mark.parametrize(
    ("arguments", "reward"),
    [
        ({"query": "cat", "limit": "3"}, 1),
        ({"query": "dog", "limit": "3"}, -0.25),
        ({"query": "cat"}, -0.5),
        ({"query": "cat", "limit": "3", "lang": "en"}, -0.5),
        ({"query": "cat", "limit": "3", "foo": "1"}, -0.8),
        ({"query": "cat", "foo": "1"}, -1.3),
        ({"query": "cat", "limit": "3", "lang": "en", "foo": "1"}, -1.3),
        ({"query": "cat", "lang": "en"}, -1.0),
        ({"query": "cat", "foo": "1", "lang": "en"}, -1.8),
    ],
)
def test_rewards_of_tool_calls(arguments, reward):
    assert tl.tool_call_reward({"name": "search", "arguments": arguments}, GOLD, TOOLS) == reward


def test_tl_training():
    assert tl.tool_call_reward({"name": "open", "arguments": {}}, GOLD, TOOLS) == -1.5
    for call in (None, "search(", {"name": "shut", "arguments": {}}, {"name": "search"}):
        assert tl.tool_call_reward(call, GOLD, TOOLS) == -2
    logits = torch.sin(0.37 * torch.arange(40.0).double()).reshape(1, 8, 5)
    stats = token_stats(torch.cat([logits, logits[:, :1]], 1), None, behind(2 * torch.arange(8)[None] % 5))
    places = torch.arange(8)[None]
    weights = tl.key_weights(places == 1, (places == 5) | (places == 6), stats.mask)
    assert weights[0].tolist() == [1, 5, 1, 1, 1, 1, 1, 1]
    near(tl.weighted_nll(stats.logp, stats.mask, weights), [1.6733535])
    plain = tl.key_weights(places < 0, places < 0, stats.mask)
    assert (plain == 1).all()
    near(tl.weighted_nll(stats.logp, stats.mask, plain), [-stats.logp.mean().item()])
    assert tl.key_tokens([4, 5, 6], [[4, 5, 7], [8], [4, 5, 6, 9]]) == [0, 2]


# ---- identities and gradients ----------------------------------------------------------------------------------------
def preference_losses(stats):
    weights = torch.linspace(0.2, 1, stats.mask.numel() + len(stats.mask)).view(len(stats.mask), -1)
    masks = weights[:, 1:].flip(1)
    return {
        "tdpo1": tdpo(stats, version=1),
        "tdpo2": tdpo(stats, version=2),
        "sparsepo": sparsepo(stats, masks, masks),
        "weighted": weighted_dpo(stats, weights),
        "treg": treg(stats, weights - 0.6, alpha=0.0),
        "rrpo": rrpo(stats, weights > 0.5),
    }


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "sparsepo", "weighted", "treg", "rrpo"])
def test_equal_models_give_ln_2_and_gradients_point_the_right_way(name, a):
    _, z0, _, _, labels = a
    z = z0.clone().requires_grad_()
    losses, _ = preference_losses(token_stats(z, z0, labels))[name]
    near(losses, [math.log(2)] * 2)
    losses.sum().backward()
    of_target = z.grad[:, :-1].gather(2, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    real = labels[:, 1:] != -100
    assert (of_target[:2][real[:2]] <= 0).all() and (of_target[2:][real[2:]] >= 0).all() and of_target.any()
    assert not z.grad[:, :-1][~real].any() and not z.grad[:, -1].any()


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "sparsepo", "weighted", "treg", "rrpo"])
def test_pairs_do_not_know_of_each_other_nor_of_padding(name, a):
    z, z0, _, _, labels = a
    whole, _ = preference_losses(token_stats(z, z0, labels))[name]
    if name in ("tdpo1", "tdpo2"):  # others have weights by place
        swapped = [1, 0, 3, 2]
        near(preference_losses(token_stats(z[swapped], z0[swapped], labels[swapped]))[name][0], whole.flip(0).numpy())
        pad = lambda x, value: torch.cat([torch.full_like(x[:, :2], value), x], 1)
        near(preference_losses(token_stats(pad(z, 3.0), pad(z0, 1.0), pad(labels, -100)))[name][0], whole.numpy())
    else:
        z[:, 0] = z0[:, 0] = 7.0  # predicts nothing that is supervised
        near(preference_losses(token_stats(z, z0, labels))[name][0], whole.numpy())


def test_the_leash_of_tdpo_2_does_not_pull_at_chosen_answers(a):
    z, z0, _, _, labels = a
    z.requires_grad_()
    grad = lambda loss: torch.autograd.grad(loss.sum(), z)[0]
    free, strict = (grad(tdpo(token_stats(z, z0, labels), alpha=alpha)[0]) for alpha in (0.0, 5.0))
    parallel = lambda x, y: torch.nn.functional.cosine_similarity(x.flatten(1), y.flatten(1))
    assert (parallel(free, strict)[:2] > 1 - 1e-9).all() and (parallel(free, strict)[2:] < 0.999).all()


def test_statistics_without_a_reference(a):
    z, z0, _, _, labels = a
    z.requires_grad_()
    alone, both = token_stats(z, None, labels, chunk=3), token_stats(z, z0, labels)
    assert alone.logp.equal(both.logp) and not alone.kl.any() and not alone.ref_logp.any()
    weight = torch.randn_like(alone.logp)
    grads = [torch.autograd.grad((stats.logp * weight).sum(), z)[0] for stats in (alone, both)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("teacher", ["contrast", "adaptive", "fixed"])
def test_the_gradient_of_aligndistil(teacher, a):
    z, _, dpo, swapped, labels = a
    z.requires_grad_()
    found, _ = aligndistil(z, dpo, swapped, labels, teacher=teacher, strength=5.0, temperature=1.5, chunk=4)
    tvd = (dpo.softmax(-1) - swapped.softmax(-1)).abs().sum(-1, keepdim=True)
    w, c = 5 * tvd + 1e-3, 0.1 / (5 * tvd + 1e-3)
    if teacher == "fixed":
        w, c = torch.full_like(tvd, 0.02), torch.full_like(tvd, 5.0)
    target = dpo + w * (dpo - swapped) if teacher == "contrast" else w * dpo + (1 - w) * swapped
    p, q = z.log_softmax(-1), (target / 1.5).log_softmax(-1)
    kl = (c[..., 0] * (p.exp() * (p - q)).sum(-1))[:, :-1]
    real = labels[:, 1:] != -100
    wanted = (kl * real).sum(1) / real.sum(1)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad((loss * torch.arange(1.0, 5.0)).sum(), z)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*grads)
    same, _ = aligndistil(dpo, dpo, dpo, labels, teacher=teacher)
    near(same, [0] * 4)


def test_implicit_rewards_recover_a_known_optimum(a):
    z, z0, _, _, labels = a
    stats = token_stats(z, z0, labels)
    of_answer = values(stats, beta=0.3)[:, -1]
    near(of_answer, (0.3 * stats.margin.sum(1)).numpy())
    assert not token_rewards(token_stats(z0, z0, labels)).any()
    # two steps of two tokens, rewards at the end: the soft-optimal policy's log-ratios are Q - V over beta
    beta, reward = 0.5, torch.tensor([[1.0, 0.0], [0.25, -1.0]], dtype=torch.float64)
    v1 = beta * (reward / beta).exp().mean(1).log()  # under a uniform reference
    v0 = beta * (v1 / beta).exp().mean().log()
    logits = torch.zeros(4, 3, 2, dtype=torch.float64)
    rows = [(i, j) for i in range(2) for j in range(2)]
    for n, (i, _) in enumerate(rows):
        logits[n, 0], logits[n, 1] = v1 / beta, reward[i] / beta
    labels = torch.tensor([[-100, i, j] for i, j in rows])
    found = token_rewards(token_stats(logits, torch.zeros_like(logits), labels), beta=beta)
    near(found, [[(v1[i] - v0).item(), (reward[i, j] - v1[i]).item()] for i, j in rows])


def test_advantages_of_token_rewards():
    rewards = torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 1.0], [5.0, 5.0, 9.0], [1.0, 1.0, 1.0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 0], [1, 1, 1]])
    found = rto.advantages(rewards, mask, group=2, scale=False)
    near(found, [[0, 1, 0], [-1, -1, -1], [3.5, -1.5, 0], [-3.5, -4.5, -5.5]])
    scaled = rto.advantages(rewards, mask, group=2)
    near(scaled[0], [0, 1 / (math.sqrt(2) + 1e-4), 0])
    discounted = rto.advantages(rewards, mask, group=2, scale=False, gamma=0.5)
    near(discounted[0], [0, 2 - (2 + 0.25) / 2, 2 - (2 + 0.25) / 2])
    with pytest.raises(InvalidValue, match="groups of 3"):
        rto.advantages(rewards, mask, group=3)
    spread = rto.advantages(torch.ones(2, 3), torch.tensor([[0, 0, 0], [1, 1, 1]]), group=2)
    assert spread.isfinite().all() and not spread[0].any()


def test_critical_tokens():
    assert critical_token([60, 30, 0, 0, 2]) == 2
    assert critical_token([60, 0, 30, 0, 1]) == 3  # after the first none were right, and later many
    assert critical_token([60, 0, 3, 0]) == 1
    assert critical_token([60, 5, 1]) is None


def test_masks_of_sparsepo(a):
    torch.manual_seed(0)
    states = torch.randn(4, 6, 16)
    labels = a[-1]
    for kinds, same in (("common", True), ("independent", False)):
        head = MaskHead(16, kinds, dropout=0.0)
        of_rewards, of_kl = head(states)
        assert of_rewards.shape == (4, 6) and of_rewards.equal(of_kl) is same
        assert (of_rewards > 0).all() and (of_rewards - 1).abs().max() < 0.5
        of_rewards.sum().backward()
        assert head.row.weight.grad.any()
    found = activation_mask(states, labels)
    real = labels[:, 1:] != -100
    assert found.shape == (4, 5) and not found[~real].any()
    assert (found.amax(1) == 1).all() and (found.where(real, torch.ones(()))).amin(1).eq(0).all()
    assert activation_mask(torch.ones(4, 6, 16), labels).equal(real.float())


def test_ift_looks_ahead_and_mixes():
    logp = torch.tensor([[-1.0, -2.0, -4.0, -9.0]])
    mask = torch.tensor([[True, True, True, False]])
    ahead = torch.tensor([1 + 0.5 * (2 + 0.5 * 4), 2 + 0.5 * 4, 4.0])
    weights = 3 * ahead / ahead.sum()
    near(ifts.ift(logp, mask, gamma=0.5), [float((weights * torch.tensor([1.0, 2.0, 4.0])).sum() / 3)], 1e-6)
    embeddings, predicted = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    mixed = ifts.mixed_embeddings(embeddings, predicted, torch.tensor([[False, True, True]]), 0.2)
    near(mixed[0, :, 0], [0, 0.2, 0.2])
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]])
    assert ifts.shifted_predictions(logits, torch.tensor([[7, 7, 7]])).tolist() == [[7, 1, 0]]


def test_spread_positions():
    made = spread_positions([3, 2, 4], 100, torch.Generator().manual_seed(1))
    assert made[:3].tolist() == [0, 1, 2] and made[-4:].tolist() == [96, 97, 98, 99]
    assert made[4] == made[3] + 1 and (made.diff() > 0).all() and 3 <= made[3] <= 94
    assert spread_positions([2, 2], 4).tolist() == [0, 1, 2, 3] and spread_positions([2], 5).tolist() == [3, 4]
    with pytest.raises(InvalidValue, match="do not fit"):
        spread_positions([3, 3], 5)


def test_no_gradient_goes_through_the_weight_of_treg(a):
    z, z0, _, _, labels = a
    z.requires_grad_()
    stats, scores = token_stats(z, z0, labels), torch.sin(torch.arange(24.0).double()).view(4, 6) / 2
    found, _ = treg(stats, scores, alpha=20.0, beta=0.1)
    margins, pull = (x.sum(1).view(2, -1) for x in (0.1 * stats.margin, -0.1 * scores[:, 1:] * stats.logp))
    held = (margins[1] - margins[0]).sigmoid().tolist()
    wanted = -torch.nn.functional.logsigmoid(margins[0] - margins[1]) + 20 * torch.tensor(held) * pull.sum(0)
    near(found, wanted.detach().numpy(), 1e-6)
    grads = [torch.autograd.grad(loss.sum(), z, retain_graph=True)[0] for loss in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-7)

"""Contract 9 under FSDP (`fully_shard`): the losses, gradients and texts of a model that is whole."""

import pytest
import torch
import torch.distributed as dist
from contract import cells, decoder, example, matrix, noise, tiny, trains
from test_training import PROMPTS, SIZES, with_completion
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

import vtok


@pytest.fixture(scope="module")
def mesh():
    """One process is enough: what FSDP does to modules, their inputs and their parameters is the same."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def shard(model, mesh):
    for layer in decoder(model).layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")


ONE_A_STAGE = {tuple(p.stage for p in matrix()[cell.values]): cell.values for cell in cells("each", trains)}
ORDERS = [(*cell, "patch first") for cell in ONE_A_STAGE.values()] + [
    ("qwen2_5_vl", "divprune", "shard first"),
    ("llava_next", "fastv", "shard first"),
]


@pytest.mark.parametrize(("family", "method", "order"), ORDERS)
def test_a_sharded_model(mesh, family, method, order):
    whole, processor = tiny(family)
    sharded, _ = tiny(family)
    inputs = noise(processor, PROMPTS, SIZES, label=method)
    full, labels = with_completion(inputs, torch.tensor([[40, 50, 60]]).repeat(4, 1))
    vtok.patch(whole, example(whole, method))
    if order == "patch first":
        vtok.patch(sharded, example(sharded, method))
        shard(sharded, mesh)
    else:
        shard(sharded, mesh)
        vtok.patch(sharded, example(sharded, method))
    assert isinstance(decoder(sharded).layers[0], FSDPModule)

    losses = [model(**full, labels=labels).loss for model in (whole, sharded)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    ours = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
    theirs = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys() and any("layers.3" in name for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
    texts = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (whole, sharded)]
    assert torch.equal(*texts)
    for model in (whole, sharded):  # and not whenever they are collected: tests look at what patches leave behind
        vtok.unpatch(model)


def test_what_works_on_the_weights_of_neurons_is_patched_first(mesh):
    model, _ = tiny("qwen3_vl")
    shard(model, mesh)
    with pytest.raises(vtok.errors.Unsupported, match="before it is sharded"):
        vtok.patch(model, "corematching")

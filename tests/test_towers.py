"""`vtok.rl.encode_once`: what a frozen tower says of a picture or clip is remembered."""

import pytest
import torch
from contract import tiny
from torch import nn

import vtok
from vtok.errors import InvalidValue, Unsupported

GRIDS = torch.tensor([[2, 4, 4], [1, 8, 4], [2, 4, 4], [3, 4, 8]])


@pytest.fixture(params=["qwen2_5_vl", "qwen3_vl"])
def seen(request):
    """A frozen tower, what it encodes without remembering, and the sizes of the calls that reach it."""
    model, _ = tiny(request.param)
    tower, sizes = model.model.visual.eval().requires_grad_(False), []
    encode = tower.forward

    def counted(pixels, grid_thw, **how):
        sizes.append(len(grid_thw))
        return encode(pixels, grid_thw=grid_thw, **how)

    tower.forward = counted
    return tower, encode, sizes


def ask(tower, *which):
    width = tower.patch_embed.proj.weight[0].numel()
    drawn = [torch.randn(int(GRIDS[i].prod()), width, generator=torch.Generator().manual_seed(i)) for i in which]
    return torch.cat(drawn), GRIDS[list(which)]


def same(found, expected):
    assert type(found) is type(expected) and found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)


def test_each_is_encoded_once_and_the_oldest_forgotten(seen):
    tower, encode, sizes = seen
    vtok.rl.encode_once(tower, clips=2)
    for which in [(0, 0, 1, 1), (1, 0), (2, 0, 2), (3, 1)]:  # 1, last seen before 0, is forgotten for 2
        pixels, grid = ask(tower, *which)
        same(tower(pixels, grid_thw=grid), encode(pixels, grid_thw=grid))
    assert sizes == [2, 1, 2]


def test_pixels_alike_in_another_grid_are_another_picture(seen):
    tower, encode, sizes = seen
    vtok.rl.encode_once(tower)
    pixels, _ = ask(tower, 1)
    for grid in (GRIDS[1:2], GRIDS[1:2, [0, 2, 1]]):
        same(tower(pixels, grid_thw=grid), encode(pixels, grid_thw=grid))
    assert sizes == [1, 1]


def test_what_a_rollout_saw_can_be_trained_behind(seen):
    tower, _, sizes = seen
    vtok.rl.encode_once(tower)
    pixels, grid = ask(tower, 0, 1)
    with torch.inference_mode():
        tower(pixels, grid_thw=grid)
    scale = nn.Parameter(torch.ones(()))
    (tower(pixels, grid_thw=grid).pooler_output * scale).sum().backward()
    assert scale.grad is not None and sizes == [2]


def test_hooks_inside_the_tower_see_every_call(seen):
    tower, _, sizes = seen
    undo, said = vtok.rl.encode_once(tower), []
    pixels, grid = ask(tower, 0)
    tower(pixels, grid_thw=grid)
    hook = tower.blocks[0].register_forward_hook(lambda *_: said.append(1))
    for _ in range(2):
        tower(pixels, grid_thw=grid)
    hook.remove()
    tower(pixels, grid_thw=grid)
    assert sizes == [1, 1, 1] and len(said) == 2
    undo()
    tower(pixels, grid_thw=grid)
    assert sizes == [1] * 4


def test_a_tower_that_is_trained_or_takes_no_grids_is_refused(seen):
    tower, _, _ = seen
    with pytest.raises(InvalidValue, match="clips"):
        vtok.rl.encode_once(tower, clips=0)
    with pytest.raises(InvalidValue, match="trained"):
        vtok.rl.encode_once(tower.requires_grad_(True))
    with pytest.raises(Unsupported, match="no grids"):
        vtok.rl.encode_once(tiny("llava")[0].model.vision_tower)


def test_towers_of_the_same_weights_share_what_they_know(seen):
    tower, encode, sizes = seen
    known, (pixels, grid) = {}, ask(tower, 0, 1)
    vtok.rl.encode_once(tower, known=known)
    same(tower(pixels, grid_thw=grid), encode(pixels, grid_thw=grid))
    tower.forward = lambda pixels, grid_thw: pytest.fail("encoded again")
    vtok.rl.encode_once(tower, known=known)
    same(tower(pixels, grid_thw=grid), encode(pixels, grid_thw=grid))
    assert sizes == [2] and len(known) == 2

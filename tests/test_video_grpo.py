"""The example of GRPO on clips, and the page of trainers: what is theirs alone."""

import importlib.util
from pathlib import Path

import pytest
import torch
from contract import tiny

pytest.importorskip("trl")


def example():
    file = Path(__file__).parents[1] / "examples" / "video_grpo.py"
    spec = importlib.util.spec_from_file_location("video_grpo", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_frozen_tower_encodes_a_clip_once():
    model, _ = tiny("qwen2_5_vl")
    tower = model.model.visual.eval().requires_grad_(False)
    width = tower.patch_embed.proj.weight[0].numel()
    grids = torch.tensor([[2, 4, 4], [1, 8, 4], [2, 4, 4], [3, 4, 8]])
    clips = [
        torch.randn(int(grid.prod()), width, generator=torch.Generator().manual_seed(i)) for i, grid in enumerate(grids)
    ]
    encode, sizes = tower.forward, []

    def ask(*which):
        return torch.cat([clips[i] for i in which]), grids[list(which)]

    def counted(pixels, grid_thw, **how):
        sizes.append(len(grid_thw))
        return encode(pixels, grid_thw=grid_thw, **how)

    tower.forward = counted
    example().encoded_once(tower, 2)
    asked = [(0, 0, 1, 1), (1, 0), (2, 0, 2), (3, 0)]  # 0, the oldest, is forgotten for 2
    for which in asked:
        pixels, grid = ask(*which)
        expected, found = encode(pixels, grid_thw=grid), tower(pixels, grid_thw=grid)
        for name in ("last_hidden_state", "pooler_output"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-4)
    assert sizes == [2, 1, 2]


def test_a_method_that_is_farther_than_dense_is_named():
    from recipes.trainers import HALF, _against_dense

    dense = [0.05 + 0.001 * i for i in range(10)]
    rows = {"dense a": dense, "like": [x + 0.0005 for x in dense], "far": [x + 0.02 for x in dense]}
    said = _against_dense({name: {"family": "a", HALF: values} for name, values in rows.items()})
    assert "`far`" in said and "`like`" not in said and "2 methods" in said

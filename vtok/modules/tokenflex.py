"""TokenFLEX (arXiv 2504.03154): one projector whose number of visual tokens is chosen at each call.

The encoder's patch grid is resized to a multiple of the wanted grid, averaged in equal cells, and put through a gated
MLP; no weight depends on the number of tokens. Training draws that number anew in each step, so that one model serves
all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtok.errors import InvalidValue

# The released weights' names (Ristretto-3B, the module under "projector.mlp"), and ours.
RELEASED = {"layernorm": "norm", "f1": "gate", "f2": "up", "g": "down"}
POOLS = ("resize", "adaptive")


def pool_grid(x: Tensor, grid: tuple[int, int], pool: str = "resize") -> Tensor:
    """[B, H, W, C] -> [B, h, w, C] for grid = (h, w), in fp32.

    pool: "resize" makes each axis a multiple of the target bilinearly (corners aligned) and averages equal cells, as
    the released weights expect; a target above the axis is reached by resizing alone. "adaptive" averages cells whose
    sizes differ by one and may overlap, as the paper's text says.
    """
    x = x.float().permute(0, 3, 1, 2)  # [B, C, H, W]
    if pool == "adaptive":
        return F.adaptive_avg_pool2d(x, grid).permute(0, 2, 3, 1)
    size = tuple(-(-side // target) * target for side, target in zip(x.shape[-2:], grid))
    if size != tuple(x.shape[-2:]):
        x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    cells = tuple(side // target for side, target in zip(size, grid))
    return F.avg_pool2d(x, cells, cells).permute(0, 2, 3, 1)


def square_side(tokens: int) -> int:
    """The side of a square grid of so many tokens. Raises `InvalidValue` where there is none."""
    whole = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 1
    if not whole or math.isqrt(tokens) ** 2 != tokens:
        raise InvalidValue(f"A number of tokens a view must be a perfect square, such as 16 or 144, got {tokens!r}")
    return math.isqrt(tokens)


class TokenFlexProjector(nn.Module):
    """Patch features [B, H, W, in_dim] -> visual tokens [B, h, w, out_dim] for any grid (h, w).

    y = down(silu(gate(z)) * up(z)) with z the layer norm of the pooled features; gate, up: in_dim -> mult * in_dim.
    """

    def __init__(self, in_dim: int, out_dim: int, mult: int = 3, pool: str = "resize") -> None:
        super().__init__()
        if pool not in POOLS:
            raise InvalidValue(f"pool must be one of {POOLS}, got {pool!r}")
        self.pool = pool
        self.norm = nn.LayerNorm(in_dim)
        self.gate = nn.Linear(in_dim, mult * in_dim)
        self.up = nn.Linear(in_dim, mult * in_dim)
        self.down = nn.Linear(mult * in_dim, out_dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        z = self.norm(pool_grid(x, grid, self.pool).to(self.norm.weight.dtype))
        return self.down(F.silu(self.gate(z)) * self.up(z))

    @classmethod
    def load(cls, file: str | Path) -> TokenFlexProjector:
        """From a safetensors file: our names, or the released weights' under any prefix. All else in the file is left
        alone. Sizes are read from the weights. Raises `InvalidValue` where it is no such projector."""
        from safetensors import safe_open

        if not Path(file).is_file():
            raise InvalidValue(f"There is no file {str(file)!r}.")
        wanted = {f"{name}.{kind}" for name in RELEASED.values() for kind in ("weight", "bias")}
        found: dict[str, Tensor] = {}
        with safe_open(str(file), "pt") as weights:
            pool = (weights.metadata() or {}).get("pool", "resize")
            for key in weights.keys():  # noqa: SIM118 - no mapping
                module, _, kind = key.rpartition(".")
                prefix, _, last = module.rpartition(".")
                name = f"{RELEASED.get(last, last)}.{kind}"
                if name in wanted and (not prefix or prefix.split(".")[-1] == "mlp"):
                    found[name] = weights.get_tensor(key)
        if missing := sorted(wanted - found.keys()):
            raise InvalidValue(f"{str(file)!r} holds no TokenFLEX projector: {', '.join(missing)} not found.")
        hidden, in_dim = found["gate.weight"].shape
        module = cls(in_dim, found["down.weight"].shape[0], hidden // in_dim, pool)
        module.load_state_dict(found)
        return module.to(found["gate.weight"].dtype)

    def save(self, file: str | Path) -> None:
        """Write a safetensors file that `load` reads."""
        from safetensors.torch import save_file

        state = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(state, str(file), metadata={"pool": self.pool})


class TokenSampler:
    """Draws the number of tokens of each training step: the same on every process, and after a resume.

    counts, probabilities: the paper's are (64, 144, 256) and (0.2, 0.3, 0.5) for a view of 27 x 27 patches.
    The draw of a step is a function of seed and step alone, so nothing has to be sent between processes.
    """

    def __init__(self, counts: Sequence[int], probabilities: Sequence[float], seed: int = 0) -> None:
        if len(counts) != len(probabilities) or not counts:
            raise InvalidValue(f"{len(counts)} token counts go with as many probabilities, got {len(probabilities)}.")
        for count in counts:
            square_side(count)
        if any(p < 0 for p in probabilities) or not math.isclose(sum(probabilities), 1.0, abs_tol=1e-6):
            raise InvalidValue(f"Probabilities must be at least 0 and add up to 1, got {tuple(probabilities)}.")
        self.counts, self.probabilities, self.seed = tuple(counts), tuple(probabilities), seed

    def at(self, step: int) -> int:
        """Tokens a view in a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        draw = torch.rand(32, generator=generator, dtype=torch.float64)[-1].item()  # the first of near seeds are alike
        edges = torch.tensor(self.probabilities, dtype=torch.float64).cumsum(0)
        return self.counts[min(int((draw >= edges).sum()), len(self.counts) - 1)]

    @property
    def mean(self) -> float:
        """Expected tokens a view."""
        return sum(c * p for c, p in zip(self.counts, self.probabilities))

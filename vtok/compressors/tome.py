"""ToMe: similar tokens are merged inside the vision encoder, between the attention and the MLP of each block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtok.errors import InvalidValue
from vtok.kernels.bipartite_match import bipartite_match
from vtok.kernels.merge import merge as merge_groups
from vtok.options import AtLeast0, Keep
from vtok.stages.blocks import Block, Blocks
from vtok.types import keep_count, ranks, share


@dataclass(frozen=True, kw_only=True)
class ToMe(Blocks):
    """In each block, the `r` tokens whose keys are most like another's are merged into those (Section 3).

    r: tokens merged in each block, of each view; one number, or one a block. Never more than half of a view's patches
        at once. 8 if neither `r` nor `keep` is given.
    keep: instead of `r`: fraction or count of a view's patches that are left after the last block that matters.
    decreasing: as many in all, but 2r in the first block and linearly fewer down to none in the last (Appendix).
    proportional: a token that stands for s patches attends as s tokens would: log s is added to its logits (Eq. 1).
    official: `decreasing` as the released code has it, which cuts each block's part of the falling line to a whole
        number, so that fewer are merged in all: 91 instead of 96 for r=8 and 12 blocks.
    carry: of each merged group one token enters the language model, at the place of the group's first patch. Else each
        patch gets its group's feature back, so that nothing changes for what comes after the encoder.
    Class and register tokens are never merged. Merged tokens are the mean of the patches that they stand for.
    Differs from the paper: tokens have their full number between blocks (a group's tokens are then equal), so that
    heads, poolers and whoever reads a block's output find what they expect; the mean is taken in fp32.
    """

    name = "tome"
    needs = frozenset({"token_blocks"})
    paper = "Token Merging: Your ViT But Faster, arXiv 2210.09461"
    merges = True
    budgeted = {"carry": True}
    hints = {
        "token_blocks": "It acts in the blocks of CLIP, SigLIP, timm and open_clip towers.",
        "token_per_patch": "With carry=False each patch gets its group's feature, which works here too.",
    }
    examples = ({"r": 3}, {"keep": 0.6, "carry": True})

    keep: Keep | None = None
    r: AtLeast0 | tuple[AtLeast0, ...] | None = None
    decreasing: bool = False
    proportional: bool = True
    official: bool = False
    carry: bool = False

    def __post_init__(self) -> None:
        if self.keep is not None and self.r is not None:
            raise InvalidValue("Give r or keep, not both.")
        if isinstance(self.r, list):
            object.__setattr__(self, "r", tuple(self.r))
        if self.keep is None and self.r is None:
            object.__setattr__(self, "r", 8)
        super().__post_init__()
        if self.r == ():
            raise InvalidValue("r must have a number for each block, got ()")
        if self.decreasing and isinstance(self.r, tuple):
            raise InvalidValue("decreasing goes with one number for r; a tuple says for itself what each block merges.")

    @property
    def masks(self) -> bool:
        return self.proportional

    @property
    def scatters(self) -> bool:
        return self.carry

    @property
    def needs_now(self) -> frozenset[str]:
        return self.needs | {"token_per_patch"} if self.carry else self.needs

    @property
    def is_identity(self) -> bool:
        if self.keep is not None:
            return isinstance(self.keep, float) and self.keep == 1.0
        return not any(self.r) if isinstance(self.r, tuple) else self.r == 0

    def with_budget(self, budget: float, n_layers: int) -> ToMe:
        """A budget counts tokens in the language model, so it has a meaning where they are carried there."""
        if not self.carry:
            raise InvalidValue("tome hands all tokens on to the language model, so it has no budget: set carry=True.")
        return replace(self, r=None, keep=float(budget))

    def merged_at(self, n_blocks: int, patches: int) -> list[int]:
        """How many of a view's `patches` tokens each of `n_blocks` blocks merges away."""
        if isinstance(self.r, tuple) and len(self.r) != n_blocks:
            raise InvalidValue(f"r has {len(self.r)} entries, but {n_blocks} blocks of this tower matter.")
        end = keep_count(patches, self.keep) if self.r is None else 0
        if isinstance(self.r, tuple):
            wanted = list(self.r)
        else:
            falling = self.decreasing and n_blocks > 1
            weights = range(n_blocks - 1, -1, -1) if falling else [1] * n_blocks
            whole = patches - end if self.r is None else self.r * n_blocks
            first = int(2 * whole / n_blocks)
            wanted = share(whole, weights)
            if self.official and falling:  # in its floating-point numbers
                wanted = [int(first - first / (n_blocks - 1) * i) for i in range(n_blocks)]
        merged, left = [], patches
        for i, n in enumerate(wanted):
            if (
                end
            ):  # `keep` speaks of the end, which the blocks behind must be able to reach by halving; `r` of each block
                n = left - min(patches - sum(wanted[: i + 1]), end << (n_blocks - 1 - i))
            merged.append(max(0, min(n, left // 2)))
            left -= merged[-1]
        return merged

    def group(self, block: Block) -> tuple[Tensor, int] | None:
        r = self.merged_at(block.n_blocks, block.patches)[block.index]
        if r == 0:
            return None
        return match(block.key, r, block.protected), block.key.shape[1] - r

    def merge(self, x: Tensor, size: Tensor, group: Tensor, n: int) -> Tensor:
        return merge(x, size, group, n)

    def bias(self, size: Tensor) -> Tensor | None:
        return size.log() if self.proportional else None


def match(key: Tensor, r: int, protected: int = 0) -> Tensor:
    """Bipartite soft matching: the even tokens choose their most similar odd token, and the best `r` are merged.

    key: [B, N, C], compared by cosine; the first `protected` tokens neither merge nor are merged into.
    0 <= r <= (N - protected) // 2. Returns [B, N] long, the row of each token among the N - r: the protected ones, the
    even ones that are left, the odd ones. Ties go to the lower index.
    """
    batch, n = key.shape[:2]
    source, target = bipartite_match(key, r, protected)  # [B, r]
    place = torch.arange(n, device=key.device)
    part = torch.where(place < protected, 0, 1 + place % 2).expand(batch, n).scatter(1, source, 3)
    row = ranks(-part)  # as tokens come out, the merged ones last
    return row.scatter(1, source, row.gather(1, target))


def merge(x: Tensor, size: Tensor, group: Tensor, n: int) -> Tensor:
    """Mean of x [B, N, D] over the members of each `group` [B, N], weighted by `size` [B, N] fp32. [B, n, D]."""
    return merge_groups(x, group, n, size)[0]

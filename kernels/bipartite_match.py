"""Match the even tokens of a sequence to their most similar odd tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from vtok.kernels.dispatch import dispatch, operation

BLOCK = 2048  # rows of the similarity matrix that exist at once in torch; in Triton none do


@torch.no_grad()
def bipartite_match(metric: Tensor, r: int, protected: int = 0, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The `r` even tokens that are most similar to some odd token, and which (AIM, arXiv 2412.03248, after ToMe).

    metric: [B, t, C], any float dtype; compared by cosine in fp32, also under autocast. The first `protected` tokens
    (class, registers) take no part. 0 <= r <= (t - protected) // 2.
    backend: "auto", "torch" or "triton", see `dispatch`.
    Returns source [B, r] (tokens of the even set, most similar first) and target [B, r] (tokens of the odd set), as
    indices into the t tokens. Ties go to the lower index. The cosine with a zero vector is 0; NaN counts as 0.
    """
    if r == 0:
        return (torch.empty(metric.shape[0], 0, dtype=torch.long, device=metric.device),) * 2
    skip_even, skip_odd = (protected + 1) // 2, protected // 2
    value, partner = dispatch(best_partners, backend, metric.detach(), skip_even, skip_odd)
    source = value.argsort(dim=1, descending=True, stable=True)[:, :r]  # [B, r]
    return 2 * (source + skip_even), partner.gather(1, source)


def _shapes(metric: Tensor, skip_even: int, skip_odd: int) -> tuple[Tensor, Tensor]:
    value = metric.new_empty(metric.shape[0], (metric.shape[1] + 1) // 2 - skip_even, dtype=torch.float32)
    return value, torch.empty_like(value, dtype=torch.long)


@operation(_shapes)
def best_partners(metric: Tensor, skip_even: int, skip_odd: int) -> tuple[Tensor, Tensor]:
    """Of each even token [B, a] the highest cosine with an odd one, and that one's index among the t tokens.

    metric: [B, t, C]. The first `skip_even` even and `skip_odd` odd tokens take no part; of either set one is left.
    """
    unit = metric.float()
    unit = (unit / unit.norm(dim=-1, keepdim=True).clamp(min=1e-12)).nan_to_num(0.0)
    even, odd = unit[:, ::2][:, skip_even:], unit[:, 1::2][:, skip_odd:].transpose(1, 2)  # [B, a, C], [B, C, b]
    with torch.autocast(metric.device.type, enabled=False):
        best = [(even[:, i : i + BLOCK] @ odd).max(-1) for i in range(0, even.shape[1], BLOCK)]
    value, partner = torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1)
    return value, 2 * (partner + skip_odd) + 1

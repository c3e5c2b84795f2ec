"""SparsePO: which tokens count is learnt, from what the reference sees in them (https://arxiv.org/abs/2410.05102)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vtok.errors import InvalidValue
from vtok.text.align.stats import IGNORE, TokenStats, by_answer
from vtok.text.align.weighted import told


def sparsepo(
    stats: TokenStats,
    of_rewards: Tensor,
    of_kl: Tensor,
    *,
    beta: float = 0.1,
    l1_rewards: float = 0.0,
    l1_kl: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, [B], and what to log of it, detached.

    stats: of 2B rows, the chosen answers and then the rejected ones. of_rewards, of_kl: [2B, T-1] masks >= 0 of the
    rows that predict tokens. l1_rewards, l1_kl: weights of their sums over both answers.

    TDPO 1 with masks: u = sum of mask margin, chosen less rejected; d = sum of mask KL, rejected less chosen;
    -log sigmoid(beta (u - d)) + L1. Masks of 1 are TDPO 1. Beside what all log: `mask/active`, the share of tokens
    whose mask of rewards is above 0.01. Raises `InvalidValue`."""
    (u_w, u_l), (d_w, d_l) = by_answer(stats, of_rewards * stats.margin), by_answer(stats, of_kl * stats.kl)
    losses = -F.logsigmoid(beta * (u_w - u_l - (d_l - d_w)))
    losses = losses + l1_rewards * sum(by_answer(stats, of_rewards)) + l1_kl * sum(by_answer(stats, of_kl))
    metrics = told(stats, beta * (u_w + d_w), beta * (u_l + d_l))
    active = sum(by_answer(stats, (of_rewards > 0.01).to(stats.kl.dtype)))
    metrics["mask/active"] = (active / sum(by_answer(stats, stats.mask.to(stats.kl.dtype))).clamp(min=1)).detach()
    return losses, metrics


class MaskHead(nn.Module):
    """A mask >= 0 for each token from the reference's last hidden state: LayerNorm, one linear row, softplus.

    The paper has a ReLU head on each layer. Softplus cannot die, which those did where all masks were 0 at first, and
    one layer needs no other forward. It begins at masks near 1, where SparsePO is TDPO 1.

    hidden: the model's width. kinds: "common", one mask for rewards and KL, or "independent", one each."""

    def __init__(self, hidden: int, kinds: str = "common", dropout: float = 0.01) -> None:
        super().__init__()
        if kinds not in ("common", "independent"):
            raise InvalidValue(f'kinds is "common" or "independent", not {kinds!r}.')
        self.norm, self.drop = nn.LayerNorm(hidden), nn.Dropout(dropout)
        self.row = nn.Linear(hidden, 1 if kinds == "common" else 2)
        nn.init.normal_(self.row.weight, std=hidden**-0.5 / 10)
        nn.init.constant_(self.row.bias, 0.5413)  # softplus of it is 1

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """states: [B, T, hidden] of the rows that predict. Gives the masks [B, T] of rewards and of the KL."""
        masks = self.drop(F.softplus(self.row(self.norm(states.to(self.row.weight.dtype)))))
        return masks[..., 0], masks[..., -1]


def activation_mask(states: Tensor, labels: Tensor) -> Tensor:
    """[B, T-1] masks in [0, 1] with nothing learnt (the paper's MaPO), of the rows that predict.

    states: [B, T, hidden] of the reference. labels: [B, T], -100 where nothing is supervised. A token's activation is
    the mean of its squares; of each answer the least is 0 and the largest 1. Where all are alike, so are masks: 1."""
    size = states[:, :-1].float().square().mean(-1)
    real = labels[:, 1:] != IGNORE
    low = size.masked_fill(~real, float("inf")).amin(1, keepdim=True)
    high = size.masked_fill(~real, -float("inf")).amax(1, keepdim=True)
    scaled = ((size - low) / (high - low)).where(high > low, size.new_ones(()))
    return scaled.masked_fill(~real, 0)

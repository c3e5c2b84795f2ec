"""Laws of scaling: how many visual tokens to spend (below), and the step size of a pretraining (`steplaw`).

The inference-optimal scaling law of vision-language models (arXiv 2411.03312):

    error(N, T) = a * N^-alpha * T^-beta + d

N is the size of the language model in billions of parameters, T the visual tokens of a picture, error the mean over
tasks of 1 - accuracy. A prompt with Q text tokens costs 2 * N * (Q + T) operations, so that a smaller model can afford
more tokens and the law says which is better.

What it does not say: it was fitted to one model family (Qwen1.5, 0.5 to 7 billion), one encoder, T from 1 to 576 and
nine tasks of perception and reasoning; it holds where size buys more than tokens, alpha > beta. Where the text in the
picture has to be read it is the other way round: tokens buy more than size, and `optimal_tokens` refuses.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.errors import InvalidValue

ALPHA, BETA = 0.077, 0.015  # the exponents of the paper; it gives neither a nor d
TOKENS = (1, 4, 16, 36, 64, 144, 576)
ACCURACY = {  # mean accuracy over the tasks: billions of parameters -> at TOKENS, as published with the paper's code
    0.5: (0.3855, 0.3917, 0.4078, 0.4133, 0.4151, 0.4244, 0.4320),
    1.8: (0.4333, 0.4519, 0.4528, 0.4597, 0.4609, 0.4758, 0.4808),
    4.0: (0.4630, 0.4692, 0.4858, 0.4916, 0.5023, 0.5092, 0.5185),
    7.0: (0.4810, 0.4971, 0.5050, 0.5141, 0.5172, 0.5238, 0.5354),
}
PUBLISHED = tuple((n, t, 1 - y) for n, row in ACCURACY.items() for t, y in zip(TOKENS, row))  # (N, T, error)
STEPLAW_SIZES, STEPLAW_TOKENS = (6e7, 1e10), (2e9, 1e12)  # beyond which `steplaw` is extrapolation
log = logging.getLogger(__name__)
METHODS = ("least_squares", "grid")


@dataclass(frozen=True)
class Law:
    """error = a * N^-alpha * T^-beta + d, and the sum of squared errors of its fit, if it was fitted."""

    a: float
    alpha: float
    beta: float
    d: float
    sse: float | None = None

    def predict(self, size: float | Tensor, tokens: float | Tensor) -> float | Tensor:
        """The error of a model of `size` billions of parameters that sees `tokens` visual tokens; both above 0.

        Numbers or tensors that broadcast. Sizes outside 0.5 to 14 and tokens outside 1 to 576 are extrapolation."""
        for name, value in (("size", size), ("tokens", tokens)):
            if not bool(torch.as_tensor(value > 0).all()):
                raise InvalidValue(f"{name} must be above 0, got {value!r}")
        return self.a * size**-self.alpha * tokens**-self.beta + self.d

    def optimal_tokens(self, text_tokens: float) -> float:
        """See `optimal_tokens`, with this law's exponents."""
        return optimal_tokens(text_tokens, self.alpha, self.beta)

    def optimum(self, flops: float, text_tokens: float) -> tuple[float, float]:
        """(size in billions, visual tokens) of the least error at which a prompt costs `flops` operations."""
        _positive("flops", flops)
        tokens = self.optimal_tokens(text_tokens)
        return flops / (2e9 * (text_tokens + tokens)), tokens

    def best(self, flops: float, text_tokens: float, sizes: Iterable[float]) -> tuple[float, int]:
        """(size, visual tokens) of the least error among models that there are, each given all tokens it can afford.

        sizes: in billions. Ties go to the smaller. Raises `InvalidValue` where none can afford one visual token."""
        _positive("flops", flops)
        _positive("text_tokens", text_tokens, zero=True)
        affordable = {n: math.floor(flops / (2e9 * n) - text_tokens + 1e-9) for n in sorted(sizes)}
        choices = [(self.predict(n, t), n, t) for n, t in affordable.items() if t >= 1]
        if not choices:
            raise InvalidValue(f"{flops:g} operations are not enough for {text_tokens} text tokens and a visual one.")
        _, size, tokens = min(choices)
        return size, tokens


def optimal_tokens(text_tokens: float, alpha: float = ALPHA, beta: float = BETA) -> float:
    """V, the visual tokens of the least error at any fixed cost 2 N (Q + V): beta Q / (alpha - beta), at least 1.

    text_tokens: Q >= 0, of prompt and answer. The budget has no say in V, only in the size of the model. Raises
    `InvalidValue` where beta >= alpha: there is no optimum then, since more tokens always buy more than more size."""
    _positive("text_tokens", text_tokens, zero=True)
    _positive("alpha", alpha)
    _positive("beta", beta, zero=True)
    if beta >= alpha:
        raise InvalidValue(
            f"With beta = {beta:g} and alpha = {alpha:g} tokens buy more than size, as in reading text: every "
            f"token at the cost of size lowers the error, so there is no best number. Keep as many as you can."
        )
    return max(1.0, beta * text_tokens / (alpha - beta))


def fit(points: Iterable[tuple[float, float, float]] = PUBLISHED, method: str = "least_squares") -> Law:
    """Fit the law to (size in billions, visual tokens, error) by squared error; at least 4 points.

    "least_squares": the best a >= 0, alpha and beta in [0, 2] and d >= 0. For each pair of exponents the best a and d
        are a line's, so that only the exponents are searched, on a grid that closes in.
    "grid": the best of the 5 million points of the official code's grid, which looks at a random fifth of them.
    """
    rows = torch.tensor([tuple(point) for point in points], dtype=torch.float64)
    if rows.ndim != 2 or rows.shape[1] != 3 or len(rows) < 4:
        raise InvalidValue(f"The law has 4 parameters: give at least 4 points (size, tokens, error), got {len(rows)}.")
    if not bool((rows[:, :2] > 0).all() and rows.isfinite().all()):
        raise InvalidValue("Sizes and tokens must be above 0 and everything finite.")
    if method not in METHODS:
        raise InvalidValue(f"method must be one of {METHODS}, got {method!r}")
    return (_least_squares if method == "least_squares" else _grid)(rows)


@dataclass(frozen=True)
class Step:
    """lr: the peak learning rate. batch_tokens: tokens of a batch."""

    lr: float
    batch_tokens: float


def steplaw(n_params: float, tokens: float) -> Step:
    """Learning rate and batch of a pretraining by the Step Law (arXiv 2503.04715).

    n_params: N, without embeddings. tokens: D, seen in the whole training. lr = 1.79 N^-0.713 D^0.307 and
    batch = 0.58 D^0.571 tokens, for AdamW with a warmup and a cosine down to a fixed 1e-5, not to a tenth of the peak.

    For pretraining from random weights alone: not for fine-tuning, LoRA or projectors, whose best steps depend on what
    is there. Warns below 60 million parameters, above 10 billion, and outside of 2 billion to a trillion tokens. Raises
    `InvalidValue` for numbers that are not above 0."""
    _positive("n_params", n_params)
    _positive("tokens", tokens)
    for name, value, (low, high) in (
        ("parameters", n_params, STEPLAW_SIZES),
        ("tokens", tokens, STEPLAW_TOKENS),
    ):
        if not low <= value <= high:
            log.warning("The Step Law was fitted from %g to %g %s: %g is extrapolation.", low, high, name, value)
    return Step(1.79 * n_params**-0.713 * tokens**0.307, 0.58 * tokens**0.571)


def _basis(rows: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """[alphas, betas, points] N^-alpha T^-beta."""
    return torch.exp(-alpha[:, None, None] * rows[:, 0].log() - beta[:, None] * rows[:, 1].log())


def _least_squares(rows: Tensor) -> Law:
    y, n = rows[:, 2], len(rows)
    low, high = torch.zeros(2, dtype=torch.float64), torch.full((2,), 2.0, dtype=torch.float64)
    steps = torch.linspace(0, 1, 41, dtype=torch.float64)
    for _ in range(40):
        alpha, beta = (low[i] + (high[i] - low[i]) * steps for i in (0, 1))
        x = _basis(rows, alpha, beta)
        off = x - x.mean(-1, keepdim=True)
        spread = off.square().sum(-1)
        slope = torch.where(spread > 1e-12 * n, (off * y).sum(-1) / spread.clamp(min=1e-300), 0.0)
        through_zero = (x * y).sum(-1) / x.square().sum(-1)
        level = y.mean() - slope * x.mean(-1)
        slope, level = torch.where(level < 0, through_zero, slope), level.clamp(min=0)
        slope, level = torch.where(slope < 0, 0.0, slope), torch.where(slope < 0, y.mean().clamp(min=0), level)
        sse = (slope[..., None] * x + level[..., None] - y).square().sum(-1)
        i, j = divmod(int(sse.argmin()), len(beta))
        best = Law(*(float(v) for v in (slope[i, j], alpha[i], beta[j], level[i, j], sse[i, j])))
        # close in by half: the valley is curved, so that its lowest point can lie a few steps beside the grid's best
        quarter = (high - low) / 4
        centre = torch.stack([alpha[i], beta[j]])
        low, high = (centre - quarter).clamp(0, 2), (centre + quarter).clamp(0, 2)
    return best


def _grid(rows: Tensor) -> Law:
    y, n = rows[:, 2], len(rows)
    line = lambda high, count, low=0.0: torch.linspace(low, high, count, dtype=torch.float64)
    a, alpha, beta, d = line(0.7, 50, 0.2), line(0.2, 100), line(0.05, 100), line(0.3, 10)
    x = _basis(rows, alpha, beta)
    sx, sxx, sxy = (v.sum(-1)[..., None, None] for v in (x, x * x, x * y))  # [100, 100, 1, 1]
    p, q = a[:, None], d[None]  # the sum of (p x + q - y)^2, multiplied out
    sse = p * p * sxx + 2 * p * q * sx - 2 * p * sxy + n * q * q - 2 * q * y.sum() + y.square().sum()
    i, j, k, m = _unravel(int(sse.argmin()), sse.shape)
    return Law(float(a[k]), float(alpha[i]), float(beta[j]), float(d[m]), float(sse[i, j, k, m]))


def _unravel(index: int, shape: Sequence[int]) -> list[int]:
    places = []
    for size in reversed(shape):
        index, place = divmod(index, size)
        places.append(place)
    return places[::-1]


def _positive(name: str, value: float, zero: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InvalidValue(f"{name} must be a number, got {value!r}")
    if value < 0 or (value == 0 and not zero):
        raise InvalidValue(f"{name} must be {'at least' if zero else 'above'} 0, got {value!r}")

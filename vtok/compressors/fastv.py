"""FastV: drop the visual tokens that the prompt's end attends to least, after an early decoder layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from vtok.errors import InvalidValue
from vtok.kernels.attention_rows import attention_rows
from vtok.options import Keep
from vtok.safe_layer import AtSafeLayer, FullDepth
from vtok.types import Attention


@dataclass(frozen=True, kw_only=True)
class FastV(AtSafeLayer):
    """Score: head-mean attention of the prompt's last token to each key, at decoder layer `layer - 1` (Section 4).

    keep: of the sample's visual tokens that remain after that layer.
    layer: K of the paper, how many decoder layers see all tokens, or a fraction of the depth; "auto", up to the layer
        that a `probe` found safe. The paper's 2 is earlier than what `vtok probe` found safe in the models of
        docs/probe.md.
    anchor: whose attention counts, see `InLLM`; "prompt_end" is the paper's.
    Differs from the paper: nothing known.
    """

    name = probed = "fastv"
    needs = frozenset({"attention"})
    paper = "An Image is Worth 1/2 Tokens After Layer 2, arXiv 2403.06764"
    examples = ({}, {"keep": 2, "layer": 1}, {"anchor": "after_visual"})

    keep: Keep = 0.5
    layer: FullDepth = 2

    def full_layers(self, n_layers: int) -> int:
        """How many of `n_layers` see all tokens."""
        layers = self.layer if isinstance(self.layer, int) else max(1, round(self.layer * n_layers))
        if layers >= n_layers:
            raise InvalidValue(f"layer must be below the number of decoder layers, {n_layers}, got {self.layer}.")
        return layers

    def schedule(self, n_layers: int) -> dict[int, float | int]:
        return {self.full_layers(n_layers) - 1: self.keep}

    def score(self, attention: Attention) -> Tensor:
        rows = attention_rows(
            attention.query, attention.key, attention.anchor[:, None], attention.scaling, attention.valid
        )  # [B, H, 1, L]
        return rows.mean(1).squeeze(1)

    def with_budget(self, budget: float, n_layers: int) -> FastV:
        """The latest layer, up to `layer`, after which at least a quarter of the budget is left to keep; no other than
        `layer` where a probe found it."""
        latest = self.full_layers(n_layers)
        for layer in range(latest, 0 if self.probe is None else latest - 1, -1):
            keep = (budget * n_layers - layer) / (n_layers - layer)
            if keep >= budget / 4:
                return replace(self, layer=layer, keep=min(1.0, keep))
        if self.probe is not None:
            raise InvalidValue(
                f"By {str(self.probe)!r} the first {self.layer} of {n_layers} layers have to see all tokens, so a "
                f"budget of {budget} cannot be met. Raise it, give keep instead, or compress before the language model."
            )
        raise InvalidValue(
            f"The first of {n_layers} layers sees all tokens, so a budget of {budget} cannot be met: it leaves "
            f"next to nothing for the others. Raise it, or compress before the language model."
        )

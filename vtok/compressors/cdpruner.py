"""CDPruner: the tokens that matter to the question and span the largest volume together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vtok.kernels.greedy_dpp import greedy_dpp
from vtok.modules.clip_text import ClipText
from vtok.options import Part
from vtok.stages.pre_llm import PreLLM
from vtok.tower import Layer
from vtok.types import Selection, VisualTokens, keep_count
from vtok.views import Views, unit

TINY = 1e-6  # beside the range of relevance: where all tokens are as relevant, all are of quality 1


@dataclass(frozen=True, kw_only=True)
class CDPruner(PreLLM):
    """A determinantal point process conditioned on the question: L_ij = r_i cos(i, j) r_j, with r the
    relevance of a token brought to [0, 1], and each pick raises the determinant of L over the picks most.

    keep: fraction or count of the tokens, per picture. Crops and thumbnail, or the frames of a clip, are one set.
    theta: how much relevance counts against diversity, in [0, 1]: 0 is `dpp`; below 1, quality is exp(a r) with
        a = theta / (2 - 2 theta); 1 is r itself. None is 1 with a text tower, as in the paper, and else 0.5.
    text_tower: a `vtok.modules.clip_text.ClipText` for models whose encoder is that CLIP's. Relevance is then, as in
        the paper, minus the mean cosine of a patch and the question in CLIP's space, where what is unlike the text is
        the foreground. Without one it is the mean cosine of a token and the input embeddings that the language model
        has for the question's tokens, as in OpenVINO GenAI: no text tower, and another method. Independent tables of
        Qwen-VL disagree whether it is better than `divprune`.
    The question is the text behind the last visual token, up to the prompt's end also in training; without any word all
    tokens are as relevant.
    Differs from the paper: relevance is brought to [0, 1] in each picture, where the official code takes the range of
    the batch, so that a picture's tokens depend on its neighbours; where the range is 0, or more tokens are wanted than
    there are dimensions, that code divides by 0 or picks tokens twice; a long question is cut into pieces that each
    begin and end as CLIP's texts do; of LLaVA-NeXT's pictures newlines and positions stay, and padding is gone.
    OpenVINO rounds the count up to an even number, and reads all of the prompt's text, the system's too.
    """

    name = "cdpruner"
    needs = frozenset({"question_embeds", "encoder_states"})
    paper = (
        "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, arXiv 2506.10967"
    )
    text_guided = True
    several_turns = False
    examples = ({"keep": 0.4},)
    slow = True

    theta: Part | None = None
    text_tower: ClipText | None = field(default=None, repr=False)

    @property
    def needs_now(self) -> frozenset[str]:
        return self.needs if self.text_tower is not None else frozenset({"question_embeds"})

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        return {"encoder_states": (None,)} if self.text_tower is not None else {}

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        x, n, asked = tokens.features, tokens.layout.n, tokens.question
        theta = self.theta
        if self.text_tower is None:
            relevance = mean_cosine(unit(x), unit(asked.embeds.to(x.device)), asked.valid.to(x.device))
            theta = 0.5 if theta is None else theta
        else:
            views = Views.of(tokens.layout, x.device)
            patches = self.text_tower.patches(tokens.read("encoder_states", None)).to(x.device)  # [B, V, P, C]
            text, valid = (part.to(x.device) for part in self.text_tower.texts(asked))
            relevance = -mean_cosine(views.collect(views.patches(patches).mean(3)), text, valid)
            theta = 1.0 if theta is None else theta
        return Selection.of_indices(greedy_dpp(x, keep_count(n, self.keep), quality(relevance, theta)), n)


def mean_cosine(x: Tensor, text: Tensor, valid: Tensor) -> Tensor:
    """[B, N] the mean over the valid ones of text [B, M, C] of the cosine with each of x [B, N, C]; 0 without any. Both
    of length 1 or 0 (the mean of a token's patches may be shorter)."""
    with torch.autocast(x.device.type, enabled=False):
        total = (x @ (text * valid[..., None]).sum(1)[..., None]).squeeze(2)
    return total / valid.sum(1, keepdim=True).clamp(min=1)


def quality(relevance: Tensor, theta: float) -> Tensor:
    """[B, N] of tokens with this relevance, see `CDPruner.theta`."""
    low, high = relevance.amin(1, keepdim=True), relevance.amax(1, keepdim=True)
    r = (relevance - low + TINY) / (high - low + TINY)
    return r if theta == 1 else (r * (theta / (2 * (1 - theta)))).exp()

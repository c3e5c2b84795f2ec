"""MMTok: tokens that cover both the question's words and the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vtok.kernels.greedy_coverage import greedy_coverage
from vtok.options import EncoderLayer, Positive
from vtok.stages.pre_llm import PreLLM
from vtok.tower import Layer
from vtok.types import Selection, VisualTokens, keep_count
from vtok.views import Views, unit


@dataclass(frozen=True, kw_only=True)
class MMTok(PreLLM):
    """Greedy maximum coverage: each word of the question, and each visual token, spreads one unit over the
    visual tokens by a softmax of cosines, and each pick adds most to the largest shares that the picks hold.

    keep: fraction or count of the tokens, per picture. Crops and thumbnail, or the frames of a clip, are one set.
    text_temperature: of the words' softmax; the paper's 0.02 for LLaVA, 0.01 for Qwen-VL.
    visual_temperature: of the visual tokens' softmax.
    balance: what covering the picture counts against covering the words.
    features: what visual tokens are compared by: "encoder", as they enter the projector, the paper's; of several
        patches a token the mean; or "projected", as they enter the language model.
    layer: the hidden state of the encoder that "encoder" compares; None, the one that the projector reads, is the
        paper's.
    Words are compared as the language model's input embeddings, with the tokens that enter it. They are the text behind
    the last visual token, up to the prompt's end also in training; without any the picture alone is covered.
    Differs from the paper: all tokens of the question count, where the official code leaves out a list of English
    words for LLaVA and writes the question anew for Qwen-VL; that code takes one picture a call.
    """

    name = "mmtok"
    needs = frozenset({"question_embeds", "encoder_states"})
    paper = "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs, arXiv 2508.18264"
    slow = True
    text_guided = True
    several_turns = False
    examples = ({"keep": 0.4},)

    text_temperature: Positive = 0.02
    visual_temperature: Positive = 0.2
    balance: Positive = 0.5
    features: Literal["encoder", "projected"] = "encoder"
    layer: EncoderLayer = None

    @property
    def needs_now(self) -> frozenset[str]:
        return self.needs if self.features == "encoder" else frozenset({"question_embeds"})

    @property
    def encoder_layers(self) -> dict[str, tuple[Layer, ...]]:
        return {"encoder_states": (self.layer,)} if self.features == "encoder" else {}

    @torch.no_grad()
    def select(self, tokens: VisualTokens) -> Selection:
        n, asked, x = tokens.layout.n, tokens.question, unit(tokens.features)
        seen = x
        if self.features == "encoder":
            views = Views.of(tokens.layout, x.device)
            patches = views.patches(tokens.read("encoder_states", self.layer)).float()
            seen = unit(views.collect(patches.mean(3)))
        with torch.autocast(x.device.type, enabled=False):
            words = shares(x, unit(asked.embeds.to(x.device)), asked.valid.to(x.device), self.text_temperature)
            there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            picture = shares(seen, seen, there, self.visual_temperature)
        covers = torch.cat([words, self.balance * picture], 2)  # [B, N, T + N]
        return Selection.of_indices(greedy_coverage(covers, keep_count(n, self.keep)), n)


def shares(x: Tensor, source: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """[B, N, M] what each of x [B, N, C] gets of each of source [B, M, C]: of the valid ones, [B, M] bool, 1 in all,
    spread by the softmax over N of cosines. Both of length 1 or 0."""
    spread = (x @ source.mT / temperature).softmax(1)
    return spread * (valid / valid.sum(1, keepdim=True).clamp(min=1))[:, None]

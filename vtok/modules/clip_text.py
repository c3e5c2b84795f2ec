"""CLIP's text tower beside a model whose encoder is that CLIP's: questions and patches in the space they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtok.errors import InvalidValue, Unsupported
from vtok.types import Question
from vtok.views import unit


@dataclass(frozen=True, eq=False)
class ClipText:
    """What `CDPruner` asks for as `text_tower`.

    clip: a `transformers.CLIPModel`, the one whose vision tower the model has (LLaVA-1.5: clip-vit-large-patch14-336).
    tokenizer: its own. asked_by: the tokenizer of the vision-language model, whose tokens the question is read from.

        tower = ClipText(CLIPModel.from_pretrained(name), AutoTokenizer.from_pretrained(name), processor.tokenizer)
        vtok.patch(model, "cdpruner", text_tower=tower)
    """

    clip: nn.Module
    tokenizer: Any
    asked_by: Any

    def texts(self, question: Question) -> tuple[Tensor, Tensor]:
        """[B, M, C] of length 1, the pieces of each question in CLIP's space, and which there are, [B, M] bool. A piece
        is as long as CLIP reads. Waits for the device. Raises `Unsupported` where the model got embeddings alone."""
        if question.ids is None:
            raise Unsupported("cdpruner with a text tower needs input_ids; this model got inputs_embeds alone.")
        config = self.clip.config.text_config
        room = config.max_position_embeddings - 2
        rows = [row[there].tolist() for row, there in zip(question.ids, question.valid)]
        pieces = []
        for row in rows:
            words = self.tokenizer(
                self.asked_by.decode(row, skip_special_tokens=True).strip(), add_special_tokens=False
            ).input_ids
            pieces.append([words[i : i + room] for i in range(0, len(words), room)])
        most = max(1, *map(len, pieces)) if pieces else 1
        device = self.clip.device
        ids = torch.zeros(len(rows), most, room + 2, dtype=torch.long, device=device)
        mask, there = torch.zeros_like(ids), torch.zeros(len(rows), most, dtype=torch.bool, device=device)
        for b, row in enumerate(pieces):
            for m, words in enumerate(row):
                whole = torch.tensor([config.bos_token_id, *words, config.eos_token_id], device=device)
                ids[b, m, : len(whole)], mask[b, m, : len(whole)], there[b, m] = whole, 1, True
        mask[..., 0] = 1  # a row that sees nothing is no number
        pooled = self.clip.text_model(input_ids=ids.flatten(0, 1), attention_mask=mask.flatten(0, 1)).pooler_output
        return unit(self.clip.text_projection(pooled)).view(*there.shape, -1), there

    def patches(self, states: Tensor) -> Tensor:
        """[..., C] of length 1, in CLIP's space, of the encoder's hidden states [..., D]. Raises `InvalidValue` where
        they are of another width than that CLIP's."""
        width = self.clip.visual_projection.in_features
        if states.shape[-1] != width:
            raise InvalidValue(
                f"The text tower's CLIP has vision states of width {width}, this model's encoder {states.shape[-1]}: "
                f"text_tower must be of the CLIP that the model's encoder comes from."
            )
        weight = self.clip.visual_projection.weight
        return unit(self.clip.visual_projection(self.clip.vision_model.post_layernorm(states.to(weight))))

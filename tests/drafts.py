"""Drafts for transformers' assisted decoding that are right and wrong on purpose: random models repeat themselves too
seldom for prompt lookup to find any."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

OTHERS = (40, 41)  # ids of text


@contextlib.contextmanager
def right_and_wrong(text: torch.Tensor, first: bool = True) -> Iterator[None]:
    """Prompt lookup drafts, at each step, the next two tokens of `text` [1, S] and then a wrong one. Fails where no
    draft was accepted or none rejected. first: also in the forward of the prompt."""
    accepted, rejected, asked = [], [], []

    def drafted(self, ids, *_, **__):
        n, last = ids.shape[1], text.shape[1] - 1  # the model itself says the last token
        if not (first or asked):
            last = n
        wrong = torch.where(text[:, n + 2 : n + 3] == OTHERS[0], *OTHERS)
        asked.append(torch.cat([text[:, n : n + 2], wrong], 1)[:, : last - n])
        return torch.cat([ids, asked[-1]], 1), None

    def noted(self, ids, scores, matches):
        accepted.append(int(matches))
        rejected.append(asked[-1].shape[1] - int(matches))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(PromptLookupCandidateGenerator, "get_candidates", drafted)
        patched.setattr(PromptLookupCandidateGenerator, "update_candidate_strategy", noted)
        yield
    assert sum(accepted) > 1 and sum(rejected) > 0, (accepted, rejected)

"""Where the prompts of a forward end.

What is kept of a picture for a prompt is what `generate` keeps of it for that prompt, so a forward that holds answers
too must know where the prompt ends. It is known in `generate`, from labels, or since the caller says so; never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vtok.errors import Unsupported

IGNORE = -100  # transformers' label of a token that is not supervised
ANSWERS = (
    "{name} acts behind the prompt, so an answer in one forward with its prompt would be read otherwise than when it "
    "is generated. Let the prompt be one forward (use_cache=True, or generate) and the answer others on its cache; to "
    "train, take a method that acts before the cache, or `with patch.paused():`."
)
CHUNKS = "{name} cannot act on a prompt that comes in chunks: leave prefill_chunk_size unset."
DRAFTS = (
    "{name} acts after each token of an answer, so that several at once (drafts of assisted decoding, prompt lookup) "
    "would give another answer: leave them out, or take a method that lets answers be."
)
GENERATING = (
    "{name} acts behind the prompt, and this call of generate holds more than the prompt in one forward. Leave out "
    "use_cache=False, and assistant_model and prompt_lookup_num_tokens, whose first drafts come with the prompt; "
    "custom_generate=vtok.NGram(), for example, drafts behind it."
)
UNKNOWN = (
    "{name} acts behind the prompt, and this forward does not say whether it is one. Call generate; or pass "
    "use_cache=True, where all of the input is prompt; or say how long prompts are, `with patch.prompt(length):`."
)


@dataclass(frozen=True)
class Told:
    """What a forward is told about its prompts.

    labels: [B, S] with -100 where nothing is supervised, or None. length: how many columns of the sequence, with what
        is cached, are prompt: an int, or [B]; None where nobody says. whole: whether all of this forward is prompt.
    on_pictures: [B] bool, rows in which pictures themselves were labelled; None where there are no labels.
    generating: whether it is a forward of `generate`.
    """

    labels: Tensor | None = None
    length: int | Tensor | None = None
    whole: bool = False
    on_pictures: Tensor | None = None
    generating: bool = False

    @property
    def known(self) -> bool:
        """Whether anything says where prompts end."""
        return self.labels is not None or self.length is not None or self.whole

    def answers(self, seen: int, length: int, name: str, one_by_one: bool) -> bool:
        """Whether a forward of `length` tokens behind `seen` is part of an answer, for a method that acts behind the
        prompt. one_by_one: it acts on each token of an answer.

        Raises `Unsupported` where nobody says, and where it is both. Waits for the device where the prompt's length is
        a tensor."""
        answering, refused = bool(seen) and length == 1, None
        if self.labels is not None:
            refused = ANSWERS
        elif self.length is not None:
            ends = [self.length] if isinstance(self.length, int) else self.length.tolist()
            answering = seen >= max(ends)
            if not answering and seen + length > min(ends):
                refused = GENERATING if self.generating else ANSWERS
            elif seen + length < min(ends):
                refused = CHUNKS
        elif not self.whole:
            refused = UNKNOWN
        if answering and one_by_one and length > 1:
            refused = DRAFTS
        if refused is not None:
            raise Unsupported(refused.format(name=name))
        return answering


@dataclass(frozen=True)
class Prompts:
    """The prompts of a forward. A *turn* is a prompt that brings pictures: a row with several answers may have several.

    ends: [B, T] long, the position of the last token of each turn's prompt; T is at least the most that a row has, and
        a row with fewer repeats one.
    turn: [B, S] long, to which of its row's turns a position belongs; their number, behind the last.
    turns: [B] long, how many a row has.
    needed: [B, S] bool, visual tokens whose row of logits counts: a supervised token or the answer's first follows.
    supervised: [B, S] bool, tokens of answers.
    unclear: [B] bool, rows of which nobody knows where the prompt of a picture ends.
    last: [B] long, the last position of a row that is not padding.
    completed: whether answers may lie behind prompts in this forward.
    """

    ends: Tensor
    turn: Tensor
    turns: Tensor
    needed: Tensor
    supervised: Tensor
    unclear: Tensor
    last: Tensor
    completed: bool

    def instruction(self, ends: Tensor, turn: int, visual: Tensor, valid: Tensor) -> Tensor:
        """[B, S] bool: the text between a turn's first visual token and its `ends` [B], and these whatever they are."""
        place = torch.arange(visual.shape[1], device=visual.device)
        mine = self.turn == turn
        between = ((visual & mine).cumsum(1) > 0) & mine & (place <= ends[:, None])
        return (between & ~visual & valid).scatter(1, ends[:, None], True)

    def after_visual(self, turn: int, visual: Tensor) -> Tensor:
        """[B] the first place behind the last visual token of a turn, or the prompt's end where that comes first."""
        mine, ends = visual & (self.turn == turn), self.ends[:, turn]
        after = visual.shape[1] - mine.flip(1).to(torch.uint8).argmax(1)
        return torch.where(mine.any(1), torch.minimum(after, torch.where(self.unclear, self.last, ends)), ends)


def last_of(valid: Tensor) -> Tensor:
    """[B] the last place of valid [B, S] bool that is true in each row (the very last where none is)."""
    return valid.shape[1] - 1 - valid.flip(1).to(torch.uint8).argmax(1)


def locate(told: Told, valid: Tensor, visual: Tensor, seen: int, most: int) -> Prompts:
    """Where the prompts of a forward end. Does not wait for the device.

    valid, visual: [B, S] bool. seen: tokens of the sequence before this forward. most: a bound on a row's turns."""
    batch, length = valid.shape
    place = torch.arange(length, device=valid.device)
    last = last_of(valid)
    at = lambda where: torch.zeros_like(valid).scatter_(1, where[:, None], True)
    supervised, follows = torch.zeros_like(valid), torch.zeros_like(valid)
    unclear, completed = torch.zeros(batch, dtype=torch.bool, device=valid.device), True
    if told.labels is not None:
        supervised = (told.labels != IGNORE).to(valid.device)
        follows = supervised.roll(-1, 1) & (place < length - 1)  # a supervised token comes next
        ends = (follows | at(last)) & ~supervised
        # text before a picture is supervised: an answer that led to it, or the labels are of the whole sequence
        begins = visual & ~visual.roll(1, 1) & supervised.roll(1, 1) & (place > 0)
        unclear = begins.any(1) | told.on_pictures.to(valid.device)
    elif told.length is not None:
        ends = at(last_of(valid & (place < torch.as_tensor(told.length, device=valid.device).view(-1, 1) - seen)))
        completed = not isinstance(told.length, int) or told.length < seen + length
    else:
        ends, unclear, completed = at(last), unclear if told.whole else ~unclear, False
    behind = torch.where(ends, place, length).flip(1).cummin(1).values.flip(1)  # the first end at or behind a place
    end_of = torch.where(behind < length, behind, last[:, None])
    brings = valid.new_zeros(batch, length + 1).scatter_(1, torch.where(visual, end_of, length), True)[:, :length]
    turns, first = brings.sum(1), torch.where(ends.any(1), ends.to(torch.uint8).argmax(1), last)
    index = (~brings).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    ends_of_turns = torch.where(place[: index.shape[1]] < turns[:, None], index, first[:, None])
    turn = brings.cumsum(1) - brings.long()
    needed = visual & (follows | ends)
    return Prompts(ends_of_turns, turn, turns, needed, supervised, unclear & visual.any(1), last, completed)

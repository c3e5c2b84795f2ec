"""Exact probabilities of bytes from a model of tokens (https://arxiv.org/abs/2410.09303).

A prompt that ends inside of a word ends at a token boundary that no training text had there, and what the model says
behind it is off. What a text's bytes have for a probability does not depend on where they are cut: it is the sum over
the *covers* of the bytes, the token sequences whose text begins with them and whose last token reaches their end. The
same turns models of different tokenizers into models of one alphabet.

Only canonical sequences count, those that the tokenizer makes of their text; what the model gives to others is left
out, and next bytes are normalised without it.

Written from the formulas; the code of the paper has a licence that forbids use, and was not read.
Differs from the paper: byte-level BPE (GPT-2, Llama 3, Qwen) instead of SentencePiece; a text may end inside of a
character.
Not for long texts a byte at a time: each call runs the model on all covers anew. genlm-bytes (`vtok[genlm]`, see
`vtok.text.decoding.genlm`) keeps a beam of them instead. Temperature on bytes is not temperature on tokens.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from vtok.errors import InvalidValue, Unsupported
from vtok.text.decoding.coupling import Chance

END = 256  # the column of "the text ends here", behind those of the bytes
Tokens = tuple[int, ...]
NextLogp = Callable[[Sequence[Tokens]], Tensor]  # contexts -> [N, V] log-probabilities of the next token


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer does with bytes.

    tokens: id -> its bytes, of the tokens that are text. encode: bytes -> the tokens that the tokenizer makes of them,
    or None for bytes that no text begins with. ends: ids that end a text."""

    tokens: Mapping[int, bytes]
    encode: Callable[[bytes], list[int] | None]
    ends: Collection[int] = ()

    @staticmethod
    def of(tokenizer: Any, ends: Collection[int] | None = None) -> Vocabulary:
        """Of a byte-level BPE tokenizer of transformers. ends: its end-of-sequence token, where not given.

        Raises `Unsupported` for other kinds."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or "ByteLevel" not in json.dumps(json.loads(backend.to_str())["decoder"]):
            raise Unsupported(
                f"The tokens of a {type(tokenizer).__name__} are not bytes: exact byte probabilities need a fast "
                f"byte-level BPE tokenizer, such as those of Qwen, Llama 3 or GPT-2."
            )
        if ends is None:
            ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        byte = {sign: value for value, sign in bytes_to_unicode().items()}
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        known = backend.get_vocab(with_added_tokens=False)
        tokens = {
            i: bytes(byte[sign] for sign in text)
            for text, i in known.items()
            if i not in special and all(sign in byte for sign in text)
        }
        return Vocabulary(tokens, ByteEncoder(backend), frozenset(ends))

    @cached_property
    def ordered(self) -> list[tuple[bytes, int]]:
        return sorted((text, i) for i, text in self.tokens.items() if text)

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return max(map(len, self.tokens.values()))

    def beginning(self, start: bytes) -> list[int]:
        """The tokens whose bytes begin so."""
        first = bisect.bisect_left(self.ordered, (start, -1))
        found = []
        for text, i in self.ordered[first:]:
            if not text.startswith(start):
                break
            found.append(i)
        return found

    def spell(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self.tokens[i] for i in tokens)

    def canonical(self, tokens: Sequence[int]) -> bool:
        """Whether the tokenizer makes these tokens of their text."""
        encoded = self.encode(self.spell(tokens))
        return encoded is not None and list(encoded) == list(tokens)


@dataclass(frozen=True)
class ByteEncoder:
    """bytes -> token ids, by a byte-level BPE tokenizer, special tokens and normalisation left aside.

    The last character may be cut: then its piece is that of a whole character, without the bytes that are missing."""

    backend: Any

    def __call__(self, data: bytes) -> list[int] | None:
        text, missing = whole(data)
        if text is None:
            return None
        pieces = [piece for piece, _ in self.backend.pre_tokenizer.pre_tokenize_str(text)]
        if missing:
            pieces[-1] = pieces[-1][:-missing]
        return [token.id for piece in pieces if piece for token in self.backend.model.tokenize(piece)]


def whole(data: bytes) -> tuple[str | None, int]:
    """The text of bytes whose last character may be cut, with some character in its place; and how many bytes of that
    are missing. None where bytes are no UTF-8."""
    try:
        return data.decode(), 0
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return None, 0
    for missing in (1, 2, 3):
        for second in (b"\x80", b"\x90", b"\xa0"):  # not all are allowed behind all first bytes
            try:
                return (data + (second + b"\x80\x80")[:missing]).decode(), missing
            except UnicodeDecodeError:
                continue
    return None, 0


# ---- covers ----------------------------------------------------------------------------------------------------------
def covers(vocabulary: Vocabulary, start: bytes) -> list[Tokens]:
    """The canonical token sequences whose text begins with `start` and whose last token ends at its end or behind."""
    if not start:
        return [()]
    found = []
    for split in range(max(0, len(start) - vocabulary.longest), len(start)):
        left = vocabulary.encode(start[:split])
        if left is not None:  # canonical sequences begin with canonical ones, so there is no other
            endings = vocabulary.beginning(start[split:])
            found += [(*left, i) for i in endings if vocabulary.canonical([*left, i])]
    return found


@dataclass(frozen=True)
class ByteModel:
    """A model of tokens as one of bytes.

    vocabulary: of its tokenizer. next_logp: contexts -> [N, V] log-probabilities of the next token, see `behind`."""

    vocabulary: Vocabulary
    next_logp: NextLogp

    def cover_logps(self, start: bytes) -> dict[Tokens, float]:
        """Each cover of the bytes -> its log-probability."""
        found = covers(self.vocabulary, start)
        contexts = sorted({cover[:i] for cover in found for i in range(len(cover))})
        if not contexts:
            return dict.fromkeys(found, 0.0)
        logps, row = self.next_logp(contexts), {context: i for i, context in enumerate(contexts)}
        steps = [(row[cover[:i]], token) for cover in found for i, token in enumerate(cover)]
        rows, tokens = torch.tensor(steps, device=logps.device).T
        values = iter(logps[rows, tokens].double().tolist())
        return {cover: sum(next(values) for _ in cover) for cover in found}

    def logp(self, start: bytes) -> float:
        """The log-probability that a text begins with these bytes; -inf where none does."""
        return logsum(self.cover_logps(start).values())

    def next_byte(self, start: bytes) -> Tensor:
        """[257] log-probabilities of the byte behind `start`, the last one that the text ends there.

        V encodings a call, for the tokens behind the cover that ends where `start` does. Raises `InvalidValue` where no
        text begins with `start`."""
        mass: list[list[float]] = [[] for _ in range(257)]
        for cover, logp in self.cover_logps(start).items():
            text = self.vocabulary.spell(cover)
            if len(text) > len(start):
                mass[text[len(start)]].append(logp)
                continue
            then = self.next_logp([cover])[0].double().tolist()
            for i in self.vocabulary.ends:
                mass[END].append(logp + then[i])
            for i, token in self.vocabulary.tokens.items():
                if token and then[i] > -math.inf and self.vocabulary.canonical([*cover, i]):
                    mass[token[0]].append(logp + then[i])
        found = torch.tensor([logsum(values) for values in mass], dtype=torch.float64)
        if bool(found.isneginf().all()):
            raise InvalidValue(f"No text of this vocabulary begins with {start!r}.")
        return found.log_softmax(0)

    def draw(self, start: bytes, chance: Chance) -> Tokens:
        """A cover by its probability: what to go on from, as if the prompt had not been cut at `start`'s end."""
        found = self.cover_logps(start)
        if not found:
            raise InvalidValue(f"No text of this vocabulary begins with {start!r}.")
        weights = torch.tensor(list(found.values()), dtype=torch.float64).softmax(0)
        return list(found)[chance.draw(weights)]


def logsum(values: Collection[float]) -> float:
    return float(torch.logsumexp(torch.tensor([-math.inf, *values], dtype=torch.float64), 0))


def behind(model: nn.Module, prompt: Tensor, rows: int = 64) -> NextLogp:
    """`next_logp` of a causal language model behind a prompt of text, [1, T] token ids, one at least.

    rows: contexts in one forward. Each runs the prompt anew."""
    if prompt.shape[0] != 1 or prompt.shape[1] == 0:
        raise InvalidValue(f"A prompt of one row and one token at least, got {list(prompt.shape)}: begin with a BOS.")

    @torch.no_grad()
    def next_logp(contexts: Sequence[Tokens]) -> Tensor:
        found = []
        for first in range(0, len(contexts), rows):
            some = contexts[first : first + rows]
            lengths = torch.tensor([len(context) for context in some], device=prompt.device)
            ids = prompt.new_zeros(len(some), int(lengths.max()))
            for row, context in zip(ids, some):
                row[: len(context)] = torch.tensor(context, dtype=ids.dtype)
            ids = torch.cat([prompt.expand(len(some), -1), ids], 1)
            ends = prompt.shape[1] + lengths  # padding is on the right, where nothing looks at it
            mask = (torch.arange(ids.shape[1], device=ids.device) < ends[:, None]).long()
            logits = model(input_ids=ids, attention_mask=mask).logits
            found.append(logits[torch.arange(len(some), device=ids.device), ends - 1].float().log_softmax(-1))
        return torch.cat(found)

    return next_logp


# ---- healing a prompt ------------------------------------------------------------------------------------------------
def cut_back(vocabulary: Vocabulary, ids: Sequence[int], tokens: int = 1) -> tuple[list[int], bytes]:
    """A prompt without its last tokens, and the bytes of those, for `HealingProcessor`.

    Raises `InvalidValue` where they are no text, as the placeholder of a picture."""
    if not 1 <= tokens < len(ids):
        raise InvalidValue(f"Of a prompt of {len(ids)} tokens 1 to {len(ids) - 1} can be cut, not {tokens}.")
    left, last = list(ids[:-tokens]), ids[-tokens:]
    if strange := [i for i in last if i not in vocabulary.tokens]:
        raise InvalidValue(f"Tokens {strange} at the prompt's end are no text: there is nothing to heal.")
    return left, vocabulary.spell(last)


class HealingProcessor(LogitsProcessor):
    """The first token must begin with the bytes that the prompt lost: `logits_processor=[HealingProcessor(...)]`.

        ids, tail = cut_back(vocabulary, prompt)
        model.generate(torch.tensor([ids]), logits_processor=[HealingProcessor(vocabulary, tail, len(ids))])

    The token is distributed as the model's next one behind the cut prompt, given that it begins so. Over all places
    where the prompt may have been cut, `ByteModel.draw` is exact. tail: bytes. prompt_length: of the cut prompt."""

    def __init__(self, vocabulary: Vocabulary, tail: bytes, prompt_length: int) -> None:
        self.allowed, self.prompt_length = vocabulary.beginning(tail), prompt_length
        if not self.allowed:
            raise InvalidValue(f"No token begins with {tail!r}: cut fewer tokens off.")

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [B, T]; scores: [B, V]."""
        if input_ids.shape[1] > self.prompt_length:
            return scores
        allowed = torch.tensor(self.allowed, device=scores.device)
        return torch.full_like(scores, -math.inf).index_copy(1, allowed, scores[:, allowed])

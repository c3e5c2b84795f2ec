"""Bridges to the genlm packages (`pip install "vtok[genlm]"`), which are imported when used.

genlm-control has checks for regular expressions, grammars and JSON schemas: `check` makes an `ok` of one, for `AWRS`
and `AWRSProcessor`, so that they also serve models that see pictures. genlm-bytes keeps a beam of token sequences for
long texts of bytes: `byte_beam` begins one. Neither is a part of vtok: what they do is said in their documentation.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Coroutine
from typing import Any

from vtok.errors import MissingExtra, Unsupported
from vtok.text.decoding.awrs import Check
from vtok.text.decoding.byte_level import Vocabulary


def needed(name: str) -> Any:
    """A module of genlm. Raises `MissingExtra`."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtra(f'{name} is not installed ({error}): pip install "vtok[genlm]"') from error


def check(potential: Any, vocabulary: Vocabulary) -> Check:
    """`ok(ids)` of a potential over bytes, such as `genlm.control.JsonSchema(schema)` or `BoolFSA.from_regex(...)`.

    vocabulary: of the tokenizer; its `ends` end the text. A token that is no text is not accepted. What the potential
    says by weights counts as yes unless it is 0."""
    control = needed("genlm.control")
    if not isinstance(potential, control.Potential) or not all(isinstance(token, int) for token in potential.vocab):
        raise Unsupported(f"A genlm potential over bytes is needed, not {potential!r}.")

    def ok(ids: list[int]) -> bool:
        ended = ids[-1] in vocabulary.ends
        body = ids[:-1] if ended else ids
        if not all(i in vocabulary.tokens for i in body):
            return False
        asked = potential.complete if ended else potential.prefix
        return finished(asked(list(vocabulary.spell(body)))) > -math.inf

    return ok


def finished(coroutine: Coroutine[Any, Any, float]) -> float:
    """What a coroutine gives that waits for nothing, also where an event loop is running already, as in a notebook."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    coroutine.close()
    raise Unsupported("This potential waits for other tasks; give the one that it wraps (no autobatch, no processes).")


async def byte_beam(model: Any, tokenizer: Any, prompt: list[int], *, width: int = 5, prune: float = 0.0) -> Any:
    """A `genlm.bytes.ByteBeamState` of a causal language model behind a prompt of text, one token at least.

    `await state.prefill(data)` goes on from it, `await state.logp_next()` gives the next byte's log-probabilities.
    width: token sequences that are kept. prune: those with less probability are not. Over all tokenizations, also those
    that are not canonical, as far as the beam holds them: near `ByteModel`, not the same."""
    byte, hf = needed("genlm.bytes"), needed("genlm.backend.llm.hf")
    ends = [] if tokenizer.eos_token is None else [tokenizer.eos_token.encode()]
    how = byte.BeamParams(K=width, prune_threshold=prune, eos_byte_strings=ends)
    lm = hf.AsyncTransformer(model, tokenizer)
    trie = byte.AsyncTokenByteTrie.from_vocab(lm.byte_vocab, eos_byte_strings=how.eos_byte_strings)
    state = byte.LazyTrieState(byte.StatefulTokenizedLM.initial(lm, list(prompt)), trie, trie.trie.root, 0.0)
    return byte.ByteBeamState([await state.materialize()], how)

"""Tokenizers of the tiny models: every word that they were taught is one token, all else is spelled in bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PIECE = r" ?[A-Za-z0-9]+| ?[^\sA-Za-z0-9]+|\s"  # a code of letters and digits is one piece, so it is spelled as one


def pieces(text: str) -> list[str]:
    """A text cut as the tokenizer cuts it, with the space before each word."""
    return re.findall(PIECE, text)


def is_word(piece: str) -> bool:
    """Whether a piece is worth a token: a word or a single character, no code and no number."""
    text = piece.strip(" ")
    return text.isascii() and (len(text) == 1 or (text.isalpha() and not text.isupper()))


def chatml(image: str, video: str) -> str:
    """A chat template of ChatML with what stands for a picture and for a clip."""
    # tests `type` rather than the presence of a key: datasets fill absent keys of content parts with None
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ ' ' if m['role'] == 'assistant' else '\n' }}"
        "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}" + image + "{% elif c['type'] == 'video' %}" + video + "{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )


def tokenizer(
    words: Iterable[str], special: tuple[str, ...], end: str, pad: str, template: str, length: int = 4096, **named: str
) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each of `words` (ASCII pieces, with the space before them), each of `special`, and
    each byte. Left-padding; `end` and `pad` are among `special`, and so are those `named` for a processor."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = dict.fromkeys([*special, *alphabet, *(word.replace(" ", "Ġ") for word in words)])
    ids = {token: i for i, token in enumerate(known)}
    tok = Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token=end,
        pad_token=pad,
        padding_side="left",
        model_max_length=length,
        chat_template=template,
        extra_special_tokens=named,
    )

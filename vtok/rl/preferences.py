"""Preference pairs as batches: text, pictures and clips of the rows, and in which tokens the two answers differ.

For trainers whose loss looks at tokens. TRL's own collators know no clips, and cut the answers of long rows.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor
from trl.data_utils import apply_chat_template, is_conversational, maybe_extract_prompt
from trl.trainer.utils import pad

from vtok.errors import InvalidValue, Unsupported, VtokError
from vtok.media import Sampling
from vtok.rl.clips import COLUMNS, SPREAD, as_parts, check_clips, conversation, has_media, media
from vtok.text.align.rrpo import TAG, diff_signs, diff_spans, to_tokens, unmark
from vtok.text.align.stats import IGNORE

Phrases = Literal["words", "tokens", "markup", "all"]
Signed = tuple[list[int], list[int]]  # ids of an answer, and their signs
TEXT = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")  # columns that are read beside COLUMNS
WEIGHTS = ("chosen_weights", "rejected_weights")  # columns of numbers, one for each token of an answer
TYPES = ("token_type_ids", "mm_token_type_ids")  # which some processors give beside the ids; 0 is text
log = logging.getLogger(__name__)


def for_models(batch: Mapping[str, Tensor]) -> tuple[dict[str, Tensor | bool], dict[str, Tensor]]:
    """Of a batch of `PairCollator` what models are given, labels in it, and what objectives read beside it."""
    extra = {name: batch[name] for name in ("signs", "weights") if name in batch}
    given = {name: value for name, value in batch.items() if name not in ("completion_mask", *extra)}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
    return given | {"labels": labels, "use_cache": False}, extra


@dataclass
class PairCollator:
    """Rows to a batch: tokens, media and signs, the chosen answers first. Text is tokenised here too, as pictures are.

    Gives `input_ids`, `attention_mask`, `completion_mask` and `signs`, each [2B, T], padded on the right, and what the
    processor makes of pictures and clips; of more rejected answers more rows, the first ones before the second. Rows
    with `chosen_weights` or `rejected_weights`, a number for each token of the answer, give `weights` [2B, T], too, in
    which the answer without numbers weighs 1 and the prompt 0.

    processor: of the model, or a tokenizer. phrases: what the signs are made by, see `RRPOConfig`. sampling: which
        frames of a clip are taken. max_length: tokens of prompt and answer, beyond which a pair is not `usable`.
    rejected: answers that a row rejects: `rejected`, `rejected_2`, ...
    """

    processor: Any
    phrases: Phrases = "words"
    sampling: Sampling = SPREAD
    max_length: int | None = None
    pad_to_multiple_of: int | None = None
    rejected: int = 1

    def __post_init__(self) -> None:
        if self.rejected > 1 and self.phrases != "all":
            raise InvalidValue(f'Phrases are those of two answers: of {1 + self.rejected} use phrases="all".')

    @property
    def said(self) -> tuple[str, ...]:
        """The columns of answers."""
        return ("chosen", "rejected", *(f"rejected_{n}" for n in range(2, self.rejected + 1)))

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        rows = [maybe_extract_prompt(dict(row)) for row in rows]
        seen = [conversation(row, self.sampling) for row in rows if has_media(row)]
        if seen:
            rows = [row | {"prompt": one.turns} for row, one in zip(rows, seen)]
        prompts, *said = zip(*map(self.answers, rows))  # of chosen answers, of rejected ones, ...
        times = len(said)
        # what a chat template wrote has its special tokens
        how = {"add_special_tokens": not is_conversational(rows[0]), "padding": True, "padding_side": "left"}
        batch = self.processor(text=[*prompts] * times, return_tensors="pt", **how, **media(seen * times))
        return {**batch, **self._joined(batch, [one for some in said for one in some], self._weights(rows, said))}

    def _weights(self, rows: Sequence[Mapping[str, Any]], said: Sequence[Sequence[Signed]]) -> list[Tensor] | None:
        """Of each answer, the chosen ones first; None where no row has weights."""
        if not any(row.get(name) is not None for row in rows for name in WEIGHTS):
            return None
        made = []
        for column, answers in zip(self.said, said):
            name = f"{column}_weights"
            for row, (ids, _) in zip(rows, answers):
                given = [1.0] * len(ids) if row.get(name) is None else row[name]
                if len(given) != len(ids):
                    raise InvalidValue(f"{name} has {len(given)} numbers, and the answer {len(ids)} tokens.")
                made.append(torch.tensor(given, dtype=torch.float32))
        return made

    def answers(self, row: Mapping[str, Any]) -> tuple[str, *tuple[Signed, ...]]:
        """The prompt's text, and the chosen and the rejected answers, each as token ids and their signs."""
        if is_conversational(row):
            if self.processor is not self.tokenizer:  # templates of vision-language models want parts
                row = row | {key: as_parts(row[key]) for key in ("prompt", *self.said)}
            told = [
                apply_chat_template(row | {"rejected": row[key]}, self.processor, row.get("tools"))
                for key in self.said[1:]
            ]
            return told[0]["prompt"], *self._signed(told[0]["chosen"], *(texts["rejected"] for texts in told))
        end = self.tokenizer.eos_token
        return row["prompt"], *self._signed(*(row[key].removesuffix(end) + end for key in self.said))

    def _signed(self, *texts: str) -> list[Signed]:
        how, spans = self.phrases, None
        if how == "markup":
            texts, spans = zip(*map(unmark, texts))
        elif any(TAG.search(text) for text in texts):
            raise InvalidValue(f'Answers with <MASK> tags need phrases="markup": {texts[0]!r}.')
        elif how == "words":
            spans = diff_spans(*texts)
        if spans is not None and not self.tokenizer.is_fast:
            raise Unsupported('This tokenizer does not say where in the text its tokens are: use phrases="tokens".')
        made = self.tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=spans is not None)
        ids = made["input_ids"]
        if spans is not None:
            signs = map(to_tokens, spans, made["offset_mapping"])
        else:
            signs = diff_signs(*ids) if how == "tokens" else [[1] * len(row) for row in ids]
        return list(zip(ids, signs))

    def _joined(
        self, batch: Mapping[str, Tensor], said: Sequence[Signed], weights: list[Tensor] | None
    ) -> dict[str, Tensor]:
        """Prompts, which come padded on the left, and answers, in rows that are padded on the right."""
        real = batch["attention_mask"].bool()
        ends, signs = ([torch.tensor(part) for part in parts] for parts in zip(*said))
        join = lambda heads, tails: [torch.cat([head[some], tail]) for head, some, tail in zip(heads, real, tails)]
        none, ones = torch.zeros_like(batch["input_ids"]), [torch.ones_like(end) for end in ends]
        rows = {"input_ids": join(batch["input_ids"], ends), "attention_mask": join(none + 1, ones)}
        rows |= {"completion_mask": join(none, ones), "signs": join(none, signs)}
        rows |= {} if weights is None else {"weights": join(none.float(), weights)}
        rows |= {name: join(batch[name], [0 * one for one in ones]) for name in TYPES if name in batch}
        fill, multiple = {"input_ids": self.tokenizer.pad_token_id}, self.pad_to_multiple_of
        return {name: pad(row, fill.get(name, 0), "right", multiple) for name, row in rows.items()}

    def usable(self, row: Mapping[str, Any]) -> str | None:
        """Why a pair teaches nothing or cannot be used whole, or None. Looks at its text alone."""
        prompt, *answers = self.answers(maybe_extract_prompt(dict(row)))
        if self.phrases == "all" and any(answers[0][0] == ids for ids, _ in answers[1:]):
            return "are one answer twice"
        if not all(any(signs) for _, signs in answers):
            return "have no phrase in which both answers differ"
        if self.max_length is not None:
            longest = len(self.tokenizer(prompt)["input_ids"]) + max(len(ids) for ids, _ in answers)
            if longest > self.max_length:
                return f"are longer than max_length={self.max_length}"
        return None


def checked(dataset: Any, pairs: PairCollator) -> Any:
    """The pairs of a data set that can be trained on. Raises where something is wrong with it or with a row."""
    if dataset is None:
        raise InvalidValue("There is no train_dataset.")
    first = next(iter(dataset), {})
    names = list(dataset.column_names or first)
    wanted = (*pairs.said, "prompt")[: None if pairs.rejected > 1 else 2]  # a pair can tell its prompt
    if missing := [name for name in wanted if name not in names]:
        raise InvalidValue(
            f"A preference loss learns from pairs, and the data set has no column {missing[0]!r}, but {names}."
        )
    if any(name in names for name in COLUMNS):
        if pairs.max_length is not None:
            raise InvalidValue(
                f"max_length={pairs.max_length} could cut visual tokens: leave it at None, and take fewer frames "
                f"(nframes, max_frames) or smaller pictures."
            )
        if pairs.processor is pairs.tokenizer:
            raise InvalidValue("The data set has pictures or clips: give the model's processor, not a tokenizer.")
        if isinstance(first["chosen"], str):
            raise InvalidValue(
                "Prompts and answers with pictures or clips are lists of messages, and here they are text."
            )
        check_clips(dataset, pairs.processor)
    if not isinstance(dataset, Dataset):
        return dataset
    good, bad = [], Counter()
    told = [name for name in (*TEXT, *pairs.said[2:]) if name in names]
    text = dataset.select_columns(told)  # pictures would be decoded
    for number, row in enumerate(text):
        try:
            reason = pairs.usable(row)
        except VtokError as error:
            raise type(error)(f"Row {number} of the data set: {error}") from error
        if reason is None:
            good.append(number)
        else:
            bad[reason] += 1
    for reason, n in bad.items():
        log.warning("%d of %d pairs are left out, since they %s.", n, len(dataset), reason)
    if not good:
        raise InvalidValue(f"No pair of the data set can be trained on: they {' or '.join(bad)}.")
    return dataset.select(good) if bad else dataset

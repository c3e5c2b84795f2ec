"""Series as a data set for TRL's trainers: picture, prompt, class, and an answer to imitate in SFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vtok.errors import InvalidValue
from vtok.rl.timemaster.picture import Plot, render
from vtok.rl.timemaster.prompts import Answer, answer, question
from vtok.rl.timemaster.series import Series

Traces = Callable[[np.ndarray, str], tuple[str, str]]  # a series and its class -> the think and the extension text
ACROSS, UP = ("left", "middle", "right"), ("bottom", "middle", "top")


# ---- answers to imitate ----------------------------------------------------------------------------------------------
def describe(values: np.ndarray, label: str = "") -> tuple[str, str]:
    """What is plain to see in a series, as texts for the think and the extension part of an answer.

    values: [channels, points]; of several channels the one that varies most is described. label: not used; a writer
        of better traces may need it."""
    row = values[int(values.std(axis=1).argmax())]
    third = lambda at: ACROSS[min(2, 3 * int(at) // len(row))]
    low, span = row.min(), np.ptp(row) or 1.0
    level = lambda value: UP[min(2, int(3 * (value - low) / span))]
    return f"highest in the {third(row.argmax())}", f"starts in the {level(row[0])}, ends in the {level(row[-1])}"


def stated(said: Answer, row: Mapping[str, Any]) -> float:
    """A judge without a model: the share of the row's `insight` that an answer's extension states, less what it states
    besides. 0..1. A set made by `dataset` with an extension has that column."""
    true, own = (set(text.split(", ")) for text in (row["insight"], said.extension))
    return max(0.0, (len(true & own) - len(own - true)) / len(true))


# ---- the data set ----------------------------------------------------------------------------------------------------
def limits(series: Series) -> tuple[tuple[float, float], ...]:
    """Lowest and highest value of each channel of a set: the scale that all its pictures may share."""
    low, high = series.values.min((0, 2)), series.values.max((0, 2))
    return tuple(zip(low.tolist(), high.tolist()))


def dataset(
    series: Series,
    plot: Plot | None = None,
    *,
    classes: tuple[str, ...] | None = None,
    extension: bool = False,
    brief: bool = False,
    scale: tuple[tuple[float, float], ...] | None = None,
    traces: Traces = describe,
) -> Any:
    """A `datasets.Dataset` with a row a series: `prompt` and `completion` (conversations, without the picture's
    placeholder, which TRL puts in), `image`, `label` and, with an extension, `insight`.

    SFTTrainer takes it as it is, GRPOTrainer ignores the completion.
    plot: by default the paper's, see `Plot`. classes: those of the prompt, by default the set's own: give the training
        set's to the tested one.
    brief: see `question` and `answer`. scale: `limits` of the training set where heights must be comparable; else each
        picture has its own. traces: what the answers to imitate say.
    Raises `InvalidValue` for a class that the prompt does not list."""
    from datasets import Dataset, Features, Image, Value

    classes = series.classes if classes is None else classes
    if unknown := set(series.labels) - set(classes):
        raise InvalidValue(
            f"{series.name}: the class {min(unknown)!r} is not among the prompt's: {', '.join(classes)}."
        )
    asked = [{"role": "user", "content": question(series.about, classes, extension=extension, brief=brief)}]
    columns: dict[str, list[Any]] = {name: [] for name in ("prompt", "completion", "image", "label", "insight")}
    for values, label in zip(series.values, series.labels):
        think, insight = traces(values, label)
        said = answer(think, label, insight if extension else "", before=" " if brief else "")
        row = (asked, [{"role": "assistant", "content": said}], render(values, plot or Plot(), series.channels, scale))
        for name, value in zip(columns, (*row, label, insight)):
            columns[name].append(value)
    turns = [{"role": Value("string"), "content": Value("string")}]
    text = Value("string")
    features = {"prompt": turns, "completion": turns, "image": Image(), "label": text, "insight": text}
    made = Dataset.from_dict(columns, Features(features))
    return made if extension else made.remove_columns("insight")


def check_length(rows: Any, processor: Any, room: int, answer_tokens: int) -> int:
    """Tokens of the longest prompt of a data set, with its picture.

    room: tokens that the model takes. answer_tokens: those that an answer may have. Raises `InvalidValue` where both do
    not fit, or where an answer to imitate is longer."""
    from vtok.prompts import ask, encode

    seen: dict[Any, Any] = {}  # one row for each length that there can be
    for row in rows:
        seen.setdefault((row["image"].size, row["prompt"][-1]["content"]), row)
    asked = [ask(row["prompt"][-1]["content"], row["image"]) for row in seen.values()]
    longest = max(encode(processor, [one])["input_ids"].shape[1] for one in asked)
    if longest + answer_tokens > room:
        raise InvalidValue(
            f"The prompt has {longest} tokens with its picture and the answer may have {answer_tokens}, but the model "
            f"takes {room}: draw smaller pictures, list fewer classes or shorten the answer."
        )
    said = max((row["completion"][-1]["content"] for row in rows), key=len)
    count = len(processor.tokenizer(said)["input_ids"])
    if count >= answer_tokens:  # its end is a token, too
        raise InvalidValue(
            f"An answer to imitate has {count} tokens and one more to end, above the {answer_tokens} allowed."
        )
    return longest

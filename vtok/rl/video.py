"""GRPO on clips, which TRL's trainer generates from, and then forgets in its training forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ProcessorMixin
from trl import GRPOTrainer

from vtok.errors import InvalidValue, Unsupported
from vtok.media import Sampling
from vtok.prompts import Conversation, encode
from vtok.rl.clips import check_clips, conversation
from vtok.rl.rollouts import ban_placeholders

COLUMN = "vtok_clips"  # of the samples that the trainer buffers, shuffles and splits


class VideoGRPOTrainer(GRPOTrainer):
    """GRPOTrainer for rows with a column `video` or `videos`, see `vtok.rl.clips`. Takes the arguments of GRPOTrainer.

    sampling: which frames of a clip are taken; 8 over the whole clip by default.

    Clips are clips, with temporal merging and times, in rollouts and in every log-probability. Four methods of TRL's
    (1.16) are overridden, and call it: it makes message parts of images alone, keeps what the processor gave for them
    alone, and hands the model a closed list of arguments, without `pixel_values_videos` and `video_grid_thw`.

    Raises `Unsupported` for a processor without clips, for tools and for other engines, and `InvalidValue`, which names
    the row, for a clip that cannot be decoded."""

    _tag_names = ["trl", "grpo", "video"]

    def __init__(self, *args: Any, sampling: Sampling | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.processing_class, ProcessorMixin):
            raise Unsupported("Clips need the model's processor: processing_class=AutoProcessor.from_pretrained(...).")
        if self.use_vllm or self.tools or self.rollout_func is not None:
            raise Unsupported("Clips are for rollouts of the model itself: without vLLM, tools, rollout functions.")
        for dataset in (self.train_dataset, self.eval_dataset):
            for part in dataset.values() if isinstance(dataset, dict) else () if dataset is None else (dataset,):
                check_clips(part, self.processing_class)
        self.sampling = Sampling(nframes=8) if sampling is None else sampling
        ban_placeholders(self)
        self._seen: list[Conversation] = []  # of the rows that are being generated from
        self._clips: list[dict[str, Any]] | None = None  # for each row that is worked on, what the processor made of it

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """The clips of the rows are opened, and what is made of them travels with the samples."""
        self._seen = [conversation(row, self.sampling) for row in inputs]
        try:
            output = super()._generate_and_score_completions([_without_media(row) for row in inputs])
            return {**output, COLUMN: self._clips}
        finally:
            self._seen, self._clips = [], None

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The prompts of these rows, with their clips."""
        rows = [dict(encode(self.processing_class, [seen], **self.chat_template_kwargs)) for seen in self._seen]
        ids = [row.pop("input_ids")[0].tolist() for row in rows]
        self._refuse_long(ids)
        for row in rows:
            row.pop("attention_mask")
        self._clips = rows
        return ids, None, _joined(rows)

    def _refuse_long(self, ids: list[list[int]]) -> None:
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(map(len, ids)) + self.max_completion_length
        if most is not None and longest > most:
            raise InvalidValue(
                f"A prompt and its answer may be {longest} tokens, and the model knows {most} positions: take fewer "
                f"frames (sampling) or a smaller max_completion_length."
            )

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The samples' clips come with them."""
        self._clips = inputs[COLUMN]
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._clips = None

    def _get_per_token_logps_and_entropies(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Each forward gets its rows' clips."""
        return super()._get_per_token_logps_and_entropies(_WithClips(model, iter(self._clips)), *args, **kwargs)


class _WithClips:
    """A model that is handed the clips of the rows it is called with."""

    def __init__(self, model: nn.Module, clips: Iterator[dict[str, Any]]) -> None:
        self.model, self.clips = model, clips

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        fields = _joined([next(self.clips) for _ in input_ids])
        length = input_ids.shape[1]
        for name, value in fields.items():
            if isinstance(value, list):  # of each token: rows of the prompt alone, without padding
                value = _over(value, kwargs["attention_mask"], length)
            fields[name] = value.to(input_ids.device)
        return self.model(input_ids=input_ids, **kwargs, **fields)


def _joined(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the processor made of some rows, in one: tensors of pictures and clips one behind the other; what has a
    value for each token as lists of lists, which TRL pads. Rows without clips have none of the former."""
    joined: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if name in row]
        if name.endswith("token_type_ids"):
            joined[name] = [value[0].tolist() for value in values]
        else:
            joined[name] = torch.cat([torch.as_tensor(value) for value in values])
    return joined


def _over(values: list[list[int]], mask: Tensor, length: int) -> Tensor:
    """[B, length]: values of prompts at their places in rows padded on the left, 0 elsewhere."""
    full = torch.zeros(len(values), length, dtype=torch.long)
    starts = mask.argmax(1).tolist()
    for row, start, value in zip(full, starts, values):
        row[start : start + len(value)] = torch.tensor(value)
    return full


def _without_media(row: dict[str, Any]) -> dict[str, Any]:
    """The row without pictures, of which TRL would make message parts once more."""
    return {name: value for name, value in row.items() if name not in ("image", "images")}

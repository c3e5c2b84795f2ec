"""Ahead of vLLM's processors, in the process that takes requests: hashes carry the settings, and what is kept is told.

vLLM fixes here how many placeholders a picture has, before any process with the model sees a pixel. So a server
compresses if and only if these classes run, and counting here counts it all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

from vtok.errors import InvalidValue
from vtok.serving.settings import Settings

HELP = (
    "Visual tokens of the requests' pictures and clips: all that the encoder makes (dense), and those that stay (kept)."
)
REMEMBERED = 65536
_TOKENS: OrderedDict[str, tuple[int, int]] = OrderedDict()  # hash of a picture -> its tokens, dense and kept


class SaltedInfo:
    """Ahead of a processing info of vLLM."""

    @property
    def model_id(self) -> str:
        settings = Settings.of(self.get_hf_config())
        return super().model_id if settings is None else settings.salt(super().model_id)


class CountingProcessor:
    """Ahead of a processor of vLLM."""

    counts = True  # but for the pictures that vLLM makes up to measure itself

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        self.counts = False
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)
        finally:
            self.counts = True

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.info.get_hf_config()
        settings = Settings.of(config)
        if settings is not None:
            check_prompt(inputs.prompt, inputs.mm_data_items.get_all_counts(), config)
        made = super().apply(inputs, *args, **kwargs)
        if settings is None or not self.counts:
            return made
        for modality, ranges in made["mm_placeholders"].items():
            items = zip(made["mm_kwargs"][modality], made["mm_hashes"][modality], ranges)
            for data, of_item, place in items:
                if data is not None:  # else it is known by its hash, and has been here before
                    counts = settings.dense_rows, settings.kept_rows
                    _remember(of_item, tuple(count(config, modality, data) for count in counts))
                dense, kept = _TOKENS.get(of_item, (place.get_num_embeds(),) * 2)
                _counter().labels("dense", modality).inc(dense)
                _counter().labels("kept", modality).inc(kept)
        return made


class ReplacingProcessor(CountingProcessor, ABC):
    """Ahead of a processor whose placeholders do not go by the counts of its processing info alone: it is told of the
    pictures and clips that were made."""

    @abstractmethod
    def replacement(self, settings: Settings, update: Any, i: int, item: Any) -> Any:
        """What stands for the i-th picture or clip, `item`, in vLLM's `update` of the prompt."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        from vllm.multimodal.processing import PromptReplacement

        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        settings = Settings.of(self.info.get_hf_config())
        if settings is None:
            return updates
        made = lambda i, update: self.replacement(settings, update, i, out_mm_kwargs[update.modality][i])
        return [
            PromptReplacement(modality=update.modality, target=update.target, replacement=partial(made, update=update))
            for update in updates
        ]


def check_prompt(prompt: Any, counts: Mapping[str, int], config: Any) -> None:
    """Raise `InvalidValue` where a prompt of token ids has placeholders for all of a picture's tokens, as transformers'
    processors write them. vLLM wants one a picture, and would make many of the first and take the others for text."""
    for modality, items in counts.items():
        names = (f"{modality}_token_id", f"{modality}_token_index")
        which = next((getattr(config, name) for name in names if getattr(config, name, None) is not None), None)
        if which is not None and not isinstance(prompt, str) and (n := prompt.count(which)) > items:
            raise InvalidValue(
                f"This prompt has {n} placeholders of {modality}s, and {items} of them: send one each, as the chat "
                f"template writes them; vtok puts in as many as are kept."
            )


def _remember(of_item: str, tokens: tuple[int, int]) -> None:
    _TOKENS[of_item] = tokens
    while len(_TOKENS) > REMEMBERED:
        _TOKENS.popitem(last=False)


@cache
def _counter() -> Any:
    """Made late: only then has vLLM said where several processes put their metrics together."""
    from prometheus_client import Counter

    return Counter("vtok:visual_tokens", HELP, ["kind", "modality"])

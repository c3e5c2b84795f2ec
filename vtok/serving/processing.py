"""Ahead of vLLM's processors, in the process that takes requests: hashes carry the settings, and what is kept is told.

vLLM fixes here how many placeholders a picture has, before any process with the model sees a pixel. So a server
compresses if and only if these classes run, and counting here counts it all.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import Any

from vtok.serving.settings import Settings

HELP = (
    "Visual tokens of the requests' pictures and clips: all that the encoder makes (dense), and those that stay (kept)."
)
REMEMBERED = 65536
_DENSE: OrderedDict[str, int] = OrderedDict()  # hash of a picture -> its dense tokens, of the last so many


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

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        made = super().apply(*args, **kwargs)
        config = self.info.get_hf_config()
        settings = Settings.of(config)
        if settings is None or not self.counts:
            return made
        for modality, ranges in made["mm_placeholders"].items():
            items = zip(made["mm_kwargs"][modality], made["mm_hashes"][modality], ranges)
            for data, of_item, kept in items:
                if data is not None:  # else it is known by its hash, and has been here before
                    _remember(of_item, settings.layout(config, modality, data).n_rows)
                _counter().labels("dense", modality).inc(_DENSE.get(of_item, kept.length))
                _counter().labels("kept", modality).inc(kept.length)
        return made


def _remember(of_item: str, dense: int) -> None:
    _DENSE[of_item] = dense
    while len(_DENSE) > REMEMBERED:
        _DENSE.popitem(last=False)


@cache
def _counter() -> Any:
    """Made late: only then has vLLM said where several processes put their metrics together."""
    from prometheus_client import Counter

    return Counter("vtok:visual_tokens", HELP, ["kind", "modality"])

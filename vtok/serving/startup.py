"""What happens before a server loads its model: what it cannot do is refused, what it has to reckon with is set."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from vtok.errors import Unsupported
from vtok.serving.settings import Settings
from vtok.types import Layout

VLLM = ((0, 31), (0, 34))  # read from the first up to, not with, the second; as in pyproject.toml
GATE = 2.0**-20  # of --video-pruning-rate: that there is one has the runner ask for positions; nobody reads which
ROPES = ("default", "linear", "llama3", "yarn", "mrope")  # those that stay the same when their table is made longer


def hook(before: type | None) -> type:
    """The entry of an architecture in vLLM's `MODELS_CONFIG_MAP`. before: the one that was there."""
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    if before is not None and hasattr(before, "of_vtok"):
        return before

    class Hook(before or VerifyAndUpdateConfig):
        of_vtok = True

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            (before or VerifyAndUpdateConfig).verify_and_update_model_config(model_config)
            if (settings := Settings.of(model_config.hf_config)) is not None:
                prepare_model(settings, model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            (before or VerifyAndUpdateConfig).verify_and_update_config(vllm_config)
            if (settings := Settings.of(vllm_config.model_config.hf_config)) is not None:
                prepare_engine(settings, vllm_config)

    return Hook


def check_version(version: str) -> None:
    """Raise `Unsupported` for a vLLM whose seams nobody has looked at."""
    low, high = VLLM
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        raise Unsupported(f"vLLM {version}: vtok serves with {low[0]}.{low[1]} to {high[0]}.{high[1] - 1}.")


def prepare_model(settings: Settings, model_config: Any) -> None:
    """Raises `Unsupported`. Where kept tokens keep their positions, has the runner ask for them."""
    import vllm

    check_version(vllm.__version__)
    config, media = model_config.hf_config, model_config.multimodal_config
    settings.check(config)
    if media is None:
        raise Unsupported("vtok compresses pictures, and this server was told to take none.")
    if media.video_pruning_rate not in (None, 0, GATE):
        raise Unsupported("Give either --video-pruning-rate or vtok: both drop visual tokens.")
    if not settings.original:
        return
    media.video_pruning_rate = GATE
    if settings.family.one_axis:
        config.mrope_section = [1, 1, 1]  # the runner keeps three rows of positions, the RoPE stays what it is


def lengthen_rope(settings: Settings, model_config: Any, layouts: Sequence[Layout]) -> None:
    """Let the table of RoPE reach the last position of the dense prompt, which may be longer than vLLM's context."""
    text = model_config.hf_text_config
    kind = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind not in ROPES:
        raise Unsupported(
            f"RoPE of type {kind!r} changes with the longest position, so kept tokens cannot keep theirs: "
            f"renumber=true makes positions consecutive."
        )
    longest = settings.longest(model_config.max_model_len, layouts)
    text.max_position_embeddings = max(text.max_position_embeddings, longest)


def prepare_engine(settings: Settings, vllm_config: Any) -> None:
    """Raises `Unsupported`. Has the scheduler, which counts placeholders, encode no more pictures at once than for the
    dense model, and says in the log what is kept."""
    from vllm.logger import init_logger
    from vllm.multimodal import MULTIMODAL_REGISTRY

    parallel, lora = vllm_config.parallel_config, vllm_config.lora_config
    if settings.original and parallel.pipeline_parallel_size > 1:
        raise Unsupported(
            "With pipeline parallelism only the first stage learns where kept tokens stood: give renumber=true, or use "
            "tensor or data parallelism."
        )
    if lora is not None and lora.enable_tower_connector_lora:
        raise Unsupported("LoRA on the vision tower counts its tokens by placeholders, of which vtok leaves too few.")
    layouts = MULTIMODAL_REGISTRY.get_processing_info(vllm_config.model_config).layouts(settings)
    if settings.original and settings.family.one_axis:
        lengthen_rope(settings, vllm_config.model_config, layouts)
    largest = max(layouts, key=lambda layout: layout.n_rows)
    scheduler = vllm_config.scheduler_config
    # both alike: what fits into the cache and not into the budget would be taken in and wait for ever
    budget = encoder_budget(settings, layouts, scheduler.max_num_encoder_input_tokens)
    scheduler.max_num_encoder_input_tokens = scheduler.encoder_cache_size = budget
    init_logger("vllm.vtok").info(
        "vtok keeps %d of the %d tokens of the largest picture, at %s positions: %r",
        settings.rows(largest),
        largest.n_rows,
        "their own" if settings.original else "consecutive",
        settings.compressor,
    )


def encoder_budget(settings: Settings, layouts: Sequence[Layout], dense: int) -> int:
    """Placeholders of the pictures that are encoded at once, given those of the dense model and layouts, the largest
    among them. Each picture fits, whichever size keeps most: where a count is kept, the one of most separators."""
    largest = max(layouts, key=lambda layout: layout.n_rows)
    most = max(settings.most_rows(layout) for layout in layouts)
    return max(int(dense / settings.times(largest)), most)


def mend_cpu_runner() -> None:
    """Of vLLM 0.31 to 0.33, whose runner for CPUs never looks whether a model drops tokens, nor asks for positions."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.model_executor.models.interfaces import supports_multimodal_pruning
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    load_model = CPUModelRunner.load_model
    if hasattr(load_model, "of_vtok"):
        return

    @functools.wraps(load_model)
    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        media = self.model_config.multimodal_config
        asked = media is not None and media.is_multimodal_pruning_enabled()
        self.is_multimodal_pruning_enabled = asked and supports_multimodal_pruning(self.get_model())

    load.of_vtok = True
    CPUModelRunner.load_model = load

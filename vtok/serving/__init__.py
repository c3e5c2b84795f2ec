"""vLLM serves stock checkpoints on fewer visual tokens, chosen by the suite's own compressors.

A plug-in of vLLM, found by its entry point: `--hf-overrides '{"vtok": {"compressor": "divprune", "keep": 0.25}}'`
switches it on, see `settings.py`. Without it vLLM builds its own classes. `vtok serve` is the same, checked.
"""

from __future__ import annotations


def register() -> None:
    """Put our classes in the place of vLLM's. vLLM calls it in each of its processes, some call it twice."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from vtok.serving import startup
    from vtok.serving.families import FAMILIES

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.architecture, family.target)
    for architecture in ModelRegistry.get_supported_archs():  # all, so that none with settings is served without them
        MODELS_CONFIG_MAP[architecture] = startup.hook(MODELS_CONFIG_MAP.get(architecture))
    startup.mend_cpu_runner()


__all__ = ["register"]

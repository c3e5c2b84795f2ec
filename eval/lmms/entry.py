"""The entry point by which lmms-eval finds vtok's model. Imports no model code."""

from __future__ import annotations

from typing import Any


def manifests() -> Any:
    """`--model vtok`: the chat class, or with `--force_simple` the simple one, which log-likelihood tasks need."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="vtok",
        simple_class_path="vtok.eval.lmms.models.VtokSimple",
        chat_class_path="vtok.eval.lmms.models.VtokChat",
    )

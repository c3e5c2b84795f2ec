"""GLM-4.1V: as Qwen2.5-VL. Pictures alone: vLLM's model is not told of the text between the frames of a clip."""

from __future__ import annotations

from vllm.model_executor.models import glm4_1v as vllm
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtok.serving.qwen import InfoOfQwen, ProcessorOfQwen, ServedQwen
from vtok.serving.settings import Settings


class Info(InfoOfQwen, vllm.Glm4vProcessingInfo):
    def get_supported_mm_limits(self) -> dict[str, int | None]:
        limits = super().get_supported_mm_limits()
        return limits if Settings.of(self.get_hf_config()) is None else {"image": limits["image"]}


class Processor(ProcessorOfQwen, vllm.Glm4vMultiModalProcessor):
    pass


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=vllm.Glm4vDummyInputsBuilder)
class Glm4V(ServedQwen, vllm.Glm4vForConditionalGeneration):
    stock = vllm.Glm4vForConditionalGeneration

"""Which families vLLM serves on fewer tokens, by the `model_type` of their configs."""

from __future__ import annotations

from dataclasses import dataclass

from vtok.tower import NEEDS

_CLIP = NEEDS | {"crops"}
_QWEN = frozenset({"frames"})


@dataclass(frozen=True)
class Family:
    """architecture: as a checkpoint's config names it. target: our class, "module:class". shows: what vLLM's own tower
    shows of what compressors may need. one_axis: whether its RoPE has one position a token, and not three.
    """

    architecture: str
    target: str
    shows: frozenset[str] = frozenset()
    one_axis: bool = True


FAMILIES = {
    "llava": Family("LlavaForConditionalGeneration", "vtok.serving.llava:Llava", _CLIP),
    "llava_next": Family("LlavaNextForConditionalGeneration", "vtok.serving.llava_next:LlavaNext", _CLIP),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", "vtok.serving.qwen:Qwen2VL", _QWEN, one_axis=False),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", "vtok.serving.qwen:Qwen25VL", _QWEN, one_axis=False),
    "internvl": Family("InternVLForConditionalGeneration", "vtok.serving.internvl:InternVL", _CLIP),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", "vtok.serving.qwen3:Qwen3VL", _QWEN, one_axis=False),
    "glm4v": Family("Glm4vForConditionalGeneration", "vtok.serving.glm4v:Glm4V", one_axis=False),
}


# families of `vtok.patch` that vLLM has too, and why it does not serve them compressed; by `model_type`
REFUSED = {
    "gemma3": "a picture's tokens see each other, of which vLLM's kernels for CPUs know nothing, so that no answer "
    "could be compared with that of vtok.patch",
    "qwen3_5": "vLLM's linear attention runs in bfloat16 alone on a CPU, so that answers could be compared to .05 of "
    "log-probability and no closer",
    "smolvlm": "its tiles stand apart in the prompt, and vLLM's model is not told of the text between them",
}

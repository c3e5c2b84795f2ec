"""What the tests of serving share: tiny checkpoints, requests, and what vLLM and transformers answer to them."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
if os.environ.get("RUNNER") == "v2":
    # vLLM's second model runner is written in Triton, of which there is no wheel for CPUs: its kernels run in Triton's
    # interpreter, which only has to be let believe that there is a backend.
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

import numpy as np
import torch
from PIL import Image

import vtok
from vtok import adapter, zoo
from vtok.serving.settings import Settings, as_file

TOKENS = 8
QUESTION = "What does the label say? Is it red, green or blue? Say yes or no, and then describe the clip."
BLOCK = 32  # tokens of the smallest block of the cache that vLLM's CPU attention takes
SIZES = ((64, 120), (130, 70), (96, 96), (60, 200))  # (height, width): wide, tall, square, a banner


def checkpoint(family: str, folder: Path) -> Path:
    """A random model whose weights are large enough for logits to depend on the picture."""
    place = folder / family
    if place.is_dir():
        return place
    torch.manual_seed(7)
    model, processor = adapter.load_all()[family].tiny(hidden=128, heads=4, kv_heads=2, layers=4)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(4.0 if "language_model" in name or "lm_head" in name else 2.0)
    if family.startswith("qwen3"):  # as in the released checkpoints; vLLM applies those of pictures to clips
        for name in ("image_mean", "image_std"):
            setattr(processor.image_processor, name, getattr(processor.video_processor, name))
    model.eval().save_pretrained(place)
    processor.save_pretrained(place)
    return place


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    made = [Image.open(zoo.DEMO_IMAGE).convert("RGB")]
    for high, wide in SIZES:
        small = random.integers(0, 255, (high // 8, wide // 8, 3)).astype("uint8")
        made.append(Image.fromarray(small).resize((wide, high), Image.BICUBIC))
    return made


def prompt(processor: Any, parts: list[str], question: str = QUESTION) -> str:
    content = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in parts]
    talk = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    return processor.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)


@dataclass(frozen=True)
class Asked:
    """One request: its text, its pictures, and at most one clip, frames [n, height, width, 3] at `fps`."""

    text: str
    images: tuple[Any, ...] = ()
    clip: Any = None
    fps: float = 16.0

    def to_vllm(self, with_metadata: bool = True) -> dict[str, Any]:
        data: dict[str, Any] = {"image": list(self.images)} if self.images else {}
        if self.clip is not None:
            data["video"] = [(self.clip, self.metadata | {"do_sample_frames": False}) if with_metadata else self.clip]
        return {"prompt": self.text, "multi_modal_data": data}

    @property
    def metadata(self) -> dict[str, Any]:
        n = len(self.clip)
        return {"fps": self.fps, "duration": n / self.fps, "total_num_frames": n, "frames_indices": list(range(n))}

    def to_transformers(self, processor: Any) -> Any:
        if self.clip is None:
            return processor(text=[self.text], images=list(self.images) or None, return_tensors="pt")
        metadata = [{key: value for key, value in self.metadata.items() if key != "duration"}]
        return processor(
            text=[self.text], videos=[self.clip], return_tensors="pt", video_metadata=metadata, do_sample_frames=False
        )


@dataclass(frozen=True)
class Answer:
    """Greedy tokens and the log-probability of each. length: of the prompt. cached: tokens of it that were."""

    tokens: tuple[int, ...]
    logs: tuple[float, ...]
    length: int
    cached: int = 0


def engine(model: str | Path, setting: dict[str, Any] | None, **options: Any) -> Any:
    from vllm import LLM

    kind = json.loads((Path(model) / "config.json").read_text())["model_type"]
    limits = {"image": 4, "video": 1} if kind.startswith(("qwen", "internvl")) else {"image": 4}
    base = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 8, "enforce_eager": True}
    overrides = {} if setting is None else {"vtok": setting}
    return LLM(
        model=str(model), hf_overrides=overrides, limit_mm_per_prompt=limits, block_size=BLOCK, **(base | options)
    )


def switch(llm: Any, setting: dict[str, Any]) -> None:
    """Give a running engine, in this process, other settings; its caches must know them apart by themselves."""

    def of_model(model: Any) -> None:
        model.config.vtok = setting
        model.vtok = Settings.of(model.config)

    llm.llm_engine.model_config.hf_config.vtok = setting
    llm.apply_model(of_model)


def served(llm: Any, asked: list[Asked], tokens: int = TOKENS, **options: Any) -> list[Answer]:
    """What vLLM answers to requests that come together. options: of `LLM.generate`."""
    from vllm import SamplingParams

    how = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=1)
    with_metadata = llm.llm_engine.model_config.hf_config.model_type != "qwen2_vl"
    answers = []
    for given in llm.generate([x.to_vllm(with_metadata) for x in asked], how, use_tqdm=False, **options):
        (out,) = given.outputs
        logs = tuple(of_token[token].logprob for token, of_token in zip(out.token_ids, out.logprobs))
        answers.append(Answer(tuple(out.token_ids), logs, len(given.prompt_token_ids), given.num_cached_tokens or 0))
    return answers


def reference(
    model: Any, processor: Any, setting: dict[str, Any] | None, asked: list[Asked], tokens: int = TOKENS
) -> list[Answer]:
    """What the same checkpoint answers in transformers, patched, one request at a time."""
    handle = None if setting is None else vtok.patch(model, config=as_file(setting))
    answers = []
    for each in asked:
        inputs = each.to_transformers(processor)
        with torch.no_grad():
            out = model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=-1,
                output_logits=True,
                return_dict_in_generate=True,
            )
        dense = inputs["input_ids"].shape[1]
        dropped = 0 if handle is None else sum(handle.trace.n_visual) - sum(handle.trace.n_kept)
        logs = tuple(logits.log_softmax(-1).max().item() for logits in out.logits)
        answers.append(Answer(tuple(out.sequences[0, dense:].tolist()), logs, dense - dropped))
    if handle is not None:
        handle.remove()
    return answers


def difference(ours: list[Answer], theirs: list[Answer]) -> float:
    """The largest of log-probabilities, infinite where tokens or lengths of prompts differ."""
    same = [(x.tokens, x.length) for x in ours] == [(x.tokens, x.length) for x in theirs]
    return max(abs(a - b) for x, y in zip(ours, theirs) for a, b in zip(x.logs, y.logs)) if same else math.inf

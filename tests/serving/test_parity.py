"""vLLM with the plug-in against `vtok.patch` in transformers: the same greedy tokens, log-probabilities within 1e-4."""

import functools
import os

import cases
import numpy as np
import pytest
import torch
from cases import Asked
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

CLOSE = 1e-4
ANY = [
    {"compressor": "divprune", "keep": 0.25},
    {"compressor": "uniform", "keep": 0.5},
    {"compressor": "random", "keep": 0.4, "seed": 3},
    {"compressor": "pool", "keep": 0.3},
    {"compressor": "aim_merge", "keep": 0.3},
    {"compressor": "divprune", "keep": 5},
    {"compressor": "dpp", "keep": 0.3},
]
OF_FRAMES = [
    {"compressor": "vidcom2", "keep": 0.4},
    {"compressor": "evs", "keep": 0.4},
    {"compressor": "frames", "keep": 0.5},
]
OF_TOWER = [
    {"compressor": "scope", "keep": 0.3},
    {"compressor": "visionzip", "keep": 0.4},
    {"compressor": "visionzip", "keep": 0.4, "importance": "received"},
]
OF_CROPS = [{"compressor": "globalcom2", "keep": 0.3}, {"compressor": "globalcom2", "keep": 20}]
METHODS = {
    "llava": OF_TOWER + ANY,
    "llava_next": OF_CROPS + OF_TOWER + ANY,
    "internvl": OF_CROPS + OF_TOWER + ANY,
    "qwen2_vl": ANY + OF_FRAMES,
    "qwen2_5_vl": ANY + OF_FRAMES,
    "qwen3_vl": ANY + OF_FRAMES,
    "glm4v": ANY,
}

OF_CLIPS = {"internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"}


@functools.cache
def of_transformers(place):
    return AutoModelForImageTextToText.from_pretrained(
        place, dtype=torch.float32
    ).eval(), AutoProcessor.from_pretrained(place)


def pictures(processor):
    """One to three in a prompt, of several shapes, with and without text between them, one of them twice; and none."""
    label, wide, tall, square, banner = cases.pictures()
    return [
        Asked(cases.prompt(processor, ["image"]), (label,)),
        Asked(cases.prompt(processor, ["image", "image"]), (wide, tall)),
        Asked(cases.prompt(processor, ["image", " and ", "image", "image"]), (square, square, banner)),
        Asked(cases.prompt(processor, []), ()),
    ]


def clips(processor):
    """At a rate at which frames lie closer in time than a clip is wide: where transformers and vLLM agree on the text
    behind it."""
    random = np.random.default_rng(1)
    made = []
    for n, high, wide in ((6, 112, 168), (4, 168, 112)):
        frames = [random.integers(0, 255, (4, 6, 3)).astype("uint8") for _ in range(n)]
        frames = np.stack([np.asarray(Image.fromarray(frame).resize((wide, high))) for frame in frames])
        made.append(Asked(cases.prompt(processor, ["video"]), clip=frames))
    return made


@pytest.mark.parametrize("family", METHODS)
def test_it_answers_as_the_patched_model_does(family, folder, start):
    place = cases.checkpoint(family, folder)
    model, processor = of_transformers(place)
    llm = start(place, METHODS[family][0] | {"keep": 0.5}, max_num_batched_tokens=64)  # so that prompts come in chunks
    seen = set()
    for setting in METHODS[family]:
        cases.switch(llm, setting)
        asked = pictures(processor) + (clips(processor) if family in OF_CLIPS else [])
        expected = cases.reference(model, processor, setting, asked)
        first = cases.served(llm, asked)
        assert cases.difference(first, expected) < CLOSE, setting
        again = cases.served(llm, asked)  # what is in the prefix cache is not encoded again
        assert cases.difference(again, expected) < CLOSE, setting
        assert all(answer.cached >= cases.BLOCK for answer in again)
        seen |= {answer.tokens for answer in first}
    assert len(seen) > len(METHODS[family])  # the models are not blind


@pytest.mark.skipif(os.environ.get("RUNNER") != "v2", reason="the second model runner has a run of its own: RUNNER=v2")
@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_the_second_runner_answers_alike(family, folder, start):
    place, setting = cases.checkpoint(family, folder), METHODS[family][0]
    model, processor = of_transformers(place)
    llm = start(place, setting, max_num_batched_tokens=64)
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    asked = pictures(processor) + (clips(processor) if family == "qwen3_vl" else [])
    expected = cases.reference(model, processor, setting, asked)
    assert cases.difference(cases.served(llm, asked), expected) < CLOSE
    assert cases.difference(cases.served(llm, asked), expected) < CLOSE

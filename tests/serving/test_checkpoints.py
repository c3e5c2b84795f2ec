"""Checkpoints of other kinds: quantised ones, adapters (LoRA); and stages of a pipeline."""

import json
import os
import shutil

import cases
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_parity import CLOSE, of_transformers, pictures
from transformers import AutoModelForImageTextToText

DIVPRUNE = {"compressor": "divprune", "keep": 0.25}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def own(folder):
    """A model of one's own, to be changed."""
    place = cases.checkpoint("llava", folder)
    return AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32).eval()


def projections(model):
    """Of the decoder, by name."""
    parts = model.model.language_model.named_modules()
    return {name: part for name, part in parts if name.endswith(PROJECTIONS)}


# ---- eight bits ------------------------------------------------------------------------------------------------------
def in_eight_bits(x, dim):
    """Whole numbers from -128 to 127, and their scale: symmetric, by the largest of `dim`."""
    scale = x.abs().amax(dim, keepdim=True).clamp(min=1e-8) / 127
    return (x / scale).round().clamp(-128, 127), scale


def eight_bit_checkpoint(place, made):
    """W8A8 as compressed-tensors writes it: weights by channel, activations by token, on the fly."""
    shutil.copytree(place, made)
    weights = {}
    for name, weight in load_file(place / "model.safetensors").items():
        if "language_model" in name and name.endswith("proj.weight"):
            weight, weights[name + "_scale"] = in_eight_bits(weight, 1)
            weight = weight.to(torch.int8)
        weights[name] = weight
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    of_weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    group = {
        "targets": ["Linear"],
        "weights": of_weights,
        "input_activations": of_weights | {"strategy": "token", "dynamic": True},
    }
    config = json.loads((made / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "language_model.lm_head", "re:.*vision.*", "re:.*projector.*"],
    }
    (made / "config.json").write_text(json.dumps(config))
    return made


def test_eight_bits_answer_as_eight_bits_in_transformers(own, folder, start, tmp_path):
    """The same arithmetic in floating point. A number that lies between two whole ones is rounded this way or that:
    as far apart as that moves it, dense or not."""
    place = eight_bit_checkpoint(cases.checkpoint("llava", folder), tmp_path / "int8")
    processor = of_transformers(cases.checkpoint("llava", folder))[1]
    asked = pictures(processor)
    bare = cases.reference(own, processor, DIVPRUNE, asked)
    for part in projections(own).values():
        whole, scale = in_eight_bits(part.weight.data, 1)
        part.weight.data = whole * scale
        part.register_forward_pre_hook(lambda _, args: (torch.mul(*in_eight_bits(args[0], -1)),))
    expected = cases.reference(own, processor, DIVPRUNE, asked)
    answers = cases.served(start(place, DIVPRUNE), asked)
    assert cases.difference(answers, expected) < 0.05
    assert min(cases.difference([x], [y]) for x, y in zip(answers, expected)) < CLOSE  # where nothing lay between
    assert cases.difference(bare, expected) > 0.05


# ---- adapters --------------------------------------------------------------------------------------------------------
def test_lora_on_the_decoder(own, folder, start, tmp_path):
    from vllm.lora.request import LoRARequest

    torch.manual_seed(3)
    weights = {}
    for name, part in projections(own).items():
        if name.endswith(("q_proj", "v_proj")):
            down, up = torch.randn(8, part.in_features) / 8, torch.randn(part.out_features, 8) / 8
            weights |= {
                f"base_model.model.model.language_model.{name}.lora_{x}.weight": y for x, y in zip("AB", (down, up))
            }
            part.weight.data += 2 * up @ down
    save_file(weights, tmp_path / "adapter_model.safetensors")
    options = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    place = cases.checkpoint("llava", folder)
    bare, processor = of_transformers(place)
    asked = pictures(processor)
    llm = start(place, DIVPRUNE, enable_lora=True, max_lora_rank=8)
    how = {"lora_request": LoRARequest("adapter", 1, str(tmp_path))}
    expected = cases.reference(own, processor, DIVPRUNE, asked)
    assert cases.difference(cases.served(llm, asked, **how), expected) < CLOSE
    assert cases.difference(cases.served(llm, asked), cases.reference(bare, processor, DIVPRUNE, asked)) < CLOSE


# ---- stages ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif("SLOW" not in os.environ, reason="compiles two processes, 85 s: SLOW=1")
def test_two_stages_of_a_pipeline(folder, start):
    """With consecutive positions; with original ones it is refused. Compiled: only when it warms up, which it does not
    eagerly, vLLM's runner for CPUs makes what the second stage is given."""
    place = cases.checkpoint("llava", folder)
    model, processor = of_transformers(place)
    asked = pictures(processor)
    setting = DIVPRUNE | {"renumber": True}
    answers = cases.served(start(place, setting, pipeline_parallel_size=2, enforce_eager=False), asked)
    assert cases.difference(answers, cases.reference(model, processor, setting, asked)) < CLOSE

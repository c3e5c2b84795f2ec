"""What an engine does around the tokens: positions, the stock model, preemption, ranks, budgets, refusals, metrics."""

import cases
import numpy as np
import pytest
from cases import Asked
from prometheus_client import REGISTRY
from test_parity import CLOSE, of_transformers, pictures
from vllm.engine.arg_utils import EngineArgs

from vtok import zoo
from vtok.errors import Unsupported

DIVPRUNE = {"compressor": "divprune", "keep": 0.25}


def configured(place, setting, **options):
    """The configuration of an engine, without the engine."""
    overrides = {} if setting is None else {"vtok": setting}
    base = {"dtype": "float32", "max_model_len": 1024, "max_num_batched_tokens": 8192, "enforce_eager": True}
    limits = {"image": 4}
    made = EngineArgs(model=str(place), hf_overrides=overrides, limit_mm_per_prompt=limits, **(base | options))
    return made.create_engine_config()


def test_consecutive_positions_and_that_it_matters_which(folder, start):
    place = cases.checkpoint("llava", folder)
    model, processor = of_transformers(place)
    asked = pictures(processor)
    setting = DIVPRUNE | {"renumber": True}
    answers = cases.served(start(place, setting), asked)
    assert cases.difference(answers, cases.reference(model, processor, setting, asked)) < CLOSE
    original = cases.reference(model, processor, DIVPRUNE, asked)
    assert cases.difference(answers[:1], original[:1]) > 0.01  # what parity with wrong positions would look like
    assert cases.difference(answers[-1:], original[-1:]) < CLOSE  # no picture, nothing to be moved


@pytest.mark.parametrize(
    ("name", "setting"),
    [("vtok-tiny-llava-next", {"compressor": "globalcom2", "keep": 0.25}), ("vtok-tiny-qwen2.5-vl", DIVPRUNE)],
)
def test_bundled_models_and_too_little_room(name, setting, start):
    """A cache that does not hold all requests at once: some are put off, and begin anew with their answers so far."""
    model, processor = of_transformers(zoo.path(name))
    asked = [Asked(cases.prompt(processor, ["image"]), (picture,)) for picture in cases.pictures()]
    tokens = 2 * cases.BLOCK
    room = {
        "num_gpu_blocks_override": 12,
        "max_model_len": 320,
        "max_num_batched_tokens": 64,
        "disable_log_stats": False,
    }
    llm = start(zoo.path(name), setting, **room)
    answers = cases.served(llm, asked, tokens)
    assert cases.difference(answers, cases.reference(model, processor, setting, asked, tokens)) < CLOSE
    assert sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions") > 0


def test_without_settings_the_model_is_vllms_own(folder, start):
    place = cases.checkpoint("qwen2_5_vl", folder)
    model, processor = of_transformers(place)
    llm = start(place, None)
    assert llm.apply_model(lambda model: type(model).__module__) == ["vllm.model_executor.models.qwen2_5_vl"]
    assert not llm.llm_engine.model_config.multimodal_config.video_pruning_rate
    asked = pictures(processor)
    before = _counted()
    assert cases.difference(cases.served(llm, asked), cases.reference(model, processor, None, asked)) < CLOSE
    assert _counted() == before


def test_what_is_kept_is_counted(folder, start):
    llm = start(cases.checkpoint("llava", folder), DIVPRUNE)
    processor = of_transformers(cases.checkpoint("llava", folder))[1]
    before = _counted()
    for _ in range(2):  # the second time out of the cache of inputs
        cases.served(llm, pictures(processor), 1)
    assert [now - then for now, then in zip(_counted(), before)] == [2 * 6 * 16, 2 * 6 * 4]


def _counted():
    values = ({"kind": kind, "modality": "image"} for kind in ("dense", "kept"))
    return [REGISTRY.get_sample_value("vtok:visual_tokens_total", labels) or 0 for labels in values]


def test_encoders_are_given_no_more_pictures_at_once(folder):
    """The scheduler counts placeholders: at a quarter of them it would hand four times the pictures to the encoder."""
    from vllm.multimodal import MULTIMODAL_REGISTRY
    from vllm.multimodal.encoder_budget import MultiModalBudget

    for family in ("llava_next", "qwen2_5_vl"):
        place = cases.checkpoint(family, folder)
        at_once = {}
        for keep in (None, 0.25, 5):
            setting = None if keep is None else {"compressor": "divprune", "keep": keep}
            budget = MultiModalBudget(configured(place, setting, max_num_batched_tokens=512), MULTIMODAL_REGISTRY)
            at_once[keep] = budget.encoder_compute_budget // budget.mm_max_toks_per_item["image"]
        assert at_once[0.25] <= at_once[None] and at_once[5] <= at_once[None], at_once
        assert min(at_once.values()) >= 1


def test_the_table_of_rope_reaches_the_dense_prompt(folder):
    text = configured(cases.checkpoint("llava", folder), DIVPRUNE, max_model_len=4096).model_config.hf_text_config
    assert text.max_position_embeddings >= 4 * 4096


@pytest.mark.parametrize(
    ("setting", "options", "words"),
    [
        ({"compressor": "fastv"}, {}, "same tokens for all layers"),
        ({"compressor": "divprune", "keep": 3.5}, {}, "keep"),
        (DIVPRUNE, {"video_pruning_rate": 0.5}, "video-pruning-rate"),
        (DIVPRUNE, {"pipeline_parallel_size": 2}, "only the first stage"),
        (DIVPRUNE, {"enable_lora": True, "enable_tower_connector_lora": True}, "by placeholders"),
        ({"compressor": "visionzip"}, {}, "does not show"),
    ],
)
def test_what_cannot_be_is_refused_at_start(folder, setting, options, words):
    with pytest.raises(Exception, match=words):
        configured(cases.checkpoint("qwen2_5_vl", folder), setting, **options)


@pytest.mark.parametrize(
    ("family", "words"), [("qwen3_5", "linear attention"), ("llava_onevision", "not llava_onevision")]
)
def test_a_family_that_is_not_served_is_refused_too(folder, family, words):
    with pytest.raises(Unsupported, match=words):
        configured(cases.checkpoint(family, folder), DIVPRUNE)


def test_clips_of_glm_are_refused(folder, start):
    processor = of_transformers(cases.checkpoint("glm4v", folder))[1]
    film = np.zeros((4, 56, 56, 3), "uint8")
    llm = start(cases.checkpoint("glm4v", folder), DIVPRUNE)
    with pytest.raises(Exception, match="At most 0 video"):
        cases.served(llm, [Asked(cases.prompt(processor, ["video"]), clip=film)])


def test_prompts_in_which_pictures_are_already_long_are_refused(folder, start):
    """vLLM would take the first placeholder for the picture and the others for text."""
    place = cases.checkpoint("llava", folder)
    processor = of_transformers(place)[1]
    asked = pictures(processor)[0]
    ids = asked.to_transformers(processor)["input_ids"][0].tolist()
    llm = start(place, DIVPRUNE)
    with pytest.raises(ValueError, match="16 placeholders of images, and 1"):
        llm.generate([{"prompt_token_ids": ids, "multi_modal_data": {"image": list(asked.images)}}], use_tqdm=False)


def test_one_engine_reads_and_another_answers(folder, start, tmp_path):
    """What the first has read lies in files; the second encodes no picture."""
    place = cases.checkpoint("qwen2_5_vl", folder)
    model, processor = of_transformers(place)
    asked = pictures(processor)
    told = {"shared_storage_path": str(tmp_path)}
    handed = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": told}
    cases.served(start(place, DIVPRUNE, kv_transfer_config=handed), asked, 1)
    llm = start(place, DIVPRUNE, kv_transfer_config=handed)
    llm.apply_model(without_encoder)
    answers = cases.served(llm, asked)
    assert cases.difference(answers, cases.reference(model, processor, DIVPRUNE, asked)) < CLOSE
    assert all(answer.cached >= cases.BLOCK for answer in answers)


def without_encoder(model):
    model.visual = None


def test_rope_that_changes_with_its_length_is_refused(folder):
    place = cases.checkpoint("llava", folder)
    overrides = {
        "vtok": DIVPRUNE,
        "text_config": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    }
    with pytest.raises(Unsupported, match="'dynamic'"):
        EngineArgs(model=str(place), hf_overrides=overrides, enforce_eager=True).create_engine_config()


def test_compiled_it_answers_alike(folder, start):
    place = cases.checkpoint("llava", folder)
    model, processor = of_transformers(place)
    asked = pictures(processor)
    setting = {"compressor": "visionzip", "keep": 0.4}
    answers = cases.served(start(place, setting, enforce_eager=False), asked)
    assert cases.difference(answers, cases.reference(model, processor, setting, asked)) < CLOSE


def test_two_ranks_answer_as_one(folder, start):
    place = cases.checkpoint("llava", folder)
    model, processor = of_transformers(place)
    asked = pictures(processor)
    setting = {"compressor": "visionzip", "keep": 0.4}
    answers = cases.served(start(place, setting, tensor_parallel_size=2), asked)
    assert cases.difference(answers, cases.reference(model, processor, setting, asked)) < CLOSE

"""The pages of public checkpoints: they are what the generator writes, their commands are understood, their counts are
those of the processors and of real runs on the same grids."""

from __future__ import annotations

import copy
import inspect
import re
import shlex
import sys
from pathlib import Path

import contract
import numpy as np
import pytest
import torch
import transformers as T
from typer.main import get_command

import vtok
from vtok import compressor as compressors
from vtok import zoo
from vtok.cli import app
from vtok.eval.pages import checkpoint_pages as pages
from vtok.eval.pages import checkpoints
from vtok.eval.pages.checkpoints import CHECKPOINTS, MEDIA, TASKS, costs, layouts, media

CARDS = Path(__file__).parents[1] / "model_cards"
BY_NAME = {c.name: c for c in CHECKPOINTS}
PHOTO = MEDIA[0]
each = pytest.mark.parametrize("name", BY_NAME)


# ---- the pages -------------------------------------------------------------------------------------------------------
def test_the_committed_pages_are_what_is_generated():
    written = {file.name: file.read_text() for file in CARDS.glob("*.md")}
    assert written == pages.pages(), "run `vtok zoo pages`"


def test_pages_are_no_bundled_models():
    assert not set(BY_NAME) & set(zoo.names())
    assert "vtok-tiny-llava-next" in zoo.names()


def test_every_family_has_a_page():
    assert {c.family for c in CHECKPOINTS} == set(contract.FAMILIES)


@each
def test_a_page_says_what_is_not_measured(name):
    text = (CARDS / f"{name}.md").read_text()
    accuracy, speed = text.index("## Accuracy"), text.index("## Speed")
    assert "not measured yet" in text[accuracy:speed]
    assert "not measured yet" in text[speed : text.index("## Published")]


@each
def test_published_tables_are_whole_and_repeated_rows_are_in_them(name):
    c = BY_NAME[name]
    for table in c.tables:
        assert all(len(row) == len(table.columns) for row in table.rows), table.where
        assert all((table.arxiv, table.setting, table.read, table.where))
    assert set(c.repeats) <= {row[0] for table in c.tables for row in table.rows}


def test_papers_are_those_that_the_compressors_name():
    known = " ".join(cls.paper for cls in compressors.load_all().values())
    timemaster = "2506.13705"  # trains a checkpoint, compresses nothing
    assert {t.arxiv for c in CHECKPOINTS for t in c.tables} - {timemaster} <= set(re.findall(r"\d{4}\.\d{5}", known))


# ---- the commands ----------------------------------------------------------------------------------------------------
def commands(name: str, program: str) -> list[list[str]]:
    text = (CARDS / f"{name}.md").read_text()
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in blocks.splitlines()]
    return [words[1:] for words in lines if words and words[0] == program]


def method_arguments(text: str) -> dict:
    """What of `--model_args` is for the compressors; the rest must be arguments of the model."""
    from lmms_eval.utils import simple_parse_args_string

    from vtok.eval.lmms.models import VtokChat

    own = inspect.signature(VtokChat.__init__).parameters.keys() - {"compressor", "keep", "budget", "config"}
    given = simple_parse_args_string(text)
    assert not given.keys() & {"self", "options"}
    return {key: value for key, value in given.items() if key not in own}


@each
def test_commands_are_understood(name, monkeypatch):
    pytest.importorskip("lmms_eval", reason="the eval extra is not installed")
    from lmms_eval.__main__ import parse_eval_args

    from vtok.eval.lmms import plan as lmms_plan

    c = BY_NAME[name]
    runs = []
    for words in commands(name, "lmms-eval"):
        monkeypatch.setattr(sys, "argv", ["lmms-eval", *words])
        runs.append(parse_eval_args()[1])
    assert len(runs) >= 2 * (2 if c.videos else 1) + 2  # dense and at 25 %: pictures, clips, speed
    asked, places = set(), set()
    for run in runs:
        assert run.model == "vtok" and f"pretrained={c.hub}," in run.model_args
        plan = lmms_plan.plan(**method_arguments(run.model_args))
        assert all(part.keep == 0.25 for part in plan.methods), "a command at another share than its title says"
        asked |= set(run.tasks.split(","))
        places.add(run.output_path)
    assert len(places) == len(runs), "two runs write to one place"
    assert asked == {TASKS[benchmark] for benchmark in c.benchmarks}


@each
def test_the_methods_of_a_page_patch_its_family(name):
    """The model in full size, but for the weights; where a method looks at those, a tiny one as deep."""
    pytest.importorskip("lmms_eval", reason="the eval extra is not installed")
    from vtok.eval.lmms import plan as lmms_plan

    c = BY_NAME[name]
    hollow = c.hollow()
    tiny, _ = contract.ADAPTERS[c.family].tiny(layers=hollow.config.get_text_config().num_hidden_layers)
    for arguments in (*pages.runs(c).values(), *c.repeats.values()):
        plan = lmms_plan.plan(**method_arguments(arguments))
        patch = plan.apply(tiny if any("ffn" in part.needs for part in plan.methods) else hollow)
        assert (patch is None) == (arguments == "compressor=none"), arguments
        if patch is not None:
            patch.remove()


@each
def test_bench_commands_are_understood(name):
    from vtok.eval.bench import workloads

    found = commands(name, "vtok")
    assert len(found) == bool(BY_NAME[name].workload)
    for words in found:
        context = get_command(app).commands["bench"].make_context("bench", words[1:])
        workloads.find(context.params["workload"])
        assert set(context.params["methods"].split(",")) <= set(compressors.load_all())


def test_tasks_exist_in_lmms_eval():
    lmms_eval = pytest.importorskip("lmms_eval", reason="the eval extra is not installed")
    from lmms_eval.tasks import TaskManager

    shipped = Path(lmms_eval.__path__[0]) / "tasks"
    folders = {str(file.parent) for task in TASKS.values() for file in shipped.glob(f"*/{task}.yaml")}  # all take 10 s
    assert set(TASKS.values()) <= set(TaskManager(include_path=sorted(folders), include_defaults=False).all_subtasks)
    assert set(checkpoints.REMARKS) <= set(TASKS.values())


# ---- the sizes -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "billions"),
    {
        "llava-1.5-7b-hf": 7.06,
        "llava-v1.6-vicuna-7b-hf": 7.06,
        "llava-onevision-qwen2-7b-ov-hf": 8.03,
        "InternVL3-8B-hf": 7.94,
        "Qwen2-VL-7B-Instruct": 8.29,
        "Qwen2.5-VL-3B-Instruct": 3.75,
        "Qwen2.5-VL-7B-Instruct": 8.29,
        "Qwen3-VL-8B-Instruct": 8.77,
        "Qwen3-VL-30B-A3B-Instruct": 31.07,
        "gemma-3-4b-it": 4.30,
        "GLM-4.1V-9B-Thinking": 10.29,
        "SmolVLM2-2.2B-Instruct": 2.25,
    }.items(),
)
def test_sizes_add_up_to_the_parameters_that_the_hub_lists(name, billions):
    assert round(sum(p.numel() for p in BY_NAME[name].hollow().parameters()) / 1e9, 2) == billions


# ---- the counts ------------------------------------------------------------------------------------------------------
def llava_processor(c, tok):
    side = c.config["vision_config"]["image_size"]
    pictures = T.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return T.LlavaProcessor(
        pictures, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava_next_processor(c, tok):
    side = c.config["vision_config"]["image_size"]
    pictures = T.LlavaNextImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=c.config["image_grid_pinpoints"],
    )
    return T.LlavaNextProcessor(
        pictures, tok, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def llava_onevision_processor(c, tok):
    size = {"height": 384, "width": 384}
    pictures = T.LlavaOnevisionImageProcessor(size=dict(size), image_grid_pinpoints=c.config["image_grid_pinpoints"])
    return T.LlavaOnevisionProcessor(
        pictures,
        tok,
        T.LlavaOnevisionVideoProcessor(size=dict(size)),
        num_image_tokens=729,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=c.config["vision_aspect_ratio"],
    )


def internvl_processor(c, tok):
    size = {"height": 448, "width": 448}
    pictures = T.GotOcr2ImageProcessor(size=dict(size), max_patches=c.tiles)
    return T.InternVLProcessor(pictures, tok, T.InternVLVideoProcessor(size=dict(size)), image_seq_length=256)


def limits(bounds):
    return {"shortest_edge": bounds[0], "longest_edge": bounds[1]}


def qwen2_vl_processor(c, tok):
    pictures, clips = (
        T.Qwen2VLImageProcessor(size=limits(c.limits)),
        T.Qwen2VLVideoProcessor(size=limits(c.video_limits)),
    )
    return T.Qwen2VLProcessor(pictures, tok, clips)


def qwen2_5_vl_processor(c, tok):
    pictures, clips = (
        T.Qwen2VLImageProcessor(size=limits(c.limits)),
        T.Qwen2VLVideoProcessor(size=limits(c.video_limits)),
    )
    return T.Qwen2_5_VLProcessor(pictures, tok, clips)


def qwen3_vl_processor(c, tok):
    pictures = T.Qwen2VLImageProcessor(size=limits(c.limits), patch_size=16)
    return T.Qwen3VLProcessor(pictures, tok, T.Qwen3VLVideoProcessor(size=limits(c.video_limits)))


qwen3_vl_moe_processor = qwen3_5_processor = qwen3_vl_processor


def glm4v_processor(c, tok):
    pictures, clips = T.Glm4vImageProcessor(size=limits(c.limits)), T.Glm4vVideoProcessor(size=limits(c.video_limits))
    return T.Glm4vProcessor(pictures, tok, clips)


def gemma3_processor(c, tok):
    side = c.config["vision_config"]["image_size"]
    pictures = T.Gemma3ImageProcessor(size={"height": side, "width": side})
    return T.Gemma3Processor(pictures, tok, image_seq_length=c.config["mm_tokens_per_image"])


def smolvlm_processor(c, tok):
    """Idefics3's, which writes the same prompt: SmolVLM's needs another package."""
    side = c.config["vision_config"]["image_size"]
    size = {"size": {"longest_edge": c.tiles * side}, "max_image_size": {"longest_edge": side}}
    return T.Idefics3Processor(T.SmolVLMImageProcessor(**size), tok, image_seq_len=81)


def processor(c):
    """The family's processor with the checkpoint's numbers, and a tokenizer of a few words."""
    tok = copy.copy(contract.tiny(c.family)[1].tokenizer)
    return globals()[f"{c.family}_processor"](c, tok)


def prepared(c, shown):
    """The processor's inputs for one picture or clip, and the id of its placeholders."""
    made, adapter, config = processor(c), contract.ADAPTERS[c.family], contract.tiny(c.family)[0].config
    seen = np.random.default_rng(0).integers(0, 255, (shown.height, shown.width, 3)).astype("uint8")
    if shown.frames and "video" in adapter.encoders:
        frames = [seen] * shown.frames
        facts = {"fps": 2.0, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
        text = contract.mark(made, "video") + "yes"
        inputs = made(text=[text], videos=[frames], video_metadata=[facts], do_sample_frames=False, return_tensors="pt")
        return inputs, adapter.token_id(config, "video")
    count = c.max_frames if shown.frames else 1
    inputs = made(text=[contract.mark(made) * count + "yes"], images=[[seen] * count], return_tensors="pt")
    return inputs, adapter.token_id(config, "image")


@pytest.mark.parametrize(
    ("name", "shown"), [(c.name, m) for c in CHECKPOINTS for m in media(c)], ids=lambda x: getattr(x, "name", x)
)
def test_counts_are_those_of_the_processor(name, shown):
    c = BY_NAME[name]
    inputs, placeholder = prepared(c, shown)
    assert (inputs["input_ids"] == placeholder).sum() == sum(picture.n_rows for picture in layouts(c, shown))


def same_grid(c):
    """A tiny model of the family whose encoder cuts pictures as the checkpoint's does."""
    model, _ = contract.ADAPTERS[c.family].tiny(layers=4)
    config, numbers = model.config, c.config["vision_config"]
    for key in ("image_size", "patch_size"):
        if key in numbers:
            setattr(config.vision_config, key, numbers[key])
    for key in ("image_grid_pinpoints", "vision_aspect_ratio", "scale_factor", "mm_tokens_per_image"):
        if key in c.config:
            setattr(config, key, c.config[key])
    if config.model_type == "internvl":
        config.image_seq_length = 256
    torch.manual_seed(0)
    return type(model)(config).eval()


@pytest.mark.parametrize("name", [c.name for c in CHECKPOINTS if c.hub != "Qwen/Qwen2.5-VL-3B-Instruct"])  # as 7B's
def test_counts_are_those_of_a_real_run(name):
    c = BY_NAME[name]
    inputs, _ = prepared(c, PHOTO)
    model = same_grid(c)
    at_quarter = costs(c, PHOTO, (0.25,))[0]
    with vtok.patch(model, "uniform", keep=0.25) as patch, torch.inference_mode():
        model(**inputs, use_cache=False, logits_to_keep=1)
        assert patch.trace.layouts == layouts(c, PHOTO)
        assert patch.trace.n_kept == [at_quarter.kept]
        entered = {len(places) for layer in range(4) for places in patch.trace.positions_at(layer)}
    text = inputs["input_ids"].shape[1] - layouts(c, PHOTO)[0].n_rows
    separators = layouts(c, PHOTO)[0].n_rows - layouts(c, PHOTO)[0].n
    assert entered == {at_quarter.kept + separators + text}


def test_costs_are_those_that_aim_published_for_the_dense_models():
    for name, shown, text in (("llava-1.5-7b-hf", PHOTO, 40), ("llava-onevision-qwen2-7b-ov-hf", MEDIA[3], 100)):
        c = BY_NAME[name]
        table = next(t for t in c.tables if t.arxiv == "2412.03248")
        printed = next(row for row in table.rows if row[0] == "dense")[table.columns.index("TFLOPs")]
        shape = vtok.engine.accounting.TextShape.of(c.build())
        n = sum(picture.n for picture in layouts(c, shown)) + text
        assert f"{vtok.engine.accounting.prefill_flops(shape, [n] * shape.layers) / 1e12:.2f}" == printed
    llava = costs(BY_NAME["llava-1.5-7b-hf"], PHOTO, (1.0, 0.25))
    assert f"{llava[0].flops / 1e12:.2f}" == "8.18"
    # cache: two of 4096 values a token and layer, 2 bytes each
    assert [cost.bytes for cost in llava] == [616 * 32 * 2 * 4096 * 2, 184 * 32 * 2 * 4096 * 2]
    # separators stay: 36 newlines behind the rows of the crops
    nexts = costs(BY_NAME["llava-v1.6-vicuna-7b-hf"], PHOTO, (0.25,))[0]
    assert (nexts.kept, nexts.bytes) == (576, (576 + 36 + 40) * 32 * 2 * 4096 * 2)

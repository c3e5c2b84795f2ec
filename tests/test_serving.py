"""Serving, as far as it goes without vLLM: settings and refusals, counts, positions and their digits, the command.

What vLLM answers is compared in tests/serving, which has an environment of its own.
"""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from contract import one_line_error
from transformers import AutoConfig
from typer.testing import CliRunner

import vtok
from vtok import adapter, cli, zoo
from vtok.adapters.llava_next import anyres_layout
from vtok.compressor import load_all
from vtok.errors import InvalidValue, MissingExtra, UnknownName, Unsupported
from vtok.serving import launch, startup
from vtok.serving.families import FAMILIES, REFUSED
from vtok.serving.positions import (
    LIMIT,
    Run,
    base_of,
    dense_prompt,
    from_digits,
    places_of,
    prompt_positions,
    to_digits,
)
from vtok.serving.settings import Settings, refuse
from vtok.stages.pre_llm import place
from vtok.types import Layout, Plane

LLAVA_NEXT, QWEN = "vtok-tiny-llava-next", "vtok-tiny-qwen2.5-vl"


@pytest.fixture(scope="module")
def config():
    """Gives a bundled model's config with settings in it."""

    def make(name, setting):
        made = AutoConfig.from_pretrained(zoo.path(name))
        if setting is not None:
            made.vtok = setting
        return made

    return make


# ---- settings --------------------------------------------------------------------------------------------------------
def test_settings_are_a_file_of_save_or_one_compressor(config):
    from vtok.config import describe

    short = Settings.of(config(LLAVA_NEXT, {"compressor": "globalcom2", "keep": 0.5, "tau": 20.0}))
    saved = Settings.of(config(LLAVA_NEXT, describe([vtok.GlobalCom2(keep=0.5, tau=20.0)])))
    assert short.compressor == saved.compressor == vtok.GlobalCom2(keep=0.5, tau=20.0)
    assert short.adapter.family == "llava_next"
    assert Settings.of(config(LLAVA_NEXT, None)) is None
    assert Settings.of(config(LLAVA_NEXT, {"compressor": "divprune", "keep": 1.0})) is None  # so vLLM's own classes run


def test_settings_may_stand_in_a_checkpoints_own_config(config, tmp_path):
    config(LLAVA_NEXT, {"compressor": "uniform", "keep": 7}).save_pretrained(tmp_path)
    assert Settings.of(AutoConfig.from_pretrained(tmp_path)).compressor == vtok.Uniform(keep=7)


def test_hashes_tell_settings_apart(config):
    keeps = [Settings.of(config(LLAVA_NEXT, {"compressor": "divprune", "keep": keep})) for keep in (0.25, 0.5, 64)]
    assert len({settings.salt("model") for settings in keeps}) == 3


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ("divprune", InvalidValue, "compressor"),
        ({"name": "divprune"}, InvalidValue, "compressor"),
        ({"compressor": "divprun"}, UnknownName, "divprune"),
        ({"compressor": "divprune", "kep": 0.5}, InvalidValue, "keep"),
        ({"compressor": "divprune", "keep": 0}, InvalidValue, "keep"),
        ({"compressor": "divprune", "keep": True}, InvalidValue, "keep"),
        ({"compressor": "aim"}, Unsupported, "aim_merge . aim_prune"),
        ({"compressors": [{"name": "divprune"}, {"name": "h2o", "keep": 0.2}]}, Unsupported, "divprune . h2o"),
        ({"compressor": "fastv"}, Unsupported, "same tokens for all layers"),
        ({"compressor": "tome"}, Unsupported, "acts at blocks"),
        ({"compressor": "downsample"}, Unsupported, "acts at pixels"),
        ({"compressor": "snapkv", "keep": 0.2}, Unsupported, "acts at kv"),
        ({"compressor": "globalcom2", "exact_count": False}, Unsupported, "before it sees a pixel"),
    ],
)
def test_what_cannot_be_served_is_refused(config, setting, error, words):
    with pytest.raises(error, match=words):
        Settings.of(config(LLAVA_NEXT, setting))


def test_who_reads_the_question_or_the_content_is_refused():
    told = {}
    for name, cls in load_all().items():
        given = {
            "text_guided": cls.text_guided,
            "stage": cls.stage,
            "needs_now": cls.needs,
            "adaptive_now": cls.adaptive,
        }
        try:
            refuse(SimpleNamespace(name=name, trained=cls.trained, **given))
        except Unsupported as error:
            told[name] = str(error)
    assert "reads the question" in told["quecc"] and "sees a pixel" in told["tcc"]
    assert "weights of its own" in told["tokenflex"] and "sees a pixel" in told["flashvid_merge"]
    assert "needs encoder_attention, frames, which no family shows" in told["fastvid"]
    served = {
        "aim_merge",
        "divprune",
        "dpp",
        "evs",
        "frames",
        "globalcom2",
        "pool",
        "random",
        "scope",
        "uniform",
        "vidcom2",
        "visionzip",
    }
    assert served == load_all().keys() - told.keys()


def test_towers_that_show_nothing_and_families_of_another_rope(config):
    with pytest.raises(Unsupported, match="needs cls_probs, encoder_keys") as error:
        Settings.of(config(QWEN, {"compressor": "visionzip"})).check(config(QWEN, None))
    assert "received" not in str(error.value)  # which would not help here
    with pytest.raises(Unsupported, match="M-RoPE"):
        Settings.of(config(QWEN, {"compressor": "divprune", "renumber": True}))
    siglip = config(LLAVA_NEXT, {"compressor": "visionzip"})
    siglip.vision_config.model_type, siglip.vision_feature_select_strategy = "siglip_vision_model", "full"
    with pytest.raises(Unsupported, match="importance='received'"):
        Settings.of(siglip).check(siglip)
    Settings.of(config(LLAVA_NEXT, {"compressor": "visionzip"})).check(config(LLAVA_NEXT, None))
    other = config(QWEN, {"compressor": "divprune"})
    other.model_type = "gemma3"
    with pytest.raises(Unsupported, match="not gemma3: a picture's tokens see each other"):
        Settings.of(other)


def test_families_are_those_of_adapters():
    assert FAMILIES.keys() | REFUSED.keys() <= adapter.load_all().keys()
    assert not FAMILIES.keys() & REFUSED.keys()


def test_a_vllm_that_nobody_looked_at_is_refused():
    for version in ("0.31.0", "0.33.2+cpu"):
        startup.check_version(version)
    for version in ("0.30.2", "0.34.0", "1.0.0"):
        with pytest.raises(Unsupported, match=version):
            startup.check_version(version)


# ---- counts ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep", [0.1, 0.3, 1, 7])
@pytest.mark.parametrize("name", ["aim_merge", "divprune", "pool", "random", "uniform"])
def test_as_many_rows_stay_as_placeholders_were_counted(config, name, keep):
    settings = Settings.of(config(LLAVA_NEXT, {"compressor": name, "keep": keep}))
    for size in ((32, 32), (90, 31), (20, 300), (300, 11)):
        layout = anyres_layout(4, (2, 2), size)
        placed = place(settings.compressor, torch.randn(2, layout.n_rows, 8), layout)
        assert placed.keep.sum(1).tolist() == [settings.rows(layout)] * 2
        longest = settings.longest(settings.rows(layout), [layout])
        assert layout.n_rows <= longest or not isinstance(keep, float)


def test_the_table_of_rope_reaches_the_largest_picture(config):
    for keep in (0.01, 0.25, 3, 10_000):
        bare = config(LLAVA_NEXT, {"compressor": "divprune", "keep": keep})
        settings = Settings.of(bare)
        layouts = [settings.layout_of_size(bare, size) for size in bare.image_grid_pinpoints]
        for layout in layouts:
            assert settings.longest(settings.rows(layout), layouts) >= layout.n_rows


def test_every_picture_fits_into_the_encoders_budget(config):
    """One that does not would wait for ever: where a count is kept, a tall one has more newlines than the largest."""
    bare = config(LLAVA_NEXT, {"compressor": "divprune", "keep": 5})
    bare.image_grid_pinpoints = [[128, 128], [192, 64]]  # 2 x 2 crops, and three on top of each other
    settings = Settings.of(bare)
    square, tall = (settings.layout_of_size(bare, size) for size in bare.image_grid_pinpoints)
    assert square.n_rows > tall.n_rows and settings.rows(square) < settings.rows(tall)
    assert startup.encoder_budget(settings, [square, tall], 1) >= settings.rows(tall)
    assert startup.encoder_budget(settings, [square, tall], 10_000) == int(10_000 / settings.times(square))
    pooled = Settings.of(config(LLAVA_NEXT, {"compressor": "pool", "keep": 0.3}))
    for side in range(2, 12):  # some keep more than larger ones
        layout = Layout((Plane(side, side),))
        smaller = [Layout((Plane(rows, cols),)) for rows in range(1, side + 1) for cols in range(1, side + 1)]
        assert max(map(pooled.rows, smaller)) <= pooled.most_rows(layout)


def test_pictures_of_more_tokens_than_two_digits_hold_are_refused(config):
    settings = Settings.of(config(QWEN, {"compressor": "uniform"}))
    grid = torch.tensor([[1, 514, 514]])  # 257 x 257 tokens
    with pytest.raises(Unsupported, match="66,049 tokens"):
        settings.layouts(config(QWEN, None), "image", {"image_grid_thw": grid})


# ---- positions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_digits_are_exact_in_every_dtype(dtype):
    positions = torch.stack([torch.arange(LIMIT), torch.arange(LIMIT).flip(0)])
    channels = to_digits(positions, dtype)
    assert channels.shape == (LIMIT, 4) and channels.dtype == dtype
    assert torch.equal(from_digits(channels), positions)
    assert positions[0].to(torch.bfloat16).long()[257] == 256  # what a plain channel would do


RUNS = [Run(2, 3, 7), Run(5, 2, 9), Run(9, 1, 1)]  # two pictures side by side, text, and one that is kept whole
TOKENS = [11, 12, 9, 9, 9, 9, 9, 13, 14, 9, 15]


def dense_by_hand():
    """The dense prompt, and for each token of the compressed one its place there: of a picture's its first's."""
    dense, place, starts = [], [], {run.start: run for run in RUNS}
    i = 0
    while i < len(TOKENS):
        if i in starts:
            run = starts[i]
            place += [len(dense) + j for j in range(run.kept)]
            dense += [9] * run.dense
            i += run.kept
        else:
            place.append(len(dense))
            dense.append(TOKENS[i])
            i += 1
    return dense, place


def test_text_stands_where_it_stands_in_the_dense_prompt():
    dense, place = dense_by_hand()
    positions, end = prompt_positions(len(TOKENS), RUNS)
    assert end == len(dense) == 11 + 4 + 7
    text = [i for i, token in enumerate(TOKENS) if token != 9]
    assert positions[0, text].tolist() == [place[i] for i in text]
    assert positions[1].tolist() == positions[0].tolist() and positions[2].unique().tolist() == [end]
    for run in RUNS:  # all of a picture at its first, until it has been encoded
        assert positions[0, run.start : run.start + run.kept].unique().tolist() == [place[run.start]]
    assert prompt_positions(3, [])[0].tolist() == [[0, 1, 2], [0, 1, 2], [3, 3, 3]]


def test_the_dense_prompt_of_a_compressed_one():
    dense, place = dense_by_hand()
    tokens, runs, found = dense_prompt(TOKENS, RUNS[::-1])
    assert (tokens, found) == (dense, place)
    assert runs == [Run(2, 7, 7), Run(9, 9, 9), Run(20, 1, 1)]
    assert dense_prompt([5, 6], []) == ([5, 6], [], [0, 1])


def test_where_the_pictures_of_a_chunk_are():
    media = torch.tensor(TOKENS) == 9
    assert places_of(media, 0, 5).tolist() == [2, 3, 4, 5, 6]
    assert places_of(media, 4, 3).tolist() == [4, 5, 6]  # in the middle of the first
    assert places_of(media, 7, 1).tolist() == [9]
    positions = torch.arange(len(TOKENS)).expand(3, -1) * 10
    assert base_of(positions, media, torch.tensor([4, 9])).tolist() == [[11, 81]] * 3
    assert base_of(positions, media.roll(-2), torch.tensor([0])).tolist() == [[0]] * 3  # a prompt that begins with one


# ---- the command -----------------------------------------------------------------------------------------------------
def test_options_of_vllm_are_handed_on():
    setting = {"compressors": [{"name": "divprune"}]}
    made = launch.arguments("m", setting, ["--port", "1", '--hf_overrides={"a": 1}', "--dtype=float32"])
    assert made == ["serve", "m", "--hf-overrides", f'{{"a": 1, "vtok": {setting!s}}}'.replace("'", '"')] + [
        "--port",
        "1",
        "--dtype=float32",
    ]
    for wrong in (["--hf-overrides", "{"], ["--hf-overrides"], ["--hf-overrides", '{"vtok": 1}']):
        with pytest.raises(InvalidValue, match="hf-overrides"):
            launch.arguments("m", setting, wrong)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--compressor", "fastv"], "acts at llm"),
        (["--compressor", "divprune", "--keep", "2.5"], "keep"),
        ([], "--compressor or --config"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--compressor", "divprune:renumber=true", "--check"], "vLLM"),  # refused by nothing but that it is not here
    ],
)
def test_the_command_refuses_before_anything_loads(words, told):
    result = CliRunner().invoke(cli.app, ["serve", LLAVA_NEXT, *words])
    one_line_error(result.exit_code, result.output, told)


def test_without_vllm_it_says_what_to_install():
    with pytest.raises(MissingExtra, match=r"vtok\[vllm\]"):
        launch.check_installed()


def test_the_plug_in_is_found_and_light():
    """vLLM reads it in each process, and in one only to inspect classes."""
    code = (
        "from importlib.metadata import entry_points; import sys;"
        "(point,) = entry_points(group='vllm.general_plugins', name='vtok'); assert callable(point.load());"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_pure_part_asks_for_no_version_of_transformers():
    """vLLM and TRL pin older ones than `vtok.patch` takes."""
    code = (
        "import transformers; transformers.__version__ = '5.16.1'; from vtok.serving.settings import Settings;"
        "from vtok import zoo; from transformers import AutoConfig;"
        f"config = AutoConfig.from_pretrained(zoo.path({QWEN!r})); config.vtok = {{'compressor': 'divprune'}};"
        "assert Settings.of(config).compressor.name == 'divprune'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_layout_of_a_request_is_that_of_its_grid(config):
    settings = Settings.of(config(QWEN, {"compressor": "uniform"}))
    item = {
        "image_grid_thw": SimpleNamespace(data=torch.tensor([1, 8, 12])),
        "pixel_values": SimpleNamespace(data=None),
    }
    assert settings.layouts_of(config(QWEN, None), "image", item) == [Layout((Plane(4, 6, "image"),))]
    assert settings.dense_rows(config(QWEN, None), "image", item) == 24
    assert settings.kept_rows(config(QWEN, None), "image", item) == 6
    made_elsewhere = item | {"image_embeds": SimpleNamespace(data=None)}
    assert settings.kept_rows(config(QWEN, None), "image", made_elsewhere) == 24


def test_a_prompt_with_all_placeholders_of_a_picture_is_refused(config):
    from vtok.serving.processing import check_prompt

    which = config(QWEN, None).image_token_id
    check_prompt([1, which, 2, which], {"image": 2}, config(QWEN, None))
    check_prompt("words", {"image": 1}, config(QWEN, None))
    with pytest.raises(InvalidValue, match="3 placeholders of images, and 2"):
        check_prompt([which, which, 1, which], {"image": 2}, config(QWEN, None))


def test_a_run_of_text_in_the_dense_prompt():
    """A clip of Qwen3-VL: placeholders alone in the compressed prompt, frames between timestamps in the dense one."""
    run = Run(1, 3, 5, (7, 9, 9, 8, 9))
    tokens, runs, place = dense_prompt([5, 9, 9, 9, 6], [run])
    assert tokens == [5, 7, 9, 9, 8, 9, 6] and place == [0, 1, 2, 3, 6]
    assert [(run.start, run.dense) for run in runs] == [(1, 5)]


def test_pictures_of_internvl_by_how_their_tiles_lie():
    from vtok.adapters.internvl import tile_grid, tiled

    config = AutoConfig.for_model("internvl", downsample_ratio=0.5)
    family = adapter.of(config)
    made = family.layouts(config, "image", {"tile_grids": torch.tensor([[1, 1], [2, 3]])})
    assert made == [tiled(16, (1, 1)), tiled(16, (2, 3))] and [layout.n for layout in made] == [256, 7 * 256]
    picture = torch.rand(3, 32, 48)
    tiles = picture.unflatten(1, (2, 16)).unflatten(3, (3, 16)).permute(1, 3, 0, 2, 4).flatten(0, 1)
    thumbnail = torch.nn.functional.adaptive_avg_pool2d(picture, 16)
    assert tile_grid(torch.cat([tiles, thumbnail[None]])) == (2, 3)
    assert tile_grid(tiles[:1]) == (1, 1)

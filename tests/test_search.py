"""The searches on metrics whose best schedule is known, their memory, and the command line on a tiny model."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from contract import one_line_error
from typer.testing import CliRunner

from vtok import cli
from vtok.errors import InvalidValue, MissingExtra
from vtok.search import psigmoid as psigmoid_module
from vtok.search import schedules
from vtok.search.evaluations import Evaluations
from vtok.search.gsearch import gsearch
from vtok.search.psigmoid import psigmoid

NEEDED = (1.0, 1.0, 0.83, 0.8, 0.61, 0.6, 0.6, 0.25, 0.1, 0.02)


def shortfall(rates):
    """1 - what the rates lack of the needed ones: monotone, and 1 for any schedule that lacks nothing."""
    return 1 - sum(max(0.0, need - r) for need, r in zip(NEEDED, rates))


# ---- G-Search ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", [1 / 64, 1 / 10, 1 / 7])
def test_gsearch_finds_what_is_needed(step):
    found = gsearch(shortfall, 10, tolerance=0.0, step=step, first_full=2)
    levels = round(1 / step)
    assert found == pytest.approx([math.ceil(need * levels - 1e-9) / levels for need in NEEDED])
    assert schedules.check(found) == found


def test_gsearch_spends_its_tolerance_on_the_first_layers():
    """Greedy: by loops over all candidates, layer by layer."""
    expected, levels = [1.0] * 10, 64
    for layer in range(2, 10):
        passing = [
            c / levels
            for c in range(1, round(expected[layer] * levels) + 1)
            if shortfall(expected[:layer] + [c / levels] * (10 - layer)) >= 0.9
        ]
        expected[layer:] = [min(passing)] * (10 - layer)
    found = gsearch(shortfall, 10, tolerance=0.1)
    assert found == tuple(expected)
    assert found[1] == 1 and found[2] < NEEDED[2]
    assert shortfall(found) >= 0.9
    # a tolerance is a fraction of the score's magnitude: the same metric, ten times as high or below zero
    assert gsearch(lambda rates: 10 * shortfall(rates), 10, tolerance=0.1) == found
    assert gsearch(lambda rates: shortfall(rates) - 2, 10, tolerance=0.1) == found
    # or 0 for the full model, as a distance to it: nothing may be lost
    assert gsearch(lambda rates: shortfall(rates) - 1, 10, tolerance=0.1) == gsearch(shortfall, 10, tolerance=0.0)


def test_gsearch_asks_once_and_not_often():
    asked = []
    found = gsearch(lambda rates: asked.append(rates) or shortfall(rates), 10, tolerance=0.0)
    assert len(asked) == len(set(asked)) <= 1 + 6 * 9
    assert all(schedules.check(rates) == rates for rates in asked)
    assert asked[0] == (1.0,) * 10
    cut = []
    for most in (1, 5, 17):
        cut.clear()
        early = gsearch(lambda rates: cut.append(rates) or shortfall(rates), 10, tolerance=0.0, max_evals=most)
        assert len(cut) == most and cut == asked[:most]
        assert shortfall(early) == pytest.approx(1.0)  # stopped anywhere, what it has passes
    assert early != found


def test_gsearch_in_groups():
    found = gsearch(shortfall, 10, tolerance=0.0, step=0.01, first_full=2, group=3)
    assert found == pytest.approx((1, 1, 0.83, 0.83, 0.83, 0.6, 0.6, 0.6, 0.1, 0.1))


@pytest.mark.parametrize(
    "options",
    [{"step": 0.3}, {"step": 0}, {"step": 1}, {"tolerance": -0.1}, {"tolerance": 1.0}, {"tolerance": float("nan")}]
    + [{"first_full": 10}, {"first_full": 0}, {"group": 0}, {"max_evals": 0}],
)
def test_gsearch_refuses(options):
    with pytest.raises(InvalidValue, match=next(iter(options))):
        gsearch(shortfall, 10, **options)


# ---- P-Sigmoid --------------------------------------------------------------------------------------------------
def distance_to(a, k, mean=0.25, n=32):
    best = schedules.sigmoid(n, a, k, schedules.midpoint(mean, n, a, k))
    return best, lambda rates: -sum((x - y) ** 2 for x, y in zip(best, rates))


def test_psigmoid_finds_the_best_of_two_parameters():
    pytest.importorskip("skopt")
    best, metric = distance_to(0.7, 0.4)
    found, tried = psigmoid(metric, 32, 0.25, evaluations=12, seed=1)
    assert all(schedules.mean(c.rates) == pytest.approx(0.25, abs=1e-9) for c in tried)
    assert len(tried) == 12 and found.score == max(c.score for c in tried)
    start = max(c.score for c in tried[:5])
    assert found.score > start / 10  # the model of the score is of use beyond its first points
    assert found.rates == pytest.approx(best, abs=0.15)
    assert psigmoid(metric, 32, 0.25, evaluations=1, seed=1)[0] == tried[0]
    assert psigmoid(metric, 32, 0.25, evaluations=1, seed=2)[0].a != tried[0].a


def test_psigmoid_of_one_parameter_is_a_grid(monkeypatch):
    monkeypatch.setitem(sys.modules, "skopt", None)  # not needed
    _, metric = distance_to(1.0, 0.35)
    found, tried = psigmoid(metric, 32, 0.25, a=1.0, evaluations=12)
    assert {c.a for c in tried} == {1.0}
    ratios = [y.k / x.k for x, y in pairwise(tried)]
    assert tried[0].k == pytest.approx(0.05) and tried[-1].k == pytest.approx(2.0)
    assert ratios == pytest.approx([40 ** (1 / 11)] * 11)
    assert abs(math.log(found.k / 0.35)) <= math.log(ratios[0])
    found, tried = psigmoid(metric, 32, 0.25, k=0.5, evaluations=5)
    assert {c.k for c in tried} == {0.5} and tried[0].a == pytest.approx(0.2) and tried[-1].a == 1.0
    assert psigmoid(metric, 32, 0.25, a=0.5, k=0.5)[1] == (psigmoid(metric, 32, 0.25, a=0.5, k=0.5)[0],)
    with pytest.raises(MissingExtra, match=r"vtok\[search\]"):
        psigmoid(metric, 32, 0.25)


def test_psigmoid_raises_the_amplitude_to_what_the_mean_needs():
    _, tried = psigmoid(schedules.mean, 8, 0.7, k=1.0, evaluations=4)  # two full layers: (0.7 * 8 - 2) / 6
    assert tried[0].a == pytest.approx(0.6)
    assert tried[0].rates[2:] == pytest.approx([0.6] * 6, rel=1e-3)  # flat, as FastV's
    for low, high, mean in ((0.0625, 1.0, 0.05), (0.0625, 0.53125, 0.6)):
        with pytest.raises(InvalidValue, match=f"from {low:.4f} to {high:.4f}"):
            psigmoid(schedules.mean, 32, mean, a=None if high == 1 else 0.5, k=1.0)
    with pytest.raises(InvalidValue):
        psigmoid(schedules.mean, 32, 0.5, evaluations=0)


# ---- memory -----------------------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


def count(metric, stop=None):
    """The metric, killed at its `stop`-th call; and the list of its calls."""
    calls = []

    def counted(rates):
        calls.append(rates)
        if len(calls) == stop:
            raise Killed
        return metric(rates)

    return counted, calls


SEARCHES = {
    "gsearch": lambda evaluate: gsearch(evaluate, 10, tolerance=0.01),
    "grid": lambda evaluate: psigmoid(evaluate, 10, 0.4, a=1.0, evaluations=9)[0],
    "bayes": lambda evaluate: psigmoid(evaluate, 10, 0.4, evaluations=7, seed=3)[0],
}


@pytest.mark.parametrize("name", SEARCHES)
def test_kill_and_go_on(name, tmp_path):
    if name == "bayes":
        pytest.importorskip("skopt")
    metric, all_calls = count(shortfall)
    whole = SEARCHES[name](metric)
    file, calls = tmp_path / "trace.json", []
    for stop in (1, 3, 3):  # killed thrice
        metric, these = count(shortfall, stop)
        with pytest.raises(Killed):
            SEARCHES[name](Evaluations(metric, file, {"search": name}))
        calls += these[:-1]
    metric, these = count(shortfall)
    evaluations = Evaluations(metric, file, {"search": name}, {"machine": "this"})
    assert SEARCHES[name](evaluations) == whole
    assert [*calls, *these] == all_calls  # nothing was computed twice, and in the same order
    log = json.loads(file.read_text())
    assert [tuple(item["rates"]) for item in log["evaluations"]] == all_calls
    assert all(item["score"] == shortfall(item["rates"]) for item in log["evaluations"])
    assert [rates for rates, _ in evaluations.asked] == all_calls
    assert log["runs"][-1] == {"machine": "this"}


def test_a_real_kill_leaves_a_whole_trace(tmp_path):
    code = f"""
        import os, signal
        from vtok.search.evaluations import Evaluations
        from vtok.search.gsearch import gsearch
        calls = []
        def metric(rates):
            calls.append(rates)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return rates[-1]
        gsearch(Evaluations(metric, {str(tmp_path / "trace.json")!r}), 6, tolerance=0.5)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(json.loads((tmp_path / "trace.json").read_text())["evaluations"]) == 5
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_traces_of_something_else_are_refused(tmp_path):
    file = tmp_path / "trace.json"
    Evaluations(shortfall, file, {"seed": 0, "model": "a"})((1.0,) * 10)
    with pytest.raises(InvalidValue, match="another model, seed"):
        Evaluations(shortfall, file, {"seed": 1, "model": "b"})
    for text in ("[]", "{", '{"settings": {}}', '{"settings": {}, "runs": [], "evaluations": [1]}'):
        file.write_text(text)
        with pytest.raises(InvalidValue, match="not the trace of a search"):
            Evaluations(shortfall, file)
    with pytest.raises(InvalidValue, match="could not be written"):
        Evaluations(shortfall, "/proc/no/such.json")((1.0,) * 10)


def test_a_metric_that_is_no_number_is_refused():
    for value in (float("nan"), float("inf")):
        with pytest.raises(InvalidValue, match="cannot be compared"):
            Evaluations(lambda rates, value=value: value)((1.0, 0.5))


# ---- questions and command line ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model():
    from vtok import zoo

    return zoo.load("vtok-tiny-llava-next")


def test_questions_are_of_the_validation_split():
    from vtok.eval.results.searched import validation
    from vtok.eval.tasks import scenes

    asked = validation(10)
    assert sum(len(questions) for _, questions in asked) == 10
    assert asked[0][1] == validation(3)[0][1] + asked[0][1][3:]
    scene = scenes.TASK.item("val", 2026, 0)
    assert asked[0][0].tobytes() == scene.images[0].tobytes()
    assert set(asked[0][1]) <= set(scene.questions)
    assert len({q.category for q in asked[0][1]}) == len(asked[0][1])


def test_log_probabilities_by_single_forwards(model):
    from vtok.eval.results.searched import validation
    from vtok.search.questions import log_probability, teacher_forced

    network, processor = model
    asked = validation(9)
    batches = [teacher_forced(processor, image, questions, network) for image, questions in asked]
    slow = []
    for image, questions in asked:
        for q in questions:
            chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}]
            text = processor.apply_chat_template(chat, add_generation_prompt=True)
            inputs = processor(text=[text], images=[image], return_tensors="pt")
            answer = processor.tokenizer(f" {q.answer}</s>", add_special_tokens=False)["input_ids"]
            total = 0.0
            for token in answer:
                with torch.no_grad():
                    total += network(**inputs).logits[0, -1].log_softmax(-1)[token].item()
                inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
                inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            slow.append(total)
    assert log_probability(network, batches) == pytest.approx(sum(slow) / len(slow), abs=1e-4)


@pytest.mark.parametrize("behind", ["", "\n"])
def test_answers_begin_as_the_template_lets_them(model, behind):
    """A template that ends in a line break brings the space before an answer."""
    from vtok.eval.results.searched import validation
    from vtok.search.questions import teacher_forced

    network, processor = model[0], copy.deepcopy(model[1])
    processor.chat_template += f"{{{{ {behind!r} }}}}"
    image, questions = validation(1)[0]
    batch = teacher_forced(processor, image, questions, network)
    said = processor.tokenizer.decode(batch["labels"][0][batch["labels"][0] >= 0])
    assert said.removesuffix("</s>") == ("" if behind else " ") + questions[0].answer


def test_metrics_tell_schedules_apart(model):
    from vtok.eval.results.searched import validation
    from vtok.search.questions import metric_of

    asked = validation(7)
    with pytest.raises(InvalidValue, match="metric must be one of"):
        metric_of("bleu", *model, asked)
    for name in ("accuracy", "logprob"):
        metric = metric_of(name, *model, asked)
        whole = metric((1.0,) * 8)
        assert whole > metric((1.0,) + (0.0,) * 7)
        assert metric((1.0,) * 8) == whole  # the patch of one candidate is gone before the next


def invoke(*words):
    result = CliRunner().invoke(cli.app, ["search", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_command_line(tmp_path):
    pytest.importorskip("matplotlib")
    import vtok
    from vtok import zoo

    words = ["--questions", 6, "--metric", "logprob", "--threads", 1, "--out"]
    code, output = invoke("gsearch", "--step", 0.5, "--group", 4, "--compare", 1, *words, tmp_path / "g")
    assert code == 0, output
    assert sorted(p.name for p in (tmp_path / "g").iterdir()) == ["schedule.json", "search.png", "trace.json"]
    log = json.loads((tmp_path / "g" / "trace.json").read_text())
    assert log["settings"]["questions"] == 6 and log["settings"]["split"] == "val"
    assert {"commit", "command", "dtype", "machine"} <= log["runs"][0].keys()
    assert {row["method"] for row in log["result"]["compared"]} == {
        "dense", "found", "p-sigmoid", "fastv", "pyramiddrop"
    }  # fmt: skip
    network, _ = zoo.load("vtok-tiny-llava-next")
    with vtok.patch(network, "schedule", file=tmp_path / "g" / "schedule.json") as patch:
        assert list(patch.compressors[0].rates_at(8)) == log["result"]["rates"]
    n = len(log["evaluations"])

    code, output = invoke("gsearch", "--step", 0.5, "--group", 4, *words, tmp_path / "g")
    assert code == 0 and f"going on after {n} evaluations" in output
    assert len(json.loads((tmp_path / "g" / "trace.json").read_text())["evaluations"]) == n

    code, output = invoke("psigmoid", "--budget", 0.3, "--a", 1, "--evaluations", 3, *words, tmp_path / "p")
    assert code == 0, output
    log = json.loads((tmp_path / "p" / "trace.json").read_text())
    assert [item["mean_keep"] for item in log["evaluations"]] == pytest.approx([0.3] * 3)
    assert log["result"]["score"] == max(item["score"] for item in log["evaluations"])
    assert len(log["result"]["candidates"]) == 3 and log["result"]["a"] == 1
    assert (tmp_path / "p" / "search.png").stat().st_size > 10_000


def test_other_models_are_asked_as_vtok_eval_asks_them(tmp_path, monkeypatch):
    """With the task's instruction, and right answers are the task's."""
    from vtok import zoo
    from vtok.eval.results.searched import validation
    from vtok.eval.tasks.scenes import TASK
    from vtok.prompts import ask
    from vtok.search import questions

    network, processor = zoo.load("vtok-tiny-llava-next")
    network.save_pretrained(tmp_path / "mine"), processor.save_pretrained(tmp_path / "mine")
    seen = []
    monkeypatch.setattr(questions, "ask", lambda text, image: seen.append(text) or ask(text, image))
    words = ["--questions", 2, "--threads", 1, "--step", 0.5, "--max-evals", 1, "--model", tmp_path / "mine"]

    def sloppy(self, sequences, **options):
        return [f"{q.answer.upper()}." for _, asked in validation(2) for q in asked]

    monkeypatch.setattr(type(processor), "batch_decode", sloppy)
    code, output = invoke("gsearch", *words, "--out", tmp_path / "g")
    assert code == 0 and "accuracy 1.0000" in output
    assert len(seen) == 2 and all(text.endswith(f"? {TASK.instruction}") for text in seen)

    monkeypatch.setattr(type(processor), "batch_decode", lambda self, sequences, **options: ["nothing"] * 2)
    code, output = invoke("gsearch", *words, "--out", tmp_path / "none")
    assert code == 2 and "No candidate answers a question right" in output
    words = ["--budget", 0.5, "--evaluations", 1, "--k", 1, *words[:4], *words[-2:]]
    code, output = invoke("psigmoid", *words, "--out", tmp_path / "no")
    assert code == 2 and "No candidate answers a question right" in output


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("gsearch", "--model", "none"), "No model 'none'"),
        (("gsearch", "--questions", 0), "Invalid value for '--questions'"),
        (("gsearch", "--metric", "bleu"), "Invalid value for '--metric'"),
        (("gsearch", "--questions", 1, "--step", 0.3), "step must be"),
        (("gsearch", "--questions", 1, "--tolerance", 2), "tolerance must be"),
        (("psigmoid", "--budget", 2), "--budget is a fraction"),
        (("psigmoid", "--budget", 0.5, "--k", 0), "--k is a number"),
        (("psigmoid", "--budget", 0.1, "--questions", 1), "from 0.2500 to 1.0000"),
    ],
)
def test_bad_input_is_one_line(words, complaint, tmp_path):
    one_line_error(*invoke(*words, "--out", tmp_path / "out"), complaint)
    assert not Path(tmp_path / "out").exists()


def test_constants_say_what_they_are():
    assert psigmoid_module.EVALUATIONS == psigmoid_module.INITIAL + 20

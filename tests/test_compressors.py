"""The baselines and FastV on their own, and what holds for every registered compressor."""

import dataclasses
import importlib
import math
import os
import re
import sys
from typing import Annotated, Literal

import pytest
import torch
from contract import FAMILIES, batch, matrix, picture, seam, tiny
from contract import cells as matrix_cells
from torch._subclasses.fake_tensor import FakeTensorMode
from typer.testing import CliRunner

import vtok
import vtok.compressors
from vtok import adapter, cli, compressor, options
from vtok.compressor import Compressor, build, load_all
from vtok.compressors.pool import cells, coarser
from vtok.errors import InvalidValue, UnknownName
from vtok.methods import read
from vtok.stages import ORDER
from vtok.types import Attention, Layout, Plane, VisualTokens, share

REGISTRY = load_all()
LAYOUTS = [
    Layout((Plane(6, 6),)),
    Layout((Plane(1, 7),)),
    Layout((Plane(1, 1),)),
    Layout((Plane(4, 4, "thumbnail"), Plane(5, 8, "crops")), separators=(0, 1)),
    Layout((Plane(3, 5, "frame"),) * 4, modality="video"),
]


def tokens(layout, b=3, width=4):
    return VisualTokens(torch.randn(b, layout.n, width), layout)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_compressor_says_what_it_is(name):
    cls = REGISTRY[name]
    assert cls.name == name
    assert cls.paper
    assert "Differs from the paper:" in cls.__doc__
    assert isinstance(cls.needs, frozenset)
    for option in options.of(cls).values():
        assert option.text, f"{name}: the docstring says nothing of {option.name}"
        options.check(option.type, option.default, option.name)
    assert cls.trained == (cls.small_weights.__func__ is not Compressor.small_weights.__func__)
    if cls.trained:
        with pytest.raises(InvalidValue, match="trained"):
            cls()
        return
    for example in cls.examples:
        cls(**example)
    assert all(part.stage in ORDER for part in cls().parts())
    assert cls.stage == "+".join(part.stage for part in cls().parts())
    with pytest.raises(dataclasses.FrozenInstanceError):
        cls().keep = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything:
    """An option of each kind.

    keep: how many
        tokens.
    share, part: two at once.
    """

    keep: options.Keep = 0.25
    share: options.Fraction = 0.5
    part: Annotated[float, options.In("[0, 1)")] = 0.5
    layer: options.EncoderLayer = None
    n: options.AtLeast1 | None = None
    word: Literal["one", "two"] = "one"
    flag: bool = False
    each: tuple[options.AtLeast0, ...] = ()
    file: str | os.PathLike[str] | None = None


WRONG = {
    "keep": [0, -1, True, 0.0, 1.1, math.nan, math.inf, "0.5", None, (1,)],
    "share": [1, 0.0, True, math.nan, "1"],
    "part": [1, 1.0, -0.1, False, math.nan, None],
    "layer": [1.5, -0.5, True, "deep", math.nan],
    "n": [0, 1.0, True, "1", math.inf],
    "word": ["three", 1, None, ["one"]],
    "flag": [0, 1, None, "true"],
    "each": [(-1,), (1.0,), 1, [1], (True,)],
    "file": [1, True, b"x"],
}
RIGHT = {
    "keep": {"0.5": 0.5, "1": 1, "1.0": 1.0, "576": 576},
    "share": {"1": 1.0, "0.25": 0.25},
    "part": {"0": 0.0, "5e-1": 0.5},
    "layer": {"-2": -2, "0.5": 0.5, "none": None, "None": None},
    "n": {"3": 3, "none": None},
    "word": {"two": "two"},
    "flag": {"true": True, "False": False},
    "each": {"[1, 2,0]": (1, 2, 0), "[7]": (7,), "[]": ()},
    "file": {"a/b.json": "a/b.json", "1": "1"},
}
NEVER = {
    "keep": "0",
    "share": "2",
    "part": "1.0",
    "layer": "x",
    "n": "none!",
    "word": "t",
    "flag": "1",
    "each": "1/2",
}


@pytest.mark.parametrize("name", WRONG)
def test_options_are_what_their_types_say(name):
    option = options.of(Everything)[name]
    for value in WRONG[name]:
        with pytest.raises(InvalidValue, match=f"^{name} must be .*, got {re.escape(repr(value))}$"):
            options.check_all(Everything(**{name: value}))
    for text, value in RIGHT[name].items():
        found = option.parse(text)
        assert found == value and type(found) is type(value)
        options.check_all(Everything(**{name: found}))
    if name in NEVER:
        with pytest.raises(InvalidValue, match=f"^{name} must be .*, got '{NEVER[name]}'$"):
            option.parse(NEVER[name])


def test_options_say_what_they_accept():
    found = options.of(Everything)
    assert list(found) == list(WRONG)
    assert {name: option.accepted for name, option in found.items()} == {
        "keep": "a float in (0, 1] (a fraction) or an int >= 1 (a count)",
        "share": "a float in (0, 1] (a fraction)",
        "part": "a number in [0, 1)",
        "layer": "a float in [0, 1] (a fraction of the depth), an int (an encoder layer, from the end if negative) or "
        "None (the layer that the projector reads)",
        "n": "an int >= 1 or None",
        "word": "one of 'one', 'two'",
        "flag": "True or False",
        "each": "a tuple (each an int >= 0)",
        "file": "a str, a PathLike or None",
    }
    assert found["keep"].text == "how many tokens."
    assert found["share"].text == found["part"].text == "two at once."
    assert found["keep"].default == 0.25


def test_methods_on_a_command_line():
    assert read("fastv") == ("fastv", {})
    name, values = read("visionzip:importance=received,keep=64,layer=none")
    assert build(name, **values) == vtok.VisionZip(importance="received", keep=64, layer=None)
    assert read("schedule:rates=[1, 0.5, 0.5]")[1] == {"rates": (1.0, 0.5, 0.5)}
    with pytest.raises(UnknownName, match="named 'fastvv'. Did you mean 'fastv'. There are: aim, "):
        read("fastvv:keep=1")
    with pytest.raises(InvalidValue, match="fastv has no option layr. Did you mean 'layer'. It has: anchor, keep"):
        read("fastv:layr=2")
    with pytest.raises(InvalidValue, match="^fastv: layer must be a float .*, an int >= 1 or one of 'auto', got 'two'"):
        read("fastv:layer=two")
    with pytest.raises(UnknownName, match="named 'zzz'. There are"):
        build("zzz")
    with pytest.raises(InvalidValue, match="Did you mean 'layer'"):
        vtok.patch(tiny("llava")[0], "fastv", layr=2)


def test_a_name_belongs_to_one_class(tmp_path, monkeypatch):
    monkeypatch.setattr("vtok.compressor._REGISTRY", dict(compressor._REGISTRY))
    monkeypatch.setattr("vtok.adapter._REGISTRY", dict(adapter._REGISTRY))
    file = tmp_path / "mine.py"
    file.write_text(
        "import vtok\nclass Mine(vtok.Uniform):\n    name = 'mine'\n"
        "class Own(__import__('vtok.adapters.llava').adapters.llava.LlavaAdapter):\n    model_types = ('own',)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("mine")
    again = importlib.reload(mine)  # the same file
    assert compressor._REGISTRY["mine"] is again.Mine
    for known, home in ((vtok.Uniform, "compressors"), (type(adapter.load_all()["llava"]), "adapters")):
        body = {"name": "mine"} if home == "compressors" else {"model_types": ("own",)}
        with pytest.raises(InvalidValue, match=r"Two classes are named .*mine\.py and .* Rename one"):
            type("Other", (known,), {**body, "__module__": __name__})
    assert compressor._REGISTRY["mine"] is again.Mine
    monkeypatch.delitem(sys.modules, "mine")


@pytest.fixture
def one_more_file(tmp_path, monkeypatch):
    """A method that is found in another folder, and forgotten afterwards."""
    (tmp_path / "longest.py").write_text(LONGEST)
    monkeypatch.setattr(vtok.compressors, "__path__", [*vtok.compressors.__path__, str(tmp_path)])
    matrix.cache_clear()
    yield
    matrix.cache_clear()
    del compressor._REGISTRY["longest"], sys.modules["vtok.compressors.longest"], vtok.compressors.longest


def test_a_method_is_one_file(one_more_file):
    """The registry, the matrix of tests, the command line and the README's table know it, with nothing else edited."""
    assert "| `longest` | pre_llm |" in CliRunner().invoke(cli.app, ["methods", "--markdown"]).output
    assert "longest" in CliRunner().invoke(cli.app, ["methods"]).output
    assert vtok.available()["compressors"]["longest"]["families"]
    assert read("longest:p=1,keep=3") == ("longest", {"p": 1, "keep": 3})
    assert vtok.Longest(keep=3).keep == 3
    found = [sum(cell.values[1] == "longest" for cell in matrix_cells(scope)) for scope in ("all", "kinds", "some")]
    assert found == [len(FAMILIES), len({seam(family) for family in FAMILIES}), 1]


LONGEST = '''
"""Keep the longest."""
from dataclasses import dataclass
from vtok.options import AtLeast1
from vtok.stages.pre_llm import PreLLM
from vtok.types import Selection, VisualTokens, keep_count

@dataclass(frozen=True, kw_only=True)
class Longest(PreLLM):
    """Longest features.

    p: of the norm.
    Differs from the paper: there is none."""

    name = "longest"
    paper = "none"
    p: AtLeast1 = 2

    def select(self, tokens: VisualTokens) -> Selection:
        n = tokens.features.shape[1]
        index = tokens.features.norm(self.p, dim=-1).topk(keep_count(n, self.keep)).indices
        return Selection.of_indices(index, n)
'''


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.99, 1, 3, 1000])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", [n for n, c in REGISTRY.items() if c.stage == "pre_llm" and not c.needs])
def test_selections_are_sound(name, layout, keep):
    t = tokens(layout)
    selection = REGISTRY[name](keep=keep).select(t)
    counts = selection.keep.sum(1)
    assert selection.keep.shape == (3, layout.n)
    assert (counts == selection.n_kept).all()
    limit = keep if isinstance(keep, int) else max(len(layout.planes), math.floor(layout.n * keep + 1e-9))
    assert 1 <= counts.max() <= max(1, limit)
    if selection.features is not None:
        assert selection.features.shape == t.features.shape
        into = selection.merged_into
        stands = into >= 0
        assert selection.keep.gather(1, into.clamp(min=0))[stands].all()
        kept = selection.keep.nonzero()
        assert (into[kept[:, 0], kept[:, 1]] == kept[:, 1]).all()


def test_uniform_is_even():
    for n, k in ((576, 144), (100, 7), (5, 5), (9, 2)):
        t = tokens(Layout((Plane(1, n),)), b=1)
        index = vtok.Uniform(keep=k).select(t).keep[0].nonzero().squeeze(1)
        assert len(index) == k
        gaps = index.diff()
        assert gaps.numel() == 0 or gaps.max() - gaps.min() <= 1
        assert abs(int(index[0]) - (n - 1 - int(index[-1]))) <= 1  # centred


def test_random_depends_on_the_seed_and_the_count_alone():
    t = tokens(LAYOUTS[0])
    one, again = vtok.Random(keep=9).select(t).keep, vtok.Random(keep=9).select(tokens(LAYOUTS[0])).keep
    assert torch.equal(one, again)
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one, vtok.Random(keep=9, seed=1).select(t).keep)
    assert (vtok.Random(keep=12, seed=3).select(t).keep[0] & one[0]).sum() < 9


def slow_cells(plane, rows, cols):
    """{(row, col) of the coarser grid: tokens of the plane in it}, raster order."""
    members = {}
    for y in range(plane.rows):
        for x in range(plane.cols):
            members.setdefault((y * rows // plane.rows, x * cols // plane.cols), []).append(y * plane.cols + x)
    return members


def test_pool_means():
    t = tokens(Layout((Plane(4, 4, "thumbnail"), Plane(3, 6, "crops"), Plane(1, 1))), b=2)
    selection = vtok.Pool(keep=0.32).select(t)  # 11 tokens: 5, 6 and none, which becomes 1
    expected = set()
    for plane, start, grid in zip(t.layout.planes, t.layout.starts, ((2, 2), (2, 3), (1, 1))):
        for members in slow_cells(plane, *grid).values():
            ys, xs = [m // plane.cols for m in members], [m % plane.cols for m in members]
            centre = (min(ys) + max(ys)) / 2, (min(xs) + max(xs)) / 2
            off = [math.dist(centre, (y, x)) for y, x in zip(ys, xs)]
            place = start + members[off.index(min(off))]
            expected.add(place)
            for b in range(2):
                mean = sum(t.features[b, start + m] for m in members) / len(members)
                torch.testing.assert_close(selection.features[b, place], mean)
                assert (selection.merged_into[b, [start + m for m in members]] == place).all()
    for b in range(2):
        assert set(selection.keep[b].nonzero().squeeze(1).tolist()) == expected


def test_pool_leaves_no_plane_empty():
    t = tokens(Layout((Plane(3, 5, "frame"),) * 4, modality="video"))
    assert (vtok.Pool(keep=0.01).select(t).keep.view(3, 4, 15).sum(2) == 1).all()
    assert vtok.Pool(keep=3).select(t).n_kept == 3  # a count is a count


def test_pool_rounds_half_precision_once():
    t = tokens(Layout((Plane(32, 32),)))
    half = VisualTokens(t.features.bfloat16(), t.layout)
    features = vtok.Pool(keep=4).select(half).features
    exact = vtok.Pool(keep=4).select(VisualTokens(half.features.float(), t.layout)).features
    assert torch.equal(features, exact.bfloat16())


def test_pool_gives_every_token_its_gradient():
    features = torch.randn(2, 35, 3, requires_grad=True)
    selection = vtok.Pool(keep=0.3).select(VisualTokens(features, Layout((Plane(5, 7),))))
    selection.features[selection.keep].sum().backward()
    assert (features.grad > 0).all()
    torch.testing.assert_close(features.grad.sum(), torch.tensor(2.0 * 3 * selection.n_kept))


def test_pool_grids():
    assert coarser(Plane(24, 24), 144) == (12, 12)
    assert coarser(Plane(24, 24), 575) == (23, 24)
    assert coarser(Plane(40, 2), 59) == (29, 2)
    assert coarser(Plane(24, 24), 1) == (1, 1)
    assert coarser(Plane(24, 24), 17) == (4, 4)  # not a stripe of 17
    used = []
    for plane in (Plane(r, c) for r in range(1, 17) for c in range(1, 17)):
        for count in range(1, plane.size + 1):
            rows, cols = coarser(plane, count)
            assert 1 <= rows <= plane.rows and 1 <= cols <= plane.cols and rows * cols <= count
            if count >= 10:
                used.append(rows * cols / count)
    assert min(used) >= 0.8
    assert sum(used) / len(used) > 0.95
    assert coarser(Plane(1, 7), 3) == (1, 3)
    assert coarser(Plane(28, 48), 336) == (14, 24)
    for plane, grid in ((Plane(5, 7), (2, 3)), (Plane(6, 6), (6, 6)), (Plane(1, 9), (1, 4)), (Plane(3, 3), (1, 1))):
        cell, middle, size = cells(plane, *grid)
        for i, members in enumerate(slow_cells(plane, *grid).values()):
            assert (cell == i).nonzero().squeeze(1).tolist() == members
            assert size[i] == len(members)
        assert torch.equal(cell[middle], torch.arange(grid[0] * grid[1]))


def test_share():
    assert share(10, [1, 1, 1]) == [4, 3, 3]
    assert share(0, [3, 5]) == [0, 0]
    assert share(8, [3, 5]) == [3, 5]
    for total in range(30):
        parts = share(total, [7, 11, 12])
        assert sum(parts) == total
        assert all(p <= s for p, s in zip(parts, [7, 11, 12]))


def test_downsample_takes_a_fraction():
    assert vtok.Downsample(keep=0.25).scale() == 0.5
    with pytest.raises(InvalidValue, match="fraction"):
        vtok.Downsample(keep=64)


def test_fastv_score_is_the_anchors_attention():
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[0, :2] = False
    attention = Attention(query, key, 0.4, valid, valid, torch.tensor([6, 4]))
    score = vtok.FastV().score(attention)
    for b, anchor in enumerate((6, 4)):
        rows = []
        for h in range(4):
            seen = [j for j in range(anchor + 1) if valid[b, j]]
            logits = torch.stack([query[b, h, anchor] @ key[b, h // 2, j] * 0.4 for j in seen])
            rows.append(torch.zeros(7).index_copy(0, torch.tensor(seen), logits.softmax(0)))
        torch.testing.assert_close(score[b], torch.stack(rows).mean(0))


def test_fastv_options():
    assert vtok.FastV(layer=3, keep=0.4).schedule(10) == {2: 0.4}
    solved = vtok.FastV(layer=2).with_budget(0.5, 32)
    assert (2 + 30 * solved.keep) / 32 == pytest.approx(0.5)
    assert vtok.FastV(layer=2).with_budget(1.0, 32).keep == 1.0
    solved = vtok.FastV(layer=4).with_budget(0.1, 32)  # 4 layers of 32 alone are more than that
    assert solved.layer == 2 and (2 + 30 * solved.keep) / 32 == pytest.approx(0.1)  # 3 would leave next to nothing
    with pytest.raises(InvalidValue, match="cannot be met"):
        vtok.FastV().with_budget(0.1, 8)
    for wrong in ({"layer": 0}, {"layer": True}, {"anchor": "last"}):
        with pytest.raises(InvalidValue, match=next(iter(wrong))):
            vtok.FastV(**wrong)
    for layer in (4, 40):  # nothing would be dropped
        with pytest.raises(InvalidValue, match="number of decoder layers, 4"):
            vtok.FastV(layer=layer).schedule(4)
        with pytest.raises(InvalidValue, match="number of decoder layers, 4"):
            vtok.FastV(layer=layer).with_budget(0.5, 4)


@pytest.mark.parametrize("name", [n for n, c in REGISTRY.items() if c.stage == "pre_llm" and not c.needs])
def test_no_picture_changes_another(name):
    t = tokens(LAYOUTS[3])
    compressor = REGISTRY[name](keep=0.3)
    together = compressor.select(t)
    for b in range(3):
        alone = compressor.select(VisualTokens(t.features[b : b + 1], t.layout))
        assert torch.equal(alone.keep[0], together.keep[b])
        if alone.features is not None:
            torch.testing.assert_close(alone.features[0], together.features[b])
            assert torch.equal(alone.merged_into[0], together.merged_into[b])


@pytest.mark.parametrize("name", [n for n, c in REGISTRY.items() if c.stage == "pre_llm" and not c.needs])
def test_selecting_reads_no_values_back(name):
    """Contract 10: shapes alone decide what is computed; a fake tensor has no values to wait for."""
    layout = LAYOUTS[3]
    compressor = REGISTRY[name](keep=0.3)
    layout.place, layout.boxes  # noqa: B018  made once per layout, outside
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        features = mode.from_tensor(torch.randn(2, layout.n, 4))
        assert compressor.select(VisualTokens(features, layout)).keep.shape == (2, layout.n)


def test_fastv_keeps_what_eager_attention_says():
    """The probe's rows are the model's own probabilities."""
    model, processor = tiny("llava", "eager")
    inputs = batch(processor, ["a # What colour?"], [picture(56, 56)])
    with torch.no_grad():
        probabilities = model(**inputs, output_attentions=True).attentions[1].mean(1)[0, -1]
        with vtok.patch(model, vtok.FastV(keep=5, layer=2)) as patch:
            model(**inputs, use_cache=True)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().squeeze(1)
    best = image[probabilities[image].topk(5).indices].sort().values
    kept = patch.trace.positions_at(2)[0]
    assert torch.equal(kept[torch.isin(kept, image)], best)

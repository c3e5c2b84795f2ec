"""Drawings: what is kept is clear, what is dropped is faded, merged tokens share a colour."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vtok import draw
from vtok.draw import Panel, panels, save
from vtok.errors import InvalidValue, MissingExtra
from vtok.types import Layout, Plane

pytest.importorskip("matplotlib")

RED, BLUE = (200, 30, 30), (30, 30, 200)
CROPS = Layout((Plane(4, 4, kind="thumbnail"), Plane(8, 8, kind="crops", crop_grid=(2, 2), crop_shape=(4, 4))), (0, 1))
WHOLE = Layout((Plane(8, 8),))


def is_colour(image, colour, tolerance=12):
    return np.abs(np.asarray(image).astype(int) - np.array(colour)).max(-1) <= tolerance  # [Y, X]


def share(image, colour):
    """Part of the pixels that have a colour."""
    return float(is_colour(image, colour).mean())


def red():
    return Image.new("RGB", (64, 64), RED)


def one(layout, seen, **fields):
    return panels(red(), [Panel("method", "caption", "answer", layout, seen, **fields)])


def test_kept_tokens_are_clear_and_dropped_ones_faded():
    everything = share(one(WHOLE, torch.ones(64)), RED)
    assert everything > 0.4
    for kept in (16, 48):
        seen = torch.zeros(64)
        seen[torch.randperm(64)[:kept]] = 1
        image = one(WHOLE, seen)
        # outlines lie on the edges of the kept cells
        assert 0.8 * kept / 64 < share(image, RED) / everything <= kept / 64 + 0.01


def test_cells_lie_where_the_layout_says():
    seen = torch.zeros(64).view(8, 8)
    seen[1, 6] = 1  # second row, seventh column
    rows, cols = np.nonzero(is_colour(one(WHOLE, seen.flatten()), RED))
    rows_all, cols_all = np.nonzero(is_colour(one(WHOLE, torch.ones(64)), RED))
    side = rows_all.max() - rows_all.min() + 1
    assert (rows.mean() - rows_all.min()) / side == pytest.approx(1.5 / 8, abs=0.01)
    assert (cols.mean() - cols_all.min()) / side == pytest.approx(6.5 / 8, abs=0.01)


def test_partly_seen_tokens_lie_between():
    half = one(WHOLE, torch.full((64,), 0.5))
    assert share(half, RED) < 0.01
    little, more, all_of_it = (np.asarray(one(WHOLE, torch.full((64,), s))).mean() for s in (0.2, 0.6, 1.0))
    assert little < more < all_of_it or little > more > all_of_it


def test_thumbnail_and_crops_are_both_drawn():
    seen = torch.zeros(CROPS.n)
    seen[16:] = 1  # the crops alone
    crops = share(one(CROPS, seen), RED)
    thumbnail = share(one(CROPS, 1 - seen), RED)
    assert crops > 5 * thumbnail > 0


def test_merged_tokens_share_their_mean_colour():
    picture = red()
    picture.paste(BLUE, (32, 0, 64, 64))
    left = torch.arange(64) % 8 < 4
    owner = torch.where(left, torch.arange(64) + 4, torch.arange(64))  # each red token goes to a blue one
    image = panels(picture, [Panel("merge", "", "", WHOLE, (~left).float(), owner)])
    assert share(image, RED) == share(image, BLUE) == 0
    assert share(image, (115, 30, 115)) > 0.25


def test_a_dropped_token_among_merged_ones_is_faded():
    owner = torch.arange(64)
    owner[32:] = -1
    image = one(WHOLE, torch.ones(64), merged_into=owner)
    assert share(image, RED) == pytest.approx(share(one(WHOLE, torch.ones(64)), RED) / 2, rel=0.2)


def test_untouched_picture_has_no_outlines():
    edge = tuple(int(draw.ON_DARK[1][i : i + 2], 16) for i in (1, 3, 5))
    assert share(one(WHOLE, torch.ones(64)), edge) == 0
    assert share(one(WHOLE, torch.arange(64) % 2), edge) > 0.005
    assert share(one(WHOLE, torch.ones(64), scale=0.5), edge) > 0.005  # a smaller picture shows its tokens


@pytest.mark.parametrize("size", [(640, 40), (40, 640), (1, 1)])
@pytest.mark.parametrize("count", [1, 5])
def test_any_picture_and_long_words(size, count):
    item = Panel("a", "b" * 60, "word $x$ \\alpha " * 30, CROPS, torch.ones(CROPS.n))
    image = panels(Image.new("RGB", size), [item] * count, question="why? " * 60)
    assert image.mode == "RGB"
    assert max(image.size) < 6000


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(InvalidValue, match="at least one"):
        panels(red(), [])
    assert save(red(), tmp_path / "new" / "x.png").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidValue, match="could not be written"):
        save(red(), tmp_path / "file" / "x.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtra, match=r"vtok\[viz\]"):
        one(WHOLE, torch.ones(64))

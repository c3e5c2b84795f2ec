"""`vtok bench` on clips and pages of text: what is built, what is counted, and its bars."""

from functools import partial

import pytest
import torch

from vtok.eval.bench import bars, measure, workloads

SMALL = workloads.QWEN["toy"]
HOW = measure.How(tokens=0, repetitions=1)


def test_a_clip():
    build = partial(workloads._qwen, SMALL, (4, 3), frames=5)
    _, inputs = build(1, "cpu", torch.float32)
    assert inputs["video_grid_thw"].tolist() == [[5, 8, 6]] and (inputs["input_ids"] == workloads.VIDEO).sum() == 60
    found = measure.measure(build, [0.5], ["vidcom2", "evs"], HOW, lambda _: None)
    assert found["visual_tokens"] == 60 and not found["refused"]
    rows = found["variants"]
    assert rows["vidcom2 0.5"]["mean_keep"] == rows["evs 0.5"]["mean_keep"] == 0.5
    assert rows["evs 0.5"]["encoder_flops"] == rows["dense"]["encoder_flops"] > 0
    assert list(workloads.WORKLOADS["clip"].builds) == [64 * 196]


def test_a_page_of_text():
    """Half white, so that PixelPrune keeps a part; its ink is where lines are."""
    cells = workloads._page(24, 20)
    assert cells.shape == (24 * 20, 3 * 2 * 14 * 14)
    blank = (cells - cells[0]).abs().amax(1) == 0
    assert 0.2 < blank.float().mean() < 0.8
    build = partial(workloads._qwen, SMALL, (12, 10), page=True)
    found = measure.measure(build, [0.25], ["pixelprune"], HOW, lambda _: None)
    row, dense = found["variants"]["pixelprune 0.25"], found["variants"]["dense"]
    assert 0.1 < row["mean_keep"] < 1 and row["encoder_flops"] < dense["encoder_flops"]
    (told,) = [text for _, text in bars.bars(found) if "encodes" in text]
    assert f"{dense['encoder_flops'] / row['encoder_flops']:.2f} by its operations" in told


@pytest.mark.parametrize(("seconds", "met"), [(0.45, True), (0.6, False)])
def test_the_encoder_has_to_be_as_fast_as_it_counts(seconds, met):
    spread = lambda median: {"median": median}
    row = {"method": "pixelprune", "keep": 0.25, "stage": "patches", "mean_keep": 0.4, "encoder_flops": 4}
    rows = {"dense": {"method": None, "encoder_flops": 10, "encoder_seconds": spread(1.0)}}
    rows["pixelprune 0.25"] = row | {"encoder_seconds": spread(seconds)}
    assert [
        m
        for m, _ in bars._of_encoder(
            {"variants": rows, "visual_tokens": 9}, {"pixelprune": row | rows["pixelprune 0.25"]}
        )
    ] == [met]


@pytest.mark.parametrize(("seconds", "met"), [(0.0099, True), (0.0101, False)])
def test_clips_are_selected_from_in_no_time(seconds, met):
    row = {"stage": "pre_llm", "reached": 1.0, "selection_seconds": {"median": seconds}}
    dense = {"prefill_seconds": {"median": 1.0}}
    result = {"variants": {"dense": dense}, "visual_tokens": 12544, "overhead": 0.0, "overhead_paired": 0.0}
    told = {text: m for m, text in bars._of_time(result, {"vidcom2": row, "divprune": row})}
    (bar,) = [text for text in told if "in clips" in text]
    assert told[bar] == met and "divprune" not in bar

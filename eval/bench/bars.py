"""The bars of `vtok bench`: what a method has to reach, and whether it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vtok.compressor import find
from vtok.eval.bench.measure import JUDGED
from vtok.methods import available, facts
from vtok.runs import DENSE

LARGE = 2048  # bars on times and memory hold from so many visual tokens on
IDEAL_BARS = {"pre_llm": 0.90, "llm": 0.85}  # of the FLOP ratio, that the ratio of prefill times must reach, by stage
SELECTION_BAR = 0.05  # of a dense prefill, that the selection may take
CLIP_BAR = 0.01  # the same for methods that read nothing but how the tokens of a clip lie in its frames
ENCODER_BAR = 0.85  # of the FLOP ratio, that the ratio of encoder times must reach, of methods that encode less
OVERHEAD_BAR = 0.01  # of a dense prefill, that hooks and trace may cost at keep=1.0
DECODE_BAR = 1.02  # of the dense time a token: not slower, within what a clock tells


def bars(result: dict[str, Any]) -> list[tuple[bool, str]]:
    """(met, sentence) of each bar."""
    rows = result["variants"]
    judged = {row["method"]: row for row in rows.values() if row["method"] and row["keep"] == JUDGED}
    found = _bar(
        result,
        lambda row: row["kv_bytes"] == row["kv_bytes_formula"],
        "the cache holds the bytes of the accounting",
        rows,
    )
    found += _of_encoder(result, judged)
    if result["visual_tokens"] >= LARGE:
        found += _of_time(result, judged) + _of_decoding(result, judged) + _of_memory(result)
    return found


def _bar(
    result: dict[str, Any], good: Callable[[dict[str, Any]], bool], sentence: str, group: dict[str, dict[str, Any]]
) -> list[tuple[bool, str]]:
    """Whether all of a group are good, and which are not; nothing for an empty group."""
    wrong = [name for name, row in group.items() if not good(row)]
    text = f"{result['visual_tokens']} tokens: {sentence}" + (f", not so: {', '.join(wrong)}" if wrong else "")
    return [(not wrong, text)] if group else []


def _of_time(result: dict[str, Any], judged: dict[str, dict[str, Any]]) -> list[tuple[bool, str]]:
    found, known = [], available()["compressors"]
    for stage, least in IDEAL_BARS.items():
        group = {f"{n} {row['reached']:.0%}": row for n, row in judged.items() if row["stage"] == stage}
        good = lambda row, least=least: row["reached"] >= least
        found += _bar(result, good, f"{stage} methods reach {least:.0%} of the FLOP ratio", group)
    dense = result["variants"][DENSE]["prefill_seconds"]["median"]
    share = lambda row: row["selection_seconds"]["median"] / dense
    group = {f"{n} {share(row):.1%}": row for n, row in judged.items() if not facts(n, known)["slow"]}
    sentence = f"selection takes below {SELECTION_BAR:.0%} of a dense prefill (slow ones apart)"
    found += _bar(result, lambda row: share(row) < SELECTION_BAR, sentence, group)
    group = {f"{n} {share(row):.2%}": row for n, row in judged.items() if find(n).needs == {"frames"}}
    sentence = f"selection in clips takes below {CLIP_BAR:.0%} of a dense prefill"
    found += _bar(result, lambda row: share(row) < CLIP_BAR, sentence, group)
    told = (
        f"{result['visual_tokens']} tokens: at keep=1.0 hooks and trace take {result['overhead']:.2%} of a dense "
        f"prefill (bar {OVERHEAD_BAR:.0%}; whole prefills differ by {result['overhead_paired']:+.1%})"
    )
    return [*found, (result["overhead"] < OVERHEAD_BAR, told)]


def _of_encoder(result: dict[str, Any], judged: dict[str, dict[str, Any]]) -> list[tuple[bool, str]]:
    """Whether the encoder's time falls as its operations do, where a method gives it less."""
    dense, found = result["variants"][DENSE], []
    for name, row in judged.items():
        if row["stage"] == "patches" and row["encoder_flops"] < dense["encoder_flops"]:
            faster = dense["encoder_seconds"]["median"] / row["encoder_seconds"]["median"]
            ideal = dense["encoder_flops"] / row["encoder_flops"]
            text = (
                f"{result['visual_tokens']} tokens: {name} keeps {row['mean_keep']:.0%} and encodes {faster:.2f} times "
                f"as fast, of {ideal:.2f} by its operations (bar {ENCODER_BAR:.0%} of these)"
            )
            found.append((faster >= ENCODER_BAR * ideal, text))
    return found


def _of_decoding(result: dict[str, Any], judged: dict[str, dict[str, Any]]) -> list[tuple[bool, str]]:
    dense = result["variants"][DENSE]["decode_seconds"]
    if not dense:
        return []
    ratio = lambda row: row["decode_seconds"]["median"] / dense["median"]
    group = {f"{n} {ratio(row):.2f}": row for n, row in judged.items()}
    sentence = "a decoded token takes no longer than a dense one"
    return _bar(result, lambda row: ratio(row) <= DECODE_BAR, sentence, group)


def _of_memory(result: dict[str, Any]) -> list[tuple[bool, str]]:
    """Activations fall too; the cache's share is what the accounting promises. Methods in the decoder are left out: its
    first layers run on all tokens, and so does their peak."""
    rows = result["variants"]
    dense = rows[DENSE]
    if dense["peak_bytes"] is None:
        return []
    saves = lambda row: row["kv_bytes_formula"] < dense["kv_bytes"]
    group = {n: row for n, row in rows.items() if row["stage"] in ("pixels", "blocks", "pre_llm") and saves(row)}
    good = lambda row: dense["peak_bytes"] - row["peak_bytes"] >= dense["kv_bytes"] - row["kv_bytes_formula"]
    return _bar(result, good, "peak memory falls by at least the cache's savings", group)

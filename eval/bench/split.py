"""`vtok bench serve --split`: one server reads prompts, another answers, and what it needs is handed over in files.

vLLM's ExampleConnector, which has no network of its own: what is told is how much is handed over and what the answering
server is spared, and not how fast a network is. The idea: Patel et al., "Splitwise" (ISCA 2024).
"""

from __future__ import annotations

import json
import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console

from vtok.eval.bench import machine, served
from vtok.eval.bench.serve import Load, ask, picture, server
from vtok.files import write_json
from vtok.runs import DENSE

HEAD = ("variant", "requests", "read, s", "handed over, MB", "first, s", "between, ms", "same answers")


def run(visual: int, method: str, keep: float, load: Load, folder: Path, out: Path | None) -> bool:
    """Measure, print, write JSON to `out`; whether all answers are those of one server. folder: of the checkpoint."""
    console = Console()
    place = folder if (folder / "config.json").is_file() else served.make(visual, folder)
    variants = {DENSE: {}, f"{method} {keep:g}": {"vtok": {"compressor": method, "keep": keep}}}
    results = {name: _variant(place, overrides, load) for name, overrides in variants.items()}
    for row in rows_of(results):
        console.print("  ".join(f"{head}: {cell}" for head, cell in zip(HEAD, row)))
    if out is not None:
        about = machine.describe("cpu", "float32") | {"workload": f"two servers, of {visual:,} visual tokens a picture"}
        write_json(out, {"machine": about, "split": {"visual_tokens": visual, "keep": keep, "results": results}})
        console.print(f"wrote {out}")
    return all(row["same"] == row["requests"] for row in results.values())


def _variant(place: Path, overrides: dict[str, Any], load: Load) -> dict[str, float]:
    store = place / "handed-over"
    told = {"shared_storage_path": str(store)}
    words = ["--kv-transfer-config"]
    words.append(
        json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": told})
    )
    read, first, gaps, handed, same = [], [], [], [], 0
    with ExitStack() as stack:
        reads, answers = (stack.enter_context(server(place, overrides, load, *words)) for _ in range(2))
        for address in (reads, answers):
            ask(address, picture(), 2)  # warms up
        for _ in range(load.requests):
            shutil.rmtree(store, ignore_errors=True)
            about = picture()
            read.append(ask(reads, about, 1).first)
            handed.append(sum(file.stat().st_size for file in store.rglob("*.safetensors")))
            answer = ask(answers, about, load.tokens)
            first.append(answer.first)
            gaps += answer.gaps
            same += answer.text == ask(reads, about, load.tokens).text
    return {
        "requests": load.requests,
        "read": statistics.median(read),
        "bytes": statistics.median(handed),
        "first": statistics.median(first),
        "between": statistics.median(gaps),
        "same": same,
    }


def rows_of(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """Lines below `HEAD`."""
    return [
        [
            name,
            str(row["requests"]),
            f"{row['read']:.2f}",
            f"{row['bytes'] / 1e6:.0f}",
            f"{row['first']:.2f}",
            f"{1e3 * row['between']:.0f}",
            str(row["same"]),
        ]
        for name, row in results.items()
    ]

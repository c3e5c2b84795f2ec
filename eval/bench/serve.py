"""`vtok bench serve`: vLLM's server on this machine, dense and compressed, asked in turns.

Both servers run; one is asked at a time, so the other costs memory and no time. Each request has a picture of its own,
so that no cache helps. How full the KV cache is, and how many requests run and wait, is read of /metrics meanwhile.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vtok.errors import PatchStateError
from vtok.eval.bench import machine, served
from vtok.files import write_json
from vtok.runs import DENSE

HEAD = ("variant", "at once", "requests/s", "first, s", "between, ms", "KV %", "running", "waiting")
GAUGES = {
    "kv": "vllm:kv_cache_usage_perc",
    "running": "vllm:num_requests_running",
    "waiting": "vllm:num_requests_waiting",
}
BAR_AT = (2880, 0.25)
FIRST_TOKEN, IN_MEMORY = 4.0, 4.0  # times shorter, times as many
LONGEST = 600.0  # seconds, of a start or an answer


@dataclass(frozen=True)
class Load:
    """concurrency: requests at once. requests: of each level and variant in a round. tokens: of an answer. memory: GiB
    of each server's KV cache."""

    concurrency: tuple[int, ...] = (1, 4, 16)
    requests: int = 16
    tokens: int = 16
    rounds: int = 2
    memory: int = 1


def run(visual: int, method: str, keep: float, load: Load, folder: Path, out: Path | None) -> bool:
    """Measure, print, write JSON to `out`; whether the bars are met. folder: of the checkpoint."""
    console = Console()
    place = folder if (folder / "config.json").is_file() else served.make(visual, folder)
    name = f"{method} {keep:g}"
    setting = {"vtok": {"compressor": method, "keep": keep}}
    samples: dict[str, dict[int, list[dict[str, float]]]] = {
        v: {n: [] for n in load.concurrency} for v in (DENSE, name)
    }
    with ExitStack() as stack:
        addresses = {
            DENSE: stack.enter_context(server(place, {}, load)),
            name: stack.enter_context(server(place, setting, load)),
        }
        for address in addresses.values():
            _level(address, 1, 1, load.tokens)  # warms up
        for i in range(load.rounds):
            for at_once in load.concurrency:
                for variant in list(addresses)[:: 1 if i % 2 == 0 else -1]:
                    console.print(f"round {i + 1}: {variant}, {at_once} at once")
                    measured = _level(addresses[variant], at_once, max(load.requests, at_once), load.tokens)
                    samples[variant][at_once].append(measured)
    results = {v: {n: _median(rounds) for n, rounds in levels.items()} for v, levels in samples.items()}
    console.print(table(visual, results))
    verdicts = bars(visual, keep, results)
    for met, sentence in verdicts:
        console.print(f"{'ok  ' if met else 'MISS'} {sentence}")
    if out is not None:
        about = machine.describe("cpu", "float32") | {"workload": f"a server of pictures of {visual:,} visual tokens"}
        told = {"visual_tokens": visual, "keep": keep, "results": results, "rounds": samples}
        write_json(out, {"machine": about, "serve": told})
        console.print(f"wrote {out}")
    return all(met for met, _ in verdicts)


def bars(visual: int, keep: float, results: dict[str, dict[Any, dict[str, float]]]) -> list[tuple[bool, str]]:
    """(met, sentence) of each bar, at the least concurrency."""
    (_, dense), (name, own) = results.items()
    least = min(dense, key=int)
    faster = dense[least]["first"] / own[least]["first"]
    more = dense[least]["kv"] / own[least]["kv"] if own[least]["kv"] else 0.0
    found = [
        (faster, FIRST_TOKEN, "times sooner comes the first token"),
        (more, IN_MEMORY, "times as many requests in the same KV memory"),
    ]
    if (visual, keep) != BAR_AT:
        return [(True, f"{name}: {times:.1f} {what}") for times, _, what in found]
    return [(times >= bar, f"{name}: {times:.1f} {what} (bar {bar:g})") for times, bar, what in found]


# ---- a server --------------------------------------------------------------------------------------------------------
@contextmanager
def server(place: Path, overrides: dict[str, Any], load: Load, *more: str) -> Iterator[str]:
    """The address of a server of the checkpoint, on this machine alone; it ends with the block. more: its options."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(place), "--hf-overrides", json.dumps(overrides), "--host", "127.0.0.1", "--port", str(port)]
    words += ["--served-model-name", "it", "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "64"]
    words += [
        "--max-model-len",
        "4096",
        "--max-num-batched-tokens",
        "4096",
        "--limit-mm-per-prompt",
        '{"image": 1}',
        *more,
    ]
    code = "import sys; from vtok.serving.launch import run; run(sys.argv[1:])"
    settings = {"VLLM_CPU_KVCACHE_SPACE": str(load.memory), "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = place / f"server-{port}.log"
    with log.open("w") as told:
        running = subprocess.Popen(
            [sys.executable, "-c", code, *words], stdout=told, stderr=told, env=os.environ | settings
        )
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + LONGEST
    try:
        while not _healthy(address):
            if running.poll() is not None or time.monotonic() > end:
                raise PatchStateError(f"The server did not start; its log is {log}.")
            time.sleep(0.5)
        yield address
    finally:
        running.terminate()
        running.wait(60)


def _healthy(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


# ---- a level ---------------------------------------------------------------------------------------------------------
def _level(address: str, at_once: int, requests: int, tokens: int) -> dict[str, float]:
    """Requests of which so many are open at once: rate, seconds to the first token, between tokens, and the gauges."""
    with _watched(address) as peaks, ThreadPoolExecutor(at_once) as pool:
        began = time.perf_counter()
        answers = list(pool.map(lambda _: ask(address, picture(), tokens), range(requests)))
        seconds = time.perf_counter() - began
    gaps = [gap for answer in answers for gap in answer.gaps]
    return {
        "rate": requests / seconds,
        "first": statistics.median(answer.first for answer in answers),
        "between": statistics.median(gaps) if gaps else 0.0,
        **peaks,
    }


@dataclass(frozen=True)
class Answer:
    """Seconds to the first token of an answer and from each to the next, and the answer."""

    first: float
    gaps: list[float]
    text: str


def ask(address: str, picture: str, tokens: int) -> Answer:
    """About a picture, see `picture`."""
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": served.question()}]
    body = {"model": "it", "messages": [{"role": "user", "content": content}], "stream": True, "temperature": 0}
    asked = json.dumps(body | {"max_tokens": tokens, "ignore_eos": True}).encode()
    request = urllib.request.Request(f"{address}/v1/chat/completions", asked, {"Content-Type": "application/json"})
    began, marks, words = time.perf_counter(), [], []
    with urllib.request.urlopen(request, timeout=LONGEST) as answer:
        for line in answer:
            if (
                line.startswith(b"data: {")
                and (said := json.loads(line[6:])["choices"][0]["delta"].get("content")) is not None
            ):
                marks.append(time.perf_counter())
                words.append(said)
    marks = marks[-tokens:]  # the first event may hold the role alone
    return Answer(marks[0] - began, [b - a for a, b in pairwise(marks)], "".join(words))


def picture() -> str:
    """One of which there is no other."""
    from PIL import Image

    held = io.BytesIO()
    Image.frombytes("RGB", (32, 32), random.randbytes(3 * 32 * 32)).resize((512, 512)).save(held, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode()


@contextmanager
def _watched(address: str, every: float = 0.2) -> Iterator[dict[str, float]]:
    """The largest value of each gauge while the block runs."""
    peaks, over = dict.fromkeys(GAUGES, 0.0), threading.Event()

    def look() -> None:
        while not over.wait(every):
            with urllib.request.urlopen(f"{address}/metrics", timeout=LONGEST) as answer:
                lines = answer.read().decode().splitlines()
            for key, gauge in GAUGES.items():
                values = [float(line.split()[-1]) for line in lines if line.startswith(gauge + "{")]
                peaks[key] = max([peaks[key], *values])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peaks
    finally:
        over.set()
        thread.join()


# ---- shown -----------------------------------------------------------------------------------------------------------
def _median(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}


def rows_of(results: dict[str, dict[Any, dict[str, float]]]) -> list[list[str]]:
    """Lines below `HEAD`."""
    return [
        [
            variant,
            str(at_once),
            f"{row['rate']:.2f}",
            f"{row['first']:.2f}",
            f"{1e3 * row['between']:.0f}",
            f"{100 * row['kv']:.1f}",
            f"{row['running']:.0f}",
            f"{row['waiting']:.0f}",
        ]
        for variant, levels in results.items()
        for at_once, row in levels.items()
    ]


def table(visual: int, results: dict[str, dict[int, dict[str, float]]]) -> Table:
    title = f"{visual:,} visual tokens, medians of rounds"
    made = Table(title=title, box=None, title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    for head in HEAD:
        made.add_column(head, justify="left" if head == "variant" else "right", no_wrap=True)
    for row in rows_of(results):
        made.add_row(*row)
    return made

"""`vtok serve` over HTTP, on this machine: good and bad requests, what is kept, and that it lives on."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import pytest
from PIL import Image

START, ANSWER = 300.0, 120.0  # seconds, at most
MODEL = "vtok-tiny-llava-next"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, log file) of a server of a bundled model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    words = [Path(sys.executable).parent / "vtok", "serve", MODEL, "--compressor", "globalcom2", "--keep", "0.25"]
    engine = ["--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "8", "--enforce-eager"]
    http = ["--host", "127.0.0.1", "--port", port, "--limit-mm-per-prompt", '{"image": 2}']
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    with log.open("w") as out:
        running = subprocess.Popen(list(map(str, words + engine + http)), stdout=out, stderr=out, env=environment)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + START
    while not _alive(address):
        assert running.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(1)
    yield address, log
    running.send_signal(signal.SIGTERM)
    running.wait(60)


def _alive(address):
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def url(picture):
    held = io.BytesIO()
    picture.save(held, "PNG")
    return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()


def body(*urls):
    content = [{"type": "image_url", "image_url": {"url": each}} for each in urls]
    talk = [{"role": "user", "content": [*content, {"type": "text", "text": cases.QUESTION}]}]
    return {"model": MODEL, "max_tokens": 6, "temperature": 0, "logprobs": True, "messages": talk}


def post(address, asked):
    """(status, tokens, prompt tokens)"""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(asked).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER) as answer:
            told = json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, None, None
    tokens = [token["token"] for token in told["choices"][0]["logprobs"]["content"]]
    return 200, tokens, told["usage"]["prompt_tokens"]


def test_bad_requests_cost_the_good_ones_nothing(server):
    address, _ = server
    pictures = cases.pictures()
    good = [body(url(picture)) for picture in pictures] + [body(url(pictures[0]), url(pictures[1]))]
    alone = [post(address, each) for each in good]
    assert {status for status, *_ in alone} == {200}
    bad = [
        body("data:image/png;base64,@@@@"),
        body(url(pictures[0])[:200]),  # cut off
        body("data:image/png;base64," + base64.b64encode(b"hello").decode()),
        body(*[url(pictures[0])] * 3),  # too many
    ]
    assert all(400 <= post(address, each)[0] < 500 for each in bad)
    bomb = body(url(Image.new("RGB", (20_000, 20_000))))  # few bytes, many pixels: vLLM itself answers 500
    assert post(address, bomb)[0] >= 400
    odd = [body(url(Image.new("RGB", (1, 1)))), body(url(Image.new("RGB", (4000, 2))))]
    assert all(post(address, each)[0] < 500 for each in odd)  # answered, or refused

    mixed = [(bad[i // 10 % len(bad)], None) if i % 10 == 9 else (good[i % 6], alone[i % 6]) for i in range(200)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda each: post(address, each[0]), mixed))
    for (_, expected), answer in zip(mixed, answers):
        assert answer == expected if expected is not None else 400 <= answer[0] < 500
    assert _alive(address)


def test_what_is_kept_is_said(server):
    address, log = server
    assert post(address, body(url(cases.pictures()[0])))[0] == 200
    assert "vtok keeps " in log.read_text() and "GlobalCom2(" in log.read_text()
    with urllib.request.urlopen(f"{address}/metrics", timeout=ANSWER) as answer:
        lines = [line for line in answer.read().decode().split("\n") if line.startswith("vtok:visual_tokens_total")]
    values = {line.split('kind="')[1].split('"')[0]: float(line.split()[-1]) for line in lines}
    assert 0 < values["kept"] < 0.4 * values["dense"]

"""Static types: a type checker finds a wrong option. `python tests/test_types.py` writes the stub of `vtok` anew."""

import subprocess
import sys
from pathlib import Path

import pytest

import vtok
from vtok.compressor import load_all

STUB = Path(vtok.__file__).with_suffix(".pyi")
SCRIPT = """
import vtok

vtok.FastV(keep=0.25, layer=2)
vtok.VisionZip(keep=64, importance="received", layer=None)
vtok.GlobalCom2(tau=10, exact_count=False, renumber=True)
vtok.FastV(keep=0.25, layr=2)  # error: call-arg
vtok.FastV(keep="x")  # error: arg-type
vtok.VisionZip(importance="recieved")  # error: arg-type
vtok.DivPrune(0.25)  # error: call-arg
vtok.FastVV()  # error: attr-defined
"""
CONFIG = """
[mypy]
follow_imports = silent
ignore_missing_imports = True
[mypy-torch.*,transformers.*]
follow_imports = skip
"""


def stub() -> str:
    """What `vtok.__getattr__` finds, spelled out, as type checkers and editors do not call it."""
    homes = {**vtok._HOMES, **{cls.__name__: cls.__module__ for cls in load_all().values()}}
    homes |= {name: home.rpartition(".")[0] for name, home in vtok._ROOMS.items()}
    lines = [f"from {home} import {name} as {name}" for home, name in sorted((h, n) for n, h in homes.items())]
    return "\n".join(["# Written by tests/test_types.py.", *lines, "", "__version__: str", ""])


def test_the_stub_is_up_to_date():
    assert STUB.read_text() == stub(), "python tests/test_types.py writes it anew"


def test_a_type_checker_finds_wrong_options(tmp_path):
    pytest.importorskip("mypy")
    script, config = tmp_path / "script.py", tmp_path / "mypy.ini"
    script.write_text(SCRIPT)
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", config, "--cache-dir", tmp_path / "cache", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=STUB.parents[1])
    expected = {
        i: line.partition("# error: ")[2] for i, line in enumerate(SCRIPT.splitlines(), 1) if "# error: " in line
    }
    found = {int(line.split(":")[1]): line.rpartition("[")[2].rstrip("]") for line in done.stdout.splitlines()[:-1]}
    assert found == expected, done.stdout + done.stderr


if __name__ == "__main__":
    STUB.write_text(stub())

"""These tests need vLLM, which pins other versions: .ci/serving makes an environment for them and runs them there."""

import gc
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
sys.path.insert(0, str(Path(__file__).parent))  # for cases.py


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where checkpoints are kept."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def start():
    """Starts an engine, `cases.engine`, after ending the one that it started before."""
    import cases
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    def end():
        if running:
            running.pop().llm_engine.engine_core.shutdown()
            gc.collect()
            cleanup_dist_env_and_memory()

    def begin(*args, **options):
        end()
        running.append(cases.engine(*args, **options))
        return running[0]

    running = []
    yield begin
    end()

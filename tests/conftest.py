"""Settings for all tests."""

import gc
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, and xdist has the other cores


def _without_the_root(name: str) -> None:
    """Let a folder of the checkout be imported that is not in the wheel. With the root itself on sys.path, kernels/ and
    adapters/ would hide Hugging Face's packages of these names."""
    folder = Path(__file__).parents[1] / name
    spec = spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


_without_the_root("recipes")


def pytest_collection_finish() -> None:
    """What has been imported stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()

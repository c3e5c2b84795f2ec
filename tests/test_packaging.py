"""The package: what importing it does and does not do, and what its wheel will hold."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vtok

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {name: ROOT / folder for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}

# Modules that only an extra's user imports: package or module -> what they may import beside the core.
EXTRAS = {
    "vtok.draw": {"numpy", "matplotlib"},  # numpy comes with matplotlib
    "vtok.show": {"jinja2"},
    "vtok.show_text": {"jinja2"},
    "vtok.kernels": {"triton"},
    "vtok.rl": {"accelerate", "datasets", "numpy", "safetensors", "trl"},  # the others come with trl or transformers
    "vtok.serving": {"vllm"},
    # its pictures take the extra zoo, which brings numpy and scipy
    "vtok.eval": {"lmms_eval", "loguru", "numpy", "scipy", "tqdm", "yaml"},
    "vtok.eval.pages": {"jinja2", "markupsafe", "huggingface_hub"},  # of jinja2 and transformers
}


def python(code, cwd="/"):
    """What `code` prints in a fresh interpreter with `cwd` on sys.path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_version():
    assert PROJECT["project"]["version"] == vtok.__version__


def test_one_url_and_version_everywhere():
    urls = PROJECT["project"]["urls"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    for url in urls.values():
        if "/main/" in url:
            assert (ROOT / url.partition("/main/")[2]).is_file(), url
    citation = (ROOT / "CITATION.cff").read_text().split("\n")
    assert {f"version: {vtok.__version__}", f"repository-code: {urls['Repository']}"} <= set(citation)


def test_import_is_light():
    heavy = ["torch", "transformers", "triton", "numpy", "PIL", "matplotlib", "rich"]
    code = f"import sys; import vtok; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


@pytest.fixture(scope="module")
def from_the_root():
    """What an interpreter that starts in the root of the repo says of our import, and then of Hugging Face's."""
    code = """
import sys, torch, transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as masks
snapshot = lambda: (dict(registry), dict(registry._global_mapping), dict(masks), torch.get_num_threads())
before, modules = snapshot(), set(sys.modules)
import vtok
vtok.patch, vtok.available(), vtok.Trace  # brings in the engine, every compressor and every adapter
model_code = lambda name: name.startswith("transformers.models.") and ".modeling_" in name
assert before == snapshot(), "registry changed"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
new = set(sys.modules) - modules
print(sorted(m for m in new if m.split(".")[0] == "triton" or model_code(m) and ".auto." not in m))

from transformers import LlamaConfig, LlamaForCausalLM
import transformers.integrations.hub_kernels
sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
LlamaForCausalLM(LlamaConfig(**sizes))
import vtok.kernels, vtok.adapters
print(vtok.kernels.__name__, vtok.adapters.__name__)
"""
    return python(code, cwd=ROOT).split("\n")


def test_the_engine_changes_nothing_when_imported(from_the_root):
    assert from_the_root[0] == "[]"


def test_folders_do_not_shadow_other_packages(from_the_root):
    """From the root of the repo, `kernels` and `adapters` on sys.path are ours and not Hugging Face's."""
    assert from_the_root[1] == "vtok.kernels vtok.adapters"


def test_an_installed_kernels_package_is_found_from_the_root(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '9.9'\nname = __name__\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.__version__, kernels.name)"
    assert python(code, cwd=ROOT) == "9.9 kernels"
    absent = "import kernels; print(hasattr(kernels, '__version__'), hasattr(kernels, 'get_kernel'))"
    assert python(absent, cwd=ROOT) == "False False"


def test_every_folder_with_code_is_a_listed_package():
    """A folder that is not listed imports in an editable install and is missing from the wheel."""
    assert sorted(FOLDERS) == sorted(PROJECT["tool"]["setuptools"]["packages"])
    listed = {folder.resolve() for folder in FOLDERS.values()}
    for top in ("vtok", "adapters", "kernels", "eval"):
        for file in (ROOT / top).rglob("*.py"):
            assert file.parent in listed, f"{file.parent.relative_to(ROOT)} is not in pyproject.toml"
    for folder in listed:
        assert (folder / "__init__.py").is_file()


def test_the_wheel_takes_data_along():
    """The bundled models, and what pages are made of."""
    data = PROJECT["tool"]["setuptools"]["package-data"]
    for package, suffixes in {"vtok": {".png", ".j2"}, "vtok.model_cards": None, "vtok.eval.pages": None}.items():
        folder = FOLDERS[package]
        taken = {file for pattern in data[package] for file in folder.glob(pattern)}
        kept = {f for f in folder.rglob("*") if f.is_file() and f.suffix != ".py" and "__pycache__" not in f.parts}
        assert {f for f in kept if suffixes is None or f.suffix in suffixes} <= taken


def top_level_imports(file):
    """The packages that importing `file` imports, not those in functions or under `if TYPE_CHECKING`."""
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", [name for name in FOLDERS if name != "vtok.model_cards"])
def test_modules_import_only_declared_dependencies(package):
    named = {"pillow": "PIL"}
    core = {named.get(name, name) for name in (d.split(">")[0] for d in PROJECT["project"]["dependencies"])}
    for file in FOLDERS[package].glob("*.py"):
        parts = f"{package}.{file.stem}".split(".")
        extra = set().union(*(EXTRAS.get(".".join(parts[: i + 1]), set()) for i in range(len(parts))))
        allowed = core | extra | {"vtok"} | sys.stdlib_module_names
        assert set(top_level_imports(file)) <= allowed, file

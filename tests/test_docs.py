"""The pages: their samples run, the refusals that they quote are those of the code, and each page can be found."""

import json
import re
from pathlib import Path

import pytest
import yaml

from vtok import compressor, zoo

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
RUN = re.compile(r"^<!-- run -->\n```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
pytestmark = pytest.mark.skipif(not PAGES, reason="not in the repository")


def samples(page: Path) -> list[str]:
    return RUN.findall(page.read_text())


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Samples write files and define methods: neither is to be seen by other tests."""
    monkeypatch.chdir(tmp_path)
    before = set(compressor.load_all())
    yield
    for name in set(compressor.load_all()) - before:
        del compressor._REGISTRY[name]


@pytest.mark.parametrize("page", [page for page in PAGES if samples(page)], ids=lambda page: page.stem)
def test_samples_of_a_page_run(page, elsewhere):
    """In their order, one after the other, as a reader would."""
    names = {"__name__": f"docs_{page.stem}"}
    for sample in samples(page):
        exec(compile(sample, str(page), "exec"), names)


def test_pages_that_teach_the_api_have_samples():
    assert {"patch", "compose", "train", "tune", "serving", "add_method"} <= {p.stem for p in PAGES if samples(p)}


def test_refusals_are_quoted_as_they_are():
    """In both tables of troubleshoot.md, which must be kept true."""
    files = [file for folder in ("vtok", "adapters") for file in (ROOT / folder).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(file.read_text() for file in files))
    rows = re.findall(r'^\| (".+?) \| ', (ROOT / "docs" / "troubleshoot.md").read_text(), re.MULTILINE)
    quoted = [message for row in rows for message in re.findall(r'"(.+?)"', row)]
    assert len(quoted) > 20
    assert [message for message in quoted if message not in code] == []


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(leaves(nav)) == [page.name for page in PAGES]


def leaves(item) -> list[str]:
    if isinstance(item, str):
        return [item]
    return [leaf for value in (item.values() if isinstance(item, dict) else item) for leaf in leaves(value)]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebooks_run(notebook, elsewhere, capsys):
    """Their code cells, in order; they are committed without outputs."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]
    names = {"__name__": notebook.stem}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(notebook), "exec"), names)
    assert zoo.DEMO_ANSWER in capsys.readouterr().out


def test_there_are_two_notebooks():
    assert {file.stem for file in NOTEBOOKS} >= {"quick_tour", "compare_methods"}

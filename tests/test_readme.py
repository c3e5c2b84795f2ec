"""The README says what is so."""

import re
from pathlib import Path

import pytest
from contract import FAMILIES, batch, picture, tiny
from typer.testing import CliRunner

import vtok
from vtok import cli
from vtok.errors import Unsupported

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="not in the repository")


def test_the_readme_has_the_table_of_methods():
    between = README.read_text().split("<!-- methods", 1)[1].split("-->\n", 1)[1].split("<!-- /methods -->", 1)[0]
    assert between == CliRunner().invoke(cli.app, ["methods", "--markdown"]).output


def listed() -> dict[tuple[str, str], str]:
    """(method, family) -> why not, as the README's list has it."""
    line = re.compile(r"^- `(\w+)` (does not go|goes by an option) with (.+?): (.+)$", re.MULTILINE)
    lines = line.findall(README.read_text())
    return {(m, family): f"{how}: {why}" for m, how, some, why in lines for family in re.findall(r"`(\w+)`", some)}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_list_of_what_does_not_go_together_is_true(family):
    model, _ = tiny(family)
    said = listed()
    for name, about in vtok.available()["compressors"].items():
        how, _, why = said.pop((name, family), "goes").partition(": ")
        if about["trained"]:
            continue  # needs weights; their own tests go through the families
        if how == "goes":
            vtok.patch(model, name).remove()
            continue
        with pytest.raises(Unsupported, match="needs") as refusal:
            vtok.patch(model, name)
        if how == "does not go":
            (named,) = re.findall(r"needs (.+), which", str(refusal.value))
            named, needs = set(named.split(", ")), set(why.removeprefix("needs ").split(", "))
            assert needs & named if "+" in about["stage"] else needs <= named  # of a part each speaks for itself
        else:
            assert why in str(refusal.value)
            (option,) = re.findall(r"(\w+)='(\w+)'", why)
            vtok.patch(model, name, **dict([option])).remove()
    assert not [pair for pair in said if pair[1] == family]  # nor of methods that there are not


def test_links_go_anywhere_the_readme_is_shown():
    """A package index knows no relative links, and what is linked in the repository is there."""
    links = re.findall(r"\]\((.+?)\)", README.read_text())
    assert all(link.startswith("https://") for link in links)
    ours = [link for link in links if "/vtok/vtok/" in link]
    assert len(ours) > 10
    for link in ours:
        assert (ROOT / link.partition("/main/")[2]).is_file(), link


def test_the_readmes_compressor_works():
    """The example of how to add one, run as written."""
    code = README.read_text().split("## Add a compressor", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    names: dict = {}
    exec("from dataclasses import dataclass\nfrom vtok.types import *\nfrom vtok.stages.pre_llm import *\n", names)
    exec(code.replace('    name = "longest"\n', ""), names)  # unnamed, so that the registry does not keep it
    model, processor = tiny("llava")
    with vtok.patch(model, names["LongestFeatures"](keep=0.25)) as patch:
        model(**batch(processor, ["# what?"], [picture(56, 56)]))
    assert patch.trace.n_kept == [4]

"""The README says what is so."""

from pathlib import Path

import pytest
from contract import FAMILIES, batch, picture, tiny
from typer.testing import CliRunner

import vtok
from vtok import cli
from vtok.errors import Unsupported
from vtok.methods import fit

README = Path(__file__).parents[1] / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="not in the repository")


def test_the_readme_has_the_table_of_methods():
    between = README.read_text().split("<!-- methods", 1)[1].split("-->\n", 1)[1].split("<!-- /methods -->", 1)[0]
    assert between == CliRunner().invoke(cli.app, ["methods", "--markdown"]).output


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_methods_and_families_is_true(family):
    model, _ = tiny(family)
    for name, about in vtok.available()["compressors"].items():
        if about["trained"]:
            continue  # needs weights; their own tests go through the families
        fits = fit(about, family)
        if fits == "yes":
            vtok.patch(model, name).remove()
        else:
            with pytest.raises(Unsupported, match="needs") as refusal:
                vtok.patch(model, name)
            assert fits == "option" or fits.removeprefix("no ").split(", ")[0] in str(refusal.value)


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

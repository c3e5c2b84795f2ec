"""The rooms: no import cycles, no long files or functions, evidence and recipes behind the suite."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"vtok": "vtok", "recipes": "recipes"} | {name: f"vtok.{name}" for name in ("adapters", "kernels", "eval")}
pytestmark = pytest.mark.skipif(not (ROOT / "recipes").is_dir(), reason="not in the repository")


def modules():
    """name -> file of every module."""
    found = {}
    for folder, package in HOMES.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = file
    return found


MODULES = modules()
TREES = {name: ast.parse(file.read_text()) for name, file in MODULES.items()}


def imported(statements):
    """Our modules that statements import when they run: what functions import later, and what is for type checkers, is
    left out."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            yield from imported([*node.body, *node.orelse])
        elif isinstance(node, ast.Try | ast.With):
            yield from imported(node.body)


def test_no_import_cycles():
    graph = {name: {x for x in imported(tree.body) if x in MODULES and x != name} for name, tree in TREES.items()}
    assert graph["vtok.patching"] >= {"vtok.engine.forward", "vtok.compressor"}
    done, path = set(), []

    def visit(name):
        if name in path:
            raise AssertionError(" -> ".join([*path[path.index(name) :], name]))
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(path.pop())

    for name in graph:
        visit(name)


def test_the_suite_imports_neither_evidence_nor_recipes():
    """Outside of the command line, not even in functions."""
    for name, tree in TREES.items():
        if name.startswith("vtok.") and not name.startswith(("vtok.cli", "vtok.eval")):
            nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
            behind = [x for x in imported(nodes) if x.startswith(("vtok.eval", "vtok.cli", "recipes"))]
            assert not behind, f"{name} imports {behind}"


def test_no_file_is_long():
    long = {name: n for name, file in MODULES.items() if (n := file.read_text().count("\n")) > 500}
    assert not long


def test_no_function_is_long():
    long = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60
    }
    assert not long

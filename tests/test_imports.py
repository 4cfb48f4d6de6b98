"""Arrows go down: `support/` knows none of the five files, a file knows those above it alone."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

ORDER = ["sentencekv", "model", "cache", "segment", "generate"]  # a file imports those before it
FOLDERS = ("support", "weights", "benchmarks", "course")


def modules() -> dict:
    """Name -> path of every module of the project but the tests. A name in a folder has a dot."""
    paths = [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in
                                   (ROOT / folder).rglob("*.py"))]
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports_of(path, known) -> set:
    """The modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # `from a import b`: b may be a module of a
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= parts & known or {node.module}
    return found & known


def graph() -> dict:
    """Module -> the modules that it imports."""
    known = modules()
    return {name: imports_of(path, known.keys()) - {name} for name, path in known.items()}


def test_support_imports_nothing_but_itself():
    for name, imported in graph().items():
        if name.startswith("support"):
            assert all(other.startswith("support") for other in imported), name


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_above_it(name):
    above = {*ORDER[: ORDER.index(name)]}
    allowed = ("support.", "weights.") if name == "generate" else ("support.",)
    for other in graph()[name]:
        assert other in above or other.startswith(allowed) or other == "support", other


def test_the_program_needs_neither_course_nor_benchmarks():
    for name, imported in graph().items():
        if not name.startswith(("course", "benchmarks")):
            assert not any(other.startswith(("course", "benchmarks")) for other in imported), name


def test_nothing_that_the_program_runs_imports_it_again():
    """`python generate.py` is the module `__main__`: an import would load it a second time."""
    for name, imported in graph().items():
        assert "generate" not in imported or name.startswith(("course", "benchmarks")), name


def test_no_modules_import_each_other():
    TopologicalSorter(graph()).prepare()


def test_a_cycle_is_found():
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()


def test_others_take_the_loop_of_generate_and_not_its_command_line():
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module == "generate":
                names = {alias.name for alias in node.names}
                assert names <= {"generate", "make_cache", "next_logits", "prefill", "sampler",
                                 "seal_finished"}, path


def test_rows_tables_and_inputs_need_no_torch():
    code = ("import sys, benchmarks.rows, benchmarks.tables, benchmarks.data;"
            " assert 'torch' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

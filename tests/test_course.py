"""The course does what it says: stubs are the project's, every bug is caught by an oracle."""

import doctest
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import sentencekv
from course import check, read, score
from course.exercises import stubs

BUGS = {  # a patch in course/bugs, and an oracle that catches it
    "1_one_slot_too_many": "test_cache.py::test_a_small_budget_selects_what_the_slow_way_selects",
    "2_scores_that_stay": "test_cache.py::test_a_small_budget_selects_what_the_slow_way_selects",
    "3_a_position_for_a_row":
        "test_cache.py::test_a_small_budget_selects_what_the_slow_way_selects",
    "4_heads_in_the_wrong_group": "test_model.py::test_decoding_one_by_one_equals_one_forward",
    "5_a_mean_of_dropped_keys":
        "test_cache.py::test_a_small_budget_selects_what_the_slow_way_selects",
}


@pytest.fixture
def copy(tmp_path):
    """The project's modules and tests, to be changed."""
    for folder in (".", "tests", "benchmarks", "weights", "support"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for file in (ROOT / folder).glob("*.py"):
            shutil.copy(file, tmp_path / folder)
    return tmp_path


def run_python(folder, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          encoding="utf-8")


def run_tests(folder, *tests):
    return run_python(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                      *(f"tests/{test}" for test in tests))


def test_every_bug_has_an_oracle():
    assert {path.stem for path in (ROOT / "course" / "bugs").glob("*.patch")} == set(BUGS)


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(copy, bug):
    patch = ROOT / "course" / "bugs" / f"{bug}.patch"
    subprocess.run(["git", "apply", patch], cwd=copy, check=True)
    done = run_tests(copy, BUGS[bug])
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout


@pytest.mark.slow
def test_without_a_bug_the_oracles_pass(copy):
    done = run_tests(copy, *set(BUGS.values()))
    assert done.returncode == 0, done.stdout


def test_the_stubs_are_the_project_s_signatures_and_docstrings(tmp_path):
    stubs.write(tmp_path)
    kept = {path.name: path.read_text(encoding="utf-8")
            for path in (ROOT / "course" / "exercises").glob("[0-9]*.py")}
    assert kept == {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", stubs.EXERCISES)
def test_a_stub_is_a_function_that_is_still_to_be_written(name):
    scope = {}
    exec((ROOT / "course" / "exercises" / f"{name}.py").read_text(encoding="utf-8"), scope)
    function = scope[name[3:]]
    with pytest.raises(NotImplementedError):
        function(*[None] * function.__code__.co_argcount)


LESSONS = sorted((ROOT / "course").glob("[0-9]*.md"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.name)
def test_a_lesson_computes_what_it_says_and_names_functions_that_exist(lesson):
    text = lesson.read_text(encoding="utf-8")
    examples = "\n\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    test = doctest.DocTestParser().get_doctest(examples, {}, lesson.name, str(lesson), 0)
    assert test.examples and doctest.DocTestRunner().run(test).failed == 0
    for function in (f for name, (f, _) in stubs.EXERCISES.items() if name[:2] == lesson.name[:2]):
        assert f".{function.__qualname__}" in "".join(read.INCLUDE.findall(text))
    whole = read.with_code(text)
    assert "```include" in text and "```include" not in whole and "def " in whole


SECTIONS = ["**The question.**", "![", "## The words", "## By hand", "## Predict",
            "## The task", "## The project's lines", "## What breaks without it"]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.name)
def test_a_lesson_has_the_parts_of_a_lesson(lesson):
    text, number = lesson.read_text(encoding="utf-8"), int(lesson.name[:2])
    assert text.startswith(f"# {number}. ") and 90 <= len(text.splitlines()) <= 170
    text = text.replace("<img alt=", "![")
    places = [text.find(part) for part in SECTIONS]
    assert min(places) > 0 and places == sorted(places), dict(zip(SECTIONS, places))
    assert f"python -m course.read {number}`" in " ".join(text.split())
    if number in check.LESSONS:
        assert f"python -m course.check {number} --folder mine" in text
    assert text.count("<details>") == text.count("</details>") >= 2


def test_there_are_twelve_lessons_and_the_map_names_them():
    assert [int(lesson.name[:2]) for lesson in LESSONS] == [*range(12)]
    text = (ROOT / "course" / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    for lesson in LESSONS:
        title = lesson.read_text(encoding="utf-8").partition("\n")[0].partition(". ")[2]
        assert f"[{title}]({lesson.name})" in text


@pytest.mark.slow
def test_a_score_is_compared_with_the_project_s(tmp_path, capsys, monkeypatch, default_folder):
    file = tmp_path / "06_mine.py"
    file.write_text("def mine(q, vectors, variances, lengths):\n    return -variances\n")
    monkeypatch.setattr(score, "LENGTH", 300)
    monkeypatch.setattr(score, "METHODS", "sentencekv:score=mine")
    monkeypatch.setitem(sentencekv.SCORES, "mine", None)  # removed after the test
    assert score.main([str(file), "--count", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("| sentencekv:score=mine | ") == 2
    assert score.main([str(tmp_path / "none.py")]) == 2
    assert capsys.readouterr().err.startswith("course.score: ")

"""The course does what it says: stubs are the project's, every bug is caught by an oracle."""

import doctest
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import sentencekv
from course import check, read, score
from course.bugs import __main__ as bugs
from course.exercises import student, stubs

BUGS = {  # a patch in course/bugs, and an oracle that catches it
    "1": student.SLOW, "2": student.SLOW, "3": student.SLOW, "5": student.SLOW,
    "4": "test_model.py::test_decoding_one_by_one_equals_one_forward",
}


@pytest.fixture
def copy(tmp_path):
    bugs.copy_project(tmp_path)
    return tmp_path


def run_python(folder, *arguments):
    return subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          encoding="utf-8")


def run_tests(folder, *tests):
    return run_python(folder, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
                      *(f"tests/{test}" for test in tests))


def test_every_bug_has_an_oracle():
    assert {path.stem for path in bugs.PATCHES} == set(BUGS)


@pytest.mark.parametrize("patch", bugs.PATCHES, ids=lambda patch: patch.stem)
def test_the_page_of_the_bugs_names_the_line(patch):
    page = (bugs.FOLDER / "README.md").read_text(encoding="utf-8")
    text = patch.read_text(encoding="utf-8")
    file, line = re.search(rf"## Bug {patch.stem}\n.*?`(\w+\.py)`, line (\d+)", page,
                           re.DOTALL).groups()
    assert f"+++ b/{file}\n" in text
    number, changed = 0, set()
    for row in text.splitlines()[2:]:
        if begin := re.match(r"@@ -\d+,\d+ \+(\d+)", row):
            number = int(begin[1])
            continue
        changed |= {number} if row[0] in "+-" else set()
        number += row[0] != "-"
    assert int(line) in changed


@pytest.mark.slow
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(copy, bug):
    """Without it the oracles pass: they are tests of this suite."""
    bugs.apply(bugs.FOLDER / f"{bug}.patch", copy)
    done = run_tests(copy, BUGS[bug])
    assert done.returncode == 1 and "1 failed" in done.stdout, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("text, message", [
    (None, "{file}: there is no such file"),
    ("def own(): pass", "{file} has no test: no function whose name begins with test_"),
    ("def test_own(): assert False", "{file} must pass on the project as it is, and does not"),
])
def test_a_file_that_is_no_test_of_one_s_own_is_named_in_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "test_own.py"
    if text is not None:
        file.write_text(text)
    assert bugs.main([str(file)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"course.bugs: {message.format(file=file)}"


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
    book = score.BOOK.read_text(encoding="utf-8")
    short = tmp_path / "short.txt"  # from the list with the cost of the boards to the question
    short.write_text(book[book.index("for such materials") :], encoding="utf-8")
    monkeypatch.setattr(score, "BOOK", short)
    monkeypatch.setattr(score, "LENGTH", 300)
    monkeypatch.setitem(sentencekv.SCORES, "mine", None)  # removed after the test
    assert score.main([str(file), "--count", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("| sentencekv:score=mine | ") == 3  # found, more than gaussian, attention
    *_, line = out.splitlines()
    assert re.fullmatch(r"06_mine\.py \| \d+ % found \| -?\d+ more than gaussian \| \d+ and \d+ are"
                        r" possible \| [\d.]+% of the attention \| gaussian [\d.]+% \|"
                        r" best_sentences [\d.]+% \| best_tokens [\d.]+%", line)


@pytest.mark.parametrize("text, message", [
    (None, "FileNotFoundError: "),
    ("def other(): pass", "does not define mine"),
    ("def mine(*_): raise NotImplementedError", "NotImplementedError: "),
    ("def mine(q, *_): return q", "the result has the shape (2, 4, 6), and must have that of"),
    ("def mine(q, vectors, variances, lengths): return 0 * variances / 0", "is not a number"),
])
def test_what_is_no_score_is_said_in_one_line(tmp_path, capsys, monkeypatch, text, message):
    monkeypatch.setitem(sentencekv.SCORES, "mine", None)
    if text is not None:
        (tmp_path / "06_mine.py").write_text(text)
    assert score.main([str(tmp_path / "06_mine.py")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("course.score: ") and message in line


def test_no_prompts_are_no_comparison(capsys):
    assert score.main(["06_mine.py", "--count", "0"]) == 2
    assert capsys.readouterr().err == "course.score: --count is 0, must be at least 1\n"

"""Every figure in a lesson comes from a run: of the program, here, or of the script of a table."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import lessons
from benchmarks.tables import rows_of

LESSONS = sorted((ROOT / "course").glob("[0-9]*.md"))
NUMBER = r"\d[\d,]*(?:\.\d+)?"
UNIT = r"(?:ms|s|bytes|KiB|MiB|GiB|MB|GB|GB/s|%)"
# A figure has a decimal point, a comma before three digits, or a unit, as both of "43 and 32 ms".
FIGURE = re.compile(rf"(?<![\w.,^])(?:\d+(?:,\d{{3}})+(?:\.\d+)?|\d+\.\d+"
                    rf"|\d+(?=(?:(?:,| to| and| or) {NUMBER})* {UNIT}(?!\w)))(?![\w½])")
NAMES = r"Section [\d.]+|Llama [\d.]+|torch [\d.+a-z]+|\[[\d.]+\]|https[^)]*"
BLOCK = re.compile(r"^```(?:python|console)\n.*?^```$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"<!-- table.*?<!-- end of table -->", re.DOTALL)
LINK = re.compile(r"\]\((\.\./[\w/.]+\.md)#([\w-]+)\)")


def numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(NUMBER, text.replace("_", ""))]


def section(link) -> str:
    """The part of another page that a lesson links to."""
    page = (ROOT / "course" / link[1]).read_text(encoding="utf-8")
    for heading, text in re.findall(r"^#+ (.+)\n((?:(?!^#).*\n?)*)", page, re.MULTILINE):
        if re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") == link[2]:
            return text
    raise ValueError(f"{link[1]} has no {link[2]}")


def from_runs(text: str) -> str:
    """What a run makes of a lesson: its code with the results, tables, pictures, linked tables."""
    pictures = [(ROOT / "course" / name).read_text(encoding="utf-8")
                for name in re.findall(r"figures/\w+\.svg", text)]
    labels = [label for picture in pictures for label in re.findall(r">([^<]+)</text>", picture)]
    return "\n".join([*BLOCK.findall(text), *TABLE.findall(text), *labels,
                      *map(section, LINK.finditer(text))])


def figures(text: str) -> list[str]:
    """Those that the text itself says."""
    for pattern in (BLOCK, TABLE, re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL),
                    re.compile(r"`[^`]*`"), re.compile(NAMES)):
        text = pattern.sub("", text)
    return FIGURE.findall(text)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.name)
def test_every_figure_of_a_lesson_comes_from_a_run(lesson):
    """Rounded as it is said: 12.1 % may be 0.1210 there."""
    text = lesson.read_text(encoding="utf-8")
    known = numbers(from_runs(text))
    wrong = []
    for figure in figures(text):
        digits = len(figure.partition(".")[2])
        said = float(figure.replace(",", ""))
        if not any(said in (round(x, digits), round(100 * x, digits)) for x in known):
            wrong.append(figure)
    assert not wrong


CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


def alike(shown: str, printed: str) -> bool:
    """Three dots stand for anything, as for a time. Other words are the same. A number may differ
    by 1 %, because another processor rounds differently."""
    shown, printed = (" ".join(text.split()) for text in (shown, printed))
    pattern = re.escape(shown).replace(r"\.\.\.", ".*")
    pattern = re.sub(r"\d+(?:\\\.\d+)?", r"(\\d+(?:\\.\\d+)?)", pattern)
    found = re.fullmatch(pattern, printed)
    wanted = re.findall(r"\d+(?:\.\d+)?", shown)
    return found is not None and all(math.isclose(float(a), float(b), rel_tol=0.01)
                                     for a, b in zip(found.groups(), wanted, strict=True))


def test_three_dots_stand_for_anything_and_a_number_for_what_is_near_it():
    assert alike("load  ...\nin all 19.1%", "load 30.1 31.9\nin  all 19.2%")
    assert not alike("in all 18.8%", "in all 19.1%")
    assert not alike("61,051,320 bytes", "60,373,904 bytes")
    assert not alike("in all 19.1%", "of all 19.1%")


@pytest.mark.slow
@pytest.mark.parametrize("lesson", [path for path in LESSONS
                                    if "```console" in path.read_text(encoding="utf-8")],
                         ids=lambda path: path.name)
def test_a_command_prints_what_its_lesson_shows(lesson, tmp_path, default_folder):
    """In a folder that looks like the project, with an empty folder `mine`."""
    for path in ROOT.iterdir():
        if path.name != "mine":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "mine").mkdir()
    variables = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    blocks = "".join(CONSOLE.findall(lesson.read_text(encoding="utf-8")))
    for command, shown in COMMAND.findall(blocks):
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=variables, text=True,
                              encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert alike(shown, done.stdout), f"{command}\n{done.stdout}"


AGAIN = [row for row in rows_of("lessons") if row["run"].endswith(("512", "full"))]


@pytest.mark.slow
@pytest.mark.parametrize("row", AGAIN, ids=lambda row: row["run"])
def test_a_recorded_run_gives_the_same_again(row, default_folder):
    """All but times; what is loaded depends on rounding. Other budgets have the same formulas."""
    again = lessons.run(row["run"])
    for name in ("text", "prompt_tokens", "new_tokens", "sentences", "decode_steps",
                 "device_kv_parts", "device_kv_bytes", "host_kv_bytes", "full_kv_bytes",
                 "selected_bytes"):
        assert again[name] == row[name], name
    assert again["loaded_bytes"] == pytest.approx(row["loaded_bytes"], rel=0.01)


def test_the_recorded_runs_are_those_that_are_asked_for():
    assert [row["run"] for row in rows_of("lessons")] == [*lessons.RUNS]

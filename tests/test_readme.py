"""What README.md and examples/README.md say is run here."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from test_generate import run_json

import generate


README = (ROOT / "README.md").read_text(encoding="utf-8")
IN_ONE_LINE = " ".join(README.split())  # an answer may be broken anywhere in a paragraph


def test_the_picture_comes_first_and_every_link_leads_somewhere():
    lines = README.splitlines()
    assert len(lines) <= 180
    assert any("<picture>" in line for line in lines[:25])
    pages = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("*/*/*.md")]
    assert len(pages) >= 16
    for page in pages:
        links = re.findall(r"\]\(([^)]+)\)|src(?:set)?=\"([^\"]+)\"", page.read_text("utf-8"))
        for link in (a or b for a, b in links if not (a or b).startswith("https://")):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def anchors(page) -> set:
    """As GitHub makes them of the headings: lower case, no punctuation, hyphens for blanks."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tree_counts_the_lines_of_six_files():
    counted = re.findall(r"^(\S+\.py) +(\d+) +\d+  ", README, re.MULTILINE)
    assert len(counted) == 6 and "XX" not in README
    for file, lines in counted:
        assert int(lines) == len((ROOT / file).read_text(encoding="utf-8").splitlines()), file


def test_every_flag_that_is_mentioned_exists(capsys):
    with pytest.raises(SystemExit):
        generate.parse(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for file in ("README.md", "examples/README.md", "weights/README.md"):
        text = (ROOT / file).read_text(encoding="utf-8")
        others = r"^\S*python -m .*|python tests/[^`]*|torchrun\s[^`]*"  # flags of other programs
        text = re.sub(others, "", text, flags=re.MULTILINE)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= known, file


@pytest.mark.slow
def test_the_first_command_answers_as_the_readme_shows(default_folder):
    command, *_ = re.findall(r"generate\.py --prompt .*", README)
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    answer = done.stdout.strip()
    assert "8.03" in answer
    assert answer in IN_ONE_LINE


@pytest.mark.slow
def test_questions_are_answered_as_the_readme_shows(default_folder, tmp_path):
    (command,) = re.findall(r"generate\.py --prompt .* --ask .*", README)
    command = command.replace("--save ", f"--save {tmp_path}/")
    done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    *_, question, answer = done.stdout.strip().splitlines()
    assert f"{question}\n{answer}\n" in README and (tmp_path / "walden.kv").exists()


@pytest.mark.slow
def test_the_lines_of_python_answer_as_the_command_does(default_folder):
    (lines,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    done = subprocess.run([sys.executable, "-c", lines], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and done.stdout.strip() in IN_ONE_LINE


def test_the_text_without_a_question_is_the_one_with_it():
    text, prompt = ((ROOT / "examples" / name).read_text(encoding="utf-8")
                    for name in ("walden.txt", "walden_house.txt"))
    rest = prompt.removeprefix(text)
    assert rest != prompt and rest.startswith("\n") and rest.count("\n") == 2


@pytest.mark.slow
@pytest.mark.parametrize("file, answer, cache", [
    ("walden_house.txt", "8.03", "sentencekv"),  # with the full cache: see tests/test_lessons.py
    ("needle_two_cities.txt", "marmalade", "sentencekv"),
    ("needle_two_cities.txt", "marmalade", "full")])
def test_the_examples_are_answered_rightly(capfd, default_folder, file, answer, cache):
    report = run_json(capfd, "--prompt", ROOT / "examples" / file, "--cache", cache,
                      "--token-budget", 256, "--max-new-tokens", 40, "--device", "cpu")
    assert answer in report["text"]
    assert 3500 <= report["prompt_tokens"] <= 7500
    if cache == "sentencekv":
        assert report["device_kv_bytes"] < 0.15 * report["full_kv_bytes"]

"""What README.md and examples/README.md say is run here."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT
from test_generate import run_json

import generate


def commands(file):
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("python generate.py ")]


def test_every_flag_that_is_mentioned_exists(capsys):
    with pytest.raises(SystemExit):
        generate.parse(["--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    for file in ("README.md", "examples/README.md", "weights/README.md"):
        for line in (ROOT / file).read_text(encoding="utf-8").splitlines():
            if "generate.py" in line or line.startswith("| `--"):
                assert set(re.findall(r"--[a-z-]+", line)) <= known, line


def test_the_first_command_answers_as_the_readme_shows(default_folder):
    (command,) = commands("README.md")
    done = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT,
                          capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    answer = done.stdout.strip()
    assert "8.03" in answer
    assert answer in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("cache", ["full", "sentencekv"])
@pytest.mark.parametrize("file, answer", [("walden_house.txt", "8.03"),
                                          ("needle_two_cities.txt", "marmalade")])
def test_the_examples_are_answered_rightly(capfd, default_folder, file, answer, cache):
    report = run_json(capfd, "--prompt", ROOT / "examples" / file, "--cache", cache,
                      "--token-budget", 256, "--max-new-tokens", 40, "--device", "cpu")
    assert answer in report["text"]
    assert 3500 <= report["prompt_tokens"] <= 7500
    if cache == "sentencekv":
        assert report["device_kv_bytes"] < 0.15 * report["full_kv_bytes"]

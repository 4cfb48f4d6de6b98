"""The pictures in course/figures are what their scripts draw."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import matplotlib
import pytest
from conftest import ROOT

from course.figures import two_tiers

FIGURES = ROOT / "course" / "figures"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    two_tiers.save(folder)
    return folder


def labels(svg: Path) -> list[tuple[str, float]]:
    """(words, font size in pixels at the picture's own width) of every label."""
    pattern = r'<text style="[^"]*?([0-9.]+)px[^>]*>([^<]*)</text>'
    found = re.findall(pattern, svg.read_text(encoding="utf-8"))
    return [(unescape(words), float(points) * 96 / 72) for points, words in found]


@pytest.mark.parametrize("page", ["light", "dark"])
def test_the_two_tiers_are_drawn_as_they_lie_in_the_repository(drawn, page):
    name = f"two_tiers_{page}.svg"
    kept, again = FIGURES / name, drawn / name
    if f"Matplotlib v{matplotlib.__version__}," in kept.read_text(encoding="utf-8"):
        assert again.read_bytes() == kept.read_bytes()
    assert labels(again) == labels(kept)


@pytest.mark.parametrize("page", ["light", "dark"])
def test_every_label_of_the_two_tiers_can_be_read(page):
    path = FIGURES / f"two_tiers_{page}.svg"
    assert path.stat().st_size < 60_000
    found = labels(path)
    words = " ".join(words for words, _ in found)
    for term in ("prefill", "offload", "query × vectors → scores", "select", "load", "seal"):
        assert term in words
    assert min(size for _, size in found) >= 11


LESSONS = "".join(path.read_text(encoding="utf-8")
                  for path in (ROOT / "course").glob("[0-9]*.md"))
LESSON_FIGURES = sorted(path.stem for path in FIGURES.glob("*.svg") if "two_tiers" not in path.stem)


@pytest.mark.slow
@pytest.mark.parametrize("name", LESSON_FIGURES)
def test_a_figure_of_a_lesson_is_what_its_command_draws(name, tmp_path):
    subprocess.run([sys.executable, "-m", f"course.figures.{name}", tmp_path], cwd=ROOT, check=True)
    kept, drawn = ((folder / f"{name}.svg").read_text(encoding="utf-8")
                   for folder in (FIGURES, tmp_path))
    number = r"-?\d+\.?\d*"  # one that is measured is rounded differently elsewhere
    assert re.sub(number, "", drawn) == re.sub(number, "", kept)
    for a, b in zip(re.findall(number, drawn), re.findall(number, kept), strict=True):
        assert abs(float(a) - float(b)) <= 1 + 0.01 * abs(float(b))
    assert len(kept) < 12_000 and f"figures/{name}.svg" in LESSONS
    assert min(map(int, re.findall(r'font-size="(\d+)"', kept))) >= 11

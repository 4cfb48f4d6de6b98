"""The pictures in course/figures are what their scripts draw."""

import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import matplotlib
import pytest
from conftest import ROOT

from benchmarks import plots
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


ROWS = [{"task": f"needle 1000 {depth}", "index": 0, "method": method, "budget": budget,
         "score": float(depth == 1)}
        for depth in (0, 1) for method, budget in (
            ("full", 192), ("sentencekv", 96), ("sentencekv", 192), ("quest:top=2", 96))]
SPEED = [{"model": "tiny", "dtype": "float32", "machine": "a CPU", "method": method,
          "length": length, "decode_ms_per_token": length / 100, "floor_ms": floor}
         for length in (200, 400) for method, floor in (("full", 1.0), ("sentencekv", None))]


@pytest.fixture
def figure(monkeypatch):
    """What was drawn last, as it was before it was written to a file."""
    seen, save = {}, plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: seen.update(axes=figure.axes) or save(
        figure, path))
    return seen


def words(axis):
    return [text.get_text() for text in axis.texts if text.get_text()]


def test_needles_are_a_cell_for_each_method_and_depth_at_each_budget(figure, tmp_path):
    plots.needle(ROWS, tmp_path / "needle.png")
    low, high = figure["axes"]
    assert [label.get_text() for label in low.get_yticklabels()] == [
        "full cache", "SentenceKV, ours", "quest:top=2"]
    assert words(low) == ["0", "100"] * 3
    assert words(high) == ["0", "100"] * 2  # the third method was not asked at this budget


@pytest.mark.parametrize("draw, best", [(plots.score_by_budget, 50), (plots.loss_by_budget, 0)])
def test_every_method_is_a_line_that_bears_its_name(figure, tmp_path, draw, best):
    draw(ROWS, tmp_path / "lines.png")
    (axis,) = figure["axes"]
    assert set(words(axis)) == {"full cache", "SentenceKV, ours", "quest:top=2"}
    full = axis.lines[0]
    assert (full.get_linestyle(), full.get_color()) == (":", "black")
    assert list(full.get_xdata()) == [96, 192] and list(full.get_ydata()) == [best, best]


def test_times_and_floors_are_lines_that_bear_their_names(figure, tmp_path):
    plots.ms_by_length(SPEED, tmp_path / "speed.png")
    assert set(words(figure["axes"][0])) == {
        "full cache", "SentenceKV, ours", "floor, full cache"}


def test_needles_and_losses_are_side_by_side_for_a_few_methods(figure, tmp_path):
    rows = ROWS + [row | {"task": "nll book", "score": row["score"] + 3} for row in ROWS]
    plots.quality(rows, tmp_path / "quality.png")
    assert [set(words(axis)) for axis in figure["axes"]] == [{"full cache", "SentenceKV, ours"}] * 2


def test_sinks_are_shown_by_layer(figure, tmp_path):
    rows = [{"task": f"{kind} book", "index": layer, "score": score} for layer in (0, 1)
            for kind, score in (("count", 8.0), ("secondary", 0.25), ("first", 0.5))]
    plots.sinks_by_layer(rows, tmp_path / "sinks.png")
    above, below = figure["axes"]
    assert [bar.get_height() for bar in above.patches] == [8, 8]
    assert set(words(below)) == {"secondary sinks", "first 4 tokens"}


def test_names_beside_lines_do_not_overlap():
    assert plots.spread([1, 2, 9], 2, 0, 10) == [0.5, 2.5, 9]
    assert plots.spread([0, 0, 0], 1, 0, 10) == [0, 1, 2]
    assert plots.spread([9.5, 9.5, 10], 1, 0, 10) == [8, 9, 10]


@pytest.mark.parametrize("task", ["needle", "ruler", "perplexity", "quality", "sinks",
                                  "speed_cpu_float32", "speed_cpu_bfloat16"])
def test_the_pictures_of_the_results_are_small(task):
    path = ROOT / "benchmarks" / "results" / f"{task}.png"
    assert 1_000 < path.stat().st_size < 120_000

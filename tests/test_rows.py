import doctest
import json

import pytest
from conftest import ROOT

from benchmarks import data, engine, pictures, rows, tables

ABOUT = dict.fromkeys(rows.SAME, "one")
PICTURES = sorted((ROOT / "benchmarks" / "results").glob("*.png"))


def row(method, index, budget, score):
    return {"task": "t", "method": method, "index": index, "budget": budget, "score": score}


def test_docstrings():
    assert doctest.testmod(rows).failed == 0


def test_a_row_without_provenance_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row("full", 0, None, 1.0)) + "\n")
    with pytest.raises(ValueError, match="has no commit, torch, .*: rows without provenance"):
        rows.read(path)
    with pytest.raises(ValueError, match="rows without provenance are not used"):
        rows.Results(path, ABOUT)


@pytest.mark.parametrize("name", rows.SAME)
def test_rows_of_another_provenance_are_not_added_to(tmp_path, name):
    path = tmp_path / "rows.jsonl"
    rows.Results(path, ABOUT).add("t", 0, [{"method": "full", "budget": None, "score": 1.0}])
    assert len(rows.Results(path, ABOUT | {"command": "another"}).rows) == 1
    with pytest.raises(ValueError, match=f"rows of another {name}: 'one', and here it is 'two'"):
        rows.Results(path, ABOUT | {name: "two"})


def test_only_what_is_missing_is_measured(tmp_path):
    path = tmp_path / "rows.jsonl"
    methods = [engine.Method("full", 9), engine.Method("snapkv", 9)]
    kept = rows.Results(path, ABOUT)
    assert kept.missing("t", 0, methods) == methods
    kept.add("t", 0, [{"method": "full", "budget": None, "score": 1.0}], answers=["x"])
    again = rows.Results(path, ABOUT)
    assert again.rows == [row("full", 0, None, 1.0) | {"answers": ["x"]}]
    assert again.missing("t", 0, methods) == methods[1:]
    assert again.missing("t", 1, methods) == methods


def test_differences_are_those_of_the_same_prompt_and_budget():
    found = [row("full", 0, None, 1.0), row("full", 1, None, 0.5), row("a", 0, 5, 0.25),
             row("a", 1, 5, 0.5), row("a", 0, 9, 1.0), row("b", 0, 5, 0.5)]
    found = rows.at_every_budget(found)
    differences = rows.differences(found, "a")
    assert [(r["method"], r["budget"], r["score"]) for r in differences] == [
        ("full", 5, 0.75), ("full", 9, 0.0), ("full", 5, 0.0), ("a", 5, 0), ("a", 5, 0),
        ("a", 9, 0), ("b", 5, 0.25)]
    table = rows.by_method(rows.columns_of(differences, "mean"))
    assert table.splitlines()[2] == "| full | 38 ± 37 | 0 |"


def test_what_has_no_budget_alone_has_none():
    assert rows.at_every_budget([row("full", 0, None, 1.0)]) == [row("full", 0, None, 1.0)]


def test_a_column_has_the_rows_that_its_line_asks_for(tmp_path, monkeypatch):
    lines = [{"task": task, "index": 0, "results": [
        {"method": "full", "budget": None, "score": 1.0, "device": 1.0},
        {"method": "a", "budget": 9, "score": score, "device": 0.125}]}
        for task, score in (("one", 0.5), ("two", 1.5))]
    rows.write(tmp_path / "found.jsonl", ABOUT, lines)
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.rows_of.cache_clear()
    text = """before
<!-- table methods
methods: a full
per cent: found tasks=one budget=9
loss: found budget=9 of=loss
: found tasks=t* budget=9 of=device,percent
-->
| old |
<!-- end of table -->
after
"""
    again = tables.made_again(text)
    assert again == text.replace("| old |", """| method | per cent | loss | device | percent |
|---|---|---|---|---|
| a | 50 | 0.000 ± 0.500 | 12.5 | 150 |
| full | 100 | 0.000 ± 0.000 | 100.0 | 100 |""")
    assert tables.made_again(again) == again
    for wrong, message in (("budget=9", "budget=8"), "has no 'percent'"), (
            ("found tasks", "lost tasks"), "lost.jsonl"), (
            ("of=loss", "off=loss"), "needs a budget"), (
            ("methods: a", "methods: b"), "of method 'b'"), (
            ("<!-- end of table -->", ""), "1 tables begin, and 0 end"):
        with pytest.raises((ValueError, OSError), match=message):
            tables.made_again(text.replace(*wrong, 1))
    tables.rows_of.cache_clear()


@pytest.mark.parametrize("path", tables.FILES, ids=lambda path: path.name)
def test_making_the_tables_again_changes_nothing(path):
    text = path.read_text(encoding="utf-8")
    assert tables.made_again(text) == text


def test_every_file_of_results_says_where_it_comes_from_and_is_used():
    users = [*tables.FILES, ROOT / "benchmarks" / "pictures.py"]
    documents = "".join(path.read_text(encoding="utf-8") for path in users)
    for path in sorted(rows.FOLDER.glob("*.jsonl")):
        rows.read(path)
        assert path.stem in documents, path


def test_an_input_is_known_by_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("SENTENCEKV_DATA", str(tmp_path))
    assert data.find("mine.txt").name == "mine.txt"
    with pytest.raises(ValueError, match="walden.txt is missing. It is from: Project Gutenberg"):
        data.find("walden")
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "walden.txt").write_text("another")
    with pytest.raises(ValueError, match="has the SHA-256 .*, and not da5a69cc.* It is from"):
        data.find("walden")
    monkeypatch.setitem(data.INPUTS, "walden", data.INPUTS["walden"] | {
        "sha256": data.digest_of(tmp_path / "books" / "walden.txt")})
    assert data.find("walden").read_text() == "another"


def test_the_best_method_is_the_first_line_of_a_picture(tmp_path, monkeypatch):
    seen, save = {}, pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: seen.update(axes=figure.axes)
                        or save(figure, path))
    pictures.ranked({"found": {"snapkv": [0, 1], "full": [1, 1]}, "device": {"full": [2]}},
                    tmp_path / "a.png")
    left, right = seen["axes"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["SnapKV", "full cache"]
    assert [line.get_xdata()[0] for line in left.lines] == [0.5, 1]
    assert [line.get_xdata()[0] for line in right.lines] == [2]
    pictures.lines({("x", "y"): {"full": {1: [1], 2: [3]}, "floor of full": {1: [1]}}},
                   tmp_path / "b.png", ticks=[1, 2])
    words = [text.get_text() for text in seen["axes"][0].get_legend().get_texts()]
    assert words == ["full cache", "floor of full cache"]


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_the_pictures_of_the_results_are_small(path):
    assert 1_000 < path.stat().st_size < 120_000


def test_a_cell_with_fewer_prompts_says_how_many():
    found = [row("a", index, 9, 1.0) for index in range(3)] + [row("b", 0, 9, 0.0)]
    column = rows.Column("", found, 9)
    assert (column.cell("a"), column.cell("b"), column.cell("c")) == ("100 ± 0", "0 (1 of 3)", "")


def test_every_character_of_an_answer_can_be_read_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    result = {"method": "full", "budget": None, "score": 1.0, "text": "a\u2028b\x85c"}
    rows.Results(path, ABOUT).add("t", 0, [result])
    assert rows.read(path)[1][0]["text"] == "a\u2028b\x85c"


def test_the_measurements_are_read_in_one_sitting():
    assert len((ROOT / "benchmarks" / "README.md").read_text("utf-8").splitlines()) <= 400

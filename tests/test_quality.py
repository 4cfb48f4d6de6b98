import doctest
import json

import pytest
import torch
from conftest import TINY

from benchmarks import compare, leaderboard, quality, tasks
from benchmarks import rows as result_rows
from generate import generate, prefill

BOOK = "\n\n".join(f"Paragraph {i} of a short book. It says little! Does it?" for i in range(40))


def write_lines(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(BOOK)
    return path


def run(*arguments):
    return quality.main([str(a) for a in arguments])


def results(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics():
    assert tasks.qa_f1("The Cat sat.", "a cat", ()) == pytest.approx(2 / 3)
    assert tasks.qa_f1("dog", "cat", ()) == 0
    assert tasks.rouge_l_f("a b c d", "a x c", ()) == pytest.approx(2 * 2 / 7)
    classes = ("Date", "Food", "Date of birth")
    assert tasks.class_match("Date of birth", "Date of birth", classes) == 1
    assert tasks.class_match("Food or Date", "Date", classes) == 0.5
    assert tasks.class_match("none", "Date", classes) == 0
    assert tasks.code_similarity("\n# note\nx = 1\ny", "x = 1", ()) == 1
    example = tasks.Example("t", 0, "", ("One", "two"))
    assert example.score("it is ONE") == 0.5


def test_ruler_rows_are_taken_apart(tmp_path):
    chat = ("<|begin_of_text|><|start_header_id|>system<|end_header_id|>x<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|> Where?\n<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|> It is in ")
    path = write_lines(tmp_path / "qa.jsonl", {"input": chat, "outputs": ["Rome", 7]})
    (example,) = tasks.ruler_file(path)
    assert (example.message, example.prefix) == ("Where?", "It is in")
    assert example.answers == ("Rome", "7")


def test_bad_lines_are_named_and_good_ones_count(tmp_path, capsys):
    path = write_lines(tmp_path / "rows.jsonl", {"input": "a", "outputs": ["b"]}, "{", "3",
                       {"input": "c"}, {"input": "d", "outputs": ["e"]})
    assert [e.index for e in tasks.ruler_file(path)] == [0, 4]
    err = capsys.readouterr().err.splitlines()
    assert err == [f"{path}:2: is not a JSON object", f"{path}:3: is not a JSON object",
                   f"{path}:4: has no outputs"]


@pytest.mark.parametrize("family", tasks.FAMILIES)
def test_generated_rows_hold_their_answers_once(family):
    for example in tasks.ruler_generate(family, BOOK.split("\n\n"), 5):
        document, _, question = example.message.rpartition("\n\n")
        assert all(answer in document for answer in example.answers)
        if family != "vt":
            assert not any(answer in question for answer in example.answers)
    again = list(tasks.ruler_generate(family, BOOK.split("\n\n"), 5))
    assert again[-1] == example


def test_variables_are_assigned_in_reading_order():
    (example,) = tasks.ruler_generate("vt", BOOK.split("\n\n"), 1)
    places = [example.message.index(f"VAR {name} =") for name in example.answers]
    assert places == sorted(places)


def test_units():
    pieces = ["One", " two", ".", " Three", " four", " five", ".", " Six"]
    assert quality.units(pieces, "sentence", 128) == [(0, 3), (3, 7), (7, 8)]
    assert quality.units(pieces, "sentence", 3) == [(0, 3), (3, 5), (5, 7), (7, 8)]
    assert quality.units(pieces, "authors", 128) == [(0, 3), (3, 7), (7, 8)]
    assert quality.units(pieces, "chunk5", 128) == [(0, 5), (5, 8)]
    assert quality.units(pieces, "merged4", 128) == [(0, 7), (7, 8)]
    with pytest.raises(ValueError, match="unit 'page' is not"):
        quality.units(pieces, "page", 128)


@pytest.mark.slow
def test_needles_are_answered_by_every_method_and_not_twice(tiny_folder, book, tmp_path, capsys):
    out = tmp_path / "needle.jsonl"
    arguments = ("needle", "--data", book, "--model", tiny_folder, "--lengths", 300, "--depths",
                 "0,0.5,1", "--budgets", "96,128", "--limit", 2, "--out", out)
    assert run(*arguments) == 0
    first = results(out)
    asked = {*quality.METHODS} - {*quality.STUDIES}
    assert {r["method"] for r in first} == asked
    assert len(first) == 2 * sum(1 + quality.has_budget(method) for method in asked)
    assert all(r["held"] <= r["budget"] for r in first
               if quality.has_budget(r["method"]) and not r["method"].endswith("_dense"))
    assert "| full |" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".png").stat().st_size > 1000
    assert run(*arguments) == 0
    assert results(out) == first


@pytest.mark.slow
def test_every_question_of_a_document_is_answered_as_alone(tiny_folder, book, tmp_path):
    """By the full cache. All methods take part, and not twice."""
    out = tmp_path / "requests.jsonl"
    arguments = ("requests", "--data", book, "--model", tiny_folder, "--length", 300, "--budgets",
                 "128", "--count", 1, "--out", out, "--methods",
                 " ".join(quality.METHODS) + " snapkv:sees=nothing")
    assert run(*arguments) == 0
    rows = results(out)
    assert len(rows) == 8 * (1 + sum(map(quality.reads_on, quality.METHODS)))
    bench = quality.Bench(tiny_folder)
    paragraphs = quality.haystack(bench, BOOK, 300)
    (questions,) = tasks.requests(paragraphs, 1)
    for example in questions:
        (alone,) = bench.answers(bench.prompt_ids(example), example.max_new_tokens,
                                 [quality.Method("full", 128)])
        (row,) = [r for r in rows if r["task"] == example.task and r["method"] == "full"]
        assert row["text"] == bench.text(alone) and row["answers"] == list(example.answers)
    assert run(*arguments) == 0
    assert results(out) == rows


def test_a_choice_for_the_first_question_forgets_the_question(tiny_folder, book):
    bench = quality.Bench(tiny_folder)
    (questions,) = tasks.requests(quality.haystack(bench, BOOK, 300), 1)
    ids, n = bench.prompt_ids(questions[0]), 400
    shown = bench.record(ids)[0].document_and_last_queries(n)
    cache = shown.replay(quality.Method("snapkv", 96).new_cache(bench.model, ["a"] * n, 50))
    cache.forget_window()
    assert cache.num_tokens == n and cache.kept_at[0].max() < n
    assert cache.kept[0].shape[1] == 64 and cache.recent[0].shape[1] == 0
    before = cache.kept[0].clone()
    copy = cache.fork()
    bench.model.prefill(torch.tensor(ids[n:]), copy)
    assert cache.recent[0].shape[1] == 0 and copy.recent[0].shape[1] == len(ids) - n
    assert torch.equal(cache.kept[0], before)


def test_methods_together_write_what_each_writes_alone(tiny_folder, book):
    bench = quality.Bench(tiny_folder)
    (example,) = tasks.ruler_generate("single", BOOK.split("\n\n")[:8], 1)
    methods = [quality.Method(s, 96) for s in ("full", "snapkv", "sentencekv:score=votes")]
    ids = bench.prompt_ids(example)
    greedy = lambda logits: logits.argmax().item()  # noqa: E731
    for writer in bench.answers(ids, 30, methods):
        cache = writer.method.new_cache(bench.model, bench.tokenizer.pieces(ids), 30)
        first = prefill(bench.model, cache, ids, greedy)
        alone = generate(bench.model, cache, first, bench.tokenizer.detokenizer(), greedy,
                         bench.stop, 30, writer.method.sentence_limit)
        assert list(alone) == list(zip(writer.tokens, writer.pieces))


def test_perplexity_of_everything_is_the_full_cache_s(tiny_folder, book, tmp_path):
    out = tmp_path / "nll.jsonl"
    assert run("perplexity", "--data", book, "--model", tiny_folder, "--length", 200,
               "--new-tokens", 40, "--methods", "full sentencekv_16bit streamingllm", "--budgets",
               "96,512", "--out", out) == 0
    scores = {(r["method"], r["budget"]): r["score"] for r in results(out)}
    full = scores["full", 512]
    for method in ("sentencekv_16bit", "streamingllm"):
        assert scores[method, 512] == pytest.approx(full, abs=1e-4)
        assert scores[method, 96] != pytest.approx(full, abs=1e-4)
    lost = scores["sentencekv_16bit", 96] - full
    lines = out.with_suffix(".md").read_text().splitlines()
    assert lines[0].endswith("| above full 96 | above full 512 |")
    assert lines[3].startswith("| sentencekv_16bit |") and f"| {lost:.3f} | " in lines[3]


def test_passages_begin_at_their_places(tiny_folder, book, tmp_path):
    out = tmp_path / "nll.jsonl"
    assert run("perplexity", "--data", book, "--model", tiny_folder, "--length", 100, "--places",
               "1/3,0.5", "--new-tokens", 3, "--methods", "full", "--out", out) == 0
    assert [r["task"] for r in results(out)] == ["nll book", "nll book 1/2"]


def test_differences_are_those_of_the_same_prompt_and_budget():
    def row(method, index, budget, score):
        return {"task": "t", "method": method, "index": index, "budget": budget, "score": score}

    rows = [row("full", 0, 9, 1.0), row("full", 1, 9, 0.5), row("a", 0, 5, 0.25),
            row("a", 1, 5, 0.5), row("a", 0, 9, 1.0), row("b", 0, 5, 0.5)]
    rows = result_rows.at_every_budget(rows)
    assert [(r["method"], r["budget"], r["score"]) for r in result_rows.differences(rows, "a")] == [
        ("full", 5, 0.75), ("full", 9, 0.0), ("full", 5, 0.0), ("a", 5, 0), ("a", 5, 0),
        ("a", 9, 0), ("b", 5, 0.25)]
    assert result_rows.table(result_rows.differences(rows, "a"), percent=True).splitlines()[2] == (
        "| full | 38 ± 37 | 0 |")


def test_sinks_are_counted_by_layer(tiny_folder, book, tmp_path):
    out = tmp_path / "sinks.jsonl"
    assert run("sinks", "--data", book, "--model", tiny_folder, "--length", 300, "--out", out) == 0
    rows = {(r["task"], r["index"]): r["score"] for r in results(out)}
    assert len(rows) == 3 * TINY.num_hidden_layers
    assert all(0 <= score <= 1 for (task, _), score in rows.items() if task != "count book")
    assert out.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("arguments, message", [
    (("--length", 20, "--new-tokens", 1), "--new-tokens is 1, must be at least 2"),
    (("--length", 100000), "needs at least 100002"),
])
def test_a_book_that_is_too_short_is_named(tiny_folder, book, capsys, arguments, message):
    assert run("perplexity", "--data", book, "--model", tiny_folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_recall_is_one_when_everything_is_selected(tiny_folder, book, tmp_path):
    out = tmp_path / "recall.jsonl"
    assert run("recall", "--data", book, "--model", tiny_folder, "--length", 200, "--new-tokens",
               20, "--methods", "sentencekv_16bit h2o best_sentences", "--budgets", "96,512",
               "--out", out) == 0
    for row in results(out):
        mass = row["task"].startswith("mass")
        if row["budget"] == 512:
            assert row["score"] == pytest.approx(1 if mass else 0, abs=1e-4)
        else:
            assert 0 < row["score"] < 1 or not mass
    assert len(results(out)) == 2 * 3 * 2 * TINY.num_hidden_layers


def test_jaccard_compares_neighbouring_layers(tiny_folder, book, tmp_path, capsys):
    out = tmp_path / "jaccard.jsonl"
    arguments = ("jaccard", "--data", book, "--model", tiny_folder, "--length", 200, "--budgets",
                 "96", "--new-tokens", 2)
    assert run(*arguments, "--methods", "snapkv chunkkv sentencekv:secondary_sinks=0 streamingllm",
               "--out", out) == 0
    rows = {row["method"]: row["score"] for row in results(out)}
    assert rows.pop("streamingllm") == 1 and all(0 <= score < 1 for score in rows.values())
    assert run(*arguments, "--methods", "quest") == 2
    assert "Quest chooses no tokens" in capsys.readouterr().err


@pytest.mark.slow
def test_compare_shows_every_method(tiny_folder, book, capsys):
    book.write_text(BOOK[:600])
    assert compare.main(["--prompt", str(book), "--model", str(tiny_folder), "--budget", "96",
                         "--max-new-tokens", "12", "--methods", "full l2norm sentencekv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:5]]
    assert [row[0] for row in rows] == ["full", "l2norm", "sentencekv"]
    assert rows[0][1:3] == ["100.0%", "0.000"]
    assert float(rows[1][3]) == 96 < float(rows[0][3])  # tokens held
    assert compare.main(["--prompt", "nowhere"]) == 2
    assert "cannot read nowhere" in capsys.readouterr().err


def test_longbench_rows(tiny_folder, tmp_path):
    (tmp_path / "conventions.json").write_text(json.dumps({
        "dataset2prompt": {"qasper": "{context} Q: {input}"}, "dataset2maxlen": {"qasper": 5},
        "dataset2metric": {"qasper": "qa_f1"}, "first_line_only_before_scoring": []}))
    row = {"input": "why", "context": "so", "answers": ["x"], "dataset": "qasper"}
    data = write_lines(tmp_path / "qasper.jsonl", row, row | {"dataset": "other"})
    (example,) = tasks.longbench_file(data)
    assert (example.message, example.max_new_tokens) == ("so Q: why", 5)
    out = tmp_path / "out.jsonl"
    assert run("longbench", "--data", data, "--model", tiny_folder, "--methods", "full",
               "--out", out) == 0
    assert len(results(out)) == 1


def test_rows_beyond_the_positions_are_named(tiny_folder, tmp_path, capsys):
    data = write_lines(tmp_path / "long.jsonl", {"input": "x" * 3000, "outputs": ["y"]},
                       {"input": "short", "outputs": ["y"]})
    out = tmp_path / "out.jsonl"
    assert run("ruler", "--data", data, "--model", tiny_folder, "--methods", "full",
               "--out", out) == 0
    assert len(results(out)) == 1
    assert ("long, row 1: 3000 prompt tokens + 64 new ones = 3064, and the model has 2048"
            " positions") in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--methods", "magic"], "method 'magic' is not one of full"),
    (["--methods", "snapkv:sink_tokens=4"], "there is no setting 'sink_tokens'"),
    (["--methods", "nowhere.py:Mine"], "method 'nowhere.py:Mine': FileNotFoundError"),
    (["--methods", "quest:unit=authors"], "method 'quest' remembers by no unit"),
    (["--methods", "sentencekv:score"], "settings are name=value"),
    (["--methods", "sentencekv:colour=red"], "there is no setting 'colour'"),
    (["--methods", "sentencekv:secondary_sinks=9", "--budgets", "36"], "must be at least 46"),
    (["--methods", "full", "--generate", "riddles"], "--generate riddles: families are single"),
    (["--methods", "full", "--data", "nowhere"], "cannot read nowhere"),
])
def test_bad_options_are_one_line(tiny_folder, book, capsys, arguments, message):
    assert run("ruler", "--data", book, "--model", tiny_folder, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def leaderboard_rows():
    """Two methods with a budget and one without, at two budgets."""
    rows = []
    for method, budgets in (("full", [256]), ("snapkv", [128, 256]), ("sentencekv", [128, 256])):
        for budget in budgets:
            held = budget if method != "full" else 4000
            for task, index, score in (("niah_single_1", 0, 1.0), ("niah_single_1", 1, 0.0),
                                       ("single", 0, 1.0), ("nll walden", 3000, 3.0)):
                better = 0.5 * (method == "snapkv") if task.startswith("nll") else 0
                rows.append({"task": task, "index": index, "method": method, "budget": budget,
                             "score": score + better, "held": held, "elsewhere": 1.0, "read": 2.0})
    return rows


def test_the_leaderboard_is_one_table_in_the_readme_and_a_picture(tmp_path, monkeypatch):
    for name in ("ruler", "reading"):
        write_lines(tmp_path / f"leaderboard_{name}.jsonl", *[
            row for row in leaderboard_rows()
            if row["task"].startswith("nll") == (name == "reading")])
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{leaderboard.BEGIN}old\n{leaderboard.END}after\n")
    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path)
    made = leaderboard.make(readme)
    assert readme.read_text() == f"before\n{leaderboard.BEGIN}{made}{leaderboard.END}after\n"
    heading, _, *lines = made.splitlines()
    assert [line.split(" | ")[0] for line in lines] == ["| full", "| snapkv", "| sentencekv"]
    cells = dict(zip(heading.split(" | "), lines[1].split(" | ")))
    assert cells["RULER 128"] == "50 ± 50" and cells["single 256"] == "100"
    assert cells["loss above full 128"] == "0.500" and cells["held 256"] == "256"
    assert (tmp_path / "leaderboard.png").stat().st_size > 1000
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="has no lines <!-- leaderboard -->"):
        leaderboard.make(readme)


def test_no_rows_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path)
    assert run("leaderboard") == 2
    assert "has no leaderboard_*.jsonl" in capsys.readouterr().err
    assert run("ruler") == 2
    assert "ruler needs --data" in capsys.readouterr().err


def test_the_front_has_what_no_other_beats():
    assert doctest.testmod(leaderboard).failed == 0

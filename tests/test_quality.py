import json
from contextlib import nullcontext

import pytest
import torch
from benchmarks import answers, compare, engine, methods, reading, requests, rows, tasks
from benchmarks.engine import Method
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


def run(program, *arguments):
    return program.main([str(a) for a in arguments])


def results(path):
    return rows.read(path)[1]


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
        assert not any(answer in question for answer in example.answers)
    again = list(tasks.ruler_generate(family, BOOK.split("\n\n"), 5))
    assert again[-1] == example


def test_units():
    pieces = ["One", " two", ".", " Three", " four", " five", ".", " Six"]
    assert engine.units(pieces, "sentence", 128) == [(0, 3), (3, 7), (7, 8)]
    assert engine.units(pieces, "sentence", 3) == [(0, 3), (3, 5), (5, 7), (7, 8)]
    assert engine.units(pieces, "authors", 128) == [(0, 3), (3, 7), (7, 8)]
    assert engine.units(pieces, "chunk5", 128) == [(0, 5), (5, 8)]
    with pytest.raises(ValueError, match="unit 'page' is not"):
        engine.units(pieces, "page", 128)


def test_chinese_answers_are_compared_by_characters_and_numbers():
    assert tasks.characters_f1("厦门 大学。", "厦门大学", ()) == 1
    assert tasks.characters_f1("北京", "厦门大学", ()) == 0
    assert tasks.paragraph_match("答案是段落 12，不是段落3", "段落12", ()) == 1
    assert tasks.paragraph_match("12", "段落12", ()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("question", ["whole", "sparsely"])
def test_needles_are_answered_by_every_method_and_not_twice(tiny_folder, book, tmp_path, capsys,
                                                            question):
    out = tmp_path / "needles.jsonl"
    arguments = ("needles", "--data", book, "--model", tiny_folder, "--length", 300, "--count", 2,
                 "--families", "single", "--budgets", "96,128", "--question", question,
                 "--out", out)
    assert run(answers, *arguments) == 0
    first = results(out)
    asked = {"full", "sentencekv", "published", *methods.PUBLISHED}
    assert {r["method"] for r in first} == asked
    assert len(first) == 2 * sum(1 + methods.class_of(method).budgeted for method in asked)
    for row in first:
        assert row["budget"] is None or row["held"] <= row["budget"]
        assert (row["budget"] is None) == (not methods.class_of(row["method"]).budgeted)
        # Not what a method keeps on the host, but no less than what it attends to at once.
        assert row["device"] * (row["tokens"] + 64) >= 0.99 * row["held"]
    assert "| full | 0 ± 0 | 0 ± 0 |" in capsys.readouterr().out
    assert run(answers, *arguments) == 0
    assert results(out) == first


def test_a_question_read_sparsely_is_decoded_token_by_token(tiny_folder, book):
    """Each method by itself, from its own cache of the document."""
    bench = engine.Bench(tiny_folder)
    (example,) = tasks.ruler_generate("single", BOOK.split("\n\n")[:8], 1)
    ids = bench.prompt_ids(example)
    n = bench.document_length(example, ids)
    document, question = ("".join(bench.tokenizer.pieces(part)) for part in (ids[:n], ids[n:]))
    assert BOOK.split("\n\n")[7] in document and "mentioned in the text above?" in question
    for writer in bench.answers(ids, 9, [Method(s, 96) for s in ("full", "snapkv", "quest")], n):
        cache = writer.method.new_cache(bench.model, bench.tokenizer.pieces(ids)[:n], 200)
        bench.model.prefill(torch.tensor(ids[:n]), cache)
        for token in [*ids[n:], *writer.tokens[:-1]]:
            states = bench.model.decode(torch.tensor([token]), cache)
        assert bench.model.logits(states)[0].argmax().item() == writer.tokens[-1]


@pytest.mark.slow
def test_every_question_of_a_document_is_answered_as_alone(tiny_folder, book, tmp_path):
    """By the full cache. All methods take part, and not twice."""
    out = tmp_path / "requests.jsonl"
    arguments = ("--data", book, "--model", tiny_folder, "--length", 300, "--budgets",
                 "128", "--count", 1, "--out", out, "--methods",
                 " ".join(methods.METHODS) + " snapkv:sees=nothing")
    assert run(requests, *arguments) == 0
    found = results(out)
    assert len(found) == 8 * (1 + sum(methods.class_of(m).reads_on for m in methods.METHODS))
    bench = engine.Bench(tiny_folder)
    paragraphs = engine.haystack(bench, BOOK, 300)
    (questions,) = tasks.requests(paragraphs, 1)
    for example in questions:
        (alone,) = bench.answers(bench.prompt_ids(example), example.max_new_tokens,
                                 [Method("full", 128)])
        (row,) = [r for r in found if r["task"] == example.task and r["method"] == "full"]
        assert row["text"] == bench.text(alone) and row["answers"] == list(example.answers)
    assert run(requests, *arguments) == 0
    assert results(out) == found


def test_a_choice_for_the_first_question_forgets_the_question(tiny_folder, book):
    bench = engine.Bench(tiny_folder)
    (questions,) = tasks.requests(engine.haystack(bench, BOOK, 300), 1)
    ids, n = bench.prompt_ids(questions[0]), 400
    shown = bench.record(ids)[0].document_and_last_queries(n)
    cache = shown.replay(Method("snapkv", 96).new_cache(bench.model, ["a"] * n, 50))
    cache.forget_window()
    assert cache.num_tokens == n and cache.kept_at[0].max() < n
    assert cache.kept[0].shape[1] == 64 and cache.recent[0].shape[1] == 0
    before = cache.kept[0].clone()
    copy = cache.fork()
    bench.model.prefill(torch.tensor(ids[n:]), copy)
    assert cache.recent[0].shape[1] == 0 and copy.recent[0].shape[1] == len(ids) - n
    assert torch.equal(cache.kept[0], before)


def test_methods_together_write_what_each_writes_alone(tiny_folder, book):
    bench = engine.Bench(tiny_folder)
    (example,) = tasks.ruler_generate("single", BOOK.split("\n\n")[:8], 1)
    methods = [Method(s, 96) for s in ("full", "snapkv", "sentencekv:score=votes")]
    ids = bench.prompt_ids(example)
    greedy = lambda logits: logits.argmax().item()  # noqa: E731
    for writer in bench.answers(ids, 30, methods):
        cache = writer.method.new_cache(bench.model, bench.tokenizer.pieces(ids), 30)
        first = prefill(bench.model, cache, ids, greedy)
        alone = generate(bench.model, cache, first, bench.tokenizer.detokenizer(), greedy,
                         bench.stop, 30, writer.method.sentence_limit)
        assert list(alone) == list(zip(writer.tokens, writer.pieces))


def test_the_loss_with_everything_is_the_full_cache_s(tiny_folder, book, tmp_path, capsys):
    out = tmp_path / "reading.jsonl"
    assert run(reading, "--data", book, "--model", tiny_folder, "--length", 200, "--new-tokens", 40,
               "--methods", "full sentencekv_16bit streamingllm", "--budgets", "96,512",
               "--out", out) == 0
    scores = {(r["method"], r["budget"]): r["score"] for r in results(out)}
    full = scores["full", None]
    for method in ("sentencekv_16bit", "streamingllm"):
        assert scores[method, 512] == pytest.approx(full, abs=1e-4)
        assert scores[method, 96] != pytest.approx(full, abs=1e-4)
    lost = scores["sentencekv_16bit", 96] - full
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("| above full 96 | above full 512 |")
    assert lines[3].startswith("| sentencekv_16bit |") and f"| {lost:.3f} | " in lines[3]


def test_passages_begin_at_their_places(tiny_folder, book, tmp_path):
    out = tmp_path / "reading.jsonl"
    assert run(reading, "--data", book, "--model", tiny_folder, "--length", 100, "--places",
               "1/3,0.5", "--new-tokens", 3, "--methods", "full", "--out", out) == 0
    assert [r["task"] for r in results(out)] == ["book 1/3", "book 1/2"]


@pytest.mark.parametrize("arguments, message", [
    (("--length", 20, "--new-tokens", 1), "--new-tokens is 1, must be at least 2"),
    (("--length", 100000), "needs at least 100002"),
])
def test_a_book_that_is_too_short_is_named(tiny_folder, book, capsys, arguments, message):
    with pytest.raises(SystemExit) if "--new-tokens" in arguments else nullcontext():
        assert run(reading, "--data", book, "--model", tiny_folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_the_mass_is_one_when_everything_is_selected(tiny_folder):
    bench, names = engine.Bench(tiny_folder), ("sentencekv_16bit", "h2o", "best_sentences")
    ids = bench.tokenizer.encode(BOOK, add_bos=True)[:220]
    for budget in (96, 512):
        asked = [Method(name, budget) for name in names]
        for _, mass, error in compare.attention(bench, ids, 200, asked):
            if budget == 512:
                assert (mass, error) == pytest.approx((1, 0), abs=1e-4)
            else:
                assert 0 < mass < 1 and error > 0


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
    assert run(answers, "longbench", "--data", data, "--model", tiny_folder, "--methods", "full",
               "--out", out) == 0
    assert len(results(out)) == 1


def test_rows_beyond_the_positions_are_named(tiny_folder, tmp_path, capsys):
    data = write_lines(tmp_path / "long.jsonl", {"input": "x" * 3000, "outputs": ["y"]},
                       {"input": "short", "outputs": ["y"]})
    out = tmp_path / "out.jsonl"
    assert run(answers, "ruler", "--data", data, "--model", tiny_folder, "--methods", "full",
               "--out", out) == 0
    assert len(results(out)) == 1
    assert ("long, row 1: 3000 prompt tokens + 64 new ones = 3064, and the model has 2048"
            " positions") in capsys.readouterr().err


@pytest.mark.parametrize("arguments, message", [
    (["--methods", "magic"], "method 'magic' is not one of full"),
    (["--methods", "snapkv:sink_tokens=4"], "there is no setting 'sink_tokens'"),
    (["--methods", "nowhere.py:Mine"], "method 'nowhere.py:Mine': FileNotFoundError"),
    (["--methods", "quest:unit=authors"], "there is no setting 'unit'"),
    (["--methods", "sentencekv:score"], "settings are name=value"),
    (["--methods", "sentencekv:colour=red"], "there is no setting 'colour'"),
    (["--methods", "sentencekv:secondary_sinks=9", "--budgets", "36"], "must be at least 46"),
    (["--methods", "full", "--data", "nowhere"], "No such file or directory: 'nowhere'"),
    (["--methods", "full", "--data", "walden"], "input 'walden': say in SENTENCEKV_DATA in which"),
])
def test_bad_options_are_one_line(tiny_folder, book, capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("SENTENCEKV_DATA", raising=False)
    assert run(answers, "ruler", "--data", book, "--model", tiny_folder, *arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1

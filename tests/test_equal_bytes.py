import doctest

import pytest
import torch
from test_quality import BOOK, results, run

from benchmarks import equal_bytes
from cache import SentenceKVCache
from generate import prefill
from segment import token_spans
from sentencekv import SentenceKVConfig
from support.memory import held_bytes
from weights.checkpoint import load_model
from weights.tokenizer import Tokenizer

METHODS = "full sentencekv sentencekv:kv_bits=16 sentencekv:sentence_limit=8"


def test_docstrings():
    assert doctest.testmod(equal_bytes).failed == 0


@pytest.fixture
def rows(tiny_folder, tmp_path):
    (tmp_path / "book.txt").write_text(BOOK)
    out = tmp_path / "rows.jsonl"
    assert run("perplexity", "--data", tmp_path / "book.txt", "--model", tiny_folder, "--length",
               300, "--new-tokens", 9, "--places", "1/3,1/4", "--methods", METHODS, "--budgets",
               "48,96,192", "--out", out) == 0
    return out


def test_the_share_is_that_of_the_tensors_of_a_cache(rows, tiny_folder):
    model = load_model(tiny_folder, torch.device("cpu"), torch.bfloat16)
    tokenizer = Tokenizer(tiny_folder)
    ids = tokenizer.encode(BOOK[int(len(BOOK) / 3) :], add_bos=True)[:300]
    for row in results(rows):
        if row["method"] == "full" or not row["task"].endswith("book"):
            continue
        bits = 16 if "kv_bits=16" in row["method"] else 8
        limit = 8 if "sentence_limit" in row["method"] else 16
        config = SentenceKVConfig(row["budget"], kv_bits=bits, sentence_limit=limit)
        cache = SentenceKVCache(config, model.config, 309, "cpu", torch.bfloat16)
        cache.expect(token_spans(tokenizer.pieces(ids), limit))
        prefill(model, cache, ids, lambda logits: 0)
        layer = cache.layers[0]
        held = sum(held_bytes((layer, layer.packing)).values())
        for name in layer.TABLE:  # without spare places
            held -= getattr(layer, name)[:, cache.plan.n_places :].nbytes
        full = 308 * cache.report()["full_kv_bytes"] / 300 / len(cache.layers)
        found = equal_bytes.device_share(row, model.config)
        # The row has a sentence or two more, which were written.
        assert found == pytest.approx(held / full, rel=0.02)


def test_a_table_and_a_picture(rows, tiny_folder, capsys):
    assert equal_bytes.main([f"{tiny_folder}={rows}"]) == 0
    lines = rows.with_suffix(".md").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert [line.split(" | ")[0][2:] for line in lines[2:]] == METHODS.split()[1:]
    assert rows.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize("arguments, message", [
    ([], "needs MODEL=ROWS.jsonl"), (["rows"], "'rows' is not MODEL=ROWS.jsonl"),
    (["tiny=nowhere.jsonl"], "nowhere.jsonl")])
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert equal_bytes.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("benchmarks.equal_bytes: ") and message in line

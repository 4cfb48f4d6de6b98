"""What a trace says is what the cache did, and its page shows it, whatever the text is."""

import base64
import io
import json
import math
import random
import sys
import zlib
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, random_ids, random_llama, random_spans
from test_generate import TEXT, chat_folder, prompt, run, run_json  # noqa: F401  two are fixtures

from cache import LayerCache, SentenceKVCache
from course.trace.pictures import open_page
from sentencekv import SentenceKVConfig, find_secondary_sinks
from support.trace import Trace, one_line

EXAMPLES = {"walden_house": ("8", "8.03"), "needle_two_cities": ("m", "marmalade")}


def unpack(answer, name):
    n_columns = answer["shape"][-1] + (3 if name == "attention" else 0)
    kind = np.uint8 if name == "attention" or answer["bytes"] == 1 else np.int32
    numbers = np.frombuffer(zlib.decompress(base64.b64decode(answer[name])), kind)
    numbers = numbers.reshape(*answer["shape"][:-1], n_columns)
    return numbers.cumsum(axis=0, dtype=kind) if name == "rows" else (numbers / 255.0) ** 2


@pytest.mark.parametrize("keep_factor", [2, math.inf])
@pytest.mark.parametrize("sentence_limit", [12, 300])
def test_the_numbers_are_the_caches_own(keep_factor, sentence_limit):
    """Rows at random places, their sum and the rows moved, and each sentence's attention."""
    model, ids = random_llama(), random_ids(300, "cpu")
    spans = random_spans(300, 12)
    config = SentenceKVConfig(token_budget=100, keep_factor=keep_factor, secondary_ratio=0.9,
                              sentence_limit=sentence_limit)
    keys, kept, weights = [], [], []

    class Noting(LayerCache):
        """Notes the keys of the text, and for a token the attention weight of every slot."""

        def prefill(self, q, k, v):
            keys.append(k)
            return super().prefill(q, k, v)

        def decode(self, q, k, v):
            slot_keys, values, mask = super().decode(q, k, v)
            identity = torch.eye(slot_keys.shape[1]).expand(len(slot_keys), -1, -1)
            found = F.scaled_dot_product_attention(
                q.view(len(slot_keys), -1, q.shape[-1]), slot_keys, identity, mask).mean(dim=1)
            weights[-1].append((found, self.slot_row.clone()))
            return slot_keys, values, mask

    class Cache(SentenceKVCache):
        Layer = Noting

    cache = Cache(config, TINY, 360, "cpu", torch.float32)
    trace, pieces = Trace(cache), ["x"] * 341
    cache.expect(spans)
    model.prefill(ids, cache)

    def written():
        yield 0, ""
        for step in range(40):
            if step % 9 == 8:
                cache.seal(min(cache.plan.n_rows - cache.plan.open_row, 8))
            weights.append([])
            model.decode(torch.tensor([step]), cache)
            # Place 0 is all sinks. The trace has the sentences after it.
            kept.append([torch.stack([getattr(layer, name)[:, 1:] for layer in cache.layers])
                         for name in ("n_resident", "starts", "ends")])
            yield step, "x"

    assert len(list(trace.watch(written()))) == 41
    report = cache.report()
    trace.add("", pieces, spans, report)
    (answer,) = trace.data["answers"]
    rows, attention = unpack(answer, "rows"), unpack(answer, "attention")
    assert answer["bytes"] == (1 if sentence_limit == 12 else 4)

    row_bytes = 2 * (TINY.head_dim + 2)
    moved = np.diff(rows.astype(int), axis=0, prepend=0).clip(min=0)
    assert rows.sum(dtype=int) * row_bytes == report["selected_bytes"]
    assert moved.sum() * row_bytes == report["loaded_bytes"]

    positions = torch.stack([layer.host.positions for layer in cache.layers])
    ends = [*trace.data["ends"], *answer["ends"]]
    n_rows, places, choose = positions.shape[-1], 0, random.Random(0)
    while places < 10:
        step, layer, head = choose.randrange(40), choose.randrange(2), choose.randrange(2)
        resident, starts, row_ends = (tensor[layer, head] for tensor in kept[step])
        s = choose.randrange(len(resident))
        first, end = starts[s].item(), row_ends[s].item()
        if first == end:
            continue
        position = positions[layer, head, first] if first < n_rows else first - n_rows + 300
        sentence = sum(e <= position for e in ends)
        assert rows[step, layer, head, sentence] == resident[s]
        found, slot_row = weights[step][layer]
        inside = (slot_row[head] >= first) & (slot_row[head] < end)
        expected = found[head, : len(inside)][inside].sum().item()
        assert attention[step, layer, head, sentence] == pytest.approx(expected, abs=4e-3)
        places += int(resident[s] > 0)
    assert attention.sum(axis=-1) == pytest.approx(1, abs=0.02)
    assert attention[..., -2].sum() > 0 and len(answer["ends"]) == 4
    for layer, heads in enumerate(trace.data["secondary"]):
        expected = find_secondary_sinks(keys[layer], config)
        assert [sorted(head) for head in heads] == [
            head.nonzero().squeeze(1).tolist() for head in expected]


def data_of(path):
    return json.loads(path.read_text())


def test_every_question_is_an_answer_of_one_trace(capfd, chat_folder, prompt, tmp_path):
    common = ["--model", chat_folder, "--device", "cpu", "--max-new-tokens", 20, "--token-budget",
              80, "--ask", "Who slept?", "--ask", "Where had they gone?", "--trace"]
    read, loaded, document = tmp_path / "r.json", tmp_path / "l.json", tmp_path / "d"
    status, out, err = run(capfd, "--prompt", prompt, *common, read, "--save", document)
    assert status == 0, err
    data = data_of(read)
    assert data["format"] == "sentencekv trace 1" and "".join(data["pieces"]).count(TEXT) == 1
    for answer, question in zip(data["answers"], ("Who slept?", "Where had they gone?")):
        assert answer["question"] == question and question in "".join(answer["pieces"])
        assert answer["shape"][0] == answer["n_written"] - 1 == len(answer["windows"])
        written = "".join(answer["pieces"][-answer["n_written"] :])
        assert written.startswith(answer["report"]["text"])
    status, out, err = run(capfd, "--load", document, *common, loaded)
    assert status == 0, err
    for data in (data, again := data_of(loaded)):
        for answer in data["answers"]:
            del answer["report"]  # it has times
    assert again == data


def test_every_turn_is_an_answer_that_has_the_earlier_ones_before_it(capfd, chat_folder, prompt,
                                                                     tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who slept?\nWhere had they gone?\n"))
    status, out, err = run(capfd, "--prompt", prompt, "--model", chat_folder, "--device", "cpu",
                           "--dtype", "float32", "--max-new-tokens", 20, "--token-budget", 80,
                           "--chat", "--trace", tmp_path / "chat.json")
    assert status == 0, err
    first, second = data_of(tmp_path / "chat.json")["answers"]
    assert (first["question"], second["question"]) == ("Who slept?", "Where had they gone?")
    before = "".join(first["pieces"])  # with the first answer
    assert "".join(second["pieces"]).startswith(before.rstrip("\n"))
    for answer in (first, second):
        selected = unpack(answer, "rows").sum(dtype=int) * 2 * (TINY.head_dim + 2)
        assert selected == answer["report"]["selected_bytes"] > 0


@pytest.mark.parametrize("budget", [80, 1024])  # the text has 432 tokens
def test_sentences_that_received_most_are_printed(capfd, tiny_folder, prompt, budget):
    common = ["--prompt", prompt, "--model", tiny_folder, "--device", "cpu", "--token-budget",
              budget, "--max-new-tokens", 20, "--show-sentences"]
    report = run_json(capfd, *common)
    shares = [sentence["share"] for sentence in report["most_attended"]]
    assert len(shares) == 5 and shares == sorted(shares, reverse=True) and shares[-1] > 0
    status, out, err = run(capfd, *common)
    assert status == 0 and report["most_attended"][0]["text"] in err
    assert one_line("a\x1b[31m\n\u202eb") == "a [31m b"


@pytest.mark.parametrize("arguments, message", [
    (["--trace", "no/such/folder.html"], "cannot write"),
    (["--trace", "{tmp}"], "cannot write"),
    (["--trace", "x.html", "--cache", "full"], "nothing to show"),
    (["--trace", "{tmp}/prompt.txt"], "would replace"),
    (["--show-sentences", "--cache", "full"], "nothing to show"),
    (["--trace", "x.html", "--cuda-graph"], "--cuda-graph is not for --trace"),
])
def test_what_cannot_be_traced_is_refused_before_reading(capfd, prompt, tmp_path, arguments,
                                                         message):
    arguments = [word.format(tmp=tmp_path) for word in arguments]
    status, out, err = run(capfd, "--prompt", prompt, "--model", "no/such/model", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


@contextmanager
def in_browser(path, **how):
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(open_page(path, **how))
        except ValueError as error:
            pytest.skip(str(error))
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_recorded_page_is_what_its_command_writes(capfd, default_folder, tmp_path, name):
    """examples/README.md has the command. Other processors round differently."""
    status, _, err = run(capfd, "--prompt", ROOT / "examples" / f"{name}.txt", "--token-budget",
                         512, "--dtype", "float32", "--device", "cpu", "--trace",
                         tmp_path / "again.json")
    assert status == 0, err
    page = (ROOT / "course" / "trace" / f"{name}.html").read_text(encoding="utf-8")
    start = page.index('{"format": "sentencekv trace 1"')
    kept, again = json.JSONDecoder().raw_decode(page, start)[0], data_of(tmp_path / "again.json")
    numbers = []
    for trace in (kept, again):
        (answer,) = trace["answers"]
        numbers.append([unpack(answer, name) for name in ("attention", "rows")])
        for name in ("attention", "rows", "report"):
            del answer[name]
    assert kept == again
    (shares, rows), (shares_again, rows_again) = numbers
    assert abs(shares - shares_again).mean() < 1e-3 and (rows != rows_again).mean() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("width", [1280, 390])
def test_the_key_token_attends_to_the_needle(name, width):
    """In the recorded pages of the examples, by focus, in other layers, and played."""
    key, needle = EXAMPLES[name]
    with in_browser(ROOT / "course" / "trace" / f"{name}.html", width=width) as (page, complaints):
        tokens = page.locator("#answer [role=button]")
        texts = tokens.all_text_contents()
        tokens.nth(texts.index(key)).focus()
        best = page.locator(".best")
        assert needle in best.text_content() and best.count() == 1
        assert float(best.evaluate("e => e.style.getPropertyValue('--share')")) > 0.7
        box = best.bounding_box()
        assert 0 <= box["y"] <= 860
        assert needle in page.locator("#top li").first.text_content()
        page.select_option("#layer", "3")
        assert page.evaluate("heads.length") == 3
        page.select_option("#head", "1")
        page.select_option("#measure", "rows")
        lit = page.evaluate("valuesAt(4).slice(0, size()).reduce((a, b) => a + b, 0)")
        selected = page.evaluate("sentences.filter((_, i) => rowsOf(4, 3, 1, i) > 0).length")
        assert lit == selected > 0
        page.select_option("#layer", "second")
        page.select_option("#head", "all")
        page.select_option("#measure", "attention")
        page.locator(".sentence", has_text=needle).first.click()
        shares = tokens.evaluate_all("all => all.map(e => +e.style.getPropertyValue('--share'))")
        assert shares[texts.index(key)] >= 0.5 * max(shares) > 0 and shares[0] == 0
        page.click("#whole")
        page.click("#play")
        page.wait_for_selector("#answer [aria-current]:nth-child(3)", timeout=10_000)
        page.click("#play")
        shown = tokens.evaluate_all("all => all.findIndex(e => e.ariaCurrent)")
        page.locator("#answer [aria-current]").press("ArrowRight")
        assert tokens.evaluate_all("all => all.findIndex(e => e.ariaCurrent)") == shown + 1
        assert complaints == []


HOSTILE = [
    "</script><script>document.title='broken'</script>", "<!--", "<img src=x onerror=alert(1)>",
    "{{trace}}", "\x00\x07\x1b[31m\u2028", "😀👩‍👩‍👧 ", "\u202eright to left\u2066 שלום",
    "x" * 1_000_000, *["Yes. "] * 2000]


@pytest.mark.slow
def test_a_hostile_document_is_shown_as_text(tmp_path):
    path, spans = tmp_path / "page.html", [(i, i + 1) for i in range(len(HOSTILE))]
    cache = SentenceKVCache(SentenceKVConfig(), TINY, len(HOSTILE) + 9, "cpu", torch.float32)
    trace, model = Trace(cache), random_llama()
    cache.expect(spans)
    model.prefill(random_ids(len(HOSTILE), "cpu"), cache)

    def written():
        yield 0, ""
        for token in range(3):
            model.decode(torch.tensor([token]), cache)
            yield token, ""

    list(trace.watch(written()))
    report = cache.report() | {"dtype": "float32", "device": "cpu", "ttft_ms": 1.0,
                               "decode_steps": 3, "stages_ms": {"prefill": {}, "decode": {}}}
    trace.add("<b>?</b>", HOSTILE + ["<i>", "a", "b", "c"], spans, report)
    trace.write(path)
    with in_browser(path) as (page, complaints):
        assert page.title() == "Which sentences does each token attend to?"
        assert page.locator(".sentence").count() == len(HOSTILE)
        assert page.locator(".sentence").all_text_contents() == HOSTILE
        page.locator("#answer [role=button]").nth(2).click()
        assert page.locator(".best").count() == 1 and page.locator("#top li").count() == 5
        assert page.evaluate("document.body.scrollWidth <= innerWidth")
        assert complaints == []

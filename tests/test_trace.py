"""What a trace says is what the cache did, and its page shows it, whatever the text is."""

import base64
import io
import json
import math
import os
import random
import signal
import sys
import zlib
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, random_ids, random_llama, random_spans
from test_generate import TEXT, chat_folder, prompt, run, run_json  # noqa: F401  two are fixtures

import generate
from cache import LayerCache, SentenceKVCache
from course.trace.pictures import open_page
from model import FullCache
from sentencekv import SentenceKVConfig, find_secondary_sinks
from support.trace import Trace, one_line

EXAMPLES = {"walden_house": ("8", "8.03"), "needle_two_cities": ("m", "marmalade")}


def unpack(answer, name):
    n_columns = answer["shape"][-1] + (0 if name == "rows" else 3)
    kind = np.uint8 if name != "rows" or answer["bytes"] == 1 else np.int32
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


def traced(config, n_steps=40, part_size=50):
    """Of random texts: the data of a trace with the full cache, all tokens, and the sentences of
    the texts. There are a document and a question. The answer has two sentences and a rest."""
    spans, more = random_spans(300, 12), random_spans(30, 12)
    ids, model = random_ids(330 + n_steps, "cpu"), random_llama()
    n_tokens = len(ids) + 1
    cache = SentenceKVCache(config, TINY, n_tokens, "cpu", torch.float32)
    trace = Trace(cache, model, FullCache)
    for text, sentences in ((ids[:300], spans), (ids[300:330], more)):
        cache.expect(sentences)
        model.prefill(text, cache)

    def written():
        yield 0, ""
        for step, token in enumerate(ids[330:]):
            if step in (9, 18):
                cache.seal(8)
            model.decode(token[None], cache)
            yield step, "x"

    list(trace.watch(written()))
    spans = spans + [(start + 300, end + 300) for start, end in more]
    trace.add("", ["x"] * n_tokens, spans, cache.report())
    trace.add_full([*ids.tolist(), 0], n_tokens, part_size)
    return trace.data, ids, spans + [(330, 338), (338, 346)]


def slow_attention(ids):
    """The weights of all layers, query heads and tokens of a model that attends to all:
    [layer][head] (T, T)."""
    found, cache = [], FullCache(TINY, len(ids), "cpu", torch.float32)

    def noting(prefill):
        def noted(q, k, v):
            logits = q @ k.repeat_interleave(len(q) // len(k), dim=0).mT / math.sqrt(q.shape[-1])
            future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
            found.append(logits.masked_fill(future, -math.inf).softmax(dim=-1))
            return prefill(q, k, v)
        return noted

    for layer in cache.layers:
        layer.prefill = noting(layer.prefill)
    random_llama().prefill(ids, cache)
    return found


@pytest.mark.parametrize("keep_factor", [1.5, math.inf])
def test_the_full_view_is_full_attention_computed_in_one_pass(keep_factor):
    """Added up by sentence in loops, and most of it was not selected."""
    config = SentenceKVConfig(token_budget=60, keep_factor=keep_factor, secondary_ratio=0.9)
    data, ids, spans = traced(config)
    (answer,), secondary, weights = data["answers"], data["secondary"], slow_attention(ids)
    shares, n = unpack(answer, "full_attention"), answer["shape"][-1]
    assert shares.shape == unpack(answer, "attention").shape and n == len(spans)
    group = TINY.num_attention_heads // TINY.num_key_value_heads
    for step, layer, head in [(0, 0, 0), (5, 1, 1), (17, 0, 1), (18, 1, 0), (39, 1, 1)]:
        position, expected = 330 + step, np.zeros(n + 3)
        found = weights[layer][head * group : (head + 1) * group, position].mean(dim=0).tolist()
        assert not any(found[position + 1 :])
        for p, weight in enumerate(found[: position + 1]):
            column = next((s for s, (_, end) in enumerate(spans) if p < end), n + 2)
            column = n + 2 if p >= answer["windows"][step] else column
            column = n + 1 if p in secondary[layer][head] else n if p < 4 else column
            expected[column] += weight
        assert shares[step, layer, head] == pytest.approx(expected, abs=4e-3)
        assert expected.sum() == pytest.approx(1)
    missed = np.where(unpack(answer, "rows") == 0, shares[..., :n], 0)
    assert missed.sum(axis=-1).mean() > 0.3


def test_both_views_agree_if_everything_is_selected():
    config = SentenceKVConfig(token_budget=1000, kv_bits=16, secondary_ratio=0.9)
    data, _, _ = traced(config)
    (answer,) = data["answers"]
    paid, full = (np.sqrt(unpack(answer, name)) for name in ("attention", "full_attention"))
    assert abs(paid - full).max() < 1.5 / 255
    missed = full[..., :-3][unpack(answer, "rows") == 0]
    assert missed.max() < 1.5 / 255
    again, _, _ = traced(config, part_size=10_000)
    other = np.sqrt(unpack(again["answers"][0], "full_attention"))
    assert abs(other - full).max() < 1.5 / 255


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


FULL = ["--device", "cpu", "--dtype", "float32", "--max-new-tokens", 20, "--token-budget", 80,
        "--trace-full", "--trace"]


def full_views(path):
    return [unpack(answer, "full_attention") for answer in data_of(path)["answers"]]


def test_every_question_has_a_full_view(capfd, chat_folder, prompt, tmp_path):
    """The full cache goes back to the document, which it reads once. A loaded one is read, too."""
    common, document = ["--model", chat_folder, *FULL], tmp_path / "d"
    first, second = ["--ask", "Who slept?"], ["--ask", "Where had they gone?"]
    for name, arguments in {
            "both": ["--prompt", prompt, "--save", document, *first, *second],
            "loaded": ["--load", document, *second],
            "parts": ["--prompt", prompt, "--prefill-chunk", 100, *second]}.items():
        status, _, err = run(capfd, *arguments, *common, tmp_path / f"{name}.json")
        assert status == 0 and "a full cache reads all tokens again" in err, err
    both, (loaded,), (parts,) = (full_views(tmp_path / f"{name}.json")
                                 for name in ("both", "loaded", "parts"))
    assert len(both) == 2 and (both[0].sum(axis=-1) > 0.9).all()
    assert np.sqrt(loaded) == pytest.approx(np.sqrt(both[1]), abs=1.5 / 255)
    assert np.sqrt(parts) == pytest.approx(np.sqrt(both[1]), abs=1.5 / 255)


def test_every_turn_has_a_full_view_and_times_of_its_own(capfd, chat_folder, prompt, tmp_path,
                                                         monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who slept?\nWhere had they gone?\n"))
    path = tmp_path / "chat.json"
    status, _, err = run(capfd, "--prompt", prompt, "--model", chat_folder, "--chat", *FULL, path)
    assert status == 0, err
    first, second = data_of(path)["answers"]
    assert len(full_views(path)) == 2 and first["shape"] != second["shape"]
    for answer in (first, second):
        assert {*answer["report"]["stages_ms"]} == {"tokenize", "segment", "prefill", "decode"}


def test_an_answer_of_one_token_has_no_steps(capfd, tiny_folder, prompt, tmp_path):
    path = tmp_path / "one.json"
    status, _, err = run(capfd, "--prompt", prompt, "--model", tiny_folder, *FULL, path,
                         "--max-new-tokens", 1)
    assert status == 0 and full_views(path)[0].shape[0] == 0, err


def test_nothing_is_lost_if_the_full_cache_is_left_out(capfd, tiny_folder, prompt, tmp_path,
                                                       monkeypatch):
    """By Ctrl-C, or because there is no memory for it."""
    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGINT)
        return FullCache(*_)

    def out_of_memory(*_):
        raise MemoryError

    for new_cache, status, line in ((interrupted, 130, "does not show what a full cache"),
                                    (out_of_memory, 2, "out of memory")):
        path = tmp_path / f"{status}.json"
        monkeypatch.setattr(generate, "FullCache", new_cache)
        got, out, err = run(capfd, "--prompt", prompt, "--model", tiny_folder, *FULL, path,
                            "--json")
        (answer,) = data_of(path)["answers"]
        assert got == status and line in err and "full_attention" not in answer
        assert json.loads(out)["text"] == answer["report"]["text"]


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
    (["--trace-full"], "--trace-full needs --trace FILE"),
    (["--trace-full", "--show-sentences"], "--trace-full needs --trace FILE"),
    (["--trace-full", "--trace", "x.html", "--cache", "full"], "nothing to show"),
    (["--trace-full", "--trace", "x.html", "--fast"], "--fast is not for --trace"),
])
def test_what_cannot_be_traced_is_refused_before_reading(capfd, prompt, tmp_path, arguments,
                                                         message):
    arguments = [word.format(tmp=tmp_path) for word in arguments]
    status, out, err = run(capfd, "--prompt", prompt, "--model", "no/such/model", *arguments)
    assert status == 2 and message in err and err.count("\n") == 1


def recorded(name):
    """The data in a recorded page."""
    page = (ROOT / "course" / "trace" / f"{name}.html").read_text(encoding="utf-8")
    start = page.index('{"format": "sentencekv trace 1"')
    return json.JSONDecoder().raw_decode(page, start)[0]


def shown_share(share):
    """As the page writes it."""
    return f"{100 * share:.{0 if share >= 0.0995 else 1}f} %"


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
                         512, "--dtype", "float32", "--device", "cpu", "--trace-full",
                         "--trace", tmp_path / "again.json")
    assert status == 0, err
    kept, again = recorded(name), data_of(tmp_path / "again.json")
    numbers, sinks = [], []
    for trace in (kept, again):
        (answer,) = trace["answers"]
        sinks.append({(layer, head, position) for layer, heads in enumerate(trace.pop("secondary"))
                      for head, positions in enumerate(heads) for position in positions})
        fields = "attention", "full_attention", "rows"
        numbers.append([unpack(answer, name) for name in fields])
        for name in (*fields, "report"):
            del answer[name]
    assert kept == again
    assert len(sinks[0] ^ sinks[1]) < 0.02 * len(sinks[0])
    (*shares, rows), (*shares_again, rows_again) = numbers
    for before, after in zip(shares, shares_again):
        assert abs(before - after).mean() < 1e-3
    assert (rows != rows_again).mean() < 0.05


SCREENS = {"desktop": {"width": 1280, "height": 800},
           "phone": {"width": 390, "height": 844, "is_mobile": True, "has_touch": True}}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("screen", SCREENS)
def test_a_page_opens_at_the_key_token_and_its_sentence(name, screen):
    """All on the first screen. On a phone the panel takes a third of it at most."""
    (key, needle), how = EXAMPLES[name], SCREENS[screen]
    path = ROOT / "course" / "trace" / f"{name}.html"
    with in_browser(path, **how) as (page, complaints):
        assert page.locator("#answer [aria-current]").text_content() == key
        assert needle in page.locator(".best").text_content()
        boxes = {name: page.locator(name).bounding_box() for name in (
            "header", "#panel", "#answer", "#top", "#bars", "#document", ".best")}
        for box in ("header", "#answer", ".best"):
            assert 0 <= boxes[box]["y"] < boxes[box]["y"] + boxes[box]["height"] <= how["height"]
        assert boxes["#document"]["y"] <= boxes[".best"]["y"]
        assert boxes["#answer"]["y"] < boxes["#top"]["y"] < boxes["#bars"]["y"]
        if screen == "phone":
            assert boxes["#panel"]["height"] <= how["height"] / 3
        hint = page.locator("#attending").text_content()
        assert ("Tap another" if screen == "phone" else "Point at another") in hint
        assert page.evaluate("[document.body.scrollWidth <= innerWidth, scrollY]") == [True, 0]
        assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_a_page_shows_what_was_missed(name):
    (answer,) = recorded(name)["answers"]
    half = answer["shape"][1] // 2
    paid, full, rows = (unpack(answer, field)[:, half:] for field in (
        "attention", "full_attention", "rows"))
    missed = np.where(rows == 0, full[..., :-3], 0)
    views = {"Attention": paid[..., :-3], "Full cache": full[..., :-3], "Missed": missed,
             "Selected": rows > 0}
    with in_browser(ROOT / "course" / "trace" / f"{name}.html") as (page, complaints):
        for view, numbers in views.items():
            page.get_by_text(view, exact=True).click()
            step = page.evaluate("step") - 1
            expected = numbers[step].mean(axis=(0, 1))
            shown = page.evaluate("[...values.slice(0, size())]")
            assert shown == pytest.approx(expected.tolist(), abs=1e-6)
            first = page.locator("#top li").first.text_content()
            assert first.startswith(shown_share(expected.max()))
            page.click("#whole")
            shown = page.evaluate("[...values.slice(0, size())]")
            assert shown == pytest.approx(numbers.mean(axis=(0, 1, 2)).tolist(), abs=1e-6)
            page.evaluate(f"keep({step + 1})")
        page.get_by_text("Missed", exact=True).click()
        share = shown_share(missed[step].mean(axis=(0, 1)).sum())
        assert f"missed {share} of" in page.locator("#top-title").text_content()
        assert f"missed sentences {share}" in page.locator("#legend").text_content()
        page.locator("#views :checked").press("ArrowLeft")
        assert page.evaluate("view") == "full" and complaints == []


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
        assert needle in page.locator("#top li").first.text_content()
        page.select_option("#layer", "3")
        assert page.evaluate("heads.length") == 3
        page.select_option("#head", "1")
        page.get_by_text("Selected", exact=True).click()
        lit = page.evaluate("sum(valuesAt(4, view).slice(0, size()))")
        selected = page.evaluate("sentences.filter((_, i) => rowsOf(4, 3, 1, i) > 0).length")
        assert lit == selected > 0
        page.select_option("#layer", "second")
        page.select_option("#head", "all")
        page.get_by_text("Attention", exact=True).click()
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


@pytest.mark.slow
def test_a_question_is_chosen_in_the_page(capfd, chat_folder, prompt, tmp_path):
    """The second one, here without a full cache, and the first one again."""
    path = tmp_path / "page.html"
    status, _, err = run(capfd, "--prompt", prompt, "--model", chat_folder, *FULL, path,
                         "--ask", "Who slept?", "--ask", "Where had they gone?")
    assert status == 0, err
    with in_browser(path) as (page, complaints):
        missed = page.get_by_text("Missed", exact=True)
        missed.click()
        page.evaluate("delete trace.answers[1].full_attention")
        for number, visible, view in ((1, False, "paid"), (0, True, "paid")):
            page.select_option("#question", str(number))
            page.evaluate("showAnswer(+$('question').value)")  # waits until it is there
            assert missed.is_visible() == visible and page.evaluate("view") == view
            written = page.evaluate("answer.pieces.slice(-answer.n_written).join('')")
            assert page.locator("#answer").text_content().split() == written.split()
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
        assert page.title() == "Which sentences does the answer read again?"
        assert not page.get_by_text("Missed", exact=True).is_visible()  # there is no full cache
        assert page.locator(".sentence").count() == len(HOSTILE)
        assert page.locator(".sentence").all_text_contents() == HOSTILE
        page.locator("#answer [role=button]").nth(2).click()
        assert page.locator(".best").count() == 1 and page.locator("#top li").count() == 5
        assert page.evaluate("document.body.scrollWidth <= innerWidth")
        assert complaints == []

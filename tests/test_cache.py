import doctest
import gc
import math
import os
import subprocess
import sys
import weakref
from bisect import bisect_right
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, TINY, needs_gpu, random_ids, random_llama, random_spans
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SlowSentenceKV
from torch.fx.experimental.proxy_tensor import make_fx

import cache as cache_module
from cache import NO_ROW, SentenceKVCache, SentenceTable, assign_slots
from generate import GraphedDecode
from model import FullCache
from segment import SentenceStream, token_spans
from sentencekv import SentenceKVConfig, select_rows
from weights.document import Document, load_document, save_document
from weights.tokenizer import Tokenizer

N_NEW = 90


def sentencekv_cache(config, n_prompt, device, new=N_NEW, cls=SentenceKVCache, longest=15):
    return cls(config, TINY, random_spans(n_prompt, longest), new, device, torch.float32)


def write(model, caches, n_prompt, n_new=N_NEW, ends=True):
    """The same tokens through every cache. Yields each step's states, one tensor a cache.

    The text written is in sentences of random length; at times the end of one is only seen one
    token later, as with an abbreviation.
    """
    device = model.embed_tokens.weight.device
    ids, lengths = random_ids(n_prompt + n_new, device), [b - a for a, b in random_spans(n_new + 7)]
    yield [model.prefill(ids[:n_prompt], cache)[-1] for cache in caches]
    since, delay = 0, 0
    for i in range(n_prompt, n_prompt + n_new):
        if ends and since >= lengths[0] + delay:
            for cache in caches:
                cache.seal(lengths[0])
            since, delay = since - lengths.pop(0), 1 - delay
        yield [model.decode(ids[i : i + 1], cache)[0] for cache in caches]
        since += 1


def tensors_of(cache) -> list:
    """Every tensor that the cache, its host tier and its table hold."""
    values = [x for part in (cache, cache.host, cache.table) for x in vars(part).values()]
    return [x for x in values if isinstance(x, torch.Tensor)]


def test_docstrings():
    assert doctest.testmod(cache_module).failed == 0


@pytest.mark.parametrize("n_prompt", [1, 2, 31, 33, 70, 300])
@pytest.mark.parametrize("score", ["mean_query", "votes", "gaussian"])
def test_a_budget_for_everything_is_full_attention(tiny, device, n_prompt, score):
    config = SentenceKVConfig(token_budget=1024, score=score, **SHORT)
    caches = [sentencekv_cache(config, n_prompt, device),
              FullCache(TINY, n_prompt + N_NEW, device, torch.float32)]
    for ours, full in write(tiny, caches, n_prompt):
        torch.testing.assert_close(ours, full, rtol=0, atol=1e-4)


SHORT = dict(secondary_sinks=6, secondary_ratio=0.5)  # of random keys a few are as short
SMALL = dict(token_budget=40, sink_tokens=4, recent_window=8, observation_window=8, **SHORT,
             sentence_limit=128)
LEAST = dict(token_budget=24, sink_tokens=0, recent_window=1, observation_window=16,
             secondary_sinks=0, query_decay=1.0, sentence_limit=128)


@pytest.mark.parametrize("n_prompt, longest, small, keep_factor, score", [
    (1, 1, SMALL, math.inf, "mean_query"),
    (1, 1, SMALL, 1, "votes"),
    (5, 15, SMALL, math.inf, "votes"),
    (40, 15, SMALL, 1, "mean_query"),
    (300, 15, SMALL, 1, "mean_query"),
    (300, 15, SMALL, 2.5, "votes"),
    (300, 15, SMALL, math.inf, "mean_query"),
    (300, 15, LEAST, 1, "votes"),
    (300, 15, LEAST, math.inf, "mean_query"),
    (1, 1, SMALL, 1, "gaussian"),
    (300, 15, SMALL, 2.5, "gaussian"),
    (300, 15, SMALL, math.inf, "gaussian"),
    (300, 15, LEAST, 1, "gaussian"),
    (300, 128, SMALL, 2.5, "mean_query"),
    (300, 128, SMALL, math.inf, "votes"),
    (300, 15, dict(token_budget=96), 2.5, "mean_query"),
    (300, 15, dict(token_budget=96), math.inf, "votes"),
])
def test_a_small_budget_selects_what_the_slow_way_selects(
        tiny, device, n_prompt, longest, small, keep_factor, score):
    config = SentenceKVConfig(keep_factor=keep_factor, score=score, **small)
    caches = [sentencekv_cache(config, n_prompt, device, longest=longest),
              SlowSentenceKV(config, TINY, random_spans(n_prompt, longest))]
    for ours, slow in write(tiny, caches, n_prompt):
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-4)
    if longest == 15:  # then there was time for the text written to be asked for
        assert any(i >= n_prompt for positions in caches[1].selected for i in positions)


class AllResident(SentenceKVCache):
    """Every slot is filled anew at every step, from all rows."""

    def load(self, layer):
        fill(layer, layer.slot_row < NO_ROW)


def fill(layer, wanted):
    """Put the wanted rows (H_kv, B) into slots, in static shapes."""
    rows, heads = layer.slot_row.where(wanted, 0), torch.arange(len(wanted), device=wanted.device)
    kv = torch.cat((layer.first, layer.later)).to(rows.device)
    found = kv[rows, heads[:, None]]  # (H_kv, B, 2, D)
    slots = layer.slots[:, : rows.shape[1]]
    slots.copy_(found.where(wanted[..., None, None], slots))


@pytest.mark.slow
@pytest.mark.parametrize("keep_factor", [2.5, math.inf, None])
@pytest.mark.parametrize("sizes", [[1, 299], [100, 100, 100], [290, 5, 5], [7] * 42 + [6]])
def test_a_prompt_in_parts_is_the_prompt_at_once(tiny, device, keep_factor, sizes):
    """Whatever the parts are; `None` stands for the full cache. In float64: rounding would choose
    between scores that are almost equal."""
    model = tiny.double()

    def new_cache():
        if keep_factor is None:
            return FullCache(TINY, 300 + N_NEW, device, torch.float64)
        config = SentenceKVConfig(**SMALL, keep_factor=keep_factor)
        return SentenceKVCache(config, TINY, random_spans(300), N_NEW, device, torch.float64)

    class Model:
        embed_tokens, decode = model.embed_tokens, model.decode

        def prefill(self, ids, cache):
            parts = [ids] if cache is whole else ids.split(sizes)
            return torch.cat([model.prefill(part, cache) for part in parts])

    parts, whole = new_cache(), new_cache()
    for ours, expected in write(Model(), [parts, whole], 300):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def read_on(model, cache, ids, parts=1):
    """A text after what was read and written. Returns the state of its last token."""
    cache.expect(random_spans(len(ids)))
    return [model.prefill(part, cache)[-1] for part in ids.chunk(parts)][-1]


@pytest.mark.slow
@pytest.mark.parametrize("budget, keep_factor", [(40, math.inf), (40, 2.5), (1024, math.inf)])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_second_text_is_read_and_remembered(tiny, device, budget, keep_factor, parts):
    """With text written before it, in the middle of a sentence, and after it."""
    config = SentenceKVConfig(**SMALL | {"token_budget": budget}, keep_factor=keep_factor)
    caches = [sentencekv_cache(config, 300, device, new=300),
              SlowSentenceKV(config, TINY, random_spans(300))]
    if budget == 1024:
        caches.append(FullCache(TINY, 600, device, torch.float32))
    ids = random_ids(600, device)
    runs = [read_and_write(tiny, cache, ids, parts if cache is caches[0] else 1) for cache in caches]
    for ours, *others in zip(*runs):
        for expected in others:
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def read_and_write(model, cache, ids, parts=1):
    """A text of 300 tokens, 20 written, one of 50, 20 written, one of 3, 40 written."""
    yield model.prefill(ids[:300], cache)[-1]
    at = 300
    for n_written, n_read in ((20, 50), (20, 3), (40, 0)):
        for i in range(n_written):
            yield model.decode(ids[at : at + 1], cache)[0]
            at += 1
            if i % 9 == 8:
                cache.seal(9)
        if n_read:
            yield read_on(model, cache, ids[at : at + n_read], parts)
            at += n_read


@pytest.mark.parametrize("keep_factor", [2.5, math.inf, None])
def test_after_a_rewind_all_is_as_the_first_time(tiny, device, keep_factor, monkeypatch):
    monkeypatch.setattr(cache_module, "SENTENCE_BLOCK", 3)
    if keep_factor is None:
        cache = FullCache(TINY, 600, device, torch.float32)
    else:
        cache = sentencekv_cache(SentenceKVConfig(**SMALL, keep_factor=keep_factor), 300, device,
                                 new=300)
    ids = random_ids(600, device)
    tiny.prefill(ids[:300], cache)
    snapshot, runs = cache.snapshot(), []
    for text in (ids[300:350], ids[350:420], ids[300:350]):
        runs.append([read_on(tiny, cache, text)])
        for i in range(60):
            runs[-1].append(tiny.decode(ids[420 + i : 421 + i], cache)[0])
            if i % 9 == 8:
                cache.seal(9)
        cache.restore(snapshot)
    assert torch.equal(torch.stack(runs[0]), torch.stack(runs[2]))
    assert not torch.equal(runs[0][-1], runs[1][-1])


@pytest.mark.parametrize("keep_factor", [1, math.inf])
@pytest.mark.parametrize("short", [{}, SHORT])
def test_offloaded_is_resident_and_the_difference_is_everything(tiny, device, keep_factor, short):
    config = SentenceKVConfig(token_budget=96, keep_factor=keep_factor, **short)
    caches = [sentencekv_cache(config, 300, device, cls=c) for c in (SentenceKVCache, AllResident)]
    for ours, resident in write(tiny, caches, 300):
        assert torch.equal(ours, resident)
    report = caches[0].report()
    assert 0 < report["hit_rate"] < 1
    assert report["loaded_bytes"] == caches[0].total_loaded.item() * 2 * TINY.head_dim * 4


@pytest.mark.slow
def test_on_the_default_weights_too(default_model, default_folder):
    """Budget for everything: full attention. A small one: what is offloaded might be resident."""
    tokenizer = Tokenizer(default_folder)
    text = (REFERENCE / "walden_passage.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_bos=False)[:640]
    pieces = tokenizer.pieces(ids)
    spans = token_spans(pieces[:600], SentenceKVConfig.sentence_limit)
    kinds = [(FullCache, None), (SentenceKVCache, 1024), (SentenceKVCache, 96), (AllResident, 96)]
    caches = [kind(default_model.config, 640, "cpu", torch.float32) if budget is None else
              kind(SentenceKVConfig(token_budget=budget), default_model.config, spans, 40, "cpu",
                   torch.float32) for kind, budget in kinds]
    for cache in caches:
        default_model.prefill(torch.tensor(ids[:600]), cache)
    sentences = SentenceStream(SentenceKVConfig.sentence_limit)
    for token, piece in zip(ids[600:], pieces[600:]):
        for length in sentences.push(piece):
            for cache in caches:
                cache.seal(length)
        full, everything, small, resident = (
            default_model.logits(default_model.decode(torch.tensor([token]), cache))
            for cache in caches)
        torch.testing.assert_close(everything, full, rtol=0, atol=2e-3)
        assert torch.equal(small, resident) and not torch.equal(small, full)
    assert caches[2].table.n_sentences > len(spans)


@pytest.mark.slow
def test_texts_in_parts_on_the_default_weights(default_model, default_folder, tmp_path):
    """A document in parts and then a question: one prompt, at once. And again after a rewind, and in
    another cache that loads the document from a file."""
    text = (REFERENCE / "walden_passage.txt").read_text(encoding="utf-8")
    tokenizer, device = Tokenizer(default_folder), torch.device("cpu")
    ids = tokenizer.encode(text, add_bos=False)[:355]
    spans = token_spans(tokenizer.pieces(ids[:300]), 16)
    prompt, question = torch.tensor(ids[:300]), torch.tensor(ids[300:340])

    def new_cache(budget):
        return SentenceKVCache(SentenceKVConfig(token_budget=budget), default_model.config, spans,
                               100, "cpu", torch.float32)

    def answer(cache):
        cache.expect([(0, 15), (15, 40)])
        states = [default_model.prefill(question, cache)[-1:]]
        states += [default_model.decode(torch.tensor([token]), cache) for token in ids[340:]]
        return default_model.logits(torch.cat(states))

    full = FullCache(default_model.config, 355, "cpu", torch.float32)
    states = [default_model.prefill(torch.tensor(ids[:340]), full)[-1:]]
    states += [default_model.decode(torch.tensor([token]), full) for token in ids[340:]]
    expected = default_model.logits(torch.cat(states))
    for budget in (1024, 96):
        cache = new_cache(budget)
        for part in prompt.split([100, 150, 50]):
            default_model.prefill(part, cache)
        snapshot, first = cache.snapshot(), answer(cache)
        if budget == 1024:
            torch.testing.assert_close(first, expected, rtol=0, atol=2e-3)
        cache.restore(snapshot)
        assert torch.equal(answer(cache), first)
        save_document(tmp_path / "document", Document(text, ids[:300], spans, snapshot,
                                                      tokenizer.now),
                      default_folder, cache.config, torch.float32)
        loaded = new_cache(budget)
        document = load_document(tmp_path / "document", default_folder, cache.config, device,
                                 torch.float32)
        loaded.restore(document.snapshot, document.release)
        assert torch.equal(answer(loaded), first)


class Traced(GraphedDecode):
    """What a CUDA graph does, without a GPU: the operations of one step, on the tensors and with
    the numbers that it found, run again for every later token."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, ids, cache):
        self.ids.copy_(ids)
        self.position.fill_(cache.num_tokens)
        if self.captured != cache.version:
            self.captured = cache.version
            tensors = tensors_of(cache)
            before = [t.clone() for t in tensors]
            self.graph = make_fx(lambda a, b: self.model.step(a, b, cache))(self.ids, self.position)
            for tensor, value in zip(tensors, before):  # tracing has run it
                tensor.copy_(value)
        states = self.graph(self.ids, self.position)
        cache.advance(1)
        return states


def load_in_static_shapes(self, layer):
    fill(layer, layer.slot_missing)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["mean_query", "gaussian"])
@pytest.mark.parametrize("keep_factor", [2.5, math.inf])
def test_a_step_captured_once_serves_every_later_token(
        tiny, device, keep_factor, score, monkeypatch):
    """So nothing in it depends on a number of the host or is brought back to it."""
    monkeypatch.setattr(cache_module, "SENTENCE_BLOCK", 3)  # there is no room now and then
    if device.type == "cpu":
        monkeypatch.setattr(SentenceKVCache, "load", load_in_static_shapes)
    config = SentenceKVConfig(keep_factor=keep_factor, score=score, **SMALL)
    plain, captured = (sentencekv_cache(config, 300, device) for _ in range(2))
    decode = (Traced if device.type == "cpu" else GraphedDecode)(tiny)

    class Model:
        embed_tokens, prefill = tiny.embed_tokens, tiny.prefill

        def decode(self, ids, cache):
            return decode(ids, cache) if cache is captured else tiny.decode(ids, cache)

    for ours, expected in write(Model(), [captured, plain], 300):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert captured.total_loaded == plain.total_loaded > 0


@pytest.mark.slow
def test_a_captured_step_survives_a_rewind(tiny, device, monkeypatch):
    """The table grows with every text, shrinks to what it was, and grows to the same size again."""
    monkeypatch.setattr(cache_module, "SENTENCE_BLOCK", 3)
    if device.type == "cpu":
        monkeypatch.setattr(SentenceKVCache, "load", load_in_static_shapes)
    plain, captured = (sentencekv_cache(SentenceKVConfig(**SMALL), 100, device) for _ in range(2))
    decode, ids = (Traced if device.type == "cpu" else GraphedDecode)(tiny), random_ids(170, device)
    for cache in (plain, captured):
        tiny.prefill(ids[:100], cache)
    snapshots = plain.snapshot(), captured.snapshot()
    for _ in range(3):
        for cache, step in ((plain, tiny.decode), (captured, decode)):
            read_on(tiny, cache, ids[100:150])
            cache.states = [step(token[None], cache).clone() for token in ids[150:]]
        torch.testing.assert_close(torch.cat(captured.states), torch.cat(plain.states), rtol=0,
                                   atol=1e-5)
        for cache, snapshot in zip((plain, captured), snapshots):
            cache.restore(snapshot)


@pytest.mark.parametrize("heads, dim", [(1, 64), (3, 12)])
def test_the_kernel_copies_what_plain_torch_copies(heads, dim):
    """Under Triton's interpreter, where there is no GPU."""
    pytest.importorskip("triton")
    test = f"""
import torch, cache
torch.manual_seed(0)
host = cache.HostTier((1, {heads}, {dim}), torch.device("cpu"), torch.float32)
host.first, host.later = torch.randn(1, 30, {heads}, 2, {dim}), torch.randn(1, 10, {heads}, 2, {dim})
kv = torch.cat((host.first, host.later), dim=1)
slots = torch.randn({heads}, 30, 2, {dim})
rows = torch.stack([torch.randperm(40)[:20] for _ in range({heads})])
missing = torch.rand({heads}, 20) < 0.5
rows[:, 7], missing[:, 7] = cache.NO_ROW, False
expected = slots.clone()
for h, i in missing.nonzero().tolist():
    expected[h, i] = kv[0, rows[h, i], h]
cache.load_rows(host.first[0], host.later[0], slots, rows, missing)
assert torch.equal(slots, expected)
"""
    subprocess.run([sys.executable, "-c", test], check=True, cwd=Path(cache_module.__file__).parent,
                   env=os.environ | {"TRITON_INTERPRET": "1"})


@pytest.mark.slow
def test_the_oracles_hold_with_the_kernel_too():
    """Under Triton's interpreter, a few of each; on a GPU the kernel is in all of them anyway."""
    pytest.importorskip("triton")
    names = ("a_budget_for_everything and cpu-gaussian-70",
             "a_small_budget and inf-gaussian and small11", "offloaded_is_resident and short1",
             "not_selected_takes_no_part and short1")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
         "-k", f"not cuda and ({' or '.join(f'({name})' for name in names)})"],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "5 passed" in done.stdout, done.stdout + done.stderr


@torch.library.custom_op("tests::load_poisoned", mutates_args=("first", "later", "slots"))
def load_poisoned(first: torch.Tensor, later: torch.Tensor, slots: torch.Tensor,
                  rows: torch.Tensor, missing: torch.Tensor) -> None:
    """`load_rows`, and for that time all other rows are NaN."""
    parts = first, later
    kept = [part.clone() for part in parts]
    heads, i = missing.nonzero(as_tuple=True)
    selected = torch.zeros(sum(map(len, parts)), len(rows), dtype=torch.bool)
    selected[rows[heads, i].cpu(), heads.cpu()] = True
    for part, chosen in zip(parts, selected.split([*map(len, parts)])):
        part[~chosen] = math.nan
    cache_module.load_rows(first, later, slots, rows, missing)
    if rows.is_cuda:
        torch.cuda.synchronize()  # the GPU reads these very rows
    for part, rows in zip(parts, kept):
        part.copy_(rows)


load_poisoned.register_fake(lambda first, later, slots, rows, missing: None)


class Poisoned(SentenceKVCache):
    """Rows on the host that are not selected are NaN; slots that nobody attends to are wild."""

    def load(self, layer):
        load_poisoned(layer.first, layer.later, layer.slots, layer.slot_row, layer.slot_missing)

    def decode(self, layer, q, k, v):
        keys, values, mask = super().decode(layer, q, k, v)
        unseen = ~mask.transpose(1, 2)
        return keys.masked_fill(unseen, 1e6), values.masked_fill(unseen, 1e6), mask


@pytest.mark.parametrize("short", [{}, SHORT])
def test_what_is_not_selected_takes_no_part_in_attention(tiny, device, short):
    config = SentenceKVConfig(token_budget=96, **short)
    caches = [sentencekv_cache(config, 300, device, cls=c) for c in (SentenceKVCache, Poisoned)]
    for ours, poisoned in write(tiny, caches, 300):
        assert torch.equal(ours, poisoned)


def test_offloaded_keys_and_values_leave_the_device(device):
    """After prefill, nothing on the device is larger for a prompt that is ten times longer."""
    config, sizes = SentenceKVConfig(token_budget=96), []
    for n_prompt in (200, 2000):
        spans = [(i * n_prompt // 20, (i + 1) * n_prompt // 20) for i in range(20)]
        cache = SentenceKVCache(config, TINY, spans, 10, device, torch.float32)
        for layer in range(TINY.num_hidden_layers):
            q, k, v = (torch.randn(h, n_prompt, TINY.head_dim, device=device) for h in (6, 2, 2))
            cache.prefill(layer, q, k, v)
            given = [weakref.ref(x) for x in (q, k, v)]
            del q, k, v
            gc.collect()
            assert not any(ref() is not None for ref in given), "the cache holds on to its input"
        cache.advance(n_prompt)
        device_bytes = sum(t.untyped_storage().nbytes() for t in tensors_of(cache)
                           if t is not cache.host.first and t is not cache.host.later)
        assert device_bytes == cache.report()["device_kv_bytes"]
        host = cache.host.first
        assert host.device.type == "cpu" and host.is_pinned() == (device.type == "cuda")
        sizes.append(device_bytes)
    assert sizes[0] == sizes[1]


def test_sentences_with_nothing_kept_take_no_room(tiny, device):
    spans = [(i, i + 1) for i in range(300)]  # of which at most 96 are kept
    config = SentenceKVConfig(token_budget=96, keep_factor=1, secondary_sinks=0)
    cache = SentenceKVCache(config, TINY, spans, 10, device, torch.float32)
    tiny.prefill(random_ids(300, device), cache)
    assert cache.table.n_sentences == 96
    assert cache.table.capacity == cache_module.room_for(96)


@needs_gpu
def test_device_memory_during_prefill_is_a_few_layers():
    device, n_prompt = torch.device("cuda"), 50_000
    config = replace(TINY, num_hidden_layers=32)
    cache = SentenceKVCache(SentenceKVConfig(), config, random_spans(n_prompt), 10, device,
                            torch.float32)
    q, k, v = (torch.randn(h, n_prompt, TINY.head_dim, device=device) for h in (6, 2, 2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for layer in range(config.num_hidden_layers):
        cache.prefill(layer, q, k, v)
    cache.advance(n_prompt)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < k.nbytes
    assert torch.cuda.max_memory_allocated() - before < 6 * (k.nbytes + v.nbytes)


def test_device_memory_does_not_grow_while_writing(tiny, device):
    cache = sentencekv_cache(SentenceKVConfig(token_budget=96), 300, device, new=300)
    sizes = [cache.report()["device_kv_bytes"] for _ in write(tiny, [cache], 300, 300)]
    assert len(set(sizes)) == 1
    assert cache.table.n_sentences > len(random_spans(300)) + 10


def test_room_for_more_sentences_is_made(tiny, device):
    """More sentences than there was room for at first, and still full attention."""
    config = SentenceKVConfig(token_budget=1024)
    caches = [sentencekv_cache(config, 10, device, new=300),
              FullCache(TINY, 310, device, torch.float32)]
    ids = random_ids(310, device)
    for cache in caches:
        tiny.prefill(ids[:10], cache)
    for i in range(10, 310):
        ours, full = (tiny.decode(ids[i : i + 1], cache) for cache in caches)
        torch.testing.assert_close(ours, full, rtol=0, atol=1e-4)
        if i % 2:
            caches[0].seal(2)
    assert caches[0].table.n_sentences > 2 * cache_module.SENTENCE_BLOCK


def test_a_sentence_longer_than_the_budget_stays_within_it(tiny, device):
    """Without an end the sentence being written outgrows the budget; only its last part is seen."""
    config = SentenceKVConfig(**SMALL)
    caches = [sentencekv_cache(config, 100, device),
              SlowSentenceKV(config, TINY, random_spans(100))]
    for ours, slow in write(tiny, caches, 100, ends=False):
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_prompt", [3, 100])
def test_a_sentence_is_sealed_at_its_limit(tiny, device, n_prompt):
    """As late as `SentenceStream` does: before the token after the limit is decoded."""
    config = SentenceKVConfig(**SMALL | {"sentence_limit": 20})
    caches = [sentencekv_cache(config, n_prompt, device),
              SlowSentenceKV(config, TINY, random_spans(n_prompt))]
    ids = random_ids(n_prompt + 70, device)
    for cache in caches:
        tiny.prefill(ids[:n_prompt], cache)
    for i in range(n_prompt, n_prompt + 70):
        if i > n_prompt and (i - n_prompt) % 20 == 0:
            for cache in caches:
                cache.seal(20)
        ours, slow = (tiny.decode(ids[i : i + 1], cache) for cache in caches)
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-4)


def test_the_device_holds_no_more_than_it_attends_to(tiny, device):
    cache = sentencekv_cache(SentenceKVConfig(token_budget=96), 300, device)
    seen = []
    attend = cache.decode

    def decode(*args):
        keys, values, mask = attend(*args)
        seen.append(mask.sum(dim=-1))
        return keys, values, mask

    cache.decode = decode
    list(write(tiny, [cache], 300))
    assert torch.cat(seen).max() == 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keys_and_values_stay_half(device, dtype):
    """Offloaded is resident there too, with the same secondary sinks."""
    config, model = SentenceKVConfig(token_budget=96, **SHORT), random_llama(device).to(dtype)
    caches = [kind(config, TINY, random_spans(300), N_NEW, device, dtype)
              for kind in (SentenceKVCache, AllResident)]
    for ours, resident in write(model, caches, 300):
        assert ours.dtype == dtype and ours.isfinite().all() and torch.equal(ours, resident)
    held = caches[0].host.first, caches[0].host.later, caches[0].slots, caches[0].table.vectors
    assert {x.dtype for x in held} == {dtype} and caches[0].table.n_secondary.max() == 6


@pytest.mark.parametrize("short, least, most", [
    (dict(secondary_ratio=0.1), 0, 0), (dict(secondary_sinks=0, secondary_ratio=9), 0, 0),
    (SHORT, 1, 6), (dict(secondary_sinks=6, secondary_ratio=9), 6, 6)])
def test_secondary_sinks_are_a_head_s_shortest_keys(tiny, device, short, least, most):
    """Where there are none, sentences have the whole budget."""
    config = SentenceKVConfig(token_budget=96, **short)
    caches = [sentencekv_cache(config, 300, device),
              SlowSentenceKV(config, TINY, random_spans(300))]
    for cache in caches:
        tiny.prefill(random_ids(300, device), cache)
    n_secondary = caches[0].table.n_secondary.squeeze(-1)
    assert least == n_secondary.min() and n_secondary.max() == most
    for (layer, head), positions in caches[1].secondary.items():
        assert n_secondary[layer, head] == len(positions)
        row_budget = caches[0].row_budget[layer, head]
        assert row_budget == 96 - config.sink_tokens - config.recent_window - len(positions)


@settings(deadline=None)
@given(st.data())
def test_slots_hold_what_is_wanted_and_only_what_is_not_there_moves(data):
    """Step after step, with sentences growing and the room for them changing."""
    n_slots, n_heads = data.draw(st.integers(1, 10)), 2
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    n, ends = len(lengths), torch.tensor(lengths).cumsum(0)
    starts = (ends - torch.tensor(lengths)).expand(n_heads, -1).contiguous()
    rows = torch.full((n_heads, n_slots), NO_ROW)
    sentences = torch.zeros_like(rows)
    n_resident = torch.zeros(n_heads, n, dtype=torch.long)
    for _ in range(data.draw(st.integers(1, 5))):
        scores = torch.tensor([data.draw(st.permutations(range(n))) for _ in range(n_heads)]).float()
        there = torch.tensor([data.draw(st.integers(0, length)) for length in lengths])
        room = torch.tensor([data.draw(st.integers(0, n_slots))])
        selected = select_rows(scores, there.expand(n_heads, -1), room)
        was_here = rows
        rows, sentences, missing = assign_slots(rows, sentences, starts, n_resident, selected)
        for head in range(n_heads):
            wanted = {row.item() for s in range(n)
                      for row in starts[head, s] + torch.arange(selected[head, s])}
            assert sorted(r for r in rows[head].tolist() if r < NO_ROW) == sorted(wanted)
            new = wanted - set(was_here[head].tolist())
            assert {row.item() for row in rows[head][missing[head]]} == new
            stays = ~missing[head] & (rows[head] < NO_ROW)
            assert torch.equal(rows[head][stays], was_here[head][stays])
            for row, s in zip(rows[head].tolist(), sentences[head].tolist()):
                assert row == NO_ROW or 0 <= row - starts[head, s] < selected[head, s]
        n_resident = selected


class Watched(SentenceKVCache):
    """Remembers the keys and values that it was given, by position, and checks every mask."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = [[] for _ in range(TINY.num_hidden_layers)]  # of (H_kv, n, 2, D)
        self.ends, self.before = self.sentence_ends.tolist(), None

    def start_window(self):
        super().start_window()
        self.window_read = self.start_of_window()

    def expect(self, spans):
        super().expect(spans)
        self.ends += self.sentence_ends.tolist()

    def prefill(self, layer, q, k, v):
        self.seen[layer].append(torch.stack((k, v), dim=2))
        return super().prefill(layer, q, k, v)

    def decode(self, layer, q, k, v):
        self.seen[layer].append(torch.stack((k, v), dim=2))
        keys, values, mask = super().decode(layer, q, k, v)
        self.window_read = self.start_of_window()
        window = self.next_slot.item() + 1 - self.slot_of(self.window_read)
        attended = mask.sum(dim=-1)
        secondary, selected = self.table.n_secondary[layer], self.row_budget[layer]
        assert (attended == self.n_sinks + secondary + selected + window).all()
        assert attended.max() <= self.config.token_budget
        return keys, values, mask

    def start_of_window(self):
        room = self.config.token_budget - self.config.sink_tokens - self.config.secondary_sinks
        return max(self.window_start(self.num_tokens + 1), self.num_tokens + 1 - room)

    def seal(self, length):
        self.ends.append(self.ends[-1] + length)
        super().seal(length)

    def check(self):
        """Every invariant that the docstring of `SentenceKVCache` lists."""
        for layer, seen in enumerate(self.seen):
            seen = torch.cat(seen, dim=1)  # (H_kv, T, 2, D)
            for head in range(len(seen)):
                positions = self.positions_of_rows(layer, head, seen[head])
                self.check_tiles(layer, head, positions)
                self.check_slots(layer, head, seen[head], positions)
        assert self.slots.isfinite().all()
        self.check_what_moves()

    def positions_of_rows(self, layer, head, seen):
        rows = self.host.read(layer, 0, self.table.n_rows)[head]  # (N, 2, D)
        same = (rows[:, None] == seen[None]).all(-1).all(-1)  # (N, T)
        assert (same.sum(dim=1) == 1).all(), "a row is no token's"
        positions = same.long().argmax(dim=1).tolist()
        in_sentences = positions[self.table.n_secondary[layer, head].item() :]
        assert len(set(positions)) == len(positions) and in_sentences == sorted(in_sentences)
        return positions

    def check_tiles(self, layer, head, positions):
        bounds = self.table.bounds[layer, head].tolist()
        assert bounds[0] <= self.config.secondary_sinks and bounds == sorted(bounds)
        assert set(bounds[self.table.n_sentences :]) == {self.table.n_rows}
        sentence = [bisect_right(self.ends, p) for p in positions]
        for first, end in pairwise(bounds):
            assert len(set(sentence[first:end])) <= 1, "rows of two sentences"
        starts = {first for first, end in pairwise(bounds) if end > first}
        assert len(starts) == len(set(sentence[bounds[0] :])), "a sentence in two parts"

    def check_slots(self, layer, head, seen, positions):
        slots, table = self.slots[layer, head], self.table
        recent = slots[self.recent_slot : self.slot_of(self.num_tokens)]
        assert torch.equal(recent, seen[self.recent_start :]), "the window's slots"
        held = {}
        for slot, row in enumerate(self.slot_row[layer, head].tolist()):
            if row < NO_ROW:
                assert torch.equal(slots[slot], seen[positions[row]]), "a slot with another row"
                if row >= table.n_secondary[layer, head]:
                    held.setdefault(self.slot_sentence[layer, head, slot].item(), []).append(row)
                assert self.n_sinks <= positions[row] < self.window_read, "read twice"
        for s, first in enumerate(table.starts[layer, head].tolist()):
            n = table.n_resident[layer, head, s].item()
            assert sorted(held.get(s, [])) == [*range(first, first + n)], "not a sentence's first"

    def check_what_moves(self):
        tensors = {id(t): t.data_ptr() for t in tensors_of(self) if t is not self.sentence_ends}
        lengths = self.table.n_retrievable
        where = self.version, tensors, self.recent_start, lengths
        if self.before and self.before[0] == where[0]:
            assert self.before[1] == tensors, "a tensor has moved"
            assert (lengths >= self.before[3]).all(), "a row is no longer retrievable"
        assert not self.before or self.before[2] <= self.recent_start, "the window moved back"
        self.before = where[:3] + (lengths.clone(),)


def check_every_step(model, config, n_prompt):
    """Of a prompt, a text that is written, one read in two parts, and another that is written."""
    device = model.embed_tokens.weight.device
    cache = sentencekv_cache(config, n_prompt, device, cls=Watched, new=2 * N_NEW)
    for _ in write(model, [cache], n_prompt):
        cache.check()
    ids = 260 - 1 - random_ids(50, device)  # other tokens than before
    read_on(model, cache, ids[:40], parts=2)
    cache.check()
    for token in ids[40:]:
        model.decode(token[None], cache)
        cache.check()


@pytest.mark.parametrize("keep_factor", [1, 2.5, math.inf])
@pytest.mark.parametrize("n_prompt, settings", [(3, SMALL), (40, SMALL), (200, SMALL),
                                                (200, LEAST), (200, dict(token_budget=96))])
def test_the_invariants_hold_after_every_step(tiny, device, n_prompt, settings, keep_factor,
                                              monkeypatch):
    monkeypatch.setattr(cache_module, "SENTENCE_BLOCK", 3)  # so that the table grows
    check_every_step(tiny, SentenceKVConfig(keep_factor=keep_factor, **settings), n_prompt)


def rows_of_sentences_overlap(monkeypatch):
    put = SentenceTable.put
    monkeypatch.setattr(SentenceTable, "put", lambda self, layer, keys, bounds: put(
        self, layer, keys, bounds - bounds.clamp(max=1)))


def the_window_stays_in_its_old_slots(monkeypatch):
    def move_window(self, start):
        self.recent_start = start

    monkeypatch.setattr(SentenceKVCache, "move_window", move_window)


def the_last_rows_of_a_sentence_are_selected(monkeypatch):
    assign = cache_module.assign_slots

    def assign_last(rows, sentences, starts, n_resident, selected):
        longer = torch.nn.functional.pad(starts, (0, 1), value=int(starts.max()) + 1).diff(dim=-1)
        starts = starts + (longer - selected).clamp(0, 2)
        return assign(rows, sentences, starts, n_resident, selected)

    monkeypatch.setattr(cache_module, "assign_slots", assign_last)


def the_sinks_are_not_counted(monkeypatch):
    plan = SentenceKVCache.plan

    def plan_for_more(self):
        object.__setattr__(self.config, "token_budget", self.config.token_budget + self.n_sinks)
        plan(self)
        object.__setattr__(self.config, "token_budget", self.config.token_budget - self.n_sinks)

    monkeypatch.setattr(SentenceKVCache, "plan", plan_for_more)


def a_row_of_the_window_is_retrievable(monkeypatch):
    row_of = SentenceKVCache.row_of
    monkeypatch.setattr(SentenceKVCache, "row_of", lambda self, p: row_of(self, p) + 1)


def empty_slots_are_not_a_number(monkeypatch):
    init = Watched.__init__

    def init_with_nan(self, *args):
        init(self, *args)
        self.slots.fill_(math.nan)

    monkeypatch.setattr(Watched, "__init__", init_with_nan)


def the_scores_move_at_every_seal(monkeypatch):
    commit = SentenceTable.commit

    def commit_and_move(self, n_rows):
        commit(self, n_rows)
        self.scores = torch.zeros_like(self.scores)

    monkeypatch.setattr(SentenceTable, "commit", commit_and_move)


def a_secondary_sink_is_selected_too(monkeypatch):
    monkeypatch.setattr(cache_module, "order_rows", lambda kept, secondary: (kept, kept))
    monkeypatch.setattr(SentenceTable, "n_secondary", property(lambda self: torch.full_like(
        self.bounds[..., :1], 3)))


@pytest.mark.parametrize("mistake", [
    rows_of_sentences_overlap, the_window_stays_in_its_old_slots,
    the_last_rows_of_a_sentence_are_selected, the_sinks_are_not_counted,
    a_row_of_the_window_is_retrievable, empty_slots_are_not_a_number,
    the_scores_move_at_every_seal, a_secondary_sink_is_selected_too])
def test_the_invariants_find_planted_mistakes(mistake, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check_every_step(random_llama(), SentenceKVConfig(**SMALL), 200)

import doctest
import gc
import math
import os
import subprocess
import sys
import weakref
from bisect import bisect_right
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from conftest import REFERENCE, TINY, needs_gpu, random_ids, random_llama, random_spans
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SCORES
from slow_cache import SlowSentenceKV
from torch.fx.experimental.proxy_tensor import make_fx

import cache as cache_module
from cache import NO_ROW, LayerCache, Plan, SentenceKVCache, assign_slots
from model import FullCache
from segment import SentenceStream, token_spans
from sentencekv import SentenceKVConfig, select_rows
from support import bits, host_rows, slots, table
from support.compiled import GraphedDecode, reallocated, same
from support.document import (Document, identity_of, load_document, restore, save_document,
                              snapshot, want_positions)
from weights.tokenizer import Tokenizer

N_NEW = 90


def slow_votes(q, keys: list):
    """`benchmarks.scores.votes`: the attention that a sentence receives, if its keys are equal."""
    means, lengths = torch.stack([k.mean(0) for k in keys]), torch.tensor([len(k) for k in keys])
    logits = q @ means.T / math.sqrt(q.shape[-1])  # (n, G, S)
    return (logits + lengths.to(q).log()).softmax(-1).sum(1)


SCORES["votes"] = slow_votes


def expecting(cache, spans):
    """The cache, told of the sentences of its first text."""
    cache.expect(spans)
    return cache


def sentencekv_cache(config, n_prompt, device, new=N_NEW, cls=SentenceKVCache, longest=15,
                     dtype=torch.float32):
    return expecting(cls(config, TINY, n_prompt + new, device, dtype),
                     random_spans(n_prompt, longest))


def slow_cache(config, n_prompt, longest=15):
    return expecting(SlowSentenceKV(config, TINY), random_spans(n_prompt, longest))


def with_layers(layer_class):
    """A cache whose layers are of this class."""
    return type(f"Cache{layer_class.__name__}", (SentenceKVCache,), {"Layer": layer_class})


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
    """Every tensor that the cache, its plan, its layers and their rows on the host hold."""
    hosts, packings = zip(*((layer.host, layer.packing) for layer in cache.layers))
    parts = cache.plan, cache.totals, *cache.layers, *hosts, *packings
    values = [x for part in parts for x in vars(part).values()]
    return [x for x in values if isinstance(x, torch.Tensor)]


def test_docstrings():
    assert doctest.testmod(slots).failed == doctest.testmod(bits).failed == 0


@pytest.mark.parametrize("n_prompt", [1, 2, 31, 33, 70, 300])
@pytest.mark.parametrize("score", ["mean_query", "votes", "gaussian"])
def test_a_budget_for_everything_is_full_attention(tiny, device, n_prompt, score):
    config = SentenceKVConfig(token_budget=1024, score=score, **SHORT)
    caches = [sentencekv_cache(config, n_prompt, device),
              FullCache(TINY, n_prompt + N_NEW, device, torch.float32)]
    for ours, full in write(tiny, caches, n_prompt):
        torch.testing.assert_close(ours, full, rtol=0, atol=1e-4)


SHORT = dict(secondary_sinks=6, secondary_ratio=0.5,  # of random keys a few are as short
             kv_bits=16)  # as exact as the model
SMALL = dict(token_budget=40, sink_tokens=4, recent_window=8, observation_window=8, **SHORT,
             sentence_limit=128, query_decay=0.9)
BYTES = SMALL | {"kv_bits": 8, "query_decay": 0.0}
REUSED = SMALL | {"reuse_layers": 2}
LEAST = dict(token_budget=24, sink_tokens=0, recent_window=1, observation_window=16,
             secondary_sinks=0, query_decay=1.0, sentence_limit=128, kv_bits=16)


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
    (300, 15, dict(token_budget=96, kv_bits=16), 2.5, "mean_query"),
    (300, 15, dict(token_budget=96, kv_bits=16), math.inf, "votes"),
    (1, 1, BYTES, math.inf, "gaussian"),
    (5, 15, BYTES, math.inf, "gaussian"),
    (300, 15, BYTES, 2.5, "gaussian"),
    (300, 15, BYTES, math.inf, "gaussian"),
    (300, 15, BYTES, math.inf, "mean_query"),
    (300, 15, dict(token_budget=96), math.inf, "gaussian"),
    (5, 15, REUSED, math.inf, "gaussian"),
    (300, 15, REUSED, math.inf, "gaussian"),
    (300, 15, REUSED, math.inf, "mean_query"),
    (300, 15, REUSED | {"query_decay": 0.0, "kv_bits": 8}, math.inf, "gaussian"),
    (300, 3, REUSED | {"secondary_sinks": 20, "secondary_ratio": 9}, math.inf, "gaussian"),
    (300, 3, REUSED, 2, "gaussian"),
])
def test_a_small_budget_selects_what_the_slow_way_selects(
        tiny, device, n_prompt, longest, small, keep_factor, score):
    config = SentenceKVConfig(keep_factor=keep_factor, score=score, **small)
    # In 8 bits, float32 is too coarse: a number that is almost halfway is rounded up or down.
    dtype = torch.float64 if config.kv_bits == 8 else torch.float32
    caches = [sentencekv_cache(config, n_prompt, device, longest=longest, dtype=dtype),
              slow_cache(config, n_prompt, longest)]
    for ours, slow in write(tiny.to(dtype), caches, n_prompt):
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-4)
    if longest == 15:  # then there was time for the text written to be asked for
        assert any(i >= n_prompt for head in caches[1].heads.values()
                   for positions in head.selected for i in positions)


class ResidentLayer(LayerCache):
    """Every slot is filled anew at every step, from all rows."""

    def load(self):
        fill(self, self.slot_row < NO_ROW)


AllResident = with_layers(ResidentLayer)


def fill(layer, wanted):
    """Put the wanted rows (H_kv, B) into slots, in static shapes."""
    rows, heads = layer.slot_row.where(wanted, 0), torch.arange(len(wanted), device=wanted.device)
    kv = torch.cat((layer.host.first, layer.host.later)).to(rows.device)
    found = kv[rows, heads[:, None]]  # (H_kv, B, 2, D')
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
        return sentencekv_cache(config, 300, device, dtype=torch.float64)

    class Model:
        embed_tokens, decode = model.embed_tokens, model.decode

        def prefill(self, ids, cache):
            ends = () if cache is whole else list(accumulate(sizes))[:-1]
            return model.prefill(ids, cache, part_ends=ends)

    parts, whole = new_cache(), new_cache()
    for ours, expected in write(Model(), [parts, whole], 300):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def read_on(model, cache, ids, parts=1):
    """A text after what was read and written. Returns the state of its last token."""
    cache.expect(random_spans(len(ids)))
    part_ends = [len(ids) * i // parts for i in range(1, parts)]
    return model.prefill(ids, cache, part_ends=part_ends)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("budget, keep_factor", [(40, math.inf), (40, 2.5), (1024, math.inf)])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_second_text_is_read_and_remembered(tiny, device, budget, keep_factor, parts):
    """With text written before it, in the middle of a sentence, and after it."""
    config = SentenceKVConfig(**SMALL | {"token_budget": budget}, keep_factor=keep_factor)
    caches = [sentencekv_cache(config, 300, device, new=300),
              slow_cache(config, 300)]
    if budget == 1024:
        caches.append(FullCache(TINY, 600, device, torch.float32))
    ids = random_ids(600, device)
    runs = [read_and_write(tiny, cache, ids, parts if cache is caches[0] else 1)
            for cache in caches]
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


@pytest.mark.parametrize("n_tokens", [1, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_8_bits_are_off_by_half_a_step(device, n_tokens, dtype):
    """Also later keys, far from those of a short text; in float16 z would be too large."""
    packing, dim = bits.Packing(2, 8, 8, device, dtype), 8
    first, later = (torch.randn(2, n, 2, dim, device=device).to(dtype) for n in (n_tokens, 50))
    first[..., 3], later[..., 3] = first[..., 3] + 145, 20 * later[..., 3] + 145
    packing.fit(first)
    for kv in (first, later, later[:, :, 0]):
        packed = packing.pack(kv)
        mean, deviation = (x.double() for x in packing.channels[kv.dim()])
        scale = packed[..., dim:].view(torch.bfloat16).double()
        found = packing.unpack(packed)
        rounding = 4 * torch.finfo(dtype).eps * (kv.double().abs() + mean.abs())
        # A scale is a bfloat16, so the largest channel is 127.25 of them at most.
        assert found.dtype == (packing.wide if device.type == "cpu" else dtype)
        assert found.isfinite().all()
        assert ((found - kv).double().abs() <= 0.501 * scale * deviation + rounding).all()


def test_8_bits_take_half_the_bytes(tiny, device):
    caches = {n: sentencekv_cache(SentenceKVConfig(**SMALL | {"kv_bits": n}), 300, device,
                                  dtype=torch.bfloat16) for n in (16, 8)}
    for cache in caches.values():
        random_llama(device).bfloat16().prefill(random_ids(300, device), cache)
    whole, half = (cache.report() for cache in caches.values())
    share = (TINY.head_dim + 2) / (2 * TINY.head_dim)
    for part in ("slots", "sentence vectors"):
        assert half["device_kv_parts"][part] == share * whole["device_kv_parts"][part]
    assert half["host_kv_bytes"] == share * whole["host_kv_bytes"]
    assert half["full_kv_bytes"] == whole["full_kv_bytes"]


@pytest.mark.parametrize("keep_factor", [2.5, math.inf, None])
def test_after_going_back_all_is_as_the_first_time(tiny, device, keep_factor, monkeypatch):
    monkeypatch.setattr(table, "BLOCK", 3)
    if keep_factor is None:
        cache = FullCache(TINY, 600, device, torch.float32)
    else:
        cache = sentencekv_cache(SentenceKVConfig(**SMALL, keep_factor=keep_factor), 300, device,
                                 new=300)
    ids = random_ids(600, device)
    tiny.prefill(ids[:300], cache)
    runs = []
    for text in (ids[300:350], ids[350:420], ids[300:350]):
        runs.append([read_on(tiny, cache, text)])
        for i in range(60):
            runs[-1].append(tiny.decode(ids[420 + i : 421 + i], cache)[0])
            if i % 9 == 8:
                cache.seal(9)
        cache.truncate(300)
    assert torch.equal(torch.stack(runs[0]), torch.stack(runs[2]))
    assert not torch.equal(runs[0][-1], runs[1][-1])


@pytest.mark.parametrize("keep_factor", [1, math.inf])
@pytest.mark.parametrize("short", [{}, SHORT])
def test_offloaded_is_resident_and_the_difference_is_everything(tiny, device, keep_factor, short):
    config = SentenceKVConfig(token_budget=96, keep_factor=keep_factor, **short)
    caches = [sentencekv_cache(config, 300, device, cls=c) for c in (SentenceKVCache, AllResident)]
    for ours, resident in write(tiny, caches, 300):
        assert torch.equal(ours, resident)
    report, row_bytes = caches[0].report(), caches[0].layers[0].host.first[0, 0].nbytes
    assert 0 < report["hit_rate"] < 1
    assert report["loaded_bytes"] == caches[0].totals.loaded.item() * row_bytes
    dim = TINY.head_dim
    assert row_bytes == (2 * dim * 4 if config.kv_bits == 16 else 2 * (dim + 2))


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
              kind(SentenceKVConfig(token_budget=budget, kv_bits=16), default_model.config, 640,
                   "cpu", torch.float32) for kind, budget in kinds]
    for cache in caches:
        cache.expect(spans)
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
    assert caches[2].plan.n_places > 1 + len(spans)


@pytest.mark.slow
def test_texts_in_parts_on_the_default_weights(default_model, default_folder, tmp_path):
    """A document in parts and then a question: one prompt, at once. And again after going back, and
    in another cache that loads the document from a file."""
    text = (REFERENCE / "walden_passage.txt").read_text(encoding="utf-8")
    tokenizer, device = Tokenizer(default_folder), torch.device("cpu")
    ids = tokenizer.encode(text, add_bos=False)[:355]
    spans = token_spans(tokenizer.pieces(ids[:300]), 16)
    prompt, question = torch.tensor(ids[:300]), torch.tensor(ids[300:340])

    def new_cache(budget):
        config = SentenceKVConfig(token_budget=budget, kv_bits=16 if budget == 1024 else 8)
        return SentenceKVCache(config, default_model.config, 400, "cpu", torch.float32)

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
        cache = expecting(new_cache(budget), spans)
        want_positions(cache)
        default_model.prefill(prompt, cache, part_ends=(100, 250))
        kept, first = snapshot(cache), answer(cache)
        identity = identity_of("", cache.config, torch.float32)
        if budget == 1024:
            torch.testing.assert_close(first, expected, rtol=0, atol=2e-3)
        cache.truncate(300)
        assert torch.equal(answer(cache), first)
        cache.truncate(300)
        save_document(tmp_path / "document", Document(text, ids[:300], spans, tokenizer.now),
                      kept, identity, 32)
        loaded = new_cache(budget)
        document = load_document(tmp_path / "document", identity, 32,
                                 default_model.config, device)
        restore(loaded, document.kept, document.release)
        assert torch.equal(answer(loaded), first)


class Traced(GraphedDecode):
    """What a CUDA graph does, without a GPU: the operations of one step, on the tensors and with
    the numbers that it found, run again for every later token."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, ids, cache):
        self.ids.copy_(ids)
        self.position.fill_(cache.num_tokens)
        if not same(self.captured, reallocated(cache.layers)):
            self.captured = reallocated(cache.layers)
            tensors = tensors_of(cache)
            before = [t.clone() for t in tensors]
            seen = self.as_tensors(cache)

            def step(ids, position):
                seen.num_tokens = position
                return self.model.decode(ids, seen)

            self.graph = make_fx(step)(self.ids, self.position)
            for tensor, value in zip(tensors, before):  # tracing has run it
                tensor.copy_(value)
        states = self.graph(self.ids, self.position)
        cache.advance(1)
        return states


def compute_as_on_a_gpu(monkeypatch):
    """In static shapes, and with PyTorch alone: NumPy cannot be traced."""
    monkeypatch.setattr(LayerCache, "load", lambda self: fill(self, self.slot_missing))
    monkeypatch.setattr("sentencekv.largest", lambda scores, n: scores.topk(n, dim=-1).indices)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["mean_query", "gaussian"])
@pytest.mark.parametrize("keep_factor", [2.5, math.inf])
def test_a_step_captured_once_serves_every_later_token(
        tiny, device, keep_factor, score, monkeypatch):
    """So nothing in it depends on a number of the host or is brought back to it."""
    monkeypatch.setattr(table, "BLOCK", 3)  # there is no room now and then
    if device.type == "cpu":
        compute_as_on_a_gpu(monkeypatch)
    config = SentenceKVConfig(keep_factor=keep_factor, score=score, **SMALL)
    plain, captured = (sentencekv_cache(config, 300, device) for _ in range(2))
    decode = (Traced if device.type == "cpu" else GraphedDecode)(tiny)

    class Model:
        embed_tokens, prefill = tiny.embed_tokens, tiny.prefill

        def decode(self, ids, cache):
            return decode(ids, cache) if cache is captured else tiny.decode(ids, cache)

    for ours, expected in write(Model(), [captured, plain], 300):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert captured.totals.loaded == plain.totals.loaded > 0


@pytest.mark.slow
def test_a_captured_step_survives_going_back(tiny, device, monkeypatch):
    """The table grows with every text, shrinks to what it was, and grows to the same size again."""
    monkeypatch.setattr(table, "BLOCK", 3)
    if device.type == "cpu":
        compute_as_on_a_gpu(monkeypatch)
    plain, captured = (sentencekv_cache(SentenceKVConfig(**SMALL), 100, device) for _ in range(2))
    decode, ids = (Traced if device.type == "cpu" else GraphedDecode)(tiny), random_ids(170, device)
    for cache in (plain, captured):
        tiny.prefill(ids[:100], cache)
    for _ in range(3):
        for cache, step in ((plain, tiny.decode), (captured, decode)):
            read_on(tiny, cache, ids[100:150])
            cache.states = [step(token[None], cache).clone() for token in ids[150:]]
        torch.testing.assert_close(torch.cat(captured.states), torch.cat(plain.states), rtol=0,
                                   atol=1e-5)
        for cache in (plain, captured):
            cache.truncate(100)


@pytest.mark.parametrize("heads, dim, bits", [(1, 64, 16), (3, 12, 16), (3, 12, 8), (1, 64, 8)])
def test_the_kernel_copies_what_plain_torch_copies(heads, dim, bits):
    """Under Triton's interpreter, where there is no GPU."""
    pytest.importorskip("triton")
    test = f"""
import torch
from cache import NO_ROW
from support.bits import Packing
from support.host_rows import load_rows
torch.manual_seed(0)
packing = Packing({heads}, {dim}, {bits}, "cpu", torch.float32)
kv = packing.pack(torch.randn({heads}, 40, 2, {dim})).transpose(0, 1).contiguous()
first, later = kv[:30], kv[30:]
slots = packing.pack(torch.randn({heads}, 30, 2, {dim}))
rows = torch.stack([torch.randperm(40)[:20] for _ in range({heads})]).int()
missing = torch.rand({heads}, 20) < 0.5
rows[:, 7], missing[:, 7] = NO_ROW, False
expected = slots.clone()
for h, i in missing.nonzero().tolist():
    expected[h, i] = kv[rows[h, i], h]
load_rows(first, later, slots, rows, missing)
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
        part[~chosen] = math.nan if part.is_floating_point() else -1  # -1 -1 is a NaN, too
    host_rows.load_rows(first, later, slots, rows, missing)
    if rows.is_cuda:
        torch.cuda.synchronize()  # the GPU reads these very rows
    for part, rows in zip(parts, kept):
        part.copy_(rows)


load_poisoned.register_fake(lambda first, later, slots, rows, missing: None)


class PoisonedLayer(LayerCache):
    """Rows on the host that are not selected are NaN; slots that nobody attends to are wild."""

    def load(self):
        load_poisoned(self.host.first, self.host.later, self.slots, self.slot_row,
                      self.slot_missing)

    def decode(self, q, k, v):
        keys, values, mask = super().decode(q, k, v)
        unseen = ~mask.transpose(1, 2)
        return keys.masked_fill(unseen, 1e6), values.masked_fill(unseen, 1e6), mask


Poisoned = with_layers(PoisonedLayer)


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
        cache = SentenceKVCache(config, TINY, n_prompt + 10, device, torch.float32)
        cache.expect(spans)
        for layer in cache.layers:
            q, k, v = (torch.randn(h, n_prompt, TINY.head_dim, device=device) for h in (6, 2, 2))
            layer.prefill(q, k, v)
            given = [weakref.ref(x) for x in (q, k, v)]
            del q, k, v
            gc.collect()
            layer.keep()
            assert not any(ref() is not None for ref in given), "the cache holds on to its input"
        cache.advance(n_prompt)
        assert device_bytes(cache) == cache.report()["device_kv_bytes"]
        for host in (layer.host.first for layer in cache.layers):
            assert host.device.type == "cpu" and host.is_pinned() == (device.type == "cuda")
        sizes.append(device_bytes(cache))
    assert sizes[0] == sizes[1]


def device_bytes(cache) -> int:
    """Of all tensors but the rows on the host, which a CPU's device is, too."""
    on_host = {id(x) for layer in cache.layers for x in (layer.host.first, layer.host.later)}
    return sum(x.untyped_storage().nbytes() for x in tensors_of(cache) if id(x) not in on_host)


def test_the_device_holds_a_text_once(tiny, device):
    """Also while other texts are read after it, and when the cache has gone back to it."""
    cache = sentencekv_cache(SentenceKVConfig(token_budget=96), 300, device, new=300)
    ids = random_ids(600, device)
    tiny.prefill(ids[:300], cache)
    once = device_bytes(cache)
    for _ in range(2):
        read_on(tiny, cache, ids[300:350])
        assert device_bytes(cache) == cache.report()["device_kv_bytes"]
        cache.truncate(300)
        assert device_bytes(cache) == cache.report()["device_kv_bytes"]
        # The ends of the last text's sentences are all that is left of it.
        assert abs(device_bytes(cache) - once) < 8 * 300


def test_sentences_with_nothing_kept_take_no_room(tiny, device):
    spans = [(i, i + 1) for i in range(300)]  # of which at most 96 are kept
    config = SentenceKVConfig(token_budget=96, keep_factor=1, secondary_sinks=0)
    cache = expecting(SentenceKVCache(config, TINY, 310, device, torch.float32), spans)
    tiny.prefill(random_ids(300, device), cache)
    assert cache.plan.n_places == 1 + 96
    assert cache.layers[0].vectors.shape[1] == table.room_for(97)


@needs_gpu
def test_device_memory_during_prefill_is_a_few_layers():
    device, n_prompt = torch.device("cuda"), 50_000
    config = replace(TINY, num_hidden_layers=32)
    cache = expecting(SentenceKVCache(SentenceKVConfig(), config, n_prompt + 10, device,
                                      torch.float32), random_spans(n_prompt))
    q, k, v = (torch.randn(h, n_prompt, TINY.head_dim, device=device) for h in (6, 2, 2))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for layer in cache.layers:
        layer.prefill(q, k, v)
        layer.keep()
    cache.advance(n_prompt)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < k.nbytes
    assert torch.cuda.max_memory_allocated() - before < 6 * (k.nbytes + v.nbytes)


def test_device_memory_does_not_grow_while_writing(tiny, device):
    cache = sentencekv_cache(SentenceKVConfig(token_budget=96), 300, device, new=300)
    sizes = [cache.report()["device_kv_bytes"] for _ in write(tiny, [cache], 300, 300)]
    assert len(set(sizes)) == 1
    assert cache.plan.n_places > len(random_spans(300)) + 10


def test_room_for_more_sentences_is_made(tiny, device):
    """More sentences than there was room for at first, and still full attention."""
    config = SentenceKVConfig(token_budget=1024, kv_bits=16)
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
    assert caches[0].plan.n_places > 2 * table.BLOCK


def test_a_sentence_longer_than_the_budget_stays_within_it(tiny, device):
    """Without an end the sentence being written outgrows the budget; only its last part is seen."""
    config = SentenceKVConfig(**SMALL)
    caches = [sentencekv_cache(config, 100, device),
              slow_cache(config, 100)]
    for ours, slow in write(tiny, caches, 100, ends=False):
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_prompt", [3, 100])
def test_a_sentence_is_sealed_at_its_limit(tiny, device, n_prompt):
    """As late as `SentenceStream` does: before the token after the limit is decoded."""
    config = SentenceKVConfig(**SMALL | {"sentence_limit": 20})
    caches = [sentencekv_cache(config, n_prompt, device),
              slow_cache(config, n_prompt)]
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
    seen = []

    class Seen(LayerCache):
        def decode(self, *args):
            keys, values, mask = super().decode(*args)
            seen.append(mask.sum(dim=-1))
            return keys, values, mask

    cache = sentencekv_cache(SentenceKVConfig(token_budget=96), 300, device, cls=with_layers(Seen))
    list(write(tiny, [cache], 300))
    assert torch.cat(seen).max() == 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_bits", [8, 16])
def test_half_precision_keys_and_values_stay_half(device, dtype, kv_bits):
    """Offloaded is resident there too, with the same secondary sinks."""
    config = SentenceKVConfig(token_budget=96, **SHORT | {"kv_bits": kv_bits})
    model = random_llama(device).to(dtype)
    caches = [sentencekv_cache(config, 300, device, cls=kind, dtype=dtype)
              for kind in (SentenceKVCache, AllResident)]
    for ours, resident in write(model, caches, 300):
        assert ours.dtype == dtype and ours.isfinite().all() and torch.equal(ours, resident)
    for layer in caches[0].layers:
        held = layer.host.first, layer.host.later, layer.slots, layer.vectors
        assert {x.dtype for x in held} == {torch.int8 if kv_bits == 8 else dtype}
    assert max(n_secondary(layer).max() for layer in caches[0].layers) == 6


def n_secondary(layer) -> torch.Tensor:
    """Secondary sinks of each head (H_kv,): place 0 stands for them and for the first tokens."""
    return layer.ends[:, 0] - layer.plan.n_first_sinks


@pytest.mark.parametrize("short, least, most", [
    (dict(secondary_ratio=0.1), 0, 0), (dict(secondary_sinks=0, secondary_ratio=9), 0, 0),
    (SHORT, 1, 6), (dict(secondary_sinks=6, secondary_ratio=9), 6, 6)])
def test_secondary_sinks_are_a_head_s_shortest_keys(tiny, device, short, least, most):
    """Where there are none, sentences have the whole budget."""
    config = SentenceKVConfig(token_budget=96, **short)
    caches = [sentencekv_cache(config, 300, device), slow_cache(config, 300)]
    for cache in caches:
        tiny.prefill(random_ids(300, device), cache)
    found = torch.stack([n_secondary(layer) for layer in caches[0].layers])  # (L, H_kv)
    assert least == found.min() and found.max() == most
    for (layer, head), slow in caches[1].heads.items():
        assert found[layer, head] == len(slow.secondary)
    assert caches[0].plan.n_select == 96 - config.recent_window  # the sinks among them


@settings(deadline=None)
@given(st.data())
def test_slots_hold_what_is_wanted_and_only_what_is_not_there_moves(data):
    """Step after step, with sentences growing and the room for them changing."""
    n_slots, n_heads = data.draw(st.integers(1, 10)), 2
    lengths = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    n, ends = len(lengths), torch.tensor(lengths).cumsum(0)
    starts = (ends - torch.tensor(lengths)).int().expand(n_heads, -1).contiguous()
    rows = torch.full((n_heads, n_slots), NO_ROW, dtype=torch.int32)  # as in a cache
    sentences = torch.zeros_like(rows, dtype=torch.long)
    n_resident = torch.zeros(n_heads, n, dtype=torch.int32)
    for _ in range(data.draw(st.integers(1, 5))):
        ranks = [data.draw(st.permutations(range(n))) for _ in range(n_heads)]
        scores = torch.tensor(ranks).float()
        there = torch.tensor([data.draw(st.integers(0, length)) for length in lengths]).int()
        room = torch.tensor([data.draw(st.integers(0, n_slots))]).int()
        selected = select_rows(scores, there.expand(n_heads, -1), room)
        was_here = rows
        rows, sentences, missing = assign_slots(rows, sentences, starts, n_resident, selected)
        rows, selected = rows.int(), selected.int()  # a cache copies them into its own tensors
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


class WatchedLayer(LayerCache):
    """Remembers the keys and values that it was given, by position, and checks every mask."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.window_read = [], 0  # of (H_kv, n, 2, D); the window of the last token

    def prefill(self, q, k, v):
        self.seen.append(torch.stack((k, v), dim=2))
        return super().prefill(q, k, v)

    def fill_window(self, first_row):
        super().fill_window(first_row)
        self.window_read = self.plan.window_start()

    def decode(self, q, k, v):
        self.seen.append(torch.stack((k, v), dim=2))
        keys, values, mask = super().decode(q, k, v)
        plan, self.window_read = self.plan, self.plan.window_start()
        window = plan.n_rows + 1 - self.window_read
        assert (mask.sum(dim=-1) == plan.n_select + window).all(), "not what the budget says"
        assert plan.n_select + window <= plan.config.token_budget
        assert (self.n_resident[:, 0] == self.ends[:, 0]).all(), "a sink is not selected"
        # Each selected row is attended to, and so is each row of the window, in its slot.
        assert (mask.sum(dim=-1)[:, 0] == self.n_resident.sum(dim=-1) + window).all()
        return keys, values, mask


class Watched(SentenceKVCache):
    Layer = WatchedLayer

    def __init__(self, *args):
        super().__init__(*args)
        self.text_ends, self.before = [], None

    def expect(self, spans):
        super().expect(spans)  # it seals an open sentence
        self.text_ends += [self.num_tokens + end for _, end in spans]

    def seal(self, length):
        self.text_ends.append(self.text_ends[-1] + length)
        super().seal(length)

    def check(self):
        """Every invariant that the docstring of `SentenceKVCache` lists."""
        for layer in self.layers:
            seen = layer.packing.pack(torch.cat(layer.seen, dim=1))  # (H_kv, T, 2, D')
            for head in range(len(seen)):
                positions = self.positions_of_rows(layer, head, seen[head])
                self.check_tiles(layer, head, positions)
                self.check_slots(layer, head, seen[head], positions)
            assert layer.packing.unpack(layer.slots).isfinite().all()
        self.check_what_moves()

    def positions_of_rows(self, layer, head, seen):
        """Of the rows in sentences: those of an open one are only in slots."""
        rows = layer.host.read(0, self.plan.open_row)[head]  # (N, 2, D')
        same = (rows[:, None] == seen[None]).all(-1).all(-1)  # (N, T)
        assert (same.sum(dim=1) == 1).all(), "a row is no token's"
        positions = same.long().argmax(dim=1).tolist()
        in_sentences = positions[n_secondary(layer)[head] :]
        assert len(set(positions)) == len(positions) and in_sentences == sorted(in_sentences)
        return positions

    def check_tiles(self, layer, head, positions):
        n = self.plan.n_places
        starts, ends = layer.starts[head].tolist(), layer.ends[head].tolist()
        n_sinks = ends[0]
        assert starts[0] == 0 and n_sinks <= self.plan.n_first_sinks + self.config.secondary_sinks
        used = [(a, b) for a, b in zip(starts[1:n], ends[1:n]) if b > a]
        assert all(a == b for a, b in zip(starts[n:], ends[n:])), "a place that is not in use"
        assert [n_sinks, *(b for _, b in used)] == [*(a for a, _ in used), len(positions)]
        sentence = [bisect_right(self.text_ends, p) for p in positions]
        for first, end in used:
            assert len(set(sentence[first:end])) == 1, "rows of two sentences"
        assert len(used) == len(set(sentence[n_sinks:])), "a sentence in two parts"
        assert sorted(positions[n_sinks - self.plan.n_first_sinks : n_sinks]) == [
            *range(self.plan.n_first_sinks)], "the first tokens are not the last sinks"

    def check_slots(self, layer, head, seen, positions):
        slots, plan = layer.slots[head], self.plan
        first = min(layer.window_read, plan.open_row)
        window = slots[plan.slots_of(first, plan.n_rows)]
        assert torch.equal(window, seen[len(seen) - plan.n_rows + first :]), "the window's slots"
        held = {}
        for slot, row in enumerate(layer.slot_row[head].tolist()):
            if row < NO_ROW:
                assert torch.equal(slots[slot], seen[positions[row]]), "a slot with another row"
                held.setdefault(layer.slot_place[head, slot].item(), []).append(row)
                assert row < layer.window_read, "read twice"
        for place, first in enumerate(layer.starts[head].tolist()):
            n = layer.n_resident[head, place].item()
            assert sorted(held.get(place, [])) == [*range(first, first + n)], "not the first rows"

    def check_what_moves(self):
        tensors, others = {id(t): t.data_ptr() for t in tensors_of(self)}, reallocated(self.layers)
        select_end = self.plan.select_end
        available = torch.stack([select_end.clamp(layer.starts, layer.ends) - layer.starts
                                 for layer in self.layers])
        if self.before and same(self.before[0], others):
            assert self.before[1] == tensors, "a tensor has moved"
            assert (available >= self.before[3]).all(), "a row may not be selected any more"
        assert not self.before or self.before[2] <= select_end, "the window moved back"
        self.before = others, tensors, select_end.clone(), available


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
                                                (200, LEAST), (200, dict(token_budget=96)),
                                                (200, BYTES), (200, REUSED)])
def test_the_invariants_hold_after_every_step(tiny, device, n_prompt, settings, keep_factor,
                                              monkeypatch):
    monkeypatch.setattr(table, "BLOCK", 3)  # so that the table grows
    check_every_step(tiny, SentenceKVConfig(keep_factor=keep_factor, **settings), n_prompt)


def after(monkeypatch, owner, name, change):
    """Have `change(self)` follow a method."""
    method = getattr(owner, name)

    def changed(self, *args):
        result = method(self, *args)
        change(self)
        return result

    monkeypatch.setattr(owner, name, changed)


def rows_of_sentences_overlap(monkeypatch):
    add = LayerCache.add_sentences
    monkeypatch.setattr(LayerCache, "add_sentences", lambda self, keys, bounds, *rest, **named: add(
        self, keys, bounds - bounds.clamp(max=1), *rest, **named))


def a_row_of_the_window_is_in_the_next_slot(monkeypatch):
    def move(plan):
        plan.next_slot.fill_(plan.n_row_slots + (plan.n_rows + 1) % plan.n_window_slots)

    after(monkeypatch, Plan, "plan_next", move)


def the_last_rows_of_a_sentence_are_selected(monkeypatch):
    assign = cache_module.assign_slots

    def assign_last(rows, places, starts, n_resident, selected):
        longer = torch.nn.functional.pad(starts, (0, 1), value=int(starts.max()) + 1).diff(dim=-1)
        starts = starts + (longer - selected).clamp(0, 2)
        return assign(rows, places, starts, n_resident, selected)

    monkeypatch.setattr(cache_module, "assign_slots", assign_last)


def the_sinks_are_not_counted(monkeypatch):
    after(monkeypatch, Plan, "plan_next", lambda plan: plan.n_select.add_(plan.n_first_sinks))


def a_row_of_the_window_is_selected(monkeypatch):
    after(monkeypatch, Plan, "plan_next", lambda plan: plan.select_end.add_(1))


def empty_slots_are_not_a_number(monkeypatch):
    after(monkeypatch, WatchedLayer, "__init__", lambda layer: layer.slots.fill_(math.nan))


def the_scores_move_at_every_seal(monkeypatch):
    def move(layer):
        layer.scores = torch.zeros_like(layer.scores)

    after(monkeypatch, LayerCache, "seal", move)


def a_row_is_selected_twice(monkeypatch):
    after(monkeypatch, LayerCache, "make_sentences", lambda layer: layer.ends[:, 0].add_(3))


def the_sinks_have_a_score_like_sentences(monkeypatch):
    select = cache_module.select_rows
    monkeypatch.setattr(cache_module, "select_rows", lambda scores, *rest: select(
        scores.nan_to_num(posinf=0.0), *rest))


@pytest.mark.parametrize("mistake", [
    rows_of_sentences_overlap, a_row_of_the_window_is_in_the_next_slot,
    the_last_rows_of_a_sentence_are_selected, the_sinks_are_not_counted,
    a_row_of_the_window_is_selected, empty_slots_are_not_a_number,
    the_scores_move_at_every_seal, a_row_is_selected_twice, the_sinks_have_a_score_like_sentences])
def test_the_invariants_find_planted_mistakes(mistake, monkeypatch):
    mistake(monkeypatch)
    with pytest.raises(AssertionError):
        check_every_step(random_llama(), SentenceKVConfig(**SMALL), 200)

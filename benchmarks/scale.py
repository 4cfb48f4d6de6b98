"""What one layer costs a token, up to a million of them: `python -m benchmarks.speed --scale`.

One layer of Llama 3.1 8B's shape (8 KV heads of 128 channels, 4 query heads each), so a model of 32
layers takes 32 times as long, without its weights. Keys are random, in sentences of 25 tokens that
have a direction of their own; queries turn slowly. The cache does not read the text: it is restored
from rows and vectors that are made here.

Stages are those of `SentenceKVCache.select` and after it: `score` all sentences, `take` the best
until the budget is full, `assign` slots to their rows, `load` what is missing, `attend` to the
slots. `bound` is the time to move a stage's bytes once, at the speed of a large copy. `two levels`
scores 16 sentences at a time by one vector first, and then the sentences of the best 16 of these.
"""

import math
import time
from contextlib import ExitStack
from statistics import median
from unittest import mock

import torch
import torch.nn.functional as F

import cache as cache_module
from cache import SentenceKVCache, room_for
from model import LlamaConfig
from sentencekv import SCORES, SentenceKVConfig, gaussian, select_rows, sentence_vectors

SHAPE = LlamaConfig(1, 1, 1, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
                    head_dim=128, max_position_embeddings=2**31)
SENTENCE, PARAGRAPH, N_BEST, PART = 25, 16, 16, 1000  # tokens, sentences, paragraphs, sentences
LENGTHS = [8192, 32768, 131072, 524288, 1048576]
STAGES = ("score", "take", "assign", "load", "attend")


def document(n_sentences: int, device, dtype) -> dict:
    """A snapshot of random rows, made part by part."""
    _, heads, dim = SHAPE.kv_shape
    n_rows = n_sentences * SENTENCE
    kv = torch.empty(1, n_rows, heads, 2, dim, dtype=dtype, pin_memory=device.type == "cuda")
    vectors, variances = [], []
    for first in range(0, n_sentences, PART):
        n = min(PART, n_sentences - first)
        topics = 0.5 * torch.randn(heads, n, 1, dim, device=device)
        keys = topics + 0.9 * torch.randn(heads, n, SENTENCE, dim, device=device)
        keys = keys.flatten(1, 2).to(dtype)  # (H_kv, n * SENTENCE, D)
        bounds = (torch.arange(n + 1, device=device) * SENTENCE).expand(heads, -1)
        for all_parts, part in zip((vectors, variances), sentence_vectors(keys, bounds)):
            all_parts.append(part)
        rows = slice(first * SENTENCE, (first + n) * SENTENCE)
        kv[0, rows, :, 0] = keys.transpose(0, 1).to(kv.device)
        kv[0, rows, :, 1] = torch.randn(n * SENTENCE, heads, dim, dtype=dtype)
    more = room_for(n_sentences) - n_sentences  # places for what is written
    bounds = torch.arange(n_sentences + 1, device=device) * SENTENCE
    bounds = F.pad(bounds, (0, more), value=n_rows)
    return {"num_tokens": torch.tensor(n_rows), "kv": kv,
            "vectors": F.pad(torch.cat(vectors, dim=1), (0, 0, 0, more))[None],
            "variances": F.pad(torch.cat(variances, dim=1), (0, more))[None],
            "bounds": bounds.expand(1, heads, -1).contiguous()}


class Clock:
    """Milliseconds of each stage, a list of one for each call."""

    def __init__(self, device):
        self.device, self.ms = device, {}

    def timed(self, stage: str, function):
        def call(*arguments, **named):
            start = self.now()
            result = function(*arguments, **named)
            self.ms.setdefault(stage, []).append((self.now() - start) * 1e3)
            return result
        return call

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def watch(self) -> ExitStack:
        """While it is open, the stages of every cache are timed."""
        stack = ExitStack()
        for target, name, stage in ((cache_module, "select_rows", "take"),
                                    (cache_module, "assign_slots", "assign"),
                                    (SentenceKVCache, "load", "load")):
            function = getattr(target, name)
            stack.enter_context(mock.patch.object(target, name, self.timed(stage, function)))
        timed = {name: self.timed("score", function) for name, function in SCORES.items()}
        stack.enter_context(mock.patch.dict(SCORES, timed))
        return stack


def queries(device, dtype):
    """One after another, q (H, 1, D), each much like the one before."""
    q = torch.randn(32, 1, 128, device=device)
    while True:
        q = 0.95 * q + math.sqrt(1 - 0.95**2) * torch.randn_like(q)
        yield q.to(dtype)


@torch.inference_mode()
def one_layer(n_tokens: int, budget: int, n_new: int, device, dtype) -> tuple[dict, dict]:
    """ms of each stage for a token, the median, and the bytes that it must move."""
    n_sentences = n_tokens // SENTENCE
    config = SentenceKVConfig(token_budget=budget, secondary_sinks=0, sentence_limit=32)
    cache = SentenceKVCache(config, SHAPE, [(0, SENTENCE)], 4 * n_new + budget, device, dtype)
    cache.restore(document(n_sentences, device, dtype))
    clock = Clock(device)
    attend = clock.timed("attend", F.scaled_dot_product_attention)
    two_levels = clock.timed("two levels", TwoLevels(cache))
    whole = clock.timed("all", lambda *arguments: attend_once(cache, attend, *arguments))
    with clock.watch():
        for i, q in zip(range(n_new + 4), queries(device, dtype)):
            if i % SENTENCE == SENTENCE - 1:
                cache.seal(SENTENCE)
            if i == 4:  # warm
                clock.ms.clear()
                cache.total_selected.zero_()
                cache.total_loaded.zero_()
            k, v = torch.randn(2, 8, 1, 128, device=device, dtype=dtype)
            whole(q, k, v)
            cache.advance(1)
        for _, q in zip(range(n_new), queries(device, dtype)):
            two_levels(q.view(8, 4, 128))
    ms = {stage: median(values) for stage, values in clock.ms.items()}
    report, s = cache.report(), 8 * n_sentences
    loaded = report["loaded_bytes"] / n_new
    moved = {"score": cache.table.vectors.nbytes + 16 * s, "take": 20 * s, "assign": 24 * s,
             "load": 2 * loaded, "attend": cache.slots.nbytes}
    return ms | {"hits": report["hit_rate"], "device": report["device_kv_bytes"],
                 "host": report["host_kv_bytes"]}, moved


def attend_once(cache, attend, q, k, v):
    keys, values, mask = cache.decode(cache.layers[0], q, k, v)
    attend(q.view(1, 8, 4, 128), keys[None], values[None], attn_mask=mask[None])


class TwoLevels:
    """The two-level choice on a layer's table: paragraphs, then the sentences of the best ones."""

    def __init__(self, cache):
        table, self.room = cache.table, cache.row_budget[0]
        n = table.n_sentences // PARAGRAPH * PARAGRAPH
        shape = (-1, PARAGRAPH)
        self.vectors = table.vectors[0, :, :n].unflatten(1, shape)  # (H_kv, P, PARAGRAPH, D)
        self.variances = table.variances[0, :, :n].unflatten(1, shape)
        self.lengths = torch.full_like(self.variances, SENTENCE)
        vectors = self.vectors.float()
        self.means = vectors.mean(dim=2).to(table.vectors.dtype)
        spread = vectors.square().mean(dim=(2, 3)) - vectors.mean(dim=2).square().mean(dim=-1)
        self.spread = self.variances.mean(dim=2) + spread
        self.sizes = self.lengths.sum(dim=2)

    def __call__(self, q):
        scores = gaussian(q, self.means, self.spread, self.sizes)
        first = scores.topk(min(N_BEST, scores.shape[1]), dim=-1).indices  # (H_kv, n)
        head = torch.arange(len(first), device=first.device)[:, None]
        found = [x[head, first].flatten(1, 2) for x in (self.vectors, self.variances, self.lengths)]
        scores = gaussian(q, *found)
        return select_rows(scores, found[2].long(), self.room)


def rows(lengths: list[int], budget: int, n_new: int, device, dtype, copied: float):
    """Yield a dict for every length. `copied` bytes a second are the speed of a large copy."""
    for n_tokens in lengths:
        measured, moved = one_layer(n_tokens, budget, n_new, device, dtype)
        bounds = {stage: 1e3 * size / copied for stage, size in moved.items()}
        yield {"length": n_tokens, "token_budget": budget, "bound_ms": bounds, **measured}


def table(found: list[dict]) -> str:
    """Markdown: a line for every length, ms with the bound in brackets."""
    headings = [*STAGES, "all", "bound", "two levels", "hits", "device MiB", "host MiB"]
    lines = ["| tokens | " + " | ".join(headings) + " |", "|---" * (len(headings) + 1) + "|"]
    for row in found:
        cells = [f"{row[stage]:.2f} ({row['bound_ms'][stage]:.2f})" for stage in STAGES]
        cells += [f"{row['all']:.2f}", f"{sum(row['bound_ms'].values()):.2f}",
                  f"{row['two levels']:.2f}", f"{row['hits']:.0%}",
                  f"{row['device'] / 2**20:,.1f}", f"{row['host'] / 2**20:,.0f}"]
        lines.append(f"| {row['length']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

"""What one layer costs a token, up to a million of them: `python -m benchmarks.scale`.

The layer has the shape of Llama 3.1 8B's 32 (8 KV heads of 128 channels, 4 query heads each). Keys
are random, in sentences of 25 tokens that have a direction of their own; queries turn slowly. The
cache does not read the text: it is restored from rows and vectors that are made here.

Of a token, `score` is the time to score all sentences, `load` to copy what is missing, `attend` to
attend to the slots. `select` is the rest: to select sentences, and to find slots for their rows.
`bound` is the time to move a stage's bytes once, at the speed of a large copy.
"""

import math
import sys
from statistics import median

import torch
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks import tables, with_status
from benchmarks.engine import provenance
from benchmarks.rows import write
from benchmarks.speed import bandwidth, timing_parser
from cache import SentenceKVCache
from model import LlamaConfig
from sentencekv import SentenceKVConfig, sentence_vectors
from support.bits import Packing
from support.document import restore
from support.timer import OTHER, StageTimer
from weights.checkpoint import pick_device, pick_dtype

SHAPE = LlamaConfig(1, 1, 1, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
                    head_dim=128, max_position_embeddings=2**31)
SENTENCE, PART = 25, 1000  # tokens of a sentence, sentences that are made at a time
LENGTHS = [8192, 32768, 131072, 524288, 1048576]
STAGES = ("score", "select", "load", "attend")
N_WARM = 4  # tokens that are not timed


def document(n_sentences: int, n_sinks: int, device, dtype) -> dict:
    """A snapshot of one layer with random rows, made part by part. Place 0 are the sinks."""
    _, heads, dim = SHAPE.kv_shape
    n_rows = n_sentences * SENTENCE
    packing = Packing(heads, dim, SentenceKVConfig.kv_bits, device, dtype)
    rows = torch.empty(n_rows, heads, 2, packing.width, dtype=packing.kept_dtype,
                       pin_memory=device.type == "cuda")
    vectors = packing.zeros(heads, 1 + n_sentences)
    variances = torch.zeros(heads, 1 + n_sentences, device=device)
    for first in range(0, n_sentences, PART):
        n = min(PART, n_sentences - first)
        topics = 0.5 * torch.randn(heads, n, 1, dim, device=device)
        keys = topics + 0.9 * torch.randn(heads, n, SENTENCE, dim, device=device)
        keys = keys.flatten(1, 2).to(dtype)  # (H_kv, n * SENTENCE, D)
        kv = torch.stack((keys, torch.randn_like(keys)), dim=2)
        bounds = (torch.arange(n + 1, device=device) * SENTENCE).expand(heads, -1)
        places = slice(1 + first, 1 + first + n)
        means, variances[:, places] = sentence_vectors(keys, bounds)
        vectors[:, places] = packing.pack(means)
        part = rows[first * SENTENCE : (first + n) * SENTENCE]
        part[:] = packing.pack(kv).transpose(0, 1)
    ends = torch.arange(1 + n_sentences, device=device) * SENTENCE
    starts, lengths = (ends - SENTENCE).clamp(min=n_sinks), torch.full_like(ends, SENTENCE)
    starts[0], ends[0], lengths[0] = 0, n_sinks, 0
    table = {"vectors": vectors, "variances": variances, "lengths": lengths.expand(heads, -1),
             "starts": starts.int().expand(heads, -1), "ends": ends.int().expand(heads, -1)}
    return {"num_tokens": torch.tensor(n_rows), "0.rows": rows,
            "0.mean": packing.mean, "0.deviation": packing.deviation,
            **{f"0.{name}": tensor for name, tensor in table.items()}}


def filled_cache(n_sentences: int, budget: int, n_new: int, device, dtype) -> SentenceKVCache:
    """A cache that has read a document of so many sentences, with room for `n_new` more tokens."""
    config = SentenceKVConfig(token_budget=budget, secondary_sinks=0, sentence_limit=32)
    cache = SentenceKVCache(config, SHAPE, n_sentences * SENTENCE + n_new, device, dtype)
    restore(cache, document(n_sentences, config.sink_tokens, device, dtype))
    return cache


def queries(device, dtype):
    """One after another, q (H, 1, D), each much like the one before."""
    q = torch.randn(32, 1, 128, device=device)
    while True:
        q = 0.95 * q + math.sqrt(1 - 0.95**2) * torch.randn_like(q)
        yield q.to(dtype)


@torch.inference_mode()
def one_layer(n_tokens: int, budget: int, n_new: int, device, dtype) -> tuple[dict, dict]:
    """Median ms of each stage, with what the cache holds; and the bytes that a stage must move."""
    n_sentences = n_tokens // SENTENCE
    cache = filled_cache(n_sentences, budget, n_new + N_WARM, device, dtype)
    stages = token_stages(cache, n_new)
    ms = {stage: median(token[stage] for token in stages) for stage in (*STAGES, "all")}
    layer, report, s = cache.layers[0], cache.report(), 8 * n_sentences
    loaded = report["loaded_bytes"] / n_new
    moved = {"score": layer.vectors.nbytes + 16 * s, "select": 44 * s, "load": 2 * loaded,
             "attend": layer.slots.nbytes}
    return ms | {"hits": report["hit_rate"], "device": report["device_kv_bytes"],
                 "host": report["host_kv_bytes"]}, moved


def token_stages(cache, n_new: int) -> list[dict]:
    """Write tokens, in sentences. For each of the last `n_new`: stage -> ms."""
    layer, found = cache.layers[0], []
    device, dtype = layer.slots.device, layer.packing.dtype
    timer = StageTimer(device)
    timer.watch(layer, {"score": "score", "load": "load"})
    for i, q in zip(range(n_new + N_WARM), queries(device, dtype)):
        if i > 0 and i % SENTENCE == 0:
            cache.seal(SENTENCE)
        if i == N_WARM:
            cache.totals.restart()
        k, v = torch.randn(2, 8, 1, 128, device=device, dtype=dtype)
        with timer("all"):
            keys, values, mask = layer.decode(q, k, v)
            with timer("attend"):
                F.scaled_dot_product_attention(q.view(1, 8, 4, 128), keys[None], values[None],
                                               attn_mask=mask[None])
        cache.advance(1)
        parts = timer.totals()["all"]
        found.append(parts | {"all": parts["total"], "select": parts[OTHER]})
    timer.unwatch()
    return found[N_WARM:]


@with_status
def main(arguments=None):
    args = timing_parser("scale", __doc__, LENGTHS).parse_args(arguments)
    device, rows = pick_device(args.device), []
    dtype, copied = pick_dtype(args.dtype, device), bandwidth(device)
    about = provenance("scale", {"token_budget": str(args.token_budget)},
                       "llama-3.1-8b, one layer", [], device, dtype)
    about["copy_bytes_per_second"] = copied
    for n_tokens in tqdm(args.lengths, disable=None):
        measured, moved = one_layer(n_tokens, args.token_budget, args.new_tokens, device, dtype)
        bounds = {stage: 1e3 * size / copied for stage, size in moved.items()}
        rows.append({"length": n_tokens, "bound_ms": bounds, **measured})
    print(tables.scale(rows))
    if args.out:
        write(args.out, about, rows)


if __name__ == "__main__":
    sys.exit(main())

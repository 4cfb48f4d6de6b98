"""Published KV-cache methods by name, each a class of a few lines, on the same keys and values.

The files are a lesson, in this order:

    base           what is shared: a prompt read once, what a method costs, two kinds of cache
    evict_prompt   a score decides once, after the prompt, what stays
    evict_writing  every written token may push out another
    retrieve       everything stays, and every token chooses what to read
    budgets        how many tokens each layer and head keeps
    channels       fewer channels of each key
    precision      fewer bits of each token
    merge          dropped tokens are merged
    layers         layers share keys and values
    estimate       attention to unread tokens is estimated
    sentences      variants of SentenceKV

A budget is bytes held for attention, in tokens of 16 bits a channel. `cost` says what else is kept,
and what is read. To add a method, see benchmarks/README.md.
"""

import importlib.util
from pathlib import Path

import torch

import benchmarks.scores  # noqa: F401  registers the scores that a method can name
from benchmarks.methods import (
    budgets,
    channels,
    estimate,
    evict_prompt,
    evict_writing,
    layers,
    merge,
    precision,
    retrieve,
    sentences,
)
from benchmarks.methods.base import Cost, Recording
from cache import NO_ROW, SentenceKVCache
from model import FullCache, LlamaConfig
from sentencekv import SentenceKVConfig

PUBLISHED = {
    "streamingllm": evict_prompt.StreamingLLM, "l2norm": evict_prompt.L2Norm,
    "snapkv": evict_prompt.SnapKV, "chunkkv": evict_prompt.ChunkKV,
    "windowkv": evict_prompt.WindowKV, "shotkv": evict_prompt.ShotKV,
    "expected_attention": evict_prompt.ExpectedAttention,
    "h2o": evict_writing.H2O, "morphkv": evict_writing.MorphKV, "corm": evict_writing.CORM,
    "cascading": evict_writing.CascadingKV,
    "quest": retrieve.Quest, "arkvale": retrieve.ArkVale, "shadowkv": retrieve.ShadowKV,
    "actqkv": retrieve.ActQKV, "clusterkv": retrieve.ClusterKV,
    "pyramidkv": budgets.PyramidKV, "adakv": budgets.AdaKV, "prefixkv": budgets.PrefixKV,
    "dbudgetkv": budgets.DBudgetKV, "kvcompress": budgets.KVCompress, "duo_heads": budgets.DuoHeads,
    "think": channels.ThinK, "snapkv_4bit": precision.SnapKVBits,
    "kvmerger": merge.KVMerger, "less": merge.LESS, "kvsharer": layers.KVSharer,
    "retroinfer": estimate.RetroInfer,
}
# `_dense`: the first two layers keep and read everything, as in the papers.
DENSE = ("l2norm", "quest", "arkvale", "clusterkv")
SENTENCE_METHODS = {
    "sentencekv": SentenceKVCache, "published": SentenceKVCache, "plain": SentenceKVCache,
    "last_query": SentenceKVCache, "sentencekv_16bit": SentenceKVCache,
    "sentencekv_4bit": precision.SentenceKVBits,
    "two_level": sentences.TwoLevel, "boxes": sentences.Boxes,
    "two_vectors": sentences.TwoVectors, "two_bit_keys": sentences.TwoBitKeys,
    "best_sentences": sentences.BestSentences,
}
CLASSES = {"full": FullCache} | PUBLISHED | {f"{name}_dense": PUBLISHED[name] for name in DENSE}
CLASSES |= SENTENCE_METHODS | {"best_tokens": retrieve.BestTokens}
METHODS = tuple(CLASSES)

# What some names set, and `sentencekv` does not. `published` has the authors' settings: 32 sinks
# are their code's, the paper has none; the paper's keep_factor is 1 to 5. But its sentences, its
# one choice per KV head and its sinks, the first tokens, are those of this project. `plain` has
# the Gaussian score, and keeps everything. All but `sentencekv` have 16 bits a channel.
PLAIN = {"query_decay": 1.0, "secondary_sinks": 0, "sentence_limit": 128, "kv_bits": 16}
LAST_QUERY = {"query_decay": 0.0, "kv_bits": 16}
SETTINGS = {name: {"kv_bits": 16} for name in SENTENCE_METHODS if name != "sentencekv"}
SETTINGS |= {"plain": PLAIN, "last_query": LAST_QUERY, "best_sentences": LAST_QUERY,
             "shotkv": {"sentence_limit": evict_prompt.ShotKV.sentence_limit},
             "published": PLAIN | {"score": "mean_query", "sink_tokens": 32, "keep_factor": 2.0}}
SETTINGS |= {f"{name}_dense": {"dense_layers": 2} for name in DENSE}


def split(spec: str) -> tuple[str, str]:
    """The method and the settings of `method:name=value,name=value`. A method may be a class in a
    file, `my_method.py:MyMethod`."""
    path, is_file, rest = spec.partition(".py:")
    name, _, settings = rest.partition(":") if is_file else spec.partition(":")
    return (f"{path}.py:{name}" if is_file else name), settings


def class_of(method: str):
    """The class of a method, by name or from a file. ValueError if there is none."""
    if ".py:" not in method:
        if method not in CLASSES:
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)},"
                             f" nor FILE.py:CLASS")
        return CLASSES[method]
    path, _, name = method.rpartition(":")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"method {method!r}: {type(error).__name__}: {error}") from None
    found = getattr(module, name, None)
    if not isinstance(found, type):
        raise ValueError(f"method {method!r}: there is no class {name!r} in {path}")
    return found


def settings_of(spec: str) -> dict:
    """The settings of `method:name=value,name=value`, and those that the name itself sets. They are
    fields of `SentenceKVConfig`, or attributes of the method's class; and `unit` and `sees`."""
    method, pairs = split(spec)
    settings = dict(SETTINGS.get(method, {}))
    known = SentenceKVConfig if method in SENTENCE_METHODS else class_of(method)
    for pair in filter(None, pairs.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"method {spec!r}: settings are name=value,name=value")
        kind = str if name in ("unit", "sees") else type(getattr(known, name, None))
        if kind not in (str, int, float):
            raise ValueError(f"method {spec!r}: there is no setting {name!r}")
        try:
            settings[name] = kind(value)
        except ValueError:
            raise ValueError(f"method {spec!r}: {name} is {value!r}, must be a number") from None
    return settings


def make_cache(method: str, model_config, budget: int, spans: list, max_new_tokens: int,
               dtype=torch.float32, **settings):
    """An empty cache on the CPU that expects a prompt of these sentences.

    `settings` go to `SentenceKVConfig`, or replace attributes of the class. ValueError for an
    unknown method, or one without settings.
    """
    kind = class_of(method)
    if issubclass(kind, FullCache):
        if settings:
            raise ValueError(f"method {method!r} has no settings")
        if method == "full":
            return FullCache(model_config, spans[-1][1] + max_new_tokens, "cpu", dtype)
        return kind(model_config, budget, spans, max_new_tokens)
    if method not in SENTENCE_METHODS:
        kind = type(kind.__name__, (kind,), settings)
        return kind(model_config, budget, spans)
    if "score" in settings and kind is not SentenceKVCache:
        raise ValueError(f"method {method!r} has a score of its own")
    config = SentenceKVConfig(token_budget=budget, **settings)
    cache = kind(config, model_config, spans[-1][1] + max_new_tokens, "cpu", dtype)
    cache.expect(spans)
    return cache


def has_budget(method: str) -> bool:
    """False if what is held follows from the text."""
    kind = class_of(method)
    return getattr(kind, "budgeted", kind is not FullCache)


def reads_on(method: str) -> bool:
    """Whether it can read a second text, such as a question after a document."""
    return getattr(class_of(method), "reads_on", True)


def cost(cache) -> Cost:
    """What a cache holds, keeps elsewhere and reads, after its last token."""
    if hasattr(cache, "cost"):
        return cache.cost()
    if isinstance(cache, FullCache):
        return Cost(cache.num_tokens, 0, cache.num_tokens)
    in_window, n_rows = cache.plan.in_window.sum().item(), cache.plan.open_row
    in_slots = torch.stack([layer.slot_row < NO_ROW for layer in cache.layers]).sum(dim=-1)
    held = in_window + in_slots.float().mean().item()
    layer = cache.layers[0]
    share, index = sentences.packed_share(layer.packing), sentences.index_tokens(layer)
    n_first = len(layer.host.first)  # rows of the prompt, which may take fewer bits
    rows = n_first * getattr(layer, "row_size", share) + (n_rows - n_first) * share
    held *= share
    return Cost(held, rows + index, held + index)


def try_out(spec: str):
    """Read and write a few random tokens. ValueError if the class cannot."""
    shape = LlamaConfig(1, 1, 1, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                        head_dim=8, max_position_embeddings=100)
    recording = Recording()
    for layer in range(2):
        recording.prefill(layer, *(torch.randn(heads, 60, 8) for heads in (4, 2, 2)))
    recording.advance(60)
    try:
        cache = make_cache(split(spec)[0], shape, 48, [(0, 60)], 2, **settings_of(spec))
        recording.replay(cache)
        for layer in range(2):
            q, k, v = (torch.randn(heads, 1, 8) for heads in (4, 2, 2))
            keys, values, _ = cache.layers[layer].decode(q, k, v)
            if keys.shape != values.shape or keys.shape[::2] != (2, 8):
                raise ValueError(f"decode returns keys {tuple(keys.shape)} and values"
                                 f" {tuple(values.shape)}, and not (2, n, 8)")
        cache.advance(1)
        cost(cache)
    except Exception as error:
        message = " ".join(f"{error}".split())
        raise ValueError(f"method {spec!r}: {type(error).__name__}: {message}") from None

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

A budget is bytes held for attention, in tokens of 16 bits a channel. What else a cache keeps, reads
and has on the device, its `cost` says. A class is known by its `name`; `label` is what pictures
call it. To add a method, see README.md here.
"""

import inspect
import re
import runpy
from functools import lru_cache
from typing import NamedTuple

import torch

import benchmarks.scores  # noqa: F401  registers the scores that a method can name
from benchmarks.methods import (base, budgets, channels, estimate, evict_prompt, evict_writing,
                                layers, merge, precision, retrieve, sentences)
from benchmarks.methods.sentences import SentenceKV
from model import FullCache, LlamaConfig
from sentencekv import SentenceKVConfig

FAMILIES = (base, evict_prompt, evict_writing, retrieve, budgets, channels, precision, merge,
            layers, estimate, sentences)


class Known(NamedTuple):
    """A method that has a name."""

    kind: type
    label: str  # what pictures call it
    settings: dict  # that the name itself sets


def registered() -> dict:
    """name -> Known, in the order of the lesson: every class that has a `name` of its own, and the
    variants of one class."""
    found = {}
    for module in FAMILIES:
        for kind in filter(inspect.isclass, vars(module).values()):
            if kind.__module__ == module.__name__ and "name" in vars(kind):
                found[kind.name] = Known(kind, kind.label, getattr(kind, "own_settings", {}))
                if hasattr(kind, "paper_dense"):
                    found[f"{kind.name}_dense"] = Known(
                        kind, f"{kind.label}, {kind.paper_dense} layers whole",
                        {"dense_layers": kind.paper_dense})
    for name, (label, settings) in sentences.VARIANTS.items():
        found[name] = Known(SentenceKV, label, settings)
    return found


KNOWN = registered()
METHODS = tuple(KNOWN)
PUBLISHED = tuple(name for name, known in KNOWN.items() if not name.endswith("_dense")
                  and not issubclass(known.kind, (FullCache, SentenceKV)))


def split(spec: str) -> tuple[str, str]:
    """The method and the settings of `method:name=value,name=value`. A method may be a class in a
    file, `my_method.py:MyMethod`."""
    return re.fullmatch(r"(.*\.py:[^:]*|[^:]*):?(.*)", spec).groups()


@lru_cache
def class_of(spec: str) -> type:
    """The class of a method, by name or from a file. ValueError if there is none."""
    method, _ = split(spec)
    if ".py:" not in method:
        if method not in KNOWN:
            raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)},"
                             f" nor FILE.py:CLASS")
        return KNOWN[method].kind
    path, _, name = method.rpartition(":")
    try:
        found = runpy.run_path(path).get(name)
    except Exception as error:
        raise ValueError(f"method {method!r}: {type(error).__name__}: {error}") from None
    if not isinstance(found, type):
        raise ValueError(f"method {method!r}: there is no class {name!r} in {path}")
    return found


def settings_of(spec: str) -> dict:
    """The settings of `method:name=value,name=value`, and those that the name itself sets. They are
    attributes of the method's class, or fields of `SentenceKVConfig`."""
    method, pairs = split(spec)
    settings = dict(KNOWN[method].settings) if method in KNOWN else {}
    kind = class_of(method)
    for pair in filter(None, pairs.split(",")):
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"method {spec!r}: settings are name=value,name=value")
        is_field = issubclass(kind, SentenceKV) and name != "unit"
        default = getattr(SentenceKVConfig if is_field else kind, name, None)
        if type(default) not in (str, int, float) or name in ("name", "label"):
            raise ValueError(f"method {spec!r}: there is no setting {name!r}")
        try:
            settings[name] = type(default)(value)
        except ValueError:
            raise ValueError(f"method {spec!r}: {name} is {value!r}, must be a number") from None
    return settings


def make_cache(spec: str, model_config, budget: int, spans: list, max_new_tokens: int):
    """An empty cache on the CPU that expects a prompt of these sentences. ValueError for an unknown
    method, or a setting that it does not have."""
    return class_of(spec)(model_config, budget, spans, max_new_tokens, **settings_of(spec))


# Of a model that is just large enough to try out a method and its settings.
SHAPE = LlamaConfig(1, 1, 1, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    head_dim=8, max_position_embeddings=100)


def try_out(spec: str):
    """Read and write a few random tokens. ValueError if the class cannot."""
    def random_qkv(n_tokens):
        return (torch.randn(heads, n_tokens, 8) for heads in (4, 2, 2))

    try:
        cache = make_cache(spec, SHAPE, 48, [(0, 60)], 2)
        for layer in cache.layers:
            layer.prefill(*random_qkv(60))
            layer.keep()
        cache.advance(60)
        for layer in cache.layers:
            keys, values, _ = layer.decode(*random_qkv(1))
            if keys.shape != values.shape or keys.shape[::2] != (2, 8):
                raise ValueError(f"decode returns keys {tuple(keys.shape)} and values"
                                 f" {tuple(values.shape)}, and not (2, n, 8)")
        cache.advance(1)
        cache.cost()
    except Exception as error:
        message = " ".join(f"{error}".split())
        raise ValueError(f"method {spec!r}: {type(error).__name__}: {message}") from None

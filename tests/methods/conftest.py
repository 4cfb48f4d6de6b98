"""What the tests of methods share: prompts, what a head attends to, and the parts of definitions
that several methods have in common, in plain loops. What a head keeps of the prompt besides its
last 32 tokens is a list of positions, the most important first.

Names of `benchmarks` that belong to no one family are imported here alone.
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_ids, random_llama, random_spans

from benchmarks.methods import (METHODS, PUBLISHED, class_of, make_cache,  # noqa: F401
                                settings_of, try_out)
from benchmarks.methods.base import Cost, Evicting, Recording  # noqa: F401  for the tests

BUDGET, N_PROMPT, N_LONG, N_NEW, WINDOW = 72, 150, 300, 70, 32
ROOM = BUDGET - WINDOW
HEADS, LAYERS, DIM = range(TINY.num_key_value_heads), TINY.num_hidden_layers, TINY.head_dim
GROUP = TINY.num_attention_heads // len(HEADS)
EACH_HEAD = [(layer, head) for layer in range(LAYERS) for head in HEADS]

# What is held does not follow from the text.
BUDGETED = [method for method in METHODS if class_of(method).budgeted]
# No layer is whole, whatever the budget.
STRICT = [method for method in BUDGETED if not method.endswith("_dense")]
# So many tokens may be left of a budget: pages are whole, and shares are rounded down.
COARSE = dict.fromkeys(METHODS, 0) | {
    "quest": 16, "quest_dense": 16, "arkvale": 32, "arkvale_dense": 32, "shadowkv": 8, "actqkv": 40,
    "pyramidkv": 4, "adakv": 1, "duo_heads": 2, "think": 2, "snapkv_4bit": 4}
# Tokens are merged or have fewer bits, and yet less than one of 16 bits is left of a budget.
FILLED_UP = ("snapkv_4bit", "sentencekv_4bit", "kvmerger", "less")
# A budget counts rows, which have 8 bits: what is read is rounded.
EIGHT_BITS = ("sentencekv",)
# A budget for everything is not everything: channels or bits are lost, or a layer gets little.
LOSSY = {"pyramidkv", "windowkv", "think", "snapkv_4bit", "sentencekv", "sentencekv_4bit",
         "kvsharer", "dbudgetkv"}
# Some keys are made up: means, random features, or the prompt's with fewer channels or bits.
MADE_UP = ("retroinfer", "less", "think", "snapkv_4bit", "kvmerger", "sentencekv_4bit")
# What a layer attends to is not its own tokens: they are merged, or another layer's.
MIXED = ("kvmerger", "kvsharer")
# The first four tokens stay, whatever is written.
WITH_SINKS = ("streamingllm", "expected_attention", "cascading", "arkvale", "actqkv", "clusterkv",
              "prefixkv", "duo_heads", "sentencekv_16bit")
# A second text can be read after the prompt, such as a question.
READ_ON = [method for method in PUBLISHED if class_of(method).reads_on]


def random_qkv(n_tokens, seed, dim=DIM):
    generator = torch.Generator().manual_seed(seed)
    heads = GROUP * len(HEADS), len(HEADS), len(HEADS)
    return [torch.randn(n, n_tokens, dim, generator=generator) for n in heads]


def recording_of(layers):
    """Of q, k, v of each layer."""
    recording = Recording()
    for layer, (q, k, v) in enumerate(layers):
        recording.prefill(layer, q, k, v)
    recording.advance(k.shape[1])
    return recording


def random_recording(n_layers=LAYERS, n_tokens=N_PROMPT, dim=DIM, seed=0):
    return recording_of(random_qkv(n_tokens, 10**6 + 1000 * seed + layer, dim)
                        for layer in range(n_layers))


def read_by(model, n_tokens=N_PROMPT):
    recording = Recording()
    model.prefill(random_ids(n_tokens, "cpu"), recording)
    return recording


@pytest.fixture(scope="session")
def model():
    return random_llama()


@pytest.fixture(scope="session")
def recording(model):
    return read_by(model)


@pytest.fixture(scope="session", params=["model", "random"])
def long_prompt(request, model):
    return (read_by(model, N_LONG) if request.param == "model" else
            random_recording(n_tokens=N_LONG))


def new_cache(spec, recording, budget=BUDGET, **settings):
    """Of a `method`, or `method:name=value`, for a prompt and a model like the recording's."""
    q, k, _ = recording.qkv[0]
    config = replace(TINY, num_hidden_layers=len(recording.qkv), num_attention_heads=len(q),
                     num_key_value_heads=len(k), head_dim=k.shape[-1])
    return class_of(spec)(config, budget, random_spans(recording.num_tokens), 200,
                          **settings_of(spec) | settings)


def filled(spec, recording, budget=BUDGET, **settings):
    """The method's cache after the prompt."""
    return recording.replay(new_cache(spec, recording, budget, **settings))


def write(model, cache, n_new=50):
    """The states after each token, in sentences of 10."""
    states = []
    for i, token in enumerate(random_ids(N_PROMPT + n_new, "cpu")[N_PROMPT:]):
        if i and i % 10 == 0:
            cache.seal(10)
        states.append(model.decode(token[None], cache))
    return torch.cat(states)


def followed(qkv, token):
    """The queries, keys and values of a layer, and those of one token after them."""
    return [torch.cat(pair, dim=1) for pair in zip(qkv, token)]


def writing(cache, recording, n_new=N_NEW, random=random_qkv):
    """Write random tokens, in sentences of 10. Yields after each, of every layer: q, k, v of all
    tokens so far, and the keys, the values and the mask that are attended to."""
    layers, dim = recording.qkv, recording.qkv[0][1].shape[-1]
    for step in range(n_new):
        if step and step % 10 == 0:
            cache.seal(10)
        tokens = [random(1, 100 * step + layer, dim) for layer in range(len(layers))]
        layers = [followed(*both) for both in zip(layers, tokens)]
        seen = [layer.decode(*token) for layer, token in zip(cache.layers, tokens)]
        cache.advance(1)
        yield list(zip(layers, seen))


def positions(qkv, attended, head, found_by=(1, 2)):
    """Where a head attends to, each position as often as it does: found by keys and values, or by
    one of the two."""
    known = torch.cat([qkv[i][head] for i in found_by], dim=-1)
    rows, mask = torch.cat([attended[i - 1][head] for i in found_by], dim=-1), attended[2]
    if mask is not None:
        rows = rows[mask[head, 0] if mask.dtype == torch.bool else mask[head, 0] == 0]
    known = {tuple(row): i for i, row in enumerate(known.tolist())}
    return sorted(known[tuple(row)] for row in rows.tolist())


def attending(cache, recording, n_new=N_NEW, found_by=(1, 2)):
    """As `writing`: yields after each token the positions, by layer and head."""
    for seen in writing(cache, recording, n_new):
        yield [[positions(*layer, head, found_by) for head in HEADS] for layer in seen]


def expected_attending(kept, total, n_prompt, least=None, size=1):
    """As `attending`, of one head: a new token takes the place of the least important that is kept,
    until these are `least` (half of the total), and then of the oldest of the latest."""
    kept, latest = list(kept), list(range(n_prompt - WINDOW, n_prompt))
    least = total // 2 if least is None else least
    for new in range(n_prompt, n_prompt + N_NEW):
        latest.append(new)
        while size * len(kept) + len(latest) > total:
            if size * (len(kept) - 1) >= least:
                kept.pop()
            else:
                latest.pop(0)
        yield sorted(kept + latest)


def assert_keeps(cache, recording, kept, totals, found_by=(1, 2), **settings):
    """`kept` and `totals` of each layer and head. At every token that is written."""
    expected = [[expected_attending(*head, recording.num_tokens, **settings)
                 for head in zip(*layer)] for layer in zip(kept, totals)]
    for seen in attending(cache, recording, found_by=found_by):
        assert seen == [[next(head) for head in layer] for layer in expected]


def attention(q, k, queries):
    """What each head's queries pay to every token, one query at a time. (H, queries, T)"""
    rows = torch.zeros(len(q), len(queries), k.shape[1], dtype=torch.float64)
    for head in range(len(q)):
        for row, i in enumerate(queries):
            logits = k[head * len(k) // len(q), : i + 1].double() @ q[head, i].double()
            rows[head, row, : i + 1] = (logits / math.sqrt(q.shape[-1])).softmax(0)
    return rows


def received(q, k, queries, power=1):
    """Of each KV head, a list: the attention to a power that every token gets from some queries,
    their sum, the mean of the group."""
    rows = attention(q, k, queries) ** power
    return rows.unflatten(0, (len(k), -1)).sum(dim=2).mean(dim=1).tolist()


def window_scores(q, k, power=1, pool=7):
    """As `received`, from the last 32 queries to the tokens before them, the largest of the
    neighbours."""
    n_tokens, scores = k.shape[1], []
    for row in received(q, k, range(n_tokens - WINDOW, n_tokens), power):
        row = row[: n_tokens - WINDOW]
        scores.append([max(row[max(0, i - pool // 2) : i + pool // 2 + 1])
                       for i in range(len(row))])
    return scores


def best(scores, n=None):
    """The best n positions, or all, the best first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows)]


def softmax(scores):
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]

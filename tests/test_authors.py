"""The oracle and `sentencekv.py` make every choice that the authors' own code made, once each
difference is overridden: tests/reference/authors has the choices of that code as numbers."""

import hashlib
import json
import random
import struct
from dataclasses import replace

import oracle
import pytest
import slow_cache
import torch
from conftest import REFERENCE

import sentencekv
from benchmarks.methods.base import Recording
from course.exercises.diagnose import with_mistake
from model import Llama, LlamaConfig
from sentencekv import SentenceKVConfig

RECORDED = json.loads((REFERENCE / "authors" / "sentencekv_reference.json").read_text())
CASES = {case["name"]: case for case in RECORDED["cases"]}


class AuthorsHead(oracle.SlowHead):
    """The oracle with all that the authors' code does differently. Methods of this class:

    most_important  sinks are the first kept tokens; no token is kept because it is a first one
    ranked          a fault: the first kept token after the sinks is never selected
    window          the last tokens alone, although the sentence being written can be longer
    is_first        the first token of a sentence attends to everything; so does the first token
                    after the prompt
    is_last         the last token of a sentence attends to everything

    Beside them, `llama` gives each query head a KV head of its own, `settings` are its settings,
    and `marks` says where sentences end. One difference shows in none of the cases, where
    sentences are short: of the N kept tokens of S sentences, one sentence has max(100, 2 * (N // S)
    + 50) at most, and the others are lost (a fault).
    """

    def __init__(self, config, spans, ends: set):
        super().__init__(config, spans)
        self.ends = ends  # positions of the tokens that end a sentence
        self.seen = []  # for each decoded token, the positions that it attended to

    def most_important(self, q, k):
        self.first_sinks = []
        kept = super().most_important(q, k)
        self.first_sinks = kept[: self.config.sink_tokens]
        return kept

    def ranked(self):
        never = list(self.kv)[self.config.sink_tokens]
        return [i for i in super().ranked() if i != never]

    def window(self):
        return super().window()[-self.config.recent_window :]

    def is_first(self):
        return len(self.queries) == 1

    def is_last(self):
        return self.n_tokens - 1 in self.ends

    def attended(self):
        attended = super().attended()
        self.seen.append(list(self.kv) if self.is_first() or self.is_last() else attended)
        return self.seen[-1]


def settings(case) -> SentenceKVConfig:
    theirs = case["settings"]
    assert theirs["kernel_size"] == 7  # of `token_importance`
    return SentenceKVConfig(
        token_budget=theirs["token_budget"], keep_factor=theirs["keep_factor"],
        sink_tokens=theirs["start_budget"], recent_window=theirs["recent_budget"],
        observation_window=theirs["window_size"], secondary_sinks=0, score="mean_query",
        query_decay=1, kv_bits=16, sentence_limit=128)


def weights_of(case) -> dict:
    """Uniform random numbers, one after another, in the order of this dict, row by row."""
    config, recipe = case["config"], case["weights"]
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv_size = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {"q_proj": (hidden, hidden), "k_proj": (kv_size, hidden), "v_proj": (kv_size, hidden),
             "o_proj": (hidden, hidden), "gate_proj": (inner, hidden), "up_proj": (inner, hidden),
             "down_proj": (hidden, inner)}
    shapes = {"embed_tokens": (config["vocab_size"], hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"{i}.{name}": shape for name, shape in layer.items()}
    shapes["lm_head"] = shapes["embed_tokens"]
    draw, digest, weights = random.Random(recipe["seed"]).random, hashlib.sha256(), {}
    for name, (rows, columns) in shapes.items():
        scale = 1 if name == "embed_tokens" else (3 / columns) ** 0.5
        scale *= recipe["gain"] if name.endswith(("q_proj", "k_proj")) else 1
        numbers = [(2 * draw() - 1) * scale for _ in range(rows * columns)]
        digest.update(struct.pack(f"<{len(numbers)}f", *numbers))
        weights[name] = torch.tensor(numbers).view(rows, columns)
    assert digest.hexdigest() == recipe["sha256"]
    return weights


def llama(case, one_head_each: bool) -> Llama:
    """The model. If `one_head_each`, each KV head is there for each of its query heads."""
    names = case["config"]
    n_heads, n_kv_heads = names["num_attention_heads"], names["num_key_value_heads"]
    config = LlamaConfig(**names, head_dim=names["hidden_size"] // n_heads)
    repeats = n_heads // n_kv_heads if one_head_each else 1
    model = Llama(replace(config, num_key_value_heads=n_kv_heads * repeats)).requires_grad_(False)
    weights = weights_of(case)
    model.embed_tokens.weight.copy_(weights["embed_tokens"])
    model.lm_head.weight.copy_(weights["lm_head"])
    for i, block in enumerate(model.layers):
        q, k, v, o, gate, up, down = (weights[f"{i}.{name}_proj"] for name in (
            "q", "k", "v", "o", "gate", "up", "down"))
        k, v = (x.unflatten(0, (n_kv_heads, -1)).repeat_interleave(repeats, 0).flatten(0, 1)
                for x in (k, v))
        block.self_attn.qkv_proj.weight.copy_(torch.cat((q, k, v)))
        block.self_attn.o_proj.weight.copy_(o)
        block.mlp.gate_up_proj.weight.copy_(torch.cat((gate, up)))
        block.mlp.down_proj.weight.copy_(down)
    return model


def spans_of(case) -> list:
    return [tuple(span) for span in case["spans"]]


def write(case, model) -> tuple:
    """Read the prompt and take the given tokens. Returns the cache and the logits (1 + n, V)."""
    prompt, new, marks = case["prompt"], case["new"], set(case["marks"])
    cache = slow_cache.SlowSentenceKV(settings(case), model.config)
    ends = {i for i, token in enumerate(prompt + new) if token in marks}
    for layer in cache.layers:
        layer.heads = [AuthorsHead(settings(case), cache.spans, ends) for _ in layer.heads]
    cache.expect(spans_of(case))
    states = [model.prefill(torch.tensor(prompt), cache)[-1]]
    for token in new:
        states.append(model.decode(torch.tensor([token]), cache)[0])
        if token in marks:
            cache.seal(cache.num_tokens - cache.spans[-1][1])
    n_prompt = len(prompt)
    assert cache.spans == spans_of(case) + [(n_prompt + a, n_prompt + b) for a, b in case["sealed"]]
    return cache, model.logits(torch.stack(states))


def numbers_of(ranges: str) -> list:
    """All of "0-2 5" -> [0, 1, 2, 5]"""
    bounds = [[int(end) for end in part.split("-")] for part in ranges.split()]
    return [i for part in bounds for i in range(part[0], part[-1] + 1)]


def near(found, expected) -> bool:
    expected = torch.as_tensor(expected)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=1e-4)


def query_heads(case):
    """(layer, query head) of all."""
    config = case["config"]
    return [(i, j) for i in range(config["num_hidden_layers"])
            for j in range(config["num_attention_heads"])]


def differences(case, one_head_each=True) -> set:
    """What of the record the oracle does not reproduce."""
    model, found = llama(case, one_head_each), set()
    cache, logits = write(case, model)
    if not near(logits, case["logits"]):
        found.add("logits")
    for i, j in query_heads(case):
        heads, kept = cache.layers[i].heads, case["kept"][i][j]
        head = heads[j * len(heads) // case["config"]["num_attention_heads"]]
        positions = kept + [*range(len(case["prompt"]), cache.num_tokens)]
        if list(head.kv) != positions:
            found.add("kept")
        for seen, rows in zip(head.seen, case["attended_rows"], strict=True):
            if sorted(seen) != [positions[row] for row in numbers_of(rows[i][j])]:
                found.add("attended")
        keys = torch.stack([head.kv[i][0] for i in positions[len(kept) :]])
        if not near(vectors_of(keys, case["sealed"]), case["sealed_vectors"][i][j]):
            found.add("vectors")
    return found


def vectors_of(keys, spans, positions=None) -> torch.Tensor:
    """The vectors (S, D) by `sentencekv.py`, without those of sentences of which nothing is kept.
    keys (N, D) at these positions"""
    end = spans[-1][1]
    positions = list(range(end)) if positions is None else positions
    ends = torch.tensor([end for _, end in spans])
    bounds = sentencekv.sentence_bounds(torch.tensor([positions]), ends)
    vectors, _ = sentencekv.sentence_vectors(keys[None, : len(positions)], bounds)
    return vectors[0, : (bounds.diff() > 0).sum()]


def prompt_differences(case) -> set:
    """What of the record of the prompt the functions of `sentencekv.py` do not reproduce."""
    model, recording, found = llama(case, one_head_each=True), Recording(), set()
    model.prefill(torch.tensor(case["prompt"]), recording)
    config = replace(settings(case), sink_tokens=0)  # none is kept because it is a first one
    for i, (q, k, _) in enumerate(recording.qkv):
        importance = sentencekv.token_importance(q[:, -config.observation_window :], k)
        secondary = torch.zeros(k.shape[:2], dtype=torch.bool)
        kept = sentencekv.keep_tokens(importance, secondary, config).tolist()
        if kept != case["kept"][i]:
            found.add("kept")
        for j, positions in enumerate(kept):
            expected = [vector for vector in case["vectors"][i][j] if any(vector)]
            if not near(vectors_of(k[j, positions], spans_of(case), positions), expected):
                found.add("vectors")
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_choice_is_the_one_of_the_authors_code(name):
    assert differences(CASES[name]) == set()


@pytest.mark.parametrize("name", CASES)
def test_the_functions_keep_the_tokens_and_make_the_vectors_of_the_authors_code(name):
    assert prompt_differences(CASES[name]) == set()


@pytest.mark.parametrize("name", ["most_important", "ranked", "window", "is_first", "is_last"])
def test_without_one_of_the_differences_the_choices_are_others(monkeypatch, name):
    if hasattr(oracle.SlowHead, name):
        monkeypatch.delattr(AuthorsHead, name)
    else:
        monkeypatch.setattr(AuthorsHead, name, lambda self: False)
    assert "attended" in differences(CASES["mha"])


def test_one_choice_for_a_group_of_query_heads_is_another():
    assert {"kept", "attended", "logits"} <= differences(CASES["gqa"], one_head_each=False)


@pytest.mark.parametrize("owner, name, old, new, kind", [
    (sentencekv, "token_importance", "F.max_pool1d(received[:, : tokens - window], pool, stride=1, "
     "padding=pool // 2)", "received[:, : tokens - window]", "kept"),
    (sentencekv, "token_importance", " / math.sqrt(dim)", "", "kept"),
    (sentencekv, "keep_tokens", "config.protected_tokens :]", "config.protected_tokens + 1 :]",
     "kept"),
    (sentencekv, "sentence_bounds", "starts_and_end)  #", "starts_and_end, right=True)  #",
     "vectors"),
    (sentencekv, "sentence_vectors", "-1))[:, 1:]", "-1))[:, :-1]", "vectors"),
])
def test_a_mistake_in_a_function_is_found(monkeypatch, owner, name, old, new, kind):
    monkeypatch.setattr(owner, name, with_mistake(getattr(owner, name), old, new))
    assert kind in prompt_differences(CASES["mha"])


@pytest.mark.parametrize("owner, name, old, new", [
    (oracle.SlowHead, "most_important", "max(0, i - 3)", "i"),
    (oracle.SlowHead, "attended", "[:room]", "[: room - 1]"),
    (oracle.SlowHead, "best_sentences", "reverse=True", "reverse=False"),
    (oracle.SlowHead, "scores", "self.config.query_decay", "0.9"),
    (slow_cache.SlowSentenceKV, "seal", "head.queries.clear()", "pass"),
    (oracle.SlowHead, "scores", "in self.spans if", "in self.spans[:-1] if"),
])
def test_a_mistake_in_the_oracle_is_found(monkeypatch, owner, name, old, new):
    monkeypatch.setattr(owner, name, with_mistake(getattr(owner, name), old, new))
    assert "attended" in differences(CASES["mha"])

"""Inputs for each exercise.

An exercise has fixed cases under its name in FIXED, the first of them small enough to be redone by
hand, and a case of random numbers in RANDOM. Shapes, views and dtypes are those that the project
passes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

import sentencekv
from cache import NO_ROW, SentenceKVCache
from model import Attention, LlamaConfig
from sentencekv import SentenceKVConfig
from support.host_rows import Copies

TINY = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                   num_attention_heads=4, num_key_value_heads=2, head_dim=4,
                   max_position_embeddings=256)
N_RANDOM, N_STEPS = 6, 50
N_RANDOM_OF = {"is_end": 40, "seal": 3}  # others have N_RANDOM
STEPS = f"{N_STEPS} steps, one after the other"


class Case(NamedTuple):
    name: str
    arguments: tuple
    tolerance: float = 1e-4  # relative to the largest number of a result


class Draw:
    """Random numbers of one seed."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape) -> torch.Tensor:
        """From `low` to `high`, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def number(self, low: int, high: int) -> int:
        return self.integers(low, high, 1).item()

    def choice(self, options):
        return options[self.number(0, len(options) - 1)]


# Lesson 2
def attention_case(name: str, q, keys, values, mask=None, tolerance=1e-4) -> Case:
    heads, kv_heads, dim = len(q), len(keys), q.shape[-1]
    config = LlamaConfig(vocab_size=8, hidden_size=heads * dim, intermediate_size=8,
                         num_hidden_layers=1, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, head_dim=dim, max_position_embeddings=8)
    keys, values = torch.stack((keys, values), dim=2).unbind(dim=2)  # views, as in a cache
    return Case(name, (Attention(config), q, keys, values, mask), tolerance)


def attend() -> Iterator[Case]:
    q = 200.0 * torch.tensor([[[1, 0]], [[0, 1]], [[-1, -1]], [[0, 1]]])  # finds one key each
    keys = torch.tensor([[[1.0, 0], [0, 1], [0, 0]], [[0, 1], [1, 0], [0, 0]]])
    values = torch.arange(1.0, 13).view(2, 3, 2)
    mask = torch.tensor([[[0, 1, 1]], [[1, 0, 0]]]).bool()
    yield attention_case("without a mask", q, keys, values)
    yield attention_case("with a mask", q, keys, values, mask)
    q = torch.tensor([[[2.0, 0, 0, 0]], [[0, 2.0, 0, 0]]])
    keys = torch.tensor([[[math.log(3), 0, 0, 0], [0, 0, 0, 0]]])
    values = torch.tensor([[[4.0, 0, 0, 0], [0, 4, 0, 0]]])
    yield attention_case("weights 3/4 and 1/4, then 1/2 and 1/2", q, keys, values)
    yield attend_at_random(Draw(1), heads=(2, 2), name="one query head in a group")
    yield attend_at_random(Draw(2), heads=(3, 1), name="one KV head")
    case = attend_at_random(Draw(3), heads=(6, 2), name="q in bfloat16, keys in float32")
    attention, q, *kv = case.arguments
    yield case._replace(arguments=(attention, q.bfloat16(), *kv), tolerance=0.02)


def attend_at_random(draw: Draw, heads=None, name="D = 6") -> Case:
    n_heads, kv_heads = heads or draw.choice([(4, 2), (6, 2), (6, 3), (8, 2)])
    n, mask = draw.number(5, 9), None
    if draw.number(0, 3):
        mask = draw.normal(kv_heads, 1, n) > 0
        mask[:, :, -1] = True
    q = 2 * draw.normal(n_heads, 1, 6)
    return attention_case(name + (", with a mask" if mask is not None else ", without a mask"),
                          q, draw.normal(kv_heads, n, 6), draw.normal(kv_heads, n, 6), mask)


# Lesson 3
BEFORE = ["He left.", "Dr.", "He sat", "It is 3.", "Why?", "你好。", "I work at Yahoo!", "Ax Inc.",
          "the U.S.", "Wait.", "Is it so?", "It rose.", "see p.", "Well...", "«Oui!»", "am 3.",
          'He said "No."', "Τι είναι;", "I saw it;", "1. Tea", "It failed.[3]", "A heading", "so!"]
AFTER = ["She sat.", "Smith sat.", "down.", "5 m long.", "he asked.", "再见。", "in London.", "Army",
         "The end.", "the end.", "• Tea", '"Hello', "iPhone", "ρώτησε", "3 men came.", "2. Milk",
         "”", ", no", "» dit-il", "(2) is", "however, no"]
GAPS = [" ", " ", " ", "\n", "\n\n", ""]


def is_end() -> Iterator[Case]:
    for before, gap, after in (
            ("He left.", " ", "She sat."), ("He sat", " ", "down."), ("Dr.", " ", "Smith sat."),
            ("Dr.", " ", "She left."), ("e.g.", " ", "It is."),
            ("It is 3.", " ", "5 m long."), ("Why?", " ", "he asked."), ("你好。", "", "再见。"),
            ("你好。", "", "”"), ("你好。", " ", '"Hello'), ("I work at Yahoo!", " ", "in London."),
            ("Ax Inc.", " ", "The end."), ("the U.S.", " ", "Army"), ("the U.S.", " ", '"Hello'),
            ("the U.S.", " ", "the end."), ("Wait.", " ", "• Tea"), ("Is it so?", " ", "iPhone"),
            ("Τι είναι;", " ", "ρώτησε"), ("I sat.", " ", "it fell"),
            ("I sat.", " ", "3 men came."), ("1. Tea", " ", "2. Milk"),
            ("A heading", "\n\n", "A line"), ("a line", "\n", "another")):
        yield Case(f"between {before!r} and {after!r}", (before, gap, after))


def is_end_at_random(draw: Draw) -> Case:
    before, gap, after = draw.choice(BEFORE), draw.choice(GAPS), draw.choice(AFTER)
    return Case(f"between {before!r} and {after!r}", (before, gap, after))


# Lesson 4
def sentence_bounds() -> Iterator[Case]:
    ends = torch.tensor([4, 7, 10])
    for name, *marked in (
            ("the second sentence has no rows", [-1, 0, 1, 8, 9]),
            ("all sentences have rows", [0, 3, 4, 6, 7]),
            ("two secondary sinks in one head, none in the other", [-1, -1, 0, 4, 5],
             [3, 4, 5, 6, 7]),
            ("only the last sentence has rows", [7, 8, 9]),
            ("the first sentence has no rows", [4, 5, 6, 8]),
            ("only secondary sinks", [-1, -1])):
        yield Case(name, (torch.tensor(marked), ends))
    yield Case("one sentence", (torch.tensor([[-1, 0, 1]]), torch.tensor([2])))


def sentence_bounds_at_random(draw: Draw) -> Case:
    ends = draw.integers(1, 6, draw.number(3, 9)).cumsum(dim=0)
    n_tokens = ends[-1].item()
    n = draw.number(2, n_tokens)
    kept = draw.normal(3, n_tokens).argsort(dim=-1)[:, :n].sort(dim=-1).values
    secondary = draw.normal(3, n_tokens) > 1
    return Case("three heads", (sentencekv.order_rows(kept, secondary)[1], ends))


# Lesson 5
def sentence_vectors() -> Iterator[Case]:
    keys = torch.tensor([[[1.0, 0], [3, 0], [2, 2], [2, 6], [5, 4]]])
    yield Case("two sentences", (keys, torch.tensor([[0, 2, 5]])))
    yield Case("an empty sentence at the end", (keys, torch.tensor([[0, 2, 5, 5]])))
    yield Case("rows before the first bound and after the last", (keys, torch.tensor([[1, 2, 4]])))
    yield Case("other bounds in each head", (torch.cat((keys, 2 * keys)),
                                             torch.tensor([[0, 2, 5], [1, 4, 5]])))
    keys = 3 * Draw(1).normal(2, 12, 1, 6).expand(-1, -1, 7, -1).flatten(1, 2)
    keys = torch.cat((keys, Draw(2).normal(2, 7, 6)), dim=1)
    yield Case("12 sentences of 7 equal keys", (keys, torch.arange(0, 92, 7).expand(2, -1)))
    keys = torch.stack((1 + 0.2 * Draw(1).normal(2, 40, 6), Draw(2).normal(2, 40, 6)), dim=2)
    bounds = torch.tensor([[2, 9, 14, 30, 40, 40], [0, 6, 12, 25, 33, 38]])
    yield Case("keys in bfloat16: compute in float32, return vectors in bfloat16",
               (keys.bfloat16()[:, :, 0], bounds), tolerance=1e-3)


def sentence_vectors_at_random(draw: Draw) -> Case:
    n, bounds = draw.number(8, 20), None
    bounds = draw.integers(0, n, 3, draw.number(3, 6)).sort(dim=-1).values
    return Case("three heads", (draw.normal(3, n, 2, 6)[:, :, 0], bounds))  # a view, as in a cache


# Lesson 6
def score_cases() -> Iterator[Case]:
    q = torch.tensor([[[2.0, 0, 0, 0], [4, 4, 0, 0]]])
    vectors = torch.tensor([[[math.log(3), 0, 0, 0], [0, 0, 0, 0]]])
    yield Case("keys of no variance", (q[:, :1], vectors, torch.zeros(1, 2), torch.ones(1, 2)))
    yield Case("two query heads", (q, vectors, torch.zeros(1, 2), torch.ones(1, 2)))
    yield Case("3 rows and 1", (q, vectors, torch.zeros(1, 2), torch.tensor([[3.0, 1]])))
    yield Case("an empty sentence", (q, vectors, torch.zeros(1, 2), torch.tensor([[3.0, 0]])))
    variances = torch.tensor([[0, 2 * math.log(2)]])
    yield Case("variances 0 and 2 ln 2", (q, vectors, variances, torch.ones(1, 2)))
    case = scores_at_random(Draw(1))
    q, vectors, variances, lengths = case.arguments
    yield case
    yield Case("exponents of hundreds", (20 * q, 3 * vectors, variances, lengths), 0.001)
    low = vectors - 200 * q[:, :1]
    low[:, 2], lengths[:, 2] = 0, 0  # as a place that is not in use
    yield Case("low exponents, and 0 for an empty sentence",
               (q[:, :1], low, torch.zeros_like(variances), lengths), 0.001)
    yield Case("q and vectors in bfloat16", (q.bfloat16(), vectors.bfloat16(), variances, lengths),
               0.05)


def scores_at_random(draw: Draw) -> Case:
    n, group = draw.number(5, 9), draw.number(2, 4)
    lengths = draw.integers(0, 6, 2, n).float()
    lengths[:, 0] = 2
    return Case("D = 6", (draw.normal(2, group, 6), draw.normal(2, n, 6),
                          draw.normal(2, n).abs(), lengths))


# Lesson 7
def token_importance() -> Iterator[Case]:
    k = torch.tensor([0, math.log(3), 0, 0, 0]).view(1, 5, 1)
    yield Case("no pooling", (torch.ones(1, 2, 1), k, 1))
    yield Case("the maximum of 3", (torch.ones(1, 2, 1), k, 3))
    q = torch.tensor([[[1.0], [1]], [[0], [0]]])
    yield Case("two query heads, no pooling", (q, k, 1))
    yield Case("two query heads, two KV heads, no pooling", (q, torch.cat((k, -k)), 1))
    draw = Draw(1)
    yield Case("the maximum of 7", (draw.normal(4, 20, 6)[:, -3:], draw.normal(2, 20, 6)))
    yield Case("one query", (draw.normal(4, 20, 6)[:, -1:], draw.normal(2, 20, 6), 3))
    yield Case("fewer tokens than the maximum is of", (draw.normal(4, 3, 6), draw.normal(2, 5, 6)))


def token_importance_at_random(draw: Draw) -> Case:
    heads, kv_heads = draw.choice([(4, 2), (6, 2), (6, 3)])
    tokens, window = draw.number(12, 30), draw.number(2, 6)
    q, k = 2 * draw.normal(heads, tokens, 6)[:, -window:], draw.normal(kv_heads, tokens, 6)
    return Case("D = 6", (q, k, draw.choice([1, 3, 5, 7])))


def select_rows() -> Iterator[Case]:
    scores = torch.tensor([[0.1, 0.9, 0.5]])
    available = torch.tensor([[3, 3, 2]], dtype=torch.int32)
    for budget in (4, 0, 3, 6, 100, torch.tensor([4], dtype=torch.int32)):
        yield Case(f"a budget of {budget}", (scores, available, budget))
    scores = torch.tensor([[3.0, 4, 1, 2], [1, 2, 4, 3]])
    available = torch.tensor([[6, 1, 9, 2], [6, 9, 1, 2]], dtype=torch.int32)
    yield Case("a long sentence has a low score", (scores, available, 4))
    yield Case("the best sentence is too long", (scores.flip(-1), available, 4))
    yield Case("at most 4 sentences", (scores, available, 4, 4))
    yield Case("no rows of the best sentence", (scores, available * (scores < 4), 7))
    yield Case("one sentence, not the best, which has no rows",
               (scores, available * (scores < 4), 1, 1))
    sinks = torch.tensor([[math.inf, 0.9, 0.5], [math.inf, -0.9, -0.5]])
    yield Case("a score of infinity", (sinks, torch.tensor([[12, 40, 20], [4, 40, 20]]), 50))
    scores = torch.tensor([[0.5, -2, -0.5, 0, 0, 0]])
    available = torch.tensor([[3, 2, 4, 0, 0, 0]], dtype=torch.int32)
    budget = torch.tensor([6], dtype=torch.int32)
    yield Case("places that are not in use", (scores, available, budget))


def select_rows_at_random(draw: Draw) -> Case:
    n = draw.number(5, 12)
    available = draw.integers(0, 6, 3, n).int()
    budget = draw.number(1, 20)
    return Case(f"a budget of {budget}", (draw.normal(3, n), available, budget))


# Lesson 8
def slots_case(name: str, *lines) -> Case:
    """As in a cache: rows, starts and counts are 32-bit numbers, and places are indices."""
    rows, places, *of_places = (torch.tensor(line) for line in lines)
    return Case(name, (rows.int(), places, *(x.int() for x in of_places)))


def assign_slots() -> Iterator[Case]:
    starts = [[0, 4, 8, 12]]
    yield slots_case("one row stays, two are loaded", [[5, 8, 4]], [[1, 2, 1]], starts,
                     [[0, 2, 1, 0]], [[0, 0, 2, 1]])
    yield slots_case("all slots are empty", [[NO_ROW] * 4], [[0] * 4], starts, [[0] * 4],
                     [[0, 2, 2, 0]])
    yield slots_case("all rows stay", [[4, 5, 8]], [[1, 1, 2]], starts, [[0, 2, 1, 0]],
                     [[0, 2, 1, 0]])
    yield slots_case("fewer rows are selected than before", [[4, 5, 8, 9]], [[1, 1, 2, 2]], starts,
                     [[0, 2, 2, 0]], [[0, 2, 1, 0]])
    yield slots_case("fewer of one sentence, more of a later one", [[8, 5, 9, 4]], [[2, 1, 2, 1]],
                     starts, [[0, 2, 2, 0]], [[0, 1, 0, 2]])
    yield slots_case("two heads", [[5, 8, 4], [NO_ROW, 12, 8]], [[1, 2, 1], [3, 3, 2]],
                     starts * 2, [[0, 2, 1, 0], [0, 0, 1, 1]], [[0, 0, 2, 1], [0, 1, 0, 1]])
    lengths = [[3, 7, 5, 9, 2, 6, 8, 4], [2, 7, 5, 6, 6, 7, 7, 4]]
    starts = [[0, 3, 10, 15, 24, 26, 32, 40], [0, 2, 9, 14, 20, 26, 33, 40]]
    yield slots_case(STEPS, [[NO_ROW] * 20] * 2, [[0] * 20] * 2, starts, [[0] * 8] * 2, lengths)


def assign_slots_at_random(draw: Draw) -> Case:
    lengths = draw.integers(1, 6, 2, draw.number(4, 8))
    starts, n_slots = lengths.cumsum(dim=-1) - lengths, draw.number(6, 12)
    rows = torch.full((2, n_slots), NO_ROW)
    places = torch.zeros(2, n_slots, dtype=torch.long)
    before, selected = (sentencekv.select_rows(draw.normal(*lengths.shape), lengths, budget)
                        for budget in (n_slots - draw.number(0, 2), n_slots))
    for head in range(2):
        held = [(starts[head, s] + i, s) for s in range(lengths.shape[1])
                for i in range(before[head, s])]
        order = draw.normal(n_slots).argsort()[: len(held)]
        rows[head, order], places[head, order] = torch.tensor(held).T
    return slots_case("two heads", *(x.tolist() for x in (rows, places, starts, before, selected)))


# Lesson 9
def seal_case(name: str, ends: list, lengths: dict, **settings) -> Case:
    """Sentences of the prompt, how many rows are sealed after which step, and other settings."""
    return Case(name, ([*zip([0, *ends], ends)], lengths, settings), tolerance=1e-6)


def seal() -> Iterator[Case]:
    yield seal_case("5 rows, then 3", [5, 12, 20], {6: 5, 9: 3})
    yield seal_case("6 rows are open, 4 are sealed; later, 5", [15, 30, 40], {6: 4, 11: 5})
    yield seal_case("secondary sinks, other numbers in each head", [15, 30, 40], {6: 5, 9: 3},
                    secondary_sinks=3)
    yield seal_case("8 bits a channel", [15, 30, 40], {6: 5, 9: 4}, kv_bits=8)


def seal_at_random(draw: Draw) -> Case:
    ends = draw.integers(3, 12, draw.number(2, 5)).cumsum(dim=0).tolist()
    lengths, n_open, step = {}, 0, 0
    while step < 16:
        n_new = draw.number(1, 6)
        step, n_open = step + n_new, n_open + n_new
        lengths[step] = draw.number(max(1, n_open - 2), n_open)  # at most 2 stay open
        n_open -= lengths[step]
    return seal_case("several seals", ends, lengths)


class LateCopies(Copies):
    """Copies as on a GPU: rows are on the host only once something has waited for them."""

    def start(self, target, source):
        self.wait()
        self.in_flight = target, source

    def wait(self):
        if self.in_flight:
            target, source = self.in_flight
            target.copy_(source)
        self.in_flight = None

    finish = wait


def sealing_cache(layer_class, spans: list, settings=None) -> SentenceKVCache:
    """A cache for TINY with layers of this class, which expects a text of these sentences."""
    class Cache(SentenceKVCache):
        Layer = layer_class

    config = SentenceKVConfig(**{
        "token_budget": 24, "keep_factor": 1, "sink_tokens": 2, "secondary_sinks": 0,
        "recent_window": 4, "observation_window": 4, "sentence_limit": 12, "kv_bits": 16,
        **(settings or {})})
    cache = Cache(config, TINY, spans[-1][1] + 40, "cpu", torch.float32)
    cache.copies = LateCopies("cpu")
    for layer in cache.layers:
        layer.host.copies = cache.copies
    cache.expect(spans)
    return cache


def take(cache, n_tokens: int, method: str):
    """What a model does, with random q, k and v. `method` is "prefill" or "decode"."""
    for i, layer in enumerate(cache.layers):
        q, k, v = (Draw(cache.num_tokens + 100 * (3 * i + j)).normal(heads, n_tokens, 4)
                   for j, heads in enumerate((4, 2, 2)))
        getattr(layer, method)(q, k, v)
        if method == "prefill":
            layer.keep()
    cache.advance(n_tokens)


FIXED = {f.__name__: f for f in (attend, is_end, sentence_bounds, sentence_vectors,
                                 token_importance, select_rows, assign_slots, seal)}
FIXED |= {"mean_query": score_cases, "gaussian": score_cases}
RANDOM = {f.__name__.removesuffix("_at_random"): f for f in (
    attend_at_random, is_end_at_random, sentence_bounds_at_random, sentence_vectors_at_random,
    token_importance_at_random, select_rows_at_random, assign_slots_at_random, seal_at_random)}
RANDOM |= {"mean_query": scores_at_random, "gaussian": scores_at_random}


def cases(name: str, seed: int = 0) -> list[Case]:
    """All cases of an exercise. `name` is the function's. The names of cases hide the seed."""
    drawn = [RANDOM[name](Draw(1000 * seed + i))
             for i in range(N_RANDOM_OF.get(name, N_RANDOM))]
    return [*FIXED[name](), *(case._replace(name=f"random case {i}, {case.name}")
                              for i, case in enumerate(drawn, 1))]

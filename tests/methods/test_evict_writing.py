"""Methods that may evict at every written token: against plain lists, one head and one token at a
time."""

import math

import pytest
import torch
from methods.conftest import (BUDGET, DIM, GROUP, HEADS, LAYERS, N_NEW, N_PROMPT, WINDOW, best,
                              filled, positions, random_qkv, received, recording_of, softmax,
                              writing)

TASTE = 2 * random_qkv(1, seed=1)[0]  # a head's queries are alike, as a model's


def with_taste(n_tokens, seed, dim=DIM):
    q, k, v = random_qkv(n_tokens, seed, dim)
    return TASTE + q, k, v


def prompt(n_tokens=N_PROMPT, n_layers=LAYERS):
    return recording_of(with_taste(n_tokens, 10**6 + layer) for layer in range(n_layers))


@pytest.fixture(scope="module")
def recording():
    return prompt()


def write(cache, recording, n_new=N_NEW, random=with_taste):
    """Yields for each token, in every layer: its position, the layer, all q and k so far, and the
    positions that each head attends to."""
    for t, seen in enumerate(writing(cache, recording, n_new, random), recording.num_tokens):
        for layer, (qkv, attended) in enumerate(seen):
            yield t, layer, *qkv[:2], [positions(qkv, attended, head) for head in HEADS]


def logits(q, k, head, t, positions):
    """Of the query at t, one list for each query head that shares the KV head."""
    rows = k[head, positions].double() / math.sqrt(DIM)
    return [(rows @ q[i, t].double()).tolist() for i in range(head * GROUP, (head + 1) * GROUP)]


# H2O


def test_h2o_keeps_heavy_hitters_and_the_latest(recording):
    half = N_PROMPT - BUDGET // 2
    for t, layer, _, _, got in write(filled("h2o", recording), recording, n_new=1):
        q, k, _ = recording.qkv[layer]
        for head, scores in enumerate(received(q, k, range(N_PROMPT))):
            # With the new token the latest half begins one later, so its first may have to go.
            heavy = [*best(scores[:half], BUDGET - BUDGET // 2), half]
            heavy.remove(min(heavy, key=lambda i: scores[i]))
            assert got[head] == sorted([*heavy, *range(half + 1, t + 1)])


# MorphKV


def morphkv_cut(held, q, k, head, size):
    """The latest 32 of the held, and the older ones that the last 32 queries like best."""
    if len(held) <= size:
        return held
    older, latest = held[:-WINDOW], held[-WINDOW:]
    score = dict.fromkeys(older, 0.0)
    for t in range(held[-1] - WINDOW + 1, held[-1] + 1):
        group = logits(q, k, head, t, older)
        for i, share in zip(older, softmax([sum(column) for column in zip(*group)])):
            score[i] += share
    return sorted(sorted(older, key=lambda i: -score[i])[: size - WINDOW]) + latest


@pytest.mark.slow
def test_morphkv_asks_its_last_queries_anew_at_every_step(recording):
    held = {}
    for t, layer, q, k, got in write(filled("morphkv", recording), recording):
        for head in HEADS:
            if t > N_PROMPT:
                cut = morphkv_cut(held[layer, head], q, k, head, BUDGET - 1)
                assert got[head] == [*cut, t]
            held[layer, head] = got[head]


@pytest.mark.slow
def test_the_first_step_of_morphkv_cuts_the_whole_prompt_at_once():
    deep = prompt(n_layers=14)
    for t, _, q, k, got in write(filled("morphkv", deep), deep, n_new=1):
        for head in HEADS:
            cut = morphkv_cut(list(range(N_PROMPT)), q, k, head, BUDGET - 1)
            assert got[head] == [*cut, t]


def test_morphkv_is_always_as_large_as_its_budget(recording):
    cache = filled("morphkv", recording)
    for t, _, _, _, got in write(cache, recording):
        assert [len(positions) for positions in got] == [BUDGET] * len(HEADS)
        assert all(positions[-WINDOW:] == list(range(t + 1 - WINDOW, t + 1)) for positions in got)
    assert cache.cost().held == BUDGET


def test_morphkv_drops_nothing_before_its_budget_is_full():
    recording = prompt(40)
    for t, *_, got in write(filled("morphkv", recording), recording, n_new=40):
        if t < BUDGET:
            assert got == [list(range(t + 1))] * len(HEADS)
        else:
            assert [len(positions) for positions in got] == [BUDGET] * len(HEADS)


# CORM

LATEST = 20


class Needed:
    """What a head holds, and for each token the queries that found it important."""

    def __init__(self, q, k, head):
        self.head, self.held = head, list(range(N_PROMPT))
        self.by = {i: [] for i in self.held}
        for t in range(N_PROMPT - LATEST, N_PROMPT):
            self.ask(q, k, t, range(t + 1))
        self.drop(N_PROMPT - 1)

    def ask(self, q, k, t, positions):
        for row in logits(q, k, self.head, t, positions):
            for i, share in zip(positions, softmax(row)):
                if share >= 1 / (t + 1):
                    self.by[i].append(t)

    def drop(self, t):
        self.held = [i for i in self.held
                     if i > t - LATEST or any(asked > t - LATEST for asked in self.by[i])]

    def write(self, q, k, t):
        self.held.append(t)
        self.by[t] = []
        seen = list(self.held)
        self.ask(q, k, t, seen)
        self.drop(t)
        return seen


@pytest.mark.slow
def test_corm_holds_what_one_of_the_last_queries_found_important(recording):
    heads = [[Needed(q, k, head) for head in HEADS] for q, k, _ in recording.qkv]
    sizes = []  # of all heads, one step after the other
    for t, layer, q, k, got in write(filled("corm", recording, latest=LATEST), recording):
        assert got == [needed.write(q, k, t) for needed in heads[layer]]
        sizes += map(len, got)
        for positions in got:  # with the new one, before what is dropped after it
            assert set(range(t - LATEST, t + 1)) <= set(positions)
    assert sizes[:: len(HEADS)] != sizes[1 :: len(HEADS)], "each head drops its own"
    assert LATEST < min(sizes) and max(sizes[-len(HEADS) * LAYERS :]) < N_PROMPT + N_NEW - 20


def test_corm_drops_nothing_if_all_tokens_are_attended_to_alike(recording):
    def silent(*args):
        q, k, v = random_qkv(*args)
        return 0 * q, k, v

    recording = recording_of((0 * q, k, v) for q, k, v in recording.qkv)
    cache = filled("corm", recording, latest=LATEST)
    for t, *_, got in write(cache, recording, random=silent):
        assert got == [list(range(t + 1))] * len(HEADS)


def test_corm_holds_the_latest_and_the_one_token_that_all_attend_to(recording):
    loud = []
    for q, k, v in recording.qkv:
        q, k = torch.eye(DIM)[0].expand_as(q) * 100, k.clone()
        k[:, 7] = torch.eye(DIM)[0] * 100
        loud.append((q, k, v))
    loud = recording_of(loud)
    expected = [[7, *range(N_PROMPT - LATEST, N_PROMPT + 1)]] * len(HEADS)
    cache = filled("corm", loud, latest=LATEST)
    assert [got for *_, got in write(cache, loud, n_new=1)] == [expected] * LAYERS


# Cascading KV


class Cascade:
    """A head's sinks, its buffers of positions, and the attention that each token has received."""

    def __init__(self, q, k, head, budget=BUDGET, sinks=4, buffers=4):
        n_prompt = k.shape[1]
        self.head, self.size = head, (budget - sinks) // buffers
        self.sinks, self.buffers, self.step = [], [[] for _ in range(buffers)], 0
        self.total = dict(enumerate(received(q, k, range(n_prompt))[head]))
        self.asked = {i: n_prompt - i for i in range(n_prompt)}
        for i in range(n_prompt):
            self.sinks.append(i) if i < sinks else self.push(i)

    def score(self, i):
        return self.total[i] / self.asked[i]

    def push(self, token):
        full = all(len(buffer) == self.size for buffer in self.buffers)
        for i, buffer in enumerate(self.buffers):
            if len(buffer) < self.size:
                buffer.append(token)
                break
            if full and self.step % 2**i:  # another token's turn
                if self.score(token) >= self.score(buffer[-1]):
                    buffer[-1] = token
                break
            buffer.append(token)
            token = buffer.pop(0)
        self.step += 1

    def write(self, q, k, t):
        self.total[t], self.asked[t] = 0.0, 0
        self.push(t)
        held = sorted([*self.sinks, *sum(self.buffers, [])])
        for row in logits(q, k, self.head, t, held):
            for i, share in zip(held, softmax(row)):
                self.total[i] += share / GROUP
        for i in held:
            self.asked[i] += 1
        return held


@pytest.mark.slow
@pytest.mark.parametrize("buffers", [2, 4])
def test_cascading_buffers_take_what_falls_out_of_the_one_before(recording, buffers):
    heads = [[Cascade(q, k, head, buffers=buffers) for head in HEADS]
             for q, k, _ in recording.qkv]
    cache = filled("cascading", recording, buffers=buffers)
    for t, layer, q, k, got in write(cache, recording):
        assert got == [cascade.write(q, k, t) for cascade in heads[layer]]
    assert got[0] != got[1], "each head keeps its own"


@pytest.mark.parametrize("method, settings", [("cascading", {"buffers": 1}), ("streamingllm", {})])
def test_a_cascade_of_one_buffer_is_streamingllm(recording, method, settings):
    for t, *_, got in write(filled(method, recording, **settings), recording):
        assert got == [[0, 1, 2, 3, *range(t + 1 - (BUDGET - 4), t + 1)]] * len(HEADS)


@pytest.mark.parametrize("n_prompt", [30, 50, BUDGET - 1])
def test_cascading_drops_nothing_before_its_budget_is_full(n_prompt):
    recording = prompt(n_prompt)
    for t, *_, got in write(filled("cascading", recording), recording, n_new=BUDGET - n_prompt):
        assert got == [list(range(t + 1))] * len(HEADS), t

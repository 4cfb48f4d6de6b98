"""Methods that evict, each against plain lists: one head, one token at a time."""

import math
from dataclasses import replace
from fractions import Fraction
from statistics import fmean

import pytest
import torch
from conftest import TINY, random_spans

from benchmarks.methods import cost, make_cache, settings_of
from benchmarks.methods.base import Recording

pytestmark = pytest.mark.slow
BUDGET, N_PROMPT, WINDOW, N_NEW = 72, 150, 32, 60
HEADS, LAYERS, DIM = TINY.num_key_value_heads, TINY.num_hidden_layers, TINY.head_dim
GROUP = TINY.num_attention_heads // HEADS
DEEP = replace(TINY, num_hidden_layers=14)  # WindowKV's groups are of 6, 6 and 2 layers


def random_rows(heads, n_tokens, seed):
    return torch.randn(heads, n_tokens, DIM, generator=torch.Generator().manual_seed(seed))


TASTE = 2 * random_rows(GROUP * HEADS, 1, seed=1)  # a head's queries are alike, as a model's


def random_tokens(n_tokens, seed):
    q, k, v = (random_rows(heads, n_tokens, 3 * seed + i)
               for i, heads in enumerate((GROUP * HEADS, HEADS, HEADS)))
    return TASTE + q, k, v


def recording_of(layers):
    recording = Recording()
    for layer, (q, k, v) in enumerate(layers):
        recording.prefill(layer, q, k, v)
    recording.advance(k.shape[1])
    return recording


def random_recording(n_layers=LAYERS, n_tokens=N_PROMPT):
    return recording_of(random_tokens(n_tokens, 10**6 + layer) for layer in range(n_layers))


@pytest.fixture(scope="module")
def recording():
    return random_recording()


@pytest.fixture(scope="module")
def deep_recording():
    return random_recording(DEEP.num_hidden_layers)


def filled(recording, method, budget=BUDGET, config=TINY, **settings):
    """The method's cache after the prompt."""
    spans = random_spans(recording.num_tokens)
    settings = settings_of(method) | settings
    return recording.replay(make_cache(method, config, budget, spans, N_NEW, **settings))


def attended(cache, layer, k, v, token):
    """Positions that each head attends to when the next token is `token`, found by their keys and
    values among all tokens' k and v."""
    keys, values, mask = cache.decode(layer, *token)
    found = []
    for head in range(HEADS):
        rows = torch.cat((k, v), dim=-1)[head].tolist()
        position = {tuple(row): i for i, row in enumerate(rows)}
        rows = torch.cat((keys, values), dim=-1)[head]
        rows = rows if mask is None else rows[mask[head, 0]]
        found.append(sorted(position[tuple(row)] for row in rows.tolist()))
    return found


def write(cache, recording, n_new=N_NEW, query_size=1):
    """Write tokens one by one. Yields for each, in every layer: its position, the layer, all q and
    k so far, and the positions that each head attends to."""
    layers = list(recording.qkv)
    for t in range(recording.num_tokens, recording.num_tokens + n_new):
        for layer in range(len(layers)):
            q, k, v = random_tokens(1, 100 * t + layer)
            token = query_size * q, k, v
            layers[layer] = [torch.cat(parts, dim=1) for parts in zip(layers[layer], token)]
            q, k, v = layers[layer]
            yield t, layer, q, k, attended(cache, layer, k, v, token)
        cache.advance(1)


def logits(q, k, head, t, positions):
    """Of the query at t, one list for each query head that shares the KV head."""
    rows = k[head, positions].double() / math.sqrt(DIM)
    return [(rows @ q[i, t].double()).tolist() for i in range(head * GROUP, (head + 1) * GROUP)]


def softmax(values):
    exponentials = [math.exp(x - max(values)) for x in values]
    return [x / sum(exponentials) for x in exponentials]


def received(q, k, head, queries):
    """Attention that each token gets from some queries, the mean of the group, summed."""
    total = [0.0] * k.shape[1]
    for t in queries:
        for row in logits(q, k, head, t, range(t + 1)):
            for i, share in enumerate(softmax(row)):
                total[i] += share / GROUP
    return total


def from_window(layers, layer, head):
    """Attention that each token before the window gets from it."""
    q, k, _ = layers[layer]
    n_tokens = k.shape[1]
    return received(q, k, head, range(n_tokens - WINDOW, n_tokens))[: n_tokens - WINDOW]


class PromptChoice:
    """The prompt's tokens in an order, the best first, of which so many stay as fit."""

    def __init__(self, order, budget, n_prompt=N_PROMPT):
        self.budget, self.kept = budget, order[: budget - WINDOW]
        self.latest = list(range(n_prompt - WINDOW, n_prompt))

    def write(self, t):
        self.latest.append(t)
        if len(self.kept) + len(self.latest) > self.budget:
            if len(self.kept) > self.budget // 2:
                self.kept.pop()
            else:
                self.latest.pop(0)
        return sorted([*self.kept, *self.latest])


# WindowKV


def windowkv_order(layers, layer):
    """All tokens before the window, those of the best eight neighbours first."""
    heads = [from_window(layers, layer - layer % 6, head) for head in range(HEADS)]
    n_earlier = len(heads[0])
    windows = [range(a, min(a + 8, n_earlier)) for a in range(0, n_earlier, 8)]

    def score(window):
        return fmean(fmean(sorted(scores[i] for i in window)[-4:]) for scores in heads)

    return [i for window in sorted(windows, key=score, reverse=True) for i in window]


def windowkv_budget(layer, n_layers, budget=BUDGET):
    room, n_groups = budget - WINDOW, math.ceil(n_layers / 6)
    last = Fraction(8 * room, 14)
    first = 2 * room - last
    return WINDOW + int(first + (last - first) * (layer // 6) / (n_groups - 1))


def test_windowkv_keeps_the_windows_whose_best_tokens_are_attended_to_most(deep_recording):
    n_layers = DEEP.num_hidden_layers
    choices = [PromptChoice(windowkv_order(deep_recording.qkv, layer),
                            windowkv_budget(layer, n_layers)) for layer in range(n_layers)]
    assert {choice.budget for choice in choices} == {32 + 57, 32 + 40, 32 + 22}
    for t, layer, _, _, got in write(filled(deep_recording, "windowkv", config=DEEP),
                                     deep_recording):
        assert got == [choices[layer].write(t)] * HEADS


def test_all_layers_of_a_group_hold_what_its_first_one_chose(deep_recording):
    cache = filled(deep_recording, "windowkv", config=DEEP)
    sets = [got for *_, got in write(cache, deep_recording, n_new=1)]
    for group in (sets[:6], sets[6:12], sets[12:]):
        assert all(got == group[0] for got in group)
    assert not set(sets[6][0]) <= set(sets[0][0])


@pytest.mark.parametrize("n_layers", [12, 18, 30])
def test_the_budgets_of_windowkv_s_groups_fall_in_a_line_and_add_up(n_layers):
    cache = make_cache("windowkv", replace(TINY, num_hidden_layers=n_layers), 384, [], 1)
    budgets = [cache.layer_budget(layer) for layer in range(n_layers)]
    assert budgets == [windowkv_budget(layer, n_layers, 384) for layer in range(n_layers)]
    assert 383 <= fmean(budgets) <= 384


def test_windowkv_judges_a_short_last_window_by_the_tokens_it_has():
    n_prompt = 8 * 10 + 2 + WINDOW  # 80 and 81 are a window of their own
    q, k, v = random_tokens(n_prompt, seed=7)
    direction = torch.eye(DIM)[0]
    q, k = direction.expand_as(q), 0.01 * k
    k[:, 80:82] += direction  # so they are attended to more than all others
    recording = recording_of([(q, k, v)] * LAYERS)
    choice = PromptChoice(windowkv_order(recording.qkv, 0), WINDOW + 10, n_prompt)
    assert choice.kept[:2] == [80, 81]
    cache = filled(recording, "windowkv", budget=WINDOW + 10)
    for t, _, _, _, got in write(cache, recording, n_new=1):
        assert {80, 81} <= set(got[0])


# ShotKV


def shots_before_window():
    n_earlier = N_PROMPT - WINDOW
    shots = [range(a, min(b, n_earlier)) for a, b in random_spans(N_PROMPT)]
    return [shot for shot in shots if len(shot)]


def test_shotkv_keeps_the_sentences_that_all_heads_and_layers_attend_to_most(recording):
    scores = [from_window(recording.qkv, layer, head)
              for layer in range(LAYERS) for head in range(HEADS)]
    ranked = sorted(shots_before_window(), reverse=True,
                    key=lambda shot: fmean(row[i] for row in scores for i in shot))
    order = [i for shot in ranked for i in shot]
    choices = [PromptChoice(order, BUDGET) for _ in range(LAYERS)]
    for t, layer, _, _, got in write(filled(recording, "shotkv"), recording):
        assert got == [choices[layer].write(t)] * HEADS


def test_a_shot_stays_whole_or_goes_whole_but_for_one(recording):
    shots, n_whole = shots_before_window(), []
    for *_, got in write(filled(recording, "shotkv"), recording):
        kept = [[i for i in shot if i in got[0]] for shot in shots]
        cut = [(part, shot) for part, shot in zip(kept, shots) if 0 < len(part) < len(shot)]
        assert len(cut) <= 1
        assert all(part == list(shot[: len(part)]) for part, shot in cut), "its first tokens"
        n_whole.append(sum(len(part) == len(shot) for part, shot in zip(kept, shots)))
    assert 1 < n_whole[0] < len(shots)


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
    best = sorted(older, key=lambda i: -score[i])[: size - WINDOW]
    return sorted(best) + latest


def test_morphkv_asks_its_last_queries_anew_at_every_step(recording):
    held = {}
    for t, layer, q, k, got in write(filled(recording, "morphkv"), recording):
        for head in range(HEADS):
            if t > N_PROMPT:
                cut = morphkv_cut(held[layer, head], q, k, head, BUDGET - 1)
                assert got[head] == [*cut, t]
            held[layer, head] = got[head]


def test_the_first_step_of_morphkv_cuts_the_whole_prompt_at_once(deep_recording):
    cache = filled(deep_recording, "morphkv", config=DEEP)
    for t, _, q, k, got in write(cache, deep_recording, n_new=1):
        for head in range(HEADS):
            cut = morphkv_cut(list(range(N_PROMPT)), q, k, head, BUDGET - 1)
            assert got[head] == [*cut, t]


def test_morphkv_is_always_as_large_as_its_budget(recording):
    cache = filled(recording, "morphkv")
    for t, layer, _, _, got in write(cache, recording):
        assert [len(positions) for positions in got] == [BUDGET] * HEADS
        assert all(positions[-WINDOW:] == list(range(t + 1 - WINDOW, t + 1)) for positions in got)
    assert cost(cache).held == BUDGET


def test_morphkv_drops_nothing_before_its_budget_is_full():
    recording = random_recording(n_tokens=40)
    for t, _, _, _, got in write(filled(recording, "morphkv"), recording, n_new=40):
        if t < BUDGET:
            assert got == [list(range(t + 1))] * HEADS
        else:
            assert [len(positions) for positions in got] == [BUDGET] * HEADS


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


def test_corm_holds_what_one_of_the_last_queries_found_important(recording):
    heads = [[Needed(q, k, head) for head in range(HEADS)] for q, k, _ in recording.qkv]
    sizes = []  # of all heads, one step after the other
    for t, layer, q, k, got in write(filled(recording, "corm", latest=LATEST), recording):
        assert got == [needed.write(q, k, t) for needed in heads[layer]]
        sizes += map(len, got)
        for positions in got:  # with the new one, before what is dropped after it
            assert set(range(t - LATEST, t + 1)) <= set(positions)
    assert sizes[::HEADS] != sizes[1::HEADS], "each head drops its own"
    assert LATEST < min(sizes) and max(sizes[-HEADS * LAYERS :]) < N_PROMPT + N_NEW - 20


def test_corm_drops_nothing_if_all_tokens_are_attended_to_alike(recording):
    silent = recording_of((0 * q, k, v) for q, k, v in recording.qkv)
    cache = filled(silent, "corm", latest=LATEST)
    for t, *_, got in write(cache, silent, query_size=0):
        assert got == [list(range(t + 1))] * HEADS


def test_corm_holds_the_latest_and_the_one_token_that_all_attend_to(recording):
    loud = []
    for q, k, v in recording.qkv:
        q, k = torch.eye(DIM)[0].expand_as(q) * 100, k.clone()
        k[:, 7] = torch.eye(DIM)[0] * 100
        loud.append((q, k, v))
    cache, loud = filled(recording_of(loud), "corm", latest=LATEST), recording_of(loud)
    expected = [[7, *range(N_PROMPT - LATEST, N_PROMPT + 1)]] * HEADS
    assert [got for *_, got in write(cache, loud, n_new=1)] == [expected] * LAYERS


# Cascading KV


class Cascade:
    """A head's sinks, its buffers of positions, and the attention that each token has received."""

    def __init__(self, q, k, head, budget=BUDGET, sinks=4, buffers=4):
        n_prompt = k.shape[1]
        self.head, self.size = head, (budget - sinks) // buffers
        self.sinks, self.buffers, self.step = [], [[] for _ in range(buffers)], 0
        self.total = dict(enumerate(received(q, k, head, range(n_prompt))))
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


@pytest.mark.parametrize("buffers", [2, 4])
def test_cascading_buffers_take_what_falls_out_of_the_one_before(recording, buffers):
    heads = [[Cascade(q, k, head, buffers=buffers) for head in range(HEADS)]
             for q, k, _ in recording.qkv]
    cache = filled(recording, "cascading", buffers=buffers)
    for t, layer, q, k, got in write(cache, recording):
        assert got == [cascade.write(q, k, t) for cascade in heads[layer]]
    assert got[0] != got[1], "each head keeps its own"


@pytest.mark.parametrize("method, settings", [("cascading", {"buffers": 1}), ("streamingllm", {})])
def test_a_cascade_of_one_buffer_is_streamingllm(recording, method, settings):
    for t, *_, got in write(filled(recording, method, **settings), recording):
        assert got == [[0, 1, 2, 3, *range(t + 1 - (BUDGET - 4), t + 1)]] * HEADS


@pytest.mark.parametrize("n_prompt", [30, 50, BUDGET - 1])
def test_cascading_drops_nothing_before_its_budget_is_full(n_prompt):
    recording = random_recording(n_tokens=n_prompt)
    for t, *_, got in write(filled(recording, "cascading"), recording, n_new=BUDGET - n_prompt):
        assert got == [list(range(t + 1))] * HEADS, t

"""Methods that share out a budget unevenly: against plain loops, one head, one token, one block at
a time."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import TINY
from methods.conftest import (BUDGET, DIM, GROUP, HEADS, LAYERS, N_NEW, N_PROMPT, ROOM, WINDOW,
                              assert_keeps, attending, attention, best, dot, filled, make_cache,
                              mean, new_cache, random_qkv, random_recording, read_by, received,
                              recording_of, softmax, window_scores, write)


def uneven_prompt(n_layers, n_tokens):
    """Some queries are louder, and every ninth token attracts the later layers, so that heads and
    layers need unequal budgets. The first tokens are quiet: who keeps them does so on purpose."""
    layers = []
    for layer, (q, k, v) in enumerate(random_recording(n_layers, n_tokens).qkv):
        loudness = [(0.2 + 5 * head % 7 / 4) * (1 + layer) / 2 for head in range(len(q))]
        q[..., 0] += layer
        k[:, 7::9, 0] += layer
        k[:, :4] /= 100
        layers.append((q * torch.tensor(loudness)[:, None, None], k, v))
    return recording_of(layers)


@pytest.fixture(scope="module", params=["model", "random"])
def prompt(request, model):
    return read_by(model) if request.param == "model" else uneven_prompt(4, 181)


def test_pyramid_budgets_shrink_and_add_up():
    cache = make_cache("pyramidkv", replace(TINY, num_hidden_layers=30), 384, [], 1)
    budgets = [cache.layer_budget(layer) for layer in range(30)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] > 2 * budgets[-1]
    assert sum(budgets) == pytest.approx(30 * 384, abs=15)


# AdaKV


def test_adakv_gives_a_head_its_places_among_the_best_of_the_layer(prompt):
    kept = []
    for q, k, _ in prompt.qkv:
        scores = window_scores(q, k)
        ranking = sorted([(-score, head) for head in HEADS for score in scores[head]])
        places = [head for _, head in ranking[: len(HEADS) * ROOM]]
        rooms = [math.floor(Fraction(4, 5) * places.count(head) + Fraction(ROOM, 5))
                 for head in HEADS]
        kept.append([best(scores[head], rooms[head]) for head in HEADS])
    totals = [[len(head) + WINDOW for head in layer] for layer in kept]
    assert len({total for layer in totals for total in layer}) > 2
    assert_keeps(filled("adakv", prompt), prompt, kept, totals)


@pytest.mark.slow
def test_adakv_with_even_budgets_is_snapkv(prompt):
    ours = attending(filled("adakv:evenly=1", prompt), prompt)
    assert list(ours) == list(attending(filled("snapkv", prompt), prompt))


# PrefixKV


def prefix_order(q, k):
    """The layer's tokens before the window, the first 4 and then the best, and for every n the
    share of the layer's attention that n of them have."""
    n_tokens = k.shape[1]
    total = [sum(heads) for heads in zip(*received(q, k, range(n_tokens)))]
    shares = [x / sum(total) for x in total]
    order = sorted(range(n_tokens - WINDOW), key=lambda i: (i >= 4, -shares[i] if i >= 4 else i))
    return order, [sum(shares[i] for i in order[:n]) for n in range(len(order) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [44, BUDGET, 101])
def test_prefixkv_keeps_the_same_share_of_every_layer_s_attention(prompt, budget):
    orders, shares = zip(*[prefix_order(q, k) for q, k, _ in prompt.qkv])
    seen = next(attending(filled("prefixkv", prompt, budget), prompt))
    counts = [len(layer[0]) - WINDOW for layer in seen]
    assert sum(counts) == (budget - WINDOW) * len(prompt.qkv)
    assert len(counts) == LAYERS or len(set(counts)) > 1
    p = min(share[n] for share, n in zip(shares, counts))
    assert all(share[n - 1] < p for share, n in zip(shares, counts)), "one fewer would do"
    kept = [[order[:n]] * len(HEADS) for order, n in zip(orders, counts)]
    totals = [[n + WINDOW] * len(HEADS) for n in counts]
    assert_keeps(filled("prefixkv", prompt, budget), prompt, kept, totals)


def test_prefixkv_keeps_the_first_4_tokens_of_a_layer_that_looks_at_only_one():
    (q, k, v), even = random_qkv(N_PROMPT, 0), random_qkv(N_PROMPT, 1)
    q[..., 0], k[:, 0] = 30, torch.tensor([10.0] + [0] * (DIM - 1))
    recording = recording_of([(q, k, v), (0 * even[0], *even[1:])])
    for seen in attending(filled("prefixkv", recording), recording):
        assert all(head[:4] == [0, 1, 2, 3] for layer in seen for head in layer)


# DBudgetKV


def fewest(q, k, orders):
    """The smallest number of tokens besides the window that the last query does not miss: tried one
    after another."""
    n_earlier = k.shape[1] - WINDOW
    rows = [head[0].tolist() for head in attention(q, k, [k.shape[1] - 1])]
    whole = sum(math.sqrt(sum(x * x for x in row)) for row in rows)
    for n in range(n_earlier + 1):
        length = 0
        for head, row in enumerate(rows):
            kept = [*orders[head // GROUP][:n], *range(n_earlier, k.shape[1])]
            length += math.sqrt(sum(row[i] ** 2 for i in kept))
        if length >= 0.99 * whole:
            return n


def test_dbudgetkv_keeps_the_fewest_tokens_that_the_last_query_does_not_miss(prompt):
    kept, totals = [], []
    for layer, (q, k, _) in enumerate(prompt.qkv):
        orders = [best(scores) for scores in window_scores(q, k, pool=1)]
        n = fewest(q, k, orders)
        assert 0 < n < k.shape[1] - WINDOW
        total = n + WINDOW if layer >= 2 else math.inf  # the first two layers stay whole
        kept.append([order[:n] if layer >= 2 else order for order in orders])
        totals.append([total] * len(HEADS))
    assert_keeps(filled("dbudgetkv", prompt), prompt, kept, totals)


def test_dbudgetkv_never_drops_a_token_of_its_first_two_layers(prompt):
    for step, seen in enumerate(attending(filled("dbudgetkv", prompt), prompt)):
        everything = list(range(prompt.num_tokens + step + 1))
        assert seen[:2] == [[everything] * len(HEADS)] * 2


# KVCompress


@pytest.mark.slow
@pytest.mark.parametrize("budget", [44, BUDGET, 112])  # nothing is left over of the blocks
def test_kvcompress_keeps_the_dearest_blocks_of_all_layers_and_heads(prompt, budget):
    blocks, n_layers = [], len(prompt.qkv)
    for layer, (q, k, _) in enumerate(prompt.qkv):
        for head, scores in enumerate(window_scores(q, k, power=2)):
            ranked = best(scores)
            for start in range(0, len(ranked), 16):
                blocks.append((scores[ranked[start]], layer, head, ranked[start : start + 16]))
    blocks.sort(key=lambda block: -block[0])
    kept = [[[] for _ in HEADS] for _ in range(n_layers)]
    totals = [[WINDOW for _ in HEADS] for _ in range(n_layers)]
    for _, layer, head, block in blocks[: (budget - WINDOW) * n_layers * len(HEADS) // 16]:
        kept[layer][head] += block
        totals[layer][head] += 16
    assert len({total for layer in totals for total in layer}) > 1
    assert_keeps(filled("kvcompress", prompt, budget), prompt, kept, totals)


# DuoHeads


def turn(x, position):
    """RoPE, one pair of channels at a time."""
    half, turned = len(x) // 2, list(x)
    for i in range(half):
        angle = position * 10000 ** (-i / half)
        a, b = x[i], x[i + half]
        turned[i] = a * math.cos(angle) - b * math.sin(angle)
        turned[i + half] = b * math.cos(angle) + a * math.sin(angle)
    return turned


def mean_before_rope(rows):
    return mean([turn(row, -position) for position, row in enumerate(rows.tolist())])


def looks_back(q, k, head):
    """How far a KV head's mean query looks back over 500 of its mean keys, the mean of the group:
    1 is the first of them, 1/500 the last."""
    key, looks = mean_before_rope(k[head]), []
    keys = [turn(key, position) for position in range(500)]
    for one in q[head * GROUP : head * GROUP + GROUP]:
        query = turn(mean_before_rope(one), 499)
        weights = softmax([dot(query, x) / math.sqrt(len(query)) for x in keys])
        looks.append(sum(w * (500 - i) / 500 for i, w in enumerate(weights)))
    return sum(looks) / GROUP


@pytest.mark.parametrize("n_prompt", [N_PROMPT, 600])
def test_duo_heads_look_as_far_back_as_their_mean_query_does_at_mean_keys(n_prompt):
    q, k, v = random_qkv(n_prompt, 5)
    q, k = q + q[:, :1], k + k[:, :1]
    got = new_cache("duo_heads", recording_of([(q, k, v)])).look_back(q, k)
    expected = torch.tensor([looks_back(q, k, head) for head in HEADS])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def steady(n_heads, loudness, channel):
    """The same vector at every position, before RoPE: loud in one channel."""
    x = [0.0] * DIM
    x[channel] = loudness
    return torch.tensor([[turn(x, i) for i in range(N_PROMPT)]] * n_heads)


def layer_looking(*heads):
    """q, k, v of KV heads that each look `evenly`, at the `latest` or at the `first` tokens."""
    # Channel 2 turns once in 628 positions. Channel 3 turns by half a radian in 500.
    queries = {"evenly": (0, 2), "latest": (100, 2), "first": (-1000, 3)}
    q = torch.cat([steady(GROUP, *queries[look]) for look in heads])
    k = torch.cat([steady(1, 1, queries[look][1]) for look in heads])
    return q, k, random_qkv(N_PROMPT, 7)[2]


def test_duo_heads_know_a_head_that_looks_everywhere_from_one_that_looks_at_the_latest(recording):
    cache = new_cache("duo_heads", recording)
    evenly, latest = cache.look_back(*layer_looking("evenly", "latest")[:2]).tolist()
    first, _ = cache.look_back(*layer_looking("first", "latest")[:2]).tolist()
    assert evenly == pytest.approx(0.501) and latest < 0.05 and first > 0.95


def test_duo_heads_keep_everything_where_a_head_looks_far_back():
    recording = recording_of([layer_looking("evenly", "latest"), layer_looking("latest", "first")])
    # Two whole heads and two of 36 tokens are 4 * 93. At 94 each gets one more.
    seen = next(attending(filled("duo_heads", recording, 94), recording))
    whole, few = list(range(N_PROMPT + 1)), [0, 1, 2, 3, *range(N_PROMPT + 1 - 33, N_PROMPT + 1)]
    assert seen == [[whole, few], [few, whole]]
    seen = next(attending(filled("duo_heads", recording, 92), recording))
    assert [[len(head) < N_PROMPT for head in layer] for layer in seen] == [[1, 1], [1, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("budget", [BUDGET, 93, 131])
def test_duo_heads_are_as_many_whole_heads_as_fit(prompt, budget):
    """4 sinks and the latest tokens in the others. What is left over goes to all alike."""
    n_prompt, heads = prompt.num_tokens, len(prompt.qkv) * len(HEADS)
    looks = [looks_back(q, k, head) for q, k, _ in prompt.qkv for head in HEADS]
    totals = [36] * heads
    for i in best(looks):
        if sum(totals) - 36 + n_prompt > budget * heads:
            break
        totals[i] = n_prompt
    left = (budget * heads - sum(totals)) // heads
    totals = [total + left for total in totals]
    kept = [[*range(4), *range(n_prompt - WINDOW - 1, max(3, n_prompt - total + 3), -1)]
            for total in totals]
    kept, totals = ([x[i : i + len(HEADS)] for i in range(0, heads, len(HEADS))]
                    for x in (kept, totals))
    assert_keeps(filled("duo_heads", prompt, budget), prompt, kept, totals, least=4)


def test_duo_heads_with_a_budget_for_everything_are_full_attention(model, recording):
    answers = [write(model, filled(method, recording, N_PROMPT + N_NEW), N_NEW)
               for method in ("full", "duo_heads")]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adakv", "prefixkv", "kvcompress", "duo_heads"])
@pytest.mark.parametrize("budget", [40, 57, BUDGET, 101])
def test_unequal_heads_together_never_hold_more_than_equal_ones(prompt, method, budget):
    for seen in attending(filled(method, prompt, budget), prompt):
        held = [len(head) for layer in seen for head in layer]
        assert sum(held) <= budget * len(held)

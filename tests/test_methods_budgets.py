"""Methods that share out a budget unevenly, or keep less of a key, against plain loops: one head,
one token, one block at a time. What a head keeps of the prompt besides its last 32 tokens is a list
of positions, the most important first."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from conftest import TINY, random_ids, random_llama

from benchmarks.methods import cost, make_cache, settings_of
from benchmarks.methods.base import Recording

pytestmark = pytest.mark.slow
BUDGET, N_PROMPT, N_NEW, WINDOW = 72, 150, 60, 32
ROOM = BUDGET - WINDOW
N_HEADS, HEADS = TINY.num_attention_heads, range(TINY.num_key_value_heads)
GROUP = N_HEADS // len(HEADS)
FOUR_LAYERS = replace(TINY, num_hidden_layers=4)
TEN_CHANNELS = replace(TINY, head_dim=10)  # 60 % of them are a whole number


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module", params=["model", "random"])
def prompt(request, model):
    """(config, recording)"""
    if request.param == "random":
        return FOUR_LAYERS, random_prompt(FOUR_LAYERS, 181)
    return TINY, read_by(model)


def read_by(model):
    recording = Recording()
    model.prefill(random_ids(N_PROMPT, "cpu"), recording)
    return recording


def recording_of(layers):
    recording = Recording()
    for layer, (q, k, v) in enumerate(layers):
        recording.prefill(layer, q, k, v)
    recording.advance(layers[0][0].shape[1])
    return recording


def random_qkv(config, n_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
    return [torch.randn(n, n_tokens, config.head_dim, generator=generator) for n in heads]


def random_prompt(config, n_tokens):
    """Some queries are louder, and every ninth token attracts the later layers, so that heads and
    layers need unequal budgets. The first tokens are quiet: who keeps them does so on purpose."""
    layers = []
    for layer in range(config.num_hidden_layers):
        q, k, v = random_qkv(config, n_tokens, 1000 + layer)
        loudness = [(0.2 + 5 * head % 7 / 4) * (1 + layer) / 2 for head in range(N_HEADS)]
        q[..., 0] += layer
        k[:, 7::9, 0] += layer
        k[:, :4] /= 100
        layers.append((q * torch.tensor(loudness)[:, None, None], k, v))
    return recording_of(layers)


def filled(spec, config, recording, budget=BUDGET):
    """The method's cache after the prompt."""
    method, spans = spec.partition(":")[0], [(0, recording.num_tokens)]
    cache = make_cache(method, config, budget, spans, N_NEW, **settings_of(spec))
    return recording.replay(cache)


def writing(cache, recording, config=TINY, found_by=1):
    """After each new token, the positions that every head of every layer attends to, found by their
    keys, or by their values (2)."""
    layers = recording.qkv
    known = [[{tuple(row): i for i, row in enumerate(layer[found_by][head].tolist())}
              for head in HEADS] for layer in layers]
    for step in range(N_NEW):
        seen = []
        for layer in range(len(layers)):
            token = random_qkv(config, 1, 100 * step + layer)
            *rows, mask = cache.decode(layer, *token)
            for head in HEADS:
                known[layer][head][tuple(token[found_by][head, 0].tolist())] = (
                    recording.num_tokens + step)
            seen.append([positions(known[layer][head], rows[found_by - 1][head],
                                   None if mask is None else mask[head, 0]) for head in HEADS])
        cache.advance(1)
        yield seen


def positions(known, rows, mask):
    rows = rows if mask is None else rows[mask]
    return sorted(known[tuple(row)] for row in rows.tolist())


def expected_writing(kept, total, n_prompt, least=None, size=1):
    """As `writing`, of one head: a new token takes the place of the least important that is kept,
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


def assert_keeps(cache, config, recording, kept, totals, **settings):
    """`kept` and `totals` of each layer and head. At every token that is written."""
    expected = [[expected_writing(*head, recording.num_tokens, **settings) for head in zip(*layer)]
                for layer in zip(kept, totals)]
    for seen in writing(cache, recording, config):
        assert seen == [[next(head) for head in layer] for layer in expected]


def attention(q, k, queries):
    """What each head's queries pay to every token, one query at a time. (H, queries, T)"""
    rows = torch.zeros(len(q), len(queries), k.shape[1], dtype=torch.float64)
    for head in range(len(q)):
        for row, i in enumerate(queries):
            logits = k[head // GROUP, : i + 1].double() @ q[head, i].double()
            rows[head, row, : i + 1] = (logits / math.sqrt(q.shape[-1])).softmax(0)
    return rows


def window_scores(q, k, power=1, pool=7):
    """Of each KV head and each token before the window: the sum of its group's attention to a
    power, the largest of the neighbours."""
    n_tokens, scores = k.shape[1], []
    rows = attention(q, k, range(n_tokens - WINDOW, n_tokens)) ** power
    for head in HEADS:
        received = sum(rows[i].sum(0) for i in range(head * GROUP, head * GROUP + GROUP))
        received = received[: n_tokens - WINDOW].tolist()
        scores.append([max(received[max(0, i - pool // 2) : i + pool // 2 + 1])
                       for i in range(len(received))])
    return scores


def best(scores):
    """All positions, the best first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def test_adakv_gives_a_head_its_places_among_the_best_of_the_layer(prompt):
    config, recording = prompt
    kept = []
    for q, k, _ in recording.qkv:
        scores = window_scores(q, k)
        ranking = sorted([(-score, head) for head in HEADS for score in scores[head]])
        places = [head for _, head in ranking[: len(HEADS) * ROOM]]
        rooms = [math.floor(Fraction(4, 5) * places.count(head) + Fraction(ROOM, 5))
                 for head in HEADS]
        kept.append([best(scores[head])[: rooms[head]] for head in HEADS])
    totals = [[len(head) + WINDOW for head in layer] for layer in kept]
    assert len({total for layer in totals for total in layer}) > 2
    assert_keeps(filled("adakv", config, recording), config, recording, kept, totals)


def test_adakv_with_even_budgets_is_snapkv(prompt):
    config, recording = prompt
    ours = writing(filled("adakv:evenly=1", config, recording), recording)
    theirs = writing(filled("snapkv", config, recording), recording)
    assert list(ours) == list(theirs)


def prefix_order(q, k):
    """The layer's tokens before the window, the first 4 and then the best, and for every n the
    share of the layer's attention that n of them have."""
    n_tokens = k.shape[1]
    received = sum(row for head in attention(q, k, range(n_tokens)) for row in head)
    shares = (received / received.sum()).tolist()
    order = sorted(range(n_tokens - WINDOW), key=lambda i: (i >= 4, -shares[i] if i >= 4 else i))
    return order, [sum(shares[i] for i in order[:n]) for n in range(len(order) + 1)]


@pytest.mark.parametrize("budget", [44, BUDGET, 101])
def test_prefixkv_keeps_the_same_share_of_every_layer_s_attention(prompt, budget):
    config, recording = prompt
    orders, shares = zip(*[prefix_order(q, k) for q, k, _ in recording.qkv])
    seen = next(writing(filled("prefixkv", config, recording, budget), recording))
    counts = [len(layer[0]) - WINDOW for layer in seen]
    assert sum(counts) == (budget - WINDOW) * config.num_hidden_layers
    assert config == TINY or len(set(counts)) > 1
    p = min(share[n] for share, n in zip(shares, counts))
    assert all(share[n - 1] < p for share, n in zip(shares, counts)), "one fewer would do"
    kept = [[order[:n]] * len(HEADS) for order, n in zip(orders, counts)]
    totals = [[n + WINDOW] * len(HEADS) for n in counts]
    cache = filled("prefixkv", config, recording, budget)
    assert_keeps(cache, config, recording, kept, totals)


def test_prefixkv_keeps_the_first_4_tokens_of_a_layer_that_looks_at_only_one():
    (q, k, v), even = random_qkv(TINY, N_PROMPT, 0), random_qkv(TINY, N_PROMPT, 1)
    q[..., 0], k[:, 0] = 30, torch.tensor([10.0] + [0] * (TINY.head_dim - 1))
    recording = recording_of([(q, k, v), (0 * even[0], *even[1:])])
    for seen in writing(filled("prefixkv", TINY, recording), recording):
        assert all(head[:4] == [0, 1, 2, 3] for layer in seen for head in layer)


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
    config, recording = prompt
    kept, totals = [], []
    for layer, (q, k, _) in enumerate(recording.qkv):
        orders = [best(scores) for scores in window_scores(q, k, pool=1)]
        n = fewest(q, k, orders)
        assert 0 < n < k.shape[1] - WINDOW
        total = n + WINDOW if layer >= 2 else math.inf  # the first two layers stay whole
        kept.append([order[:n] if layer >= 2 else order for order in orders])
        totals.append([total] * len(HEADS))
    assert_keeps(filled("dbudgetkv", config, recording), config, recording, kept, totals)


def test_dbudgetkv_never_drops_a_token_of_its_first_two_layers(prompt):
    config, recording = prompt
    for step, seen in enumerate(writing(filled("dbudgetkv", config, recording), recording)):
        everything = list(range(recording.num_tokens + step + 1))
        assert seen[:2] == [[everything] * len(HEADS)] * 2


@pytest.mark.parametrize("budget", [44, BUDGET, 112])  # nothing is left over of the blocks
def test_kvcompress_keeps_the_dearest_blocks_of_all_layers_and_heads(prompt, budget):
    config, recording = prompt
    blocks, n_layers = [], config.num_hidden_layers
    for layer, (q, k, _) in enumerate(recording.qkv):
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
    cache = filled("kvcompress", config, recording, budget)
    assert_keeps(cache, config, recording, kept, totals)


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
    unturned = [turn(row, -position) for position, row in enumerate(rows.tolist())]
    return [sum(channel) / len(rows) for channel in zip(*unturned)]


def looks_back(q, k, head):
    """How far a KV head's mean query looks back over 500 of its mean keys, the mean of the group:
    1 is the first of them, 1/500 the last."""
    key, looks = mean_before_rope(k[head]), []
    keys = [turn(key, position) for position in range(500)]
    for one in q[head * GROUP : head * GROUP + GROUP]:
        query = turn(mean_before_rope(one), 499)
        logits = [sum(a * b for a, b in zip(query, x)) / math.sqrt(len(query)) for x in keys]
        weights = [math.exp(logit) for logit in logits]
        looks.append(sum(w * (500 - i) / 500 for i, w in enumerate(weights)) / sum(weights))
    return sum(looks) / GROUP


@pytest.mark.parametrize("n_prompt", [N_PROMPT, 600])
def test_duo_heads_look_as_far_back_as_their_mean_query_does_at_mean_keys(n_prompt):
    q, k, _ = random_qkv(TINY, n_prompt, 5)
    q, k = q + q[:, :1], k + k[:, :1]
    got = make_cache("duo_heads", TINY, BUDGET, [], N_NEW).look_back(q, k)
    expected = torch.tensor([looks_back(q, k, head) for head in HEADS])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def steady(n_heads, loudness, channel, n_tokens=N_PROMPT):
    """The same vector at every position, before RoPE: loud in one channel."""
    x = [0.0] * TINY.head_dim
    x[channel] = loudness
    return torch.tensor([[turn(x, i) for i in range(n_tokens)]] * n_heads)


def layer_looking(*heads):
    """q, k, v of KV heads that each look `evenly`, at the `latest` or at the `first` tokens."""
    # Channel 2 turns once in 628 positions. Channel 3 turns by half a radian in 500.
    queries = {"evenly": (0, 2), "latest": (100, 2), "first": (-1000, 3)}
    q = torch.cat([steady(GROUP, *queries[look]) for look in heads])
    k = torch.cat([steady(1, 1, queries[look][1]) for look in heads])
    return q, k, random_qkv(TINY, N_PROMPT, 7)[2]


def test_duo_heads_know_a_head_that_looks_everywhere_from_one_that_looks_at_the_latest():
    cache = make_cache("duo_heads", TINY, BUDGET, [], N_NEW)
    evenly, latest = cache.look_back(*layer_looking("evenly", "latest")[:2]).tolist()
    first, _ = cache.look_back(*layer_looking("first", "latest")[:2]).tolist()
    assert evenly == pytest.approx(0.501) and latest < 0.05 and first > 0.95


def test_duo_heads_keep_everything_where_a_head_looks_far_back():
    recording = recording_of([layer_looking("evenly", "latest"), layer_looking("latest", "first")])
    # Two whole heads and two of 36 tokens are 4 * 93. At 94 each gets one more.
    seen = next(writing(filled("duo_heads", TINY, recording, budget=94), recording))
    whole, few = list(range(N_PROMPT + 1)), [0, 1, 2, 3, *range(N_PROMPT + 1 - 33, N_PROMPT + 1)]
    assert seen == [[whole, few], [few, whole]]
    seen = next(writing(filled("duo_heads", TINY, recording, budget=92), recording))
    assert [[len(head) < N_PROMPT for head in layer] for layer in seen] == [[1, 1], [1, 0]]


@pytest.mark.parametrize("budget", [BUDGET, 93, 131])
def test_duo_heads_are_as_many_whole_heads_as_fit(prompt, budget):
    """4 sinks and the latest tokens in the others. What is left over goes to all alike."""
    config, recording = prompt
    n_prompt, heads = recording.num_tokens, config.num_hidden_layers * len(HEADS)
    looks = [looks_back(q, k, head) for q, k, _ in recording.qkv for head in HEADS]
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
    cache = filled("duo_heads", config, recording, budget)
    assert_keeps(cache, config, recording, kept, totals, least=4)


def test_duo_heads_with_a_budget_for_everything_are_full_attention(model):
    recording, answers = read_by(model), []
    for method in ("full", "duo_heads"):
        cache = filled(method, TINY, recording, budget=N_PROMPT + N_NEW)
        answers.append(torch.cat([model.decode(token[None], cache)
                                  for token in random_ids(N_NEW, "cpu")]))
    torch.testing.assert_close(*answers, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["adakv", "prefixkv", "kvcompress", "duo_heads"])
@pytest.mark.parametrize("budget", [40, 57, BUDGET, 101])
def test_unequal_heads_together_never_hold_more_than_equal_ones(prompt, method, budget):
    config, recording = prompt
    for seen in writing(filled(method, config, recording, budget), recording):
        held = [len(head) for layer in seen for head in layer]
        assert sum(held) <= budget * len(held)


def kept_channels(q, k):
    """Of each KV head the 60 % that its last queries and its keys are loudest in."""
    channels, n_tokens = [], k.shape[1]
    for head in HEADS:
        scores = []
        for channel in range(k.shape[-1]):
            queries = [q[one, i, channel] ** 2 for one in range(head * GROUP, head * GROUP + GROUP)
                       for i in range(n_tokens - WINDOW, n_tokens)]
            keys = [k[head, i, channel] ** 2 for i in range(n_tokens)]
            scores.append(sum(queries) / len(queries) * sum(keys) / len(keys))
        channels.append(best(scores)[: round(0.6 * k.shape[-1])])
    return channels


@pytest.mark.parametrize("config", [TINY, TEN_CHANNELS], ids=["8 channels", "10 channels"])
def test_think_multiplies_the_kept_channels_of_all_but_the_latest(config):
    recording = random_prompt(config, N_PROMPT)
    cache = filled("think", config, recording)
    for layer, (old_q, old_k, old_v) in enumerate(recording.qkv):
        channels, (q, k, v) = kept_channels(old_q, old_k), random_qkv(config, 1, layer)
        keys, values, _ = cache.decode(layer, q, k, v)  # all heads hold as many: there is no mask
        for head in HEADS:
            whole, known = torch.cat((old_k, k), dim=1)[head], torch.cat((old_v, v), dim=1)[head]
            for key, value in zip(keys[head], values[head].tolist()):
                at = known.tolist().index(value)
                used = channels[head] if at < N_PROMPT - WINDOW else range(config.head_dim)
                for query in q[head * GROUP : head * GROUP + GROUP, 0]:
                    expected = sum(query[channel] * whole[at, channel] for channel in used)
                    torch.testing.assert_close(query @ key, expected, rtol=1e-4, atol=1e-5)


def test_think_keeps_as_many_tokens_as_fit_in_fewer_bytes():
    recording = random_prompt(TEN_CHANNELS, N_PROMPT)
    cache = filled("think", TEN_CHANNELS, recording)
    size = Fraction(4, 5)  # all channels of the value, and 60 % of the key's
    kept = [[best(scores)[: math.floor(ROOM / size)] for scores in window_scores(q, k)]
            for q, k, _ in recording.qkv]
    expected = [[expected_writing(head, BUDGET, N_PROMPT, size=size) for head in layer]
                for layer in kept]
    for seen in writing(cache, recording, TEN_CHANNELS, found_by=2):
        assert seen == [[next(head) for head in layer] for layer in expected]


# Not of 8 channels: 60 % of them are rounded up to 5, and a kept token takes 81 % of the bytes.
@pytest.mark.parametrize("channels", [10, 64])
@pytest.mark.parametrize("budget", [40, 57, BUDGET, 101])
def test_think_never_holds_more_bytes_than_its_budget(channels, budget):
    config = replace(TINY, head_dim=channels)
    recording = random_prompt(config, N_PROMPT)
    cache = filled("think", config, recording, budget)
    kept = round(0.6 * channels) + channels  # numbers of a token that is not one of the latest
    for seen in writing(cache, recording, config, found_by=2):
        heads = [head for layer in seen for head in layer]
        numbers = sum(kept if i < N_PROMPT - WINDOW else 2 * channels
                      for head in heads for i in head)
        assert numbers / (2 * channels * len(heads)) <= cost(cache).held + 1e-4
        assert cost(cache).held <= budget

"""Methods that choose what to read for every token, against plain loops: one head, one page or
cluster, one token at a time. What a head attends to is a list of positions, found by their keys."""

import math

import pytest
import torch
from conftest import TINY, random_ids, random_llama

from benchmarks.methods import cost, make_cache, settings_of
from benchmarks.methods.base import Cost, Recording
from benchmarks.methods.retrieve import k_means

pytestmark = pytest.mark.slow
N_PROMPT, N_NEW, PAGE = 300, 70, 32
LAYERS, HEADS, DIM = TINY.num_hidden_layers, range(TINY.num_key_value_heads), TINY.head_dim
GROUP = TINY.num_attention_heads // len(HEADS)
BUDGET = 7 * PAGE


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module", params=["model", "random"])
def recording(request, model):
    if request.param == "random":
        return recording_of([random_qkv(N_PROMPT, 10_000 + layer) for layer in range(LAYERS)])
    recording = Recording()
    model.prefill(random_ids(N_PROMPT, "cpu"), recording)
    return recording


def random_qkv(n_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    heads = GROUP * len(HEADS), len(HEADS), len(HEADS)
    return [torch.randn(n, n_tokens, DIM, generator=generator) for n in heads]


def recording_of(layers):
    recording = Recording()
    for layer, tensors in enumerate(layers):
        recording.prefill(layer, *tensors)
    recording.advance(layers[0][0].shape[1])
    return recording


def filled(method, recording, budget=BUDGET, **settings):
    """The method's cache after the prompt."""
    spans, settings = [(0, recording.num_tokens)], settings_of(method) | settings
    return recording.replay(make_cache(method, TINY, budget, spans, N_NEW, **settings))


def with_token(layers, step):
    """The queries, keys and values of each layer, and those of one more token."""
    tokens = [random_qkv(1, LAYERS * step + layer) for layer in range(len(layers))]
    return tokens, [[torch.cat(pair, dim=1) for pair in zip(*both)] for both in zip(layers, tokens)]


def writing(cache, recording, n_new=N_NEW):
    """After each new token, of each layer: all queries and keys, and what is attended to."""
    layers = recording.qkv
    for step in range(n_new):
        tokens, layers = with_token(layers, step)
        seen = [cache.decode(layer, *token) for layer, token in enumerate(tokens)]
        cache.advance(1)
        yield [(q, k, attended) for (q, k, _), attended in zip(layers, seen)]


def positions(k, attended, head):
    """Where the head attends to, each position as often as it does."""
    rows, _, mask = attended
    rows = rows[head] if mask is None else rows[head][mask[head, 0] == 0]
    known = {tuple(row): i for i, row in enumerate(k[head].tolist())}
    return sorted(known[tuple(row)] for row in rows.tolist())


def assert_reads(cache, recording, expected):
    """At every token that is written. expected(q, k, layer, head) are positions."""
    for seen in writing(cache, recording):
        for layer, (q, k, attended) in enumerate(seen):
            for head in HEADS:
                assert positions(k, attended, head) == sorted(expected(q, k, layer, head))


def queries_of(q, head, i=-1):
    """Token i's queries in the group, lists of numbers."""
    return q[GROUP * head : GROUP * head + GROUP, i].tolist()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows)]


def unit(row):
    length = math.sqrt(dot(row, row))
    return [x / length for x in row] if length else row


def softmax(scores):
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def best(scores):
    """All indices, the best first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def blocks_of(pages):
    return [i for page in pages for i in range(PAGE * page, PAGE * page + PAGE)]


# ArkVale


def cuboid_mean(q, rows):
    """The most that q · k is for keys not farther from the middle than the mean of these keys."""
    bound = 0
    for a, channel in zip(q, zip(*rows)):
        middle = (min(channel) + max(channel)) / 2
        radius = sum(abs(x - middle) for x in channel) / len(channel)
        bound += max(a * (middle + radius), a * (middle - radius))
    return bound


def arkvale(q, k, head):
    rows, n_full = k[head].tolist(), (k.shape[1] - 1) // PAGE
    always = [0, 1, n_full - 2, n_full - 1]
    bounds = [sum(cuboid_mean(one, rows[PAGE * page : PAGE * page + PAGE])
                  for one in queries_of(q, head)) for page in range(n_full)]
    others = [page for page in best(bounds) if page not in always]
    last = list(range(PAGE * n_full, k.shape[1]))
    room = (BUDGET - len(last)) // PAGE
    assert len(always) < room < n_full, "the bounds decide"
    return blocks_of([*always, *others[: room - len(always)]]) + last


def test_arkvale_reads_the_first_pages_the_latest_and_those_with_the_highest_bounds(recording):
    cache = filled("arkvale", recording)
    assert_reads(cache, recording, lambda q, k, layer, head: arkvale(q, k, head))


def bounds_of(method, keys, q):
    """The method's score of a page with these keys, for one query in all heads."""
    keys = torch.tensor(keys).expand(len(HEADS), -1, -1)
    prompt = [(torch.zeros(GROUP * len(HEADS), PAGE, DIM), keys, keys)] * LAYERS
    ends = {"first_pages": 0, "last_pages": 0} if method == "arkvale" else {}
    cache = filled(method, recording_of(prompt), page=PAGE, **ends)
    scores = cache.scores(0, torch.tensor(q).expand(len(HEADS), GROUP, -1))
    assert scores.shape == (len(HEADS), 1) and len(scores.unique()) == 1
    return scores[0, 0].item()


def test_arkvale_s_bound_is_quest_s_where_all_keys_are_on_the_edge():
    low, high = [-3.0, -2, -1, 0, 1, 2, 3, 4], [-1.0, 2, 0, 0, 5, 3, 4, 8]
    keys = [low, high] * (PAGE // 2)
    q = [1.0, -1, 2, 5, -1, 1, 0, 0.5]
    by_hand = -1 + 2 + 0 + 0 - 1 + 3 + 0 + 4
    assert bounds_of("arkvale", keys, q) == bounds_of("quest", keys, q) == by_hand


def test_a_key_may_match_better_than_arkvale_s_bound():
    one = [1.0] + [0.0] * (DIM - 1)
    keys = [one, [-x for x in one], *[[0.0] * DIM] * (PAGE - 2)]
    assert dot(one, keys[0]) == bounds_of("quest", keys, one) == 1
    assert bounds_of("arkvale", keys, one) == 2 / PAGE


@pytest.mark.parametrize("method", ["arkvale_dense", "clusterkv_dense"])
def test_the_first_two_layers_may_be_whole(recording, method):
    for step, seen in enumerate(writing(filled(method, recording), recording)):
        for _, k, attended in seen:
            for head in HEADS:
                assert positions(k, attended, head) == [*range(N_PROMPT + 1 + step)]


# ActQKV


def representative(q, keys):
    """Of a block with these queries, a mean of the group each."""
    match = [dot(key, mean(q)) for key in keys]
    return mean([keys[i] for i in best(match)[:4]])


def probe(q):
    """The last 32 queries, weighted by how far they are from all before the newest."""
    middle = mean(q[:-1])
    variance = mean([[(x - m) ** 2 for x, m in zip(row, middle)] for row in q[:-1]])
    least = sum(variance) / DIM / 100
    weights = [sum((x - m) ** 2 / (s + least) for x, m, s in zip(row, middle, variance)) / DIM
               for row in q[-PAGE:]]
    return [dot(weights, column) / sum(weights) for column in zip(*q[-PAGE:])]


def group_means(q, head):
    return [mean(queries_of(q, head, i)) for i in range(q.shape[1])]


def cosines(k, head, queries, asked):
    """Of each full block with what is asked for."""
    rows, scores = k[head].tolist(), []
    for start in range(0, (k.shape[1] - 1) // PAGE * PAGE, PAGE):
        block = slice(start, start + PAGE)
        known_by = representative(queries[block], rows[block])
        scores.append(dot(unit(asked), unit(known_by)))
    return scores


def entropy(scores):
    return -sum(share * math.log(share) for share in softmax(scores)) / math.log(len(scores))


def actqkv_layer(q, k, attended, asked=probe):
    """The number of full blocks that are read, which are the first and the best, and the mean
    entropy of the heads."""
    n_full, entropies = (k.shape[1] - 1) // PAGE, []
    last = list(range(PAGE * n_full, k.shape[1]))
    for head in HEADS:
        queries = group_means(q, head)
        scores = cosines(k, head, queries, asked(queries))
        entropies.append(entropy(scores))
        ranked = [0, *[page for page in best(scores) if page != 0]]
        read = positions(k, attended, head)
        n_read, left = divmod(len(read) - len(last), PAGE)
        assert left == 0 and read == sorted(blocks_of(ranked[:n_read]) + last)
    return n_read, sum(entropies) / len(HEADS)


def test_actqkv_reads_the_blocks_that_match_the_queries_that_stand_out(recording):
    """The layers that come later know only their entropies of earlier tokens. Of the first token
    they know none yet: `test_actqkv_reads_no_more_than_its_budget`."""
    entropies = [[] for _ in range(LAYERS)]
    for step, seen in enumerate(writing(filled("actqkv", recording), recording)):
        for layer, (q, k, attended) in enumerate(seen):
            n_read, new = actqkv_layer(q, k, attended)
            entropies[layer].append(new)
            if step > 0 or layer == LAYERS - 1:
                means = [sum(values) / len(values) for values in entropies]
                shared = (BUDGET // PAGE - 2) * LAYERS * means[layer] / sum(means)
                assert n_read == 1 + math.floor(shared)


def test_actqkv_reads_no_more_than_its_budget(recording):
    """At any token, the mean of the layers."""
    for seen in writing(filled("actqkv", recording), recording):
        n_read = [attended[0].shape[1] for _, _, attended in seen]
        assert sum(n_read) <= LAYERS * BUDGET


def test_actqkv_s_layers_share_blocks_by_their_entropy(recording):
    cache = filled("actqkv", recording, budget=6 * PAGE)
    cache.entropy = [(3.0, 4), (0.5, 2)]  # means of 3/4 and 1/4, for 8 blocks
    assert [cache.layer_budget(layer) for layer in range(LAYERS)] == [8 * PAGE, 4 * PAGE]


def recording_asking(recording, queries):
    """The same keys and values with other queries."""
    return recording_of([(queries.expand(GROUP * len(HEADS), -1, -1), k, v)
                         for _, k, v in recording.qkv])


def first_token(cache, recording, query):
    """Of each layer, as `writing`."""
    tokens = [(query.expand(GROUP * len(HEADS), 1, -1), *random_qkv(1, layer)[1:])
              for layer in range(LAYERS)]
    for layer, (token, earlier) in enumerate(zip(tokens, recording.qkv)):
        q, k, _ = [torch.cat(pair, dim=1) for pair in zip(earlier, token)]
        yield q, k, cache.decode(layer, *token)


def assert_asks_the_mean(recording, query):
    for q, k, attended in first_token(filled("actqkv", recording), recording, query):
        assert torch.stack(attended[:2]).isfinite().all()
        actqkv_layer(q, k, attended, asked=lambda queries: mean(queries[-PAGE:]))


def test_actqkv_weighs_queries_alike_that_stand_out_alike(recording):
    middle, away = torch.arange(1.0, DIM + 1), torch.tensor([1.0, -2, 3, -1, 2, -3, 1, 2])
    queries = torch.stack([middle + away, middle - away] * (N_PROMPT // 2))
    assert_asks_the_mean(recording_asking(recording, queries), middle + away)


@pytest.mark.parametrize("value", [1.0, 0.3])
def test_actqkv_weighs_constant_queries_alike(recording, value):
    """0.3 is not exact, so that the variance may be a little less than 0."""
    query = torch.arange(1.0, DIM + 1) * value
    assert_asks_the_mean(recording_asking(recording, query.expand(N_PROMPT, -1)), query)


# ClusterKV


def slow_k_means(keys, n_clusters, steps, centred):
    """The cluster of each key. An empty one's centroid is 0."""
    middle = mean(keys) if centred else [0] * DIM
    points = [unit([x - m for x, m in zip(key, middle)]) for key in keys]
    centroids = [points[i * len(points) // n_clusters] for i in range(n_clusters)]
    for _ in range(steps):
        clusters = [max(range(n_clusters), key=lambda c: dot(point, centroids[c]))
                    for point in points]
        sums = [[0] * DIM for _ in range(n_clusters)]
        for point, cluster in zip(points, clusters):
            sums[cluster] = [x + y for x, y in zip(sums[cluster], point)]
        centroids = [unit(row) for row in sums]
    return clusters


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n_clusters, steps", [(4, 20), (17, 10), (60, 1), (60, 10)])
def test_k_means_assigns_each_key_to_the_centroid_of_highest_cosine(
        recording, n_clusters, steps, centred):
    k = recording.qkv[1][1]
    got = k_means(k, 4, 270, n_clusters, steps, centred)
    for head in HEADS:
        expected = slow_k_means(k[head, 4:270].tolist(), n_clusters, steps, centred)
        assert got[head].tolist() == expected


def test_k_means_leaves_a_cluster_empty_that_has_no_keys_of_its_own():
    keys = torch.eye(DIM)[torch.tensor([0, 1, 0, 1, 2, 2])].expand(len(HEADS), -1, -1)
    for steps in (1, 5):
        assert k_means(keys, 0, 6, 3, steps, False)[0].tolist() == [0, 0, 0, 0, 2, 2]


def clusters_of(recording, per_cluster, steps, local, centred):
    """The positions of each cluster of the prompt, for every layer and head."""
    last = N_PROMPT - local
    n_clusters = math.ceil((last - 4) / per_cluster)
    clusters = {}
    for layer, (_, k, _) in enumerate(recording.qkv):
        for head in HEADS:
            found = slow_k_means(k[head, 4:last].tolist(), n_clusters, steps, centred)
            clusters[layer, head] = [[i + 4 for i, c in enumerate(found) if c == cluster]
                                     for cluster in range(n_clusters)]
    return clusters


def with_written(clusters, n_tokens, local):
    """The clusters and those of 32 written tokens each, and where the others begin, before the
    newest token of so many."""
    begin = N_PROMPT - local
    while n_tokens - 1 - begin >= local + 32:
        clusters, begin = [*clusters, list(range(begin, begin + 32))], begin + 32
    return clusters, begin


def clusterkv(q, k, head, clusters, budget):
    clusters, begin = with_written(clusters, k.shape[1], local=0)
    rows, scores = k[head].tolist(), []
    for cluster in clusters:
        centroid = mean([rows[i] for i in cluster])
        scores.append(sum(dot(one, centroid) for one in queries_of(q, head)) / GROUP)
    always = [*range(4), *range(begin, k.shape[1])]
    ranked = [i for cluster in best(scores) for i in sorted(clusters[cluster])]
    return always + ranked[: budget - len(always)]


@pytest.mark.parametrize("budget", [70, 130])
def test_clusterkv_reads_the_clusters_whose_centroids_match_best(recording, budget):
    clusters = clusters_of(recording, per_cluster=80, steps=20, local=0, centred=False)
    assert_reads(filled("clusterkv", recording, budget), recording, lambda q, k, layer, head:
                 clusterkv(q, k, head, clusters[layer, head], budget))


def test_clusterkv_with_a_cluster_for_each_token_reads_the_best_tokens(recording):
    cache, seen = filled("clusterkv", recording, 50, per_cluster=1), []
    for q, k, attended in next(writing(cache, recording)):
        for head in HEADS:
            scores = [sum(dot(one, key) for one in queries_of(q, head)) / GROUP
                      for key in k[head, 4:N_PROMPT].tolist()]
            expected = [0, 1, 2, 3, *[i + 4 for i in best(scores)[:45]], N_PROMPT]
            seen.append(positions(k, attended, head))
            assert seen[-1] == sorted(expected)
    assert len(seen) == LAYERS * len(HEADS)


# RetroInfer


def retroinfer(q, kv, head, clusters, budget):
    """What a head attends to: lists of key, value and the log of what it counts for. kv (n, 2 D)"""
    clusters, begin = with_written(clusters, len(kv), local=32)
    means = [mean([kv[i] for i in cluster]) for cluster in clusters]
    scores = [0] * len(clusters)
    for one in queries_of(q, head):
        logits = [dot(one, row[:DIM]) / math.sqrt(DIM) for row in means]
        scores = [a + b for a, b in zip(scores, softmax(logits))]
    always = [*range(4), *range(begin, len(kv))]
    room = budget - len(always)
    n_estimated = min(round(0.232 * len(clusters)), room // 2)
    room -= n_estimated
    read, estimated = [*always], []
    for cluster in best(scores):
        read += clusters[cluster][:room]
        left = len(clusters[cluster][room:])
        room = max(room - len(clusters[cluster]), 0)
        if left and len(estimated) < n_estimated:
            estimated.append([*means[cluster], math.log(left)])
    return [[*kv[i], 0.0] for i in read] + estimated, len(estimated)


def rows_of(attended, head):
    """As `retroinfer`, of what `decode` returned."""
    keys, values, mask = [x[head] for x in attended]
    return torch.cat((keys, values, mask.mT), dim=1)[mask[0] > -math.inf].tolist()


def assert_same_rows(got, expected):
    """In any order."""
    got, expected = (torch.tensor(sorted(rows)) for rows in (got, expected))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def kv_of(layers, layer, head):
    _, k, v = layers[layer]
    return torch.cat((k[head], v[head]), dim=1).tolist()


@pytest.mark.parametrize("budget", [72, 130])
def test_retroinfer_reads_the_best_clusters_and_estimates_the_next(recording, budget):
    """With 72, and 68 that are always attended to, half of the room is for estimates."""
    clusters = clusters_of(recording, per_cluster=16, steps=10, local=32, centred=True)
    cache, layers, counts = filled("retroinfer", recording, budget), recording.qkv, set()
    for step in range(N_NEW):
        tokens, layers = with_token(layers, step)
        for layer, token in enumerate(tokens):
            attended = cache.decode(layer, *token)
            for head in HEADS:
                kv = kv_of(layers, layer, head)
                expected, n_estimated = retroinfer(
                    layers[layer][0], kv, head, clusters[layer, head], budget)
                counts.add(n_estimated)
                assert_same_rows(rows_of(attended, head), expected)
                assert len(expected) == budget
        cache.advance(1)
    assert counts == ({2, 3, 4} if budget == 72 else {4})


def weighted_mean(q, rows):
    """Attention to rows of key, value and log-count, as the formula has it."""
    weights = [math.exp(bias) * math.exp(dot(q, key) / math.sqrt(DIM))
               for *key, bias in [[*row[:DIM], row[-1]] for row in rows]]
    return [dot(weights, column) / sum(weights) for column in [
        [row[DIM + i] for row in rows] for i in range(DIM)]]


@pytest.mark.parametrize("n_earlier", [0, 70])
def test_retroinfer_s_answer_counts_an_estimate_as_so_many_tokens(model, recording, n_earlier):
    clusters = clusters_of(recording, per_cluster=16, steps=10, local=32, centred=True)
    cache, layers = filled("retroinfer", recording, 100), recording.qkv
    for step in range(n_earlier):
        tokens, layers = with_token(layers, step)
        for layer, token in enumerate(tokens):
            cache.decode(layer, *token)
        cache.advance(1)
    tokens, layers = with_token(layers, n_earlier)
    for layer, token in enumerate(tokens):
        attended = cache.decode(layer, *token)
        answer = model.layers[layer].self_attn.attend(token[0], *attended)
        answer = answer.view(len(HEADS), GROUP, DIM)
        for head in HEADS:
            q, kv = layers[layer][0], kv_of(layers, layer, head)
            rows, _ = retroinfer(q, kv, head, clusters[layer, head], 100)
            expected = [weighted_mean(one, rows) for one in queries_of(q, head)]
            torch.testing.assert_close(answer[head], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values_alike, n_read", [(False, 10), (True, 8)])
def test_retroinfer_is_exact_if_the_keys_of_a_cluster_are_alike(model, values_alike, n_read):
    """8 clusters of 10 equal keys, all that is not read is estimated. If a part of a cluster is
    read, then its other values are the mean only if they are all alike."""
    clusters, size = 8, 10
    layers = [random_qkv(4 + clusters * size + 32, 500 + layer) for layer in range(LAYERS)]
    for _, *tensors in layers:
        for x in tensors[: 1 + values_alike]:
            x[:, 4 : 4 + clusters * size] = x[:, 4 : 4 + clusters].repeat_interleave(size, dim=1)
    recording = recording_of(layers)
    cache = filled("retroinfer", recording, 4 + 32 + 1 + clusters + n_read, per_cluster=size,
                   estimated=1.0)
    tokens, layers = with_token(layers, 0)
    for layer, token in enumerate(tokens):
        attended = cache.decode(layer, *token)
        answer = model.layers[layer].self_attn.attend(token[0], *attended)
        answer = answer.view(len(HEADS), GROUP, DIM)
        for head in HEADS:
            rows = [[*row, 0.0] for row in kv_of(layers, layer, head)]
            expected = [weighted_mean(one, rows) for one in queries_of(layers[layer][0], head)]
            torch.testing.assert_close(answer[head], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert cache.attended == [4 + 32 + 1 + n_read + clusters - (n_read == size)] * LAYERS


# Cost


def cost_after(method, recording, n_new, budget=BUDGET):
    cache = filled(method, recording, budget)
    assert len(list(writing(cache, recording, n_new))) == n_new
    return cost(cache)


def test_a_paged_cache_costs_its_pages_and_what_they_are_known_by(recording):
    """After 301 tokens 6 of 9 pages are read and the last 13, after 370 6 of 11 and the last 18. A
    page is known by two vectors, as many numbers as a token has."""
    assert cost_after("arkvale", recording, 1) == Cost(6 * 32 + 13, 3 * 32 + 9, 6 * 32 + 13 + 9)
    assert cost_after("arkvale", recording, 70) == Cost(6 * 32 + 18, 5 * 32 + 11, 6 * 32 + 18 + 11)


def test_a_clustered_cache_costs_what_it_reads_and_its_centroids(recording):
    """296 tokens in 4 clusters, 64 of the 70 written in two more. A centroid is half a token."""
    assert cost_after("clusterkv", recording, 1, 130) == Cost(130, 301 - 130 + 2, 130 + 2)
    assert cost_after("clusterkv", recording, 70, 130) == Cost(130, 370 - 130 + 3, 130 + 3)


def test_retroinfer_keeps_all_tokens_and_the_means_of_all_clusters(recording):
    """264 tokens in 17 clusters, and 64 more in two."""
    for n_new, n_means in ((1, 17), (70, 19)):
        held, elsewhere, _ = cost_after("retroinfer", recording, n_new, 130)
        assert held == 130 and held + elsewhere == N_PROMPT + n_new + n_means

"""Methods that choose what to read for every token: against plain loops, one head, one page or
cluster, one token at a time."""

import math

import pytest
import torch
from methods.conftest import (BUDGET, DIM, EACH_HEAD, GROUP, HEADS, LAYERS, N_LONG, N_NEW, N_PROMPT,
                              Cost, best, dot, filled, mean, positions, random_qkv,
                              recording_of, softmax, writing)

from benchmarks.methods.retrieve import k_means

PAGE = 32
SEVEN_PAGES = 7 * PAGE


def assert_reads(cache, recording, expected, n_new=N_NEW):
    """At every token that is written. expected(q, k, layer, head) are positions."""
    for seen in writing(cache, recording, n_new):
        for layer, (qkv, attended) in enumerate(seen):
            for head in HEADS:
                assert positions(qkv, attended, head) == sorted(expected(*qkv[:2], layer, head))


def queries_of(q, head, i=-1):
    """Token i's queries in the group, lists of numbers."""
    return q[GROUP * head : GROUP * head + GROUP, i].tolist()


def unit(row):
    length = math.sqrt(dot(row, row))
    return [x / length for x in row] if length else row


def paged(k, head, page=PAGE):
    """The keys of each full page, before the newest token, and the positions after them."""
    rows, n_full = k[head].tolist(), (k.shape[1] - 1) // page
    pages = [rows[page * i : page * i + page] for i in range(n_full)]
    return pages, list(range(page * n_full, k.shape[1]))


def blocks_of(pages, page=PAGE):
    return [i for number in pages for i in range(page * number, page * number + page)]


# Quest


def test_quest_reads_the_pages_whose_bound_is_highest(recording):
    def quest(q, k, layer, head):
        pages, last = paged(k, head, 16)
        bounds = [sum(sum(max(a * min(channel), a * max(channel))
                          for a, channel in zip(one, zip(*page))) for one in queries_of(q, head))
                  for page in pages]
        return blocks_of(best(bounds, (BUDGET - len(last)) // 16), 16) + last

    assert_reads(filled("quest", recording), recording, quest, n_new=1)


def test_quest_may_read_everything_in_its_first_two_layers(recording):
    cache = filled("quest_dense", recording)
    assert cache.decode(1, *random_qkv(1, 1))[0].shape[1] == N_PROMPT + 1
    cache.dense_layers = 1
    for ours, theirs in zip(cache.decode(1, *random_qkv(1, 2))[:2],
                            filled("quest", recording).decode(1, *random_qkv(1, 2))[:2]):
        assert ours.shape[1] == theirs.shape[1] + 1  # the token of the step before


# ShadowKV


def test_shadowkv_reads_outliers_and_the_chunks_whose_landmarks_match(recording):
    def shadowkv(q, k, layer, head):
        chunks, last = paged(k, head, 8)
        landmarks = [mean(chunk) for chunk in chunks]
        least = [min(dot(unit(key), unit(landmark)) for key in chunk)
                 for chunk, landmark in zip(chunks, landmarks)]
        always = [*best([-x for x in least[:-4]], round(BUDGET * 24 / 1024)),
                  *range(len(chunks) - 4, len(chunks))]
        others = [i for i in range(len(chunks)) if i not in always]
        attention = [softmax([dot(one, landmarks[i]) / math.sqrt(DIM) for i in others])
                     for one in queries_of(q, head)]
        shares = [math.inf] * len(chunks)
        for i, *each in zip(others, *attention):
            shares[i] = max(each)
        return blocks_of(best(shares, (BUDGET - len(last)) // 8), 8) + last

    assert_reads(filled("shadowkv", recording), recording, shadowkv, n_new=1)


# ArkVale


def cuboid_mean(q, rows):
    """The most that q · k is for keys not farther from the middle than the mean of these keys."""
    bound = 0
    for a, channel in zip(q, zip(*rows)):
        middle = (min(channel) + max(channel)) / 2
        radius = sum(abs(x - middle) for x in channel) / len(channel)
        bound += max(a * (middle + radius), a * (middle - radius))
    return bound


def arkvale(q, k, layer, head):
    pages, last = paged(k, head)
    always = [0, 1, len(pages) - 2, len(pages) - 1]
    bounds = [sum(cuboid_mean(one, page) for one in queries_of(q, head)) for page in pages]
    others = [page for page in best(bounds) if page not in always]
    room = (SEVEN_PAGES - len(last)) // PAGE
    assert len(always) < room < len(pages), "the bounds decide"
    return blocks_of([*always, *others[: room - len(always)]]) + last


@pytest.mark.slow
def test_arkvale_reads_the_first_pages_the_latest_and_those_with_the_highest_bounds(long_prompt):
    assert_reads(filled("arkvale", long_prompt, SEVEN_PAGES), long_prompt, arkvale)


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


@pytest.mark.slow
@pytest.mark.parametrize("method", ["arkvale_dense", "clusterkv_dense"])
def test_the_first_two_layers_may_be_whole(long_prompt, method):
    assert_reads(filled(method, long_prompt, SEVEN_PAGES), long_prompt,
                 lambda q, k, layer, head: range(k.shape[1]))


# ActQKV


def representative(q, keys):
    """Of a block with these queries, a mean of the group each."""
    match = [dot(key, mean(q)) for key in keys]
    return mean([keys[i] for i in best(match, 4)])


def probe(q):
    """The last 32 queries, weighted by how far they are from all before the newest."""
    middle = mean(q[:-1])
    variance = mean([[(x - m) ** 2 for x, m in zip(row, middle)] for row in q[:-1]])
    least = sum(variance) / DIM / 100
    weights = [sum((x - m) ** 2 / (s + least) for x, m, s in zip(row, middle, variance)) / DIM
               for row in q[-PAGE:]]
    return [dot(weights, column) / sum(weights) for column in zip(*q[-PAGE:])]


def entropy(scores):
    return -sum(share * math.log(share) for share in softmax(scores)) / math.log(len(scores))


def actqkv_layer(qkv, attended, asked=probe):
    """The number of full blocks that are read, which are the first and the best by the cosine with
    what is asked for, and the mean entropy of the heads."""
    (q, k, _), entropies = qkv, []
    for head in HEADS:
        pages, last = paged(k, head)
        queries = [mean(queries_of(q, head, i)) for i in range(q.shape[1])]
        known_by = [representative(queries[PAGE * i : PAGE * i + PAGE], page)
                    for i, page in enumerate(pages)]
        wanted = unit(asked(queries))
        scores = [dot(wanted, unit(one)) for one in known_by]
        entropies.append(entropy(scores))
        ranked = [0, *[page for page in best(scores) if page != 0]]
        read = positions(qkv, attended, head)
        n_read, left = divmod(len(read) - len(last), PAGE)
        assert left == 0 and read == sorted(blocks_of(ranked[:n_read]) + last)
    return n_read, sum(entropies) / len(HEADS)


@pytest.mark.slow
def test_actqkv_reads_the_blocks_that_match_the_queries_that_stand_out(long_prompt):
    """The layers that come later know only their entropies of earlier tokens. Of the first token
    they know none yet: `test_actqkv_reads_no_more_than_its_budget`."""
    entropies, cache = [[] for _ in range(LAYERS)], filled("actqkv", long_prompt, SEVEN_PAGES)
    for step, seen in enumerate(writing(cache, long_prompt)):
        for layer, (qkv, attended) in enumerate(seen):
            n_read, new = actqkv_layer(qkv, attended)
            entropies[layer].append(new)
            if step > 0 or layer == LAYERS - 1:
                means = [sum(values) / len(values) for values in entropies]
                shared = (7 - 2) * LAYERS * means[layer] / sum(means)
                assert n_read == 1 + math.floor(shared)


def test_actqkv_reads_no_more_than_its_budget(long_prompt):
    """At any token, the mean of the layers."""
    for seen in writing(filled("actqkv", long_prompt, SEVEN_PAGES), long_prompt):
        n_read = [attended[0].shape[1] for _, attended in seen]
        assert sum(n_read) <= LAYERS * SEVEN_PAGES


def test_actqkv_s_layers_share_blocks_by_their_entropy(long_prompt):
    cache = filled("actqkv", long_prompt, 6 * PAGE)
    cache.entropy = [(3.0, 4), (0.5, 2)]  # means of 3/4 and 1/4, for 8 blocks
    assert [cache.layer_budget(layer) for layer in range(LAYERS)] == [8 * PAGE, 4 * PAGE]


def assert_asks_the_mean(recording, queries, query):
    """If the prompt has these queries in all heads, and the next token has this one."""
    def asking(n_tokens, seed, dim):
        return query.expand(GROUP * len(HEADS), 1, -1), *random_qkv(n_tokens, seed, dim)[1:]

    recording = recording_of([(queries.expand(GROUP * len(HEADS), -1, -1), k, v)
                              for _, k, v in recording.qkv])
    cache = filled("actqkv", recording, SEVEN_PAGES)
    for qkv, attended in next(writing(cache, recording, random=asking)):
        assert torch.stack(attended[:2]).isfinite().all()
        actqkv_layer(qkv, attended, asked=lambda queries: mean(queries[-PAGE:]))


def test_actqkv_weighs_queries_alike_that_stand_out_alike(long_prompt):
    middle, away = torch.arange(1.0, DIM + 1), torch.tensor([1.0, -2, 3, -1, 2, -3, 1, 2])
    queries = torch.stack([middle + away, middle - away] * (N_LONG // 2))
    assert_asks_the_mean(long_prompt, queries, middle + away)


@pytest.mark.parametrize("value", [1.0, 0.3])
def test_actqkv_weighs_constant_queries_alike(long_prompt, value):
    """0.3 is not exact, so that the variance may be a little less than 0."""
    query = torch.arange(1.0, DIM + 1) * value
    assert_asks_the_mean(long_prompt, query.expand(N_LONG, -1), query)


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


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n_clusters, steps", [(4, 20), (17, 10), (60, 1), (60, 10)])
def test_k_means_assigns_each_key_to_the_centroid_of_highest_cosine(
        long_prompt, n_clusters, steps, centred):
    k = long_prompt.qkv[1][1]
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
    last = recording.num_tokens - local
    n_clusters = math.ceil((last - 4) / per_cluster)
    clusters = {}
    for layer, head in EACH_HEAD:
        keys = recording.qkv[layer][1][head, 4:last].tolist()
        found = slow_k_means(keys, n_clusters, steps, centred)
        clusters[layer, head] = [[i + 4 for i, c in enumerate(found) if c == cluster]
                                 for cluster in range(n_clusters)]
    return clusters


def with_written(clusters, n_tokens, local):
    """The clusters and those of 32 written tokens each, and where the others begin, before the
    newest token of so many."""
    begin = N_LONG - local
    while n_tokens - 1 - begin >= local + 32:
        clusters, begin = [*clusters, list(range(begin, begin + 32))], begin + 32
    return clusters, begin


@pytest.mark.slow
@pytest.mark.parametrize("budget", [70, 130])
def test_clusterkv_reads_the_clusters_whose_centroids_match_best(long_prompt, budget):
    found = clusters_of(long_prompt, per_cluster=80, steps=20, local=0, centred=False)

    def clusterkv(q, k, layer, head):
        clusters, begin = with_written(found[layer, head], k.shape[1], local=0)
        rows, scores = k[head].tolist(), []
        for cluster in clusters:
            centroid = mean([rows[i] for i in cluster])
            scores.append(sum(dot(one, centroid) for one in queries_of(q, head)) / GROUP)
        always = [*range(4), *range(begin, k.shape[1])]
        ranked = [i for cluster in best(scores) for i in sorted(clusters[cluster])]
        return always + ranked[: budget - len(always)]

    assert_reads(filled("clusterkv", long_prompt, budget), long_prompt, clusterkv)


def test_clusterkv_with_a_cluster_for_each_token_reads_the_best_tokens(long_prompt):
    def best_tokens(q, k, layer, head):
        scores = [sum(dot(one, key) for one in queries_of(q, head)) / GROUP
                  for key in k[head, 4:N_LONG].tolist()]
        return [0, 1, 2, 3, *[i + 4 for i in best(scores, 45)], N_LONG]

    cache = filled("clusterkv", long_prompt, 50, per_cluster=1)
    assert_reads(cache, long_prompt, best_tokens, n_new=1)


def test_the_best_tokens_are_those_attended_to_most(recording):
    def best_tokens(q, k, layer, head):
        attention = [softmax([dot(one, key) / math.sqrt(DIM) for key in k[head].tolist()])
                     for one in queries_of(q, head)]
        return best([sum(each) for each in zip(*attention)], BUDGET)

    assert_reads(filled("best_tokens", recording), recording, best_tokens, n_new=1)


# Cost


def cost_after(method, recording, n_new, budget=SEVEN_PAGES):
    cache = filled(method, recording, budget)
    assert len(list(writing(cache, recording, n_new))) == n_new
    return cache.cost()


def test_a_paged_cache_costs_its_pages_and_what_they_are_known_by(long_prompt):
    """After 301 tokens 6 of 9 pages are read and the last 13, after 370 6 of 11 and the last 18. A
    page is known by two vectors, as many numbers as a token has."""
    after = [cost_after("arkvale", long_prompt, n_new) for n_new in (1, 70)]
    assert after == [Cost(6 * 32 + 13, 3 * 32 + 9, *[6 * 32 + 13 + 9] * 2),
                     Cost(6 * 32 + 18, 5 * 32 + 11, *[6 * 32 + 18 + 11] * 2)]


def test_a_clustered_cache_costs_what_it_reads_and_its_centroids(long_prompt):
    """296 tokens in 4 clusters, 64 of the 70 written in two more. A centroid is half a token."""
    after = [cost_after("clusterkv", long_prompt, n_new, 130) for n_new in (1, 70)]
    assert after == [Cost(130, 301 - 130 + 2, *[130 + 2] * 2),
                     Cost(130, 370 - 130 + 3, *[130 + 3] * 2)]

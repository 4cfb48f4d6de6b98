"""RetroInfer reads the best clusters, and estimates attention to the next: against plain loops."""

import math

import pytest
import torch
from methods.conftest import (DIM, GROUP, HEADS, LAYERS, N_LONG, best, dot, filled, mean,
                              random_qkv, recording_of, softmax, writing)
from methods.test_retrieve import clusters_of, cost_after, queries_of, with_written


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


def clusters_of_retroinfer(recording):
    return clusters_of(recording, per_cluster=16, steps=10, local=32, centred=True)


def rows_of(attended, head):
    """As `retroinfer`, of what `decode` returned."""
    keys, values, mask = [x[head] for x in attended]
    return torch.cat((keys, values, mask.mT), dim=1)[mask[0] > -math.inf].tolist()


def kv_of(qkv, head):
    return torch.cat((qkv[1][head], qkv[2][head]), dim=1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("budget", [72, 130])
def test_retroinfer_reads_the_best_clusters_and_estimates_the_next(long_prompt, budget):
    """With 72, and 68 that are always attended to, half of the room is for estimates."""
    clusters, counts = clusters_of_retroinfer(long_prompt), set()
    for seen in writing(filled("retroinfer", long_prompt, budget), long_prompt):
        for layer, (qkv, attended) in enumerate(seen):
            for head in HEADS:
                expected, n_estimated = retroinfer(
                    qkv[0], kv_of(qkv, head), head, clusters[layer, head], budget)
                counts.add(n_estimated)
                assert len(expected) == budget
                got, expected = (torch.tensor(sorted(rows)) for rows in (  # in any order
                    rows_of(attended, head), expected))
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert counts == ({2, 3, 4} if budget == 72 else {4})


def weighted_mean(q, rows):
    """Attention to rows of key, value and log-count, as the formula has it."""
    weights = [math.exp(bias) * math.exp(dot(q, key) / math.sqrt(DIM))
               for *key, bias in [[*row[:DIM], row[-1]] for row in rows]]
    return [dot(weights, column) / sum(weights) for column in [
        [row[DIM + i] for row in rows] for i in range(DIM)]]


def assert_answers(model, seen, rows):
    """With the attention to rows(layer, qkv, head) of key, value and log-count."""
    for layer, (qkv, attended) in enumerate(seen):
        answer = model.layers[layer].self_attn.attend(qkv[0][:, -1:], *attended)
        answer = answer.view(len(HEADS), GROUP, DIM)
        for head in HEADS:
            expected = [weighted_mean(one, rows(layer, qkv, head))
                        for one in queries_of(qkv[0], head)]
            torch.testing.assert_close(answer[head], torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("n_earlier", [0, 70])
def test_retroinfer_s_answer_counts_an_estimate_as_so_many_tokens(model, long_prompt, n_earlier):
    clusters = clusters_of_retroinfer(long_prompt)

    def rows(layer, qkv, head):
        return retroinfer(qkv[0], kv_of(qkv, head), head, clusters[layer, head], 100)[0]

    *_, seen = writing(filled("retroinfer", long_prompt, 100), long_prompt, n_earlier + 1)
    assert_answers(model, seen, rows)


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
    assert_answers(model, next(writing(cache, recording)),
                   lambda layer, qkv, head: [[*row, 0.0] for row in kv_of(qkv, head)])
    assert cache.attended == [4 + 32 + 1 + n_read + clusters - (n_read == size)] * LAYERS


def test_retroinfer_keeps_all_tokens_and_the_means_of_all_clusters(long_prompt):
    """264 tokens in 17 clusters, and 64 more in two."""
    for n_new, n_means in ((1, 17), (70, 19)):
        held, elsewhere, _, device = cost_after("retroinfer", long_prompt, n_new, 130)
        assert held == 130 and held + elsewhere == N_LONG + n_new + n_means
        assert device == held + n_means  # the mean keys and the mean values

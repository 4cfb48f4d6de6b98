"""Dropped tokens are merged: against plain loops, one head, one token, one run at a time."""

import math

import pytest
import torch
from methods.conftest import (BUDGET, DIM, EACH_HEAD, GROUP, HEADS, N_PROMPT, ROOM, WINDOW, best,
                              dot, filled, random_qkv, random_recording, received, recording_of,
                              window_scores, write, writing)

FEATURES = 8


def answer(q, keys, values, mask=None):
    """Attention of the last token, one query head at a time: (H, D)"""
    answers = []
    for query_head in range(len(q)):
        head, in_group = divmod(query_head, GROUP)
        logits = keys[head].double() @ q[query_head, -1].double() / math.sqrt(DIM)
        if mask is not None:
            row = mask[head, in_group if mask.shape[1] > 1 else 0]
            logits += row.double().log() if row.dtype == torch.bool else row.double()
        answers.append(logits.softmax(0) @ values[head].double())
    return torch.stack(answers)


@pytest.mark.parametrize("method, budget", [("kvmerger", 800), ("less", 800), ("less", 210)])
def test_a_budget_for_all_tokens_gives_the_full_cache_s_states(model, recording, method, budget):
    """LESS at 210: all are kept, but most of them as heavy tokens, not as the latest."""
    expected, got = (write(model, filled(*spec), 40) for spec in (
        ("full", recording), (method, recording, budget)))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# KVMerger

N_WHOLE = ROOM // 4
N_RUNS = ROOM - N_WHOLE


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def runs_of(keys, tokens, n_runs):
    """Cut some tokens in so many runs, where neighbours are least alike."""
    keys = keys.double()
    likeness = [cosine(keys[a], keys[b]) for a, b in zip(tokens, tokens[1:])]
    cuts = best([-x for x in likeness], n_runs - 1)
    runs = [[tokens[0]]]
    for i, token in enumerate(tokens[1:]):
        if i in cuts:
            runs.append([])
        runs[-1].append(token)
    return runs


def merged(run, scores, keys, values):
    """Key and value of a run's one token."""
    pivot = max(run, key=scores.__getitem__)
    weights = [math.exp(-(keys[pivot] - keys[i]).square().sum().item() / (2 * 5**2)) for i in run]
    return [sum(w * x[i] for w, i in zip(weights, run)) / sum(weights) for x in (keys, values)]


def whole_and_runs(recording, layer, head):
    """The tokens that stay as they are, the runs of the others, both the best first, and scores."""
    q, k, _ = recording.qkv[layer]
    scores = window_scores(q, k, pool=1)[head]
    whole = best(scores, N_WHOLE)
    others = [i for i in range(len(scores)) if i not in whole]
    runs = runs_of(k[head], others, N_RUNS)
    assert len(runs) == N_RUNS
    return whole, sorted(runs, key=lambda run: -sum(scores[i] for i in run)), scores


def test_kvmerger_keeps_a_quarter_whole_and_merges_runs_of_the_rest(recording):
    cache = filled("kvmerger", recording)
    for layer, head in EACH_HEAD:
        keys, values = (x[head] for x in recording.qkv[layer][1:])
        whole, runs, scores = whole_and_runs(recording, layer, head)
        expected = [[keys[i], values[i]] for i in whole]
        expected += [merged(run, scores, keys, values) for run in runs]
        expected = torch.stack([torch.stack(pair) for pair in expected])
        torch.testing.assert_close(cache.kept[layer][head], expected, rtol=0, atol=1e-5)
        lengths = torch.tensor([1] * N_WHOLE + [len(run) for run in runs])
        torch.testing.assert_close(cache.bias[layer][head], lengths.log())
        assert any(len(run) > 2 for run in runs)


def test_each_token_of_a_head_is_counted_once(recording):
    cache = filled("kvmerger", recording)
    for layer, head in EACH_HEAD:
        counts = cache.bias[layer][head].exp()
        assert counts.sum().item() == pytest.approx(N_PROMPT - WINDOW)
        torch.testing.assert_close(counts, counts.round())


def test_a_written_token_takes_the_place_of_the_worst_run(recording):
    for step, seen in enumerate(writing(filled("kvmerger", recording), recording, 60), 1):
        _, (keys, _, mask) = seen[0]
        latest = min(WINDOW + step, BUDGET // 2)
        n_left = BUDGET - latest - N_WHOLE
        assert keys.shape[1] == BUDGET and mask.shape == (len(HEADS), 1, BUDGET)
        for head in HEADS if step in (1, 3, 60) else ():
            runs = whole_and_runs(recording, 0, head)[1][:n_left]
            lengths = [1] * N_WHOLE + [len(run) for run in runs] + [1] * latest
            torch.testing.assert_close(mask[head, 0], torch.tensor(lengths).log())


def test_equal_neighbours_merge_without_loss():
    """The 10 whole tokens are those of two stretches, and the 30 others become a run each. The new
    token takes the place of one run."""
    n_stretches, n_equal = N_WHOLE // 5 + N_RUNS, 5
    places = [i for i in range(n_stretches) for _ in range(n_equal)]
    places += range(n_stretches, n_stretches + WINDOW)
    plain = random_recording(n_tokens=n_stretches + WINDOW)
    recording = recording_of([x[:, places] for x in layer] for layer in plain.qkv)
    seen = next(writing(filled("kvmerger", recording), recording))
    for layer, ((q, k, v), attended) in enumerate(seen):
        left = torch.ones(len(HEADS), 1, k.shape[1], dtype=torch.bool)
        for head in HEADS:
            _, runs, _ = whole_and_runs(recording, layer, head)
            assert all(len(run) == n_equal for run in runs)
            left[head, 0, runs[-1]] = False
        expected = answer(q, k, v, left)
        torch.testing.assert_close(answer(q, *attended), expected, rtol=0, atol=1e-5)


# LESS

N_LATEST = BUDGET // 2
N_HEAVY = BUDGET - FEATURES - N_LATEST


def heavy_and_dropped(q, k, head):
    """By H2O's score: attention from all queries of the prompt."""
    scores = received(q[:, :N_PROMPT], k[:, :N_PROMPT], range(N_PROMPT))[head]
    heavy = best(scores[: N_PROMPT - N_LATEST], N_HEAVY)
    return heavy, [i for i in range(N_PROMPT - N_LATEST) if i not in heavy]


def feature(w, x):
    """One of R features, of which the product of a query's and a key's is, in the mean, R times
    smaller than exp(q · k / √D): their sum is not."""
    x = x.double() / DIM**0.25
    return math.exp(w.double() @ x - x @ x / 2) / math.sqrt(FEATURES)


def state_of(cache, keys, values, dropped):
    """z (R,) and H (R, D), token by token."""
    z, h = [0.0] * FEATURES, [torch.zeros(DIM, dtype=torch.double) for _ in range(FEATURES)]
    for i in dropped:
        for r, w in enumerate(cache.random):
            z[r] += feature(w, keys[i])
            h[r] = h[r] + feature(w, keys[i]) * values[i].double()
    return z, h


def test_the_slots_of_less_hold_its_state(recording):
    cache = filled("less", recording)
    for (q, k, v), (keys, values, mask) in next(writing(cache, recording)):
        assert keys.shape[1] == BUDGET and mask.shape == (len(HEADS), GROUP, BUDGET)
        assert not keys[:, -FEATURES:].any() and not mask[..., :-FEATURES].any()
        for head in HEADS:
            z, h = state_of(cache, k[head], v[head], heavy_and_dropped(q, k, head)[1])
            for r, w in enumerate(cache.random):
                got = values[head, r - FEATURES].double()
                torch.testing.assert_close(got, h[r] / z[r], rtol=1e-4, atol=1e-5)
                for i in range(GROUP):
                    counts = feature(w, q[GROUP * head + i, -1]) * z[r]
                    assert mask[head, i, r - FEATURES].exp().item() == pytest.approx(counts, 1e-3)


@pytest.mark.slow
def test_less_answers_by_the_formula_of_its_state(recording):
    cache = filled("less", recording)
    for (q, k, v), attended in next(writing(cache, recording)):
        got = answer(q, *attended)
        for query_head in range(GROUP * len(HEADS)):
            head, one = query_head // GROUP, q[query_head, -1]
            heavy, dropped = heavy_and_dropped(q, k, head)
            z, h = state_of(cache, k[head], v[head], dropped)
            phi = [feature(w, one) for w in cache.random]
            above, below = sum(a * b for a, b in zip(phi, h)), dot(phi, z)
            # With the new token the latest half begins one later. That one joins no state.
            for i in [*heavy, *range(N_PROMPT - N_LATEST + 1, N_PROMPT + 1)]:
                weight = math.exp(one.double() @ k[head, i].double() / math.sqrt(DIM))
                above, below = above + weight * v[head, i].double(), below + weight
            torch.testing.assert_close(got[query_head], above / below, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_many_features_are_right_in_the_mean(recording, n_features=200_000):
    cache = filled("less", recording, 3 * n_features, features=n_features)
    q, k = random_qkv(20, seed=1)[1] / 2
    phi_q, phi_k = (cache.log_features(x).double().exp() for x in (q, k))
    expected = [math.exp(a @ b / math.sqrt(DIM)) for a, b in zip(q, k)]
    got = [(a @ b).item() for a, b in zip(phi_q, phi_k)]
    assert got == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("budget", [2 * N_PROMPT + 4, N_PROMPT + FEATURES + 10])
def test_where_nothing_is_dropped_less_attends_without_its_state(recording, budget):
    cache = filled("less", recording, budget)
    for (q, k, v), (keys, values, mask) in next(writing(cache, recording)):
        assert (mask[..., -FEATURES:] == -math.inf).all() and values.isfinite().all()
        got, expected = answer(q, keys, values, mask), answer(q, k, v)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

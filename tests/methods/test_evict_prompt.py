"""Methods that choose once, after the prompt: against plain loops, one head and one token at a
time."""

import math
from dataclasses import replace
from fractions import Fraction
from statistics import fmean

import pytest
import torch
from conftest import TINY, random_spans
from methods.conftest import (BUDGET, DIM, EACH_HEAD, GROUP, HEADS, LAYERS, N_PROMPT, ROOM, WINDOW,
                              assert_keeps, attending, best, filled, make_cache, random_qkv,
                              random_recording, recording_of, window_scores)

from model import apply_rope, rope_table

N_EARLIER = N_PROMPT - WINDOW


def expected_positions(method, recording, layer, head):
    """What each method's definition keeps of the prompt, besides the window."""
    q, k, v = recording.qkv[layer]
    room = ROOM - 1  # the new token takes one place
    if method == "streamingllm":
        return [0, 1, 2, 3, *range(N_EARLIER - (room - 4), N_EARLIER)]
    if method == "l2norm":
        return best([-key.norm().item() for key in k[head, :N_EARLIER]], room)
    if method == "snapkv":
        return best(window_scores(q, k)[head], room)
    if method == "chunkkv":
        q, k, _ = recording.qkv[layer - layer % 2]  # the choice of the layer before is used again
        scores = [sum(heads) for heads in zip(*window_scores(q, k, pool=1))]
        chunks = [range(a, min(a + 10, N_EARLIER)) for a in range(0, N_EARLIER, 10)]
        ranked = best([sum(scores[i] for i in chunk) for chunk in chunks])
        return [i for c in ranked for i in chunks[c]][:room]
    assert method == "expected_attention"
    return best(expected_attention(q, k, v, head)[:N_EARLIER], room)


def expected_attention(q, k, v, head):
    """The score of every token for a KV head, one position and one query head at a time."""
    cos, sin = rope_table(TINY, torch.arange(N_PROMPT + 512), torch.float32)
    turns = [apply_rope(torch.eye(DIM), *at).T for at in zip(cos[:, None], sin[:, None])]
    later = sum(turns[N_PROMPT:]) / 512
    total = torch.zeros(N_PROMPT - 4)
    for query_head in range(head * GROUP, (head + 1) * GROUP):
        queries = torch.stack([turns[i].T @ q[query_head, i] for i in range(4, N_PROMPT)])
        mean, covariance = queries.mean(0), torch.cov(queries.T, correction=0)
        mean, covariance = later @ mean, later @ covariance @ later.T
        total += torch.stack([key @ mean / DIM**0.5 + key @ covariance @ key / (2 * DIM)
                              for key in k[head, 4:]]).softmax(0) / GROUP
    return [math.inf] * 4 + [a * b.norm().item() for a, b in zip(total.tolist(), v[head, 4:])]


@pytest.mark.parametrize("method", [
    "streamingllm", "l2norm", "snapkv", "chunkkv", "expected_attention"])
def test_each_method_keeps_what_its_definition_says(recording, method):
    got = next(attending(filled(method, recording), recording))
    for layer, head in EACH_HEAD:
        kept = expected_positions(method, recording, layer, head)
        assert got[layer][head] == sorted({*kept, *range(N_EARLIER, N_PROMPT + 1)})


@pytest.mark.parametrize("method, least", [("streamingllm", 4), ("snapkv", BUDGET // 2)])
def test_the_prompt_s_best_tokens_outlast_a_long_text(recording, method, least):
    *_, seen = attending(filled(method, recording), recording, 100)
    assert len(seen[0][0]) == BUDGET and sum(i < N_PROMPT for i in seen[0][0]) == least


def test_rope_scaling_does_not_stand_in_the_way(recording):
    """Results are remembered by their arguments, and a dictionary cannot be one."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 100}
    config = replace(TINY, rope_scaling=scaling)
    cache = recording.replay(make_cache("expected_attention", config, BUDGET, [], 5))
    assert cache.layers[0].decode(*random_qkv(1, 1))[0].shape[1] == BUDGET


# WindowKV


@pytest.fixture(scope="module")
def deep():
    return random_recording(n_layers=14)  # WindowKV's groups are of 6, 6 and 2 layers


def windowkv_order(recording, layer):
    """All tokens before the window, those of the best eight neighbours first."""
    q, k, _ = recording.qkv[layer - layer % 6]
    heads = window_scores(q, k, pool=1)
    windows = [range(a, min(a + 8, len(heads[0]))) for a in range(0, len(heads[0]), 8)]

    def score(window):
        return fmean(fmean(sorted(scores[i] for i in window)[-4:]) for scores in heads)

    return [i for window in sorted(windows, key=score, reverse=True) for i in window]


def windowkv_budget(layer, n_layers, budget=BUDGET):
    room, n_groups = budget - WINDOW, math.ceil(n_layers / 6)
    last = Fraction(8 * room, 14)
    first = 2 * room - last
    return WINDOW + int(first + (last - first) * (layer // 6) / (n_groups - 1))


@pytest.mark.slow
def test_windowkv_keeps_the_windows_whose_best_tokens_are_attended_to_most(deep):
    budgets = [windowkv_budget(layer, 14) for layer in range(14)]
    assert set(budgets) == {32 + 57, 32 + 40, 32 + 22}
    kept = [[windowkv_order(deep, layer)[: budget - WINDOW]] * len(HEADS)
            for layer, budget in enumerate(budgets)]
    totals = [[budget] * len(HEADS) for budget in budgets]
    assert_keeps(filled("windowkv", deep), deep, kept, totals)


def test_all_layers_of_a_group_hold_what_its_first_one_chose(deep):
    sets = next(attending(filled("windowkv", deep), deep))
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
    q, k, v = random_qkv(8 * 10 + 2 + WINDOW, seed=7)  # 80 and 81 are a window of their own
    direction = torch.eye(DIM)[0]
    q, k = direction.expand_as(q), 0.01 * k
    k[:, 80:82] += direction  # so they are attended to more than all others
    recording = recording_of([(q, k, v)] * LAYERS)
    assert windowkv_order(recording, 0)[:2] == [80, 81]
    for layer in next(attending(filled("windowkv", recording, WINDOW + 10), recording)):
        assert {80, 81} <= set(layer[0])


# ShotKV


def shots_before_window():
    shots = [range(a, min(b, N_EARLIER)) for a, b in random_spans(N_PROMPT)]
    return [shot for shot in shots if len(shot)]


def test_shotkv_keeps_the_sentences_that_all_heads_and_layers_attend_to_most(recording):
    scores = [row for q, k, _ in recording.qkv for row in window_scores(q, k, pool=1)]
    ranked = sorted(shots_before_window(), reverse=True,
                    key=lambda shot: fmean(row[i] for row in scores for i in shot))
    kept = [i for shot in ranked for i in shot][:ROOM]
    cache = filled("shotkv", recording)
    assert_keeps(cache, recording, *([[one] * len(HEADS)] * LAYERS for one in (kept, BUDGET)))


def test_a_shot_stays_whole_or_goes_whole_but_for_one(recording):
    shots, n_whole = shots_before_window(), []
    for seen in attending(filled("shotkv", recording), recording):
        for got in seen:
            kept = [[i for i in shot if i in got[0]] for shot in shots]
            cut = [(part, shot) for part, shot in zip(kept, shots) if 0 < len(part) < len(shot)]
            assert len(cut) <= 1
            assert all(part == list(shot[: len(part)]) for part, shot in cut), "its first tokens"
            n_whole.append(sum(len(part) == len(shot) for part, shot in zip(kept, shots)))
    assert 1 < n_whole[0] < len(shots)

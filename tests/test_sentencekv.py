import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sentencekv
from benchmarks.scores import votes
from sentencekv import (
    SentenceKVConfig,
    find_secondary_sinks,
    gaussian,
    keep_tokens,
    mean_query,
    order_rows,
    select_rows,
    sentence_bounds,
    sentence_vectors,
    token_importance,
)


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


def test_docstrings():
    assert doctest.testmod(sentencekv).failed == 0


def test_importance_is_the_attention_of_the_last_queries():
    heads, kv_heads, tokens, window, dim = 6, 2, 50, 8, 16
    q, k = random(heads, tokens, dim), random(kv_heads, tokens, dim)
    received = torch.zeros(kv_heads, tokens)
    for head in range(heads):
        for i in range(tokens - window, tokens):
            logits = k[head // 3, : i + 1] @ q[head, i] / math.sqrt(dim)
            received[head // 3, : i + 1] += logits.softmax(0) / 3
    earlier = received[:, : tokens - window]
    expected = torch.stack([earlier[:, max(0, i - 3) : i + 4].amax(1)
                            for i in range(tokens - window)], dim=1)
    torch.testing.assert_close(token_importance(q[:, -window:], k), expected)


def test_the_most_important_tokens_are_kept_with_sinks_and_window():
    config = SentenceKVConfig(token_budget=20, keep_factor=1, sink_tokens=2, recent_window=3,
                              observation_window=5, secondary_sinks=2)
    importance, secondary = random(2, 45), torch.zeros(2, 50, dtype=torch.bool)
    secondary[1, [20, 30]] = True
    kept = keep_tokens(importance, secondary, config)
    assert kept.shape == (2, 20)
    for head in range(2):
        always = {0, 1, *range(45, 50)} | ({20, 30} if head else set())
        others = sorted(set(range(45)) - always, key=lambda i: -importance[head, i])
        assert kept[head].tolist() == sorted(always | set(others[: 20 - len(always)]))


def test_secondary_sinks_are_the_shortest_keys_but_not_the_first_or_the_last():
    config = SentenceKVConfig(token_budget=20, sink_tokens=2, recent_window=3, secondary_sinks=2,
                              secondary_ratio=0.5)
    lengths = torch.ones(3, 12)
    lengths[0, [0, 4, 6, 7, 11]] = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.1])
    lengths[1, [1, 5, 8]] = torch.tensor([0.1, 0.45, 0.6])
    k = lengths.unsqueeze(-1) * torch.nn.functional.normalize(random(3, 12, 8), dim=-1)
    found = find_secondary_sinks(k, config)
    assert [head.nonzero().flatten().tolist() for head in found] == [[6, 7], [5], []]
    none = SentenceKVConfig(token_budget=20, sink_tokens=2, recent_window=3, secondary_sinks=0)
    assert not find_secondary_sinks(k, none).any()
    assert not find_secondary_sinks(k[:, :3], config).any()  # all of a short prompt is recent
    in_half = find_secondary_sinks(k.to(torch.bfloat16), config)
    assert torch.equal(in_half, found)


def test_rows_begin_with_the_secondary_sinks():
    secondary = torch.zeros(2, 8, dtype=torch.bool)
    secondary[0, [2, 5]] = True
    rows, marked = order_rows(torch.tensor([[0, 2, 3, 5, 7], [1, 2, 5, 6, 7]]), secondary)
    assert rows.tolist() == [[2, 5, 0, 3, 7], [1, 2, 5, 6, 7]]
    assert marked.tolist() == [[-1, -1, 0, 3, 7], [1, 2, 5, 6, 7]]
    assert sentence_bounds(marked, torch.tensor([3, 6, 8])).tolist() == [[2, 3, 4, 5], [0, 2, 3, 5]]


def test_vectors_are_means_and_an_empty_sentence_gets_zeros():
    keys = random(2, 9, 4)
    bounds = torch.tensor([[2, 3, 3, 9], [0, 1, 5, 9]])
    vectors, variances = sentence_vectors(keys, bounds)
    for head in range(2):
        for s in range(3):
            rows = keys[head, bounds[head, s] : bounds[head, s + 1]]
            expected = rows.mean(0) if len(rows) else torch.zeros(4)
            torch.testing.assert_close(vectors[head, s], expected)
            variance = rows.var(dim=0, correction=0).mean() if len(rows) else torch.tensor(0.0)
            torch.testing.assert_close(variances[head, s], variance)


def test_bounds_count_the_kept_tokens_of_every_sentence():
    kept, ends = torch.tensor([[0, 1, 5, 8, 9], [3, 4, 5, 6, 7]]), torch.tensor([4, 7, 10])
    assert sentence_bounds(kept, ends).tolist() == [[0, 2, 3, 5], [0, 1, 4, 5]]
    kept = torch.tensor([[7, 8, 9], [0, 1, 8], [4, 5, 6], [1, 2, 3]])
    assert sentence_bounds(kept, ends).tolist() == [[0, 3, 3, 3], [0, 2, 3, 3], [0, 3, 3, 3],
                                                    [0, 3, 3, 3]]


def test_summed_scores_rank_like_the_mean_query():
    queries, vectors = random(5, 2, 3, 8), random(2, 40, 8)  # (tokens, H_kv, G, D)
    ones = torch.ones(2, 40)
    summed = sum(mean_query(q, vectors, ones, ones) for q in queries)
    expected = (vectors @ queries.mean(dim=(0, 2)).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(summed / 5, expected)
    assert summed.argsort().tolist() == expected.argsort().tolist()


def test_votes_are_the_attention_of_sentences_whose_keys_are_all_alike():
    q, vectors = random(2, 3, 8), random(2, 4, 8)
    lengths = torch.tensor([[1, 5, 2, 0], [3, 3, 1, 4]])
    for head in range(2):
        keys = vectors[head].repeat_interleave(lengths[head], dim=0)
        attention = (q[head] @ keys.T / math.sqrt(8)).softmax(-1).sum(0)
        sentence = torch.arange(4).repeat_interleave(lengths[head])
        expected = torch.zeros(4).index_add(0, sentence, attention)
        torch.testing.assert_close(votes(q, vectors, None, lengths)[head], expected)


def test_the_gaussian_score_is_the_average_over_normal_keys():
    q, vectors, variances = random(2, 3, 8), random(2, 4, 8), random(2, 4).abs()
    lengths = torch.tensor([[1.0, 5, 2, 0], [3, 3, 1, 4]])
    noise = random(100_000, 8)
    for head in range(2):
        keys = [v + s.sqrt() * noise for v, s in zip(vectors[head], variances[head])]
        weight = torch.stack([(q[head] @ k.T / math.sqrt(8)).exp().mean(-1) for k in keys], dim=1)
        expected = (weight / (weight * lengths[head]).sum(-1, keepdim=True)).sum(0)
        found = gaussian(q, vectors, variances, lengths)[head]
        full = lengths[head] > 0  # one without keys is not asked for
        torch.testing.assert_close(found[full], expected[full], rtol=0.03, atol=0)
        assert (found[~full] == 0).all()


def test_the_gaussian_score_of_keys_all_alike_is_a_vote_by_token():
    q, vectors, lengths = random(2, 3, 8), random(2, 4, 8), torch.tensor([[1.0, 5, 2, 4]] * 2)
    found = gaussian(q, vectors, torch.zeros(2, 4), lengths)
    torch.testing.assert_close(found * lengths, votes(q, vectors, None, lengths))


@settings(deadline=None)
@given(st.data())
def test_selection_walks_down_the_ranking_until_the_budget_is_full(data):
    n_sentences, n_heads = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 3))
    row = st.lists(st.integers(0, 6), min_size=n_sentences, max_size=n_sentences)
    lengths = torch.tensor([data.draw(row) for _ in range(n_heads)])
    scores = torch.tensor([data.draw(st.permutations(range(n_sentences))) for _ in lengths]).float()
    room = data.draw(st.integers(0, 40))
    selected = select_rows(scores, lengths, torch.tensor([room]))
    assert torch.equal(select_rows(scores, lengths, room, max(room, 1)), selected)
    for head in range(n_heads):
        left, expected = room, [0] * n_sentences
        for s in sorted(range(n_sentences), key=lambda s: -scores[head, s]):
            expected[s] = min(left, lengths[head, s].item())
            left -= expected[s]
        assert selected[head].tolist() == expected


@pytest.mark.parametrize("settings, message", [
    ({"token_budget": 36, "secondary_sinks": 0},
     "token_budget is 36, must be at least 37: 4 sinks + 32 last tokens + 1"),
    ({"token_budget": 74, "secondary_sinks": 6, "keep_factor": 1, "observation_window": 70},
     "token_budget is 74, must be at least 81: 10 sinks + 70 last tokens + 1"),
    ({"keep_factor": 0.5}, "keep_factor is 0.5, must be at least 1"),
    ({"keep_factor": math.nan}, "keep_factor is nan, must be at least 1"),
    ({"sink_tokens": -1}, "sink_tokens is -1, must be at least 0"),
    ({"secondary_sinks": -1}, "secondary_sinks is -1, must be at least 0"),
    ({"query_decay": 1.5}, "query_decay is 1.5, must be at most 1"),
    ({"recent_window": 0}, "recent_window is 0, must be at least 1"),
    ({"sentence_limit": 0}, "sentence_limit is 0, must be at least 1"),
    ({"score": "best"}, "score is 'best', the choices are mean_query, gaussian, votes"),
])
def test_impossible_settings_are_refused_with_value_and_limit(settings, message):
    with pytest.raises(ValueError) as error:
        SentenceKVConfig(**settings)
    assert str(error.value) == message

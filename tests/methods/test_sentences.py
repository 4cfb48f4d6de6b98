"""Variants of SentenceKV: what a sentence is known by, and how it is scored."""

import pytest
from conftest import random_spans
from methods.conftest import DIM, GROUP, HEADS, N_PROMPT, filled, random_qkv, settings_of


def random_query():
    """Of one token: (H_kv, G, D)"""
    return random_qkv(1, seed=3)[0].view(len(HEADS), GROUP, DIM)


def sentences_of(cache, recording, layer, head):
    """The prompt's sentences without the secondary sinks, in positions. The sinks are found by
    their keys: they are the first rows of place 0, before the first tokens."""
    keys, layer = recording.qkv[layer][1][head].tolist(), cache.layers[layer]
    rows = layer.host.first[: layer.ends[head, 0] - cache.plan.n_first_sinks, head, 0].tolist()
    sentences = [[i for i in range(a, b) if keys[i] not in rows] for a, b in random_spans(N_PROMPT)]
    return list(filter(None, sentences))


@pytest.mark.parametrize("method", ["best_sentences", "two_bit_keys"])
def test_a_row_of_a_sentence_counts_if_it_can_be_selected(recording, method):
    cache, q = filled(method, recording), random_query()
    known = cache.layers[0].known(recording.qkv[0][1])
    window = cache.plan.select_end + cache.plan.n_dropped
    for head, score in enumerate(cache.layers[0].score(q)):
        attention = (q[head] @ known[head].T / DIM**0.5).softmax(dim=-1).mean(dim=0)
        for got, rows in zip(score[1:].tolist(), sentences_of(cache, recording, 0, head)):
            rows = [i for i in rows if cache.plan.n_first_sinks <= i < window]
            expected = attention[rows].sum().item() / max(len(rows), 1)
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_two_bits_a_channel_are_four_values(recording):
    keys = recording.qkv[0][1]
    known = filled("two_bit_keys", recording).layers[0].known(keys)
    assert all(len(channel.unique()) <= 4 for head in known for channel in head.T)
    left = ((known - keys).square().mean() / keys.var(dim=1).mean()).item()
    assert 0.05 < left < 0.2  # 0.1175 for a Gaussian


def test_the_published_settings_are_the_authors(recording):
    config = filled("published", recording).config
    assert (config.score, config.sink_tokens, config.recent_window) == ("mean_query", 32, 32)
    assert (config.keep_factor, config.secondary_sinks, config.query_decay) == (2, 0, 1)
    assert settings_of("published:keep_factor=3")["keep_factor"] == 3

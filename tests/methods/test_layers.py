"""KVSharer's layers share keys and values: against plain loops, one pair of layers at a time."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_llama
from methods.conftest import (DIM, HEADS, N_PROMPT, filled, mean, random_recording, read_by,
                              write, writing)


@pytest.fixture(scope="module")
def model():
    return random_llama(config=replace(TINY, num_hidden_layers=8))


@pytest.fixture(scope="module")
def recording(model):
    return read_by(model)


def mean_of(x):
    """Of the tokens of a layer (H_kv, T, D), in one list."""
    return [channel for head in x.tolist() for channel in mean(head)]


def sources(recording, n_shared):
    """The layer that each layer reads, of all pairs the most distant first."""
    means = [mean_of(k) + mean_of(v) for _, k, v in recording.qkv]
    n_layers = len(means)
    pairs = sorted(((math.dist(means[a], means[b]), a, b)
                    for b in range(n_layers) for a in range(b)), reverse=True)
    source = {}
    for _, earlier, later in pairs:
        taken = later in source or later in source.values() or earlier in source
        if len(source) < n_shared and not taken:
            source[later] = earlier
    return [source.get(layer, layer) for layer in range(n_layers)]


@pytest.mark.parametrize("n_shared", [0, 1, 2, 4, 6, 7, 20])
def test_the_most_distant_layers_share(recording, n_shared):
    cache = filled("kvsharer", recording, n_shared=n_shared)
    assert cache.source == sources(recording, n_shared)


@pytest.mark.parametrize("seed", range(5))
def test_there_are_no_chains_of_layers_among_random_ones(seed):
    recording = random_recording(8, 20, seed=seed)
    cache = filled("kvsharer", recording)
    assert cache.source == sources(recording, 4)
    assert all(cache.source[source] == source for source in cache.source)


def test_four_layers_read_an_unshared_earlier_one_and_hold_nothing(recording):
    cache = filled("kvsharer", recording)
    sharing = [layer for layer, source in enumerate(cache.source) if source != layer]
    assert len(sharing) == 4
    for layer, source in enumerate(cache.source):
        assert source <= layer and cache.source[source] == source
        assert (cache.kv[layer] is None) == (layer in sharing)


def test_a_shared_layer_reads_the_earlier_one_s_tokens_and_the_new_one(recording):
    cache = filled("kvsharer", recording)
    for n_tokens, seen in enumerate(writing(cache, recording, 3), N_PROMPT + 1):
        for layer, source in enumerate(cache.source):
            (_, *expected), (_, (*got, mask)) = seen[source][0], seen[layer]
            assert all(map(torch.equal, got, expected)) and mask is None
        assert cache.cost() == (n_tokens * 4 / 8, 0, n_tokens, n_tokens * 4 / 8)
    numbers = sum(kv.numel() for kv in cache.kv if kv is not None)
    assert cache.cost().held == numbers / (8 * len(HEADS) * 2 * DIM)


def test_where_no_layer_shares_the_states_are_the_full_cache_s(model, recording):
    expected = write(model, filled("full", recording))
    got = write(model, filled("kvsharer", recording, n_shared=0))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)

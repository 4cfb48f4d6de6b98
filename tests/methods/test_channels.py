"""ThinK keeps fewer channels of each key: against plain loops, one head, one token, one channel at
a time."""

import math
from fractions import Fraction

import pytest
import torch
from methods.conftest import (BUDGET, GROUP, HEADS, LAYERS, N_PROMPT, ROOM, WINDOW, assert_keeps,
                              attending, best, filled, random_recording, window_scores,
                              writing)


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
        channels.append(best(scores, round(0.6 * k.shape[-1])))
    return channels


@pytest.mark.parametrize("dim", [8, 10], ids=["8 channels", "10 channels"])
def test_think_multiplies_the_kept_channels_of_all_but_the_latest(dim):
    recording = random_recording(dim=dim)
    seen = next(writing(filled("think", recording), recording))
    for (q, k, v), (keys, values, _) in seen:  # all heads hold as many: there is no mask
        channels = kept_channels(q[:, :N_PROMPT], k[:, :N_PROMPT])
        for head in HEADS:
            known = v[head].tolist()
            for key, value in zip(keys[head], values[head].tolist()):
                at = known.index(value)
                used = channels[head] if at < N_PROMPT - WINDOW else range(dim)
                for query in q[head * GROUP : head * GROUP + GROUP, -1]:
                    expected = sum(query[channel] * k[head, at, channel] for channel in used)
                    torch.testing.assert_close(query @ key, expected, rtol=1e-4, atol=1e-5)


def test_think_keeps_as_many_tokens_as_fit_in_fewer_bytes():
    recording = random_recording(dim=10)  # 60 % of them are a whole number
    size = Fraction(4, 5)  # all channels of the value, and 60 % of the key's
    kept = [[best(scores, math.floor(ROOM / size)) for scores in window_scores(q, k)]
            for q, k, _ in recording.qkv]
    assert_keeps(filled("think", recording), recording, kept, [[BUDGET] * len(HEADS)] * LAYERS,
                 found_by=(2,), size=size)


# Not of 8 channels: 60 % of them are rounded up to 5, and a kept token takes 81 % of the bytes.
@pytest.mark.slow
@pytest.mark.parametrize("channels", [10, 64])
@pytest.mark.parametrize("budget", [40, 57, BUDGET, 101])
def test_think_never_holds_more_bytes_than_its_budget(channels, budget):
    recording = random_recording(dim=channels)
    cache = filled("think", recording, budget)
    kept = round(0.6 * channels) + channels  # numbers of a token that is not one of the latest
    for seen in attending(cache, recording, found_by=(2,)):
        heads = [head for layer in seen for head in layer]
        numbers = sum(kept if i < N_PROMPT - WINDOW else 2 * channels
                      for head in heads for i in head)
        assert numbers / (2 * channels * len(heads)) <= cache.cost().held + 1e-4
        assert cache.cost().held <= budget

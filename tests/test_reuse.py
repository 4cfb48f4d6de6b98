"""The oracles of tests/test_cache.py with layers that take over another layer's choice."""

import doctest
from dataclasses import replace

import pytest
import test_cache
import torch
from conftest import TINY, random_llama
from test_cache import REUSED, SMALL, random_ids, sentencekv_cache, slow_cache, write

from sentencekv import SentenceKVConfig
from support import largest, reuse


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.setattr(test_cache, "SMALL", REUSED)


@pytest.mark.parametrize("oracle, arguments", [
    ("a_second_text_is_read_and_remembered", (40, float("inf"), 3)),
    ("a_second_text_is_read_and_remembered", (1024, float("inf"), 1)),
    ("offloaded_is_resident_and_the_difference_is_everything", (1, {"reuse_layers": 2})),
    ("offloaded_is_resident_and_the_difference_is_everything",
     (float("inf"), {"reuse_layers": 2})),
])
def test_the_oracles_hold(tiny, device, oracle, arguments):
    getattr(test_cache, f"test_{oracle}")(tiny, device, *arguments)


@pytest.mark.parametrize("keep_factor", [2.5, float("inf")])
def test_after_going_back_all_is_as_the_first_time(tiny, device, keep_factor, monkeypatch):
    test_cache.test_after_going_back_all_is_as_the_first_time(tiny, device, keep_factor,
                                                              monkeypatch)


@pytest.mark.parametrize("n", [2, 3, 99])
def test_the_first_of_n_layers_chooses_for_all(device, n, monkeypatch):
    monkeypatch.setattr(test_cache, "TINY", replace(TINY, num_hidden_layers=5))
    model = random_llama(device, test_cache.TINY)
    config = SentenceKVConfig(**SMALL | {"reuse_layers": n})
    caches = [sentencekv_cache(config, 300, device), slow_cache(config, 300)]
    for ours, slow in write(model, caches, 300):
        torch.testing.assert_close(ours, slow, rtol=0, atol=1e-4)


def test_only_anchors_hold_vectors(tiny, device):
    parts = []
    for n in (1, 2):
        config = SentenceKVConfig(**SMALL | {"reuse_layers": n})
        cache = sentencekv_cache(config, 300, device)
        tiny.prefill(random_ids(300, device), cache)
        parts.append(cache.report()["device_kv_parts"])
    assert parts[1]["sentence vectors"] == parts[0]["sentence vectors"] / 2
    assert parts[1]["slots"] == parts[0]["slots"]


def test_the_examples_are_right():
    assert doctest.testmod(reuse).failed == doctest.testmod(largest).failed == 0


@pytest.mark.parametrize("n", [1, 7, 24, 25, 26, 49, 50])
def test_the_largest_are_those_of_topk(n):
    scores = torch.randn(3, 50)
    scores[:, 4], scores[:, 9] = float("inf"), -float("inf")
    assert torch.equal(largest.largest(scores, n), scores.topk(n, dim=-1).indices)

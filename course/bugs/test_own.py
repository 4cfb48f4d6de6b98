"""Oracle 2 on a small model of random weights: a test of your own begins with a copy of this file.

`python -m course.bugs FILE` says how many of the planted bugs it catches.
"""

import torch
from conftest import TINY, random_ids, random_llama, random_spans

from cache import SentenceKVCache
from model import FullCache
from sentencekv import SentenceKVConfig


def test_a_budget_for_everything_is_full_attention():
    model, ids = random_llama(), random_ids(80, "cpu")
    config = SentenceKVConfig(token_budget=100, kv_bits=16)
    full = FullCache(TINY, 80, "cpu", torch.float32)
    ours = SentenceKVCache(config, TINY, 80, "cpu", torch.float32)
    ours.expect(random_spans(60))
    for cache in (full, ours):
        model.prefill(ids[:60], cache)
    for i in range(60, 75):  # no sentence is sealed
        outputs = [model.decode(ids[i : i + 1], cache) for cache in (full, ours)]
        assert torch.allclose(*outputs, atol=1e-4)

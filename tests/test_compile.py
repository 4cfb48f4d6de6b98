"""The oracles of tests/test_cache.py once more, with a step that `torch.compile` has compiled."""

import math
from copy import copy

import pytest
import test_cache
import torch
from conftest import random_llama
from test_cache import LEAST, SHORT, SMALL

from cache import SentenceKVCache


class Compiled:
    """A model that decodes with its compiled step, for a cache that selects."""

    def __init__(self, model):
        torch.compiler.reset()
        self.plain, self.fast = model, copy(model)
        self.fast.compile_step()
        self.embed_tokens, self.prefill = model.embed_tokens, model.prefill

    def decode(self, ids, cache):
        return (self.fast if isinstance(cache, SentenceKVCache) else self.plain).decode(ids, cache)


@pytest.mark.parametrize("oracle, arguments", [
    ("a_budget_for_everything_is_full_attention", (70, "gaussian")),
    ("a_small_budget_selects_what_the_slow_way_selects", (300, 15, SMALL, math.inf, "gaussian")),
    ("a_small_budget_selects_what_the_slow_way_selects", (300, 15, LEAST, 1, "votes")),
    ("a_small_budget_selects_what_the_slow_way_selects", (300, 15, SMALL, 2.5, "mean_query")),
    ("offloaded_is_resident_and_the_difference_is_everything", (math.inf, SHORT)),
    ("what_is_not_selected_takes_no_part_in_attention", (SHORT,)),
    ("a_second_text_is_read_and_remembered", (40, math.inf, 3)),
])
def test_the_oracles_hold(tiny, device, oracle, arguments):
    getattr(test_cache, f"test_{oracle}")(Compiled(tiny), device, *arguments)

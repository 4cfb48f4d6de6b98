import json
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import REFERENCE, TINY, greedy, random_ids, random_llama

from model import FullCache
from support.attention import causal_attention
from weights.checkpoint import load_model
from weights.tokenizer import Tokenizer

CPU = torch.device("cpu")


def full_cache(model, n_tokens):
    weight = model.embed_tokens.weight
    return FullCache(model.config, n_tokens, weight.device, weight.dtype)


def all_logits(model, ids):
    return model.logits(model.prefill(ids, full_cache(model, len(ids))))


@pytest.mark.parametrize("name", sorted(folder.name for folder in REFERENCE.glob("tiny_*")))
def test_logits_equal_an_independent_implementation(name):
    expected = json.loads((REFERENCE / name / "expected.json").read_text())
    model = load_model(REFERENCE / name, CPU, torch.float32)
    logits = all_logits(model, torch.tensor(expected["ids"]))
    for position, key in ((100, "logits_at_100"), (-1, "last_logits")):
        torch.testing.assert_close(logits[position], torch.tensor(expected[key]), rtol=0, atol=1e-4)


def test_decoding_one_by_one_equals_one_forward(tiny, device):
    ids = random_ids(60, device)
    expected = all_logits(tiny, ids)
    for n_prompt in (1, 40):
        cache = full_cache(tiny, 60)
        states = [tiny.prefill(ids[:n_prompt], cache)]
        states += [tiny.decode(ids[i : i + 1], cache) for i in range(n_prompt, 60)]
        torch.testing.assert_close(tiny.logits(torch.cat(states)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_new", [1, 5, 39, 40])
def test_new_tokens_attend_to_all_before_them_and_to_themselves(n_new):
    """In blocks, the last one shorter; two query heads share a key."""
    generator = torch.Generator().manual_seed(n_new)
    q, keys, values = (torch.randn(h, 40, 8, generator=generator) for h in (4, 2, 2))
    found = causal_attention(q[:, 40 - n_new :], keys, values, block=16)
    for head, i in product(range(4), range(40 - n_new, 40)):
        weights = (keys[head // 2, : i + 1] @ q[head, i] / 8**0.5).softmax(0)
        expected = weights @ values[head // 2, : i + 1]
        torch.testing.assert_close(found[head, i - (40 - n_new)], expected)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("on_intel", [False, True])
def test_a_token_alone_is_what_it_is_among_others(dtype, atol, n_threads, on_intel, monkeypatch):
    """Its projections are computed in another way, on CPUs. In float32, each thread computes a
    block of rows, except on Intel's processors."""
    monkeypatch.setattr("support.linear.ON_INTEL", on_intel)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        config = replace(TINY, attention_bias=True, o_proj_bias=True, mlp_bias=True)
        model = random_llama(config=config).to(dtype)
        ids, cache = random_ids(60, CPU), full_cache(model, 60)
        model.prefill(ids[:59], cache)
        alone = model.logits(model.decode(ids[59:], cache))[0]
        torch.testing.assert_close(alone, all_logits(model, ids)[-1], rtol=0, atol=atol)
    finally:
        torch.set_num_threads(before)
    assert torch.backends.mkldnn.enabled  # which is switched off for a while


def test_default_model_continues_like_the_reference(default_model, reference):
    for case in reference["greedy"]:
        logits, written = greedy(default_model, case["ids"], len(case["continuation"]))
        for token, value in case["next_logits_top8"]:
            assert logits[0, token].item() == pytest.approx(value, abs=1e-3)
        assert written == case["continuation"]


@pytest.mark.slow
def test_default_model_reads_a_book_like_the_reference(default_model, default_folder, reference):
    text = (REFERENCE / "walden_passage.txt").read_text(encoding="utf-8")
    expected = reference["perplexity"]
    ids = Tokenizer(default_folder).encode(text, add_bos=False)[: expected["first_tokens"]]
    ids = torch.tensor(ids)
    loss = F.cross_entropy(all_logits(default_model, ids)[:-1], ids[1:])
    assert loss.item() == pytest.approx(expected["mean_nll"], abs=1e-3)

import math

import pytest
import torch
from conftest import TINY, random_ids, random_llama, random_spans

from benchmarks.baselines import BASELINES, METHODS, PyramidKV, Recording, make_cache

BUDGET, N_PROMPT, WINDOW = 72, 150, 32


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def recording(model):
    recording = Recording()
    model.prefill(random_ids(N_PROMPT, "cpu"), recording)
    return recording


def new_cache(method):
    return make_cache(method, TINY, BUDGET, random_spans(N_PROMPT), 60)


def write(model, cache, n_new=50):
    ids = random_ids(N_PROMPT + n_new, "cpu")[N_PROMPT:]
    return torch.cat([model.decode(ids[i : i + 1], cache) for i in range(n_new)])


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_prefill_answers_like_a_prefill_alone(model, recording, method):
    alone = new_cache(method)
    model.prefill(random_ids(N_PROMPT, "cpu"), alone)
    shared = recording.replay(new_cache(method))
    assert torch.equal(write(model, alone), write(model, shared))


def attended(cache, layer, head, keys, q, k, v):
    """Positions that a head attends to when the next token is q, k, v, found by their keys."""
    got, _, mask = cache.decode(layer, q, k, v)
    got = got[head] if mask is None else got[head][mask[head, 0]]
    everything = torch.cat((keys, k), dim=1)[head]
    return sorted((everything == row).all(-1).nonzero().item() for row in got)


def random_token(step):
    generator = torch.Generator().manual_seed(step)
    shapes = (TINY.num_attention_heads, TINY.num_key_value_heads, TINY.num_key_value_heads)
    return [torch.randn(heads, 1, TINY.head_dim, generator=generator) for heads in shapes]


def window_attention(q, k, queries):
    """Attention that some queries pay to every token, averaged over the group, one by one."""
    received = torch.zeros(k.shape[:2])
    group = len(q) // len(k)
    for head in range(len(q)):
        for i in queries:
            logits = k[head // group, : i + 1] @ q[head, i] / math.sqrt(q.shape[-1])
            received[head // group, : i + 1] += logits.softmax(0) / group
    return received


def best(scores, n):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]


def expected_positions(method, layer, layers, head):
    """What each method's definition keeps of the prompt, besides the window."""
    q, k, _ = layers[layer]
    n_earlier, room = N_PROMPT - WINDOW, BUDGET - WINDOW - 1  # the new token takes one place
    queries = range(n_earlier, N_PROMPT)
    if method == "streamingllm":
        return [0, 1, 2, 3, *range(n_earlier - (room - 4), n_earlier)]
    if method == "l2norm":
        return best([-k[head, i].norm().item() for i in range(n_earlier)], room)
    if method == "snapkv":
        received = window_attention(q, k, queries)[head, :n_earlier].tolist()
        pooled = [max(received[max(0, i - 3) : i + 4]) for i in range(n_earlier)]
        return best(pooled, room)
    if method == "chunkkv":
        q, k, _ = layers[layer - layer % 2]  # the choice of the layer before is used again
        received = window_attention(q, k, queries)[:, :n_earlier].sum(0).tolist()
        chunks = [range(a, min(a + 10, n_earlier)) for a in range(0, n_earlier, 10)]
        ranked = best([sum(received[i] for i in chunk) for chunk in chunks], len(chunks))
        return [i for c in ranked for i in chunks[c]][:room]
    if method == "h2o":
        half = BUDGET // 2
        received = window_attention(q, k, range(N_PROMPT))[head].tolist()
        # With the new token the latest half begins one later, so its first may have to go.
        heavy = [*best(received[: N_PROMPT - half], BUDGET - half), N_PROMPT - half]
        heavy.remove(min(heavy, key=lambda i: received[i]))
        return [*heavy, *range(N_PROMPT - half + 1, n_earlier)]
    raise AssertionError(method)


@pytest.mark.parametrize("method", ["streamingllm", "l2norm", "snapkv", "chunkkv", "h2o"])
def test_each_method_keeps_what_its_definition_says(recording, method):
    for head in range(TINY.num_key_value_heads):
        cache = recording.replay(new_cache(method))
        for layer in range(TINY.num_hidden_layers):
            token = random_token(layer)
            got = attended(cache, layer, head, recording.layers[layer][1], *token)
            kept = expected_positions(method, layer, recording.layers, head)
            assert got == sorted({*kept, *range(N_PROMPT - WINDOW, N_PROMPT + 1)})


def test_quest_reads_the_pages_whose_bound_is_highest(recording):
    q, k, v = random_token(3)
    for head in range(TINY.num_key_value_heads):
        cache = recording.replay(new_cache("quest"))
        keys = recording.layers[0][1]
        group = q[3 * head : 3 * head + 3, 0]
        bounds = []
        for page in range(N_PROMPT // 16):
            rows = keys[head, 16 * page : 16 * page + 16]
            low, high = rows.amin(0), rows.amax(0)
            bounds.append(sum(sum(max(a * b, a * c) for a, b, c in zip(one, low, high))
                              for one in group).item())
        last = N_PROMPT // 16 * 16
        pages = best(bounds, (BUDGET - (N_PROMPT + 1 - last)) // 16)
        expected = [i for p in pages for i in range(16 * p, 16 * p + 16)]
        got = attended(cache, 0, head, keys, q, k, v)
        assert got == sorted([*expected, *range(last, N_PROMPT + 1)])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "full"])
def test_no_head_attends_to_more_than_the_budget(recording, method):
    cache = recording.replay(new_cache(method))
    counts = [[] for _ in range(TINY.num_hidden_layers)]
    for step in range(50):
        for layer in range(TINY.num_hidden_layers):
            keys, _, mask = cache.decode(layer, *random_token(step))
            n = keys.shape[1] if mask is None else mask.sum(dim=-1).max().item()
            counts[layer].append(n)
        cache.advance(1)
        if step % 10 == 9:
            cache.seal(10)
    mean = sum(map(max, counts)) / len(counts)
    assert mean <= BUDGET
    assert min(map(min, counts)) >= (BUDGET - 16 if method == "quest" else WINDOW)


@pytest.mark.parametrize("method, least", [("streamingllm", 4), ("snapkv", BUDGET // 2)])
def test_the_prompt_s_best_tokens_outlast_a_long_text(recording, method, least):
    cache = recording.replay(new_cache(method))
    for step in range(100):
        keys = cache.decode(0, *random_token(step))[0]
        cache.advance(1)
    prompt = recording.layers[0][1][0]
    left = sum((prompt == key).all(-1).any().item() for key in keys[0])
    assert left == least and keys.shape[1] == BUDGET


def test_pyramid_budgets_shrink_and_add_up():
    config = type("Config", (), {"num_hidden_layers": 30, "num_key_value_heads": 3, "head_dim": 64})
    cache = PyramidKV(config, 384)
    budgets = [cache.layer_budget(layer) for layer in range(30)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] > 2 * budgets[-1]
    assert sum(budgets) == pytest.approx(30 * 384, abs=15)


def test_a_budget_for_everything_is_full_attention(model, recording):
    expected = write(model, recording.replay(new_cache("full")))
    for method in METHODS:
        if method not in ("full", "pyramidkv"):  # a pyramid gives its last layers little
            cache = make_cache(method, TINY, 800, random_spans(N_PROMPT), 60)
            got = write(model, recording.replay(cache))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method 'magic' is not one of full, streamingllm"):
        make_cache("magic", TINY, 100, [(0, 10)], 5)
    assert set(BASELINES) < set(METHODS)

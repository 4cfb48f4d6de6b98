import math

import pytest
import torch
from conftest import TINY, random_ids, random_llama, random_spans

from benchmarks.baselines import (
    BASELINES,
    METHODS,
    PyramidKV,
    Recording,
    make_cache,
    settings_of,
)
from model import apply_rope, rope_table

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
    return make_cache(method, TINY, BUDGET, random_spans(N_PROMPT), 60, **settings_of(method))


def write(model, cache, n_new=50):
    """In sentences of 10 tokens."""
    states = []
    for i, token in enumerate(random_ids(N_PROMPT + n_new, "cpu")[N_PROMPT:]):
        if i and i % 10 == 0:
            cache.seal(10)
        states.append(model.decode(token[None], cache))
    return torch.cat(states)


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
    if method == "expected_attention":
        return best(expected_attention(q, k, layers[layer][2], head)[:n_earlier], room)
    if method == "h2o":
        half = BUDGET // 2
        received = window_attention(q, k, range(N_PROMPT))[head].tolist()
        # With the new token the latest half begins one later, so its first may have to go.
        heavy = [*best(received[: N_PROMPT - half], BUDGET - half), N_PROMPT - half]
        heavy.remove(min(heavy, key=lambda i: received[i]))
        return [*heavy, *range(N_PROMPT - half + 1, n_earlier)]
    raise AssertionError(method)


def expected_attention(q, k, v, head):
    """The score of every token for a KV head, one position and one query head at a time."""
    dim, group = q.shape[-1], len(q) // len(k)
    cos, sin = rope_table(TINY, torch.arange(N_PROMPT + 512), torch.float32)
    turns = [apply_rope(torch.eye(dim), *at).T for at in zip(cos[:, None], sin[:, None])]
    later = sum(turns[N_PROMPT:]) / 512
    total = torch.zeros(N_PROMPT - 4)
    for query_head in range(head * group, (head + 1) * group):
        queries = torch.stack([turns[i].T @ q[query_head, i] for i in range(4, N_PROMPT)])
        mean, covariance = queries.mean(0), torch.cov(queries.T, correction=0)
        mean, covariance = later @ mean, later @ covariance @ later.T
        total += torch.stack([key @ mean / dim**0.5 + key @ covariance @ key / (2 * dim)
                              for key in k[head, 4:]]).softmax(0) / group
    return [math.inf] * 4 + [a * b.norm().item() for a, b in zip(total.tolist(), v[head, 4:])]


@pytest.mark.parametrize("method", [
    "streamingllm", "l2norm", "snapkv", "chunkkv", "h2o", "expected_attention"])
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


def test_shadowkv_reads_outliers_and_the_chunks_whose_landmarks_match(recording):
    q, k, v = random_token(3)
    for head in range(TINY.num_key_value_heads):
        cache = recording.replay(new_cache("shadowkv"))
        keys = recording.layers[0][1]
        n_chunks, last = N_PROMPT // 8, N_PROMPT // 8 * 8
        chunks = [keys[head, 8 * i : 8 * i + 8] for i in range(n_chunks)]
        landmarks = torch.stack([chunk.mean(0) for chunk in chunks])
        least = [min(torch.cosine_similarity(key, landmark, dim=0).item() for key in chunk)
                 for chunk, landmark in zip(chunks, landmarks)]
        always = [*best([-x for x in least[:-4]], round(BUDGET * 24 / 1024)),
                  *range(n_chunks - 4, n_chunks)]
        others = [i for i in range(n_chunks) if i not in always]
        logits = q[3 * head : 3 * head + 3, 0] @ landmarks[others].T / math.sqrt(keys.shape[-1])
        shares = [math.inf] * n_chunks
        for i, share in zip(others, logits.softmax(dim=-1).amax(dim=0).tolist()):
            shares[i] = share
        expected = [i for c in best(shares, (BUDGET - (N_PROMPT + 1 - last)) // 8)
                    for i in range(8 * c, 8 * c + 8)]
        got = attended(cache, 0, head, keys, q, k, v)
        assert got == sorted([*expected, *range(last, N_PROMPT + 1)])


def test_the_best_tokens_are_those_attended_to_most(recording):
    q, k, v = random_token(3)
    for head in range(TINY.num_key_value_heads):
        cache, keys = recording.replay(new_cache("best_tokens")), recording.layers[1][1]
        everything = torch.cat((keys, k), dim=1)
        logits = q[3 * head : 3 * head + 3, 0] @ everything[head].T / math.sqrt(keys.shape[-1])
        expected = best(logits.softmax(dim=-1).mean(dim=0).tolist(), BUDGET)
        assert attended(cache, 1, head, keys, q, k, v) == sorted(expected)


def test_quest_may_read_everything_in_its_first_two_layers(recording):
    cache = recording.replay(new_cache("quest_dense"))
    assert cache.decode(1, *random_token(1))[0].shape[1] == N_PROMPT + 1
    cache.dense_layers = 1
    plain = recording.replay(new_cache("quest"))
    for ours, theirs in zip(cache.decode(1, *random_token(2))[:2], plain.decode(
            1, *random_token(2))[:2]):
        assert ours.shape[1] == theirs.shape[1] + 1  # the token of the step before


def test_the_second_vector_is_the_key_farthest_from_the_mean(recording):
    cache, spans = recording.replay(new_cache("two_vectors")), random_spans(N_PROMPT)
    keys = recording.layers[1][1]
    for head in range(TINY.num_key_value_heads):
        secondary = {tuple(row.tolist()) for row in cache.host.first[
            1, : cache.table.n_secondary[1, head], head, 0]}
        sentences = [[key for key in keys[head, a:b] if tuple(key.tolist()) not in secondary]
                     for a, b in spans]
        for i, rows in enumerate(filter(None, sentences)):
            mean = torch.stack(rows).mean(dim=0)
            expected = max(rows, key=lambda key: (key - mean).norm().item())
            assert torch.equal(cache.farthest[1][head, i], expected)


def test_the_second_vector_counts_as_one_token(recording):
    cache, (q, _, _) = recording.replay(new_cache("two_vectors")), random_token(3)
    table, scale = cache.table, TINY.head_dim**0.5
    for head, score in enumerate(cache.score(0, q.view(TINY.num_key_value_heads, 3, -1))):
        lengths = table.lengths[0, head]
        lengths = lengths[lengths > 0]  # empty sentences are last
        expected = torch.zeros(len(lengths))
        for one in q[3 * head : 3 * head + 3, 0] / scale:
            attention = []
            for s, n in enumerate(lengths):
                mean = one @ table.vectors[0, head, s] + one @ one * table.variances[0, head, s] / 2
                attention.append((n - 1) * mean.exp() + (one @ cache.farthest[0][head, s]).exp())
            expected += torch.stack(attention) / sum(attention)
        torch.testing.assert_close(score[: len(lengths)], expected / lengths)


@pytest.mark.parametrize("method", ["best_sentences", "two_bit_keys"])
def test_a_row_of_a_sentence_counts_if_it_can_be_selected(recording, method):
    cache, (q, _, _) = recording.replay(new_cache(method)), random_token(3)
    known = cache.known(0, recording.layers[0][1])
    for head, score in enumerate(cache.score(0, q.view(TINY.num_key_value_heads, 3, -1))):
        secondary = {tuple(row.tolist()) for row in cache.host.first[
            0, : cache.table.n_secondary[0, head], head, 0]}
        keys = recording.layers[0][1][head]
        sentences = [[i for i in range(a, b) if tuple(keys[i].tolist()) not in secondary]
                     for a, b in random_spans(N_PROMPT)]
        logits = q[3 * head : 3 * head + 3, 0] @ known[head].T / TINY.head_dim**0.5
        attention = logits.softmax(dim=-1).mean(dim=0)
        for got, rows in zip(score.tolist(), filter(None, sentences)):
            rows = [i for i in rows if cache.n_sinks <= i < cache.recent_start]
            expected = attention[rows].sum().item() / max(len(rows), 1)
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_two_bits_a_channel_are_four_values(recording):
    cache = recording.replay(new_cache("two_bit_keys"))
    keys = recording.layers[0][1]
    known = cache.known(0, keys)
    assert all(len(channel.unique()) <= 4 for head in known for channel in head.T)
    left = ((known - keys).square().mean() / keys.var(dim=1).mean()).item()
    assert 0.05 < left < 0.2  # 0.1175 for a Gaussian


def test_the_published_settings_are_the_paper_s():
    config = new_cache("published").config
    assert (config.score, config.sink_tokens, config.recent_window) == ("mean_query", 32, 32)
    assert (config.keep_factor, config.secondary_sinks, config.query_decay) == (2, 0, 1)
    assert settings_of("published:keep_factor=3")["keep_factor"] == 3


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("full", "quest_dense")])
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
    most = list(map(max, counts))
    # A pyramid's layers share the budgets of all of them.
    assert (sum(most) / len(most) if method == "pyramidkv" else max(most)) <= BUDGET
    assert min(map(min, counts)) >= (BUDGET - 16 if method in ("quest", "shadowkv") else WINDOW)


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
            cache = make_cache(method, TINY, 800, random_spans(N_PROMPT), 60, **settings_of(method))
            got = write(model, recording.replay(cache))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method 'magic' is not one of full, streamingllm"):
        make_cache("magic", TINY, 100, [(0, 10)], 5)
    assert set(BASELINES) < set(METHODS)
    with pytest.raises(ValueError, match="method 'two_vectors' has a score of its own"):
        make_cache("two_vectors", TINY, 100, [(0, 10)], 5, score="gaussian")

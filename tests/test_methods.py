import doctest
import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_ids, random_llama, random_spans

from benchmarks.methods import (
    METHODS,
    PUBLISHED,
    cost,
    has_budget,
    make_cache,
    precision,
    reads_on,
    settings_of,
    try_out,
)
from benchmarks.methods.base import Evicting, Recording
from benchmarks.methods.budgets import PyramidKV
from cache import LayerCache
from model import apply_rope, rope_table
from support.table import make_room

BUDGET, N_PROMPT, WINDOW = 72, 150, 32
MHA = replace(TINY, num_attention_heads=4, num_key_value_heads=4)
# So many tokens may be left of a budget: pages are whole, and shares are rounded down.
COARSE = {"quest": 16, "shadowkv": 8, "arkvale": 32, "actqkv": 40, "adakv": 1, "duo_heads": 2,
          "think": 2, "snapkv_4bit": 4,
          "pyramidkv": 4}
# A budget for everything is not everything: channels or bits are lost, or a layer gets little.
LOSSY = {"pyramidkv", "windowkv", "think", "snapkv_4bit", "sentencekv", "sentencekv_4bit",
         "kvsharer", "dbudgetkv"}
MADE_UP = ("retroinfer", "less", "think", "snapkv_4bit", "kvmerger", "sentencekv_4bit")  # keys


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


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_shared_prefill_answers_like_a_prefill_alone(model, recording, method):
    alone = new_cache(method)
    model.prefill(random_ids(N_PROMPT, "cpu"), alone)
    shared = recording.replay(new_cache(method))
    assert torch.equal(write(model, alone), write(model, shared))


def attended(cache, layer, head, keys, q, k, v):
    """Positions that a head attends to when the next token is q, k, v, found by their keys."""
    got, _, mask = cache.layers[layer].decode(q, k, v)
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
            got = attended(cache, layer, head, recording.qkv[layer][1], *token)
            kept = expected_positions(method, layer, recording.qkv, head)
            assert got == sorted({*kept, *range(N_PROMPT - WINDOW, N_PROMPT + 1)})


def test_quest_reads_the_pages_whose_bound_is_highest(recording):
    q, k, v = random_token(3)
    for head in range(TINY.num_key_value_heads):
        cache = recording.replay(new_cache("quest"))
        keys = recording.qkv[0][1]
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
        keys = recording.qkv[0][1]
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
        cache, keys = recording.replay(new_cache("best_tokens")), recording.qkv[1][1]
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


def secondary_sinks(cache, layer, head):
    """Their keys: the first rows of place 0, before the first tokens."""
    layer, n_sinks = cache.layers[layer], cache.plan.n_first_sinks
    rows = layer.host.first[: layer.ends[head, 0] - n_sinks, head, 0]
    return {tuple(row.tolist()) for row in rows}


def test_the_second_vector_is_the_key_farthest_from_the_mean(recording):
    cache, spans = recording.replay(new_cache("two_vectors")), random_spans(N_PROMPT)
    keys = recording.qkv[1][1]
    for head in range(TINY.num_key_value_heads):
        secondary = secondary_sinks(cache, 1, head)
        sentences = [[key for key in keys[head, a:b] if tuple(key.tolist()) not in secondary]
                     for a, b in spans]
        for i, rows in enumerate(filter(None, sentences)):
            mean = torch.stack(rows).mean(dim=0)
            expected = max(rows, key=lambda key: (key - mean).norm().item())
            assert torch.equal(cache.layers[1].farthest[head, 1 + i], expected)


def test_the_second_vectors_have_as_many_places_as_the_table(recording):
    cache = recording.replay(new_cache("two_vectors"))
    before, n_places = cache.layers[0].farthest.clone(), cache.plan.n_places
    make_room(cache.layers, before.shape[1] + 1)
    layer = cache.layers[0]
    assert layer.farthest.shape == layer.vectors.shape != before.shape
    assert torch.equal(layer.farthest[:, :n_places], before[:, :n_places])


def test_the_second_vector_counts_as_one_token(recording):
    cache, (q, _, _) = recording.replay(new_cache("two_vectors")), random_token(3)
    layer, scale = cache.layers[0], TINY.head_dim**0.5
    grouped = q.view(TINY.num_key_value_heads, 3, -1)
    for head, score in enumerate(layer.score(grouped)):
        lengths = layer.lengths[head, 1:]
        lengths = lengths[lengths > 0]  # empty sentences are last
        expected = torch.zeros(len(lengths))
        for one in q[3 * head : 3 * head + 3, 0] / scale:
            attention = []
            for s, n in enumerate(lengths, start=1):
                mean = one @ layer.vectors[head, s] + one @ one * layer.variances[head, s] / 2
                attention.append((n - 1) * mean.exp() + (one @ layer.farthest[head, s]).exp())
            expected += torch.stack(attention) / sum(attention)
        assert score[0] == 0  # of all sinks
        torch.testing.assert_close(score[1 : 1 + len(lengths)], expected / lengths)


def test_two_levels_score_the_sentences_of_the_best_paragraphs(recording):
    cache, (q, _, _) = recording.replay(new_cache("two_level")), random_token(3)
    layer, n = cache.layers[1], cache.plan.n_places - 1
    layer.group, layer.n_best = 3, 2
    q = q.view(TINY.num_key_value_heads, 3, -1)
    everywhere = LayerCache.score(layer, q)
    for head, score in enumerate(layer.score(q)):
        n_secondary = layer.ends[head, 0].long() - cache.plan.n_first_sinks
        lengths = layer.lengths[head, 1 : 1 + n].long()
        bounds = [n_secondary, *(n_secondary + lengths.cumsum(0))]
        keys = layer.host.read(0, cache.plan.open_row)[head, :, 0]
        parts = [keys[bounds[a] : bounds[min(a + 3, n)]] for a in range(0, n, 3)]
        shares = [0.0] * len(parts)
        for one in q[head]:
            each = [(one @ part.mean(dim=0) / 8**0.5 + one @ one / 16
                     * (part - part.mean(dim=0)).square().mean()).exp() for part in parts]
            total = sum(len(part) * x for part, x in zip(parts, each))
            shares = [share + x / total for share, x in zip(shares, each)]
        firsts = sorted(range(len(shares)), key=lambda i: -shares[i])[:2]
        assert {i // 3 for i, x in enumerate(score[1 : 1 + n]) if x > 0} == set(firsts)
        inside = [1 + i for i in range(n) if i // 3 in firsts]
        assert torch.equal(score[inside], everywhere[head, inside])


def test_boxes_score_the_sentences_of_the_groups_that_allow_most(recording):
    cache, (q, _, _) = recording.replay(new_cache("boxes")), random_token(3)
    layer, n = cache.layers[1], cache.plan.n_places - 1
    layer.group, layer.share = 2, 0.5
    q = q.view(TINY.num_key_value_heads, 3, -1)
    everywhere = LayerCache.score(layer, q)
    for head, score in enumerate(layer.score(q)):
        used = [s for s in range(n) if layer.lengths[head, 1 + s] > 0]  # empty ones are last
        groups = [used[a : a + 2] for a in range(0, len(used), 2)]
        allowed = []
        for group in groups:
            box = layer.vectors[head, [1 + s for s in group]]
            allowed.append(max(sum(max(x * low, x * high) for x, low, high in zip(
                one.tolist(), box.amin(dim=0).tolist(), box.amax(dim=0).tolist()))
                for one in q[head]))
        order = sorted(range(1, len(groups) - 1), key=lambda i: -allowed[i])
        opened = {0, len(groups) - 1, *order[: math.ceil(len(groups) / 2) - 2]}
        inside = [1 + s for i in sorted(opened) for s in groups[i]]
        assert torch.equal(score[inside], everywhere[head, inside])
        assert (score > 0).sum() == len(inside)


@pytest.mark.parametrize("method", ["best_sentences", "two_bit_keys"])
def test_a_row_of_a_sentence_counts_if_it_can_be_selected(recording, method):
    cache, (q, _, _) = recording.replay(new_cache(method)), random_token(3)
    known = cache.layers[0].known(recording.qkv[0][1])
    grouped = q.view(TINY.num_key_value_heads, 3, -1)
    for head, score in enumerate(cache.layers[0].score(grouped)):
        secondary = secondary_sinks(cache, 0, head)
        keys = recording.qkv[0][1][head]
        sentences = [[i for i in range(a, b) if tuple(keys[i].tolist()) not in secondary]
                     for a, b in random_spans(N_PROMPT)]
        logits = q[3 * head : 3 * head + 3, 0] @ known[head].T / TINY.head_dim**0.5
        attention = logits.softmax(dim=-1).mean(dim=0)
        window = cache.plan.select_end + cache.plan.n_dropped
        for got, rows in zip(score[1:].tolist(), filter(None, sentences)):
            rows = [i for i in rows if cache.plan.n_first_sinks <= i < window]
            expected = attention[rows].sum().item() / max(len(rows), 1)
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_two_bits_a_channel_are_four_values(recording):
    cache = recording.replay(new_cache("two_bit_keys"))
    keys = recording.qkv[0][1]
    known = cache.layers[0].known(keys)
    assert all(len(channel.unique()) <= 4 for head in known for channel in head.T)
    left = ((known - keys).square().mean() / keys.var(dim=1).mean()).item()
    assert 0.05 < left < 0.2  # 0.1175 for a Gaussian


def test_the_published_settings_are_the_authors():
    config = new_cache("published").config
    assert (config.score, config.sink_tokens, config.recent_window) == ("mean_query", 32, 32)
    assert (config.keep_factor, config.secondary_sinks, config.query_decay) == (2, 0, 1)
    assert settings_of("published:keep_factor=3")["keep_factor"] == 3


def recorded(config, n_tokens):
    recording, model = Recording(), random_llama(config=config)
    model.prefill(random_ids(n_tokens, "cpu"), recording)
    recording.qkv = [tuple(x.clone() for x in layer) for layer in recording.qkv]
    return model, recording


@pytest.mark.slow
@pytest.mark.parametrize("config, n_prompt", [
    (TINY, 5), (TINY, 40), (TINY, N_PROMPT), (MHA, N_PROMPT)], ids=["5", "40", "150", "MHA"])
def test_no_method_holds_more_than_its_budget(config, n_prompt):
    """While 80 tokens are written after a prompt shorter than the window, than the budget, and
    longer. A budget is the mean of all heads and layers."""
    model, recording = recorded(config, n_prompt)
    for method in METHODS:
        if not has_budget(method) or method.endswith("_dense"):
            continue
        cache = recording.replay(make_cache(
            method, config, BUDGET, random_spans(n_prompt), 80, **settings_of(method)))
        held = []
        for step, token in enumerate(random_ids(n_prompt + 80, "cpu")[n_prompt:]):
            if step and step % 10 == 0:
                cache.seal(10)
            assert model.decode(token[None], cache).isfinite().all()
            held.append(cost(cache).held)
        assert max(held) <= BUDGET + 1e-4, method
        enough = min(n_prompt + 1, BUDGET) - COARSE.get(method, 0)
        if method == "sentencekv":  # its budget counts rows, which have 8 bits
            enough *= (TINY.head_dim + 2) / (2 * TINY.head_dim)
        assert held[0] >= enough - 1e-4, method


def tensors(value) -> list:
    """All tensors in a cache."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, (list, tuple)) else []


def masked_keys(attended, head):
    keys, _, mask = attended
    if mask is None:
        return keys[head]
    mask = mask if mask.dtype == torch.bool else mask > -math.inf
    return keys[head][mask.expand(len(keys), -1, -1).any(dim=1)[head]]


def is_in(rows, others):
    """Which rows (n, D) are among others (m, D)."""
    return (rows[:, None] == others[None]).all(dim=-1).any(dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in PUBLISHED if m not in ("kvmerger", "kvsharer")])
def test_nothing_of_a_forgotten_token_is_left(method):
    """What no head attends to after 60 tokens is in no tensor of a cache that forgets, and NaN in
    the prompt's tensors changes nothing any more."""
    _, recording = recorded(TINY, N_PROMPT)
    prompt = [k.clone() for _, k, _ in recording.qkv]
    cache = recording.replay(make_cache(method, TINY, BUDGET, random_spans(N_PROMPT), 60))
    for layer in recording.qkv:
        for x in layer:
            x.fill_(math.nan)
    for step in range(60):
        seen = [layer.decode(*random_token(step)) for layer in cache.layers]
        for keys, values, mask in seen:
            assert keys.isfinite().all() and values.isfinite().all()
            assert mask is None or not mask.isnan().any()
        cache.advance(1)
    if cost(cache).elsewhere > cost(cache).held:
        return  # it forgets nothing
    held = [x for x in tensors(list(vars(cache).values())) if x.shape[-1:] == (TINY.head_dim,)]
    for attended, k in zip(seen, prompt):
        for head, keys in enumerate(k):
            forgotten = keys[~is_in(keys, masked_keys(attended, head))]
            assert not any(is_in(forgotten, x.reshape(-1, TINY.head_dim)).any() for x in held)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in METHODS if has_budget(m) and m != "sentencekv"])
def test_every_token_is_attended_to_where_it_was_read(method):
    """A key is turned to its position: those that are not made up are the prompt's own, or written
    ones, each once."""
    _, recording = recorded(TINY, N_PROMPT)
    cache = recording.replay(make_cache(method, TINY, BUDGET, random_spans(N_PROMPT), 200,
                                        **settings_of(method)))
    written = []
    for step in range(200):
        if step:
            cache.advance(1)
        if step and step % 10 == 0:
            cache.seal(10)
        written.append(random_token(step))
        for layer in range(TINY.num_hidden_layers):
            seen = cache.layers[layer].decode(*written[-1])
    for head in range(TINY.num_key_value_heads):
        prompt = recording.qkv[layer][1][head]
        everything = torch.cat([prompt, *(k[head] for _, k, _ in written)])
        keys = masked_keys(seen, head)
        own = keys[is_in(keys, everything)]
        assert len(own.unique(dim=0)) == len(own), "no token twice"
        assert method == "best_tokens" or is_in(written[-1][1][head], own).all(), "not to itself"
        if method not in MADE_UP:
            assert len(own) == len(keys)


@pytest.mark.parametrize("method", ["streamingllm", "expected_attention", "cascading", "arkvale",
                                    "actqkv", "clusterkv", "prefixkv", "duo_heads",
                                    "sentencekv_16bit"])
def test_the_first_tokens_stay(recording, method):
    cache = recording.replay(new_cache(method))
    for step in range(10):
        for layer in range(TINY.num_hidden_layers):
            seen = cache.layers[layer].decode(*random_token(step))
        cache.advance(1)
    for head in range(TINY.num_key_value_heads):
        assert is_in(recording.qkv[-1][1][head, :4], masked_keys(seen, head)).all()


@pytest.mark.parametrize("method, least", [("streamingllm", 4), ("snapkv", BUDGET // 2)])
def test_the_prompt_s_best_tokens_outlast_a_long_text(recording, method, least):
    cache = recording.replay(new_cache(method))
    for step in range(100):
        keys = cache.layers[0].decode(*random_token(step))[0]
        cache.advance(1)
    prompt = recording.qkv[0][1][0]
    left = sum((prompt == key).all(-1).any().item() for key in keys[0])
    assert left == least and keys.shape[1] == BUDGET


def test_pyramid_budgets_shrink_and_add_up():
    config = type("Config", (), {"kv_shape": (30, 3, 64)})
    cache = PyramidKV(config, 384, [])
    budgets = [cache.layer_budget(layer) for layer in range(30)]
    assert budgets == sorted(budgets, reverse=True) and budgets[0] > 2 * budgets[-1]
    assert sum(budgets) == pytest.approx(30 * 384, abs=15)


@pytest.mark.slow
def test_a_budget_for_everything_is_full_attention(model, recording):
    expected = write(model, recording.replay(new_cache("full")))
    for method in METHODS:
        if method not in LOSSY:
            cache = make_cache(method, TINY, 800, random_spans(N_PROMPT), 60, **settings_of(method))
            got = write(model, recording.replay(cache))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in PUBLISHED if reads_on(m)])
def test_a_second_text_is_read_and_a_fork_does_not_disturb(model, recording, method):
    cache = recording.replay(new_cache(method))
    answers = []
    for own in (cache.fork(), cache.fork()):
        states = model.prefill(random_ids(20, "cpu"), own)
        answers.append(torch.cat([states[-1:], write(model, own, 20)]))
    assert torch.equal(*answers) and answers[0].isfinite().all()


def test_the_example_of_quantisation():
    assert doctest.testmod(precision).failed == 0


def test_rope_scaling_does_not_stand_in_the_way(recording):
    """Results are remembered by their arguments, and a dictionary cannot be one."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 100}
    config = replace(TINY, rope_scaling=scaling)
    cache = recording.replay(make_cache("expected_attention", config, BUDGET, [], 5))
    assert cache.layers[0].decode(*random_token(1))[0].shape[1] == BUDGET


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method 'magic' is not one of full, streamingllm"):
        make_cache("magic", TINY, 100, [(0, 10)], 5)
    with pytest.raises(ValueError, match="method 'two_vectors' has a score of its own"):
        make_cache("two_vectors", TINY, 100, [(0, 10)], 5, score="gaussian")
    with pytest.raises(ValueError, match="method 'full' has no settings"):
        make_cache("full", TINY, 100, [(0, 10)], 5, page=3)


@pytest.mark.parametrize("spec, message", [
    ("quest:page=x", "method 'quest:page=x': page is 'x', must be a number"),
    ("quest:colour=3", "method 'quest:colour=3': there is no setting 'colour'"),
    ("quest:page", "settings are name=value,name=value"),
])
def test_a_setting_that_cannot_be_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        settings_of(spec)


def test_a_setting_is_an_attribute_of_the_class():
    assert settings_of("quest:page=32,dense_layers=1") == {"page": 32, "dense_layers": 1}
    assert make_cache("quest", TINY, 100, [(0, 10)], 5, page=32).page == 32
    assert make_cache("quest", TINY, 100, [(0, 10)], 5).page == 16


MINE = '''
from benchmarks.methods.base import Evicting

class Mine(Evicting):
    power = 1.0

    def importance(self, layer, q, k, v):
        return v.norm(dim=-1) ** self.power

class Broken(Evicting):
    def importance(self, layer, q, k, v):
        return v.nrom(dim=-1)

class Wrong:
    pass

some = 3
'''


def test_a_class_from_a_file_is_a_method(tmp_path, recording):
    path = tmp_path / "my_method.py"
    path.write_text(MINE)
    try_out(f"{path}:Mine")
    try_out(f"{path}:Mine:power=2")
    cache = recording.replay(make_cache(f"{path}:Mine", TINY, BUDGET, [(0, N_PROMPT)], 5))
    assert isinstance(cache, Evicting)
    for name, message in (("Broken", "AttributeError: 'Tensor' object has no attribute 'nrom'"),
                          ("Wrong", "TypeError: Wrong() takes no arguments"),
                          ("some", "there is no class 'some'"), ("None", "no class 'None'"),
                          ("Mine:power=x", "power is 'x'"), ("Mine:speed=2", "no setting 'speed'")):
        with pytest.raises(ValueError) as error:
            try_out(f"{path}:{name}")
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="FileNotFoundError"):
        try_out(f"{tmp_path}/none.py:Mine")
    path.write_text("import")
    with pytest.raises(ValueError, match="SyntaxError: "):
        try_out(f"{path}:Mine")

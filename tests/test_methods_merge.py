"""Fewer bits, merged tokens and shared layers, each against plain loops: one head, one token, one
run at a time."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_ids, random_llama, random_spans

from benchmarks.methods import cost, make_cache, settings_of
from benchmarks.methods.base import Recording
from benchmarks.methods.precision import quantised, stored_bits

pytestmark = pytest.mark.slow
BUDGET, N_PROMPT, WINDOW, FEATURES = 72, 150, 32, 8
HEADS, LAYERS, DIM = TINY.num_key_value_heads, TINY.num_hidden_layers, TINY.head_dim
GROUP = TINY.num_attention_heads // HEADS
EIGHT_LAYERS = replace(TINY, num_hidden_layers=8)


def recording_of(model):
    recording = Recording()
    model.prefill(random_ids(N_PROMPT, "cpu"), recording)
    return recording


@pytest.fixture(scope="module")
def model():
    return random_llama()


@pytest.fixture(scope="module")
def recording(model):
    return recording_of(model)


@pytest.fixture(scope="module")
def deep_model():
    return random_llama(config=EIGHT_LAYERS)


@pytest.fixture(scope="module")
def deep_recording(deep_model):
    return recording_of(deep_model)


def filled(recording, method, budget=BUDGET, config=TINY, **settings):
    """The method's cache after the prompt."""
    spans = random_spans(recording.num_tokens)
    settings = settings_of(method) | settings
    return recording.replay(make_cache(method, config, budget, spans, 60, **settings))


def random_rows(heads, n_tokens, dim, seed):
    return torch.randn(heads, n_tokens, dim, generator=torch.Generator().manual_seed(seed))


def random_token(seed, dim=DIM):
    return [random_rows(heads, 1, dim, 3 * seed + i)
            for i, heads in enumerate((GROUP * HEADS, HEADS, HEADS))]


def random_recording(config, n_tokens, seed=1000):
    recording, dim = Recording(), config.head_dim
    for layer in range(config.num_hidden_layers):
        q, k, v = (random_rows(heads, n_tokens, dim, seed + 3 * layer + i)
                   for i, heads in enumerate((GROUP * HEADS, HEADS, HEADS)))
        recording.prefill(layer, q, k, v)
    recording.advance(n_tokens)
    return recording


EACH_HEAD = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


def best(scores, n):
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:n]


def attention_from(queries, q, k, head):
    """Attention that some queries pay to every token of a KV head, the sum over the queries and the
    mean over the group."""
    received = torch.zeros(k.shape[1], dtype=torch.double)
    for query_head in range(head * GROUP, (head + 1) * GROUP):
        for i in queries:
            logits = k[head, : i + 1].double() @ q[query_head, i].double() / math.sqrt(k.shape[-1])
            received[: i + 1] += logits.softmax(0) / GROUP
    return received.tolist()


def window_scores(recording, layer, head):
    """From the last 32 queries to the tokens before them."""
    (q, k, _), n_tokens = recording.qkv[layer], recording.num_tokens
    queries = range(n_tokens - WINDOW, n_tokens)
    return attention_from(queries, q, k, head)[: n_tokens - WINDOW]


def answer(q, keys, values, mask=None):
    """Attention of one token, one query head at a time: (H, D)"""
    answers = []
    for query_head in range(len(q)):
        head, in_group = divmod(query_head, GROUP)
        logits = keys[head].double() @ q[query_head, 0].double() / math.sqrt(q.shape[-1])
        if mask is not None:
            row = mask[head, in_group if mask.shape[1] > 1 else 0]
            logits += row.double().log() if row.dtype == torch.bool else row.double()
        answers.append(logits.softmax(0) @ values[head].double())
    return torch.stack(answers)


def everything(recording, layer, k, v):
    """Keys and values of the prompt and of one token after it."""
    _, keys, values = recording.qkv[layer]
    return torch.cat((keys, k), dim=1), torch.cat((values, v), dim=1)


def write(model, cache, n_new=40):
    ids = random_ids(N_PROMPT + n_new, "cpu")[N_PROMPT:]
    return torch.cat([model.decode(token[None], cache) for token in ids])


@pytest.mark.parametrize("method", ["snapkv_4bit", "sentencekv_4bit", "kvmerger", "less"])
def test_what_is_held_stays_within_the_budget_of_sixty_written_tokens(recording, method):
    cache = filled(recording, method)
    for step in range(60):
        for layer in range(LAYERS):
            cache.layers[layer].decode(*random_token(2 * step + layer))
        cache.advance(1)
        assert BUDGET - 1 < cost(cache).held <= BUDGET
        if step % 10 == 9:
            cache.seal(10)


@pytest.mark.parametrize("method, budget", [("kvmerger", 800), ("less", 800), ("less", 210)])
def test_a_budget_for_all_tokens_gives_the_full_cache_s_states(model, recording, method, budget):
    """LESS at 210: all are kept, but most of them as heavy tokens, not as the latest."""
    expected = write(model, filled(recording, "full"))
    got = write(model, filled(recording, method, budget))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


# Precision


def rounded(row, bits=4):
    """Each channel of a vector (D,) becomes the nearest of its 2^bits levels."""
    low, high, last = min(row.tolist()), max(row.tolist()), 2**bits - 1
    levels = [low + (high - low) * i / last for i in range(last + 1)]
    return torch.tensor([min(levels, key=lambda x: abs(x - channel)) for channel in row.tolist()])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_channel_is_off_by_at_most_half_a_step(bits):
    rows = random_rows(3, 20, 64, seed=bits)
    for row, got in zip(rows.flatten(0, 1), quantised(rows, bits).flatten(0, 1)):
        step = (row.max() - row.min()).item() / (2**bits - 1)
        assert (got - row).abs().max().item() <= step / 2 + 1e-6
        assert len({round(x, 5) for x in got.tolist()}) <= 2**bits
        torch.testing.assert_close(got, rounded(row, bits), rtol=0, atol=1e-5)
        assert got.min() == row.min()
        assert got.max().item() == pytest.approx(row.max().item(), abs=1e-5)


def test_equal_channels_stay_as_they_are():
    rows = torch.full((2, 8), 0.7)
    assert torch.equal(quantised(rows, 4), rows)


def test_a_vector_s_smallest_value_and_step_take_sixteen_bits_each():
    assert (stored_bits(4, 64), stored_bits(4, 8), stored_bits(2, 32)) == (4.5, 8, 3)


def pooled_scores(recording, layer, head):
    scores = window_scores(recording, layer, head)
    return [max(scores[max(0, i - 3) : i + 4]) for i in range(len(scores))]


def test_snapkv_keeps_twice_as_many_tokens_of_eight_bits_a_channel(recording):
    cache = filled(recording, "snapkv_4bit")
    for layer, head in EACH_HEAD:
        q, k, v = random_token(layer)
        keys, values = everything(recording, layer, k, v)
        if head == 0:
            decoded = cache.layers[layer].decode(q, k, v)
            assert decoded[2] is None
        # One of 16 bits is taken by the new token, so two of 8 bits have gone.
        order = best(pooled_scores(recording, layer, head), 2 * (BUDGET - WINDOW - 1))
        for got, exact in zip(decoded[:2], (keys[head], values[head])):
            expected = torch.stack([rounded(exact[i]) for i in order])
            torch.testing.assert_close(got[head, : len(order)], expected, rtol=0, atol=1e-5)
            assert torch.equal(got[head, len(order) :], exact[N_PROMPT - WINDOW :])


@pytest.mark.parametrize("dim, bits", [(8, 8), (64, 4.5)])
def test_tokens_of_fewer_bits_fill_the_same_bytes(dim, bits):
    config = replace(TINY, head_dim=dim)
    recording = random_recording(config, n_tokens=300)
    cache = filled(recording, "snapkv_4bit", config=config)
    for step in range(1, 61):
        for layer in range(LAYERS):
            keys, _, mask = cache.layers[layer].decode(*random_token(2 * step + layer, dim))
            latest = min(WINDOW + step, BUDGET // 2)  # the prompt keeps half of the bytes
            kept = int((BUDGET - latest) * 16 // bits)
            assert mask is None and keys.shape[1] == kept + latest
        cache.advance(1)
        held, elsewhere, read = cost(cache)
        assert held == pytest.approx(latest + kept * bits / 16)
        assert (elsewhere, read) == (0, held) and BUDGET - bits / 16 < held <= BUDGET


def test_the_written_tokens_of_snapkv_are_exact(recording):
    cache, written = filled(recording, "snapkv_4bit"), []
    for step in range(10):
        token = random_token(step)
        written.append(token[1:])
        keys, values, _ = cache.layers[0].decode(*token)
    for i, (k, v) in enumerate(written):
        assert torch.equal(keys[:, i - 10], k[:, 0]) and torch.equal(values[:, i - 10], v[:, 0])


def order_of_rows(keys):
    """Positions of a head's rows on the host: its secondary sinks, and then all others."""
    norms = [key.norm().item() for key in keys]
    limit = 0.6 * sorted(norms)[(N_PROMPT - 1) // 2]
    shortest = sorted(range(4, N_PROMPT - WINDOW), key=norms.__getitem__)[:8]
    secondary = sorted(i for i in shortest if norms[i] < limit)
    return secondary, [i for i in range(N_PROMPT) if i not in secondary]


def test_all_rows_of_the_prompt_have_four_bits_on_the_host(recording):
    cache = filled(recording, "sentencekv_4bit")
    assert all(len(layer.host.first) == N_PROMPT for layer in cache.layers)
    for layer, head in EACH_HEAD:
        kv = [x[head] for x in recording.qkv[layer][1:]]
        secondary, others = order_of_rows(kv[0])
        for row, position in enumerate([*secondary, *others]):
            host_row = cache.layers[layer].host.first[row, head]
            for got, exact in zip(host_row, (x[position] for x in kv)):
                step = (exact.max() - exact.min()).item() / 15
                assert (got - exact).abs().max().item() <= step / 2 + 1e-6
                torch.testing.assert_close(got, rounded(exact), rtol=0, atol=1e-5)


def test_the_vectors_of_sentences_are_means_of_exact_keys(recording):
    cache = filled(recording, "sentencekv_4bit")
    for layer, head in EACH_HEAD:
        keys = recording.qkv[layer][1][head]
        others = order_of_rows(keys)[1]
        sentences = [[keys[i] for i in range(a, b) if i in others]
                     for a, b in random_spans(N_PROMPT)]
        for place, rows in enumerate(filter(None, sentences), start=1):
            mean = sum(rows) / len(rows)
            got = cache.layers[layer].vectors[head, place]
            torch.testing.assert_close(got, mean, rtol=0, atol=1e-5)


def test_what_is_read_of_the_prompt_has_the_precision_of_the_host(recording):
    cache = filled(recording, "sentencekv_4bit")
    for layer in range(LAYERS):
        q, k, v = random_token(layer)
        keys, values, mask = cache.layers[layer].decode(q, k, v)
        for head in range(HEADS):
            exact = torch.cat(recording.qkv[layer][1:], dim=-1)[head]
            prompt = [torch.cat((rounded(row[:DIM]), rounded(row[DIM:]))) for row in exact]
            known = torch.stack([*prompt, torch.cat((k, v), dim=-1)[head, 0]])
            seen = torch.cat((keys, values), dim=-1)[head][mask[head, 0]]
            off = [(known - row).abs().amax(dim=-1) for row in seen]
            assert max(x.min().item() for x in off) < 1e-5
            assert len({x.argmin().item() for x in off}) == len(seen) > WINDOW


def test_the_bits_do_not_change_what_sentencekv_selects(recording):
    ours, exact = filled(recording, "sentencekv_4bit"), filled(recording, "sentencekv_16bit")
    for step in range(20):
        for layer in range(LAYERS):
            token = random_token(2 * step + layer)
            masks = [cache.layers[layer].decode(*token)[2] for cache in (ours, exact)]
            assert torch.equal(*masks)
        for our_layer, exact_layer in zip(ours.layers, exact.layers):
            assert torch.equal(our_layer.slot_row, exact_layer.slot_row)
        for cache in (ours, exact):
            cache.advance(1)
            if step % 10 == 9:
                cache.seal(10)


def write_sentences(cache, n_sentences):
    """Sentences of 10 tokens. Returns their tokens by layer."""
    written = [[] for _ in range(LAYERS)]
    for step in range(10 * n_sentences):
        for layer in range(LAYERS):
            token = random_token(2 * step + layer)
            written[layer].append(torch.stack(token[1:], dim=2)[:, 0])  # (H_kv, 2, D)
            cache.layers[layer].decode(*token)
        cache.advance(1)
        if step % 10 == 9:
            cache.seal(10)
    return written


def test_written_rows_are_exact_on_the_host_and_in_the_recent_window(recording):
    cache = filled(recording, "sentencekv_4bit")
    n_places = cache.plan.n_places
    for layer, tokens in zip(cache.layers, write_sentences(cache, 2)):
        slots = cache.plan.slots_of(N_PROMPT, N_PROMPT + len(tokens))  # nothing was dropped
        for i, kv in enumerate(tokens):
            assert torch.equal(layer.host.later[i], kv)
            assert torch.equal(layer.slots[:, slots[i]], kv)
        for sentence in range(2):
            mean = sum(kv[:, 0] for kv in tokens[10 * sentence : 10 * sentence + 10]) / 10
            got = layer.vectors[:, n_places + sentence]
            torch.testing.assert_close(got, mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_written", [0, 6])
def test_the_host_holds_eight_bits_of_the_prompt_and_sixteen_of_what_is_written(
        recording, n_written):
    cache = filled(recording, "sentencekv_4bit")
    write_sentences(cache, n_written)
    n_sentences = len(random_spans(N_PROMPT)) + n_written
    index = n_sentences * (DIM + 1) / (2 * DIM)  # a vector and a variance each
    rows = N_PROMPT * (4 + 32 / DIM) / 16 + 10 * n_written
    assert cost(cache).elsewhere == pytest.approx(rows + index)


# KVMerger

N_WHOLE = (BUDGET - WINDOW) // 4
N_RUNS = BUDGET - WINDOW - N_WHOLE


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def runs_of(keys, tokens, n_runs):
    """Cut some tokens in so many runs, where neighbours are least alike."""
    keys = keys.double()
    likeness = [cosine(keys[a], keys[b]) for a, b in zip(tokens, tokens[1:])]
    cuts = best([-x for x in likeness], n_runs - 1)
    runs = [[tokens[0]]]
    for i, token in enumerate(tokens[1:]):
        if i in cuts:
            runs.append([])
        runs[-1].append(token)
    return runs


def merged(run, scores, keys, values):
    """Key and value of a run's one token."""
    pivot = max(run, key=scores.__getitem__)
    weights = [math.exp(-(keys[pivot] - keys[i]).square().sum().item() / (2 * 5**2)) for i in run]
    return [sum(w * x[i] for w, i in zip(weights, run)) / sum(weights) for x in (keys, values)]


def whole_and_runs(recording, layer, head):
    """The tokens that stay as they are, the runs of the others, both the best first, and scores."""
    scores = window_scores(recording, layer, head)
    whole = best(scores, N_WHOLE)
    others = [i for i in range(len(scores)) if i not in whole]
    runs = runs_of(recording.qkv[layer][1][head], others, N_RUNS)
    assert len(runs) == N_RUNS
    return whole, sorted(runs, key=lambda run: -sum(scores[i] for i in run)), scores


def test_kvmerger_keeps_a_quarter_whole_and_merges_runs_of_the_rest(recording):
    cache = filled(recording, "kvmerger")
    for layer, head in EACH_HEAD:
        keys, values = (x[head] for x in recording.qkv[layer][1:])
        whole, runs, scores = whole_and_runs(recording, layer, head)
        expected = [[keys[i], values[i]] for i in whole]
        expected += [merged(run, scores, keys, values) for run in runs]
        expected = torch.stack([torch.stack(pair) for pair in expected])
        torch.testing.assert_close(cache.kept[layer][head], expected, rtol=0, atol=1e-5)
        lengths = torch.tensor([1] * N_WHOLE + [len(run) for run in runs])
        torch.testing.assert_close(cache.bias[layer][head], lengths.log())
        assert any(len(run) > 2 for run in runs)


def test_each_token_of_a_head_is_counted_once(recording):
    cache = filled(recording, "kvmerger")
    for layer, head in EACH_HEAD:
        counts = cache.bias[layer][head].exp()
        assert counts.sum().item() == pytest.approx(N_PROMPT - WINDOW)
        torch.testing.assert_close(counts, counts.round())


def test_a_written_token_takes_the_place_of_the_worst_run(recording):
    cache = filled(recording, "kvmerger")
    for step in range(1, 61):
        keys, _, mask = cache.layers[0].decode(*random_token(step))
        latest = min(WINDOW + step, BUDGET // 2)
        n_left = BUDGET - latest - N_WHOLE
        assert keys.shape[1] == BUDGET and mask.shape == (HEADS, 1, BUDGET)
        for head in range(HEADS) if step in (1, 3, 60) else ():
            runs = whole_and_runs(recording, 0, head)[1][:n_left]
            lengths = [1] * N_WHOLE + [len(run) for run in runs] + [1] * latest
            torch.testing.assert_close(mask[head, 0], torch.tensor(lengths).log())


def repeated_recording(n_stretches, n_equal):
    """A prompt in which each token before the window is followed by equal ones."""
    recording, plain = Recording(), random_recording(TINY, n_stretches + WINDOW)
    places = [i for i in range(n_stretches) for _ in range(n_equal)]
    places += range(n_stretches, n_stretches + WINDOW)
    recording.qkv = [tuple(x[:, places] for x in layer) for layer in plain.qkv]
    recording.num_tokens = len(places)
    return recording


def test_equal_neighbours_merge_without_loss():
    """The 10 whole tokens are those of two stretches, and the 30 others become a run each. The new
    token takes the place of one run."""
    recording = repeated_recording(n_stretches=N_WHOLE // 5 + N_RUNS, n_equal=5)
    cache = filled(recording, "kvmerger")
    for layer in range(LAYERS):
        q, k, v = random_token(layer)
        keys, values = everything(recording, layer, k, v)
        left = torch.ones(HEADS, 1, keys.shape[1], dtype=torch.bool)
        for head in range(HEADS):
            _, runs, _ = whole_and_runs(recording, layer, head)
            assert all(len(run) == 5 for run in runs)
            left[head, 0, runs[-1]] = False
        got = answer(q, *cache.layers[layer].decode(q, k, v))
        torch.testing.assert_close(got, answer(q, keys, values, left), rtol=0, atol=1e-5)


# LESS

N_LATEST = BUDGET // 2
N_HEAVY = BUDGET - FEATURES - N_LATEST


def heavy_and_dropped(recording, layer, head):
    """By H2O's score: attention from all queries."""
    q, k, _ = recording.qkv[layer]
    received = attention_from(range(N_PROMPT), q, k, head)[: N_PROMPT - N_LATEST]
    heavy = best(received, N_HEAVY)
    return heavy, [i for i in range(len(received)) if i not in heavy]


def feature(w, x):
    """One of R features, of which the product of a query's and a key's is, in the mean, R times
    smaller than exp(q · k / √D): their sum is not."""
    x = x.double() / DIM**0.25
    return math.exp(w.double() @ x - x @ x / 2) / math.sqrt(FEATURES)


def state_of(cache, keys, values, dropped):
    """z (R,) and H (R, D), token by token."""
    z, h = [0.0] * FEATURES, [torch.zeros(DIM, dtype=torch.double) for _ in range(FEATURES)]
    for i in dropped:
        for r, w in enumerate(cache.random):
            z[r] += feature(w, keys[i])
            h[r] = h[r] + feature(w, keys[i]) * values[i].double()
    return z, h


def test_the_slots_of_less_hold_its_state(recording):
    cache = filled(recording, "less")
    for layer in range(LAYERS):
        q, k, v = random_token(layer)
        keys, values, mask = cache.layers[layer].decode(q, k, v)
        assert keys.shape[1] == BUDGET and mask.shape == (HEADS, GROUP, BUDGET)
        assert not keys[:, -FEATURES:].any() and not mask[..., :-FEATURES].any()
        for head in range(HEADS):
            dropped = heavy_and_dropped(recording, layer, head)[1]
            z, h = state_of(cache, *(x[head] for x in recording.qkv[layer][1:]), dropped)
            for r, w in enumerate(cache.random):
                got = values[head, r - FEATURES].double()
                torch.testing.assert_close(got, h[r] / z[r], rtol=1e-4, atol=1e-5)
                for i in range(GROUP):
                    counts = feature(w, q[GROUP * head + i, 0]) * z[r]
                    assert mask[head, i, r - FEATURES].exp().item() == pytest.approx(counts, 1e-3)


def test_less_answers_by_the_formula_of_its_state(recording):
    cache = filled(recording, "less")
    for layer in range(LAYERS):
        q, k, v = random_token(10 + layer)
        keys, values = everything(recording, layer, k, v)
        got = answer(q, *cache.layers[layer].decode(q, k, v))
        for query_head in range(GROUP * HEADS):
            head, one = query_head // GROUP, q[query_head, 0]
            heavy, dropped = heavy_and_dropped(recording, layer, head)
            z, h = state_of(cache, keys[head], values[head], dropped)
            phi = [feature(w, one) for w in cache.random]
            above, below = sum(a * b for a, b in zip(phi, h)), sum(a * b for a, b in zip(phi, z))
            # With the new token the latest half begins one later. That one joins no state.
            for i in [*heavy, *range(N_PROMPT - N_LATEST + 1, N_PROMPT + 1)]:
                weight = math.exp(one.double() @ keys[head, i].double() / math.sqrt(DIM))
                above, below = above + weight * values[head, i].double(), below + weight
            torch.testing.assert_close(got[query_head], above / below, rtol=1e-4, atol=1e-5)


def test_many_features_are_right_in_the_mean(recording, n_features=200_000):
    cache = filled(recording, "less", budget=3 * n_features, features=n_features)
    q, k = random_rows(2, 20, DIM, seed=1) / 2
    phi_q, phi_k = (cache.log_features(x).double().exp() for x in (q, k))
    expected = [math.exp(a @ b / math.sqrt(DIM)) for a, b in zip(q, k)]
    got = [(a @ b).item() for a, b in zip(phi_q, phi_k)]
    assert got == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("budget", [2 * N_PROMPT + 4, N_PROMPT + FEATURES + 10])
def test_where_nothing_is_dropped_less_attends_without_its_state(recording, budget):
    cache = filled(recording, "less", budget)
    q, k, v = random_token(1)
    keys, values, mask = cache.layers[0].decode(q, k, v)
    assert (mask[..., -FEATURES:] == -math.inf).all() and values.isfinite().all()
    got, expected = answer(q, keys, values, mask), answer(q, *everything(recording, 0, k, v))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


# KVSharer


def mean_of(x):
    """Of the tokens of a layer (H_kv, T, D), in one list."""
    return [sum(x[head, i, c].item() for i in range(x.shape[1])) / x.shape[1]
            for head in range(x.shape[0]) for c in range(x.shape[2])]


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
def test_the_most_distant_layers_share(deep_recording, n_shared):
    cache = filled(deep_recording, "kvsharer", config=EIGHT_LAYERS, n_shared=n_shared)
    assert cache.source == sources(deep_recording, n_shared)


@pytest.mark.parametrize("seed", range(5))
def test_there_are_no_chains_of_layers_among_random_ones(seed):
    recording = random_recording(EIGHT_LAYERS, 20, seed=100 * seed)
    cache = filled(recording, "kvsharer", config=EIGHT_LAYERS)
    assert cache.source == sources(recording, 4)
    assert all(cache.source[source] == source for source in cache.source)


def test_four_layers_read_an_unshared_earlier_one_and_hold_nothing(deep_recording):
    cache = filled(deep_recording, "kvsharer", config=EIGHT_LAYERS)
    sharing = [layer for layer, source in enumerate(cache.source) if source != layer]
    assert len(sharing) == 4
    for layer, source in enumerate(cache.source):
        assert source <= layer and cache.source[source] == source
        assert (cache.kv[layer] is None) == (layer in sharing)


def test_a_shared_layer_reads_the_earlier_one_s_tokens_and_the_new_one(deep_recording):
    cache, written = filled(deep_recording, "kvsharer", config=EIGHT_LAYERS), []
    for step in range(3):
        tokens = [random_token(8 * step + layer) for layer in range(8)]
        written.append(tokens)
        for layer, source in enumerate(cache.source):
            keys, values, mask = cache.layers[layer].decode(*tokens[layer])
            prompt = deep_recording.qkv[source]
            for i, got in ((1, keys), (2, values)):
                expected = torch.cat((prompt[i], *(past[source][i] for past in written)), dim=1)
                assert torch.equal(got, expected)
            assert mask is None
        cache.advance(1)
        n_tokens = N_PROMPT + step + 1
        assert cost(cache) == (n_tokens * 4 / 8, 0, n_tokens)
    numbers = sum(kv.numel() for kv in cache.kv if kv is not None)
    assert cost(cache).held == numbers / (8 * HEADS * 2 * DIM)


def test_where_no_layer_shares_the_states_are_the_full_cache_s(deep_model, deep_recording):
    expected = write(deep_model, filled(deep_recording, "full", config=EIGHT_LAYERS))
    cache = filled(deep_recording, "kvsharer", config=EIGHT_LAYERS, n_shared=0)
    torch.testing.assert_close(write(deep_model, cache), expected, rtol=0, atol=1e-5)

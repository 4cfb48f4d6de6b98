"""Fewer bits of each token: against plain loops, one vector at a time."""

import doctest

import pytest
import torch
from conftest import random_spans
from methods.conftest import (BUDGET, DIM, EACH_HEAD, HEADS, N_PROMPT, ROOM, WINDOW, best,
                              filled, random_qkv, random_recording, window_scores, writing)

from benchmarks.methods import precision
from benchmarks.methods.precision import quantised, stored_bits


def rounded(row, bits=4):
    """Each channel of a vector (D,) becomes the nearest of its 2^bits levels."""
    low, high, last = min(row.tolist()), max(row.tolist()), 2**bits - 1
    levels = [low + (high - low) * i / last for i in range(last + 1)]
    return torch.tensor([min(levels, key=lambda x: abs(x - channel)) for channel in row.tolist()])


def test_the_example_of_quantisation():
    assert doctest.testmod(precision).failed == 0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_channel_is_off_by_at_most_half_a_step(bits):
    rows = random_qkv(20, seed=bits, dim=64)[0]
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


# SnapKV


def test_snapkv_keeps_twice_as_many_tokens_of_eight_bits_a_channel(recording):
    for (q, k, v), (*attended, mask) in next(writing(filled("snapkv_4bit", recording), recording)):
        assert mask is None
        scores = window_scores(q[:, :N_PROMPT], k[:, :N_PROMPT])
        for head in HEADS:
            # One of 16 bits is taken by the new token, so two of 8 bits have gone.
            order = best(scores[head], 2 * (ROOM - 1))
            for got, exact in zip(attended, (k, v)):
                expected = torch.stack([rounded(exact[head, i]) for i in order])
                torch.testing.assert_close(got[head, : len(order)], expected, rtol=0, atol=1e-5)
                assert torch.equal(got[head, len(order) :], exact[head, N_PROMPT - WINDOW :])


@pytest.mark.parametrize("dim, bits", [(8, 8), (64, 4.5)])
def test_tokens_of_fewer_bits_fill_the_same_bytes(dim, bits):
    recording = random_recording(n_tokens=300, dim=dim)
    cache = filled("snapkv_4bit", recording)
    for step, seen in enumerate(writing(cache, recording), 1):
        latest = min(WINDOW + step, BUDGET // 2)  # the prompt keeps half of the bytes
        kept = int((BUDGET - latest) * 16 // bits)
        for _, (keys, _, mask) in seen:
            assert mask is None and keys.shape[1] == kept + latest
        held, elsewhere, read, device = cache.cost()
        assert held == pytest.approx(latest + kept * bits / 16)
        assert (elsewhere, read, device) == (0, held, held) and BUDGET - bits / 16 < held <= BUDGET


def test_the_written_tokens_of_snapkv_are_exact(recording):
    *_, seen = writing(filled("snapkv_4bit", recording), recording, 10)
    for (_, *kv), attended in seen:
        for got, exact in zip(attended[:2], kv):
            assert torch.equal(got[:, -10:], exact[:, N_PROMPT:])


# SentenceKV


@pytest.fixture
def cache(recording):
    return filled("sentencekv_4bit", recording)


def order_of_rows(keys):
    """Positions of a head's rows on the host: its secondary sinks, and then all others."""
    norms = [key.norm().item() for key in keys]
    limit = 0.6 * sorted(norms)[(N_PROMPT - 1) // 2]
    shortest = sorted(range(4, N_PROMPT - WINDOW), key=norms.__getitem__)[:8]
    secondary = sorted(i for i in shortest if norms[i] < limit)
    return secondary, [i for i in range(N_PROMPT) if i not in secondary]


def test_all_rows_of_the_prompt_have_four_bits_on_the_host(cache, recording):
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


def test_the_vectors_of_sentences_are_means_of_exact_keys(cache, recording):
    for layer, head in EACH_HEAD:
        keys = recording.qkv[layer][1][head]
        others = order_of_rows(keys)[1]
        sentences = [[keys[i] for i in range(a, b) if i in others]
                     for a, b in random_spans(N_PROMPT)]
        for place, rows in enumerate(filter(None, sentences), start=1):
            mean = sum(rows) / len(rows)
            got = cache.layers[layer].vectors[head, place]
            torch.testing.assert_close(got, mean, rtol=0, atol=1e-5)


def test_what_is_read_of_the_prompt_has_the_precision_of_the_host(cache, recording):
    for (_, k, v), (keys, values, mask) in next(writing(cache, recording)):
        for head in HEADS:
            *prompt, new = torch.cat((k, v), dim=-1)[head]
            prompt = [torch.cat((rounded(row[:DIM]), rounded(row[DIM:]))) for row in prompt]
            known = torch.stack([*prompt, new])
            seen = torch.cat((keys, values), dim=-1)[head][mask[head, 0]]
            off = [(known - row).abs().amax(dim=-1) for row in seen]
            assert max(x.min().item() for x in off) < 1e-5
            assert len({x.argmin().item() for x in off}) == len(seen) > WINDOW


def test_the_bits_do_not_change_what_sentencekv_selects(cache, recording):
    exact = filled("sentencekv_16bit", recording)
    for steps in zip(writing(cache, recording, 20), writing(exact, recording, 20)):
        for ours, theirs in zip(*steps):
            assert torch.equal(ours[1][2], theirs[1][2])
        for our_layer, exact_layer in zip(cache.layers, exact.layers):
            assert torch.equal(our_layer.slot_row, exact_layer.slot_row)


def write_sentences(cache, recording, n_sentences):
    """Of 10 tokens. Returns the keys and values of all tokens, by layer."""
    layers = recording.qkv
    for seen in writing(cache, recording, 10 * n_sentences):
        layers = [qkv for qkv, _ in seen]
    if n_sentences:
        cache.seal(10)
    return [torch.stack((k, v), dim=2) for _, k, v in layers]


def test_written_rows_are_exact_on_the_host_and_in_the_recent_window(cache, recording):
    n_places, layers = cache.plan.n_places, write_sentences(cache, recording, 2)
    slots = cache.plan.slots_of(N_PROMPT, N_PROMPT + 20)  # nothing was dropped
    for layer, kv in zip(cache.layers, layers):
        written = kv[:, N_PROMPT:]  # (H_kv, 20, 2, D)
        assert torch.equal(layer.host.later[:20], written.transpose(0, 1))
        assert torch.equal(layer.slots[:, slots], written)
        for sentence in range(2):
            mean = written[:, 10 * sentence : 10 * sentence + 10, 0].mean(dim=1)
            got = layer.vectors[:, n_places + sentence]
            torch.testing.assert_close(got, mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n_written", [0, 6])
def test_the_host_holds_eight_bits_of_the_prompt_and_sixteen_of_what_is_written(
        cache, recording, n_written):
    write_sentences(cache, recording, n_written)
    n_sentences = len(random_spans(N_PROMPT)) + n_written
    index = n_sentences * (DIM + 1) / (2 * DIM)  # a vector and a variance each
    rows = N_PROMPT * (4 + 32 / DIM) / 16 + 10 * n_written
    assert cache.cost().elsewhere == pytest.approx(rows + index)

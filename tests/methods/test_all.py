"""What holds for every method: its bytes and its tokens, its name and its settings."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import TINY, random_ids, random_llama
from methods.conftest import (BUDGET, BUDGETED, COARSE, DIM, EIGHT_BITS, FILLED_UP, HEADS, LOSSY,
                              MADE_UP, METHODS, MIXED, N_PROMPT, PUBLISHED, READ_ON, STRICT,
                              WITH_SINKS, Evicting, filled, make_cache, new_cache, read_by,
                              settings_of, try_out, write, writing)

from cache import SentenceKVCache
from sentencekv import SentenceKVConfig

MHA = replace(TINY, num_attention_heads=4, num_key_value_heads=4)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_shared_prefill_answers_like_a_prefill_alone(model, recording, method):
    alone = new_cache(method, recording)
    model.prefill(random_ids(N_PROMPT, "cpu"), alone)
    assert torch.equal(write(model, alone), write(model, filled(method, recording)))


@pytest.mark.slow
@pytest.mark.parametrize("config, n_prompt", [
    (TINY, 5), (TINY, 40), (TINY, N_PROMPT), (MHA, N_PROMPT)], ids=["5", "40", "150", "MHA"])
def test_no_method_holds_more_than_its_budget(config, n_prompt):
    """While 80 tokens are written after a prompt shorter than the window, than the budget, and
    longer. A budget is the mean of all heads and layers."""
    model = random_llama(config=config)
    recording = read_by(model, n_prompt)
    for method in STRICT:
        cache, held = filled(method, recording), []
        for step, token in enumerate(random_ids(n_prompt + 80, "cpu")[n_prompt:]):
            if step and step % 10 == 0:
                cache.seal(10)
            assert model.decode(token[None], cache).isfinite().all()
            held.append(cache.cost().held)
        assert max(held) <= BUDGET + 1e-4, method
        enough = min(n_prompt + 1, BUDGET) - COARSE[method]
        if method in EIGHT_BITS:
            enough *= (DIM + 2) / (2 * DIM)
        assert held[0] >= enough - 1e-4, method


@pytest.mark.slow
@pytest.mark.parametrize("method", FILLED_UP)
def test_what_is_held_stays_within_the_budget_of_sixty_written_tokens(recording, method):
    cache = filled(method, recording)
    for _ in writing(cache, recording, 60):
        assert BUDGET - 1 < cache.cost().held <= BUDGET


@pytest.mark.parametrize("spec", ["sentencekv", "sentencekv_16bit", "published",
                                  "sentencekv:sentence_limit=8", "sentencekv:reuse_layers=2"])
def test_the_device_of_sentencekv_is_counted_as_its_tensors_in_bfloat16(recording, spec):
    cache = filled(spec, recording)
    config = SentenceKVConfig(token_budget=BUDGET, **settings_of(spec))
    kept = SentenceKVCache(config, TINY, 205, "cpu", torch.bfloat16).layers
    table = sum(getattr(layer, name)[:, :1].nbytes for layer in kept for name in layer.TABLE)
    held = sum(x.nbytes for layer in kept for x in (
        layer.slots, layer.slot_row, layer.slot_place, layer.slot_missing, layer.packing.mean,
        layer.packing.deviation))
    n_heads = len(kept) * TINY.num_key_value_heads
    tokens = (held + table * cache.plan.n_places) / (n_heads * 2 * DIM * 2)
    assert cache.cost().device == pytest.approx(tokens)


@pytest.mark.parametrize("method, numbers", [("h2o", 1), ("cascading", 2), ("snapkv", 0)])
def test_the_device_also_has_scores_of_32_bits(recording, method, numbers):
    cache = filled(method, recording)
    for _ in writing(cache, recording, 1):
        held, _, read, device = cache.cost()
    assert device == pytest.approx(read + held * 2 * numbers / (2 * DIM))


@pytest.mark.parametrize("method, whole", [("full", 1), ("best_tokens", 0.5),
                                           ("best_sentences", 0.5)])
def test_what_reads_every_key_has_every_key_on_the_device(recording, method, whole):
    cache = filled(method, recording)
    for _ in writing(cache, recording, 1):
        assert cache.cost().device >= whole * (N_PROMPT - 2)  # the last 2 are in no sentence yet


def tensors(value) -> list:
    """All tensors in a cache."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [x for part in value for x in tensors(part)] if isinstance(value, (list, tuple)) else []


def keys_seen(attended, head):
    keys, _, mask = attended
    if mask is None:
        return keys[head]
    mask = mask if mask.dtype == torch.bool else mask > -math.inf
    return keys[head][mask.expand(len(keys), -1, -1).any(dim=1)[head]]


def is_in(rows, others):
    """Which rows (n, D) are among others (m, D)."""
    return (rows[:, None] == others[None]).all(dim=-1).any(dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [method for method in PUBLISHED if method not in MIXED])
def test_nothing_of_a_forgotten_token_is_left(model, method):
    """What no head attends to after 60 tokens is in no tensor of a cache that forgets, and NaN in
    the prompt's tensors changes nothing any more."""
    recording = read_by(model)
    prompt = [k for _, k, _ in recording.qkv]
    recording.qkv = [tuple(x.clone() for x in layer) for layer in recording.qkv]
    cache = filled(method, recording)
    for layer in recording.qkv:
        for x in layer:
            x.fill_(math.nan)
    for seen in writing(cache, recording, 60):
        for _, (keys, values, mask) in seen:
            assert keys.isfinite().all() and values.isfinite().all()
            assert mask is None or not mask.isnan().any()
    if cache.cost().elsewhere > cache.cost().held:
        return  # it forgets nothing
    held = [x for x in tensors(list(vars(cache).values())) if x.shape[-1:] == (DIM,)]
    for (_, attended), k in zip(seen, prompt):
        for head, keys in enumerate(k):
            forgotten = keys[~is_in(keys, keys_seen(attended, head))]
            assert not any(is_in(forgotten, x.reshape(-1, DIM)).any() for x in held)


@pytest.mark.slow
@pytest.mark.parametrize("method", [m for m in BUDGETED if m not in EIGHT_BITS])
def test_every_token_is_attended_to_where_it_was_read(recording, method):
    """A key is turned to its position: those that are not made up are the prompt's own, or written
    ones, each once."""
    *_, seen = writing(filled(method, recording), recording, 200)
    (_, everything, _), attended = seen[-1]
    for head in HEADS:
        keys = keys_seen(attended, head)
        own = keys[is_in(keys, everything[head])]
        assert len(own.unique(dim=0)) == len(own), "no token twice"
        last = is_in(everything[head, -1:], own).all()
        assert method == "best_tokens" or last, "not to itself"
        if method not in MADE_UP:
            assert len(own) == len(keys)


@pytest.mark.parametrize("method", WITH_SINKS)
def test_the_first_tokens_stay(recording, method):
    *_, seen = writing(filled(method, recording), recording, 10)
    (_, k, _), attended = seen[-1]
    for head in HEADS:
        assert is_in(k[head, :4], keys_seen(attended, head)).all()


@pytest.mark.slow
def test_a_budget_for_everything_is_full_attention(model, recording):
    expected = write(model, filled("full", recording))
    for method in METHODS:
        if method not in LOSSY:
            got = write(model, filled(method, recording, 800))
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("method", READ_ON)
def test_a_second_text_is_read_and_a_fork_does_not_disturb(model, recording, method):
    cache = filled(method, recording)
    answers = []
    for own in (cache.fork(), cache.fork()):
        states = model.prefill(random_ids(20, "cpu"), own)
        answers.append(torch.cat([states[-1:], write(model, own, 20)]))
    assert torch.equal(*answers) and answers[0].isfinite().all()


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method 'magic' is not one of full, streamingllm"):
        make_cache("magic", TINY, 100, [(0, 10)], 5)
    with pytest.raises(ValueError, match="method 'two_bit_keys' has a score of its own"):
        make_cache("two_bit_keys:score=gaussian", TINY, 100, [(0, 10)], 5)


@pytest.mark.parametrize("spec, message", [
    ("quest:page=x", "method 'quest:page=x': page is 'x', must be a number"),
    ("quest:colour=3", "method 'quest:colour=3': there is no setting 'colour'"),
    ("quest:page", "settings are name=value,name=value"),
    ("full:page=3", "method 'full:page=3': there is no setting 'page'"),
])
def test_a_setting_that_cannot_be_is_named(spec, message):
    with pytest.raises(ValueError, match=message):
        settings_of(spec)


def test_a_setting_is_an_attribute_of_the_class():
    assert settings_of("quest:page=32,dense_layers=1") == {"page": 32, "dense_layers": 1}
    assert make_cache("quest:page=32", TINY, 100, [(0, 10)], 5).page == 32
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
    other = tmp_path / "other.py"
    other.write_text("import")
    with pytest.raises(ValueError, match="SyntaxError: "):
        try_out(f"{other}:Mine")

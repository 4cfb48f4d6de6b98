"""What holds for a Llama holds for the models beside it: biases, norms of q and k, YaRN."""

import json
import math
from dataclasses import replace

import pytest
import test_cache
import test_model
import torch
from conftest import REFERENCE, TEXT, TINY, greedy, random_llama, write_tiny_folder
from test_compile import Compiled

import generate
from sentencekv import SentenceKVConfig, find_secondary_sinks
from weights.checkpoint import load_model
from weights.config import load_config

CPU = torch.device("cpu")
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128}
SHAPES = {"qwen2": replace(TINY, attention_bias=True), "qwen3": replace(TINY, qk_norm=True),
          "yarn": replace(TINY, rope_scaling=YARN)}


@pytest.fixture(params=SHAPES)
def model(request):
    return random_llama(config=SHAPES[request.param])


SMALL = 300, 15, test_cache.SMALL


@pytest.mark.parametrize("oracle, arguments", [
    ("a_budget_for_everything_is_full_attention", (300, "gaussian")),
    ("a_small_budget_selects_what_the_slow_way_selects", (*SMALL, math.inf, "gaussian")),
    ("a_small_budget_selects_what_the_slow_way_selects", (*SMALL, 2.5, "mean_query")),
    ("offloaded_is_resident_and_the_difference_is_everything", (math.inf, test_cache.SHORT)),
    ("a_second_text_is_read_and_remembered", (40, math.inf, 3)),
])
def test_the_oracles_of_the_cache_hold(model, oracle, arguments):
    getattr(test_cache, f"test_{oracle}")(model, CPU, *arguments)


def test_decoding_one_by_one_equals_one_forward(model):
    test_model.test_decoding_one_by_one_equals_one_forward(model, CPU)


@pytest.mark.slow
def test_compiled_it_selects_what_the_slow_way_selects(model):
    torch.compiler.reset()
    test_cache.test_a_small_budget_selects_what_the_slow_way_selects(
        Compiled(model), CPU, *SMALL, math.inf, "gaussian")


NEAR = [name for name in sorted(path.parent.name for path in REFERENCE.glob("*/expected.json"))
        if "greedy" in json.loads((REFERENCE / name / "expected.json").read_text())]


@pytest.mark.parametrize("name", NEAR)
def test_greedy_tokens_equal_an_independent_implementation(name):
    expected = json.loads((REFERENCE / name / "expected.json").read_text())
    model = load_model(REFERENCE / name, CPU, torch.float32)
    assert greedy(model, expected["ids"], len(expected["greedy"]))[1] == expected["greedy"]


def test_keys_of_one_length_have_no_secondary_sinks():
    """A norm gives all keys of a head the length √D, but for the norm's weights."""
    config = SentenceKVConfig(token_budget=96)
    k = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0))
    k[:, 100:108] *= 0.1
    assert find_secondary_sinks(k, config).sum() == 16
    assert not find_secondary_sinks(torch.nn.functional.rms_norm(k, (8,)), config).any()


@pytest.fixture(params=SHAPES)
def folder(request, tmp_path):
    """A whole folder of each, as it is published."""
    path = write_tiny_folder(tmp_path / "tiny", SHAPES[request.param])
    assert load_config(path) == SHAPES[request.param]
    return path


def answers(capfd, *arguments) -> list:
    status = generate.main([*map(str, arguments), "--device", "cpu", "--dtype", "float32",
                            "--token-budget", "96", "--max-new-tokens", "12"])
    out, err = capfd.readouterr()
    assert status == 0, err
    return [line for line in out.splitlines() if line and not line.startswith(">")]


def test_questions_a_saved_document_a_trace_and_compiled_steps(capfd, folder, tmp_path):
    (tmp_path / "text").write_text(TEXT)
    common, ask = ("--model", folder), ("--ask", "Who slept?", "--ask", "Where?")
    page, saved = tmp_path / "page.html", tmp_path / "saved"
    asked = answers(capfd, "--prompt", tmp_path / "text", *common, *ask, "--save", saved)
    assert asked == answers(capfd, "--load", saved, *common, *ask)
    assert asked == answers(capfd, "--prompt", tmp_path / "text", *common, *ask, "--trace", page)
    assert asked == answers(capfd, "--prompt", tmp_path / "text", *common, *ask, "--compile")
    assert "sentencekv trace 1" in page.read_text()

"""The oracles of tests/test_cache.py once more, with a step that `torch.compile` has compiled."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import test_cache
import torch
from conftest import ROOT, TEXT
from test_cache import BYTES, LEAST, REUSED, SHORT, SMALL, expecting

from cache import SentenceKVCache
from generate import main
from sentencekv import SentenceKVConfig
from support import compiled
from support.timer import StageTimer

pytestmark = pytest.mark.slow


class Compiled:
    """A model that decodes as with --fast, for a cache that selects: two tokens as usual."""

    def __init__(self, model):
        torch.compiler.reset()
        self.plain, self.fast = model, {}  # of each cache
        self.embed_tokens, self.prefill = model.embed_tokens, model.prefill
        self.timer = StageTimer(torch.device("cpu"))

    def decode(self, ids, cache):
        if not isinstance(cache, SentenceKVCache):
            return self.plain.decode(ids, cache)
        if cache not in self.fast:
            self.fast[cache] = compiled.Fast(self.plain, cache, self.timer, n_timed=2)
        return self.fast[cache](ids, cache)

    def to(self, dtype):
        return self if dtype == torch.float32 else Compiled(self.plain.to(dtype))


@pytest.mark.parametrize("oracle, arguments", [
    ("a_budget_for_everything_is_full_attention", (70, "gaussian")),
    ("a_small_budget_selects_what_the_slow_way_selects", (300, 15, SMALL, math.inf, "gaussian")),
    ("a_small_budget_selects_what_the_slow_way_selects", (300, 15, BYTES, math.inf, "gaussian")),
    ("a_small_budget_selects_what_the_slow_way_selects", (300, 15, REUSED, math.inf, "gaussian")),
    ("a_small_budget_selects_what_the_slow_way_selects", (300, 15, LEAST, 1, "votes")),
    ("a_small_budget_selects_what_the_slow_way_selects", (300, 15, SMALL, 2.5, "mean_query")),
    ("offloaded_is_resident_and_the_difference_is_everything", (math.inf, SHORT)),
    ("what_is_not_selected_takes_no_part_in_attention", (SHORT,)),
    ("a_second_text_is_read_and_remembered", (40, math.inf, 3)),
    ("room_for_more_sentences_is_made", ()),
])
def test_the_oracles_hold(tiny, device, oracle, arguments, monkeypatch):
    if oracle.startswith(("offloaded", "what_is_not")):  # a graph cannot hold what these do
        monkeypatch.setattr(compiled, "GraphedDecode", lambda model: model.decode)
    getattr(test_cache, f"test_{oracle}")(Compiled(tiny), device, *arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_answer_is_the_same(capfd, tiny_folder, tmp_path, dtype):
    """Of the command line. In 16 bits, only that there is one: fused operations round
    less often."""
    torch.compiler.reset()
    (tmp_path / "prompt.txt").write_text(TEXT)
    arguments = ["--prompt", tmp_path / "prompt.txt", "--model", tiny_folder, "--device", "cpu",
                 "--dtype", dtype, "--raw", "--token-budget", 128, "--max-new-tokens", 20]
    answers = []
    for more in ([], ["--compile"], ["--fast"]):
        assert main(arguments + more) == 0
        answers.append(capfd.readouterr().out)
    if dtype == "float32":
        assert answers[0] == answers[1] == answers[2]
    assert min(map(len, answers)) > 10


def test_fast_says_what_it_did_and_has_the_stages_of_the_first_tokens(
        capfd, tiny_folder, tmp_path, monkeypatch):
    """A later question has the fast step at once."""
    torch.compiler.reset()
    monkeypatch.setattr(compiled.Fast.__init__, "__defaults__", (5,))
    (tmp_path / "prompt.txt").write_text(TEXT)
    arguments = ["--prompt", tmp_path / "prompt.txt", "--model", tiny_folder, "--device", "cpu",
                 "--dtype", "float32", "--token-budget", 128, "--max-new-tokens", 15, "--fast"]
    assert main([*arguments, "--raw", "--json"]) == 0
    out, err = capfd.readouterr()
    report = json.loads(out)
    steps = report["decode_steps"], report["fast_steps"]
    assert sum(steps) == report["new_tokens"] - 1 - 3 and steps[0] == 5
    stages = report["stages_ms"]
    assert {"select", "load", "attention"} <= stages["decode"].keys()
    assert report["decode_ms_per_token"] == stages["fast"]["total"] / steps[1]
    assert "--fast: compiling took " in err and f"; {steps[1]} tokens after it took " in err
    assert main([*arguments, "--ask", "Who?", "--ask", "Why?"]) == 0
    err = capfd.readouterr().err
    assert err.count("--fast: compiling took ") == 1 and err.count("ms/token") == 2


def test_on_the_default_weights(default_model):
    """As many rows are selected and loaded, and the model says the same."""
    model = Compiled(default_model)
    config = SentenceKVConfig(token_budget=96, sentence_limit=40, kv_bits=16)
    spans = [(start, start + 15) for start in range(0, 300, 15)]
    caches = [expecting(SentenceKVCache(config, default_model.config, 340, "cpu", torch.float32),
                        spans) for _ in range(2)]
    ids = torch.arange(1000, 1330)
    for cache in caches:
        model.prefill(ids[:300], cache)
    for token in ids[300:]:
        fast = model.decode(token[None], caches[0])
        torch.testing.assert_close(fast, default_model.decode(token[None], caches[1]),
                                   rtol=1e-3, atol=1e-3)
    reports = [cache.report() for cache in caches]
    for name in ("selected_bytes", "loaded_bytes"):
        assert reports[0][name] == reports[1][name] > 0


def test_without_a_compiler_one_line_says_so(tmp_path):
    """Before anything is read: there is no such prompt, and no such model. With --fast it goes on:
    the second line is about these."""
    def run(option):
        return subprocess.run(
            [sys.executable, "generate.py", "--prompt", "no.txt", "--model", "no", "--device",
             "cpu", option], cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"CXX": "/no/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})

    done = run("--compile")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("generate.py: --compile needs a compiler: ")
    assert done.stderr.count("\n") == 1
    done = run("--fast")
    assert done.stderr.startswith("--fast needs a compiler: ")
    assert done.stderr.count("\n") == 2 and "\ngenerate.py: " in done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no compiler on this machine")
@pytest.mark.parametrize("option, end", [
    ("--compile", "echo no space >&2; echo left >&2; exit 1"), ("--fast", "kill -9 $$")])
def test_a_compiler_that_fails_later_is_one_line(tiny_folder, tmp_path, option, end):
    """After what is tried before anything is read: the prompt is a pipe, so the test knows when.
    With --fast the answer is not lost."""
    compiler, prompt, broken = (tmp_path / name for name in ("cxx", "prompt", "broken"))
    compiler.write_text(f'#!/bin/bash\n[ -e {broken} ] && {{ {end}; }}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    os.mkfifo(prompt)
    running = subprocess.Popen(
        [sys.executable, "generate.py", "--prompt", prompt, "--model", tiny_folder, "--device",
         "cpu", "--raw", "--max-new-tokens", "40", option], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"CXX": str(compiler), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "c")})
    with open(prompt, "w") as pipe:  # which waits until it is read
        broken.touch()
        pipe.write(TEXT)
    out, err = running.communicate()
    if option == "--fast":
        assert running.returncode == 0 and len(out) > 20
        assert err.count("--fast: the compiler failed: ") == err.count("the compiler") == 1
        return
    assert running.returncode == 2 and err.count("\n") == 1, err
    assert err.startswith("generate.py: --compile: the compiler failed: ") and len(err) < 1002

"""Several ranks answer as one process does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, write_tiny_folder

import generate
from support import ranks

pytestmark = pytest.mark.slow
TEXT = "It was late. The fox slept, dreaming of three geese! Where had they gone? " * 5


def answer(folder, n_ranks, *options):
    (folder / "prompt.txt").write_text(TEXT)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_ranks)]
    done = subprocess.run(
        [sys.executable, *(launch if n_ranks > 1 else []), "generate.py", "--prompt",
         folder / "prompt.txt", "--model", folder, "--dtype", "float32", "--token-budget", "64",
         "--max-new-tokens", "30", "--json", *options], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done


@pytest.mark.parametrize("config, options", [
    (TINY, ()),
    (replace(TINY, attention_bias=True, o_proj_bias=True, mlp_bias=True, tie_word_embeddings=True),
     ("--prefill-chunk", "100", "--keep-factor", "2", "--temperature", "1")),
    (replace(TINY, attention_bias=True), ()),
    (replace(TINY, qk_norm=True), ()),
], ids=["plain", "biases, tied, sampled", "qwen2", "qwen3"])
def test_two_ranks_write_what_one_process_writes(tmp_path, config, options):
    folder = write_tiny_folder(tmp_path / "tiny", config)
    one, two = (answer(folder, n, *options) for n in (1, 2))
    assert two.returncode == 0, two.stderr
    one, two = (json.loads(done.stdout) for done in (one, two))
    for name in ("text", "new_tokens", "full_kv_bytes", "host_kv_bytes", "selected_bytes"):
        assert one[name] == two[name], name
    assert two["device_kv_parts"]["slots"] == one["device_kv_parts"]["slots"]


ORACLES = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import math
from pathlib import Path
import torch
import test_cache
from weights.checkpoint import load_model
from support.ranks import join_ranks, leave_ranks, own_part

join_ranks("cpu")
model = load_model(Path({folder!r}), torch.device("cpu"), torch.float32)
test_cache.TINY = own_part(test_cache.TINY)  # the shape of the caches: one KV head
small = test_cache.SMALL, math.inf, "gaussian"
test_cache.test_a_budget_for_everything_is_full_attention(model, "cpu", 70, "gaussian")
test_cache.test_a_small_budget_selects_what_the_slow_way_selects(model, "cpu", 300, 15, *small)
test_cache.test_a_second_text_is_read_and_remembered(model, "cpu", 40, math.inf, 3)
test_cache.test_offloaded_is_resident_and_the_difference_is_everything(
    model, "cpu", 1, test_cache.SHORT)
test_cache.test_what_is_not_selected_takes_no_part_in_attention(model, "cpu", test_cache.SHORT)
print("all hold")
sys.stdout.flush()
leave_ranks(0)
"""


def test_the_oracles_hold_on_each_of_two_ranks(tmp_path):
    """Each rank's cache, with its KV head, against a slow one, a full one and a resident one."""
    folder, script = write_tiny_folder(tmp_path / "tiny"), tmp_path / "oracles.py"
    script.write_text(ORACLES.format(root=str(ROOT), folder=str(folder)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         script], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all hold") == 2


def test_heads_that_cannot_be_divided_are_one_line(tmp_path):
    """Rank 0 says so, and the others are silent."""
    done = answer(write_tiny_folder(tmp_path / "tiny"), 3)
    line = "generate.py: 3 ranks cannot share this model: num_key_value_heads is 2"
    assert done.stderr.count(line) == 1 and not done.stdout and done.returncode != 0


def rank(folder, number, port, **how):
    """One of two ranks, which writes for a long time."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("eos_token_id", None)  # the model never stops by itself
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "prompt.txt").write_text(TEXT)
    return subprocess.Popen(
        [sys.executable, "generate.py", "--prompt", folder / "prompt.txt", "--model", folder,
         "--device", "cpu", "--max-new-tokens", "1500"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {
            "OMP_NUM_THREADS": "1", "RANK": str(number), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | how)


@pytest.fixture
def listening():
    with socket.socket() as server:
        server.settimeout(120)
        server.bind(("0.0.0.0", 0))
        server.listen()
        yield server


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(tmp_path, listening, victim):
    folder = write_tiny_folder(tmp_path / "tiny")
    port = listening.getsockname()[1]
    listening.close()
    both = [rank(folder, number, port) for number in range(2)]
    both[0].stdout.read(5)  # it answers
    both[victim].kill()
    _, err = both[1 - victim].communicate(timeout=60)
    both[victim].communicate()
    assert both[1 - victim].returncode == 2 and err.count("\n") == 1, err
    assert err.startswith("generate.py: another rank has ended: ")


def test_ranks_that_cannot_meet_say_so_in_a_line(tmp_path, listening):
    folder, port = write_tiny_folder(tmp_path / "tiny"), listening.getsockname()[1]
    for how in ({}, {"MASTER_ADDR": "nowhere.invalid"}):
        running = rank(folder, 0, port, **how)
        _, err = running.communicate(timeout=60)
        assert running.returncode == 2 and err.startswith("generate.py: the ranks cannot meet: ")
        assert err.count("\n") == 1


def test_a_rank_that_waits_for_the_others_ends_at_sigterm(tmp_path, listening):
    """Those who listen here never answer."""
    running = rank(write_tiny_folder(tmp_path / "tiny"), 1, listening.getsockname()[1])
    connection, _ = listening.accept()  # it waits
    time.sleep(1)
    running.send_signal(signal.SIGTERM)
    _, err = running.communicate(timeout=60)
    connection.close()
    assert (running.returncode, err) == (-signal.SIGTERM, "")


MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("environment, message", [
    ({"RANK": "one"}, "RANK is 'one' in the environment, must be a number"),
    ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE is '2.0' in the environment, must be a number"),
    ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2' in the environment, must be a number"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0 in the environment, must be at least 1"),
    ({"WORLD_SIZE": "2"}, "no RANK and no MASTER_ADDR and no MASTER_PORT"),
    ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "RANK is 2 in the environment, must be less"),
    ({"WORLD_SIZE": "2", "RANK": "0", **MEETING, "MASTER_PORT": "99999"}, "less than 65536"),
    ({"WORLD_SIZE": "2", "RANK": "0", **MEETING, "LOCAL_RANK": "a"}, "LOCAL_RANK is 'a'")])
def test_what_no_launcher_sets_is_refused(monkeypatch, environment, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *MEETING):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        generate.parse(["--prompt", "file.txt"])
    assert ranks.place()[0] == 0  # so that the line is printed


@pytest.mark.parametrize("environment, place", [
    ({"RANK": "1"}, (0, 1)), ({"RANK": "1", "WORLD_SIZE": "1"}, (0, 1)),
    ({"RANK": "", "WORLD_SIZE": ""}, (0, 1)),
    ({"RANK": "1", "WORLD_SIZE": "3", **MEETING}, (1, 3))])
def test_a_rank_counts_among_several_only(monkeypatch, environment, place):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ranks.check_environment()
    assert ranks.place() == place


def test_what_needs_a_single_process_is_refused(monkeypatch):
    monkeypatch.setattr(generate, "RANKS", 2)
    for option in (["--trace", "trace.html"], ["--save", "file"], ["--chat"], ["--show-sentences"]):
        with pytest.raises(ValueError, match="--show-sentences need a single one"):
            generate.parse(["--prompt", "file.txt", *option])
    for option in (["--compile"], ["--fast"], ["--reuse-layers", "2"]):
        with pytest.raises(ValueError, match=f"{' '.join(option)} is for a single process"):
            generate.parse(["--prompt", "file.txt", *option])


class Stored:
    """An open safetensors file of one tensor."""

    def __init__(self, tensor):
        self.tensor = tensor

    def get_tensor(self, name):
        assert "q_proj" not in name, "never read whole"
        return self.tensor

    def get_slice(self, name):
        return self

    def get_shape(self):
        return list(self.tensor.shape)

    def __getitem__(self, index):
        return self.tensor[index]


def test_the_parts_of_all_ranks_are_the_whole(monkeypatch):
    monkeypatch.setattr(ranks, "RANKS", 3)
    whole = torch.randn(12, 6)
    parts = {}
    for rank in range(3):
        monkeypatch.setattr(ranks, "RANK", rank)
        for name in ("q_proj.weight", "o_proj.weight", "o_proj.bias", "norm.weight"):
            parts.setdefault(name, []).append(ranks.read_part(Stored(whole), f"a.{name}"))
    assert torch.equal(torch.cat(parts["q_proj.weight"]), whole)
    assert torch.equal(torch.cat(parts["o_proj.weight"], dim=1), whole)
    assert torch.equal(sum(parts["o_proj.bias"]), whole)
    assert all(torch.equal(part, whole) for part in parts["norm.weight"])

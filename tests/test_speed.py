import io
import os
import subprocess
import sys
from queue import Queue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

from benchmarks import llamacpp, rival, rows, scale, speed
from weights.gguf_file import half_split_rows


def run(*arguments):
    return speed.main([str(a) for a in arguments])


def test_a_table_a_row_for_each_length_and_method_and_a_picture(tiny_folder, tmp_path, capsys):
    out, book = tmp_path / "speed.jsonl", tmp_path / "book.txt"
    book.write_text("A sentence is here. And another one! " * 60)
    assert run("--model", tiny_folder, "--data", book, "--lengths", "200,400", "--token-budget", 96,
               "--new-tokens", 10, "--repeats", 1, "--device", "cpu", "--out", out) == 0
    about, found = rows.read(out)
    assert about["inputs"].keys() == {"book.txt"} and about["copy_bytes_per_second"] > 0
    assert [(r["length"], r["method"]) for r in found] == [
        (200, "full"), (200, "sentencekv"), (400, "full"), (400, "sentencekv")]
    for row in found:
        stages = row["stages_ms_per_token"]
        parts = sum(ms for name, ms in stages.items() if name != "total")
        assert parts == pytest.approx(stages["total"])
        assert 0 < row["floor_ms"] and 0 < row["decode_ms_per_token"] <= row["decode_p90_ms"] * 1.01
        assert row["peak_device_bytes"] is None
    assert {"select", "load", "seal"} <= found[1]["stages_ms_per_token"].keys()
    assert found[3]["full_kv_bytes"] > 1.5 * found[1]["full_kv_bytes"]
    out_lines = capsys.readouterr().out
    assert "| method | ms after 200 | ms after 400 |" in out_lines
    assert "| 400 | sentencekv |" in out_lines
    assert out.with_suffix(".png").stat().st_size > 1000


def test_a_real_shape_with_random_weights(monkeypatch, capsys):
    small = speed.CONFIGS["smollm2-135m"] | {"num_hidden_layers": 2, "vocab_size": 500}
    monkeypatch.setitem(speed.CONFIGS, "smollm2-135m", small)
    assert run("--config", "smollm2-135m", "--lengths", 300, "--token-budget", 96, "--new-tokens",
               4, "--repeats", 1, "--device", "cpu", "--dtype", "bfloat16") == 0
    out = capsys.readouterr().out
    assert "smollm2-135m, bfloat16" in out and "| 300 | sentencekv |" in out


@pytest.mark.parametrize("name", ["llama-3.2-1b", "llama-3.1-8b", "smollm2-135m"])
def test_the_shapes_are_those_of_the_models(name):
    config = speed.parse_config(speed.CONFIGS[name])
    with torch.device("meta"):
        n_weights = sum(p.numel() for p in speed.Llama(config).parameters())
    assert n_weights == {"llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248,
                         "smollm2-135m": 134_515_008}[name]


@pytest.mark.parametrize("arguments, message", [
    (["--lengths", "90000"], "90000 prompt tokens + 16 new ones = 90016, and the model has"),
    (["--lengths", "500", "--data", ".gitignore"], "--data has"),
    (["--lengths", "100", "--cuda-graph"], "--cuda-graph needs a GPU"),
    (["--lengths", "100", "--token-budget", "8"], "token_budget is 8"),
    (["--lengths", "100", "--model", "nowhere"], "--model nowhere: no such folder"),
])
def test_bad_options_are_one_line(tiny_folder, capsys, arguments, message):
    assert run("--device", "cpu", "--repeats", 1, "--new-tokens", 2,
               *([] if "--model" in arguments else ["--model", tiny_folder]), *arguments) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and err[-1].startswith("benchmarks.speed: ")


def test_one_layer_is_measured_at_every_length(tmp_path, capsys):
    out = tmp_path / "scale.jsonl"
    assert scale.main(["--lengths", "1000,3000", "--token-budget", "128", "--new-tokens", "30",
                       "--device", "cpu", "--dtype", "float32", "--out", str(out)]) == 0
    _, found = rows.read(out)
    assert [row["length"] for row in found] == [1000, 3000]
    for row in found:
        assert {*scale.STAGES, "all"} <= row.keys()
        assert 0 < row["hits"] < 1 and row["host"] >= row["length"] * 8 * 2 * (128 + 2)
        assert row["bound_ms"].keys() == set(scale.STAGES)
        assert all(0 < row[stage] < row["all"] for stage in scale.STAGES)
    assert "| 3,000 |" in capsys.readouterr().out


def test_what_is_restored_is_a_document_that_was_read():
    """Its rows are in sentences, whose vectors are means of their keys. Place 0 are the sinks."""
    n = 19
    cache = scale.filled_cache(n, 128, 100, torch.device("cpu"), torch.float32)
    layer, plan = cache.layers[0], cache.plan
    assert (plan.num_tokens, plan.n_places) == (n * scale.SENTENCE, 1 + n)
    keys = layer.packing.unpack(layer.host.read(0, n * scale.SENTENCE)[:, :, 0])  # (H_kv, N, D)
    vectors = layer.packing.unpack(layer.vectors)[:, 1 : 1 + n]
    means = keys.unflatten(1, (n, scale.SENTENCE)).mean(dim=2)
    torch.testing.assert_close(vectors, means, rtol=0, atol=0.03)  # in 8 bits
    assert layer.vectors[:, 0].eq(0).all() and layer.lengths[:, 0].eq(0).all()
    assert (layer.starts[0, :3].tolist(), layer.ends[0, :3].tolist()) == ([0, 4, 25], [4, 25, 50])


def test_llama_cpp_gets_its_own_order_of_rows():
    weight = np.random.default_rng(0).normal(size=(24, 5))
    assert (half_split_rows(llamacpp.interleaved_rows(weight, 3), 3) == weight).all()


def test_llama_cpp_is_for_the_default_model(capsys):
    assert run("--config", "smollm2-135m", "--lengths", 100, "--device", "cpu", "--compare",
               "llama.cpp", "--token-budget", 96, "--dtype", "bfloat16") == 2
    assert "--compare llama.cpp is for the default model on a CPU" in capsys.readouterr().err


class Server:
    """As xllamacpp's: calls back for every token, and once more at the end."""

    def handle_completions(self, request, callback):
        for i in range(request["n_predict"]):
            callback({"choices": [{"text": f"{request['prompt'][0]} {i}"}]})
        callback({"choices": [], "timings": {"predicted_per_token_ms": 7.5}})


def test_llama_cpp_s_tokens_are_waited_for_one_by_one():
    subject = rival.LlamaCpp.__new__(rival.LlamaCpp)
    subject.server, subject.prompt, subject.n_new = Server(), [7], 5
    subject.tokens, subject.own = Queue(), {}
    answer = rival.measure(subject, 5)
    assert len(answer["tokens"]) == 5 and answer["own_ms_per_token"] == 7.5
    assert subject.tokens.empty()
    subject.tokens.put({"error": "no room"})
    with pytest.raises(ValueError, match="llama.cpp: no room"):
        subject.step()


class Echo:
    """A rival that says what it was asked."""

    def __init__(self, request):
        self.request = request

    def prefill(self):
        if self.request["length"] == 300:
            raise ValueError("300 is too long")

    step = prefill

    def report(self):
        return {"own_ms_per_token": self.request["threads"], "read_bytes": 10}


@pytest.mark.parametrize("length, status", [(200, 0), (300, 2)])
def test_a_rival_has_a_process_of_its_own(tiny_folder, tmp_path, capsys, monkeypatch, length,
                                          status):
    (tmp_path / "book.txt").write_text("A sentence is here. And another one! " * 60)
    monkeypatch.setattr(rival, "KINDS", {"transformers": Echo})
    answers = []

    def start(command, **options):
        assert command[1:] == ["-m", "benchmarks.rival"]
        monkeypatch.setattr(sys, "stdin", io.StringIO(options["input"]))
        code = rival.main()
        out, err = capsys.readouterr()
        answers.append(out)
        return subprocess.CompletedProcess(command, code, out, err)

    monkeypatch.setattr(speed, "subprocess", SimpleNamespace(run=start))
    out = tmp_path / "speed.jsonl"
    assert run("--model", tiny_folder, "--data", tmp_path / "book.txt", "--lengths", length,
               "--token-budget", 96, "--new-tokens", 4, "--repeats", 2, "--device", "cpu",
               "--compare", "transformers", "--out", out) == status
    if status:
        assert capsys.readouterr().err.splitlines()[-1].endswith("transformers: 300 is too long")
        return
    row = rows.read(out)[1][-1]
    assert row["method"] == "transformers" and row["own_ms_per_token"] == torch.get_num_threads()
    assert len(answers) == 2 and row["floor_ms"] > 0 and row["hit_rate"] is None


def test_no_pytorch_is_beside_llama_cpp():
    subprocess.run([sys.executable, "-c", "import sys, benchmarks.rival;"
                    " assert 'torch' not in sys.modules"], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_script_for_a_gpu_is_rehearsed_with_a_tiny_shape(tmp_path):
    """Every step leaves its rows, and a second run does nothing."""
    def rehearse(steps):
        done = subprocess.run(["sh", "benchmarks/runs/gpu.sh", "--rehearse"], cwd=ROOT, text=True,
                              env=os.environ | {"PYTHON": sys.executable, "STEPS": steps,
                                                "RESULTS": str(tmp_path)}, capture_output=True)
        assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
        return done.stdout

    assert " passed" in rehearse("tests times kernels long")
    _, times = rows.read(tmp_path / "gpu_times.jsonl")
    assert {(row["method"], row["length"]) for row in times} == {
        (method, length) for method in ("full", "sentencekv, compiled") for length in (200, 400)}
    _, kernels = rows.read(tmp_path / "gpu_kernels.jsonl")
    assert all(number > 0 for row in kernels for number, _ in row["operators"].values())
    _, (long,) = rows.read(tmp_path / "gpu_long.jsonl")
    assert (long["method"], long["length"]) == ("sentencekv", 800)
    assert "times: there\nkernels: there\nlong: there\n" in rehearse("times kernels long")

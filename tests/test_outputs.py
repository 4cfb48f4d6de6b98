"""The files of --save and --trace are written whole, and replace nothing that would be lost."""

import os
import socket
import stat
from pathlib import Path

import pytest
from conftest import TEXT

import generate
from support import outputs


@pytest.fixture
def place(tmp_path, tiny_folder):
    """A folder with a prompt, `p`, and a model, `tiny`, that has a chat template."""
    (tmp_path / "p").write_text(TEXT)
    (tiny_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}<end>{% endfor %}")
    return tmp_path


def answer(place, *options, prompt="p"):
    return generate.main(["--prompt", place / prompt, "--model", place / "tiny", "--device", "cpu",
                          "--max-new-tokens", 3, "--ask", "Who?", *options])


def link(path: Path, target, hard=False) -> Path:
    path.hardlink_to(target) if hard else path.symlink_to(target)
    return path


def in_a_socket(place) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(place)  # its name must be short
        server.bind("socket")
    return place / "socket"


def in_a_hub_cache(place) -> Path:
    """The model's files are links to blobs."""
    cached = place / "models--a--b"
    (cached / "blobs").mkdir(parents=True)
    snapshot = cached / "snapshots" / "tiny"
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted((place / "tiny").iterdir())):
        blob = path.rename(cached / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (place / "tiny").rmdir()
    (place / "tiny").symlink_to(snapshot)
    return cached / "blobs" / "blob1"


def in_its_refs(place) -> Path:
    """The model is the cache's folder: a file says which snapshot is read."""
    cached = in_a_hub_cache(place).parents[1]
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("tiny")
    (place / "tiny").unlink()
    (place / "tiny").symlink_to(cached)
    return cached / "refs" / "main"


KEPT = {
    "the prompt": lambda place: place / "p",
    "the prompt, another path": lambda place: place / "tiny" / ".." / "p",
    "the prompt, through a linked folder": lambda place: link(place / "here", place) / "p",
    "the prompt, a hard link": lambda place: link(place / "hard", place / "p", hard=True),
    "the prompt, links to links": lambda place: link(place / "b", link(place / "a", "p").name),
    "the weights": lambda place: place / "tiny" / "model.safetensors",
    "the weights, a hard link": lambda place: link(
        place / "hard", place / "tiny" / "model.safetensors", hard=True),
    "a new file of the model": lambda place: place / "tiny" / "generation_config.json",
    "the same through a link": lambda place: link(place / "x", place / "tiny" / "special.json"),
    "a blob of the hub's cache": in_a_hub_cache,
    "the revision in the hub's cache": in_its_refs,
    "a device": lambda place: Path("/dev/null"),
    "standard output": lambda place: Path("/dev/stdout"),
    "a descriptor": lambda place: Path(f"/proc/self/fd/{os.open(place / 'p', os.O_RDONLY)}"),
    "a socket": in_a_socket,
    "links in a circle": lambda place: link(place / "c", link(place / "d", "c").name),
    "a name that is too long": lambda place: place / ("x" * 256),
    "a folder that is absent": lambda place: link(place / "e", place / "absent" / "file"),
}


def everything(place) -> dict:
    """What all files hold, and what kind of file they are."""
    found = {}
    for path in place.rglob("*"):
        kind = path.lstat().st_mode
        found[path] = kind, path.read_bytes() if stat.S_ISREG(kind) else None
    return found


@pytest.mark.parametrize("option", ["--save", "--trace"])
@pytest.mark.parametrize("where", KEPT)
def test_what_would_be_lost_is_refused_before_anything_is_read(capfd, place, monkeypatch, where,
                                                               option):
    monkeypatch.chdir(place)
    monkeypatch.setattr(generate, "load_model", lambda *_: pytest.fail("read"))
    path = KEPT[where](place)
    before = everything(place)
    status, (out, err) = answer(place, option, path), capfd.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert everything(place) == before


def test_a_gguf_file_is_not_replaced(capfd, place):
    (place / "m.gguf").write_bytes(b"GGUF")
    for path in (place / "m.gguf", link(place / "x", place / "m.gguf", hard=True)):
        status = generate.main(["--prompt", place / "p", "--model", place / "m.gguf", "--save",
                                path])
        assert status == 2 and f"--save would replace {path}" in capfd.readouterr().err


@pytest.mark.parametrize("option", ["--save", "--trace"])
def test_a_file_that_a_stream_is_redirected_to_is_not_replaced(capfd, place, monkeypatch, option):
    """`--prompt - < p`, `> p`."""
    for flags in (os.O_RDONLY, os.O_WRONLY):
        stream = os.open(place / "p", flags)
        monkeypatch.setattr(outputs, "STREAMS", [stream])
        assert answer(place, option, place / "p", prompt="other") == 2
        assert f"{option} would replace {place / 'p'}" in capfd.readouterr().err
        os.close(stream)
        monkeypatch.setattr(outputs, "STREAMS", [stream])  # it is closed
        assert outputs.file_id(stream) is None


def test_two_outputs_are_two_files(capfd, place):
    link(place / "here", place)
    for trace in (place / "d", place / "here" / "d", link(place / "l", "d")):
        assert answer(place, "--save", place / "d", "--trace", trace) == 2
        assert "--trace would replace" in capfd.readouterr().err


def test_a_document_can_be_saved_over_the_one_that_was_loaded(capfd, place):
    """Not a trace."""
    document = place / "d"
    assert answer(place, "--save", document) == 0
    load = ["--load", document, "--model", place / "tiny", "--device", "cpu", "--max-new-tokens", 3]
    first = capfd.readouterr().out
    for path in (document, link(place / "l", "d")):
        assert generate.main([*load, "--ask", "Who?", "--save", path]) == 0
        assert capfd.readouterr().out == first
    assert generate.main([*load, "--trace", link(place / "k", document, hard=True)]) == 2


@pytest.mark.parametrize("option", ["--save", "--trace"])
def test_a_link_stays_and_so_do_the_rights_of_a_file(capfd, place, option):
    (place / "disk").mkdir()
    target = place / "disk" / ("x" * 255)
    for _ in range(2):  # a new file, and one that is there
        path = place / "l"
        path.unlink(missing_ok=True)
        path.symlink_to(f"disk/{target.name}")
        assert answer(place, option, path) == 0
        assert path.is_symlink() and target.stat().st_size > 1000
        assert [*(place / "disk").iterdir()] == [target]
        target.chmod(0o600)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_file_elsewhere_in_the_model_s_folder_is_written(capfd, place):
    (place / "tiny" / "saved").mkdir()
    for _ in range(2):
        assert answer(place, "--save", place / "tiny" / "saved" / "d") == 0


def test_what_fails_while_it_is_written_leaves_what_was_there(place):
    for error, raised in ((OSError(28, "No space left"), ValueError), (SystemExit, SystemExit)):
        with pytest.raises(raised), outputs.replacing(place / "p") as part:
            part.write_text("half")
            raise error
    assert {path.name for path in place.iterdir()} == {"p", "tiny"}
    assert (place / "p").read_text() == TEXT

import doctest
import json
import os
import random
import subprocess
import sys
from datetime import datetime

import fuzz
import pytest
import torch
from conftest import ROOT, TEXT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
from sentencekv import SentenceKVConfig
from support import document as module
from support import questions, schema
from support.bits import Packing
from support.document import Document, identity_of, load_document, save_document
from support.mapped import MappedFile, add_checksums
from weights.checkpoint import fingerprint
from weights.config import load_config

CPU = torch.device("cpu")
DOCUMENT = Document("It is späť.", [3, 1, 2] * 200, [(0, 2), (2, 600)],
                    datetime(2024, 2, 29, 12))
BOUNDS = torch.tensor([0, 6, 9, 600]).repeat(2, 1)  # of 4 + 2 sinks, and of two sentences
POSITIONS = torch.tensor([[50, 70, *(i for i in range(600) if i not in (50, 70))]] * 2).int()
KEPT = {"num_tokens": torch.tensor(600)}  # of 2 layers, with 2 KV heads of 8 channels
for layer in ("0", "1"):
    packing = Packing(2, 8, 8, CPU, torch.float32)
    KEPT |= {f"{layer}.rows": packing.pack(torch.randn(2, 600, 2, 8)).transpose(0, 1).contiguous(),
             f"{layer}.vectors": packing.pack(torch.randn(2, 3, 8)),
             f"{layer}.mean": packing.mean, f"{layer}.deviation": packing.deviation,
             f"{layer}.variances": torch.rand(2, 3), f"{layer}.starts": BOUNDS[:, :-1].int(),
             f"{layer}.lengths": torch.rand(2, 3), f"{layer}.ends": BOUNDS[:, 1:].int(),
             f"{layer}.positions": POSITIONS.clone()}


def save(path, folder, config=SentenceKVConfig()):
    same = identity_of(fingerprint(folder), config, torch.float32)
    save_document(path, DOCUMENT, KEPT, same, config.protected_tokens)
    return path


def load(path, folder, dtype=torch.float32, **settings):
    config = SentenceKVConfig(**settings)
    same = identity_of(fingerprint(folder), config, dtype)
    return load_document(path, same, config.protected_tokens, load_config(folder), CPU)


def test_what_is_loaded_is_what_was_saved(tiny_folder, tmp_path):
    loaded = load(save(tmp_path / "document", tiny_folder), tiny_folder, token_budget=99,
                  score="mean_query", recent_window=8)
    for name in ("text", "ids", "spans", "now"):
        assert getattr(loaded, name) == getattr(DOCUMENT, name)
    assert loaded.kept.keys() == KEPT.keys()
    for name, tensor in KEPT.items():
        assert torch.equal(loaded.kept[name], tensor)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["document"]


def test_rows_given_back_are_read_again(tiny_folder, tmp_path):
    file = MappedFile(save(tmp_path / "document", tiny_folder))
    rows = file.rows(torch.int8, KEPT["0.rows"].shape)
    assert rows.keys() == {"0.rows", "1.rows"}
    for released in ("1.rows", "0.rows", None):
        assert all(torch.equal(tensor, KEPT[name]) for name, tensor in rows.items())
        if released:
            file.release(released)


def test_the_rest_of_a_prompt_follows_the_document():
    assert DOCUMENT.rest([*DOCUMENT.ids, 7]) == [7]
    with pytest.raises(ValueError, match="does not begin with the tokens of the document"):
        DOCUMENT.rest([3, 1])


@pytest.mark.parametrize("settings, message", [
    (dict(dtype=torch.bfloat16), "was saved with dtype float32, not bfloat16"),
    (dict(keep_factor=2), "was saved with keep_factor inf, not 2"),
    (dict(sink_tokens=5), "was saved with sink_tokens 4, not 5"),
    (dict(sentence_limit=128), "was saved with sentence_limit 16, not 128"),
    (dict(recent_window=40), "recent_window is 40, and .* was saved with 32 last tokens"),
])
def test_other_settings_are_refused(tiny_folder, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load(save(tmp_path / "document", tiny_folder), tiny_folder, **settings)


def test_another_model_is_refused(tiny_folder, tmp_path):
    path, weights = save(tmp_path / "document", tiny_folder), tiny_folder / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, weights)
    with pytest.raises(ValueError, match="was saved with another model"):
        load(path, tiny_folder)


def test_a_file_that_is_no_document_is_refused(tiny_folder, tmp_path):
    path = save(tmp_path / "document", tiny_folder)
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:100], whole[:4], b"", b"text", os.urandom(1000),
                    whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a saved document"):
            load(path, tiny_folder)
    with pytest.raises(ValueError, match="was saved with format None, not sentencekv document"):
        load(tiny_folder / "model.safetensors", tiny_folder)
    with pytest.raises(ValueError, match="cannot read .*nowhere"):
        load(tmp_path / "nowhere", tiny_folder)
    with pytest.raises(ValueError, match="cannot read"):
        load(tmp_path, tiny_folder)


def put(tensor, place, value):
    tensor[place] = value
    return tensor


CHANGES = [
    *((name, None) for name in ("spans", "1.rows", "num_tokens", "0.vectors", "ids", "1.ends",
                                "0.positions", "checksums")),
    *((name, lambda t: t.double()) for name in ("0.rows", "1.vectors", "0.lengths", "text", "ids",
                                                "num_tokens", "0.positions", "checksums")),
    *((name, lambda t: t[..., :0]) for name in ("0.rows", "1.vectors", "text", "ids", "spans")),
    *((name, lambda t: t[None]) for name in ("num_tokens", "1.rows", "0.starts", "text")),
    ("num_tokens", lambda t: t + 1), ("num_tokens", lambda t: t.to(torch.complex64)),
    ("1.vectors", lambda t: t[:, 1:]), ("1.vectors", lambda t: t * 0 - 1),
    ("0.mean", lambda t: t / 0), ("1.deviation", lambda t: t * 0), ("0.mean", None),
    ("0.variances", lambda t: put(t, (1, 2), torch.nan)), ("0.variances", lambda t: -t - 1),
    ("1.lengths", lambda t: put(t, (0, 0), 601)), ("1.lengths", lambda t: t * torch.nan),
    ("0.starts", lambda t: t - 1), ("0.starts", lambda t: put(t, (0, 0), -3)),
    ("1.ends", lambda t: t.flip(-1)), ("0.ends", lambda t: t[:, 1:]),
    ("1.ends", lambda t: put(t, (1, 0), 100)),
    ("0.positions", lambda t: put(t, (0, 9), 600)), ("0.positions", lambda t: put(t, (0, 9), 50)),
    ("0.positions", lambda t: t.flip(-1)), ("1.positions", lambda t: t - 1),
    ("spans", lambda t: t + 1), ("spans", lambda t: t[1:]), ("spans", lambda t: t * 0),
    ("spans", lambda t: t[0]), ("spans", lambda t: torch.tensor(3)),
    ("ids", lambda t: t[1:]), ("ids", lambda t: put(t, 7, 260)), ("ids", lambda t: put(t, 7, -1)),
    ("0.rows", lambda t: t[:-1]), ("1.rows", lambda t: t[:, :1]), ("0.rows", lambda t: t.int()),
    ("text", lambda t: t | 255), ("\x1b[2J", lambda t: torch.ones(1))]


def spoil(path, spoil_tensors=None, spoil_metadata=None):
    """Write a document's file again, with other tensors or metadata."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    for change, values in ((spoil_tensors, tensors), (spoil_metadata, metadata)):
        if change:
            change(values)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path,
              metadata)


def refused(path, folder, message=" is not a whole document: "):
    """Loading is refused in one short line of visible characters."""
    with pytest.raises(ValueError, match=message) as error:
        load(path, folder)
    line = str(error.value).replace(str(path), "")
    assert line.isprintable() and len(line) < 300


def test_a_text_that_no_model_can_read_is_refused(tiny_folder, tmp_path, monkeypatch):
    """Before memory is taken for it."""
    path = save(tmp_path / "document", tiny_folder)
    monkeypatch.setattr(schema, "MOST_TEXT", 1)
    refused(path, tiny_folder)


@pytest.mark.parametrize("name, change", CHANGES)
def test_a_document_that_was_changed_is_refused(tiny_folder, tmp_path, name, change):
    path = save(tmp_path / "document", tiny_folder)

    def spoil_tensors(tensors):
        tensor = tensors.pop(name, None)
        if change:
            tensors[name] = change(tensor)

    spoil(path, spoil_tensors)
    refused(path, tiny_folder, "is damaged: the checksum of text and tables is wrong")
    if name == "checksums":
        return
    add_checksums(path)  # its maker knows them
    refused(path, tiny_folder)


def test_a_layer_more_is_refused(tiny_folder, tmp_path):
    path = save(tmp_path / "document", tiny_folder)
    spoil(path, lambda tensors: tensors.update(
        {name.replace("1", "2"): tensor for name, tensor in tensors.items() if name[0] == "1"},
        checksums=torch.zeros(4, dtype=torch.long)))
    add_checksums(path)
    refused(path, tiny_folder)


@pytest.mark.parametrize("name, dtype", [("spans", torch.int64), ("table", torch.int32)])
def test_sentences_whose_lengths_overflow_are_refused(tiny_folder, tmp_path, name, dtype):
    path, far = save(tmp_path / "document", tiny_folder), torch.iinfo(dtype).max
    bounds = torch.tensor([0, 6, far, -far - 1, -1, 600], dtype=dtype)
    assert (bounds.diff() > 0).all()

    def spoil_tensors(tensors):
        if name == "spans":
            tensors["spans"] = torch.stack((bounds[:-1], bounds[1:]), dim=1)
            return
        tensors["spans"] = torch.tensor([(i, i + 1) for i in range(600)])
        for i in (0, 1):
            tensors |= {f"{i}.starts": bounds[:-1].repeat(2, 1), f"{i}.lengths": torch.ones(2, 5),
                        f"{i}.ends": bounds[1:].repeat(2, 1), f"{i}.variances": torch.ones(2, 5),
                        f"{i}.vectors": torch.ones(2, 5, 8 + 2, dtype=torch.int8)}

    spoil(path, spoil_tensors)
    add_checksums(path)
    refused(path, tiny_folder, "wrong 'spans'$" if name == "spans" else "wrong '0.ends'$")


@pytest.mark.parametrize("name, value", [
    ("protected", None), ("protected", "-1"), ("protected", "3.5"), ("protected", "9" * 5000),
    ("protected", "٣٢"), ("now", None), ("now", ""), ("now", "tomorrow\n"),
    ("now", "2024-02-30"), ("now", "x" * 10**6), ("keep_factors", "2"), ("\x1b[2J", "")])
def test_metadata_that_no_document_has_are_refused(tiny_folder, tmp_path, name, value):
    path = save(tmp_path / "document", tiny_folder)

    def spoil_metadata(metadata):
        metadata.pop(name, None)
        if value is not None:
            metadata[name] = value

    spoil(path, spoil_metadata=spoil_metadata)
    add_checksums(path)
    refused(path, tiny_folder)


def test_another_setting_of_a_million_characters_is_one_short_line(tiny_folder, tmp_path):
    path = save(tmp_path / "document", tiny_folder)
    spoil(path, spoil_metadata=lambda metadata: metadata.update(dtype="float\n" * 10**6))
    add_checksums(path)
    refused(path, tiny_folder, "was saved with dtype float float")


def test_thousands_of_layers_are_refused_before_their_checksums(tiny_folder, tmp_path):
    """To look for the place of each would take a time that grows with the square."""
    path = save(tmp_path / "document", tiny_folder)
    spoil(path, lambda tensors: tensors.update(
        {f"{i}.rows": torch.ones(0) for i in range(2, 5000)},
        checksums=torch.zeros(5001, dtype=torch.long)))
    add_checksums(path)
    refused(path, tiny_folder, "wrong 'checksums', '.* and 4995 others$")


def test_numbers_that_are_not_aligned_are_refused(tiny_folder, tmp_path):
    """The text comes first, so that all other tensors begin at an odd byte."""
    path = save(tmp_path / "document", tiny_folder)
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header, body, moved = json.loads(data[8:size]), data[size:], b""
    for name in sorted(header.keys() - {"__metadata__"}, key=lambda name: name != "text"):
        begin, end = header[name]["data_offsets"]
        header[name]["data_offsets"] = [len(moved), len(moved) + end - begin]
        moved += body[begin:end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + moved)
    add_checksums(path)
    refused(path, tiny_folder)


def test_a_flipped_bit_is_refused(tiny_folder, tmp_path):
    """In the length of the header, in the header, in its metadata, in every tensor, anywhere."""
    path = save(tmp_path / "document", tiny_folder)
    whole = path.read_bytes()
    size, choose = 8 + int.from_bytes(whole[:8], "little"), random.Random(0)
    header = json.loads(whole[8:size])
    values = [whole.index(value.encode()) for value in header.pop("__metadata__").values()]
    tensors = [[size + offset for offset in tensor["data_offsets"]] for tensor in header.values()]
    places = [0, 7, len(whole) - 1, *values, *(choose.randrange(*ends) for ends in tensors
                                                    if ends[0] < ends[1])]
    places += [choose.randrange(8, size) for _ in range(10)]
    places += [choose.randrange(len(whole)) for _ in range(60 - len(places))]
    for place in places:
        spoilt = bytearray(whole)
        spoilt[place] ^= 1 << choose.randrange(8)
        path.write_bytes(spoilt)
        with pytest.raises(ValueError) as refused:
            load(path, tiny_folder)
        assert "\n" not in str(refused.value), place
    path.write_bytes(whole)
    assert load(path, tiny_folder).ids == DOCUMENT.ids


def test_a_former_format_is_refused_by_its_name(tiny_folder, tmp_path):
    save_file({"0.rows": torch.zeros(1)}, tmp_path / "old", {"format": "sentencekv document 3"})
    with pytest.raises(ValueError, match="was saved with format sentencekv document 3, not"):
        load(tmp_path / "old", tiny_folder)


def test_a_full_disk_leaves_what_was_there(tiny_folder, tmp_path, monkeypatch):
    path = save(tmp_path / "document", tiny_folder)
    before = path.read_bytes()

    def save_file(tensors, part, metadata):
        part.write_bytes(b"half of it")
        raise module.SafetensorError("No space left on device")

    monkeypatch.setattr(module, "save_file", save_file)
    with pytest.raises(ValueError, match="cannot write .*document: No space left"):
        save(path, tiny_folder)
    assert path.read_bytes() == before and len([*tmp_path.glob("*document*")]) == 1


def test_the_command_line_says_it_in_one_line(capfd, tiny_folder, tmp_path):
    path = save(tmp_path / "document", tiny_folder)
    last = bytearray(path.read_bytes())
    last[-1] ^= 1
    for content, message in ((b"", "not a saved document"), (last, "is damaged: the checksum of")):
        path.write_bytes(content)
        status = generate.main(["--load", str(path), "--model", str(tiny_folder)])
        out, err = capfd.readouterr()
        assert (status, out) == (2, "") and err.count("\n") == 1 and message in err


def test_what_is_no_regular_file_is_refused_before_it_is_opened(tiny_folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", tmp_path, "/dev/zero", "/dev/stdin/x"):
        refused(path, tiny_folder, f"cannot read {path}: ")
    for path in ("/proc/self/maps", "/proc/self/mem", "/proc/kcore"):
        if os.path.exists(path):
            refused(path, tiny_folder, f"{path} is not a saved document|cannot read {path}")


def test_the_fingerprint_covers_every_byte(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    data = bytearray(2**23)
    seen = set()
    for place in (None, 0, 2**16 + 1, 2**22 + 2**16 + 5, 2**23 - 2, 2**23 - 1):
        if place is not None:
            data[place] ^= 1
        weights.write_bytes(data)
        seen.add(fingerprint(tmp_path))
    (tmp_path / "config.json").write_text("{} ")
    assert len(seen | {fingerprint(tmp_path)}) == 7


@pytest.fixture
def saved(capfd, tiny_folder, tmp_path):
    """A document that the program has saved, and the options that load it."""
    (tiny_folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>{% endfor %}assistant: ")
    path, prompt = tmp_path / "document", tmp_path / "prompt"
    prompt.write_text(TEXT)
    common = ["--model", tiny_folder, "--device", "cpu", "--max-new-tokens", 5, "--token-budget",
              64]
    assert generate.main(["--prompt", prompt, "--save", path, "--ask", "Who?", *common]) == 0
    capfd.readouterr()
    return path, ["--load", path, *common]


def after_an_answer(monkeypatch, change):
    """Have `change()` happen once the first answer is written."""
    describe, changes = questions.describe, iter([change])
    monkeypatch.setattr(questions, "describe", lambda *arguments: (
        next(changes, lambda: None)(), describe(*arguments))[1])


def flip(path):
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        last = file.read(1)
        file.seek(-100, os.SEEK_END)
        file.write(bytes([last[0] ^ 64]))


@pytest.mark.parametrize("change", [flip, lambda path: os.truncate(path, 0),
                                    lambda path: path.open("ab").write(b"x")])
def test_a_document_changed_in_use_is_found_at_the_next_question(capfd, saved, monkeypatch, change):
    path, arguments = saved
    after_an_answer(monkeypatch, lambda: change(path))
    status = generate.main([*arguments, "--ask", "Who?", "--ask", "Where?", "--json"])
    out, err = capfd.readouterr()
    assert status == 2 and len(out.splitlines()) == 1
    assert err.splitlines()[-1] == f"generate.py: {path} was changed while it was in use"


def test_a_document_changed_in_use_ends_a_chat(capfd, saved, monkeypatch):
    path, arguments = saved
    after_an_answer(monkeypatch, lambda: os.truncate(path, 0))
    monkeypatch.setattr("builtins.input", lambda *_: "Who?")
    status = generate.main([*arguments, "--chat"])
    assert status == 2 and "was changed while it was in use" in capfd.readouterr().err


def test_a_document_changed_while_it_answers_is_no_answer(capfd, saved, monkeypatch):
    path, arguments = saved
    write = generate.Session.write

    def change_and_write(*arguments):
        flip(path)
        return write(*arguments)

    monkeypatch.setattr(generate.Session, "write", change_and_write)
    status = generate.main([*arguments, "--ask", "Who?", "--json"])
    out, err = capfd.readouterr()
    assert (status, out) == (2, "") and "was changed while it was in use" in err


@pytest.mark.parametrize("replace", [
    lambda path: path.unlink(), lambda path: (path.rename(f"{path}.old"), path.write_text(""))])
def test_another_file_of_the_same_name_changes_nothing(capfd, saved, monkeypatch, replace):
    path, arguments = saved
    arguments = [*arguments, "--ask", "Who?", "--ask", "Who?", "--json"]
    assert generate.main(arguments) == 0
    expected = [json.loads(line)["text"] for line in capfd.readouterr().out.splitlines()]
    after_an_answer(monkeypatch, lambda: replace(path))
    assert generate.main(arguments) == 0
    assert [json.loads(line)["text"] for line in capfd.readouterr().out.splitlines()] == expected


def test_a_document_saved_without_a_trace_is_traced_when_it_is_loaded(capfd, saved, tmp_path):
    _, arguments = saved
    page = tmp_path / "page.json"
    assert generate.main([*arguments, "--ask", "Who?", "--trace", page]) == 0
    assert json.loads(page.read_text())["answers"]


CUT = """
import os, sys, torch
from support.environment import end_at_bus_error
from support.mapped import MappedFile

path, threads = sys.argv[1], int(sys.argv[2])
rows = MappedFile(path).rows(torch.int8, (600, 2, 2, 10))["0.rows"]
read = [lambda: rows.sum(), lambda: rows.tolist(), lambda: rows.transpose(0, 1).contiguous(),
        lambda: rows.index_select(0, torch.arange(600)), lambda: rows.bfloat16()]
os.truncate(path, 100)
for kind in read * 6:
    if child := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == 2, status
    else:
        torch.set_num_threads(threads)
        end_at_bus_error()
        kind()
        os._exit(0)
"""


@pytest.mark.parametrize("threads", [1, 4])
def test_a_file_cut_while_it_is_read_ends_with_a_line_and_a_status(tiny_folder, tmp_path, threads):
    """30 times, in Python and in operators of torch with one or more threads."""
    path = save(tmp_path / "document", tiny_folder)
    done = subprocess.run([sys.executable, "-c", CUT, path, str(threads)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {*done.stderr.splitlines()} == {
        "generate.py: a file was cut while it was in use, or its disk failed"}
    assert done.stderr.count("\n") == 30


def test_the_examples_of_the_schema_are_right():
    assert doctest.testmod(schema).failed == 0


@pytest.mark.slow
def test_a_small_part_of_the_attack_finds_nothing():
    """tests/fuzz.py is the whole of it."""
    bad = []
    counts = fuzz.run("document", 10**6, 1000, bad.append)
    assert not bad and counts.keys() == {"done", "refused"}

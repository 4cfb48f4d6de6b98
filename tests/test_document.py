import json
import os
import random
from datetime import datetime

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import generate
from sentencekv import SentenceKVConfig
from support import document as module
from support.document import Document, MappedFile, identity_of, load_document, save_document
from weights.checkpoint import fingerprint
from weights.config import load_config

CPU = torch.device("cpu")
DOCUMENT = Document("It is späť.", [3, 1, 2] * 200, [(0, 2), (2, 600)],
                    datetime(2024, 2, 29, 12))
BOUNDS = torch.tensor([0, 3, 5, 600, 600]).repeat(2, 1)  # of all sinks, and of three sentences
KEPT = {"num_tokens": torch.tensor(600)}  # of 2 layers, with 2 KV heads of 8 channels
for layer in ("0", "1"):
    KEPT |= {f"{layer}.rows": torch.randn(600, 2, 2, 8), f"{layer}.vectors": torch.randn(2, 4, 8),
             f"{layer}.variances": torch.rand(2, 4), f"{layer}.starts": BOUNDS[:, :-1],
             f"{layer}.lengths": torch.rand(2, 4), f"{layer}.ends": BOUNDS[:, 1:]}


def save(path, folder, config=SentenceKVConfig()):
    same = identity_of(fingerprint(folder), config, torch.float32)
    save_document(path, DOCUMENT, KEPT, same, config.protected_tokens)
    return path


def load(path, folder, dtype=torch.float32, **settings):
    config = SentenceKVConfig(**settings)
    same = identity_of(fingerprint(folder), config, dtype)
    return load_document(path, same, config.protected_tokens, load_config(folder).kv_shape, CPU)


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
    mapped = MappedFile(save(tmp_path / "document", tiny_folder))
    rows = mapped.rows(torch.float32, {name: tensor.shape for name, tensor in KEPT.items()})
    assert rows.keys() == {"0.rows", "1.rows"}
    for released in ("1.rows", "0.rows", None):
        assert all(torch.equal(tensor, KEPT[name]) for name, tensor in rows.items())
        if released:
            mapped.release(released)


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


@pytest.mark.parametrize("name, change", [
    ("spans", None), ("1.rows", None), ("num_tokens", None), ("0.vectors", None), ("ids", None),
    ("1.ends", None), ("num_tokens", lambda t: t + 1),
    ("1.vectors", lambda t: t[:, 1:].contiguous()), ("0.starts", lambda t: t - 1),
    ("1.ends", lambda t: t.flip(-1).contiguous()), ("0.ends", lambda t: t[:, 1:].contiguous()),
    ("spans", lambda t: t + 1), ("spans", lambda t: t[1:].contiguous()), ("spans", lambda t: t * 0),
    ("ids", lambda t: t[1:]), ("0.rows", lambda t: t[:-1].contiguous()),
    ("1.rows", lambda t: t[:, :1].contiguous()), ("text", lambda t: t | 255)])
def test_a_document_that_was_changed_is_refused(tiny_folder, tmp_path, name, change):
    path = save(tmp_path / "document", tiny_folder)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name]).clone()
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="is damaged: the checksum of text and tables is wrong"):
        load(path, tiny_folder)
    module.add_checksums(path)  # its maker knows them
    with pytest.raises(ValueError) as refused:
        load(path, tiny_folder)
    assert "is damaged" not in str(refused.value)


def test_a_flipped_bit_is_refused(tiny_folder, tmp_path):
    """In the length of the header, in the header, in its metadata, in every tensor, anywhere."""
    path = save(tmp_path / "document", tiny_folder)
    whole = path.read_bytes()
    size, choose = 8 + int.from_bytes(whole[:8], "little"), random.Random(0)
    header = json.loads(whole[8:size])
    values = [whole.index(value.encode()) for value in header.pop("__metadata__").values()]
    tensors = [[size + offset for offset in tensor["data_offsets"]] for tensor in header.values()]
    places = [0, 7, len(whole) - 1, *values, *(choose.randrange(*ends) for ends in tensors)]
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

"""A model folder comes from strangers: what it may not hold is one ValueError that names it."""

import json
import os
import shutil

import fuzz
import pytest
import torch
from conftest import write_llama2_tokenizer

from weights.checkpoint import load_model
from weights.folder import MOST_BYTES, find
from weights.tokenizer import Tokenizer


@pytest.fixture
def folder(tiny_folder):
    return tiny_folder


def load(folder):
    load_model(folder, torch.device("cpu"), torch.float32)
    Tokenizer(folder).stop_tokens()


def spoil(folder, name, text):
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(text)


def test_the_folder_is_read(folder):
    load(folder)


@pytest.mark.parametrize("name, text, message", [
    ("config.json", "[" * 100_000, "config.json is not JSON: maximum recursion depth"),
    ("config.json", '{"a":' * 3000 + "1" + "}" * 3000, "config.json"),
    ("config.json", "[]", "config.json is not a JSON object"),
    ("config.json", "\ud800".encode("utf-8", "surrogatepass").decode("latin1"), "is not JSON"),
    ("added_tokens.json", "[1]", "added_tokens.json is not a JSON object"),
    ("tokenizer_config.json", '{"eos_token": 5}', "tokenizer_config.json: eos_token is 5"),
    ("tokenizer_config.json", '{"eos_token": {"content": []}}', "eos_token is [], must be"),
    ("tokenizer_config.json", '{"chat_template": 5}', "chat_template is 5, must be a string"),
    ("tokenizer_config.json", '{"chat_template": [5]}', "cannot read the tokenizer of"),
    ("generation_config.json", '{"eos_token_id": true}', "eos_token_id [True] is not an integer"),
    ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id ['2'] is not an integer"),
    ("tokenizer.json", "{}", "cannot read the tokenizer of"),
])
def test_a_strange_file_is_named(folder, name, text, message):
    spoil(folder, name, text)
    with pytest.raises(ValueError) as error:
        load(folder)
    assert message in str(error.value) and len(str(error.value)) < 400


def test_a_library_s_message_of_two_lines_is_shown_in_one(folder):
    """It spells a piece of the tokenizer, in which there is a line break."""
    (folder / "tokenizer.json").unlink()
    write_llama2_tokenizer(folder)
    path = folder / "tokenizer.model"
    spoiled = path.read_bytes().replace(b"<0x03>", b"<0\n03>")
    path.write_bytes(spoiled)
    with pytest.raises(ValueError, match="byte piece <0 03> is invalid") as error:
        Tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_regular_expression_that_cannot_be_run_is_named(folder):
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(?<=a+"},
                                  "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="cannot read the tokenizer of"):
        load(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json",
                                  "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link outside", "device"])
def test_only_regular_files_of_the_folder_are_read(folder, tmp_path, name, kind):
    path, outside = folder / name, tmp_path / "outside"
    if path.exists():
        shutil.move(path, outside)
    else:
        outside.write_text("{}")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(outside if kind == "link outside" else "/dev/zero")
    with pytest.raises(ValueError, match="is not a regular file" if kind in ("pipe", "folder")
                       else "is outside the model's folder"):
        load(folder)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/hostname", "..", "",
                                   "x" * 10_000])
def test_a_shard_outside_the_folder_is_refused(folder, shard):
    shutil.move(folder / "model.safetensors", folder.parent / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="outside the model's folder|not a regular file|File name"):
        load(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}, "x"])
def test_an_index_must_name_files(folder, weight_map):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="has no weight_map from names to files"):
        load(folder)


def test_the_links_of_the_hub_s_cache_are_followed(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(folder.iterdir()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    load(snapshot)
    assert find(snapshot, "config.json") == snapshot / "config.json"


def test_a_link_to_another_file_of_the_folder_is_followed(folder):
    os.rename(folder / "config.json", folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    load(folder)


def test_a_json_file_without_end_is_not_read(folder):
    with open(folder / "config.json", "wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(ValueError, match=f"config.json has {MOST_BYTES + 1} bytes, at most"):
        load(folder)


def test_more_layers_than_tensors_are_refused_before_modules_are_made(folder):
    config = json.loads((folder / "config.json").read_text())
    spoil(folder, "config.json", json.dumps(config | {"num_hidden_layers": 4096}))
    with pytest.raises(ValueError, match="4096 layers, and "):
        load(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind, n_cases", [("folder", 1000), ("text", 500)])
def test_a_small_part_of_the_attack_finds_nothing(kind, n_cases):
    """tests/fuzz.py is the whole of it."""
    bad = []
    counts = fuzz.run(kind, 10**6, n_cases, bad.append)
    assert not bad and set(counts) <= {"done", "refused"} and counts["done"] > n_cases // 20


@pytest.mark.slow
def test_a_long_answer_keeps_its_budget_positions_and_rows():
    seen = fuzz.long_run(600)
    assert seen["sentences"] > 60

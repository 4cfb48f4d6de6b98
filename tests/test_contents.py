"""What --model names is a model's folder, or one line says what it is and what to do."""

import json
import shutil

import pytest

from weights import models
from weights.contents import OPTIONAL, check_folder
from weights.models import model_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize 1\n".format("0" * 64)


@pytest.fixture
def folder(tiny_folder):
    (tiny_folder / "tokenizer_config.json").write_text("{}")
    return tiny_folder


def refused(name) -> str:
    with pytest.raises(ValueError) as error:
        model_folder(name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name, shown", [
    ("org/name", "org/name"), ("org/Name-1.5_x", "org/Name-1.5_x"),
    ("https://huggingface.co/org/name", "org/name"), ("hf.co/org/name", "org/name"),
    ("absent", None), ("./absent", None), ("a/b/c", None), ("/absent/name", None),
])
def test_a_name_of_the_hub_is_not_downloaded(tmp_path, monkeypatch, name, shown):
    monkeypatch.chdir(tmp_path)
    line = refused(models.Path(name))
    assert "no such folder" in line and ("hub are not downloaded" in line) == bool(shown)
    assert shown is None or f"`hf download {shown} --local-dir FOLDER`" in line


def test_a_path_in_a_folder_that_is_there_is_no_name_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert "hub" not in refused(models.Path("models/absent"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_of_a_folder_is_not_the_folder(folder, name):
    assert refused(folder / name).endswith(f"; name its folder, {folder}")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", *OPTIONAL])
def test_a_git_lfs_pointer_is_named(folder, name):
    (folder / name).write_text(POINTER)
    assert f"{name} is a Git LFS pointer and not the file itself" in refused(folder)


def test_git_lfs_pointers_of_shards_and_gguf_files_are_named(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("model-00001-of-00001.safetensors", "model.gguf"):
        (folder / name).write_text(POINTER)
    assert "model-00001-of-00001.safetensors is a Git LFS pointer" in refused(folder)
    assert "model.gguf is a Git LFS pointer" in refused(folder / "model.gguf")


@pytest.mark.parametrize("files, message", [
    ([], "is not a model's folder: it has no config.json"),
    (["adapter_config.json", "adapter_model.bin"], "it is an adapter (adapter_config.json): merge"),
    (["adapter_model.safetensors"], "it is an adapter (adapter_model.safetensors): merge"),
    (["a.gguf", "b.gguf"], "say which GGUF file, such as "),
    (["params.json", "consolidated.00.pth"], "its weights in consolidated.00.pth: pickled weights"),
    (["pytorch_model-00001-of-00002.bin"], "pytorch_model-00001-of-00002.bin: pickled weights"),
    (["tf_model.h5"], "it has its weights in tf_model.h5: save them as safetensors"),
    (["model-00001-of-00002.safetensors"], "it has shards, and no model.safetensors.index.json"),
    (["consolidated.safetensors"], "it has consolidated.safetensors, which is another model's"),
    (["checkpoint-9/config.json", "x"], "folders in it have one: name checkpoint-9"),
    (["models--org--name/refs/main"], "it is a cache of the Hugging Face hub: name a model of it"),
])
def test_what_a_folder_is_instead(folder, tmp_path, files, message):
    for place in (folder, tmp_path / "other"):
        for name in files:
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    (folder / "model.safetensors").unlink()  # one has a config.json, the other has none
    (tmp_path / "other").mkdir(exist_ok=True)
    assert message in refused(tmp_path / "other")
    if files and "folders" not in message:
        assert "has no model.safetensors; " in refused(folder) and message in refused(folder)


def test_an_adapter_beside_the_model_is_not_passed_over(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "has an adapter beside the model, which would not be applied" in refused(folder)


def test_a_model_s_folder_in_the_hub_s_cache_is_its_snapshot(folder, tmp_path):
    cached = tmp_path / "models--org--name"
    for name in ("aaa", "bbb"):
        shutil.copytree(folder, cached / "snapshots" / name)
    line = refused(cached)
    assert "name one of its 2 snapshots, aaa or bbb" in line
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("bbb")
    assert model_folder(cached) == cached / "snapshots" / "bbb"
    (cached / "refs" / "main").write_text("../../elsewhere")
    assert "2 snapshots" in refused(cached)
    shutil.rmtree(cached / "snapshots" / "bbb")
    assert check_folder(cached) == cached / "snapshots" / "aaa"
    shutil.rmtree(cached / "snapshots" / "aaa")
    assert "of its 0 snapshots, of which there is none" in refused(cached)

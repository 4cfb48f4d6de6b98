"""What a folder holds: the files of a model, or something else, which one line names.

A line also says what to do. All of it is found out by names, before anything is read.
"""

import re
from pathlib import Path

from weights.folder import find, need, plain, read_json

OPTIONAL = ("generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
            "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
INSTEAD = {  # a name in a folder without a model -> what the folder is, and what to do
    r"^adapter_": "it is an adapter ({}): merge it into its base model first",
    r"^models--": "it is a cache of the Hugging Face hub: name a model of it, such as {}",
    r"\.gguf$": "say which GGUF file, such as {1}/{0}",
    r"\.(bin|pt|pth|ckpt)$": "it has its weights in {}: pickled weights are not read, save them as"
                             " safetensors",
    r"\.(h5|msgpack|onnx|npz)$": "it has its weights in {}: save them as safetensors",
    r"-of-\d+\.safetensors$": "it has shards, and no model.safetensors.index.json ({})",
    r"\.safetensors$": "it has {}, which is another model's or has names of its own",
}


def check_folder(folder: Path) -> Path:
    """The folder with the files: this one or, in the hub's cache, a snapshot of the model.
    ValueError if it holds no whole model."""
    if (folder / "snapshots").is_dir():
        folder = snapshot(folder)
    if find(folder, "config.json") is None:
        raise ValueError(f"{folder} is not a model's folder: it has no config.json"
                         f"{instead(folder)}")
    weight_files(folder)
    for name in OPTIONAL:
        find(folder, name)  # raises for what it cannot be
    return folder


def snapshot(cached: Path) -> Path:
    """The snapshot that a model's folder in the hub's cache calls `main`, or its only one."""
    names = sorted(path.name for path in (cached / "snapshots").iterdir() if path.is_dir())
    main = cached / "refs" / "main"
    named = main.read_text(errors="replace")[:100].strip() if main.is_file() else None
    if named not in names and len(names) != 1:
        raise ValueError(f"{cached} is a model's folder in the hub's cache: name one of its"
                         f" {len(names)} snapshots, {listed(names)}")
    return cached / "snapshots" / (named if named in names else names[0])


def weight_files(folder: Path) -> list[Path]:
    """The checkpoint's one safetensors file, or the shards that its index names."""
    whole = find(folder, "model.safetensors")
    index = find(folder, "model.safetensors.index.json")
    if not (whole or index):
        raise ValueError(f"{folder} has no model.safetensors{instead(folder)}")
    if find(folder, "adapter_config.json"):
        raise ValueError(f"{folder} has an adapter beside the model, which would not be applied:"
                         " merge it, or move adapter_config.json away to use the model alone")
    if whole:
        return [whole]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise ValueError(f"{index} has no weight_map from names to files")
    return [need(folder, name) for name in sorted(set(shards.values()))]


def instead(folder: Path) -> str:
    """What a folder has in place of the file that is missing, and what to do; "" if unknown."""
    names = sorted(path.name for path in folder.iterdir())
    for pattern, text in INSTEAD.items():
        for name in names:
            if re.search(pattern, name):
                return "; " + text.format(plain(name), folder)
    inner = [name for name in names if (folder / name / "config.json").is_file()]
    return f"; folders in it have one: name {listed(inner)}" if inner else ""


def listed(names: list[str]) -> str:
    """Three names at most."""
    return " or ".join(plain(name) for name in names[:3]) or "of which there is none"

"""What `--model` says -> a model's folder: one that is there, or that is made the first time."""

import hashlib
import json
import re
from pathlib import Path

from support.outputs import refuse, refuse_inside
from weights.contents import check_folder, weight_files
from weights.download import DEFAULT, MODELS, download
from weights.folder import add_samples, make_whole, read_optional, refuse_pointer
from weights.gguf_file import convert
from weights.gguf_reader import MAGIC

ORIGIN = "gguf.json"  # in a folder: which file it was converted from
HUB = re.compile(r"(?:https?:/+)?(?:huggingface\.co/|hf\.co/|hf:/+)?([\w.-]+/[\w.-]+)")  # org/name


def model_folder(name: Path | None, outputs: dict | None = None) -> Path:
    """A folder, a GGUF file, or a name of `weights.download.MODELS`; None is the default model.

    What is on the disk goes before a name. ValueError if it is none of these, or if one of
    `outputs`, option -> file, would be written over a file of the model or into its folder.
    """
    if name and outputs:  # in the hub's cache, a file of refs says which snapshot is read
        refuse(outputs, name, *name.glob("refs/*"))
    folder = folder_of(name)
    if outputs:
        refuse_inside(outputs, folder)
        refuse(outputs, *weight_files(folder))
    return folder


def folder_of(name: Path | None) -> Path:
    """The folder that a name stands for, once it is there."""
    if name is None:
        return download(DEFAULT)
    if name.is_dir():
        return check_folder(name)
    if name.exists():
        if is_gguf(name):
            return converted(name)
        raise ValueError(f"--model {name} is a file that is not GGUF: a folder or a GGUF file is"
                         f" read{file_of(name.parent)}")
    if str(name) in MODELS:
        return download(str(name))
    raise ValueError(f"--model {name}: no such folder, no such GGUF file, and not one of the names"
                     f" {', '.join(MODELS)}{of_the_hub(name)}")


def file_of(folder: Path) -> str:
    """What to name in place of one of a model's files."""
    return f"; name its folder, {folder}" if (folder / "config.json").is_file() else ""


def of_the_hub(name: Path) -> str:
    """What to do with a name that a model may have on the Hugging Face hub."""
    found = None if name.parent.is_dir() else HUB.fullmatch(str(name))
    return ("; models of the Hugging Face hub are not downloaded: bring it into a folder, as by"
            f" `hf download {found[1]} --local-dir FOLDER`") if found else ""


def is_gguf(path: Path) -> bool:
    if not path.is_file():  # a pipe would have to be waited for
        return False
    refuse_pointer(path)
    with open(path, "rb") as file:
        return path.suffix == ".gguf" or file.read(len(MAGIC)) == MAGIC


def converted(path: Path) -> Path:
    """The folder of a GGUF file, made once: `model-gguf` beside `model.gguf`.

    ValueError if that is the folder of another file, or cannot be made.
    """
    digest = hashlib.sha256()
    add_samples(digest, path)
    origin = {"file": path.name, "bytes": path.stat().st_size, "samples": digest.hexdigest()}

    def is_whole(target: Path) -> bool:
        return target.is_dir() and read_optional(target, ORIGIN) == origin

    def make(scratch: Path, folder: Path):
        convert(path, folder)
        (folder / ORIGIN).write_text(json.dumps(origin, indent=2) + "\n")

    return make_whole(path.with_name(path.name.removesuffix(".gguf") + "-gguf"), make, is_whole)

"""What `--model` says -> a model's folder: one that is there, or that is made the first time."""

import hashlib
import json
from pathlib import Path

from weights.download import DEFAULT, MODELS, download
from weights.folder import add_samples, make_whole, read_optional
from weights.gguf_file import convert
from weights.gguf_reader import MAGIC

ORIGIN = "gguf.json"  # in a folder: which file it was converted from


def model_folder(name: Path | None) -> Path:
    """A folder, a GGUF file, or a name of `weights.download.MODELS`; None is the default model.

    What is on the disk goes before a name. ValueError if it is none of these.
    """
    if name is None:
        return download(DEFAULT)
    if name.is_dir():
        return check_folder(name)
    if name.exists():
        if is_gguf(name):
            return converted(name)
        raise ValueError(f"--model {name} is a file that is not GGUF: a folder or a GGUF file is"
                         " read")
    if str(name) in MODELS:
        return download(str(name))
    raise ValueError(f"--model {name}: no such folder, no such GGUF file, and not one of the names"
                     f" {', '.join(MODELS)}")


def check_folder(folder: Path) -> Path:
    """ValueError if a GGUF file in it must be meant."""
    found = sorted(folder.glob("*.gguf"))
    if found and not (folder / "config.json").exists():
        raise ValueError(f"--model {folder} is not a folder of the Hugging Face hub: say which"
                         f" GGUF file, such as {found[0]}")
    return folder


def is_gguf(path: Path) -> bool:
    if not path.is_file():  # a pipe would have to be waited for
        return False
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

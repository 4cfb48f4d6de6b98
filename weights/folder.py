"""What may be read of a model folder, whose files can come from anyone, and how one is made whole.

Only regular files inside the folder are read, and every value of a JSON file is checked before
memory is taken in proportion to it. All problems are ValueErrors that name the file.
"""

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from support.outputs import UNFINISHED, remove_leftovers

MOST_BYTES = 2**26  # of a file that is read as a whole
SAMPLE = 2**16  # bytes, of which 64 samples are read of a file that is recognised
POINTER = b"version https://git-lfs"  # how a file begins that Git LFS has in place of a large one


def find(folder: Path, name: str) -> Path | None:
    """A file of the folder, None if it is absent.

    A link may lead to another file of the folder, or to the `blobs` folder of Hugging Face's cache:
    there a model is `snapshots/REVISION/`, beside `blobs/`, and all of its files are links.
    """
    path = folder / name
    try:
        if not path.exists():
            return None
    except OSError as error:  # of a name that is too long, for example
        raise ValueError(f"cannot read {shown(name)} in {folder}: {error.strerror}") from None
    root, real = folder.resolve(), path.resolve()
    allowed = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    if not any(real.is_relative_to(place) for place in allowed):
        raise ValueError(f"{path} is outside the model's folder")
    if not real.is_file():
        raise ValueError(f"{path} is not a regular file")
    refuse_pointer(path)
    return path


def refuse_pointer(path: Path) -> None:
    """ValueError if a file is what Git has of it where Git LFS is not installed."""
    with open(path, "rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a Git LFS pointer and not the file itself: run `git lfs"
                             " pull` where it was cloned")


def need(folder: Path, name: str) -> Path:
    """A file of the folder. ValueError if it is absent."""
    path = find(folder, name)
    if path is None:
        raise ValueError(f"{folder} has no {name}")
    return path


def refuse_large(path: Path) -> None:
    """ValueError if a file that is read as a whole is larger than any model's."""
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size} bytes, at most {MOST_BYTES} are read")


def text_of(path: Path) -> str:
    """The text of a file of the folder, which must not be large."""
    refuse_large(path)
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise ValueError(f"{path} is not UTF-8: {one_line(error)}") from None


def read_json(path: Path) -> dict:
    """The object in a JSON file. ValueError if the file holds something else."""
    text = text_of(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # too deep
        raise ValueError(f"{path} is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def read_optional(folder: Path, name: str) -> dict:
    """The object in a JSON file, an empty one if the file is absent."""
    path = find(folder, name)
    return {} if path is None else read_json(path)


def check(values: dict, limits: dict, where) -> None:
    """Compare values with limits: name -> bool, str, dict, list, or (least, most) of a number, of
    integers if `least` is one. Names that are absent or null pass. ValueError names the first that
    does not."""
    for name, limit in limits.items():
        value = values.get(name)
        if value is None:
            continue
        if isinstance(limit, tuple):
            kind = int if isinstance(limit[0], int) else (int, float)
            good = isinstance(value, kind) and not isinstance(value, bool)
            good = good and limit[0] <= value <= limit[1]  # false for NaN
            wanted = f"{'an integer' if kind is int else 'a number'} from {limit[0]} to {limit[1]}"
        else:
            good = isinstance(value, limit)
            wanted = {bool: "true or false", str: "a string", dict: "an object",
                      list: "a list"}[limit]
        if not good:
            raise ValueError(f"{where}: {plain(name)} is {shown(value)}, must be {wanted}")


def shown(value) -> str:
    """A value of a strange file in few characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def plain(name: str) -> str:
    """A name of a strange file, in one line and without quotes."""
    return shown(name).strip("'")


def one_line(error: BaseException) -> str:
    """What a library says of a strange file, which may spell the file's own line breaks."""
    return " ".join(f"{error}".split())


@contextmanager
def one_line_for(what: str):
    """What a library raises in here is a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {one_line(error)}") from None


def make_whole(target: Path, make, is_whole) -> Path:
    """Make the folder `target` unless `is_whole(target)`. Returns it.

    `make(scratch, folder)` writes into `folder`, and can use `scratch`. Both are in a temporary
    folder beside the target, and `folder` is renamed at the end: a run that is interrupted leaves
    nothing, and what a killed one leaves is removed by a later one. ValueError if something else
    is in the place, or if nothing can be written there.
    """
    if is_whole(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is something else, or not whole: move it away")
    remove_leftovers(target.parent)
    try:
        temporary = tempfile.TemporaryDirectory(dir=target.parent, prefix=UNFINISHED)
    except OSError as error:
        raise ValueError(f"cannot write {target}: {error.strerror}") from None
    with temporary as name:
        folder = Path(name) / target.name
        folder.mkdir()
        make(Path(name), folder)
        try:
            os.rename(folder, target)
        except OSError:
            if not is_whole(target):  # else another was first, with the same files
                raise
    return target


def add_samples(digest, path: Path):
    """Add to a hash a file's name, its size, and 64 samples of what it holds: that is quick, and
    misses a change between them."""
    size = path.stat().st_size
    digest.update(f"{path.name} {size} ".encode())
    with open(path, "rb") as file:
        for i in range(64):
            file.seek(size * i // 64)
            digest.update(file.read(SAMPLE))

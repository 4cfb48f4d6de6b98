"""The files of --save and --trace: how one is written, and what it may not replace.

Files are compared by what they are, not by their names: links and other paths lead to the same one.
"""

import os
import secrets
import shutil
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path

MOST_LINKS = 40  # as on Linux
STREAMS = range(3)  # descriptors: standard input, output and error
UNFINISHED = ".unfinished-"  # how the name of a folder begins in which something is being made
OLD = 3600  # seconds


def check_outputs(args) -> dict:
    """Option -> the file that is written: `args.save` and `args.trace`, which become those that
    links lead to. ValueError for one that cannot be written, or that would replace what the run
    reads or writes. `refuse` compares them with the model, too."""
    args.save, args.trace = (path and end_of_links(path) for path in (args.save, args.trace))
    outputs = {option: path for option, path in (("--save", args.save), ("--trace", args.trace))
               if path}
    for path in outputs.values():
        check_writable(path)
    prompt = () if args.prompt in (None, "-") else (args.prompt,)
    refuse(outputs, *prompt, *STREAMS)
    if args.trace:
        others = [path for path in (args.save, args.load) if path]
        refuse({"--trace": args.trace}, *others)
    return outputs


def end_of_links(path: Path) -> Path:
    """The path that a chain of symbolic links ends at. ValueError for /dev/stdout, which leads to a
    descriptor of this process and not to a file that can be replaced."""
    for link in range(MOST_LINKS):
        if f"{os.path.realpath(path.parent)}/".startswith(("/proc/", "/sys/")):
            break
        if not path.is_symlink():
            return path
        path = path.parent / os.readlink(path)
    raise ValueError(f"cannot write {path}: it is no file")


def check_writable(path: Path):
    try:
        new = not path.exists()
        good = new or stat.S_ISREG(path.stat().st_mode) and os.access(path, os.W_OK)
    except OSError as error:  # of a name that is too long, for example
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    if not good or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write {path}")


def refuse(outputs: dict, *others):
    """ValueError if a file of `outputs` is one of the others: paths, or descriptors."""
    kept = {file_id(other) for other in others} - {None}
    for option, path in outputs.items():
        if file_id(path) in kept:
            raise ValueError(f"{option} would replace {path}")


def refuse_inside(outputs: dict, folder: Path):
    """ValueError if a file of `outputs` is in the folder, or is one that its links lead to. A new
    file in a model's folder could change what the model is."""
    refuse(outputs, *folder.iterdir())
    for option, path in outputs.items():
        if file_id(path.parent) == file_id(folder):
            raise ValueError(f"{option} would write into the model's folder: {path}")


def file_id(file: Path | str | int) -> tuple | None:
    """Equal for two that are the same file, also if it is not there yet; None if it cannot be."""
    with suppress(OSError):
        found = os.stat(file)
        return found.st_dev, found.st_ino
    with suppress(OSError, TypeError):  # of a descriptor, which has no folder
        folder = os.stat(os.path.dirname(os.path.realpath(file)))
        return folder.st_dev, folder.st_ino, os.path.basename(os.path.realpath(file))
    return None


def remove_leftovers(folder: Path):
    """Remove what killed runs have left in a folder: unfinished folders in which nothing was
    written for an hour."""
    for left in folder.glob(f"{UNFINISHED}*"):
        with suppress(OSError):  # another run has just finished it
            if time.time() - max(path.stat().st_mtime for path in (left, *left.rglob("*"))) > OLD:
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def replacing(path: Path):
    """A path to write to. It is renamed to `path` at the end, with the rights of a file that was
    there: the file is whole, or what it was. ValueError if it cannot be written."""
    folder = path.parent / f"{UNFINISHED}{secrets.token_hex(8)}"  # new: nobody has put a link there
    part = folder / "part"
    remove_leftovers(path.parent)
    try:
        folder.mkdir(mode=0o700)
        yield part
        with suppress(FileNotFoundError):
            shutil.copymode(path, part)
        os.replace(part, path)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)

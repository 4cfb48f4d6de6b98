"""The inputs by name: `python -m benchmarks.data` says which are there.

`inputs.json` has the edition of each, where it can be had, and its SHA-256. The files are taken
from the folder that the environment names, SENTENCEKV_DATA. No torch here.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

VARIABLE = "SENTENCEKV_DATA"
INPUTS = json.loads(Path(__file__).with_name("inputs.json").read_text(encoding="utf-8"))


def digest_of(path: Path) -> str:
    """SHA-256. OSError if it cannot be read."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def find(name: str) -> Path:
    """The file of an input that has a name here, or else the path `name` itself. ValueError if a
    known file is missing, or is not the edition that was measured."""
    if name not in INPUTS:
        return Path(name)
    known = INPUTS[name]
    if VARIABLE not in os.environ:
        raise ValueError(f"input {name!r}: say in {VARIABLE} in which folder {known['file']} is")
    path = Path(os.environ[VARIABLE]) / known["file"]
    problem = "is missing"
    if path.is_file():
        digest, wanted = digest_of(path), known["sha256"]
        if digest == wanted:
            return path
        problem = f"has the SHA-256 {digest[:8]}..., and not {wanted[:8]}..."
    raise ValueError(f"input {name!r}: {path} {problem}. It is from: {known['from']}")


def main() -> int:
    status = 0
    for name in INPUTS:
        try:
            print(f"{name}: {find(name)}")
        except ValueError as error:
            print(error, file=sys.stderr)
            status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())

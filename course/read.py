"""Print a lesson with the project's code in it: `python -m course.read 7`.

In a lesson, a block of code marked `include` holds names of the project's functions, one a line.
Here their source takes the place of the names, so that no lesson holds a copy of the code.
"""

import argparse
import inspect
import pkgutil
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
INCLUDE = re.compile(r"^```include\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HIDDEN = re.compile(r"^<!--.*?-->\n", re.MULTILINE | re.DOTALL)  # how a table is made


def lesson(number: int) -> Path:
    """Raises ValueError if there is no such lesson."""
    found = list(FOLDER.glob(f"{number:02}_*.md"))
    if not found:
        there = ", ".join(sorted(path.name[:2] for path in FOLDER.glob("[0-9]*.md")))
        raise ValueError(f"lesson {number} is not written, these are: {there}")
    return found[0]


def source(name: str) -> str:
    """The source of a function, method or class: `sentencekv.gaussian`, `cache.LayerCache.seal`."""
    return inspect.getsource(pkgutil.resolve_name(name))


def with_code(text: str) -> str:
    """What a reader sees of a lesson, with the source of the functions that it names."""
    def replace(block):
        return "```python\n" + "\n\n".join(map(source, block[1].split())) + "```"

    return INCLUDE.sub(replace, HIDDEN.sub("", text))


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="course.read", description=__doc__.split("\n")[0])
    parser.add_argument("lesson", type=int)
    try:
        path = lesson(parser.parse_args(arguments).lesson)
    except ValueError as error:
        print(f"course.read: {error}", file=sys.stderr)
        return 2
    print(with_code(path.read_text(encoding="utf-8")), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

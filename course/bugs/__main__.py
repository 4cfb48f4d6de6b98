"""How many planted bugs your own test catches: `python -m course.bugs mine/test_own.py`.

Your file runs with pytest in a copy of the project, which must pass, and then in a copy with each
patch of this folder. The copies lie in a temporary folder, and the project stays as it is. Your
test can use what is in tests/, as `from conftest import random_llama`.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
PATCHES = sorted(FOLDER.glob("*.patch"))
PASSED, NO_TESTS = 0, 5  # what pytest returns


def copy_project(folder: Path):
    """The modules and tests without texts and models, to be changed."""
    for part in (".", "tests", "benchmarks", "weights", "support"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for file in (*(ROOT / part).glob("*.py"), *(ROOT / part).glob("*.json")):
            shutil.copy(file, folder / part)


def apply(patch: Path, folder: Path):
    subprocess.run(["git", "apply", patch], cwd=folder, check=True)


def run(test: Path, folder: Path) -> tuple[int, str]:
    """Pytest's exit status, and what it prints."""
    own = shutil.copy(test, folder / "tests" / "test_own.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", own]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout


def without_a_bug(test: Path):
    """Raises ValueError if the test is not one, or fails on the project as it is."""
    if not test.is_file():
        raise ValueError(f"{test}: there is no such file")
    with TemporaryDirectory() as folder:
        copy_project(Path(folder))
        status, output = run(test, Path(folder))
    if status == NO_TESTS:
        raise ValueError(f"{test} has no test: no function whose name begins with test_")
    if status != PASSED:
        print("\n".join(output.splitlines()[-15:]), file=sys.stderr)
        raise ValueError(f"{test} must pass on the project as it is, and does not")


def catches(test: Path, patch: Path) -> bool:
    with TemporaryDirectory() as folder:
        copy_project(Path(folder))
        apply(patch, Path(folder))
        return run(test, Path(folder))[0] != PASSED


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="course.bugs", description=__doc__.split("\n")[0])
    parser.add_argument("test", type=Path)
    test = parser.parse_args(arguments).test
    try:
        without_a_bug(test)
    except ValueError as error:
        print(f"course.bugs: {error}", file=sys.stderr)
        return 2
    print("without a bug: it passes", flush=True)
    caught = 0
    for patch in PATCHES:
        found = catches(test, patch)
        caught += found
        print(f"bug {patch.stem}: {'caught' if found else 'not caught'}", flush=True)
    print(f"{caught} of {len(PATCHES)} bugs are caught")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs functions of a student, in a process of its own that `course/check.py` starts and can end.

    python -m course.exercises.student cases FOLDER EXERCISE SEED   a line of JSON for each case
    python -m course.exercises.student tests FOLDER EXERCISE...     a line of JSON
    python -m course.exercises.student question FOLDER EXERCISE...  the answer, for people

What a student's function prints goes to standard error.
"""

import inspect
import json
import os
import sys
import threading
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch

import cache
import generate
import model
import segment
import sentencekv
from course.exercises import stubs
from course.exercises.cases import cases
from course.exercises.diagnose import found_in

ROOT = Path(__file__).parent.parent.parent
SLOW = "test_cache.py::test_a_small_budget_selects_what_the_slow_way_selects"
TESTS = {  # function -> the project's tests that run with it in place
    "attend": ["test_model.py::test_decoding_one_by_one_equals_one_forward", SLOW],
    # Other tests of segment.py change names in that module, which a student's file has imported.
    "is_end": [f"test_segment.py::{name}" for name in (
        "test_sentences", "test_every_rule_has_a_true_example_that_needs_it",
        "test_the_stream_finds_the_sentences_of_the_whole", "test_sentences_of_real_tokens")],
    "assign_slots": [
        "test_cache.py::test_slots_hold_what_is_wanted_and_only_what_is_not_there_moves", SLOW],
    "seal": [SLOW],
}  # else these:
OF_SENTENCES = ["test_sentencekv.py", SLOW]


def load(path: Path, name: str):
    """The function or class of this name in a student's file. Raises ValueError if the file cannot
    be run, or does not define it."""
    scope = {"__name__": path.stem}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    except (Exception, SystemExit) as error:  # whatever the student wrote
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not callable(scope.get(name)):
        raise ValueError(f"{path} does not define {name}")
    return scope[name]


def run_cases(folder: Path, exercise: str, seed: int, write):
    """Write what is found in each case, and in the end where the project's own code ran."""
    path, name = folder / f"{exercise}.py", exercise[3:]
    code = stubs.EXERCISES[exercise][0].__code__
    try:
        function = load(path, name)
        files = files_of(code)
        for case in cases(name, seed):
            found = found_in(name, function, case, str(path))
            write({part: encoded(value) for part, value in found.items()})
        is_watched = sys.getprofile() is not None
    except ValueError as error:
        return write({"problem": str(error)})
    except NotImplementedError:
        return write({"not written": True})
    finally:
        watch(None)
    chosen = code.co_nlocals > code.co_argcount  # else all names are given
    write({"imported": bool(files - {str(path)}) or not is_watched,
           "same names": chosen and str(path) in files})


def files_of(code) -> set:
    """From now on, the files of whatever runs and has the names of the project's code: this code,
    called in any way, or a copy of its text."""
    files = set()

    def look(frame, event, _):
        found = frame.f_code
        if event == "call" and (found.co_name, found.co_names, found.co_varnames) == (
                code.co_name, code.co_names, code.co_varnames):
            files.add(found.co_filename)

    watch(look)
    return files


def watch(look):
    sys.setprofile(look)
    threading.setprofile(look)


def encoded(value):
    """Tensors as JSON. `decoded` reads it."""
    if not isinstance(value, torch.Tensor):
        return value
    numbers = value.double() if value.is_floating_point() else value
    return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape),
            "numbers": numbers.flatten().tolist() if value.numel() < 10**5 else []}


def decoded(value):
    if not isinstance(value, dict):
        return value
    numbers = value["numbers"] or torch.zeros(value["shape"])  # too many: only the shape counts
    return torch.as_tensor(numbers, dtype=getattr(torch, value["dtype"])).view(value["shape"])


def install(function, solution):
    """Put a function in the place of the project's, in every module that uses it."""
    owner, _, method = solution.__qualname__.rpartition(".")
    if owner:
        setattr(getattr(inspect.getmodule(solution), owner), method, function)
        return
    for module in (sentencekv, model, cache, segment, generate):
        if getattr(module, method, None) is solution:
            setattr(module, method, function)
    if method in sentencekv.SCORES:
        sentencekv.SCORES[method] = function


def run_tests(names: list) -> str:
    """Run the project's own tests of these functions. Returns what fails, "" if nothing does."""
    import pytest

    class Failures:
        text = ""

        def pytest_runtest_logreport(self, report):
            if report.failed:
                self.text = f"{report.nodeid.rpartition('/')[2]}: {reason(report)}"

        pytest_collectreport = pytest_runtest_logreport

    failures = Failures()
    tests = dict.fromkeys(test for name in names for test in TESTS.get(name, OF_SENTENCES))
    status = pytest.main(["-x", "-p", "no:cacheprovider", "-p", "no:terminal",
                          *(str(ROOT / "tests" / test) for test in tests)], plugins=[failures])
    return failures.text or ("" if status == 0 else f"pytest ended with {status!r}")


def reason(report) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash else str(report.longrepr)


def ask() -> int:
    """Answer the example question, and return the exit status."""
    with redirect_stderr(StringIO()) as tables:
        status = generate.main(["--prompt", str(ROOT / "examples" / "walden_house.txt"),
                                "--token-budget", "512"])
    if status:
        print(tables.getvalue(), end="", file=sys.stderr)
    return status


def main(kind: str, folder: str, *arguments) -> int:
    if kind == "question":
        install_all(Path(folder), arguments)
        return ask()
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(result: dict):
        print(json.dumps(result), file=results, flush=True)

    if kind == "cases":
        run_cases(Path(folder), arguments[0], int(arguments[1]), write)
    else:
        install_all(Path(folder), arguments)
        write({"failed": run_tests([exercise[3:] for exercise in arguments])})
    return 0


def install_all(folder: Path, exercises):
    for exercise in exercises:
        install(load(folder / f"{exercise}.py", exercise[3:]), stubs.EXERCISES[exercise][0])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Check your exercises: `python -m course.check 7`, or `python -m course.check 7 --folder MINE`.

Your function runs on small cases, with a diagnosis if the mistake is a known one. Then it takes the
place of the project's function: some of the project's own tests run with it, and it answers the
example question.
"""

import argparse
import inspect
import sys
import textwrap
import traceback
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch

import cache
import generate
import model
import segment
import sentencekv
from cache import NO_ROW
from course.exercises import cases, stubs

ROOT = Path(__file__).parent.parent
SLOW = "test_cache.py::test_a_small_budget_selects_what_the_slow_way_selects"
ORACLES = {  # lesson -> what runs with its functions in place
    2: ["test_model.py::test_decoding_one_by_one_equals_one_forward", SLOW],
    # Other tests of segment.py change names in that module, which a student's file has imported.
    3: [f"test_segment.py::{name}" for name in (
        "test_sentences", "test_every_rule_has_a_true_example_that_needs_it",
        "test_the_stream_finds_the_sentences_of_the_whole", "test_sentences_of_real_tokens")],
    4: ["test_sentencekv.py", SLOW],
    5: ["test_sentencekv.py", SLOW],
    6: ["test_sentencekv.py", SLOW],
    7: ["test_sentencekv.py", SLOW],
    8: ["test_cache.py::test_slots_hold_what_is_wanted_and_only_what_is_not_there_moves", SLOW],
    9: [SLOW],
}


def with_mistake(function, old: str, new: str):
    """The project's function with a change to its text."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} is not once in {function.__name__}"
    scope = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), scope)
    return scope[function.__name__]


def results(name: str, function) -> list:
    """(arguments or a name, result) of all cases of an exercise, or the error at the first that
    fails."""
    found, arguments = [], ()

    def watched(*given, **named):
        nonlocal arguments
        arguments = given + tuple(named.values())
        return function(*given, **named)

    try:
        for result in getattr(cases, name[3:])(watched):  # some have a name
            found.append(result if isinstance(result, tuple) else (arguments, result))
    except NotImplementedError:
        raise
    except Exception as error:  # of the student's function: it is shown, not hidden
        found.append((arguments, error))
    return found


def same(a, b) -> bool:
    """Whether two results, tensors or answers or errors, are equal up to rounding."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return repr(a) == repr(b)
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=1e-4, atol=1e-6, equal_nan=True)


def all_same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(same(x, y) for (_, x), (_, y) in zip(a, b))


def diagnose(name: str, function) -> str:
    """What is wrong with a student's function, "" if nothing is."""
    solution, _ = stubs.EXERCISES[name]
    found, expected = results(name, function), results(name, solution)
    if all_same(found, expected):
        return ""
    for old, new, diagnosis in cases.MISTAKES[name]:
        if all_same(found, results(name, with_mistake(solution, old, new))):
            return diagnosis
    for i, ((arguments, a), (_, b)) in enumerate(zip(found, expected), 1):
        if not same(a, b):
            return f"result {i}, {call(solution, arguments)}{difference(function, a, b)}"
    return f"{len(found)} results, and there should be {len(expected)}"


def call(solution, arguments) -> str:
    """The arguments of a call, without those that are objects, or the name of a result."""
    if isinstance(arguments, str):
        return f"{arguments}, "
    names = list(inspect.signature(solution).parameters)
    shown = [f"{name} = {value!r}\n" for name, value in zip(names, arguments)
             if isinstance(value, (torch.Tensor, str, int))]
    return f"with\n{''.join(shown)}" if shown else ""


def difference(function, found, expected) -> str:
    """How a result of a student's function differs from what is expected."""
    if isinstance(found, Exception):
        file = function.__code__.co_filename
        lines = [f.lineno for f in traceback.extract_tb(found.__traceback__) if f.filename == file]
        return f"{found!r}" + (f", at line {lines[-1]} of {Path(file).name}" if lines else "")
    for what in ("shape", "dtype") if isinstance(expected, torch.Tensor) else ():
        if getattr(found, what, None) != getattr(expected, what):
            return (f"has the {what} {getattr(found, what, f'of a {type(found).__name__}')}"
                    f" and should have {getattr(expected, what)}")
    return f"is\n{found!r}\nand should be\n{expected!r}".replace(str(NO_ROW), "NO_ROW")


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


def run_oracles(functions: dict) -> int:
    """Put functions, name of the exercise -> function, in place and run the project's own tests.
    Returns pytest's exit status. This process keeps the functions."""
    for name, function in functions.items():
        install(function, stubs.EXERCISES[name][0])
    tests = dict.fromkeys(test for name in functions for test in ORACLES[int(name[:2])])
    return int(pytest.main(["-q", "-x", "-p", "no:cacheprovider",
                            *(str(ROOT / "tests" / test) for test in tests)]))


def load(path: Path, name: str):
    """The function that a student's file defines. Raises ValueError if the file cannot be run."""
    scope = {}
    try:
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), scope)
    except Exception as error:  # whatever the student wrote
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if name not in scope:
        raise ValueError(f"{path} has no function {name}")
    return scope[name]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="course.check", description=__doc__.split("\n")[0])
    parser.add_argument("lesson", type=int)
    parser.add_argument("--folder", type=Path, default=Path(stubs.__file__).parent)
    args = parser.parse_args(arguments)
    try:
        if args.lesson not in ORACLES:
            raise ValueError(f"lesson {args.lesson} has no exercise, these have:"
                             f" {', '.join(map(str, ORACLES))}")
        written = {name: load(args.folder / f"{name}.py", name[3:])
                   for name in stubs.EXERCISES if int(name[:2]) == args.lesson}
    except ValueError as error:
        print(f"course.check: {error}", file=sys.stderr)
        return 2
    for name, function in list(written.items()):
        try:
            problem = diagnose(name, function)
        except NotImplementedError:
            print(f"{name}: not written yet")
            del written[name]
            continue
        print(f"{name}: {problem or 'all small cases are right'}")
        if problem in ("", cases.ALL_MOVE) and name == "08_assign_slots":
            moved, least = cases.rows_moved(function)
            print(f"{name}: {moved} rows moved in 50 steps, the least possible is {least}")
        if problem:
            return 1
    if not written:
        return 1
    print("the project's own tests with your code:", flush=True)
    if status := run_oracles(written):
        return status
    print("the example question with your code; the boards cost $8.03½:", flush=True)
    with redirect_stderr(StringIO()) as tables:
        status = generate.main(["--prompt", str(ROOT / "examples" / "walden_house.txt"),
                                "--token-budget", "512"])
    if status:
        print(tables.getvalue(), end="", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())

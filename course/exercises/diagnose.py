"""Compares what a student's function gives with what the project's gives, and names mistakes.

What is found is a dict for each case: the parts of `observe`, or an error.
"""

import inspect
import math
import textwrap
import traceback
from functools import cache
from pathlib import Path

import torch

from cache import NO_ROW
from course.exercises import stubs
from course.exercises.cases import Case, cases
from course.exercises.mistakes import MISTAKES
from course.exercises.observe import CHANGED, observe

ERROR, WHERE = "error", "where"  # parts of a case that failed
MOST_NUMBERS, MOST_LINES, WIDTH = 70, 15, 96  # of a message
inputs = cache(cases)  # for functions of the project: a student's could change them


def with_mistake(function, old: str, new: str):
    """The project's function with a change to its text."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} is not once in {function.__name__}"
    scope = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), scope)
    return scope[function.__name__]


def found_in(name: str, function, case: Case, file: str = "") -> dict:
    """What is found in a case. An error of a function of this file is found, too."""
    try:
        return observe(name, function, case)
    except NotImplementedError:
        raise
    except (Exception, SystemExit) as error:  # it is shown, not hidden
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__)
                 if frame.f_code.co_filename == file]
        where = f", at line {lines[-1]} of {Path(file).name}" if lines else ""
        return {ERROR: f"{type(error).__name__}: {error}", WHERE: where}


@cache
def right(exercise: str, seed: int) -> list[dict]:
    """What the project's function gives."""
    name, (solution, _) = exercise[3:], stubs.EXERCISES[exercise]
    return [observe(name, solution, case) for case in inputs(name, seed)]


@cache
def mistaken(exercise: str, number: int, seed: int, i: int) -> dict:
    """What a mistake gives in case `i`."""
    name, (solution, _) = exercise[3:], stubs.EXERCISES[exercise]
    old, new, _ = MISTAKES[name][number]
    return found_in(name, with_mistake(solution, old, new), inputs(name, seed)[i])


def diagnose(exercise: str, found: list[dict], seed: int = 0) -> str:
    """What is wrong in a few lines, "" if nothing is."""
    expected, all_cases = right(exercise, seed), inputs(exercise[3:], seed)
    parts = [differing(*parts) for parts in zip(found, expected, all_cases)]
    wrong = [i for i, part in enumerate(parts) if part]
    if not wrong:
        return ""
    first = wrong[0]
    mistake, case = named(exercise, found, wrong, seed), all_cases[first]
    names = parameters(exercise)
    lines = [case.name, *wrapped(mistake), *arguments(names, case),
             *difference(names, parts[first], found[first], expected[first], case)]
    return "\n  ".join(lines[:MOST_LINES])


def named(exercise: str, found: list[dict], wrong: list[int], seed: int) -> str:
    """The mistake that explains the first of the wrong cases, and at least half of them. Of two,
    the one that explains them better, or is seen in fewer of the right cases."""
    best, most = "", ((len(wrong) + 1) // 2,)
    for number, (_, _, diagnosis) in enumerate(MISTAKES[exercise[3:]]):
        if explains(exercise, number, seed, wrong[0], found):
            explained = [explains(exercise, number, seed, i, found) for i in range(len(found))]
            of_wrong = [explained[i] for i in wrong]
            rank = sum(x > 0 for x in of_wrong), sum(of_wrong), sum(explained)
            best, most = (diagnosis, rank) if rank > most else (best, most)
    return best


def explains(exercise: str, number: int, seed: int, i: int, found: list[dict]) -> int:
    """2 if a mistake gives all that is found in case `i`, 1 if it gives what is wrong in the first
    wrong part, else 0."""
    case, expected = inputs(exercise[3:], seed)[i], right(exercise, seed)[i]
    other = mistaken(exercise, number, seed, i)
    if not differing(found[i], other, case) and not differing(other, found[i], case):
        return 2
    part = differing(found[i], expected, case)
    return int(part in found[i] and part in other and agree_where_wrong(
        found[i][part], other[part], expected.get(part), case.tolerance))


def agree_where_wrong(a, b, expected, tolerance: float) -> bool:
    """Whether `b` is wrong where `a` is, and by the same. NaN and infinity are the same here."""
    if not isinstance(a, torch.Tensor):
        return same(a, b, tolerance)
    if problem(a, expected) or problem(a, b):
        return False
    wrong = differs(a, expected, tolerance)
    a, b = (x.double().masked_fill(~x.isfinite(), math.nan)[wrong] for x in (a, b))
    return same(a, b, tolerance)


def differing(found: dict, expected: dict, case: Case) -> str | None:
    """The first part that differs. An error is a part."""
    if ERROR in found and ERROR not in expected:
        return ERROR
    return next((part for part in expected if part not in found or not same(
        found[part], expected[part], case.tolerance)), None)


def same(found, expected, tolerance: float) -> bool:
    if not isinstance(found, torch.Tensor) or not isinstance(expected, torch.Tensor):
        return type(found) is type(expected) and found == expected
    return not problem(found, expected) and not differs(found, expected, tolerance).any()


def problem(found: torch.Tensor, expected) -> str:
    """Why numbers cannot be compared, "" if they can."""
    if found.shape != expected.shape:
        return f"has the shape {tuple(found.shape)} and should have {tuple(expected.shape)}"
    if found.is_floating_point() != expected.is_floating_point() or found.dtype == torch.bool:
        kind = "numbers with fractions" if expected.is_floating_point() else "whole numbers"
        return f"has the dtype {found.dtype} and should have {kind}, as {expected.dtype}"
    return ""


def differs(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Which numbers differ by more than rounding."""
    if expected.dtype in (torch.bfloat16, torch.float16):
        tolerance = 0.01
    found, expected = found.double(), expected.double()
    finite = expected[expected.isfinite()].abs()
    most = finite.max().item() if len(finite) else 0
    return ~torch.isclose(found, expected, rtol=tolerance, atol=tolerance * most, equal_nan=True)


def parameters(exercise: str) -> list[str]:
    """Names for the arguments of a case."""
    if exercise[3:] == "seal":
        return ["sentences of the prompt", "rows sealed after a step", "settings"]
    return list(inspect.signature(stubs.EXERCISES[exercise][0]).parameters)


def arguments(names: list[str], case: Case) -> list[str]:
    """The arguments in lines. Of many numbers only the shapes are shown."""
    given = [(name, x) for name, x in zip(names, case.arguments) if name != "self" and x != {}]
    if sum(x.numel() for _, x in given if isinstance(x, torch.Tensor)) > MOST_NUMBERS:
        shapes = (f"{name} {tuple(x.shape) if isinstance(x, torch.Tensor) else x}"
                  for name, x in given)
        return wrapped(f"shapes: {', '.join(shapes)}")
    return [line for name, x in given for line in wrapped(f"{name} = {shown(x)}")]


def wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_on_hyphens=False)


def shown(value) -> str:
    """A value as Python writes it, with few digits."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return "NO_ROW" if value == NO_ROW else repr(value)


def difference(names: list[str], part: str, found: dict, expected: dict, case: Case) -> list[str]:
    """How a part differs: of a tensor, the first number that does."""
    if part == ERROR:
        return wrapped(found[ERROR] + found[WHERE])
    if part == CHANGED:
        return [f"your function changed the argument {names[found[part][0]]}: work on a copy"
                " (`-=` changes a tensor in place)"]
    a, b = found.get(part), expected[part]
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return wrapped(f"{part}: {shown(a)}, and it should be {shown(b)}")
    if text := problem(a, b):
        return [f"{part} {text}"]
    place = differs(a, b, case.tolerance).nonzero()[0].tolist()
    x, y = (shown(tensor[tuple(place)]) for tensor in (a, b))
    return [f"{part}: at {place} it is {x} and should be {y}"]

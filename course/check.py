"""Check your exercises: `python -m course.check 7 --folder MINE`, or `all` instead of 7.

Your function runs on small cases, and a likely mistake is named. Then it takes the place of the
project's function: some of the project's own tests run with it, and it answers the example
question. The exit status is 0 if all exercises are right.
"""

import argparse
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from course.exercises import stubs
from course.exercises.cases import N_STEPS, cases
from course.exercises.diagnose import diagnose
from course.exercises.observe import ROWS_MOVED
from course.exercises.student import ROOT, decoded

LESSONS = sorted({int(exercise[:2]) for exercise in stubs.EXERCISES})
WRITE_IT = "imported from the project: write the function yourself"


class Result(NamedTuple):
    name: str  # of the exercise
    status: str  # right, wrong, not written, imported, too slow, missing or error
    message: str
    seconds: float


class TooSlow(Exception):
    """A process did not end in time."""


def run(*arguments, seconds: float) -> tuple[int, list[dict]]:
    """Run functions of a student in a process of its own, with one thread: all inputs are tiny.
    Returns its exit status and its lines of JSON. At TooSlow, it and what it started have ended."""
    def limit():  # ends it also when this process has been killed
        most = math.ceil(seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))

    process = subprocess.Popen(
        [sys.executable, "-m", "course.exercises.student", *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True,
        encoding="utf-8", start_new_session=True, preexec_fn=limit)
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
    finally:
        if process.poll() is None:  # Ctrl-C
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode in (-signal.SIGKILL, -signal.SIGXCPU):
        raise TooSlow(lines_of(out))
    return process.returncode, lines_of(out)


def lines_of(out: str) -> list[dict]:
    """The whole lines: a process that was ended can leave half a line."""
    return [json.loads(line) for line in out.splitlines(keepends=True) if line.endswith("\n")]


def judge(exercise: str, folder: Path, args) -> Result:
    """One exercise, in at most `args.limit` seconds."""
    begin = time.monotonic()
    try:
        status, message = of_cases(exercise, folder, args.seed, args.limit)
        if status == "right" and not args.quick:
            left = max(0, args.limit - (time.monotonic() - begin))
            status, message = of_tests(exercise, folder, left, message)
    except TooSlow as slow:
        status, message = "too slow", f"{slow}, {args.limit:g} seconds are the limit"
    return Result(exercise, status, message, round(time.monotonic() - begin, 1))


def of_cases(exercise: str, folder: Path, seed: int, limit: float) -> tuple[str, str]:
    """Status and message of the small cases."""
    names = [*(case.name for case in cases(exercise[3:], seed)), "the end", "the end"]
    if not (folder / f"{exercise}.py").is_file():
        return "missing", f"there is no file {folder / exercise}.py"
    try:
        status, lines = run("cases", folder, exercise, seed, seconds=limit)
    except TooSlow as slow:
        (lines,) = slow.args
        raise TooSlow(f"no result of the case: {names[len(lines)]}") from slow
    last = lines[-1] if lines else {}
    if "problem" in last:
        return "error", last["problem"]
    if "not written" in last:
        return "not written", "replace `raise NotImplementedError`"
    if "imported" not in last:
        return "error", f"the process ended with status {status} in the case: {names[len(lines)]}"
    if last["imported"]:
        return "imported", WRITE_IT
    found = [{part: decoded(x) for part, x in line.items()} for line in lines[:-1]]
    problem = diagnose(exercise, found, seed)
    return ("wrong", problem) if problem else ("right", praise(found, last["same names"]))


def praise(found: list[dict], same_names: bool) -> str:
    moved = [parts[ROWS_MOVED] for parts in found if ROWS_MOVED in parts]
    return (f"{len(found)} cases"
            + (f", {moved[0]} rows move in {N_STEPS} steps, the least possible" if moved else "")
            + (", with the names of the project's own lines" if same_names else ""))


def of_tests(exercise: str, folder: Path, seconds: float, message: str) -> tuple[str, str]:
    """Status and message of the project's own tests, once the small cases are right."""
    try:
        status, lines = run("tests", folder, exercise, seconds=seconds)
    except TooSlow as slow:
        raise TooSlow("the small cases are right; the project's own tests did not end") from slow
    failed = lines[-1]["failed"] if lines else f"the process ended with status {status}"
    if failed:
        lines = f"the project's own tests with your function: {failed}".splitlines()
        return "wrong", "\n  ".join(line[:200] for line in lines[:15])
    return "right", f"{message}, and the project's own tests"


def ask(results: list[Result], folder: Path, limit: float) -> bool:
    """The example question, with all functions that are right. Whether it is answered."""
    print("the example question with your code; the boards cost $8.03½:", flush=True)
    right = [result.name for result in results if result.status == "right"]
    try:
        return subprocess.run([sys.executable, "-m", "course.exercises.student", "question",
                               folder, *right], cwd=ROOT, timeout=limit).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"no answer in {limit:g} seconds")
        return False


def exercises_of(lesson: str) -> list[str]:
    """Raises ValueError if a lesson has none."""
    found = [name for name in stubs.EXERCISES if lesson in ("all", str(int(name[:2])))]
    if not found:
        raise ValueError(f"lesson {lesson} has no exercise, these have:"
                         f" {', '.join(map(str, LESSONS))}, and all")
    return found


def shown(result: Result, as_json: bool) -> str:
    if as_json:
        return json.dumps(result._asdict(), ensure_ascii=False)
    return f"{result.name}: {result.status}: {result.message}"


def parse(arguments):
    parser = argparse.ArgumentParser(prog="course.check", description=__doc__.split("\n")[0])
    parser.add_argument("lesson", help="a number, or all")
    parser.add_argument("--folder", type=Path, default=Path(stubs.__file__).parent)
    parser.add_argument("--json", action="store_true",
                        help="for a grader: a line of JSON for each exercise, and no question")
    parser.add_argument("--quick", action="store_true", help="the small cases alone")
    parser.add_argument("--limit", type=float, default=300, help="seconds for an exercise")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    args = parse(arguments)
    try:
        exercises = exercises_of(args.lesson)
        if not args.folder.is_dir():
            raise ValueError(f"there is no folder {args.folder}")
        if not 0 < args.limit <= 10**6:
            raise ValueError(f"limit is {args.limit:g}, must be above 0 and at most 1000000")
        if not 0 <= args.seed < 2**32:
            raise ValueError(f"seed is {args.seed}, must be from 0 to {2**32 - 1}")
    except ValueError as error:
        print(f"course.check: {error}", file=sys.stderr)
        return 2
    folder, results = args.folder.resolve(), []
    for exercise in exercises:
        results.append(judge(exercise, folder, args))
        print(shown(results[-1], args.json), flush=True)
    statuses = {result.status for result in results}
    if "right" in statuses <= {"right", "not written"} and not args.json and not args.quick:
        return 0 if ask(results, folder, args.limit) and statuses == {"right"} else 1
    return 0 if statuses == {"right"} else 1


if __name__ == "__main__":
    sys.exit(main())

"""Score a score of your own: `python -m course.score mine/06_gaussian.py`.

The file has a function with the arguments and the result of `sentencekv.mean_query`. It is compared
with the scores of the project, with the default settings otherwise: how many hidden numbers are
found, and how much of the attention goes to what is selected. `best_sentences` and `best_tokens`
choose by the true attention, which no score may know: no score can be much better than the first.
The text is an example of the project. Use benchmarks/answers.py for longer texts and other budgets.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks import answers, compare
from benchmarks.engine import Bench, Method
from benchmarks.rows import differences, read, with_error
from course.exercises import student
from course.exercises.cases import Draw, scores_at_random
from sentencekv import SCORES
from support.document import read_text
from weights.models import model_folder

BOOK, LENGTH, BUDGET = student.ROOT / "examples" / "walden_house.txt", 2000, 64
GAUSSIAN, MINE = "sentencekv:score=gaussian", "sentencekv:score=mine"
METHODS = f"full sentencekv:score=mean_query {GAUSSIAN} {MINE} best_sentences best_tokens"


def check_score(file: Path, function):
    """Raises ValueError for a function that is no score, tried out on five sentences."""
    arguments = scores_at_random(Draw(1)).arguments
    try:
        scores = function(*arguments)
    except (Exception, SystemExit) as error:  # whatever the student wrote
        raise ValueError(f"{file}: {type(error).__name__}: {error}") from error
    shape, expected = tuple(getattr(scores, "shape", ())), tuple(arguments[-1].shape)
    if shape != expected:
        raise ValueError(f"{file}: the result has the shape {shape}, and must have that of the"
                         f" lengths, here {expected}")
    if torch.isnan(scores).any():
        raise ValueError(f"{file}: a score is not a number")


def needles(count: int) -> list[dict]:
    """Rows of the prompts with numbers. Raises ValueError if they could not be measured."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "rows.jsonl"
        status = answers.main([
            "needles", "--families", "multikey", "--count", str(count), "--data", str(BOOK),
            "--length", str(LENGTH), "--budgets", str(BUDGET), "--methods", METHODS,
            "--pair", GAUSSIAN, "--out", str(out)])
        if status:
            raise ValueError("the prompts could not be answered")
        return read(out)[1]


def attention() -> dict:
    """Method -> the share of the full cache's attention, for the question of the book."""
    bench = Bench(model_folder(None))
    rows = compare.measure(bench, bench.tokenizer.prompt_ids(read_text(BOOK)), 48,
                           [Method(spec, BUDGET) for spec in METHODS.split()])
    print(compare.table(rows))
    return {row["method"]: row["mass"] for row in rows}


def summary(file: Path, rows: list[dict], shares: dict) -> str:
    """One line, for a table of a class."""
    def found(method, rows=rows):
        return with_error([row["score"] for row in rows if row["method"] == method], 100, ".0f")

    ceilings = "best_sentences", "best_tokens"
    return " | ".join((
        file.name, f"{found(MINE)} % found", f"{found(MINE, differences(rows, GAUSSIAN))} more than"
        f" gaussian", f"{found('best_sentences')} and {found('best_tokens')} are possible",
        f"{shares[MINE]:.1%} of the attention", f"gaussian {shares[GAUSSIAN]:.1%}",
        *(f"{name} {shares[name]:.1%}" for name in ceilings)))


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="course.score", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=10, help="how many prompts with numbers")
    args = parser.parse_args(arguments)
    try:
        if args.count < 1:
            raise ValueError(f"--count is {args.count}, must be at least 1")
        SCORES["mine"] = student.load(args.file, args.file.stem.lstrip("0123456789_"))
        check_score(args.file, SCORES["mine"])
        print(f"one of four numbers hidden in {LENGTH} tokens, token budget {BUDGET}, {args.count}"
              " prompts: per cent found ± standard error", flush=True)
        rows = needles(args.count)
        print(f"\nthe question of {BOOK.name}: the share of the full cache's attention that goes to"
              "\nthe tokens within the budget (higher is better), the relative error of the output"
              "\n(lower is better), and the answer", flush=True)
        print("\n" + summary(args.file, rows, attention()))
    except ValueError as error:
        print(f"course.score: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

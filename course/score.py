"""Score a score of your own: `python -m course.score mine/06_gaussian.py`.

The file has a function with the arguments and the result of `sentencekv.mean_query`. It is compared
with the scores of the project, with the default settings otherwise: how many hidden numbers are
found, and how much of the attention goes to what is selected. The text is an example of the
project. Use benchmarks/answers.py for longer texts and other budgets.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import answers, compare
from course import check
from sentencekv import SCORES

BOOK, LENGTH, BUDGET = check.ROOT / "examples" / "walden_house.txt", 2000, 64
METHODS = "full sentencekv:score=mean_query sentencekv:score=gaussian sentencekv:score=mine"


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="course.score", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=10, help="how many prompts with numbers")
    args = parser.parse_args(arguments)
    try:
        SCORES["mine"] = check.load(args.file, args.file.stem.lstrip("0123456789_"))
    except ValueError as error:
        print(f"course.score: {error}", file=sys.stderr)
        return 2
    print(f"one of four numbers hidden in {LENGTH} tokens, token budget {BUDGET}, {args.count}"
          " prompts: per cent found ± standard error", flush=True)
    if status := answers.main(["needles", "--families", "multikey", "--count", str(args.count),
                               "--data", str(BOOK), "--length", str(LENGTH), "--budgets",
                               str(BUDGET), "--methods", METHODS]):
        return status
    print(f"\nthe question of {BOOK.name}: the share of the full cache's attention that goes to\n"
          "the tokens within the budget (higher is better), the relative error of the output\n"
          "(lower is better), and the answer", flush=True)
    return compare.main(["--prompt", str(BOOK), "--budget", str(BUDGET), "--methods", METHODS])


if __name__ == "__main__":
    sys.exit(main())

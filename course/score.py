"""Score a score of your own: `python -m course.score mine/05_gaussian.py`.

The file has a function with the arguments and the result of `sentencekv.mean_query`. It is compared
with the scores of the project, with the default settings otherwise: how many needles are found, and
how much of the attention goes to what is selected. The text is an example of the project. Use
benchmarks/quality.py for longer texts and other budgets.
"""

import argparse
import sys
from pathlib import Path

from benchmarks import quality
from course import check
from sentencekv import SCORES

BOOK = check.ROOT / "examples" / "walden_house.txt"
METHODS = "full sentencekv:score=mean_query sentencekv sentencekv:score=mine"
SHARED = ["--data", str(BOOK), "--length", "2000", "--budgets", "128", "--methods", METHODS]
NEEDLES = ["ruler", "--generate", "single,multikey", *SHARED]
RECALL = ["recall", "--new-tokens", "64", *SHARED]


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="course.score", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=10, help="prompts of each kind of needle")
    args = parser.parse_args(arguments)
    try:
        SCORES["mine"] = check.load(args.file, args.file.stem.lstrip("0123456789_"))
    except ValueError as error:
        print(f"course.score: {error}", file=sys.stderr)
        return 2
    print("per cent of the needles found, one alone (single) or one of four (multikey):", flush=True)
    if status := quality.main([*NEEDLES, "--count", str(args.count)]):
        return status
    print("\nshare of the attention that goes to the selected rows (mass), relative error of the"
          " output:", flush=True)
    return quality.main(RECALL)


if __name__ == "__main__":
    sys.exit(main())

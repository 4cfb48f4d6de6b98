import support.environment  # noqa: F401  before torch, which reads the variables that it sets

import argparse
import sys
from functools import wraps
from pathlib import Path

TOP = Path(__file__).parents[1]


def plain_parser(program: str, doc: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"benchmarks.{program}", description=doc,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def with_status(main):
    """Make the `main` of a program return a status: 2 if its input is wrong, said in one line."""
    @wraps(main)
    def run(arguments=None) -> int:
        try:
            main(arguments)
        except (ValueError, OSError, ImportError) as error:
            program = Path(main.__code__.co_filename).stem
            print(f"benchmarks.{program}: {error}", file=sys.stderr)
            return 2
        return 0

    return run

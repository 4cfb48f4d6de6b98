"""The runs of generate.py that lessons show: `python -m benchmarks.lessons --out FILE`.

A row is what `--json` prints, with the options of its `run`. Three repeats, the one with the median
time a token.
"""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import TOP, plain_parser, with_status
from benchmarks.engine import provenance
from benchmarks.rows import write
from weights.models import model_folder

PROMPT = "examples/walden_house.txt"
RUNS = ("--kv-bits 16 --token-budget 192", "--kv-bits 16 --token-budget 512",
        "--kv-bits 16 --token-budget 1024", "--cache full")


def run(options: str) -> dict:
    command = [sys.executable, "generate.py", "--prompt", PROMPT, "--dtype", "float32", "--device",
               "cpu", "--json", *options.split()]
    done = subprocess.run(command, cwd=TOP, text=True, stdout=subprocess.PIPE)
    if done.returncode:
        raise ValueError(f"generate.py {options}: status {done.returncode}")
    return json.loads(done.stdout)


def median_of_three(options: str) -> dict:
    answers = [run(options) for _ in range(3)]
    return sorted(answers, key=lambda answer: answer["decode_ms_per_token"])[1]


@with_status
def main(arguments=None):
    parser = plain_parser("lessons", __doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    about = provenance("lessons", {}, model_folder(None), [TOP / PROMPT])
    write(args.out, about, [{"task": "lessons", "run": options, **median_of_three(options)}
                            for options in RUNS])


if __name__ == "__main__":
    sys.exit(main())

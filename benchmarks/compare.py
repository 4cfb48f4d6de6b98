"""One prompt, every method: what it answers, what it attends to, what it holds.

    python -m benchmarks.compare --prompt examples/walden_house.txt --budget 256

The prompt is read once. Attention mass and the error of the attention output are those of
`benchmarks.quality recall`, over the full cache's answer and all layers. Milliseconds are those of
the cache and the attention, in plain PyTorch, and no measure of the published methods' own code.
Held for attention, kept elsewhere and read for a token are in tokens of 16 bits a channel, the mean
of all KV heads. Keys that a method makes up attract attention too, so its mass may be no share.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean

from benchmarks.methods import METHODS, cost
from benchmarks.quality import Bench, Method, asked_methods
from support.document import read_text
from weights.models import model_folder


def parse(arguments):
    parser = argparse.ArgumentParser(prog="benchmarks.compare", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--budget", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--methods", default=" ".join(METHODS))
    args = parser.parse_args(arguments)
    args.budgets = [args.budget]
    return args


def compare(bench: Bench, ids: list[int], max_new_tokens: int, methods: list[Method]):
    """Print one line a method."""
    headings = ("method", "attention mass", "output error", "held", "elsewhere", "read",
                "ms a token", "answer")
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    full = Method("full", methods[0].budget)
    writers = {w.method: w for w in bench.answers(ids, max_new_tokens, [full, *methods])}
    others = [m for m in methods if m.name != "full"]
    seen = {full: [(1.0, 0.0)]}
    for method, _, mass, error in bench.recall([*ids, *writers[full].tokens], len(ids), others):
        seen.setdefault(method, []).append((mass, error))
    for method in methods:
        writer = writers[method]
        mass, error = (mean(column) for column in zip(*seen[method]))
        answer = " ".join(bench.text(writer).split()).replace("|", "/")
        per_token = 1e3 * writer.seconds / max(len(writer.tokens) - 1, 1)
        held, elsewhere, read = cost(writer.cache)
        share = f"{mass:.1%}" if mass < 1.001 else "no share"
        print(f"| {method.spec} | {share} | {error:.3f} | {held:.0f} | {elsewhere:.0f}"
              f" | {read:.0f} | {per_token:.1f} | {answer} |")


def main(arguments=None) -> int:
    args = parse(arguments)
    try:
        prompt, methods = read_text(args.prompt), asked_methods(args)
        bench = Bench(model_folder(args.model))
        ids = bench.tokenizer.prompt_ids(prompt)
        compare(bench, ids, args.max_new_tokens, methods)
    except (ValueError, OSError) as error:
        print(f"benchmarks.compare: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The loss of each method when it reads on in a book: `python -m benchmarks.reading --data walden`.

A passage begins at each of `--places` of a book. Its first `--length` tokens are read with full
attention. Of the next `--new-tokens`, all but the first are scored one by one: their mean negative
log-likelihood is the loss.
"""

import sys
from fractions import Fraction

from tqdm import tqdm

from benchmarks import engine, with_status
from support.document import read_text
from support.prompts import check_positions


def passages(args, bench) -> list[tuple[str, list[int]]]:
    """(name, ids) of each."""
    found, wanted = [], args.length + args.new_tokens
    for path in args.data:
        text = read_text(path)
        for place in args.places:
            start = int(len(text) * place)
            ids = bench.tokenizer.encode(text[start : start + 8 * wanted], add_bos=True)[:wanted]
            if len(ids) < args.length + 2:
                raise ValueError(f"{path} has {len(ids)} tokens after {place} of it, and needs at"
                                 f" least {args.length + 2}: --length and two to read on")
            check_positions(args.length, len(ids) - args.length, bench.model.config)
            found.append((f"{path.stem} {place}", ids))
    return found[: args.limit]


def measure(args, bench, methods, results):
    for name, ids in tqdm(passages(args, bench), unit="passage", disable=None):
        left = results.missing(name, args.length, methods)
        if left:
            found = [reader.row(score=loss)
                     for reader, loss in bench.losses(ids, args.length, left)]
            results.add(name, args.length, found, tokens=len(ids))


@with_status
def main(arguments=None):
    parser = engine.parser("reading", __doc__)
    add = parser.add_argument
    add("--length", type=int, default=3000, help="tokens read with full attention")
    add("--places", type=engine.numbers(Fraction), default=[Fraction(1, 3)],
        help="of passages in a book, from 0 to 1")
    add("--new-tokens", type=int, default=257, help="read after them")
    args = parser.parse_args(arguments)
    if args.new_tokens < 2:
        parser.error(f"--new-tokens is {args.new_tokens}, must be at least 2")
    engine.run(args, ("length", "new_tokens"), measure, overall="above full")


if __name__ == "__main__":
    sys.exit(main())

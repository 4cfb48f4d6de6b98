"""Many questions of one document: `python -m benchmarks.requests --data walden`.

Eight facts are hidden in a document, and each is asked for as if it were the only question. Full
attention reads the document alone. Methods that evict choose once what to keep: for question 1,
whose last 32 queries they see, or for none (`sees=nothing`), with the document's last 32. They read
each question with what they have kept. The others read it with everything, and choose afterwards.
"""

import sys

from tqdm import tqdm

from benchmarks import engine, tasks, with_status
from benchmarks.methods import class_of
from support.document import read_text


def measure(args, bench, methods, results):
    left_out = {m.spec for m in methods if not class_of(m.spec).reads_on}
    if left_out:
        print(f"cannot read a second text: {', '.join(sorted(left_out))}", file=sys.stderr)
    methods = [m for m in methods if m.spec not in left_out]
    paragraphs = engine.haystack(bench, "\n\n".join(map(read_text, args.data)), args.length)
    documents = [*tasks.requests(paragraphs, args.limit or args.count, args.seed)]
    for questions in tqdm(documents, unit="document", disable=None):
        left = results.missing(questions[-1].task, questions[-1].index, methods)  # the last written
        found = {example: [] for example in questions}
        for example, writer in bench.requests(questions, left) if left else ():
            text = bench.text(writer)
            found[example].append(writer.row(score=example.score(text), text=text))
        for example, result in found.items() if left else ():
            results.add(example.task, example.index, result, answers=example.answers)


@with_status
def main(arguments=None):
    parser = engine.parser("requests", __doc__)
    parser.add_argument("--count", type=int, default=8, help="documents")
    parser.add_argument("--seed", type=int, default=0, help="of what is hidden in them")
    parser.add_argument("--length", type=int, default=2000, help="tokens of a document")
    engine.run(parser.parse_args(arguments), ("length", "seed"), measure, overall="mean")


if __name__ == "__main__":
    sys.exit(main())

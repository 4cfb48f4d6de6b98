"""Per cent of prompts that each method answers: RULER, needles in a book, LongBench.

    python -m benchmarks.answers ruler --data niah_single_1 vt --methods "full snapkv sentencekv"
    python -m benchmarks.answers needles --families single --data walden --length 3700
    python -m benchmarks.answers longbench --data qasper

`needles` hides numbers in a book, in the manner of RULER. The question comes last. Full attention
reads it with the text, before any method chooses; the field calls that prefill with the question.
With `--question sparsely` it reads the text alone, and then each method reads the question token by
token, as it writes: the question is read sparsely. A prompt that is too long is named and left out.
"""

import sys

from tqdm import tqdm

from benchmarks import engine, tasks, with_status
from support.document import read_text


def examples(args, bench) -> list[tasks.Example]:
    if args.task == "needles":
        text = "\n\n".join(map(read_text, args.data))
        paragraphs = engine.haystack(bench, text, args.length)
        return [example for family in args.families
                for example in tasks.ruler_generate(family, paragraphs, args.count, args.seed)]
    read = tasks.ruler_file if args.task == "ruler" else tasks.longbench_file
    return [example for path in args.data for example in read(path)]


def measure(args, bench, methods, results):
    todo = [x for x in examples(args, bench) if args.limit is None or x.index < args.limit]
    for example in tqdm(todo, unit="prompt", disable=None):
        left = results.missing(example.task, example.index, methods)
        if not left:
            continue
        ids, found = bench.prompt_ids(example), []
        n = bench.document_length(example, ids) if args.question == "sparsely" else None
        try:
            for writer in bench.answers(ids, example.max_new_tokens, left, n):
                text = bench.text(writer)
                found.append(writer.row(score=example.score(text), text=text))
        except ValueError as error:
            if "positions" not in str(error):
                raise
            print(f"{example.task}, row {example.index + 1}: {error}", file=sys.stderr)
        else:
            results.add(example.task, example.index, found, answers=example.answers,
                        tokens=len(ids))


@with_status
def main(arguments=None):
    parser = engine.parser("answers", __doc__)
    add = parser.add_argument
    add("task", choices=("ruler", "needles", "longbench"))
    add("--question", choices=("whole", "sparsely"), default="whole", help="how it is read")
    add("--families", type=lambda text: text.split(","), default=[*tasks.FAMILIES],
        help=f"of needles: {', '.join(tasks.FAMILIES)}")
    add("--count", type=int, default=20, help="needles of every family")
    add("--seed", type=int, default=0, help="of needles")
    add("--length", type=int, default=3700, help="tokens that needles are hidden in")
    args = parser.parse_args(arguments)
    if unknown := {*args.families} - {*tasks.FAMILIES}:
        parser.error(f"--families {', '.join(unknown)}: they are {', '.join(tasks.FAMILIES)}")
    if args.task == "longbench" and args.question == "sparsely":
        parser.error("--question sparsely is not for longbench: its last line is not the question")
    of_needles = ("families", "seed", "length") if args.task == "needles" else ()
    engine.run(args, ("task", "question", *of_needles), measure, overall="mean")


if __name__ == "__main__":
    sys.exit(main())

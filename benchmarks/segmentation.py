"""How good and how fast the sentences are: `python -m benchmarks.segmentation`.

Golden rules have one JSON object a line, with `text` and its `sentences`; right if all of them are.
Web pages have `text` and `sentence_char_spans`; an end found after the last character of a sentence
is right. The time is that of a book.

Then, of the web pages, token spans by the rule of the SentenceKV authors' code, and by ours, with a
limit of 128 tokens. Theirs ends a sentence after each token in a list of marks. In a byte-level BPE
these are `.`, `!`, `?` and `...`: other entries, such as an empty line, are no tokens.
"""

import sys
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from timeit import repeat

from benchmarks import data, plain_parser, tables, tasks, with_status
from benchmarks.engine import provenance, units
from benchmarks.rows import write
from segment import sentence_ends
from support.document import read_text
from weights.models import model_folder
from weights.tokenizer import Tokenizer

LIMIT = 128  # with the default, more sentences are cut on purpose


def refuse(problem: str):
    raise ValueError(problem)


def count_golden(rows: list[dict]) -> int:
    def found(text):
        return [text[a:b].strip() for a, b in pairwise([0, *sentence_ends(text)])]

    return sum(found(row["text"]) == [s.strip() for s in row["sentences"]] for row in rows)


def score(rows: list[dict]) -> dict:
    right = found = true = 0
    for row in rows:
        text = row["text"]  # an end is after the last character that is not white space
        ends = {len(text[:end].rstrip()) for end in sentence_ends(text)} - {0}
        gold = {end for _, end in row["sentence_char_spans"]}
        right, found, true = right + len(ends & gold), found + len(ends), true + len(gold)
    return {"precision": right / max(found, 1), "recall": right / max(true, 1),
            "f1": 2 * right / max(found + true, 1)}


def characters_per_second(text: str) -> float:
    return len(text) / min(repeat(lambda: sentence_ends(text), number=1, repeat=3))


def cut_in_the_middle(rows: list[dict], tokenizer: Tokenizer, unit: str) -> dict:
    """Of all pages' spans: number, lengths in tokens, and the share that cuts a sentence."""
    lengths, middle = [], 0
    for row in rows:
        text, gold = row["text"], {end for _, end in row["sentence_char_spans"]}
        pieces = tokenizer.pieces(tokenizer.prompt_ids(text, raw=True))
        before = len(text) - sum(map(len, pieces))  # what the tokenizer left out at the beginning
        places = list(accumulate(map(len, pieces), initial=before))
        for start, end in units(pieces, unit, LIMIT):
            lengths.append(end - start)
            middle += len(text[: places[end]].rstrip()) not in gold
    return {"spans": len(lengths), "median": median(lengths), "longest": max(lengths),
            "in_the_middle": middle / len(lengths)}


def measure(golden: Path, pages: Path, book: Path) -> list[dict]:
    """The rows: one of sentences, and one for each rule of token spans."""
    golden, pages = ([row for _, row in tasks.read_rows(path, "text", field, bad_line=refuse)]
                     for path, field in ((golden, "sentences"), (pages, "sentence_char_spans")))
    tokenizer = Tokenizer(model_folder(None))
    return [
        {"golden": count_golden(golden), "of": len(golden), **score(pages),
         "characters_per_second": characters_per_second(read_text(book))},
        *({"rule": name, **cut_in_the_middle(pages, tokenizer, unit)}
          for name, unit in (("authors' rule", "authors"), ("ours", "sentence")))]


@with_status
def main(arguments=None):
    parser = plain_parser("segmentation", __doc__)
    for name, default in (("golden", "golden_english"), ("pages", "ud_ewt_dev"),
                          ("book", "tale_of_two_cities")):
        parser.add_argument(f"--{name}", default=default, help="a file, or a name of inputs.json")
    parser.add_argument("--out", type=Path, help="results: see benchmarks/rows.py")
    args = parser.parse_args(arguments)
    files = [data.find(name) for name in (args.golden, args.pages, args.book)]
    rows = measure(*files)
    print(tables.segmentation(rows))
    if args.out:
        write(args.out, provenance("segmentation", {}, model_folder(None), files), rows)


if __name__ == "__main__":
    sys.exit(main())

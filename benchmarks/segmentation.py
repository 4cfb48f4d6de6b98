"""How good and how fast the sentences are.

    python -m benchmarks.segmentation GOLDEN EWT BOOK [--model DIR]

GOLDEN: one JSON object a line, with `text` and its `sentences`; right if all of them are.
EWT:    one JSON object a line, with `text` and `sentence_char_spans`; an end found after the last
        character of a sentence is right. Web pages of the Universal Dependencies treebank.
BOOK:   any text in UTF-8.

Then, with the tokenizer in DIR, token spans by the rule of the SentenceKV authors' code, and by
ours. Their code has a list of marks, and ends a sentence after each token that is one of them. In a
byte-level BPE these are the tokens `.`, `!`, `?` and `...`: a line break is not in the list, and
other entries, such as an empty line, are no tokens. A span ends in the middle of a sentence
- of a web page: if the page's own spans do not end there;
- of a book, which has no such spans: if it stops inside a word, a number or a closing quote, if a
  small letter follows, if it stops at a title or an initial, or if it stops neither at a mark
  (.!?:;) nor at the end of a paragraph.
"""

import argparse
import sys
import time
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median

import regex

from benchmarks import tasks
from segment import sentence_ends, token_spans
from support.document import read_text
from weights.models import model_folder
from weights.tokenizer import Tokenizer

AUTHORS_ENDS = {".", "!", "?", "..."}
OURS = partial(token_spans, limit=128)  # with the default, more sentences are cut on purpose
STOPPED = regex.compile(r"[.!?…:;][\p{Pe}\p{Pf}\"'_*]*$")
SHORT = regex.compile(r"\b(?:Mr|Mrs|Ms|Dr|St|Messrs|Mme|Prof|Capt|Col|Rev|Hon|Esq|No|\p{Lu})\.$")


def refuse(problem: str):
    raise ValueError(problem)


def read_rows(path: str, field: str, is_field) -> list[dict]:
    """Rows with a `text` and a list `field`, all of whose items `is_field` accepts."""
    rows = []
    for number, row in tasks.read_rows(Path(path), "text", field, bad_line=refuse):
        if not isinstance(row["text"], str):
            refuse(f"{path}:{number + 1}: text is no string")
        if not isinstance(row[field], list) or not all(map(is_field, row[field])):
            refuse(f"{path}:{number + 1}: {field} is no list of the right kind")
        rows.append(row)
    return rows


def is_span(span) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(type(place) is int for place in span)


def count_golden(rows: list[dict]) -> int:
    def found(text):
        return [text[a:b].strip() for a, b in pairwise([0, *sentence_ends(text)])]

    return sum(found(row["text"]) == [s.strip() for s in row["sentences"]] for row in rows)


def stripped_ends(text: str, ends) -> set[int]:
    """Offsets after the last character that is not white space."""
    return {len(text[:end].rstrip()) for end in ends} - {0}


def score(rows: list[dict]) -> tuple[float, float, float]:
    right = found = true = 0
    for row in rows:
        ends = stripped_ends(row["text"], sentence_ends(row["text"]))
        gold = {end for _, end in row["sentence_char_spans"]}
        right, found, true = right + len(ends & gold), found + len(ends), true + len(gold)
    return right / max(found, 1), right / max(true, 1), 2 * right / max(found + true, 1)


def characters_per_second(text: str) -> float:
    def once():
        began = time.perf_counter()
        sentence_ends(text)
        return time.perf_counter() - began

    return len(text) / min(once() for _ in range(3))


def authors_spans(pieces: list[str]) -> list[tuple[int, int]]:
    """The rule of the authors' code: an end after every token that is one of their marks."""
    ends = [i for i, piece in enumerate(pieces, 1) if piece in AUTHORS_ENDS]
    return list(pairwise(sorted({0, *ends, len(pieces)})))


def is_inside(text: str, end: int) -> bool:
    """Whether a span of a book that ends here, white space aside, ends in the middle."""
    stop = len(text[max(0, end - 200) : end].rstrip()) + max(0, end - 200)
    before, after = text[max(0, stop - 40) : stop], text[stop : stop + 200]
    following = after.lstrip()
    if not following or regex.match(r"\s*\n\s*\n", after):
        return False
    if following == after or following[0].islower():
        return True
    return SHORT.search(before) is not None or STOPPED.search(before) is None


def describe(texts: list[str], tokenized: list[list[str]], cut, inside) -> str:
    """One line of the table: spans, median and longest length, share that ends in the middle."""
    lengths, middle = [], 0
    for number, (text, pieces) in enumerate(zip(texts, tokenized, strict=True)):
        before = len(text) - sum(map(len, pieces))  # what the tokenizer left out at the beginning
        places = list(accumulate(map(len, pieces), initial=before))
        spans = cut(pieces)
        lengths += [end - start for start, end in spans]
        middle += sum(inside(number, text, places[end]) for _, end in spans)
    return f"{len(lengths):9,} {median(lengths):6.0f} {max(lengths):7} {middle / len(lengths):9.1%}"


def compare(pages: list[dict], book: str, tokenizer: Tokenizer):
    gold = [{end for _, end in page["sentence_char_spans"]} for page in pages]

    def inside_page(number, text, end):
        return len(text[:end].rstrip()) not in gold[number]

    def inside_book(_, text, end):
        return is_inside(text, end)

    print(f"\n{'token spans':20}{'spans':>9} {'median':>6} {'longest':>7} {'in middle':>9}")
    for name, texts, inside in (
        ("web pages", [page["text"] for page in pages], inside_page),
        ("book", [book], inside_book),
    ):
        tokenized = [tokenizer.pieces(tokenizer.prompt_ids(text, raw=True)) for text in texts]
        for rule, cut in (("authors'", authors_spans), ("ours", OURS)):
            print(f"{name + ', ' + rule:20}{describe(texts, tokenized, cut, inside)}")


def parse(arguments) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.segmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name in ("GOLDEN", "EWT", "BOOK"):
        parser.add_argument(name)
    parser.add_argument(
        "--model",
        metavar="DIR",
        type=Path,
        help="folder with a tokenizer (default: SmolLM2-135M-Instruct)",
    )
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    args = parse(arguments)
    try:
        golden = read_rows(args.GOLDEN, "sentences", lambda field: isinstance(field, str))
        pages = read_rows(args.EWT, "sentence_char_spans", is_span)
        book = read_text(args.BOOK)
        tokenizer = Tokenizer(model_folder(args.model))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    precision, recall, f1 = score(pages)
    print(f"golden rules      {count_golden(golden)} of {len(golden)}")
    print(f"web pages         precision {precision:.3f}, recall {recall:.3f}, F1 {f1:.3f}")
    print(f"speed             {characters_per_second(book) / 1e6:.1f} million characters a second")
    compare(pages, book, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())

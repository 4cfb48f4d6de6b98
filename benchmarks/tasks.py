"""What is asked of a model, and how an answer is scored: RULER, needles in a book, LongBench.

Each task yields `Example`s. Files are read in their published formats; a bad line is named on
standard error and the good ones still count.
"""

import json
import random
import re
import string
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rapidfuzz import fuzz
from rapidfuzz.distance import LCSseq

from support.document import read_text

RULER = re.compile(  # a Llama 3 chat around the question, and the beginning of the answer
    r"^<\|begin_of_text\|>.*?<\|start_header_id\|>user<\|end_header_id\|>(?P<body>.*)<\|eot_id\|>"
    r"<\|start_header_id\|>assistant<\|end_header_id\|>(?P<prefix>.*)$", re.DOTALL)


# Cities that have numbers; and facts: what is asked for, and what the answer is drawn from.
NEEDLES = json.loads(Path(__file__).with_name("needles.json").read_text(encoding="utf-8"))
CITIES = NEEDLES["cities"].split()
FAMILIES = ("single", "multikey")


@dataclass(frozen=True)
class Example:
    task: str
    index: int
    message: str  # the user's turn
    answers: tuple
    prefix: str = ""  # the beginning of the model's turn
    max_new_tokens: int = 64
    metric: str = "contains"
    classes: tuple = ()
    first_line: bool = False  # only the first line of the answer counts
    chat: bool = True  # else the message is text to be continued

    def score(self, text: str) -> float:
        """From 0 to 1."""
        if self.first_line:
            text = text.lstrip("\n").split("\n")[0]
        if self.metric == "contains":
            return sum(a.lower() in text.lower() for a in self.answers) / len(self.answers)
        return max(METRICS[self.metric](text, answer, self.classes) for answer in self.answers)


def normalised_words(text: str) -> list[str]:
    """Lower case, no punctuation, no articles: as SQuAD's scorer has it."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def in_both(found: list, expected: list) -> int:
    return (Counter(found) & Counter(expected)).total()


def f1(found: list, expected: list, common=in_both) -> float:
    n = common(found, expected)
    return 2 * n / (len(found) + len(expected)) if n else 0.0


def qa_f1(text, answer, classes):
    return f1(normalised_words(text), normalised_words(answer))


def rouge_l_f(text, answer, classes):
    return f1(text.split(), answer.split(), LCSseq.similarity)


def class_match(text, answer, classes):
    """1 over the number of classes named, without those that are only part of the right one."""
    named = [c for c in classes if c in text and not (c in answer and c != answer)]
    return 1 / len(named) if answer in named else 0.0


def code_similarity(text, answer, classes):
    lines = [x for x in text.lstrip("\n").split("\n") if not any(mark in x for mark in "`#")]
    lines = [x for x in lines if "//" not in x]
    return fuzz.ratio(lines[0] if lines else "", answer) / 100


def characters_f1(text, answer, classes):
    """Of Chinese, without punctuation and white space. LongBench cuts words first."""
    return f1(*([c for c in x.lower() if c.isalnum()] for x in (text, answer)))


def paragraph_match(text, answer, classes):
    """Whether the first number after the word for paragraph is the right one."""
    number, right = (re.search(r"段落\D*(\d+)", x) for x in (text, answer))
    return float(number is not None and number[1] == right[1])


METRICS = {"qa_f1": qa_f1, "rouge_l_f": rouge_l_f, "classification": class_match,
           "code_sim": code_similarity, "qa_f1_zh": characters_f1,
           "retrieval_zh": paragraph_match}


def warn(problem: str):
    print(problem, file=sys.stderr)


def read_rows(path: Path, *needed: str, bad_line=warn) -> Iterator[tuple[int, dict]]:
    """(line number from 0, row) of a JSON lines file. `bad_line` is told of each bad line."""
    for number, line in enumerate(read_text(path).rstrip("\n").split("\n")):
        try:
            row = json.loads(line)
            missing = [name for name in needed if name not in row]
            problem = f"has no {', '.join(missing)}" if missing else None
        except (ValueError, TypeError):
            problem = "is not a JSON object"
        if problem:
            bad_line(f"{path}:{number + 1}: {problem}")
        else:
            yield number, row


def ruler_file(path: Path) -> Iterator[Example]:
    for index, row in read_rows(path, "input", "outputs"):
        parts = RULER.match(row["input"])
        body, prefix = (parts["body"], parts["prefix"]) if parts else (row["input"], "")
        yield Example(path.stem, index, body.strip(), tuple(map(str, row["outputs"])),
                      prefix.strip())


def longbench_file(path: Path) -> Iterator[Example]:
    """Rows in LongBench's format; templates and lengths from `conventions.json` beside them."""
    try:
        rules = json.loads((path.parent / "conventions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path.parent / 'conventions.json'}: {error}") from None
    for index, row in read_rows(path, "input", "context", "answers", "dataset"):
        name = row["dataset"]
        if rules["dataset2metric"].get(name) not in METRICS:
            print(f"{path}:{index + 1}: dataset {name!r} has no metric here", file=sys.stderr)
            continue
        yield Example(
            name, index, rules["dataset2prompt"][name].format(**row), tuple(row["answers"]),
            max_new_tokens=rules["dataset2maxlen"][name], metric=rules["dataset2metric"][name],
            classes=tuple(row.get("all_classes") or ()),
            first_line=name in rules["first_line_only_before_scoring"],
            chat=name not in ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"))


def spread(haystack: list[str], needles: list[str], depths: list[float]) -> str:
    """The paragraphs with each needle put in at its depth, from 0 to 1."""
    parts = list(haystack)
    for depth, needle in sorted(zip(depths, needles), reverse=True):
        parts.insert(round(depth * len(haystack)), needle)
    return "\n\n".join(parts)


def ruler_generate(family: str, paragraphs: list[str], count: int, seed: int = 0):
    """Needles as RULER has them (2404.06654), in any haystack: a `single` number, or one of four
    (`multikey`)."""
    draw, n = random.Random(f"{family} {seed}"), {"single": 1, "multikey": 4}[family]
    for index in range(count):
        cities = draw.sample(CITIES, 4)
        values = [str(draw.randrange(1000000, 9999999)) for _ in range(4)]
        depths = [draw.random() for _ in range(5)]  # the fifth only moves what is drawn next
        needles = [f"One of the special magic numbers for {city} is {value}."
                   for city, value in zip(cities, values)]
        about = f"special magic number for {cities[0]} mentioned in the text above"
        yield Example(family, index, f"{spread(paragraphs, needles[:n], depths[:n])}\n\n"
                      f"What is the {about}?", (values[0],), f"The {about} is")


def requests(paragraphs: list[str], count: int, seed: int = 0) -> Iterator[list[Example]]:
    """For each of `count` documents eight facts in it, and a question about each."""
    draw = random.Random(f"requests {seed}")
    for index in range(count):
        facts = [(what, draw.choice(values.split())) for what, values in NEEDLES["facts"].items()]
        draw.shuffle(facts)
        needles = [f"The {what} is {value}." for what, value in facts]
        text = spread(paragraphs, needles, [draw.random() for _ in facts])
        yield [Example(f"question {number}", index,
                       f"{text}\n\nWhat is the {what} mentioned in the text above?", (value,),
                       f"The {what} mentioned in the text above is", max_new_tokens=16)
               for number, (what, value) in enumerate(facts, 1)]

"""Sentences: the rules, the stream against the whole, the limit, the work, and real tokens."""

import doctest
import textwrap
import time
from bisect import bisect_right
from itertools import groupby, pairwise, product

import pytest
import regex
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import segment
from benchmarks import rows, segmentation, tables
from segment import ABBREVIATED, INSIDE, SentenceStream, marked, sentence_ends, token_spans
from weights.tokenizer import Tokenizer

UNLIMITED = 10**9


def sentences(text):
    return [text[a:b] for a, b in pairwise([0, *sentence_ends(text)])]


# The rules


def test_doctests():
    assert doctest.testmod(segment).failed == 0


@pytest.mark.parametrize("name", INSIDE | ABBREVIATED)
def test_every_rule_has_a_true_example_that_needs_it(name, monkeypatch):
    *_, example = (INSIDE | ABBREVIATED)[name]
    assert marked(example.replace("|", "")) == example
    monkeypatch.delitem(INSIDE if name in INSIDE else ABBREVIATED, name)
    assert marked(example.replace("|", "")) != example


@pytest.mark.parametrize(
    ("name", "example"),
    [
        ("starts_item", "1. Tea |2. Milk |• Salt"),
        ("ends_line", "Above\n|Below\n\n|Under"),
    ],
)
def test_every_other_rule_has_a_true_example_that_needs_it(name, example, monkeypatch):
    assert marked(example.replace("|", "")) == example
    monkeypatch.setattr(segment, name, lambda *around: False)
    assert marked(example.replace("|", "")) != example


@pytest.mark.parametrize(
    "example",
    [
        "It costs $3.14 e.g. at www.x.com. |See v1.2.3!",
        "\n  Leading space. |Then more.  |End",
        'He said "No." |She left. |(She did.) |Then?',
        "Is it?! |Yes!!! |Well...",
        "At 5 p.m. Smith left. |It was 6 a.m. |He slept.",
        "¿Qué tal? |¡Bien! |Vale.",
        "Τι κάνεις; |Καλά.",
        "मैं ठीक हूँ। |आप कैसे हैं? |धन्यवाद।",
        "كيف حالك؟ |أنا بخير. |شكرا۔ |نعم.",
        "Բարև ձեզ։ |Լավ։",
        "「好。」|她说。|真的吗？|是！",
        "ﾊｲ｡|ｿｳ｡",
        "« Bonjour ! » |Il part. |Fin…",
        "„Ja.“ |Dann ging er.",
        "That was great :) |I liked it.",
        "Above\n\n|Below\r\n\r\n|Under\n \n|Last",
        "user\n\n|Hello\n\n",
        "# Title\n|A line that was wrapped where a line of a book\nis wrapped. |End\n|- 1\n|- 2",
        "- An item that goes on for longer than a line of a book\n  does. |More\n|1. one\n|2. two",
        "```\n|x = 1\n|for y in x:\n    |print(y)\n|```",
        "2024-01-01 12:00:00 INFO the server has been started\n|2024-01-01 12:00:01 WARN slow",
        "• 9. Tea |• 10. Salt",
        "Chapter one\n|=====\n|Text",
        "See p. 5 of Vol. 2. |Or do not.",
        "J. K. Li left the U.S. |He returned.",
        "Well ... I think so... |He agreed.",
        '"He [...] agreed [...]" (Smith 55).',
        "Li Inc. Berlin owns Ax Inc. |It pays.",
        "Bob Jr. Smith owns Ax Ltd. Rome and Bonn Co. Paris. |He has TV. |Bob left.",
        "It weighs 5 kg. |Bob paid 3 ft. 4 in. of it on pp. 8 and 9. |He left.",
        "Open index.html. |Choose 3 dogs. |4 cats follow. |We’ll. |So we’ll. |Mary left.",
        "Det er hr. Jensen kl. 8 i dag. |Han gik.",
        "См. стр. 5 и гл. 3. |Он ушёл.",
        "Ես Արամն եմ: |Լավ:",
        "看《摔跤吧！爸爸》好吗？|好！",
        "It rose [see Fig. [2] and ref. [4]].[3] |It fell.[5–7] |He left.[note a] |So it goes.",
        "See Eqs. (3) and (4), Vol. IV, Ch. II and sec. [2.1]. |He said no. |(He meant yes.)",
        "Ax v. Li, 12 F.3d 4 (5th Cir. 2005), Cal. Civ. Code 7 and Fed. R. Evid. 403. |It holds.",
        "Take 2 tabs. 3 times a day at a temp. of 37. |Then rest in the sun. |Bob will.",
        "Los EE. UU. Mexicanos y la Sra. Gil. |El fin.",
        "Na os. Długim, przy ul. Krótkiej, np. Ax. |Ona wie.",
        "MUDr. Malá bydlí na nám. Míru. |Он на просп. Мира, кв. 7. |Она тоже.",
        "Prof. Öz ve Doç. Dr. Ak, vgl. Abb. 3 und Bd. IV. |Er kam.",
        "डॉ. शर्मा की कं. लि. बड़ी है। |वे गए।",
        "I had a pet. |Rex was fed. |Bob was ill. |I am ok. |Oh my god. |Ann left.",
    ],
)
def test_sentences(example):
    assert marked(example.replace("|", "")) == example


PROSE = (
    "The mill stood where the brook left the wood, and in a dry summer its wheel did not turn for "
    "weeks. Nobody in the village knew who had built it; some said a monk, others that a miller "
    "from the north had brought the stones on a cart, one by one, and had asked nobody. When my "
    "uncle bought it he found a door behind the oven, and behind the door a room with a table, a "
    "chair and a shelf of jars. He opened one. It smelled of pepper, although it must have stood "
    "there for a hundred years or more, as the paper on it was of the time of the old king. "
)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\u2028"])
@pytest.mark.parametrize("width", [26, 34, 45, 62, 72, 88, 104, 118, 132, 150])
def test_wrapped_prose_has_the_sentences_of_its_paragraphs(width, line_end):
    """A title above it, and a second paragraph whose first line is judged by the first's."""
    lines = textwrap.wrap(PROSE, width, break_on_hyphens=False)
    wrapped = "The Mill" + line_end + (line_end.join(lines) + 2 * line_end) * 2
    expected = sentences(PROSE)
    assert [" ".join(sentence.split()) for sentence in sentences(wrapped)] == [
        "The Mill", *(sentence.strip() for sentence in expected * 2)]


@pytest.mark.parametrize(
    "line_end", ["\n", "\r", "\r\n", "\v", "\f", "\x85", "\u2028", "\u2029"]
)
def test_what_ends_a_line(line_end):
    text = "The mill was closed\n|Nobody knew\n\n|why it was.".replace("\n", line_end)
    assert marked(text.replace("|", "")) == text


@pytest.mark.parametrize(
    "example",
    [
        # speakers
        "Ada: the wheel did not turn for weeks as the brook was dry\n"
        "|Dr. Ben Hill: did nobody ask the miller of the next village\n"
        "|Ada: he was away in the north for a week or two and the\nmill was closed\n"
        "|Dr. Ben Hill: so what",
        "ada: the wheel did not turn for weeks as the brook was dry\n|ben: did nobody ask him",
        "[10:03] <ada> the wheel did not turn for weeks, the brook was dry\n|[10:04] <ben> why",
        "Ada Hill (00:01:12): the wheel did not turn as the brook was dry\n"
        "|Ben Mill (00:01:20): did nobody ask the miller of the next village\n",
        "The Miller of the Old Village: the wheel did not turn for weeks\n|The King: why",
        # lists
        "We need\n|· two stones that are as large as those of the old mill\n|· a wheel of oak\n",
        "– two stones that are as large as those of the old mill\n|– a wheel of oak",
        "(i) the stones that were left in the mill by the monk;\n|(ii) the wheel itself;",
        "4.1 The tenant shall keep the wheel and the brook in order\n|4.2 The owner pays",
        "Article 1 The mill shall be open to all who live in the town\n|Article 2 The owner pays",
        "Parts: |● the wheel |● the stones |● the brook",
        "two cups of flour\n|three large eggs\n|a pinch of salt",
        # tables
        "name,town,year,what\n|Ada Hill,Leeds,2021,two stones\n|ben mill,Oslo,2020,a wheel\n",
        "Ada Hill;ada@example.org;Leeds;2021-03-04;two stones and a wheel\n|ben mill;b@example.org",
        "Ada Hill\tada@example.org\tLeeds\t2021-03-04\ttwo stones\n|ben mill\tb@example.org",
        "The wheel of oak              as large as that of the old mill\n|the stones       two",
        "ada@example.org,the wheel did not turn for weeks\n|ben@example.org,why did nobody ask",
        # logs and traces
        "Nov  3 09:12:01 mill brook[12]: the wheel has been stopped for weeks\n|Nov  3 09:13",
        "INFO the wheel has been started again after the rain of May\n|ERROR the brook is dry",
        'Traceback (most recent call last):\n  |File "mill.py", line 3, in turn of the old wheel\n'
        "    |wheel.turn(brook.water, hours=12)\n|ValueError: the brook is dry since the spring",
        "java.lang.IllegalStateException: the brook is dry since the spring\n"
        "\t|at org.mill.Brook.flow(Brook.java:31)\n\t|at org.mill.Wheel.turn(Wheel.java:3)",
        # code
        "from collections.abc import Iterable, Iterator, Mapping\n|from itertools import pairwise",
        "    total = sum(value * weight for value, weight in pairs)\n    |return total / max(1, n)",
        '{\n  |"name": "Ada Hill of the village of the old mill",\n  |"town": "Leeds"\n|}',
        "DATABASE_URL=postgres://ada@localhost:5432/mill_and_brook\n|key=0123456789abcdef",
        # other lines
        "Shall I compare thee to a summer's day\n|Thou art more lovely and more temperate\n|Rough",
        "1\n|00:00:01,000 --> 00:00:04,000\n|the wheel did not turn for weeks\nas it was dry\n\n|2",
        "Ada Hill\n|12 Mill Lane\n|Leeds",
        "> The wheel did not turn for weeks as the brook was dry in that\n|> summer",
        # prose
        "It cost the old man who had bought it without a word no less than\n$3,000 and it was dry.",
        "He had a wheel, two stones, and a shelf of jars that smelled of the\n[rare] pepper of.",
        "Der Müller hatte das Rad und die Steine auf einem Karren aus dem hohen\nNorden gebracht, "
        "und niemand wusste, warum er die Arbeit in dem alten\nHaus so bald verlassen hatte.",
        "水车在干燥的夏天里好几个星期都不转动而且村里没有人知道\n它是谁建的。|有人说是一个和尚。",
    ],
)
def test_lines(example):
    assert marked(example.replace("|", "")) == example


def test_a_bar_is_typed_for_the_full_stop_of_hindi():
    assert sentences("मैं ठीक हूँ | आप कैसे| a | b") == ["मैं ठीक हूँ | ", "आप कैसे| ", "a | b"]


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u200b", "\ufeff", ".", "\x1c", "\U0001f600"])
def test_nothing_much(text):
    assert sentence_ends(text) == ([len(text)] if text else [])
    assert token_spans([text] * 3, limit=2) == [(0, 2), (2, 3)]


# The stream

ATOMS = [
    *"..!?…。？।؟;:,-*#=()[]\"'“”«»「」•15abiSUε你नि😀",
    *[" ", "  ", "\n", "\r", "\n\n", "\t", "\u3000", "\u2029", "\x85", "\x1c", " " * 12, "====="],
    *["Dr", "Inc", "How", "the", "no", "Ph", "\u200b", "https://x", "a word of many letters " * 2],
    *["\v", "\f", "\u2028", "\nAda: ", "\nben: ", "\n[", "\n<a> ", "\nat a.b(", "\n4.2 ", "\n– "],
    *["\nx = 1", "\nINFO ", "\nNov 3 10:10", "a,b,c", ", and of the old mill", "Fig", "[3]", "IV"],
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(ATOMS), max_size=40).map("".join))


@st.composite
def pieces(draw):
    """A text cut at random, with the empty pieces of tokens that only begin a character."""
    text = draw(TEXTS)
    places = st.lists(st.integers(0, len(text)), max_size=2 * len(text))
    cuts = draw(st.one_of(places, st.just(list(range(len(text))))))
    return [text[a:b] for a, b in pairwise(sorted([0, *cuts, len(text)]))]


def expected_lengths(pieces):
    """What the stream should find, from the ends in the whole text."""
    ends, owners, place = sentence_ends("".join(pieces)), [], 0
    for piece in pieces:
        space = len(piece) - len(piece.lstrip())
        owners.append(bisect_right(ends[:-1], place + space % max(len(piece), 1)))
        place += len(piece)
    return [len(list(group)) for _, group in groupby(owners)]


@settings(max_examples=400, deadline=None)
@given(pieces())
@example([*"a word of many letters \n。Ada(4.2 :-"])  # `Ada(4.2 ` is no word of the first gap
def test_the_stream_finds_the_sentences_of_the_whole(pieces):
    stream = SentenceStream(UNLIMITED)
    lengths = [n for piece in pieces for n in stream.push(piece)] + stream.finish()
    assert lengths == expected_lengths(pieces)


BEFORE_GAPS = ["1. Tea", "a) Milk!", "2.", "• 9.", "A line of a book that is as long as this one",
               "a line of this width or so\nand another of this", "Ada: yes", "[1] yes", "see p.",
               "[1] A line of a book that is as long as this one is,", "see Fig.", "Then, no.",
               "He left the U.S.", "am 3.", "so...", "so?", "so!»", 'so."', "so;", "好。"]
AFTER_GAPS = [*'abé1269.):;-*•#"”»“，好', "2. b", "b) c", "The ", "no,", "However ", "https:", "\n",
              "Ben: ", "Dr. Li", "ben: ", "[10:10", "4.2 T", "(5", "[5", "IV ", "x = ", "at a.b",
              "INFO "]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(AFTER_GAPS), st.characters()), min_size=1, max_size=4))
def test_more_text_after_a_gap_never_takes_an_end_back(parts):
    """`SentenceStream` reports an end at once, and the text goes on."""
    after = "".join(parts)[: segment.AFTER]
    assume(not after[0].isspace())
    for before, gap in product(BEFORE_GAPS, ["", " ", "\n", "\r\n", "\f", "\n\n"]):
        answers = [segment.is_end(before, gap, after[:n]) for n in range(1, len(after) + 1)]
        assert answers == sorted(answers), (before, gap)  # no, no, ..., yes, yes


@pytest.mark.parametrize(
    ("before", "gap", "shorter", "longer"),
    [
        ("1. Tea", " ", "2", "2."),  # NEXT_MARKER
        ("A line of a book that is as long as this one", "\n", "a", "a)"),  # ITEM
        ("He left the U.S.", " ", "The", "The "),  # OPENING
        ("Ada: a line of a book that is as long as this one,", "\n", "Ben", "Ben: "),  # SHAPES
        ("A line of a book that is as long as this\none and then", "\n", "I", "I "),  # has_room
        ("See sec.", " ", "I", "I "),  # before a bracketed or Roman number
        ("Is it?", " ", "”", "”a"),  # before what closes
    ],
)
def test_each_condition_that_reads_on_can_change_a_no_to_a_yes(before, gap, shorter, longer):
    assert not segment.is_end(before, gap, shorter) and segment.is_end(before, gap, longer)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_sentences_tile_the_text(text):
    ends = sentence_ends(text)
    assert "".join(sentences(text)) == text
    assert ends == sorted(set(ends)) and (not text or ends[-1] == len(text))
    assert not any(regex.match(r"\s", text[end]) for end in ends[:-1])


@settings(max_examples=300, deadline=None)
@given(pieces(), st.integers(1, 9))
def test_spans_tile_the_tokens_within_the_limit(pieces, limit):
    stream, told = SentenceStream(limit), 0
    for pushed, piece in enumerate(pieces, 1):
        told += sum(stream.push(piece))
        assert told < pushed <= told + limit
    spans = token_spans(pieces, limit)
    assert [token for span in spans for token in range(*span)] == list(range(len(pieces)))
    assert all(start < end <= start + limit for start, end in spans)


# The limit


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(ValueError, match=f"^limit is {limit}, must be at least 1$"):
        SentenceStream(limit)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aa aa aa, aa aaa aaaaa", "aa aa aa, "),
        ("aa aa aa aaaaaaaaaaaaaaa", "aa aa aa "),
        ("a, aaaaaaaaaaaaaaaaaaaaa", "a, aaaaaaaaaaaaa"),
        ("你，好你好你好你好你好你好你好你好", "你，好你好你好你好你好你好你好你"),
        ("你好你好你好你好你好，好你好你好你好", "你好你好你好你好你好，"),
    ],
)
def test_a_long_sentence_is_cut_at_the_best_place_in_its_later_half(text, first):
    (start, end), *_ = token_spans(list(text), limit=16)
    assert text[start:end] == first


def test_a_line_end_is_a_better_place_than_a_space():
    line = "word " * 9 + "word\n"
    assert token_spans(list(line + line), limit=60)[0] == (0, len(line))


def test_a_character_of_several_tokens_is_not_cut():
    assert token_spans(["", "", "你"] * 4, limit=7) == [(0, 6), (6, 12)]


# The work


class Counted:
    """A pattern that counts its calls and the characters they are given to read."""

    work = 0

    def __init__(self, pattern):
        self.pattern = pattern

    def match(self, text, *places):
        found = self.pattern.match(text, *places)
        Counted.work += 1 + (len(found[0]) if found else 0)
        return found

    def finditer(self, text, start=0):
        Counted.work += 1 + len(text) - start
        return self.pattern.finditer(text, start)


ADVERSARIES = {
    "dots": ".", "quotes": '"', "letters": "a", "spaces": " ", "brackets": "(", "closing": ")",
    "lines": "\n", "returns": "\r\n", "dashes": "-", "stops": "。", "stop and quote": '."',
    "stop and space": ". ", "initials": "A. ", "glued initials": "a.", "items": "a) b) ",
    "ellipses": ". . . ", "doctors": "Dr. ", "closers": ".) ) ", "smileys": ":) ", "empty": "",
    "markers": "1. 2. ", "blank lines": "\n ", "rules": "=", "bullets": "• ",
    "full lines": "a" * 70 + "\n", "speakers": "A: b\n", "rows": "a,b\n", "commas": "a,",
    "tabs": "a\t", "pages": "\f", "wrapped lines": "a word and another of the book\n",
    "references": "no. [", "roman": "I",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ADVERSARIES)
def test_the_work_is_linear(name, monkeypatch):
    for key, value in vars(segment).items():
        if isinstance(value, regex.Pattern):
            monkeypatch.setattr(segment, key, Counted(value))
    for key, patterns in segment.PATTERNS.items():
        monkeypatch.setitem(segment.PATTERNS, key, tuple(map(Counted, patterns)))

    def work(n):
        Counted.work = 0
        text = ADVERSARIES[name] * n
        sentence_ends(text)
        token_spans(list(text) or [""] * n, limit=128)
        return Counted.work

    assert work(4000) <= 2.2 * work(2000) + 100


@pytest.mark.parametrize("name", ADVERSARIES)
def test_one_pass_does_not_go_back_over_the_text(name):
    text = ADVERSARIES[name] * (200_000 // len(ADVERSARIES[name] or "-"))
    list(segment.GAP.finditer(text, timeout=30))  # a tenth of a second; hours if quadratic


@pytest.mark.parametrize("name", ADVERSARIES)
def test_the_rules_see_a_few_characters_and_decide_fast(name, monkeypatch):
    seen = []

    def is_end(before, gap, after):
        seen.append((len(before), len(after)))
        return decide(before, gap, after)

    decide = segment.is_end
    monkeypatch.setattr(segment, "is_end", is_end)
    text = ADVERSARIES[name] * (200_000 // len(ADVERSARIES[name] or "-"))
    began = time.perf_counter()
    sentence_ends(text)
    assert time.perf_counter() - began < 60  # three seconds at most
    assert all(before <= segment.BEFORE and after <= segment.AFTER for before, after in seen)


@pytest.mark.parametrize("name", ADVERSARIES)
def test_the_stream_forgets(name):
    stream = SentenceStream(128)
    for character in ADVERSARIES[name] * 3000:
        stream.push(character)
    assert len(stream.text) < 1000


# Tokens of the default model


@pytest.fixture(scope="module")
def token_pieces(default_folder):
    tokenizer = Tokenizer(default_folder)
    return lambda text: tokenizer.pieces(tokenizer.encode(text, add_bos=False))


BOOK = """\
It was late in the year 1801, and the rain had not ceased since noon; Mr. Hale,
who had walked from the village of St. Ives, knocked twice. “Who is there?” she
asked.  Nobody answered!

The house, No. 14, stood alone. It had been built by J. R. Hale, his father, at
a cost of £1,200.50, and it was said that
he never paid.
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "他说：“你好！”然后走了。价格是3.14元，真的吗？是。",
            ["他说：“你好！”", "然后走了。", "价格是3.14元，真的吗？", "是。"],
        ),
        ("Good 😀! 👩‍👩‍👧 came. 🎉🎉 Now", ["Good 😀! ", "👩‍👩‍👧 came. ", "🎉🎉 Now"]),
        ("One.\r\nTwo\r\n\r\nThree. Four", ["One.\r\n", "Two\r\n\r\n", "Three. ", "Four"]),
        ("Name\tAge\nDr. Li\t3.5\n\tEnd. Yes", ["Name\tAge\n", "Dr. Li\t3.5\n\t", "End. ", "Yes"]),
        (
            "def mean(xs):\n    # No. 1.\n    n = len(xs)\n\n    return sum(xs) / n\n",
            [
                "def mean(xs):\n    ",
                "# No. 1.\n    ",
                "n = len(xs)\n\n    ",
                "return sum(xs) / n\n",
            ],
        ),
        (
            BOOK,
            [
                (
                    "It was late in the year 1801, and the rain had not ceased since noon; "
                    "Mr. Hale,\nwho had walked from the village of St. Ives, knocked twice. "
                ),
                "“Who is there?” she\nasked.  ",
                "Nobody answered!\n\n",
                "The house, No. 14, stood alone. ",
                (
                    "It had been built by J. R. Hale, his father, at\na cost of £1,200.50, "
                    "and it was said that\nhe never paid.\n"
                ),
            ],
        ),
    ],
    ids=["chinese", "emoji", "crlf", "tabs", "code", "book"],
)
def test_sentences_of_real_tokens(token_pieces, text, expected):
    assert sentences(text) == expected
    pieces = token_pieces(text)
    assert ["".join(pieces[a:b]).strip() for a, b in token_spans(pieces, 128)] == [
        sentence.strip() for sentence in expected
    ]


def test_an_end_is_told_at_most_one_token_late(token_pieces):
    text = BOOK + "I like the U.S. How about you? He came at 6 p.m. Then he left. it is so.\n1. a"
    pieces = token_pieces(text)
    stream, told, late = SentenceStream(128), 0, []
    for pushed, piece in enumerate(pieces):
        for length in stream.push(piece):
            told += length
            late.append(pushed - told)
    assert len(late) == 10 and set(late) == {0, 1}


# The benchmark


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "No such file"),
        ("", "is empty"),
        ("not json", ":1: is not a JSON object"),
        ("[1]", ":1: has no text, sentences"),
    ],
)
def test_the_benchmark_answers_a_bad_file_with_one_line(lines, message, tmp_path, capsys):
    path = tmp_path / "golden.jsonl"
    if lines is not None:
        path.write_text(lines, encoding="utf-8")
    assert segmentation.main([f"--{name}={path}" for name in ("golden", "pages", "book")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and message in error


def test_the_benchmark_compares_both_rules(tmp_path, capsys, default_folder):
    golden, pages, book = (tmp_path / name for name in ("golden", "pages", "book"))
    golden.write_text('{"text": "Hi. Ho!", "sentences": ["Hi.", "Ho!"]}')
    pages.write_text('{"text": "It is 3.5. Ho!", "sentence_char_spans": [[0, 10], [11, 14]]}')
    book.write_text("Mr. Li saw it.\n\nWhy?")
    out = tmp_path / "segmentation.jsonl"
    assert segmentation.main(["--golden", str(golden), "--pages", str(pages), "--book", str(book),
                              "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| 1 of 1 | 1.000 | 0.500 | 0.667 |" in printed
    assert "| authors' rule | 3 | 2 | 5 | 33.3% |" in printed
    assert tables.segmentation(rows.read(out)[1]) == printed.rstrip("\n")

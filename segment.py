r"""Text to sentences to token spans.

This file knows text, and the pieces of text that tokens add. It knows no tokenizer and no tensor.
Part 1 is what other files use. Parts 2 and 3 say where a sentence ends: a reader may skip them.

>>> marked("Dr. Smith paid $3.50 to www.x.com. He left!\n\nSigned\n\n你好。再见。")
'Dr. Smith paid $3.50 to www.x.com. |He left!\n\n|Signed\n\n|你好。|再见。'
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

import regex

from support.lines import BEFORE, BULLETS, LINE_ENDS, MARKERS, ends_line
from support.words import WORDS

# A gap is where a sentence may end: white space, or nothing, as after `。`. The rules see at most
# BEFORE = 400 characters before it, three lines of a wide page, and AFTER characters after it.
AFTER = 40  # enough for the name of a speaker


# Part 1: sentences of tokens.
def token_spans(pieces: Iterable[str], limit: int) -> list[tuple[int, int]]:
    """The sentences as (start, end) spans of tokens, without gaps, of at most `limit` tokens each.

    >>> token_spans(["Hi", "!", " It", " is", " me", "."], limit=16)
    [(0, 2), (2, 6)]
    """
    stream = SentenceStream(limit)
    lengths = [n for piece in pieces for n in stream.push(piece)] + stream.finish()
    return list(pairwise(accumulate(lengths, initial=0)))


class SentenceStream:
    """The same sentences, one token at a time. Raises ValueError if `limit` is below 1.

    A piece is the text that one token adds. A token starts at its first character that is not white
    space, and belongs to the sentence of this character. A token of white space belongs to the
    sentence before it. If several tokens form one character, the last one has it as its piece. The
    others have "", and belong to the sentence of what follows.

    `push` reports an end with the next token, or later if a rule needs more of what follows. Below,
    ` The` could become ` Theo`, which would not be a reason for an end. A line shows what `push`
    returns, then the stream's state. Rules look back at the text before the open sentence:

    >>> stream = SentenceStream(limit=16)
    >>> for piece in ["Hi", "!", " 6 p.m.", " The", " sun"]:
    ...     print(stream.push(piece), stream.token_starts, stream.text)
    [] [0] Hi
    [] [0, 2] Hi!
    [2] [4] Hi! 6 p.m.
    [] [4, 11] Hi! 6 p.m. The
    [1] [11, 15] Hi! 6 p.m. The sun
    """

    def __init__(self, limit: int):
        if limit < 1:
            raise ValueError(f"limit is {limit}, must be at least 1")
        self.limit = limit
        self.text = ""  # the open sentence, and at most BEFORE characters before it
        self.token_starts: list[int] = []  # of the tokens of the open sentence, in `text`

    def push(self, piece: str) -> list[int]:
        """Add a token; return the lengths of the sentences found to have ended before it."""
        # Two things may be decided only now: an end inside the previous token, and a gap before it
        # for which a rule needs the new piece. So search again from AFTER characters before that
        # token. If this is inside white space, begin where the white space begins.
        previous = self.token_starts[-1] if self.token_starts else 0
        search_start = len(self.text[: max(0, previous - AFTER)].rstrip())
        n_spaces = 0 if piece.isspace() else len(piece) - len(piece.lstrip())
        self.token_starts.append(len(self.text) + n_spaces)
        self.text += piece
        ends = find_ends(self.text, search_start)
        n_before = {bisect_left(self.token_starts, end) for end in ends}  # tokens before each end
        n_before.discard(0)  # an end before the open sentence: it was reported
        n_before.discard(len(self.token_starts))  # inside the new token: reported with the next one
        lengths = [self._take(b - a) for a, b in pairwise([0, *sorted(n_before)])]
        if len(self.token_starts) > self.limit:
            lengths.append(self._take(self._cut()))
        return lengths

    def finish(self) -> list[int]:
        """Return the length of the sentence that the end of the text leaves open, if any."""
        return [self._take(len(self.token_starts))] if self.token_starts else []

    def _take(self, n_tokens: int) -> int:
        """Remove the first tokens, and the text that no rule looks at any more; return n_tokens."""
        rest = self.token_starts[n_tokens:]
        n_unused = max(0, (rest[0] if rest else len(self.text)) - BEFORE)
        self.text = self.text[n_unused:]
        self.token_starts = [start - n_unused for start in rest]
        return n_tokens

    def _cut(self) -> int:
        """After how many tokens to cut a sentence that is too long: in its later half, at the last
        place of the best kind, and if possible not inside a character."""
        for kind in CUTS:
            for n in range(self.limit, self.limit // 2, -1):
                start = self.token_starts[n]  # equal starts: tokens of one character
                if start > self.token_starts[n - 1] and kind.match(self.text, 0, start):
                    return n
        return self.limit


# Best after [,;:—], then after a line end, a space, anything. (?r) matches backwards from the end.
CUTS = [regex.compile(f"(?r){cut}") for cut in (
    r"[,;:—]\s+|[，、；：]\s*", rf"[{LINE_ENDS}]\s*", r"\s+", "")]


# Part 2: sentences of a text.
def sentence_ends(text: str) -> list[int]:
    """Offsets at which the sentences of `text` end. White space belongs to the one before it."""
    return [*find_ends(text), len(text)] if text else []


def marked(text: str) -> str:
    """The text with a bar between its sentences."""
    return "|".join(text[a:b] for a, b in pairwise([0, *sentence_ends(text)]))


def find_ends(text: str, start: int = 0) -> Iterator[int]:
    """Offsets after `start` at which one sentence ends and another begins.

    The rules see the text up to the end of the next gap, and no further. So what decides about a
    gap is there before the next gap is decided, and a stream finds the ends in order."""
    gaps = [*(gap.span() for gap in GAP.finditer(text, start)), (len(text), len(text))]
    for (a, b), (_, next_b) in pairwise(gaps):
        if is_end(text[max(0, a - BEFORE) : a], text[a:b], text[b : min(b + AFTER, next_b)]):
            yield b


def is_end(before: str, gap: str, after: str) -> bool:
    """Whether a sentence ends at a gap. If `after` grows, a no can become a yes, but a yes stays.

    Most conditions read only its first character. `NEXT_MARKER`, `OPENING` and the patterns of
    `ends_line` read more: once they match, they stay matched, and a match is a reason for an end.
    The rules "before what closes" and "before a bracketed or Roman number" read two characters or
    more: they can stop matching, and a match is a reason against an end.
    """
    if starts_item(before, after) or ends_line(before, gap, after):
        return True
    if WIDE_END.match(before) and not GOES_ON.match(after):
        return True
    if not MARK_END.match(before) or one_holds(INSIDE, before, after):
        return False
    small, opens = after[0].islower(), OPENING.match(after) is not None
    if one_holds(ABBREVIATED, before, after):
        return opens and not small
    return opens or not small or before[-1] in "?;"  # `I sat. |it fell`, `why? |who?`


def starts_item(before: str, after: str) -> bool:
    """A bullet or the next marker of a list follows: `1. Tea |2. Milk |• Salt`."""
    return after[0] in BULLETS or NEXT_MARKER.match(f"{before} {after[:2]}") is not None


def one_holds(rules: dict, before: str, after: str) -> bool:
    patterns = (PATTERNS[name] for name in rules)
    return any(ends.match(before) and begins.match(after) for ends, begins in patterns)


# Part 3: marks and rules. In a pattern, \p{..} is a kind of character: L letter, Lu capital,
# Ll lowercase, N number, Pe and Pf closing bracket and quotation mark.

WIDE = "。！？｡؟۔।॥։።፧။។៕‼⁇⁈⁉"  # marks that need no space after them
# `;` is the Greek question mark; `:` and `|` are typed for the full stops of Armenian and Hindi.
MARK = r"[.!?…]|\p{Greek};|\p{Armenian}:|\p{Devanagari} ?\||(?<!\S)[:;]-?[()]|[=*_~-]{5}|\*{3}"
CLOSER = r"[\p{Pe}\p{Pf}\"']"
REFERENCE = r"(?:\[[^\s\[\]][^\[\]]{0,20}\])"  # to a note or a book, as in `It failed.[3]`

GAP = regex.compile(
    rf"[{WIDE}]{CLOSER}{{0,8}}+\K\s*+(?=\S)|(?<=\S)(?:"  # after a wide mark; \K: the gap begins
    r"(?<=[^\w\s,]|_)\s++|"  # after any other mark but a comma
    rf"[^\S{LINE_ENDS}]*+[{LINE_ENDS}]\s*+|"  # at a line end
    rf"\s++(?=[{BULLETS}]|[2-9b-g][.)]))(?=\S)"  # before a bullet or a list marker
)
WIDE_END = regex.compile(rf"(?r)(?<!《[^》]{{0,40}})[{WIDE}]{CLOSER}{{0,8}}")  # no 《title！》
GOES_ON = regex.compile(rf"{CLOSER}|[{WIDE}!?,:;，、；：—]")
MARK_END = regex.compile(rf"(?r)(?:{MARK})(?:{CLOSER}|[“*_]){{0,8}}{REFERENCE}{{0,4}}"
                         rf"(?:[ \xa0\u202f][\p{{Pe}}»›”]{CLOSER}{{0,8}})?")  # or `! »`
OPENING = regex.compile(rf"(?i:{WORDS['first']})(?=[^\w.])|[\"'“‘](?=\p{{Lu}})")
NEXT_MARKER = regex.compile(f"(?r)(?:{MARKERS})")

# A rule: what the text before a gap ends with, what the text after it begins with, an example.
INSIDE = {  # no sentence ends
    "after a title": (rf"\b(?:{WORDS['titles']})\.", "", "Prof. Li met Sen. Ax. |He left."),
    "before a number": (
        rf"\b(?:\p{{Ll}}|(?i:{WORDS['numbered']})|{WORDS['vowelless']}|"
        r"(?<=\p{N}\s?)\p{L}{1,3})\.", r"\p{N}", "See p. 5 of Vol. 2. |He is 5 ft. 3 in. tall."),
    "before a bracketed or Roman number": (
        rf"\b(?i:{WORDS['numbered']})\.", r"[(\[](?!\P{N})|[IVXLC]+\Z|(?:[IVXLC]{2,}|[VX])(?!\w)",
        "See ref. [4], sec. (2) and ch. IV. |It rose."),
    "after dots": (
        r"(?:[^.]\s|\[)(?:\.\s\.\s\.|\.\.\.|…)(?:\][^\s\w]{0,8})?", "",
        'Well ... I think so... |"He [...] agreed [...]" (Smith 55).'),
    "before another mark": ("[.!?…]", "[.!?…,:;]", "Wait . . . . |Go on."),
    "before what closes": ("", r"\p{Pe}|[»›”](?!\w)", "« Oui ! » |Il part."),
    "between ! or dots and a lowercase letter": (
        r"[!…]|\.\.", r"\p{Ll}", "She works at Yahoo! in London... |Oh! |She does."),
    "between a quotation and a lowercase letter": (
        r"[.!?…;][^\s\w.!?]{1,8}", r"[\p{Ll}—–]", '"Why?" he said. |"Why?" |He knew.'),
    "after the marker of a list item": (
        rf"(?:^|[{LINE_ENDS}{BULLETS}])[^\S\n]{{0,20}}"
        r"(?:\d{1,3}(?:\.\d{1,2}){0,3}|\p{L}|[IVXivx]{1,5})[.)]{1,2}",
        "", "1.) Tea\n|IV. Milk\n|• 9. Salt"),
    "after the next marker": (rf"(?:{MARKERS})\)?", "", "1. The tea |2. The milk"),
}
ABBREVIATED = {  # a sentence ends after these only before a quotation or a word of WORDS["first"]
    "initials": (
        r"(?<![^\s(\"'“‘])(?:\p{L}{1,2}\.)*\p{L}\.", "",
        "J. K. Li left the U.S. |He has a Ph.D. in law."),
    "an abbreviation": (
        rf"\b(?:{WORDS['shortened']}|{WORDS['vowelless']})\.{REFERENCE}?", "",
        "Ax Inc. Bonn owns Li Ltd. Rome. |It pays."),
    "an ordinal": (r"\b\p{N}{1,2}\.", r"\p{Lu}", "Es war der 3. Mai. |Sie war 20. |Er kam."),
}
PATTERNS = {name: (regex.compile(f"(?r){ends}"), regex.compile(begins))
            for name, (ends, begins, _) in (INSIDE | ABBREVIATED).items()}

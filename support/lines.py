r"""Whether a line end ends a sentence: its neighbours tell.

Line ends are those of `str.splitlines`: also U+0085, U+2028, U+2029, a lone \r and a form feed;
\r\n is one. A line end ends a sentence if a line stands alone, as an item of a list, a row of a
table, the words of a speaker, a log line or code, or if the line was not wrapped.
"""

from itertools import pairwise, takewhile

import regex

BEFORE = 400  # at most so many characters before a line end are given: three lines of a wide page
LINE_ENDS = "\n\r\v\f\x85\u2028\u2029"  # inside [ ] of a pattern
LINE_END = regex.compile(rf"\r\n|[{LINE_ENDS}]")
BULLETS = "•‣◦⁃▪▫●○■□◆◇▸►▶➢➤❖"  # also in the middle of a line
# Two markers of a list that follow each other, up to the second: `1. Tea 2.`
NEIGHBOURS = [*pairwise("123456789"), *pairwise("abcdefg")]
MARKERS = "|".join(rf"\b{a}[.)]{{1,2}}\s.{{1,150}}\s{b}[.)]" for a, b in NEIGHBOURS)

# Beginnings of lines that stand alone. More text after a match changes nothing, as `segment.is_end`
# promises: no pattern looks ahead to say no, or ends with \b.
CODE = (
    r"(?:def|class|fn|func|function) [\w.]+[({:<]|from [\w.]+ import\s|import [\w.]+ as\s"
    r"|(?:if|for|while|switch|catch) ?\(|[\w.]+\([^s]"
    r"|[\w.\[\]\"',]+(?: [\w.\[\]\"',]+)? ?[-+*/%|&:]?="
)
ITEM = "|".join((
    rf"[#>|<{{}}@/\\{BULLETS}]|```|[-*+·∙→»✓✔✗☐☑]\s|[-*_]{{3}}|\$[\s\p{{L}}({{]",
    r"[1-9]\d{0,2}[.)]\s|\d{1,2}(?:\.\d{1,2}){1,3}(?:\.\s|\s\p{Lu})",
    r"[a-z]\)|\((?:\d{1,3}|\p{L}|[ivx]+)\)",
    r"(?:TRACE|DEBUG|INFO|NOTICE|WARN|WARNING|ERROR|FATAL|CRITICAL)[\s:\]|]",  # log lines
    r"\p{Lu}\p{Ll}\p{Ll} [ \d]?\d \d\d:\d\d|\[(?:\d\d?:\d\d|[A-Z]{4})|[DIWEF]\d{4} \d",
    r"File \"|Caused by:|at [\p{L}_$][\w$]*(?:\.|::)[\w$<]|from \S+:\d",  # stack traces
    r"\"[\w -]+\" ?:",  # JSON
    CODE,
))
# Beginnings that do if another line begins like this, as `Dana: Yes` above `Omar: No`.
SPEAKER = (r"[\p{Lu}\p{Lo}][^\s:：]{0,20}(?: [^\s:：]{1,20}){0,5}(?: ?[(\[][\d:. apmAPM]+[)\]])?"
           r"(?::\s|：)")
SHAPES = {  # what follows -> another line
    SPEAKER: SPEAKER,
    r"(?:Mr|Mrs|Ms|Dr|Prof|Sen|Rep)\.\s": SPEAKER,
    **{shape: shape for shape in (
        r"[\p{Ll}_][\w.'’-]{0,20}(?::\s|：)",  # a nickname, a key
        r"[\w@-]{1,20}>\s", r"\d|\[", r"\p{Lu}{1,20}[.)]\s|[ivx]{1,5}[.)]\s",
        r"[–—]\s|[-*+]|o\s", r"§|\p{Lu}\p{L}+ \d+[\w.]{0,8}[:)]?\s",  # Article 1
        r"at .{0,20}[(.:]\w|(?:import|using|export|return|let|const|var)\s",
    )},
}
MAY_STAND = regex.compile("|".join((ITEM, *SHAPES)))
CODE, ITEM = regex.compile(CODE), regex.compile(ITEM)
SHAPES = [(regex.compile(below), regex.compile(above)) for below, above in SHAPES.items()]
# Lines that do as a whole: two columns, two values without a space between.
COLUMNS = regex.compile(r".*(?:\S {3,}|[\p{L}\p{N}\"]\t)\S")
VALUES = regex.compile(r"(?<=[\p{L}\"])[,;|](?=[\w\"-])|[,;|](?=[\p{L}\"-])")
CODE_ENDS = ("{", "}", ":", "\\", "(", "=", "[", ");", "];", ">", "*/")

SHORT, LONG = 20, 200  # wrapped lines have a width between these
COMMON = range(60, 101)  # often this
RAGGED = 0.75  # wrapped lines reach this part of it, as letters differ in width
WORD = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|\S+(?=\s)")


def ends_line(before: str, gap: str, after: str) -> bool:
    """Whether the gap has a line end that ends a sentence: any but one after a wrapped line."""
    if gap.isprintable():
        return False  # as most gaps, a space
    n_ends = 1 if gap == "\n" else len(LINE_END.findall(gap))
    if n_ends != 1:
        return n_ends > 1  # an empty line
    if "\u2029" in gap or "\f" in gap and not after[0].islower():
        return True  # the end of a paragraph or a page
    lines = before.splitlines()
    if len(before) == BEFORE and len(lines) > 1:
        del lines[0]  # its beginning is not there
    if stands_alone(lines[-1].lstrip()) or begins_alone(lines, after):
        return True
    return not is_wrapped(lines, after)


def stands_alone(line: str) -> bool:
    """A heading, code, a line without letters, or two columns."""
    if not any(map(str.isalpha, line)) or line[0] == "#" or line.endswith(CODE_ENDS):
        return True
    if ("(" in line or "=" in line or "import" in line) and CODE.match(line):
        return True
    return ("\t" in line or "   " in line) and COLUMNS.match(line) is not None


def begins_alone(lines: list[str], after: str) -> bool:
    """An item or a row of values follows, or what begins like one of the lines."""
    n_values = len(VALUES.findall(lines[-1]))
    if n_values > 1 or n_values == 1 and VALUES.search(after):
        return True
    if not MAY_STAND.match(after):
        return False
    return ITEM.match(after) is not None or any(
        below.match(after) and any(above.match(line.lstrip()) for line in lines)
        for below, above in SHAPES)


def is_wrapped(lines: list[str], after: str) -> bool:
    """Whether the last line is full, and what follows can go on with it."""
    line, width, first = lines[-1], max(map(len, lines)), after[0]
    goes_on = line[-1] in ",;—" or first.islower() or first.isalpha() and not first.isupper()
    if width < SHORT or len(line) > LONG:
        return False
    if has_room(line, after, RAGGED * width) and not (goes_on and len(line) >= 2 * SHORT):
        return False
    if not goes_on and any(other.lstrip()[:1].islower() for other in lines[1:]):
        return True  # in a text where lines go on, a name or a number follows
    pairs = unmarked_pairs(lines)
    if goes_on:  # a line below SHORT may be a title, or the role in a chat
        return not any(len(a) >= SHORT and b[0].islower() and has_room(a, b, RAGGED * width)
                       for a, b in pairs)
    pairs.append((line, after))
    return len(line) in COMMON and not any(has_room(a, b, width) for a, b in pairs)


def unmarked_pairs(lines: list[str]) -> list[tuple[str, str]]:
    """The neighbours of the last paragraph, but for those after a punctuation mark."""
    paragraph = [*takewhile(str.strip, reversed(lines))]
    return [(above, line.lstrip()) for line, above in pairwise(paragraph)
            if above[-1].isalnum() or above[-1] in ",;—"]


def has_room(line: str, following: str, width: float) -> bool:
    """Whether the first word of what follows is whole, and fits into the line."""
    if len(line) + 2 > width:
        return False
    word = WORD.match(following)
    return word is not None and len(line) + 1 + len(word[0]) <= width

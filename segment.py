r"""Text to sentences to token spans.

It knows text and the pieces of text that tokens add; no tokenizer, no tensor and no model.

`GAP` finds the places where a sentence may end: after a mark such as `.` or `。`, and at line
breaks. Rules then judge each place by the few characters around it and by nothing else. So a text
fed to `SentenceStream` piece by piece falls into the same sentences as the whole, and the time is
linear in the length of the text, whatever the text is.

>>> marked("Dr. Smith paid $3.50 to www.x.com. He left!\n\nSigned\n\n你好。再见。")
'Dr. Smith paid $3.50 to www.x.com. |He left!\n\n|Signed\n\n|你好。|再见。'
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

import regex

WRAPPED = range(40, 101)  # lengths of a line that may have been wrapped inside a sentence
ITEM = 200  # a list item longer than this no longer looks out for the next one

LISTS = {
    "titles": "Mr Mrs Ms Mx Dr Drs Prof St Mt Ft Gen Col Maj Capt Cmdr Lt Sgt Cpl Adm Sen Rep Gov "
    "Pres Rev Hon Messrs Mme Mlle Fr Hr Sra Srta Dña Sig Dott Ing dhr mevr vs cf viz e.g i.e z.B "
    "d.h PS P.S ул им проф",
    "numbered": "no nos nr n° pp fig figs vol vols ch chap sec sect art eq bd abs kap núm pág cap "
    "jan feb mar apr jun jul aug sep sept oct nov dec",
    "shortened": "co inc corp bros jr sr esq etc al dept est approx ave univ assn usw evtl inkl "
    "engl griech aprox resp esim bijv prof jan feb aug sept oct nov dec",
    "opening": "the a an he she it they we you i this that these those there what when where why "
    "who how did do does is are was if in on at but and so for please his her my our your as to "
    "no not or just also maybe all some after before then now even since because however although "
    "though while once its im der die das er sie es wir el los las le les il он она они в на и но",
}
WORDS = {name: words.split() for name, words in LISTS.items()}

# A rule: what stands before the gap, one space for the gap, what follows; and an example of it.
JOINED = {  # these never end a sentence
    "title": (r"\b\L<titles>\. \S", "Prof. Li met Sen. Ax. |He left."),
    "number": (r"\b(?:\p{Ll}|(?i:\L<numbered>))\. \p{N}", "See p. 5 of Vol. 2. |Or do not."),
    "ellipsis": (r"[^.]\s(?:\.\s\.\s\.|\.\.\.|…) \S", "Well ... I think so... |He agreed."),
    "elision": (r"\[(?:\.\.\.|…)\][^\s\w]{0,8} \S", '"He [...] agreed [...]" (Smith 55).'),
    "run": (r"[.!?…] [.!?…,;:]", "Wait . . . . |Go on."),
    "trailing": (r"(?:[!…]|\.\.) \p{Ll}", "She works at Yahoo! in London... |Oh! |She does."),
    "quoted": (r"[.!?…;][^\s\w.!?]{1,8} [\p{Ll}—–]", '"Why?" he said. |"Why?" |He knew.'),
}
SHORT = {  # these do if a word follows that likes to open a sentence
    "initials": (r"(?<![^\s(\"'“‘])(?:\p{L}\.|Ph\.)+ \S", "J. K. Li left the U.S. |He returned."),
    "shortened": (r"\b(?i:\L<shortened>)\. \S", "Li Inc. Berlin owns Ax Inc. |It pays."),
    "ordinal": (r"\b\p{N}{1,2}\. \p{Lu}", "Es war der 3. Mai. |Sie war 20. |Er kam."),
    "no vowel": (r"\b[B-DF-HJ-NP-TV-XZ]?[b-df-hj-np-tv-xz]+\. \S", "Hrn. Li owns Ltd. |It pays."),
}

BULLETS = "•‣◦⁃▪"
WIDE = "。！？｡؟۔।॥։።፧။។៕‼⁇⁈⁉"  # marks that need no space after them
SPACE = r"[\s\x1c-\x1f]"  # what str.isspace() means by white space
NEWLINE = r"[\n\r\f\x85\u2029]"
CLOSERS = r"\p{Pe}\p{Pf}\"'"
QUOTE = "[\"'“‘(]"

GAP = regex.compile(
    rf"""(?P<wide> [{WIDE}] [{CLOSERS}]{{0,8}}+ ) {SPACE}*+ (?= [^\s{CLOSERS}{WIDE}!?,:;，、；：—] )
    | (?P<mark> (?: [.!?…]
                  | ; (?<=\p{{Greek}};)                      # the Greek question mark
                  | [()] (?<=(?<!\S)[:;]-?[()])              # :-)
                  | [=*_~-] (?<=[=*_~-]{{5}}|\*{{3}}) )      # =====
                (?: [{CLOSERS}“*_] | [\ \xa0\u202f][\p{{Pe}}»›”] ){{0,8}} )
      {SPACE}++ (?= [^\s\p{{Pe}}»›”] | [»›”]\w )
    | {NEWLINE} {SPACE}*+
    | \s (?= [{BULLETS}] | [1-9b-z][.)] )""",
    regex.VERBOSE,
)
PARAGRAPH = regex.compile(r"(?>\r\n|[\n\r\x85])[^\S\n\r]*+[\n\r]|[\f\u2029]")
MARKER = regex.compile(rf"[{BULLETS}*+-]?\s?(?:(\d{{1,3}}|\p{{L}}|[IVXivx]+)[.)]{{1,2}})?\s*")
LINE = regex.compile(
    rf"\s*+(?:(?P<unit>[#|\[]|```|>>>|\d{{2,4}}[-/:]\d\d)|(?:[{BULLETS}*+-]|(?P<number>\d+)[.)])\s*)?"
)
CODE_ENDS = ("{", "}", ":", "\\", ");", "];")


def _pattern(rules: dict[str, tuple[str, str]]) -> regex.Pattern:
    """All rules as one pattern that is matched backwards, from the end of what it is given."""
    pattern = "|".join(rule.replace(" ", SPACE + "++") for rule, _ in rules.values())
    return regex.compile(f"(?r){pattern}", ignore_unused=True, **WORDS)


JOIN, ABBREVIATION = _pattern(JOINED), _pattern(SHORT)
OPENING = regex.compile(
    rf"(?i){QUOTE}?(?:\L<words>(?=[^\w.])|https?:|www\.)", words=WORDS["opening"]
)


def sentence_ends(text: str) -> list[int]:
    """Offsets at which the sentences of `text` end; each owns the white space after it.

    >>> sentence_ends("Why? No.")
    [5, 8]
    """
    start = len(text) - len(text.lstrip())
    return [*_ends(text, start, 0), len(text)] if text else []


def marked(text: str) -> str:
    """The text with a bar between its sentences. So, for every rule above:

    >>> examples = [example for _, example in (JOINED | SHORT).values()]
    >>> [marked(example.replace("|", "")) for example in examples] == examples
    True
    """
    return "|".join(text[a:b] for a, b in pairwise([0, *sentence_ends(text)]))


def _ends(text: str, start: int, position: int) -> Iterator[int]:
    """Yield the ends in `text` after `position`; the open sentence began at `start`."""
    for gap in GAP.finditer(text, position):
        if start < gap.end() < len(text) and _is_end(text, start, gap):
            start = gap.end()
            yield start


def _is_end(text: str, start: int, gap: regex.Match) -> bool:
    """Whether the sentence that began at `start` ends at this gap."""
    mark, following = gap["mark"], gap.end()
    end = max(gap.start(), gap.end("mark"), gap.end("wide"))
    space = text[end:following]
    if end <= start:
        return False
    if gap["wide"] or PARAGRAPH.search(space):
        return True
    if following - start < 10 and MARKER.fullmatch(text, start, following):
        return False
    if "\n" in space and _breaks_line(text, end + space.index("\n"), following):
        return True
    if _next_item(text, start, following, space):
        return True
    return mark is not None and (len(space) > 8 or _mark_ends(text, start, following, mark))


def _mark_ends(text: str, start: int, following: int, mark: str) -> bool:
    """Whether a mark ends a sentence, by the words on both sides of it.

    >>> marked("it is late. the shop is shut? yes. see approx. ten")
    'it is late. |the shop is shut? |yes. see approx. ten'
    """
    start, lower = max(start, 0), text[following].islower()
    if JOIN.match(text, start, following + 1):
        return False
    if ABBREVIATION.match(text, start, following + 1):
        return not lower and OPENING.match(text, following) is not None
    return not lower or mark[-1] in "?;" or OPENING.match(text, following) is not None


def _next_item(text: str, start: int, following: int, space: str) -> bool:
    """Whether a list item begins: with a bullet, or with what follows the sentence's own marker.

    >>> marked("1.) Tea 2.) Milk • Salt")
    '1.) Tea |2.) Milk |• Salt'
    """
    first, second = text[following], text[following + 1 : following + 2]
    if first in BULLETS or second not in (".", ")"):
        return first in BULLETS
    if "\n" in space:
        return first.isdigit() or first.islower()
    marker = MARKER.match(text, start) if following - start < ITEM else None
    return bool(marker and marker[1]) and ord(first) == ord(marker[1][-1]) + 1


def _breaks_line(text: str, newline: int, following: int) -> bool:
    r"""Whether a line was ended on purpose: it was not full, or it is a list, a log or code.

    >>> marked("a line as long as those of most books is\nwrapped\nTitle")
    'a line as long as those of most books is\nwrapped\n|Title'
    """
    begin = text.rfind("\n", max(0, newline - WRAPPED.stop), newline) + 1
    line, head = text[begin:newline].rstrip(), text[following]
    if len(line) not in WRAPPED or head in "-*+#>|}/@$`" or line.endswith(CODE_ENDS):
        return True
    opening = LINE.match(line)
    if opening["unit"] or opening["number"] and head.isdigit():
        return True
    return following - newline - 1 > opening.end()


MARK = rf"[{WIDE}.!?…;()=*_~-]"
TRIGGER = regex.compile(rf"{MARK}|{NEWLINE}|[{BULLETS}]")
UNDECIDED = regex.compile(  # the end of a text that the text to come may make a sentence's end
    rf"""(?rx)
      {MARK} [{CLOSERS}“*_\s\x1c-\x1f]{{0,17}}
      (?: {SPACE}{{1,8}} {QUOTE}? [\w'’]{{0,9}} | {SPACE}* [»›”]? )
    | {NEWLINE} {SPACE}* \w?"""
)
CUTS = [regex.compile(f"(?r){cut}") for cut in (r"[,;:—]\s+|[，、；：]\s*", r"\n\s*", r"\s+", "")]


class SentenceStream:
    """The same sentences, one token at a time.

    A piece is the text that one token adds: "" if it only begins a character. It belongs to the
    sentence of its first character that is not white space; white space belongs with the token
    before it, "" with the token that completes the character.

    An end is told when the first token after it is pushed. Only after an abbreviation, before a
    small letter and before a list marker must the next word be complete: that is a token later.

    >>> stream = SentenceStream()
    >>> [stream.push(piece) for piece in ["Hi", "!", " It", " is", " me", "."]], stream.finish()
    ([[], [], [2], [], [], []], [4])
    """

    def __init__(self, limit: int = 128):
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.limit = limit
        self.text, self.start = "", 0  # recent text, and where in it the open sentence begins
        self.firsts: list[int] = []  # for every open token, where its first character is
        self.empties = 0  # how many of them wait for their character to be complete
        self.ends: list[int] = []  # where sentences end that no token has followed yet
        self.watch = 0  # where to look for ends when more text comes

    def push(self, piece: str) -> list[int]:
        """Add a token; return the lengths of the sentences that turn out to have ended before it."""
        self.firsts.append(len(self.text))
        self.empties += 1
        if piece:
            self._read(piece)
        lengths = self._close() if self.ends else []
        if len(self.firsts) > self.limit:
            self.firsts[-1] = max(self.firsts[-1], len(self.text) - len(piece))
            lengths.append(self._take(self._cut()))
            self.start = max(self.start, self.firsts[0])
        return lengths

    def finish(self) -> list[int]:
        """Return the lengths of the sentences that are left at the end of the text."""
        self.empties = 0
        lengths = self._close()
        return lengths + [self._take(len(self.firsts))] if self.firsts else lengths

    def _read(self, piece: str) -> None:
        """Append a piece to the text, and find the sentence ends that this decides."""
        offset, after_space = len(self.text), self.text[-1:].isspace()
        self.text += piece
        first = len(self.text) - len(piece.lstrip())
        blank = first == len(self.text)
        if self.start == offset:
            self.start = first
        if blank and len(self.firsts) > self.empties:
            first = self.firsts[-self.empties - 1]
        self.firsts[-self.empties :] = [first] * self.empties
        self.empties = 0
        if self.watch == offset:
            self.watch = max(0, offset - 2) if TRIGGER.search(piece) else len(self.text)
        if self.watch < len(self.text) and not (blank and after_space):
            self.ends += _ends(self.text, self.start, self.watch)
            self.start = self.ends[-1] if self.ends else self.start
            undecided = UNDECIDED.match(self.text)
            self.watch = undecided.start() if undecided else len(self.text)

    def _close(self) -> list[int]:
        """Take the sentences that have ended before the last token."""
        settled = len(self.firsts) - self.empties
        counts = [bisect_left(self.firsts, end) for end in self.ends]
        self.ends = self.ends[-1:] if counts[-1:] == [settled] else []
        told = sorted({count for count in counts if 0 < count < settled})
        return [self._take(end - start) for start, end in pairwise([0, *told])]

    def _take(self, tokens: int) -> int:
        """Forget that many tokens, and the text that no rule looks at any more."""
        first = self.firsts[tokens] if tokens < len(self.firsts) else len(self.text)
        drop = max(0, first - 2 * ITEM)
        self.text = self.text[drop:]
        self.start, self.watch = self.start - drop, max(0, self.watch - drop)
        self.firsts = [place - drop for place in self.firsts[tokens:]]
        self.ends = [place - drop for place in self.ends]
        self.empties = min(self.empties, len(self.firsts))
        return tokens

    def _cut(self) -> int:
        """Where to cut a sentence that is too long: at the best place in its later half."""
        last = len(self.firsts) - 1
        for before in CUTS:
            for k in range(last, last // 2, -1):
                place = self.firsts[k]
                if place > self.firsts[k - 1] and before.match(self.text, 0, place):
                    return k
        return last


def token_spans(pieces: Iterable[str], limit: int = 128) -> list[tuple[int, int]]:
    """The sentences as (start, end) spans of tokens: they tile the tokens, none exceeds `limit`.

    >>> token_spans(["Hi", "!", " It", " is", " me", "."])
    [(0, 2), (2, 6)]
    """
    stream = SentenceStream(limit)
    lengths = [n for piece in pieces for n in stream.push(piece)] + stream.finish()
    return list(pairwise(accumulate(lengths, initial=0)))

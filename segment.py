r"""Text to sentences to token spans.

It knows text and the pieces of text that tokens add; no tokenizer, no tensor and no model.

One pattern, `END`, says where sentences end. It looks at a few characters before a gap and at the
first word after it, so a text that comes piece by piece falls into the same sentences as the
whole, and the time is linear in the length of the text, whatever the text is.

>>> marked("Dr. Smith paid $3.50 to www.x.com. He left!\n\nSigned\n\n你好。再见。")
'Dr. Smith paid $3.50 to www.x.com. |He left!\n\n|Signed\n\n|你好。|再见。'
"""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate, pairwise

import regex

WORDS = {
    "titles": "Mr Mrs Ms Mx Dr Drs Prof St Mt Ft Gen Col Maj Capt Cmdr Lt Sgt Cpl Adm Sen Rep Gov "
    "Pres Rev Hon Messrs Mme Mlle Fr Hr Hrn Sra Srta Dña Sig Dott Ing dhr mevr vs cf viz e.g i.e "
    "z.B d.h PS P.S ул им проф",
    "numbered": "no nos nr n° pp fig figs vol vols ch chap sec sect art eq bd abs kap núm pág cap "
    "mar jun",
    "shortened": "co inc corp ltd bros jr sr esq etc al dept est approx ave univ assn usw evtl "
    "inkl engl griech aprox resp esim bijv prof jan feb apr jul aug sep sept oct nov dec",
    "opening": "the a an he she it they we you i this that these those there what when where why "
    "who how did do does is are was if in on at but and so for please his her my our your as to "
    "no not or just also maybe all some after before then now even since because however although "
    "though while once its im http https der die das er sie es wir el los las le les il он она "
    "они в на и но",
}
BULLETS = "•‣◦⁃▪"

# Two markers of a list that follow each other, up to the second: `1. Tea 2.`
NEIGHBOURS = [*pairwise("123456789"), *pairwise("abcdefg")]
MARKERS = "|".join(rf"\b{a}[.)]+\s.{{1,150}}\s{b}[.)]" for a, b in NEIGHBOURS)

# A rule: what stands before a gap, one space for the gap, what follows; and an example of it.
# In patterns, \L<name> is any of those words, \p{..} a kind of character (Ll: small letters, Lu:
# capitals, Pe and Pf: closing brackets and quotes), and ++ takes all it can and gives none back.
INSIDE = {  # gaps that are inside a sentence
    "title": (r"\b\L<titles>\. \S", "Prof. Li met Sen. Ax. |He left."),
    "number": (r"\b(?:\p{Ll}|(?i:\L<numbered>))\. \p{N}", "See p. 5 of Vol. 2. |Or do not."),
    "ellipsis": (r"[^.]\s(?:\.\s\.\s\.|\.\.\.|…) \S", "Well ... I think so... |He agreed."),
    "elision": (r"\[(?:\.\.\.|…)\][^\s\w]{0,8} \S", '"He [...] agreed [...]" (Smith 55).'),
    "run": (r"[.!?…] [.!?…,;:]", "Wait . . . . |Go on."),
    "trailing": (r"(?:[!…]|\.\.) \p{Ll}", "She works at Yahoo! in London... |Oh! |She does."),
    "quoted": (r"[.!?…;][^\s\w.!?]{1,8} [\p{Ll}—–]", '"Why?" he said. |"Why?" |He knew.'),
    "marker": (
        rf"(?:^|[{BULLETS}])[^\S\n]*(?:\d{{1,3}}|\p{{L}}|[IVXivx]{{1,5}})[.)]{{1,2}} \S",
        "1.) Tea\n|IV. Milk\n|• 9. Salt",
    ),
    "next marker": (rf"(?:{MARKERS})\)? \S", "1. The tea |2. The milk"),
}
ABBREVIATED = {  # gaps that end a sentence if a quotation or a word that likes to open one follows
    "initials": (r"(?<![^\s(\"'“‘])(?:\p{L}\.|Ph\.)+ \S", "J. K. Li left the U.S. |He returned."),
    "shortened": (r"\b(?i:\L<shortened>)\. \S", "Li Inc. Berlin owns Ax Inc. |It pays."),
    "ordinal": (r"\b\p{N}{1,2}\. \p{Lu}", "Es war der 3. Mai. |Sie war 20. |Er kam."),
}
OPENING = r"(?i: \L<opening> (?=[^\w.]) ) | [\"'“‘] (?=\p{Lu})"

WIDE = "。！？｡؟۔।॥։።፧။។៕‼⁇⁈⁉"  # marks that need no space after them
CLOSERS = r"\p{Pe}\p{Pf}\"'"


def compile_end(inside: dict, abbreviated: dict) -> regex.Pattern:
    """The pattern of a gap that ends a sentence: it matches up to the next sentence."""

    def after(rules: dict) -> str:
        """What matches one character after a gap that one of the rules knows."""
        return "|".join(rule.replace(" ", r"\s++") for rule, _ in rules.values())

    pattern = rf"""
      # A mark that needs no space, with its closers.
      [{WIDE}] [{CLOSERS}]{{0,8}}+ \s*+ (?= [^\s{CLOSERS}{WIDE}!?,:;，、；：—] )

    | # Any other mark, its closers, and space before something that does not close.
      (?: [.!?…]
        | ; (?<= \p{{Greek}}; )
        | [()] (?<= (?<!\S) [:;]-?[()] )               # :-)
        | [=*_~-] (?<= [=*_~-]{{5}} | \*{{3}} ) )      # =====
      [{CLOSERS}“*_]{{0,8}} (?: [ \xa0\u202f] [\p{{Pe}}»›”] [{CLOSERS}]{{0,8}} )?
      \s++ (?= [^\s\p{{Pe}}»›”] | [»›”]\w )
      (?! . (?<= {after(inside)} ) )
      # After an abbreviation, only a word or quotation that opens a sentence will do;
      (?: (?! . (?<= {after(abbreviated)} ) ) | (?! \p{{Ll}} ) (?= {OPENING} ) )
      # and a small letter only after a question, or if its word opens sentences.
      (?: (?! \p{{Ll}} ) | (?<= [?;] \s++ ) | (?= {OPENING} ) )

    | # A line end before an empty line, and any other unless the line may have been wrapped: it is
      # long, no heading and no code, and no list item, quotation, code or log line follows.
      \n (?<= \S [^\S\n]*+ \n ) [^\S\n]*+
      (?: \n \s*+ (?=\S)
        | (?=\S)
          (?! (?<= ^ (?!\#) [^\n]{{40,100}} (?<! [{{}}:\\] | [)\]]; ) \n [^\S\n]*+ )
              (?! [-*+\#>|{{}}/@$`\[{BULLETS}] | [1-9]\. | [1-9a-z]\) )
              (?! \d (?<= ^\d [^\n]* \n [^\S\n]*+ \d ) ) ) )

    | # Space before a bullet or the next marker.
      (?<=\S) \s++ (?= [{BULLETS}] | [2-9b-g][.)] (?<= {MARKERS} ) )
    """
    words = {name: words.split() for name, words in WORDS.items()}
    return regex.compile(pattern, regex.VERBOSE | regex.MULTILINE, ignore_unused=True, **words)


END = compile_end(INSIDE, ABBREVIATED)


def sentence_ends(text: str) -> list[int]:
    """Offsets at which the sentences of `text` end; each owns the white space after it.

    >>> sentence_ends("Why? No.")
    [5, 8]
    """
    ends = [gap.end() for gap in END.finditer(text)]
    return [*ends, len(text)] if text else []


def marked(text: str) -> str:
    """The text with a bar between its sentences. So, for every rule above:

    >>> examples = [example for _, example in (INSIDE | ABBREVIATED).values()]
    >>> [marked(example.replace("|", "")) for example in examples] == examples
    True
    """
    return "|".join(text[a:b] for a, b in pairwise([0, *sentence_ends(text)]))


CONTEXT = 300  # characters before the open sentence that are remembered; `END` looks at fewer
# Three words: a mark, its closers, and the word after it. What is before them is decided.
RECENT = regex.compile(r"(?r) \S{0,20} \s* \S{0,12} \s* \S{0,12}", regex.VERBOSE)
CUTS = [regex.compile(f"(?r){cut}") for cut in (r"[,;:—]\s+|[，、；：]\s*", r"\n\s*", r"\s+", "")]


class SentenceStream:
    """The same sentences, one token at a time.

    A piece is the text that one token adds. It belongs to the sentence of its first character that
    is not white space; white space belongs to the sentence before it, and "", which a token adds
    that only begins a character, to the sentence of that character.

    An end is told when the first token after it is pushed. Only after an abbreviation, before a
    small letter and before a list marker must the next word be complete: that is a token later.

    >>> stream = SentenceStream()
    >>> [stream.push(piece) for piece in ["Hi", "!", " It", " is", " me", "."]], stream.finish()
    ([[], [], [2], [], [], []], [4])
    """

    def __init__(self, limit: int = 128):
        if limit < 1:
            raise ValueError(f"limit is {limit}, the least is 1")
        self.limit = limit
        self.text = ""  # what has come, but for what is long past
        self.firsts: list[int] = []  # where in the text each token of the open sentence begins

    def push(self, piece: str) -> list[int]:
        """Add a token; return the lengths of the sentences found to have ended before it."""
        # More text may make the last gap an end, but never an end none: so look again at that gap,
        # and at the last token, for an end inside it is told only now that another follows.
        last = self.firsts[-1] if self.firsts else 0
        recent = RECENT.match(self.text, 0, last).start()
        space = 0 if piece.isspace() else len(piece) - len(piece.lstrip())
        self.firsts.append(len(self.text) + space)
        self.text += piece
        ends = [gap.end() for gap in END.finditer(self.text, recent)]
        counts = {bisect_left(self.firsts, end) for end in ends} - {0, len(self.firsts)}
        lengths = [self._take(end - start) for start, end in pairwise([0, *sorted(counts)])]
        if len(self.firsts) > self.limit:
            lengths.append(self._take(self._cut()))
        return lengths

    def finish(self) -> list[int]:
        """Return the length of the sentence that the end of the text leaves open, if any."""
        return [self._take(len(self.firsts))] if self.firsts else []

    def _take(self, tokens: int) -> int:
        """Forget so many tokens, and the text that `END` does not look at any more."""
        drop = max(0, [*self.firsts, len(self.text)][tokens] - CONTEXT)
        self.text = self.text[drop:]
        self.firsts = [first - drop for first in self.firsts[tokens:]]
        return tokens

    def _cut(self) -> int:
        """Where to cut a sentence that is too long: at the best place in its later half."""
        for before in CUTS:
            for k in range(self.limit, self.limit // 2, -1):
                first = self.firsts[k]
                if first > self.firsts[k - 1] and before.match(self.text, 0, first):
                    return k
        return self.limit


def token_spans(pieces: Iterable[str], limit: int = 128) -> list[tuple[int, int]]:
    """The sentences as (start, end) spans of tokens: they tile the tokens, none exceeds `limit`.

    >>> token_spans(["Hi", "!", " It", " is", " me", "."])
    [(0, 2), (2, 6)]
    """
    stream = SentenceStream(limit)
    lengths = [n for piece in pieces for n in stream.push(piece)] + stream.finish()
    return list(pairwise(accumulate(lengths, initial=0)))

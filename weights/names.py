"""Where the names of added tokens are in a text, and what can stand for them.

A *placeholder* is a number in characters that are never assigned, as 16 digits between two edges.
"""

import re
from collections.abc import Iterable, Iterator

SPACE = re.compile(r"\s*")
EDGE, PLACES = "\ufde0", "".join(map(chr, range(0xFDD0, 0xFDE0)))
DIGITS = "0123456789abcdef"
TO_PLACE, FROM_PLACE = str.maketrans(DIGITS, PLACES), str.maketrans(PLACES, DIGITS)
PLACE = re.compile(f"{EDGE}([{PLACES}]+){EDGE}")


class Names:
    """Finds the names of tokens, the longest first. A pattern of all names would try each of them
    at each place, and some models have thousands."""

    def __init__(self, tokens: Iterable):
        self.tokens = {token.content: token for token in tokens if token.content}
        self.lengths = {}  # of names, by their first character
        for name in sorted(self.tokens, key=len, reverse=True):
            self.lengths.setdefault(name[0], {})[len(name)] = True
        first = "".join(map(re.escape, self.lengths))
        self.first = re.compile(f"[{first}]" if first else "(?!)")

    def find(self, text: str) -> Iterator[tuple[int, str]]:
        """(start, name) of each.

        >>> [*Names([AddedToken("<x>"), AddedToken("<x>>")]).find("<x>>a<x>")]
        [(0, '<x>>'), (5, '<x>')]
        """
        end = 0
        for found in self.first.finditer(text):
            start = found.start()
            names = (text[start : start + n] for n in self.lengths[found[0]] if start >= end)
            name = next(filter(self.tokens.__contains__, names), None)
            if name:
                yield start, name
                end = start + len(name)

    def split(self, text: str) -> list[str]:
        """The text in parts: every second one is a name. White space that its token takes is in no
        part.

        >>> Names([AddedToken("<x>", lstrip=True), AddedToken("<y>")]).split("a  <x> b <y>")
        ['a', '<x>', ' b ', '<y>', '']
        """
        parts, begun = [], 0
        for start, name in self.find(text):
            if start < begun:  # white space that the name before it took
                continue
            token, before, end = self.tokens[name], text[begun:start], start + len(name)
            parts += [before.rstrip() if token.lstrip else before, name]
            begun = SPACE.match(text, end).end() if token.rstrip else end
        return [*parts, text[begun:]]


def with_places(text: str, names: Names) -> tuple[str, list[str]]:
    """The text with a placeholder for each name, and the names in their order."""
    parts, found, begun = [], [], 0
    for start, name in names.find(text):
        parts += [text[begun:start], f"{EDGE}{len(found):x}{EDGE}".translate(TO_PLACE)]
        found.append(name)
        begun = start + len(name)
    return "".join(parts) + text[begun:], found


def without_places(text: str, names: list[str]) -> str:
    """The names again. A template may have written another placeholder itself: it stays."""
    def name_at(place):
        number = int(place[1].translate(FROM_PLACE), 16)
        return names[number] if number < len(names) else place[0]

    return PLACE.sub(name_at, text)

"""Where the names of added tokens are in a text."""

import re
from collections.abc import Iterable, Iterator

SPACE = re.compile(r"\s*")


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
        """The text in parts. Every second one is a name, with the white space around it that its
        token takes.

        >>> Names([AddedToken("<x>", lstrip=True), AddedToken("<y>")]).split("a  <x> b <y>")
        ['a', '  <x>', ' b ', '<y>', '']
        """
        parts, begun = [], 0
        for start, name in self.find(text):
            if start < begun:  # white space that the name before it took
                continue
            token, before, end = self.tokens[name], text[begun:start], start + len(name)
            before = before.rstrip() if token.lstrip else before
            end = SPACE.match(text, end).end() if token.rstrip else end
            parts += [before, text[begun + len(before) : end]]
            begun = end
        return [*parts, text[begun:]]

    def replace(self, text: str, new) -> str:
        """The text with `new(name)` in place of each name."""
        parts, begun = [], 0
        for start, name in self.find(text):
            parts += [text[begun:start], new(name)]
            begun = start + len(name)
        return "".join(parts) + text[begun:]

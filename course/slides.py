"""Make a deck of slides from the lessons: `python -m course.slides mine/slides.html`.

One file that needs no other. Arrow keys, Space, Home, End or a swipe turn the pages, and the
address has the number of the slide. `slides.html#talk` is a talk of 20 minutes, `#session-1` and
`#session-2` are the slides of the two sessions. A printer gets one slide a page.

`slides.txt` says which piece of which lesson is on which slide, so that a changed lesson changes
the deck. A slide begins with the name of a lesson's file without its number, or with README, and
with the chapters that it belongs to: `talk`, `1` and `2` for the sessions, or none. Below it, each
indented line is a piece:

    question             the lesson's question
    figure NAME          the first picture whose file has this name in its own, or the first of all
    table HEADING        the first table of a section
    list HEADING         the first list, with points
    steps HEADING        the first list, with numbers
    Any other line       the sentence of the lesson that begins so
"""

import argparse
import base64
import mimetypes
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from course.pages import (FOLDER, MARKDOWN, TEMPLATES, TOP, Document, colours, lessons, name_of,
                          render)
from segment import sentence_ends

PLAN = FOLDER / "slides.txt"
MARK = '<meta name="generator" content="course.slides">'
CHAPTERS = {"talk": "talk", "1": "session-1", "2": "session-2"}  # in slides.txt, in the address
BLOCKS = {"table": "table", "list": "bullet_list", "steps": "ordered_list"}  # in tokens
LINK = re.compile(r'<a href="(?!https:)[^"]*">(.*?)</a>', re.DOTALL)
IMAGE = re.compile(r'(src|srcset)="([^"]+)"')


@dataclass
class Slide:
    document: Document
    chapters: list[str]
    lines: list[str]  # its pieces

    def pieces(self) -> tuple[str, list[str]]:
        """(heading of the first piece's section, pieces as HTML that needs no other file)"""
        found = [piece(self.document, line) for line in self.lines]
        heading, _ = found[0]
        return heading, [embedded(self.document.path.parent, html) for _, html in found]


def plan(text: str) -> list[Slide]:
    """The slides that a text like slides.txt names. Raises ValueError for a name or a chapter that
    is not known."""
    paths = {name_of(path): path for path in lessons()} | {"README": TOP / "README.md"}
    slides = []
    for line in text.splitlines():
        if line.startswith(" "):
            slides[-1].lines.append(line.strip())
        elif line and not line.startswith("#"):
            name, *chapters = line.split()
            if name not in paths or not CHAPTERS.keys() >= set(chapters):
                raise ValueError(f"slides.txt: {line!r} must be the name of a lesson, and perhaps"
                                 f" {', '.join(CHAPTERS)}")
            marks = [CHAPTERS[chapter] for chapter in chapters]
            slides.append(Slide(Document(paths[name]), marks, []))
    return slides


def piece(document: Document, line: str) -> tuple[str, str]:
    """(heading of its section, HTML). Raises ValueError if the document has no such piece."""
    kind, _, name = line.partition(" ")
    if line == "question":
        return document.title, f'<p class="question">{document.question}</p>'
    if kind == "figure":
        return figure(document, name)
    if kind in BLOCKS:
        return name, block(document, BLOCKS[kind], name)
    heading, found = sentence(document, line)
    return heading, f"<p>{MARKDOWN.renderInline(found)}</p>"


def figure(document: Document, name: str) -> tuple[str, str]:
    for heading, _, tokens in document.sections():
        for token in tokens:
            if token.content.startswith("<picture>") and name in token.content:
                return heading, token.content.replace('media="', 'media="screen and ')
            for image in token.children or []:
                if image.type == "image" and name in image.attrGet("src"):
                    return heading, MARKDOWN.renderInline(token.content)
    raise ValueError(f"slides.txt: {document.path.name} has no figure {name}")


def block(document: Document, kind: str, heading: str) -> str:
    """The first block of a kind in a section."""
    tokens = next((part for name, _, part in document.sections() if name == heading), [])
    types = [token.type for token in tokens]
    if f"{kind}_open" not in types:
        raise ValueError(f"slides.txt: {document.path.name} has no {kind} in {heading!r}")
    first = types.index(f"{kind}_open")
    return render(tokens[first : types.index(f"{kind}_close", first) + 1])


def sentence(document: Document, beginning: str) -> tuple[str, str]:
    """(heading of its section, Markdown) of the one sentence that begins so."""
    found = []
    for heading, _, tokens in document.sections():
        for token in tokens:
            text = token.content.replace("\n", " ")
            if token.type == "inline" and beginning in text:
                ends = sentence_ends(text)
                parts = (text[start:end].strip() for start, end in zip([0, *ends], ends))
                found += [(heading, part) for part in parts if part.startswith(beginning)]
    if len(found) != 1:
        raise ValueError(f"slides.txt: {len(found)} sentences of {document.path.name} begin with"
                         f" {beginning!r}")
    return found[0]


def embedded(folder: Path, html: str) -> str:
    """HTML with its pictures in itself, and without its links to other files of the project."""
    def data(match):
        file = folder / match[2]
        kind, text = mimetypes.guess_type(file)[0], base64.b64encode(file.read_bytes()).decode()
        return f'{match[1]}="data:{kind};base64,{text}"'

    return IMAGE.sub(data, LINK.sub(r"\1", html))


def deck() -> str:
    """Raises ValueError if slides.txt names what is not there."""
    slides = plan(PLAN.read_text(encoding="utf-8"))
    return TEMPLATES.get_template("deck.html").render(
        title=Document(TOP / "README.md").title, mark=MARK, colours=colours(), slides=slides,
        chapters=[(name, sum(name in slide.chapters for slide in slides))
                  for name in CHAPTERS.values()])


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="course.slides", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="the file that is written")
    out = parser.parse_args(arguments).out
    try:
        if out.exists() and MARK not in out.read_text(encoding="utf-8", errors="replace"):
            raise ValueError(f"{out} is there, and no deck that this program has written")
        out.write_text(deck(), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"course.slides: {error}", file=sys.stderr)
        return 2
    print(f"open {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

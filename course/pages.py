"""Markdown files of the project as HTML: what `course.site` and `course.slides` share."""

import inspect
import keyword
import pkgutil
import re
import textwrap
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from course.read import FOLDER

TOP = FOLDER.parent
TRACE_PAGE = TOP / "support" / "page.html"  # its colours are those of all pages
QUESTION = "**The question.** "
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)  # how a table is made
CODE = re.compile(rf"""
    (?P<prompt>^(?:>>>|\.\.\.)(?=\s))
    |(?P<string>\"{{3}}.*?\"{{3}}|"[^"\n]*"|'[^'\n]*')
    |(?P<comment>\#[^\n]*)
    |\b(?P<keyword>{"|".join(keyword.kwlist)})\b""", re.VERBOSE | re.MULTILINE | re.DOTALL)

MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable("table")
TEMPLATES = Environment(loader=FileSystemLoader(FOLDER / "templates"), autoescape=True,
                        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def lessons() -> list[Path]:
    return sorted(FOLDER.glob("[0-9]*.md"))


def name_of(lesson: Path) -> str:
    """The name of a lesson's file without its number."""
    return lesson.stem.lstrip("0123456789_")


class Document:
    """A Markdown file: its tokens, with an `id` for each heading, and its title."""

    def __init__(self, path: Path):
        self.path, self.tokens = path, MARKDOWN.parse(path.read_text(encoding="utf-8"))
        anchors = set()
        for token, inline in zip(self.tokens, self.tokens[1:]):
            if token.type == "heading_open":
                token.attrSet("id", new_anchor(inline.content, anchors))
        self.title = self.sections()[0][0]

    @property
    def question(self) -> str:
        """The question of a lesson, as HTML, without its label."""
        (text,) = (token.content for token in self.tokens if token.content.startswith(QUESTION))
        return MARKDOWN.renderInline(text.removeprefix(QUESTION))

    def sections(self) -> list[tuple]:
        """(heading, its id, its tokens) of each part, each with the tokens of its heading."""
        starts = [i for i, token in enumerate(self.tokens) if token.type == "heading_open"]
        return [(self.tokens[start + 1].content, self.tokens[start].attrGet("id"),
                 self.tokens[start:end])
                for start, end in zip(starts, [*starts[1:], len(self.tokens)])]


def new_anchor(heading: str, taken: set) -> str:
    """As GitHub makes it: lower case, no punctuation, hyphens for blanks, a number if taken."""
    plain = anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    number = 0
    while anchor in taken:
        number += 1
        anchor = f"{plain}-{number}"
    taken.add(anchor)
    return anchor


def render(tokens: list) -> str:
    return MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})


def coloured(code: str) -> str:
    """Python as HTML, its comments, strings, keywords and prompts as elements of these classes."""
    parts, end = [], 0
    for part in CODE.finditer(code):
        parts += [escape(code[end : part.start()]),
                  f'<span class="{part.lastgroup}">{escape(part[0])}</span>']
        end = part.end()
    return "".join(parts) + escape(code[end:])


def fence(renderer, tokens, i, options, env) -> str:
    """A block of code. One marked `include` becomes the source of the functions that it names."""
    token = tokens[i]
    if token.info == "include":
        return "".join(map(source, token.content.split()))
    code = coloured(token.content) if token.info == "python" else escape(token.content)
    if token.info == "console":
        code = re.sub(r"^\$", '<span class="prompt">$</span>', code, flags=re.MULTILINE)
    return f"<pre><code>{code}</code></pre>\n"


def source(name: str) -> str:
    """The source of `cache.LayerCache.seal`, below a link to its line: `/cache.py#L210`."""
    found = pkgutil.resolve_name(name)
    lines, first = inspect.getsourcelines(found)
    file = Path(inspect.getsourcefile(found)).relative_to(TOP).as_posix()
    code = coloured(textwrap.dedent("".join(lines)))
    return (f'<figure><figcaption><a href="/{file}#L{first}">{name}</a></figcaption>'
            f"<pre><code>{code}</code></pre></figure>\n")


def colours() -> str:
    """The rule of a style sheet that names the colours of the recorded pages."""
    return re.search(r":root \{.*?\}", TRACE_PAGE.read_text(encoding="utf-8"), re.DOTALL)[0]


MARKDOWN.add_render_rule("fence", fence)
MARKDOWN.add_render_rule(
    "html_block", lambda renderer, tokens, i, *_: COMMENT.sub("", tokens[i].content))
MARKDOWN.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
MARKDOWN.add_render_rule("table_close", lambda *_: "</table></div>\n")

"""Write the course as a folder of plain pages: `python -m course.site mine/site`.

Open `index.html` there in a browser: it needs no server and no network. The folder has the files of
this tree at the same places, each as a page: the Markdown files of the course, and what their links
lead to. A folder that this program has written is written over. Another one must be empty.
"""

import argparse
import json
import re
import shutil
import sys
from html import escape
from pathlib import Path
from urllib.parse import unquote

from course import slides
from course.pages import FOLDER, TEMPLATES, TOP, Document, coloured, colours, lessons, render

MARK = '<meta name="generator" content="course.site">'  # in each page
SOURCES = (".py", ".sh", ".txt", ".patch")  # shown with numbered lines; other files are copied
LINK = re.compile(r'(href|src|srcset)="([^"]+)"')


def place_of(path: Path) -> Path:
    """Where the page of a file or folder of the tree is, in the site's folder."""
    place = path.relative_to(TOP)
    if path.is_dir():
        return place / "index.html"
    if path.suffix == ".md":
        return place.with_suffix(".html")
    return place.with_name(f"{place.name}.html") if path.suffix in SOURCES else place


def up(place: Path) -> str:
    """The way from a page of the site to the site's folder."""
    return "../" * (len(place.parts) - 1)


class Site:
    """Writes pages into the folder `out`. What a link leads to is put on the list `todo`."""

    def __init__(self, out: Path):
        self.out, self.name = out, Document(TOP / "README.md").title
        self.documents = {path: Document(path) for path in sorted(FOLDER.glob("*.md"))}
        self.recorded = sorted(FOLDER.glob("trace/*.html"))
        self.todo = [*self.documents, *self.recorded]

    def write(self):
        self.write_start(FOLDER / "README.md")
        for path in self.todo:  # it becomes longer meanwhile
            if path.is_dir():
                self.write_page(path, path.name, folder(path))
            elif path.suffix == ".md":
                self.write_document(path)
            elif path.suffix in SOURCES:
                self.write_page(path, path.name, numbered(path))
            else:
                self.file(place_of(path)).write_bytes(path.read_bytes())
        self.file(Path("slides.html")).write_text(slides.deck(), encoding="utf-8")
        self.fill("site.css", Path("site.css"), colours=colours())
        self.fill("search.js", Path("search.js"), sections=self.searched())
        shutil.copy(FOLDER / "templates" / "site.js", self.out)

    def write_start(self, course: Path):
        """The first page: the first paragraph of the course's README, and all lessons."""
        tokens = self.documents[course].tokens
        types = [token.type for token in tokens]
        intro = render(tokens[types.index("paragraph_open") : types.index("paragraph_close") + 1])
        place = Path("index.html")
        self.fill("start.html", place, path=None, title=self.name,
                  intro=self.linked(course, intro, place))

    def write_document(self, path: Path):
        document = self.documents.get(path) or Document(path)
        near = [None, *(self.documents[lesson] for lesson in lessons()), None]
        before = after = None
        if document in near:
            at = near.index(document)
            before, after = near[at - 1], near[at + 1]
        self.write_page(path, document.title, render(document.tokens), before=before, after=after,
                        sections=document.sections()[1:])

    def write_page(self, path: Path, title: str, body: str, **values):
        values = {"sections": [], "before": None, "after": None} | values
        place = place_of(path)
        self.fill("page.html", place, title=title, body=self.linked(path, body, place), path=path,
                  **values)

    def linked(self, page: Path, html: str, place: Path) -> str:
        """HTML of a page of the tree with the links that it needs at a place of the site."""
        def link(match):
            if match[2].startswith(("https:", "http:")):
                return match[0]
            path, anchor = self.followed(page, match[2])
            return f'{match[1]}="{up(place)}{place_of(path).as_posix()}{anchor}"'

        return LINK.sub(link, html)

    def followed(self, page: Path, href: str) -> tuple[Path, str]:
        """The file that a link of a page leads to, and the rest of the link. A link that begins
        with / starts at the top of the tree. ValueError if it leads to no file of the tree."""
        name, sharp, anchor = unquote(href).partition("#")
        path = (TOP / name[1:] if name.startswith("/") else page.parent / name).resolve()
        path = path if name else page
        if not path.is_relative_to(TOP) or not path.exists():
            raise ValueError(f"{page.relative_to(TOP)} has a link to {href}, which is not there")
        if path not in self.todo:
            self.todo.append(path)
        return path, sharp + anchor

    def fill(self, template: str, place: Path, **values):
        """Write a file of the site from a template."""
        others = [self.documents[path] for path in self.documents if path not in lessons()]
        values |= {"name": self.name, "mark": MARK, "up": up(place), "place_of": place_of,
                   "lessons": [self.documents[path] for path in lessons()], "others": others,
                   "recorded": self.recorded}
        text = TEMPLATES.get_template(template).render(values)
        self.file(place).write_text(text, encoding="utf-8")

    def file(self, place: Path) -> Path:
        """A file of the site, in a folder that is there."""
        (self.out / place).parent.mkdir(parents=True, exist_ok=True)
        return self.out / place

    def searched(self) -> str:
        """The text of each section of the course, as JSON."""
        return json.dumps([
            {"page": place_of(path).as_posix(), "title": document.title, "anchor": anchor,
             "heading": heading, "text": plain_text(tokens)}
            for path, document in self.documents.items()
            for heading, anchor, tokens in document.sections()], ensure_ascii=False)


def plain_text(tokens: list) -> str:
    """What a reader sees of a section's tokens, without the heading and in one line."""
    texts = []
    for token in tokens[3:]:
        for part in token.children or [token]:
            if part.type in ("html_block", "html_inline"):
                texts.append(re.sub("<[^>]*>", " ", part.content))
            elif part.type != "image":
                texts.append(" " if part.type == "softbreak" else part.content)
        texts.append(" ")
    return " ".join("".join(texts).split())


def numbered(path: Path) -> str:
    """A source file, its lines with the anchors L1, L2, …"""
    text = path.read_text(encoding="utf-8")
    code = coloured(text) if path.suffix == ".py" else escape(text)
    lines = "\n".join(f'<i id="L{number}"></i>{line}'
                      for number, line in enumerate(code.removesuffix("\n").split("\n"), 1))
    return (f"<h1>{path.relative_to(TOP).as_posix()}</h1>\n"
            f'<pre class="lines"><code>{lines}</code></pre>\n')


def folder(path: Path) -> str:
    """The files of a folder."""
    place = path.relative_to(TOP).as_posix()
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    items = "".join(f'<li><a href="/{place}/{name}">{name}</a></li>\n' for name in names)
    return f"<h1>{place}</h1>\n<ul>\n{items}</ul>\n"


def check_empty(out: Path):
    """ValueError if the folder has files, and is no site."""
    start = out / "index.html"
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder")
    is_site = start.is_file() and MARK in start.read_text(encoding="utf-8", errors="replace")
    if out.exists() and any(out.iterdir()) and not is_site:
        raise ValueError(f"{out} is not empty, and not a site that this program has written")


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(prog="course.site", description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="a folder, which is made")
    out = parser.parse_args(arguments).out
    try:
        check_empty(out)
        Site(out).write()
    except (ValueError, OSError) as error:
        print(f"course.site: {error}", file=sys.stderr)
        return 2
    print(f"open {out / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

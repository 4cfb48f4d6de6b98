"""Small SVG pictures for the lessons: boxes, texts, lines. Each has its colours for light and dark
pages in itself, and its own background, so it can be read wherever it is shown.

One unit is one pixel, y grows downwards, and a text's y is its baseline.
"""

import sys
from html import escape
from pathlib import Path

COLOURS = {  # light and dark; the named ones are told apart by the colour-blind as well
    "page": ("#ffffff", "#0d1117"), "ink": ("#1f2328", "#f0f6fc"), "quiet": ("#59636e", "#a5afba"),
    "line": ("#818b98", "#7d8590"), "pale": ("#e7eaee", "#262c36"),
    "blue": ("#0072b2", "#3d9bdb"), "sky": ("#56b4e9", "#7cc7f0"), "orange": ("#e69f00", "#f0b429"),
    "pink": ("#cc79a7", "#d98fb8"), "green": ("#009e73", "#2bb98f"),
}
SIZES = {"title": (15, 700), "plain": (13, 400), "bold": (13, 700), "small": (11, 400)}
FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif"


class Picture:
    """Colours are names in COLOURS, sizes of texts names in SIZES."""

    def __init__(self, width: int, height: int):
        self.size, self.shapes = (width, height), []
        self.box(0, 0, width, height, "page", radius=8)

    def text(self, x, y, words, size="plain", colour="ink", align="start"):
        """`align` says where in the text x is: start, middle or end."""
        pixels, weight = SIZES[size]
        anchor = "" if align == "start" else f' text-anchor="{align}"'
        self.shapes.append(f'<text class="{colour}" x="{x:g}" y="{y:g}" font-size="{pixels}"'
                           f' font-weight="{weight}"{anchor}>{escape(str(words))}</text>')

    def box(self, x, y, width, height, colour, radius=2, opacity=1, outline=False):
        kind = "outline " if outline else ""
        pale = "" if opacity == 1 else f' opacity="{opacity:g}"'
        self.shapes.append(f'<rect class="{kind}{colour}" x="{x:g}" y="{y:g}" width="{width:g}"'
                           f' height="{height:g}" rx="{radius}"{pale}/>')

    def circle(self, x, y, radius, colour, opacity=1, outline=False):
        kind = "outline " if outline else ""
        pale = "" if opacity == 1 else f' opacity="{opacity:g}"'
        self.shapes.append(f'<circle class="{kind}{colour}" cx="{x:g}" cy="{y:g}" r="{radius:g}"'
                           f'{pale}/>')

    def line(self, *points, colour="line", arrow=False, dashed=False):
        """Through the points (x, y), with an arrow head at the last if `arrow`."""
        places = " ".join(f"{x:g},{y:g}" for x, y in points)
        more = ' marker-end="url(#head)"' if arrow else ""
        more += ' stroke-dasharray="4 3"' if dashed else ""
        self.shapes.append(f'<polyline class="outline {colour}" points="{places}"{more}/>')

    def svg(self) -> str:
        width, height = self.size
        light, dark = ("".join(f".{name}{{fill:{both[i]}}}.outline.{name}{{fill:none;"
                               f"stroke:{both[i]}}}" for name, both in COLOURS.items())
                       for i in (0, 1))
        return "\n".join([
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"'
            f' viewBox="0 0 {width} {height}" font-family="{FONT}">',
            f"<style>.outline{{stroke-width:1.5}}{light}"
            f"@media(prefers-color-scheme:dark){{{dark}}}</style>",
            '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7"'
            ' orient="auto"><path class="line" d="M0 0L8 4L0 8z"/></marker>',
            *self.shapes, "</svg>\n"])

    def save(self, name: str):
        """Write NAME.svg into the folder that the command line names, or beside this file."""
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
        if not folder.is_dir():
            sys.exit(f"{folder} is not a folder")
        (folder / f"{name}.svg").write_text(self.svg(), encoding="utf-8")
        print(f"{folder / name}.svg is written")

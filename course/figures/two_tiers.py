"""The two tiers of SentenceKV and what moves between them, for light and for dark pages.

    python course/figures/two_tiers.py

writes two_tiers_light.svg and two_tiers_dark.svg beside this file. One unit is one pixel of a
picture 830 pixels wide, y grows downwards, and a text's y is its baseline.
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, PathPatch
from matplotlib.path import Path as Outline

WIDTH, HEIGHT = 830, 612
PALETTES = {  # `tint`: how opaque the colours under a text are
    "light": {"ink": "#1f2328", "quiet": "#59636e", "line": "#818b98", "tier": "#818b981c",
              "sheet": "#f6f8fa", "tint": 0.3},
    "dark": {"ink": "#f0f6fc", "quiet": "#a5afba", "line": "#7d8590", "tier": "#9198a122",
             "sheet": "#151b23", "tint": 0.45},
}
STYLES = {"title": (14.5, "bold", "ink"), "name": (12.5, "bold", "ink"),  # size, weight, colour
          "plain": (12.5, "normal", "ink"), "small": (11.5, "normal", "ink"),
          "quiet": (11.5, "normal", "quiet")}
SKY, BLUE, ORANGE, PINK, WINE, GREY = (  # told apart by the colour-blind as well
    "#56b4e9", "#0072b2", "#e69f00", "#cc79a7", "#aa4499", "#8b949e")
SENTENCES = [  # x and y of the text, the text, tokens, colour, score
    (16, 32, "In March, 1845, I borrowed an axe.", 10, SKY, 0.20),
    (16, 55, "The ice was not yet dissolved.", 7, GREY, 0.10),
    (16, 78, "I bought the shanty of James Collins.", 8, BLUE, 1.00),
    (16, 101, "The roof was the soundest part.", 7, GREY, 0.38),
    (286, 32, "The boards cost me $8.03½.", 6, ORANGE, 0.80),
    (286, 55, "I made no haste in my work.", 8, GREY, 0.15),
    (286, 78, "What did the boards cost?", 6, GREY, 0.45),
    (556, 32, "The boards cost $8.03½.", 5, PINK, 0.50),
    (556, 55, "They came from …", 3, WINE, None),  # being written: not on the host, no vector
]
SELECTED = (BLUE, ORANGE)
SLOTS = [(300, 8, BLUE), (428, 6, ORANGE), (538, 4, SKY), (616, 5, PINK), (696, 3, WINE)]
HOST, CELL, GAP = 112, 9.6, 8  # where the host's rows begin, and how wide they are
TEXTS = [
    (16, 22, "title", "Prompt"), (556, 22, "title", "Answer"),
    (214, 144, "name", "prefill"), (768, 144, "name", "decode", "right"),
    (22, 180, "title", "Device (GPU)"), (22, 238, "plain", "scores"),
    (22, 261, "plain", "sentence vectors"), (22, 279, "quiet", "the mean key, in each"),
    (22, 294, "quiet", "layer and KV head"), (197, 380, "small", "layer 1, 2, 3, …", "center"),
    (768, 186, "name", "query × vectors → scores", "right"), (778, 261, "small", "q", "center"),
    (490, 288, "name", "select"),
    (490, 303, "quiet", "the best sentences, until the token budget is full"),
    (350, 338, "small", "selected rows"), (538, 338, "small", "sink tokens"),
    (616, 338, "small", "recent window"), (338, 379, "quiet", "were missing"),
    (428, 379, "quiet", "on the device already"),
    (338, 404, "plain", "token budget: attention reads only these rows"),
    (214, 452, "name", "offload"), (214, 467, "quiet", "layer by layer,"),
    (214, 482, "quiet", "all keys and values"), (337, 452, "name", "load"),
    (337, 467, "quiet", "only the missing rows"), (672, 452, "name", "seal", "right"),
    (672, 467, "quiet", "a finished sentence,", "right"),
    (672, 482, "quiet", "which gets a vector too", "right"),
    (22, 518, "title", "Host (CPU memory)"),
    (22, 544, "plain", "keys"), (22, 558, "plain", "values"),
    (22, 598, "quiet", "in each layer, the rows of all tokens: a block for each sentence"),
]
ARROWS = [  # from x, y to x, y
    (204, 128, 204, 324), (159, 326, 159, 271), (204, 388, 204, 528),  # prefill, mean key, offload
    (778, 78, 778, 243), (763, 257, 706, 257),  # decode: the query, and to the vectors
    (328, 271, 328, 341), (479, 271, 479, 341),  # select
    (328, 528, 328, 367), (682, 367, 682, 528),  # load, seal
]


def text(axes, palette, x, y, style, words, align="left"):
    size, weight, colour = STYLES[style]
    axes.text(x, y, words, size=size * 0.75, weight=weight, color=palette[colour], ha=align,
              va="baseline")  # so no coordinate depends on the fonts of this machine


def box(axes, x, y, width, height, colour, alpha=None, edge="none", radius=4.0):
    axes.add_patch(FancyBboxPatch(
        (x, y), width, height, boxstyle=f"round,pad=0,rounding_size={radius}", facecolor=colour,
        alpha=alpha, edgecolor=edge, linewidth=0.9, clip_on=False))


def rows(axes, x, y, n, colour, width=16.0, height=18.0, alpha=1.0):
    """Cells side by side, one for each token."""
    cells = []
    for left in (x + i * width for i in range(n)):
        right, top = left + width - 1.5, y + height
        corners = [(left, y), (right, y), (right, top), (left, top), (left, y)]
        cells.append(Outline(corners, closed=True))
    axes.add_patch(PathPatch(Outline.make_compound_path(*cells), facecolor=colour, alpha=alpha,
                             edgecolor="none", clip_on=False))


def draw_sentence(axes, palette, number, start, sentence):
    """Its text; if it is finished also its score, its vector, and its block on the host."""
    x, y, words, n, colour, score = sentence
    box(axes, x, y, 262 if x < 500 else 258, 19, colour, palette["tint"])
    text(axes, palette, x + 8, y + 14, "quiet", f"{number}")
    text(axes, palette, x + 24, y + 14, "plain", words)
    if score is None:
        return
    centre, chosen = start + (n * CELL - 1.5) / 2, colour in SELECTED
    box(axes, centre - 11, 242 - 44 * score, 22, 44 * score,
        colour if chosen else palette["line"], 1 if chosen else 0.5, radius=0)
    box(axes, centre - 11, 247, 22, 20, colour, 0.45, edge=colour if chosen else "none")
    for y in (534, 548):
        rows(axes, start, y, n, colour, CELL, 12, 0.6 if colour == GREY else 1)
    for y in (261, 577):
        text(axes, palette, centre, y, "small", f"{number}", "center")
    if x < 500:  # of the prompt: in a small copy on the sheet of a layer
        for y in (350, 358):
            rows(axes, 143 + 0.2 * (start - HOST), y, 1, colour, 0.2 * CELL * n, 6)


def draw(palette: dict) -> Figure:
    figure = Figure(figsize=(WIDTH / 96, HEIGHT / 96))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.axis("off")
    box(axes, 8, 156, 814, 270, palette["tier"], radius=8)
    box(axes, 8, 494, 814, 112, palette["tier"], radius=8)
    box(axes, 290, 318, 464, 98, "none", edge=palette["line"], radius=6)  # the token budget
    box(axes, 767, 247, 22, 20, WINE, 0.45, edge=WINE)  # the query
    for shift in (12, 6, 0):
        box(axes, 136 + shift, 340 - shift, 122, 46, palette["sheet"], edge=palette["line"])
    start = HOST
    for number, sentence in enumerate(SENTENCES, 1):
        draw_sentence(axes, palette, number, start, sentence)
        start += CELL * sentence[3] + GAP
    for x, n, colour in SLOTS:
        rows(axes, x, 345, n, colour)
    for words in TEXTS:
        text(axes, palette, *words)
    for x, y, to_x, to_y in ARROWS:
        axes.annotate("", (to_x, to_y), (x, y), arrowprops={
            "arrowstyle": "-|>,head_width=0.25,head_length=0.5", "color": palette["ink"],
            "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0})
    return figure


def save(folder: Path):
    """Write both pictures: the same bytes wherever Matplotlib's version is the same."""
    settings = {"svg.fonttype": "none", "svg.hashsalt": "two tiers", "font.family": "sans-serif",
                "font.sans-serif": ["Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"]}
    with matplotlib.rc_context(settings):
        for name, palette in PALETTES.items():
            draw(palette).savefig(folder / f"two_tiers_{name}.svg", transparent=True,
                                  metadata={"Date": None})


if __name__ == "__main__":
    save(Path(__file__).parent)

"""What a token attends to before and after a seal: `python -m course.figures.seal`."""

from itertools import pairwise

from cache import LayerCache
from course.exercises.cases import sealing_cache, take
from course.figures.draw import Picture

KINDS = {"sink": "blue", "available": "sky", "recent": "orange"}
CELL, LEFT = 24, 26


def kind(cache, row: int) -> str:
    """What a row of the first head is for the next token. Place 0 of the table is the sinks."""
    plan, layer = cache.plan, cache.layers[0]
    ends = plan.select_end.clamp(layer.starts, layer.ends)[0].tolist()  # of what is available
    for place, (start, end) in enumerate(zip(layer.starts[0].tolist(), ends)):
        if start <= row < end:
            return "sink" if place == 0 else "available"
    return "recent"


def time_line(picture: Picture, y: int, title: str, cache):
    picture.text(LEFT, y, title, "bold")
    plan, x = cache.plan, lambda row: LEFT + row * CELL
    n = plan.n_rows + 1
    for name, colour in KINDS.items():
        here = [row for row in range(n) if kind(cache, row) == name]
        assert here == [*range(here[0], here[-1] + 1)]
        picture.box(x(here[0]), y + 12, len(here) * CELL - 3, 34, colour, opacity=0.55)
    picture.box(x(n - 1), y + 12, CELL - 3, 34, "ink", outline=True)
    ends = [0, *cache.layers[0].ends[0, 1 : plan.n_places].tolist(), n]
    for row in sorted({*ends[:-1], plan.n_first_sinks, *range(20, n)}):
        picture.text(x(row) + CELL / 2 - 1.5, y + 34, row, "small", align="middle")
    for sentence, (start, end) in enumerate(pairwise(ends)):
        a, b = x(start), x(end) - 3
        picture.line((a, y + 52), (a, y + 57), (b, y + 57), (b, y + 52))
        picture.text((a + b) / 2, y + 71, "open" if end == n else f"sentence {sentence}", "small",
                     align="middle")


def draw() -> Picture:
    picture = Picture(700, 278)
    cache = sealing_cache(LayerCache, [(0, 5), (5, 12), (12, 20)])  # nothing is dropped
    take(cache, 20, "prefill")
    for _ in range(6):
        take(cache, 1, "decode")
    picture.text(LEFT, 30, "the sentence is sealed, and the window moves", "title")
    time_line(picture, 60, "before the seal", cache)
    cache.seal(5)
    time_line(picture, 160, "after it", cache)
    for x, name, words in ((26, "sink", "sink"), (96, "available", "can be selected"),
                           (226, "recent", "window and open sentence")):
        picture.box(x, 254, 12, 12, KINDS[name], opacity=0.55)
        picture.text(x + 18, 264, words, "small")
    picture.text(420, 264, "framed: the next token, not yet decoded", "small", "quiet")
    return picture


if __name__ == "__main__":
    draw().save("seal")

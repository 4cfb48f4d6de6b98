"""What a token attends to before and after a seal: `python -m course.figures.seal`."""

from itertools import pairwise

import torch

from cache import SentenceKVCache
from course.exercises.cases import TINY, random
from course.figures.draw import Picture
from sentencekv import SentenceKVConfig

CONFIG = SentenceKVConfig(token_budget=24, sink_tokens=2, secondary_sinks=0, recent_window=4)
KINDS = {"sink": "blue", "retrievable": "sky", "recent": "orange"}
CELL, LEFT = 24, 26


def step(cache, n_tokens: int, function, layers):
    for layer in layers:
        function(layer, *(random(heads, heads, n_tokens, 4) for heads in (4, 2, 2)))
    cache.advance(n_tokens)


def kind(cache, position: int) -> str:
    """Here the rows are the positions: nothing is dropped, and there are no secondary sinks."""
    starts, n_rows = (x[0, 0].tolist() for x in (cache.table.starts, cache.table.n_retrievable))
    if any(start <= position < start + n for start, n in zip(starts, n_rows)):
        return "retrievable"
    return "sink" if position < cache.n_sinks else "recent"


def time_line(picture: Picture, y: int, title: str, cache):
    picture.text(LEFT, y, title, "bold")
    n, x = cache.num_tokens + 1, lambda position: LEFT + position * CELL
    for name, colour in KINDS.items():
        here = [p for p in range(n) if kind(cache, p) == name]
        assert here == [*range(here[0], here[-1] + 1)]
        picture.box(x(here[0]), y + 12, len(here) * CELL - 3, 34, colour, opacity=0.55)
    picture.box(x(n - 1), y + 12, CELL - 3, 34, "ink", outline=True)
    ends = [*cache.table.bounds[0, 0, : cache.table.n_sentences + 1].tolist(), n]
    for p in sorted({*ends[:-1], cache.n_sinks, *range(20, n)}):
        picture.text(x(p) + CELL / 2 - 1.5, y + 34, p, "small", align="middle")
    for sentence, (start, end) in enumerate(pairwise(ends)):
        a, b = x(start), x(end) - 3
        picture.line((a, y + 52), (a, y + 57), (b, y + 57), (b, y + 52))
        picture.text((a + b) / 2, y + 71, "open" if end == n else f"sentence {sentence}", "small",
                     align="middle")


def draw() -> Picture:
    picture = Picture(700, 278)
    cache = SentenceKVCache(CONFIG, TINY, [(0, 5), (5, 12), (12, 20)], 20, "cpu", torch.float32)
    step(cache, 20, cache.prefill, (0, 1))
    for _ in range(6):
        step(cache, 1, cache.decode, cache.layers)
    picture.text(LEFT, 30, "the sentence is sealed, and the window moves", "title")
    time_line(picture, 60, "before the seal", cache)
    cache.seal(5)
    time_line(picture, 160, "after it", cache)
    for x, name, words in ((26, "sink", "sink"), (96, "retrievable", "retrievable"),
                           (206, "recent", "window and open sentence")):
        picture.box(x, 254, 12, 12, KINDS[name], opacity=0.55)
        picture.text(x + 18, 264, words, "small")
    picture.text(420, 264, "framed: the next token, not yet decoded", "small", "quiet")
    return picture


if __name__ == "__main__":
    draw().save("seal")

"""The tokens, gaps and sentences of lesson 3: `python -m course.figures.spans`."""

from itertools import accumulate

from course.figures.draw import Picture
from segment import GAP, INSIDE, is_end, one_holds, token_spans

PIECES = ["Dr", ".", " Smith", " paid", " $", "3", ".", "5", "0", ".", ' "', "Why", '?"', " he",
          " asked", ".", " He", " left", "!"]  # of the default tokenizer
COLOURS = ["sky", "orange", "pink"]


def answer(before: str, gap: str, after: str) -> str:
    rules = [rule for rule in INSIDE if one_holds([rule], before, after)]
    return "yes" if is_end(before, gap, after) else f"no: {rules[0]}" if rules else "no"


def draw() -> Picture:
    picture, text = Picture(740, 226), "".join(PIECES)
    picture.text(24, 32, "a token is a box, a sentence has one colour", "title")
    widths = [12 + 8 * len(piece) for piece in PIECES]
    places = [24 + x for x in accumulate((width + 4 for width in widths), initial=0)]
    for (start, end), colour in zip(token_spans(PIECES, 128), COLOURS, strict=True):
        for i in range(start, end):
            picture.box(places[i], 54, widths[i], 36, colour, opacity=0.45)
            picture.text(places[i] + widths[i] / 2, 77, PIECES[i].replace(" ", "␣"),
                         align="middle")
    starts = list(accumulate(map(len, PIECES), initial=0))
    for n, gap in enumerate(GAP.finditer(text)):
        x, y = places[starts.index(gap.start())] - 2, 122 + 22 * n
        picture.line((x, 48), (x, y - 13))
        picture.text(x, y, answer(text[: gap.start()], gap[0], text[gap.end() :]),
                     align="middle" if n == 0 else "end")
    picture.text(24, 212, "A line is a gap where is_end is asked, with its answer. ␣ is a space.",
                 "small", "quiet")
    return picture


if __name__ == "__main__":
    draw().save("spans")

"""The sentences of lesson 7 fill a budget of four rows: `python -m course.figures.budget`."""

import torch

from course.figures.draw import Picture
from sentencekv import select_rows

SCORES, AVAILABLE, ROW_BUDGET = [0.1, 0.9, 0.5], [3, 3, 2], 4
COLOURS = ["sky", "blue", "orange"]


def draw() -> Picture:
    picture, cell = Picture(620, 190), 44
    (selected,) = select_rows(torch.tensor([SCORES]), torch.tensor([AVAILABLE]),
                              ROW_BUDGET).tolist()
    ranked = sorted(range(3), key=lambda s: -SCORES[s])
    picture.text(24, 32, "the best sentence first", "title")
    x = 24
    for s in ranked:
        picture.text(x, 62, f"sentence {s}, score {SCORES[s]}")
        for row in range(AVAILABLE[s]):
            chosen = row < selected[s]
            picture.box(x, 72, cell - 3, 40, COLOURS[s], opacity=1 if chosen else 0.3)
            x += cell
        x += 60
    end = 24 + 4 * cell + 60 - 2  # after three rows of one sentence and one of the next
    picture.line((end, 66), (end, 124))
    picture.text(end, 142, "the row budget ends here: 4 rows", align="middle")
    picture.text(24, 172, "pale rows are not selected", colour="quiet")
    return picture


if __name__ == "__main__":
    draw().save("budget")

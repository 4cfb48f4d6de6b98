"""The rows of two heads in lesson 4, and their sentences: `python -m course.figures.rows`."""

import torch

from course.figures.draw import Picture
from sentencekv import order_rows, sentence_bounds

N_TOKENS, ENDS = 10, [4, 7, 10]  # the position after each sentence
KEPT, SECONDARY = [[0, 1, 5, 8, 9], [0, 1, 5, 8, 9]], [5]  # SECONDARY in head 0 only
COLOURS = ["sky", "orange", "pink"]
CELL, LEFT, TEXT_Y, HEAD_Y, HEAD_STEP = 46, 120, 66, 150, 84


def colour(position: int) -> str:
    return COLOURS[sum(position >= end for end in ENDS)]


def cells(picture: Picture, y: int, numbers: list, colours: list):
    for i, (number, name) in enumerate(zip(numbers, colours)):
        picture.box(LEFT + i * CELL, y, CELL - 4, 36, name, opacity=0.6)
        picture.text(LEFT + i * CELL + 21, y + 23, number, align="middle")


def draw() -> Picture:
    picture = Picture(620, 326)
    picture.text(24, 32, "the rows of two heads that keep five of ten tokens", "title")
    picture.text(24, TEXT_Y + 23, "the text", "bold")
    cells(picture, TEXT_Y, range(N_TOKENS), [colour(i) for i in range(N_TOKENS)])
    secondary = torch.zeros(2, N_TOKENS, dtype=torch.bool)
    secondary[0, SECONDARY] = True
    positions, marked = order_rows(torch.tensor(KEPT), secondary)
    for head, bounds in enumerate(sentence_bounds(marked, torch.tensor(ENDS)).tolist()):
        y = HEAD_Y + HEAD_STEP * head
        picture.text(24, y + 23, f"KV head {head}", "bold")
        cells(picture, y, positions[head].tolist(),
              ["pale" if mark < 0 else colour(mark) for mark in marked[head].tolist()])
        for row in range(len(KEPT[head])):
            picture.text(LEFT + row * CELL + 21, y + 50, f"row {row}", "small", "quiet", "middle")
        picture.text(LEFT + 5 * CELL + 24, y + 23,
                     f"bounds {', '.join(map(str, bounds))}")
    picture.text(24, 310, "A number in a box is a position in the text. The grey box is a secondary"
                 " sink.", "small", "quiet")
    return picture


if __name__ == "__main__":
    draw().save("rows")

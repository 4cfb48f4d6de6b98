"""The slots of lesson 8 before and after a step: `python -m course.figures.slots`."""

import torch

from cache import assign_slots
from course.figures.draw import Picture

ROWS, PLACES = [5, 8, 4], [0, 1, 0]  # of the slots before the step
STARTS, RESIDENT, SELECTED = [4, 8, 12], [2, 1, 0], [0, 2, 1]  # of the places
COLOURS, HOST = ["sky", "orange", "pink"], range(4, 15)
CELL, LEFT, RIGHT, TOP, BOTTOM = 46, 92, 412, 86, 232


def slots(picture: Picture, x: int, title: str, rows: list, places: list):
    picture.text(x, 62, title, "bold")
    for slot, (row, place) in enumerate(zip(rows, places)):
        picture.box(x + slot * CELL, TOP, CELL - 4, 40, COLOURS[place], opacity=0.6)
        picture.text(x + slot * CELL + 21, TOP + 25, row, align="middle")
        picture.text(x + slot * CELL + 21, TOP - 6, f"slot {slot}", "small", "quiet", "middle")


def draw() -> Picture:
    picture, stays = Picture(700, 322), RIGHT + CELL + 21
    after, places_after, missing = (result[0].tolist() for result in assign_slots(
        *(torch.tensor([numbers]) for numbers in (ROWS, PLACES, STARTS, RESIDENT, SELECTED))))
    picture.text(24, 32, "only the rows that are missing move", "title")
    picture.text(24, TOP + 25, "device", "bold")
    slots(picture, LEFT, "before the step", ROWS, PLACES)
    slots(picture, RIGHT, "after it", after, places_after)
    picture.line((LEFT + 3 * CELL + 12, TOP + 20), (RIGHT - 20, TOP + 20), arrow=True)
    picture.text((LEFT + 3 * CELL + RIGHT) / 2 - 4, TOP + 12, "one decode step", "small", "quiet",
                 "middle")
    picture.text(stays, TOP + 60, "stays", "small", "quiet", "middle")
    picture.text(24, BOTTOM + 25, "host", "bold")
    for i, row in enumerate(HOST):
        place = sum(row >= start for start in STARTS) - 1
        wanted = row < STARTS[place] + SELECTED[place]
        x = LEFT + i * CELL
        picture.box(x, BOTTOM, CELL - 4, 40, COLOURS[place], opacity=0.6 if wanted else 0.2)
        picture.text(x + 21, BOTTOM + 25, row, align="middle")
        if row in STARTS:
            picture.text(x, BOTTOM + 58, f"place {place}", "small")
        for slot in (s for s in range(3) if missing[s] and after[s] == row):
            picture.line((x + 21, BOTTOM - 4), (RIGHT + slot * CELL + 21, TOP + 46), arrow=True)
    picture.text(24, 308, "A number is a row. Pale rows are not selected. Arrows from the host are "
                 "loads.", "small", "quiet")
    return picture


if __name__ == "__main__":
    draw().save("slots")

"""What the tests of lesson 10 compare: `python -m course.figures.oracles`."""

from course.figures.draw import Picture

LEFT, MIDDLE, RIGHT, WIDTH, HEIGHT = 24, 264, 504, 184, 50
BOXES = {  # x, y, colour, two lines
    "other": (LEFT, 56, "pale", "another implementation,", "its recorded output"),
    "full": (MIDDLE, 56, "sky", "full cache,", "token by token"),
    "forward": (RIGHT, 56, "pale", "full cache,", "one forward over all tokens"),
    "all": (MIDDLE, 142, "orange", "SentenceKV,", "a budget for everything"),
    "small": (MIDDLE, 228, "orange", "SentenceKV,", "a small budget"),
    "resident": (LEFT, 228, "pale", "every row on the device,", "every slot filled anew"),
    "slow": (RIGHT, 228, "pale", "SlowSentenceKV,", "the method in loops"),
    "stream": (MIDDLE, 314, "pink", "sentences,", "piece by piece"),
    "text": (RIGHT, 314, "pale", "sentences,", "of the whole text"),
}
BESIDE = [("other", "full", "6"), ("full", "forward", "1"), ("resident", "small", "3, 4"),
          ("small", "slow", "7"), ("stream", "text", "5")]


def draw() -> Picture:
    picture = Picture(712, 416)
    picture.text(24, 32, "two ways to one result", "title")
    for x, y, colour, *lines in BOXES.values():
        picture.box(x, y, WIDTH, HEIGHT, colour, 6, 1 if colour == "pale" else 0.4)
        for i, line in enumerate(lines):
            picture.text(x + WIDTH / 2, y + 21 + 18 * i, line, align="middle")
    for one, other, number in BESIDE:
        x, y = BOXES[one][0] + WIDTH, BOXES[one][1] + HEIGHT / 2
        picture.line((x, y), (BOXES[other][0], y), colour="ink")
        picture.text((x + BOXES[other][0]) / 2, y - 8, number, "bold", align="middle")
    x, y = MIDDLE + WIDTH / 2, BOXES["full"][1] + HEIGHT
    picture.line((x, y), (x, BOXES["all"][1]), colour="ink")
    picture.text(x + 10, y + 23, "2", "bold")
    picture.text(24, 396, "A line is an equality, with the number of its test in the table.",
                 "small", "quiet")
    return picture


if __name__ == "__main__":
    draw().save("oracles")

"""How much of a key the mean of lesson 5 keeps: `python -m course.figures.mean_of_turns`."""

import math

import torch

from benchmarks.speed import CONFIGS
from course.figures.draw import Picture
from model import apply_rope, rope_frequencies, rope_table
from sentencekv import sentence_vectors
from weights.config import parse_config

DEFAULT = parse_config(CONFIGS["smollm2-135m"])
PAIRS = DEFAULT.head_dim // 2
COLOURS = {4: "blue", 16: "orange", 128: "pink"}  # of the numbers of positions
LEFT, STEP, TOP, HEIGHT = 64, 18.5, 134, 180


def kept(n: int) -> torch.Tensor:
    """Length of the mean key in each pair (D/2,), for n equal keys of length 1 in each pair."""
    keys = torch.cat((torch.ones(1, n, PAIRS), torch.zeros(1, n, PAIRS)), dim=-1)
    keys = apply_rope(keys, *rope_table(DEFAULT, torch.arange(n), torch.float32))
    vectors, _ = sentence_vectors(keys, torch.tensor([[0, n]]))
    return vectors.view(2, PAIRS).norm(dim=0)


def draw() -> Picture:
    picture, bottom, right = Picture(700, 376), TOP + HEIGHT, LEFT + STEP * PAIRS
    picture.text(24, 32, "the mean of equal keys keeps the pairs that turn slowly", "title")
    picture.box(LEFT, TOP, right - LEFT, HEIGHT, "pale", radius=0)
    picture.text(24, 118, "length of the mean, of the length of one key", "small", "quiet")
    for percent in (0, 50, 100):
        picture.text(LEFT - 8, bottom - HEIGHT * percent / 100 + 4, f"{percent}%", "small",
                     align="end")
    for i, (n, colour) in enumerate(COLOURS.items()):
        lengths = kept(n)
        picture.line(*((LEFT + STEP * (pair + 0.5), round(bottom - HEIGHT * length, 1))
                       for pair, length in enumerate(lengths.tolist())), colour=colour)
        x = 31 + 215 * i
        picture.circle(x, 58, 5, colour)
        picture.text(x + 12, 63, f"{n} positions", "bold")
        picture.text(x + 12, 83, f"the whole key: {lengths.square().mean().sqrt():.0%}")
    for pair in (0, 10, 20, PAIRS - 1):
        x, turn = LEFT + STEP * (pair + 0.5), 2 * math.pi / rope_frequencies(DEFAULT, "cpu")[pair]
        picture.text(x, bottom + 18, f"pair {pair}", "small", align="middle")
        picture.text(x, bottom + 34, f"{turn:,.{0 if turn > 10 else 1}f}", "small", align="middle")
    picture.text(24, bottom + 52, "Under each pair: the number of positions in which it turns"
                 " once.", "small", "quiet")
    return picture


if __name__ == "__main__":
    draw().save("mean_of_turns")

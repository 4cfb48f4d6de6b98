"""The two sentences of lesson 6 with the same mean: `python -m course.figures.two_scores`."""

import torch

from course.figures.draw import Picture
from sentencekv import gaussian, mean_query, sentence_vectors

LOGITS = [[2.0, 2.0], [6.0, -2.0]]  # of the keys of two sentences
KEYS, QUERY = torch.tensor(LOGITS).view(1, 4, 1), torch.ones(1, 1, 1)  # D is 1, so √D is 1, too
COLOURS = ["sky", "orange"]


def place(logit: float) -> float:
    return 150 + 38 * (logit + 3)


def mark(picture: Picture, logit: float, y: int, up: int, words: str, colour="ink"):
    """A line from the axis at y up to a text, or down if `up` is negative."""
    picture.line((place(logit), y), (place(logit), y - up), colour=colour)
    picture.text(place(logit), y - up + (-6 if up > 0 else 15), words, align="middle")


def draw() -> Picture:
    picture = Picture(740, 346)
    vectors, variances = sentence_vectors(KEYS, torch.tensor([[0, 2, 4]]))
    lengths = torch.tensor([[2, 2]])
    means = mean_query(QUERY, vectors, variances, lengths)[0].tolist()
    shares = (2 * gaussian(QUERY, vectors, variances, lengths))[0].tolist()  # of two tokens
    exact = KEYS.flatten().softmax(dim=0).view(2, 2).sum(dim=-1).tolist()
    picture.text(24, 32, "two sentences with the same mean logit", "title")
    for s, colour in enumerate(COLOURS):
        y, logits = 106 + 114 * s, torch.tensor(LOGITS[s])
        picture.text(24, y - 8, f"sentence {s}", "bold")
        picture.text(24, y + 10, f"attention {exact[s]:.1%}")
        picture.line((place(-3), y), (place(11.5), y))
        mark(picture, means[s], y, 24, f"mean {means[s]:g}")
        true = logits.exp().mean().log().item()
        mark(picture, true, y, -24, f"ln of mean exp {true:.1f}")
        if variances[0, s] > 0:
            estimate = (vectors[0, s] + variances[0, s] / 2).item()
            mark(picture, estimate, y, -24, f"Gaussian {estimate:g}", "pink")
        for i, logit in enumerate(sorted(logits.tolist())):
            equal = 7 * (2 * i - 1) if logits[0] == logits[1] else 0  # side by side
            picture.circle(place(logit) + equal, y, 7, colour)
    for logit in range(-2, 12, 2):
        picture.text(place(logit), 296, f"{logit}".replace("-", "−"), "small", align="middle")
    picture.text(24, 296, "logit", "small")
    picture.text(24, 328, f"A dot is a key. mean_query: {means[0]:g} and {means[1]:g}. gaussian,"
                 f" both tokens: {shares[0]:.2%} and {shares[1]:.2%}.", "small", "quiet")
    return picture


if __name__ == "__main__":
    draw().save("two_scores")

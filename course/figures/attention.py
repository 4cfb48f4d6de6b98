"""What the queries of lesson 2 attend to, in each layer: `python -m course.figures.attention`.

It loads the default model and reads 1,000 tokens, which takes about ten seconds.
"""

from pathlib import Path

import torch

from course.figures.draw import Picture
from model import FullCache, FullLayer
from sentencekv import SentenceKVConfig, find_secondary_sinks, token_importance
from weights.checkpoint import load_model
from weights.download import download
from weights.tokenizer import Tokenizer

TEXT = Path(__file__).parents[2] / "examples" / "walden_house.txt"
TOKENS, QUERIES, CONFIG = 1000, 64, SentenceKVConfig()
KINDS = [("blue", f"the first {CONFIG.sink_tokens} tokens"), ("orange", "secondary sinks"),
         ("green", f"the last {CONFIG.recent_window} tokens")]  # what remains is everything else


def shares_of_one(q, k) -> torch.Tensor:
    """What one token attends to of the KINDS, the mean of all heads, q (H, 1, D), k (H_kv, n, D)"""
    shares = token_importance(q, k, pool=1)  # (H_kv, n - 1): all but the token itself
    secondary = shares * find_secondary_sinks(k, CONFIG)[:, :-1]
    not_last = shares[:, : 1 - CONFIG.recent_window]  # the token itself is one of the last
    parts = [shares[:, : CONFIG.sink_tokens], secondary, not_last]
    first, second, others = (part.sum(dim=-1).mean() for part in parts)
    return torch.stack((first, second, 1 - others))


class Watching(FullLayer):
    """A layer of a full cache that measures what the last queries attend to."""

    def prefill(self, q, k, v) -> tuple:
        self.shares = torch.stack([
            shares_of_one(q[:, i : i + 1], k[:, : i + 1])
            for i in range(TOKENS - QUERIES, TOKENS)]).mean(dim=0)
        return super().prefill(q, k, v)


def measure() -> torch.Tensor:
    """Shares (layers, 3)."""
    folder = download()
    model = load_model(folder, "cpu", torch.float32)
    ids = Tokenizer(folder).prompt_ids(TEXT.read_text(encoding="utf-8"))[:TOKENS]
    cache = FullCache(model.config, TOKENS, "cpu", torch.float32)
    cache.layers = [Watching(layer.kv) for layer in cache.layers]
    model.prefill(torch.tensor(ids), cache)
    return torch.stack([layer.shares for layer in cache.layers])


def draw() -> Picture:
    picture, shares = Picture(680, 392), measure()
    left, top, step, height = 64, 136, 19, 200
    middle, bottom = left + step * len(shares) / 2, top + height
    picture.text(24, 32, f"what the last {QUERIES} of {TOKENS} tokens attend to", "title")
    most = [f": most in layer {column.argmax()}, {column.max():.0%}" for column in shares.T] + [""]
    for i, (colour, name) in enumerate([*KINDS, ("pale", "everything else")]):
        x, y = 24 + 330 * (i // 2), 58 + 24 * (i % 2)
        picture.box(x, y - 11, 14, 14, colour)
        picture.text(x + 22, y, name + most[i])
    picture.text(24, 118, "share of attention, mean of all heads", "small", "quiet")
    picture.box(left, top, step * len(shares), height, "pale", radius=0)
    for percent in (0, 50, 100):
        picture.text(left - 8, bottom - height * percent / 100 + 4, f"{percent}%", "small",
                     align="end")
    for layer, parts in enumerate(shares.tolist()):
        y, x = bottom, left + step * layer
        for part, (colour, _) in zip(parts, KINDS):
            if pixels := round(part * height):
                y -= pixels
                picture.box(x + 2, y, step - 4, pixels, colour, radius=0)
        if layer % 5 == 0 or layer == len(shares) - 1:
            picture.text(x + step / 2, bottom + 18, layer, "small", align="middle")
    picture.text(middle, bottom + 40, "layer", align="middle")
    return picture


if __name__ == "__main__":
    draw().save("attention")

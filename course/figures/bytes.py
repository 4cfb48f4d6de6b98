"""What a cache costs, for lesson 1: `python -m course.figures.bytes`.

Nothing is allocated: a tensor on the device "meta" has a size and no memory.
"""

import torch

from cache import SentenceKVCache
from course.figures.draw import Picture
from model import FullCache, Llama, LlamaConfig
from sentencekv import SentenceKVConfig
from support.table import make_room

GIB, BUDGET, TOKENS_A_SENTENCE = 2**30, 1024, 12
LLAMA = LlamaConfig(  # Llama 3.1 8B
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072)


def full_cache(n_tokens: int) -> int:
    return FullCache(LLAMA, n_tokens, "meta", torch.bfloat16).report()["device_kv_bytes"]


def sentencekv(n_tokens: int) -> int:
    """Slots for a budget, and a vector for each sentence, without room for more."""
    n_sentences = -(-n_tokens // TOKENS_A_SENTENCE)
    config = SentenceKVConfig(token_budget=BUDGET, kv_bits=16)
    cache = SentenceKVCache(config, LLAMA, n_tokens, "meta", torch.bfloat16)
    make_room(cache.layers, n_sentences)
    return sum(layer.slots[:, :BUDGET].nbytes + layer.vectors[:, :n_sentences].nbytes
               for layer in cache.layers)


def draw() -> Picture:
    picture, left, scale = Picture(720, 268), 128, 28  # pixels a GiB
    picture.text(24, 30, "Llama 3.1 8B in bfloat16: GiB on the device (computed)", "title")
    for i, n_tokens in enumerate((4096, 32768, 131072)):
        y, full, ours = 54 + 52 * i, full_cache(n_tokens) / GIB, sentencekv(n_tokens) / GIB
        picture.text(left - 12, y + 25, f"{n_tokens:,} tokens", align="end")
        for down, size, colour in ((0, full, "orange"), (19, ours, "blue")):
            picture.box(left, y + down, scale * size, 16, colour)
            picture.text(left + scale * size + 6, y + down + 13, f"{size:.2f}")
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in Llama(LLAMA).parameters()) * 2 / GIB
    picture.line((left + scale * weights, 46), (left + scale * weights, 206), dashed=True)
    picture.text(left + scale * weights, 222, f"the weights: {weights:.2f}", align="middle")
    for x, colour, words in ((24, "orange", "full cache"),
                             (136, "blue", f"SentenceKV: budget {BUDGET:,}, one vector per"
                              f" {TOKENS_A_SENTENCE} tokens")):
        picture.box(x, 240, 14, 14, colour)
        picture.text(x + 20, 252, words)
    return picture


if __name__ == "__main__":
    draw().save("bytes")

"""Precision: more tokens, fewer bits of each."""

import torch  # noqa: F401  the example below needs it

from benchmarks.methods.evict_prompt import SnapKV
from benchmarks.methods.sentences import SentenceKV
from cache import LayerCache


def quantised(kv, bits: int):
    """Quantise and dequantise: 2^bits even levels from the smallest to the largest value of each
    vector of D channels. kv (..., D)

    >>> quantised(torch.tensor([[0.0, 0.4, 0.9, 3.0]]), bits=2)
    tensor([[0., 0., 1., 3.]])
    """
    low, high = kv.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return low + step * ((kv - low) / step).round()


def stored_bits(bits: int, dim: int) -> float:
    """Of a channel, with the 16 bits of each vector's smallest value and of its step."""
    return bits + 32 / dim


class SnapKVBits(SnapKV):
    """More tokens of SnapKV at 4 bits. After 2412.12706.

    Unit: token and bits. Score: SnapKV's. Budget: bytes, so 3.6 tokens of 64 channels for one of 16
    bits. Rest: dropped. Departures: SnapKV's window is 32, not 8; levels are even, in groups of one
    vector, where the code uses HQQ; written tokens and the window have 16 bits.
    """

    name, label = "snapkv_4bit", "SnapKV at 4 bits"
    bits = 4

    def prepare(self):
        self.kept_size = stored_bits(self.bits, self.model_config.head_dim) / 16

    def shrink(self, layer, kv):
        return quantised(kv, self.bits)


class SentenceKVBits(SentenceKV):
    """SentenceKV with 4 bits on the host.

    Unit, score and budget: SentenceKV's; what is attended to has the host's precision, and takes 16
    bits. Rest: kept, at 4 bits. Vectors are of the exact keys. Written tokens have 16 bits.
    """

    name, label = "sentencekv_4bit", "SentenceKV, 4 bits on the host"
    own_settings = {"kv_bits": 16}

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.prompt_row = stored_bits(self.Layer.bits, self.layers[0].packing.dim) / 16

    class Layer(LayerCache):
        bits = 4

        def make_sentences(self, kv, kept, secondary):
            return quantised(super().make_sentences(kv, kept, secondary), self.bits)

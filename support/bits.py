"""Keys, values and sentence vectors in 8 bits: what is remembered takes half the memory.

    z = (x - mean) / deviation       of each channel: all channels have one size
    z ≈ scale · numbers              whole numbers from -127 to 127, one scale for all channels

Some keys have a channel that is far larger than the others: in layer 0 of Qwen2.5-Coder-0.5B, one
reaches 145, and the others 10 in the median. With one scale for both, the others would be rounded
to a few steps. Mean and deviation are those of a head's channels in its first text, of keys and of
values. The scale is a vector's own. So nothing is out of range, however short that text is.
"""

import math

import torch

LARGEST = 127
SCALE_BYTES = 2
LEAST_DEVIATION = 1e-3  # is added to each: in a text of one token, deviations are 0


class Packing:
    """Packs vectors of D channels, and unpacks them. With 8 bits, a packed vector is D' = D + 2
    bytes: its numbers, and its scale as a bfloat16. With 16 bits it is the vector itself, D' = D.
    Shapes: (H_kv, T, 2, D) of keys and values, (H_kv, T, D) of keys alone. Sentence vectors are
    means of keys, and are packed like them."""

    def __init__(self, heads: int, dim: int, bits: int, device, dtype: torch.dtype):
        self.dim, self.bits, self.dtype = dim, bits, dtype  # of vectors
        self.kept_dtype = torch.int8 if bits == 8 else dtype
        self.width = dim + SCALE_BYTES if bits == 8 else dim  # D'
        n_channels = dim if bits == 8 else 0
        self.wide = torch.promote_types(dtype, torch.float32)  # bfloat16 is too coarse for x - mean
        self.mean = torch.zeros(heads, 1, 2, n_channels, device=device, dtype=self.wide)
        self.deviation = torch.ones_like(self.mean)
        # By the number of dimensions of what is packed: of keys and values, and of keys alone.
        self.channels = {4: (self.mean, self.deviation),
                         3: (self.mean[:, :, 0], self.deviation[:, :, 0])}

    def zeros(self, *shape: int) -> torch.Tensor:
        """Room for packed vectors (*shape, D'). Its zeros can be unpacked: they are the mean."""
        return self.mean.new_zeros(*shape, self.width, dtype=self.kept_dtype)

    def fit(self, kv: torch.Tensor):
        """Take mean and deviation of each channel from the first text, kv (H_kv, T, 2, D)."""
        if self.bits == 8:
            deviation, mean = torch.std_mean(kv, dim=1, correction=0, keepdim=True)
            self.mean.copy_(mean)
            self.deviation.copy_(deviation + LEAST_DEVIATION)

    def pack(self, vectors: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D'). A channel is off by half a scale, times its deviation, at most,
        and by what `unpack` rounds to the dtype.

        >>> packing = Packing(heads=1, dim=2, bits=8, device="cpu", dtype=torch.float32)
        >>> packed = packing.pack(torch.tensor([[[127.0, -50.4]]]))
        >>> packed[..., :2], packing.unpack(packed)
        (tensor([[[127, -50]]], dtype=torch.int8), tensor([[[127., -50.]]]))
        """
        if self.bits == 16:
            return vectors
        mean, deviation = self.channels[vectors.dim()]
        z = (vectors - mean).div_(deviation)
        largest = torch.linalg.vector_norm(z, ord=math.inf, dim=-1, keepdim=True)
        scales = (largest / LARGEST).bfloat16()
        numbers = z.div_(scales.clamp(min=1e-30)).round_()  # the scale of the mean itself is 0
        return torch.cat((numbers.to(torch.int8), scales.view(torch.int8)), dim=-1)

    def unpack(self, packed: torch.Tensor) -> torch.Tensor:
        """(..., D') -> (..., D). Of 8 bits, a CPU makes float32: it computes faster with it."""
        if self.bits == 16:
            return packed
        mean, deviation = self.channels[packed.dim()]
        numbers, scales = packed[..., :-SCALE_BYTES], packed[..., -SCALE_BYTES:]
        dtype = self.dtype if packed.is_cuda else self.wide
        # float16 ends at 65504, and a z can be larger.
        dtype_of_z = self.wide if dtype == torch.float16 else dtype
        # In place: with a million tokens, a layer's vectors fill 86 MB, and fresh memory is slow.
        z = numbers.to(dtype_of_z).mul_(scales.view(torch.bfloat16))
        return torch.addcmul(mean, z, deviation, out=z).to(dtype)

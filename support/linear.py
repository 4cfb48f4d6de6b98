"""A linear layer that is as fast for one token on a CPU as the memory's bandwidth allows."""

import math

import torch
import torch.nn.functional as F
from torch import nn

ON_INTEL = "Intel" in torch.cpu.get_capabilities().get("cpu_name", "")


class Linear(nn.Linear):
    """`nn.Linear`, x (n, in) -> (n, out), with another way to compute it for one token on a CPU.

    One token is bandwidth bound. In float32, PyTorch multiplies with MKL, Intel's library. On
    Intel's processors it reaches the memory's bandwidth. On others it multiplies a matrix and a
    vector with one thread. A batched product runs on all threads, so there each thread gets a block
    of rows.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda or x.shape[0] > 1 or (x.dtype == torch.float32 and ON_INTEL):
            return super().forward(x)
        if x.dtype == torch.float32:
            n_blocks = math.gcd(self.out_features, n_threads())
            blocks = self.weight.view(n_blocks, -1, x.shape[1])  # (blocks, rows, in)
            out = (blocks @ x.mT.expand(n_blocks, -1, -1)).view(1, -1)
        else:
            compiling = torch.compiler.is_compiling()  # otherwise a plain call is faster
            product = torch.ops.sentencekv.product_in_16_bits if compiling else product_in_16_bits
            out = product(x, self.weight)
        return out if self.bias is None else out + self.bias


def n_threads() -> int:
    return torch.get_num_threads()


torch.compiler.assume_constant_result(n_threads)  # it cannot be traced


def product_in_16_bits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`F.linear` of one token by PyTorch's own kernel. oneDNN, the library behind its products,
    rearranges the weights for every token."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return F.linear(x, weight)
    finally:
        torch.backends.mkldnn.enabled = before


# `torch.compile` would ignore the setting. So for it this is one operator.
torch.library.define("sentencekv::product_in_16_bits", "(Tensor x, Tensor weight) -> Tensor")
torch.library.impl("sentencekv::product_in_16_bits", "default", product_in_16_bits)
torch.library.register_fake("sentencekv::product_in_16_bits",
                            lambda x, weight: x.new_empty(1, len(weight)))

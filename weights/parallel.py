"""One model in several processes: `torchrun --nproc-per-node 2 generate.py --prompt file.txt`.

KV heads are independent, so each process (a *rank*) has some of them, with their query heads, their
slots and vectors on its device, and their rows on the host. Its part of the weights is read as
slices, never whole. The ranks meet in two sums a layer, after attention and after the MLP, and when
their parts of the logits are joined (Megatron-LM, arXiv 1909.08053). All compute the same next
token; rank 0 prints.
"""

import os
import sys
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from model import MLP, Attention, Llama, LlamaConfig

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")  # parts of the output
COLUMNS = ("o_proj", "down_proj")  # parts of the input: their outputs are summed


def join_ranks(device: str) -> str:
    """Join the other ranks. Returns the name of this one's device, of its own if there are GPUs."""
    cuda = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    return f"cuda:{os.environ.get('LOCAL_RANK', RANK)}" if cuda else device


def leave_ranks(status: int):
    """End this process without Python's clean-up: a thread of gloo that still runs then can abort
    the process."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if RANK > 0 and status > 0:
        time.sleep(2)  # torchrun ends all ranks when one fails: rank 0 says why before
    os._exit(status)


def own_part(config: LlamaConfig) -> LlamaConfig:
    """The shape of this rank's part. ValueError if the model cannot be divided so."""
    parts = {}
    for name in ("num_key_value_heads", "num_attention_heads", "intermediate_size", "vocab_size"):
        if (whole := getattr(config, name)) % RANKS:
            raise ValueError(f"{RANKS} ranks cannot share this model: {name} is {whole}")
        parts[name] = whole // RANKS
    return replace(config, **parts | {"vocab_size": config.vocab_size})  # embeddings are whole


def own_slice(size: int) -> slice:
    return slice(RANK * size // RANKS, (RANK + 1) * size // RANKS)


def read_part(file, name: str) -> torch.Tensor:
    """This rank's slice of a tensor in an open safetensors file."""
    *_, module, kind = name.split(".")
    stored = file.get_slice(name)
    if module in ROWS:
        return stored[own_slice(stored.get_shape()[0])]
    if module in COLUMNS and kind == "weight":
        return stored[:, own_slice(stored.get_shape()[1])]
    whole = file.get_tensor(name)
    # A bias is added once: by rank 0, and then to the sum of all.
    return whole * (RANK == 0) if module in COLUMNS else whole


def summed(x: torch.Tensor) -> torch.Tensor:
    """The sum of all ranks' x, in its place."""
    dist.all_reduce(x)
    return x


class AttentionPart(Attention):
    def prefill(self, x, rope, cache):
        return summed(super().prefill(x, rope, cache))

    def decode(self, *arguments):
        return summed(super().decode(*arguments))


class MLPPart(MLP):
    def forward(self, x):
        return summed(super().forward(x))


class LlamaPart(Llama):
    """This rank's part of a Llama, with the interface of a whole one."""

    def __init__(self, config: LlamaConfig):
        part = own_part(config)
        super().__init__(part)
        for layer, block in enumerate(self.layers):
            block.self_attn, block.mlp = AttentionPart(part, layer), MLPPart(part)
        self.lm_head = nn.Linear(part.hidden_size, part.vocab_size // RANKS, bias=False)

    @torch.inference_mode()
    def logits(self, states):
        part = super().logits(states)
        parts = [torch.empty_like(part) for _ in range(RANKS)]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=-1)


def here() -> str:
    """Where the ranks exchange tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def agreed(number: int) -> int:
    """The greatest of all ranks' numbers: a signal may reach them between different tokens."""
    if RANKS == 1:
        return number
    greatest = torch.tensor(number, device=here())
    dist.all_reduce(greatest, dist.ReduceOp.MAX)
    return int(greatest)


def added_up(report: dict) -> dict:
    """A cache's report, its bytes those of all ranks."""
    if RANKS == 1:
        return report
    parts = report["device_kv_parts"]
    names = [name for name in report if name.endswith("_bytes")]
    sizes = torch.tensor([*(report[name] for name in names), *parts.values()], device=here())
    total = summed(sizes).tolist()
    report = report | dict(zip(names, total))
    report["device_kv_parts"] = dict(zip(parts, total[len(names) :]))
    if report["hit_rate"] is not None:
        report["hit_rate"] = 1 - report["loaded_bytes"] / report["selected_bytes"]
    return report

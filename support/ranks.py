"""One model in several processes: `torchrun --nproc-per-node 2 generate.py --prompt file.txt`.

KV heads are independent, so each process (a *rank*) has some of them, with their query heads, their
slots and vectors on its device, and their rows on the host. Its part of the weights is read as
slices, never whole. The ranks meet in two sums a layer, after attention and after the MLP, and when
their parts of the logits are joined (Megatron-LM, arXiv 1909.08053). All compute the same next
token; rank 0 prints.
"""

import os
import re
import signal
import socket
import time
from dataclasses import replace

import torch
import torch.distributed as dist

from support.linear import Linear
from support.signals import handled


class RankLost(ValueError):
    """Another rank has ended before this one."""


def number(name: str, default: int) -> int:
    """What an environment variable says. ValueError if that is no number."""
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"{name} is {text!r} in the environment, must be a number")
    return int(text)


def place() -> tuple[int, int]:
    """This process's rank, and how many there are. RANK without WORLD_SIZE is ignored. Values that
    `check_environment` refuses are ignored here: it is called when options are read."""
    try:
        rank, ranks = number("RANK", 0), number("WORLD_SIZE", 1)
    except ValueError:
        return 0, 1
    return (rank, ranks) if rank < ranks else (0, 1)


def check_environment():
    """ValueError for what a launcher such as torchrun would not set."""
    number("RANK", 0)  # also of a single process
    ranks = number("WORLD_SIZE", 1)
    if ranks == 0:
        raise ValueError("WORLD_SIZE is 0 in the environment, must be at least 1")
    if ranks == 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ValueError(f"WORLD_SIZE is {ranks} in the environment, which has no"
                         f" {' and no '.join(missing)}: torchrun sets all of them")
    for name, limit in (("RANK", ranks), ("MASTER_PORT", 2**16), ("LOCAL_RANK", 2**16)):
        if number(name, 0) >= limit:
            raise ValueError(f"{name} is {os.environ[name]} in the environment, must be less than"
                             f" {limit}")


RANK, RANKS = place()
ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")  # parts of the output
COLUMNS = ("o_proj", "down_proj")  # parts of the input: their outputs are summed


def join_ranks(device: str) -> str:
    """Join the other ranks. Returns the name of this one's device, of its own if there are GPUs.
    ValueError if they cannot meet."""
    cuda = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
    try:
        socket.getaddrinfo(os.environ["MASTER_ADDR"], None)  # PyTorch would try for half an hour
        with handled(signal.SIG_DFL):  # while C++ waits, no handler of Python's is called
            dist.init_process_group("nccl" if cuda else "gloo")
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"the ranks cannot meet: {error}") from None
    return f"cuda:{os.environ.get('LOCAL_RANK', RANK)}" if cuda else device


def met(operation, *arguments):
    """Call an operation in which all ranks meet. RankLost if one does not come."""
    try:
        return operation(*arguments)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        problem = f"{error}".partition(". ")[0]  # then comes advice
        raise RankLost(f"another rank has ended: {problem}") from None


def leave_ranks(status: int):
    """End this process without Python's clean-up: a thread of gloo that still runs then can abort
    the process."""
    if RANK > 0 and status > 0:
        time.sleep(2)  # torchrun ends all ranks when one fails: rank 0 says why before
    os._exit(status)


def own_part(config):
    """The LlamaConfig of this rank's part. ValueError if the model cannot be divided so."""
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
    met(dist.all_reduce, x)
    return x


class SummedLinear(Linear):
    """Each rank has columns of the matrix, and its part of the input: the outputs are summed."""

    def forward(self, x):
        return summed(super().forward(x))


class JoinedLinear(Linear):
    """Each rank has rows of the matrix, and the whole input: the outputs are joined."""

    def forward(self, x):
        part = super().forward(x)
        parts = [torch.empty_like(part) for _ in range(RANKS)]
        met(dist.all_gather, parts, part.contiguous())
        return torch.cat(parts, dim=-1)


def connect(model):
    """Make a Llama of the shape `own_part` meet those of the other ranks. Returns the model."""
    for block in model.layers:
        block.self_attn.o_proj = like(SummedLinear, block.self_attn.o_proj)
        block.mlp.down_proj = like(SummedLinear, block.mlp.down_proj)
    hidden, vocabulary = model.config.hidden_size, model.config.vocab_size
    model.lm_head = JoinedLinear(hidden, vocabulary // RANKS, bias=False)
    return model


def like(kind, linear: Linear) -> Linear:
    return kind(linear.in_features, linear.out_features, linear.bias is not None)


def here() -> str:
    """Where the ranks exchange tensors."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def agreed(number: int) -> int:
    """The greatest of all ranks' numbers: a signal may reach them between different tokens."""
    if RANKS == 1:
        return number
    greatest = torch.tensor(number, device=here())
    met(dist.all_reduce, greatest, dist.ReduceOp.MAX)
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

"""What makes a decoded token faster: the checks that a CUDA graph and a compiler work here."""

import importlib.util

import torch


def check(args, device: torch.device):
    """Raises ValueError if --cuda-graph or --compile is asked for and does not work here."""
    if args.cuda_graph:
        check_cuda_graph(device)
    if args.compile:
        check_compiler(device)


def check_cuda_graph(device: torch.device):
    if device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a GPU, --device is {device}")
    if importlib.util.find_spec("triton") is None:
        raise ValueError("--cuda-graph needs Triton, which this PyTorch came without")


def check_compiler(device: torch.device):
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # of PyTorch, of Triton or of the machine
        problem = f"{error}".partition("\n")[0] or type(error).__name__
        raise ValueError(f"--compile needs a compiler: {problem}") from None

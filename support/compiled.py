"""A faster step for one token: a layer's step compiled, or the whole step as one CUDA graph."""

import importlib.util
from copy import copy
from functools import partial
from types import SimpleNamespace

import torch
from torch import nn


def compile_blocks(model):
    """The same model, with the same weights, whose blocks decode in compiled code: small operations
    are fused, and on a CPU, C++ and not Python calls the others. It is compiled when it first runs,
    once for all layers."""
    torch._dynamo.config.recompile_limit = 64  # the table and the host's rows can grow
    options = {"cpp_wrapper": not model.lm_head.weight.is_cuda}
    decode = torch.compile(type(model.layers[0]).decode, fullgraph=True, options=options)
    fast, blocks = copy(model), [copy(block) for block in model.layers]
    for block in blocks:
        block.decode = partial(decode, block)
    fast._modules = model._modules | {"layers": nn.ModuleList(blocks)}  # `copy` shares the dict
    return fast


class GraphedDecode:
    """`model.decode` as one CUDA graph, replayed for every token: a token launches about a thousand
    kernels, and launching them takes longer than running them.

    A graph repeats its kernels on the same addresses. So it reads the token and its position from
    tensors, and it is captured again for another cache, or if the cache has reallocated tensors.
    Capturing records the kernels and does not run them. One token is decoded as usual before, since
    some kernels are compiled when they first run.
    """

    def __init__(self, model):
        self.model = model
        self.ids = torch.zeros(1, dtype=torch.long, device=model.embed_tokens.weight.device)
        self.position = torch.zeros_like(self.ids)
        self.decoded = self.captured = ()  # for which cache and which of its tensors
        self.graph = self.states = None

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, cache) -> torch.Tensor:
        self.ids.copy_(ids)
        self.position.fill_(cache.num_tokens)
        objects = cache, *reallocated(cache)
        if not same(self.decoded, objects):
            self.decoded = objects
            return self.model.decode(self.ids, cache)
        if not same(self.captured, objects):
            self.captured, self.graph = objects, torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.states = self.model.decode(self.ids, self.as_tensors(cache))
        self.graph.replay()
        cache.advance(1)
        return self.states

    def as_tensors(self, cache) -> SimpleNamespace:
        """What a graph may see of a cache: its layers, and the position as a tensor. A number would
        be a constant of the graph. The host counts after each replay."""
        return SimpleNamespace(layers=cache.layers, num_tokens=self.position,
                               advance=lambda n_tokens: None)


def reallocated(cache) -> tuple:
    """Tensors of the first layer that are reallocated when a cache needs more room. All layers are
    given room at once, and all tables of a layer, so these stand for all."""
    layer = cache.layers[0]
    return layer.vectors, layer.host.first, layer.host.later


def same(some: tuple, others: tuple) -> bool:
    """Whether these are the same objects."""
    return list(map(id, some)) == list(map(id, others))


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
        raise ValueError(f"--compile needs a compiler: {reason(error)}") from None


def is_compilers(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is of the compiler and its machine. That PyTorch
    does not compile what a block does is an error of this program."""
    while error is not None:
        if type(error).__module__.startswith("torch._inductor") or isinstance(
                error, torch._dynamo.exc.BackendCompilerFailed):
            return True
        error = error.__cause__
    return False


def reason(error: Exception) -> str:
    """What a compiler's error says, without the advice after it."""
    return f"{error}".partition("Set TORCHDYNAMO_VERBOSE")[0].strip() or type(error).__name__

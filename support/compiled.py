"""A faster step for one token: layers compiled, the whole step as one CUDA graph, or both."""

import importlib.util
from contextlib import nullcontext
from copy import copy
from types import SimpleNamespace

import torch

from support.report import say
from support.signals import not_interrupted
from support.timer import watch_stages

MOST_LAYERS = 4  # in one piece of compiled code: more are a little faster, and take long to compile


def step(model, cache, args, timer):
    """What decodes a token as the options ask, `decode(ids, cache)`, and what times it."""
    if args.fast:
        fast = Fast(model, cache, timer)
        return fast, fast.timed
    if args.compile:
        model = compile_layers(model)
    return GraphedDecode(model) if args.cuda_graph else model.decode, timer


def compile_layers(model):
    """The same model, with the same weights, which decodes in compiled code: small operations are
    fused, and on a CPU, C++ and not Python calls the others. A few layers are one piece of code. It
    is compiled when it first runs, for all pieces and lengths of the text: once, and once more if
    there come to be more places than slots for rows. With layers that reuse a choice, it is
    compiled for each order of such layers in a piece."""
    n_layers = len(model.layers)
    size = max(n for n in range(1, MOST_LAYERS + 1) if n_layers % n == 0)
    firsts = range(0, n_layers, size)
    pieces = [list(model.layers[first : first + size]) for first in firsts]

    options = {"cpp_wrapper": not model.lm_head.weight.is_cuda}
    decode = torch.compile(model.decode_layers, fullgraph=True, options=options)
    marked = ()

    def decode_layers(_, x, rope, layer_caches):
        nonlocal marked
        if not same(marked, found := reallocated(layer_caches)):
            marked = found
            mark_what_grows(layer_caches)
        for first, blocks in zip(firsts, pieces):
            x = decode(blocks, x, rope, layer_caches[first : first + size])
        return x

    fast = copy(model)
    fast.decode_layers = decode_layers
    return fast


def mark_what_grows(layers):
    """Tell the compiler that the numbers of rows and places change. Otherwise each is a constant of
    its code, and it compiles again when a table grows. 0 rows are always a constant."""
    for layer in layers:
        layer.host.reserve(len(layer.host.first) + 1)
        for rows in (layer.host.first, layer.host.later):
            torch._dynamo.maybe_mark_dynamic(rows, 0)
        for name in layer.TABLE:
            torch._dynamo.maybe_mark_dynamic(getattr(layer, name), 1)


class Fast:
    """Decodes the first tokens as usual, so that their stages are timed, and then as fast as this
    machine can: in compiled code, which a GPU replays as a graph.

    A compiler that fails costs its time alone: the tokens go on as usual.
    """

    def __init__(self, model, cache, timer, n_timed: int = 32):
        self.model, self.cache, self.timer, self.n_timed = model, cache, timer, n_timed
        self.decode, self.n_decoded, self.stage = model.decode, 0, "decode"

    def timed(self, _: str):
        """The next token's stage: "decode" as usual, "compile", "record" a graph, or "fast"."""
        return self.timer(self.stage)

    def __call__(self, ids: torch.Tensor, cache) -> torch.Tensor:
        try:
            with not_interrupted() if self.stage == "compile" else nullcontext():
                states = self.decode(ids, cache)
        except Exception as error:
            if self.stage == "decode" or not is_compilers(error):
                raise
            say(f"--fast: the compiler failed: {reason(error)}")
            self.change(self.model.decode, "decode")
            states = self.decode(ids, cache)
        self.n_decoded += 1
        if self.n_decoded == self.n_timed:
            self.change(fastest(self.model), "compile")
        elif self.stage != "decode":  # of two tokens after the first, one can record a graph
            self.stage = "record" if self.n_decoded < self.n_timed + 3 else "fast"
        return states

    def change(self, decode, stage: str):
        self.decode, self.stage = decode, stage
        self.timer.unwatch()
        watch_stages(self.timer, self.model, self.cache, decode=stage == "decode")


def fastest(model):
    compiled = compile_layers(model)
    return GraphedDecode(compiled) if model.lm_head.weight.is_cuda else compiled.decode


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
        objects = cache, *reallocated(cache.layers)
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


def reallocated(layers) -> tuple:
    """Tensors of the first layer that are reallocated when a cache needs more room. All layers are
    given room at once, and all tables of a layer, so these stand for all."""
    return layers[0].vectors, layers[0].host.first, layers[0].host.later


def same(some: tuple, others: tuple) -> bool:
    """Whether these are the same objects."""
    return list(map(id, some)) == list(map(id, others))


def check(args, device: torch.device):
    """ValueError if --cuda-graph or --compile is asked for and does not work here. --fast goes on
    without, and says why."""
    if args.cuda_graph:
        check_cuda_graph(device)
    if args.compile:
        check_compiler(device)
    if args.fast:
        try:
            if device.type == "cuda":
                check_cuda_graph(device, "--fast")
            check_compiler(device, "--fast")
        except ValueError as error:
            args.fast = False
            say(f"{error}: it changes nothing")


def check_cuda_graph(device: torch.device, option: str = "--cuda-graph"):
    if device.type != "cuda":
        raise ValueError(f"{option} needs a GPU, --device is {device}")
    if importlib.util.find_spec("triton") is None:
        raise ValueError(f"{option} needs Triton, which this PyTorch came without")


def check_compiler(device: torch.device, option: str = "--compile"):
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # of PyTorch, of Triton or of the machine
        raise ValueError(f"{option} needs a compiler: {reason(error)}") from None


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

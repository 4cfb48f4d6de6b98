"""The stage timer: milliseconds by stage of prefill and decode."""

import time
from collections import Counter
from contextlib import contextmanager

import torch

OTHER = "projections, MLP, norms"  # in the report: the time in no named stage


class StageTimer:
    """CUDA events on a GPU, read once at the end; a clock on a CPU.

        with timer("decode"):                     # a stage
            ...
        timer.watch(layer, {"select": "select"})  # each call of layer.select is a stage
        timer.unwatch()

    A stage inside another is a part of it. What is inside a part is not told apart. Copies on
    another GPU stream are not counted.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.clock = "CUDA events" if self.cuda else "perf_counter"
        self.open = []  # names of the stages that are open, the outermost first
        self.intervals = []  # (names of the open stages, start, end)
        self.watched = []  # (object, name of the method)
        self.calls = Counter()  # of the stages in `totals`

    def mark(self):
        """This moment: a CUDA event, or seconds."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, stage: str):
        self.open.append(stage)
        path, start = tuple(self.open), self.mark()
        try:
            yield
        finally:
            self.open.pop()
            self.intervals.append((path, start, self.mark()))

    def watch(self, target, stages: dict[str, str]):
        """Time methods of an object: method -> stage. The wrappers are attributes of `target`."""
        for method, stage in stages.items():
            assert method not in vars(target), f"{method} is wrapped already"
            setattr(target, method, self.wrapped(getattr(target, method), stage))
            self.watched.append((target, method))

    def wrapped(self, function, stage: str):
        def timed(*arguments, **named):
            with self(stage):
                return function(*arguments, **named)

        return timed

    def unwatch(self):
        """Take all wrappers off: the methods of the class are there again."""
        for target, method in self.watched:
            delattr(target, method)
        self.watched = []

    def totals(self) -> dict:
        """Stage -> {part: ms}, with OTHER and `total`, since the last call."""
        if self.cuda:
            torch.cuda.synchronize()
        totals, self.calls = {}, Counter()
        for (stage, *inner), start, end in self.intervals:
            self.calls[stage] += not inner
            if len(inner) > 1:
                continue  # it is inside a part, whose time includes it
            part = inner[0] if inner else "total"
            ms = start.elapsed_time(end) if self.cuda else (end - start) * 1e3
            parts = totals.setdefault(stage, {})
            parts[part] = parts.get(part, 0.0) + ms
        for parts in totals.values():
            named = sum(ms for part, ms in parts.items() if part != "total")
            parts[OTHER] = parts["total"] - named
        self.intervals = []
        return totals


def watch_stages(timer: StageTimer, model, cache, decode: bool = True):
    """Time the stages of a model with a SentenceKVCache: those of prefill, and those of a token if
    `decode`. A step that is compiled or a graph cannot be timed by its parts."""
    layer_stages = {"most_important": "importance", "make_sentences": "sentence vectors",
                    "offload": "offload"}
    attention_stages, cache_stages = {"attend_causally": "attention"}, {}
    if decode:
        layer_stages |= {"select": "select", "load": "load"}
        attention_stages |= {"attend": "attention"}
        cache_stages = {"seal": "seal"}
    for block in model.layers:
        timer.watch(block.self_attn, attention_stages)
    if hasattr(cache.layers[0], "select"):  # a full cache has no stages of its own
        timer.watch(cache, cache_stages)
        for layer in cache.layers:
            timer.watch(layer, layer_stages)


def times(timer: StageTimer) -> dict:
    """Time to first token, from the prompt's text on, and time per token after it: of the tokens
    with the faster step, if there are any."""
    stages = {"decode": {"total": 0.0}} | timer.totals()
    ttft = sum(stages[name]["total"] for name in ("tokenize", "segment", "prefill"))
    steps = timer.calls["fast"] or timer.calls["decode"]
    decode = stages["fast" if "fast" in stages else "decode"]["total"]
    return {"ttft_ms": ttft, "decode_ms_per_token": decode / max(steps, 1),
            "decode_steps": timer.calls["decode"], "fast_steps": timer.calls["fast"],
            "stages_ms": stages}

"""Check a cache of your own: `python -m course.capstone mine/my_cache.py --step 3`, or all steps.

The methods of one step are yours, the others are those of the solution. The cache works in a small
random Llama, and each call is compared with `tests/oracle.py`. If nothing differs, it answers the
example question. The exit status is 0 if all is right, 1 if not, and 2 if nothing can be checked.
"""

import support.environment  # noqa: F401  before torch, which reads the variables that it sets

import argparse
import signal
import sys
import time
import traceback
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import median

import torch

from course.check import WRITE_IT, Result, TooSlow, shown
from course.exercises.solutions import my_cache
from course.exercises.student import ROOT, load
from course.exercises.stubs import STEPS
from course.watch import (TINY, Difference, SlowSentenceKV, Watched, Watcher, random_ids,
                          random_llama, random_spans)
from generate import generate, make_cache, prefill, sampler
from segment import token_spans
from sentencekv import SentenceKVConfig
from support.document import read_text
from weights.checkpoint import load_model
from weights.models import model_folder
from weights.tokenizer import Tokenizer

SMALL = dict(token_budget=40, sink_tokens=4, secondary_sinks=6, secondary_ratio=0.5,
             recent_window=8, observation_window=8, sentence_limit=128, kv_bits=16)
RUNS = [  # tokens of the prompt, of the longest sentence, and settings that are not as in SMALL
    (120, 15, {}),
    (2, 15, {}),  # fewer tokens than sinks
    (120, 15, dict(keep_factor=1)),  # of some sentences, nothing is kept
    (120, 45, dict(keep_factor=2.5)),  # an open sentence exceeds the budget
    (120, 15, dict(keep_factor=2, sink_tokens=0, secondary_sinks=0, recent_window=1,
                   query_decay=1.0, score="mean_query")),
    (60, 15, dict(token_budget=1024)),  # room for everything
]
N_WRITTEN = 60

PROMPT = ROOT / "examples" / "walden_house.txt"
COST = "8.03½"  # of the boards, in dollars
QUESTION = SentenceKVConfig(token_budget=512, kv_bits=16)
N_ANSWER = 64  # tokens at most


def with_step(cache_class, step: int):
    """A class of caches: in its layers, the methods of one step are the student's, and those of all
    other steps are the solution's."""
    names = [name for other in STEPS.keys() - {step} for name in STEPS[other][1]]
    methods = {name: vars(my_cache.Layer)[name] for name in names}
    return type("Cache", (cache_class,), {"Layer": type("Layer", (cache_class.Layer,), methods)})


def imported(cache_class, step: int, path: Path) -> bool:
    """Whether a method of a step is not written in the file `path`."""
    methods = (getattr(cache_class.Layer, name, None) for name in STEPS[step][1])
    codes = (getattr(method, "__code__", None) for method in methods)
    return any(code is not None and code.co_filename != str(path) for code in codes)


@contextmanager
def limited(seconds: float):
    """Raises TooSlow in what takes longer."""
    def stop(*_):
        raise TooSlow(f"{seconds:g} seconds are the limit")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def judge(name: str, cache_class, args) -> Result:
    """What is found of a cache of the file `args.file`."""
    begin = time.monotonic()
    try:
        with limited(args.limit), redirect_stdout(sys.stderr):
            for n_prompt, longest, changes in RUNS:
                write(cache_class, n_prompt, longest, SMALL | changes)
        status, message = "right", f"{len(RUNS)} prompts with {N_WRITTEN} tokens after each"
    except TooSlow as slow:
        status, message = "too slow", str(slow)
    except NotImplementedError:
        status, message = "not written", "it raises NotImplementedError"
    except (Exception, SystemExit) as error:  # of the student's code: it is shown, not hidden
        settings = [f"{setting} {value}" for setting, value in changes.items()]
        place = ", ".join([f"with a prompt of {n_prompt} tokens", *settings])
        status, message = "wrong", f"{said(error, args.file)}\n    ({place})"
    return Result(name, status, message, round(time.monotonic() - begin, 1))


def said(error: Exception, path: Path) -> str:
    """A difference, or an error with the line of the student's file."""
    if isinstance(error, Difference):
        return f"{error}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == str(path)]
    return f"{error!r}" + (f", at line {lines[-1]} of {path.name}" if lines else "")


def write(cache_class, n_prompt: int, longest: int, settings: dict):
    """Read a prompt and write tokens, all of them random. Raises Difference."""
    model, ids = random_llama().double(), random_ids(n_prompt + N_WRITTEN, "cpu")
    lengths = [end - start for start, end in random_spans(N_WRITTEN + longest, longest)]
    caches = watched(cache_class, SentenceKVConfig(**settings))
    for cache in caches:
        cache.expect(random_spans(n_prompt, longest))
    model.prefill(ids[:n_prompt], caches[-1])
    n_open, delay = 0, 0
    for i in range(n_prompt, n_prompt + N_WRITTEN):
        if n_open == lengths[0] + delay:  # the end of every second sentence is seen a token late
            for cache in caches:
                cache.seal(lengths[0])
            n_open, delay = n_open - lengths.pop(0), 1 - delay
        model.decode(ids[i : i + 1], caches[-1])
        n_open += 1


def watched(cache_class, config) -> tuple:
    """The oracle's cache, and a student's whose layers are compared with it."""
    layer = type("Layer", (Watched, cache_class.Layer), {})
    slow = SlowSentenceKV(config, TINY)
    cache = type("Cache", (cache_class,), {"Layer": layer})(config, TINY, "cpu", torch.float64)
    watchers = []
    for number, layer in enumerate(cache.layers):
        layer.watcher = Watcher(slow.layers[number], number, watchers)
        watchers.append(layer.watcher)
    return slow, cache


def check_steps(cache_class, args):
    """Yield what is found of each step. If the whole cache is right, all of its steps are. If not,
    each step is tried by itself."""
    whole = None if args.step else judge("all steps together", cache_class, args)
    statuses = set()
    for step in [args.step] if args.step else STEPS:
        name = f"step {step}, {STEPS[step][0]}"
        if whole and whole.status == "right":
            result = whole._replace(name=name)
        else:
            result = judge(name, with_step(cache_class, step), args)
        if result.status == "right" and imported(cache_class, step, args.file):
            result = result._replace(status="imported", message=WRITE_IT)
        statuses.add(result.status)
        yield result
    if whole and whole.status != "right" and statuses == {"right"}:
        yield whole


class Question:
    """The example question, and the default model that answers it."""

    def __init__(self):
        folder = model_folder(None)
        self.tokenizer = Tokenizer(folder)
        self.model = load_model(folder, torch.device("cpu"), torch.float32)
        self.ids = self.tokenizer.prompt_ids(read_text(PROMPT))
        self.spans = token_spans(self.tokenizer.pieces(self.ids), QUESTION.sentence_limit)

    def cache_of(self, cache_class):
        """An empty cache of a student's class."""
        return cache_class(QUESTION, self.model.config, "cpu", torch.float32)

    def cache_named(self, name: str):
        """An empty cache of the project's, "full" or "sentencekv"."""
        return make_cache(name, QUESTION, self.model.config, len(self.ids) + N_ANSWER, "cpu",
                          torch.float32)

    def answer(self, cache) -> tuple:
        """The text that is written with a cache, and the seconds of each decoded token."""
        seconds = []

        @contextmanager
        def timer(stage):
            start = time.perf_counter()
            yield
            seconds.append(time.perf_counter() - start)

        sample = sampler(temperature=0, top_p=1, seed=0, device="cpu")
        cache.expect(self.spans)
        first = prefill(self.model, cache, self.ids, sample)
        pairs = generate(self.model, cache, first, self.tokenizer.detokenizer(), sample,
                         self.tokenizer.stop_tokens(), N_ANSWER, QUESTION.sentence_limit, timer)
        text = "".join(piece for token, piece in pairs if token not in self.tokenizer.special)
        return text, seconds


def check_question(cache_class, args) -> Result:
    """What is found of the answer to the example question."""
    print("the example question follows; it can take a minute", file=sys.stderr, flush=True)
    question, begin = Question(), time.monotonic()
    try:
        with limited(args.limit):
            text, _ = question.answer(question.cache_of(cache_class))
        status = "right" if COST in text else "wrong"
    except TooSlow as slow:
        status, text = "too slow", str(slow)
    except (Exception, SystemExit) as error:  # of the student's code
        status, text = "wrong", said(error, args.file)
    return Result("the example question", status, text, round(time.monotonic() - begin, 1))


def measure(cache_class, path: Path) -> str:
    """A table of what the cache and those of the project hold, move and need. ValueError if the
    cache does not work."""
    question = Question()
    rows = ["| cache | MB on the device | MB from the host, a token | ms a token | answer |",
            "|---|---|---|---|---|"]
    for name, cache in (("your own", question.cache_of(counted(cache_class))),
                        ("sentencekv", question.cache_named("sentencekv")),
                        ("full", question.cache_named("full"))):
        try:
            text, seconds = question.answer(cache)
        except (Exception, SystemExit) as error:  # of the student's code
            raise ValueError(f"the cache does not work yet: {said(error, path)}") from error
        report = cache.report()
        held, moved = report["device_kv_bytes"], report["loaded_bytes"] / len(seconds)
        rows.append(f"| {name} | {held / 1e6:.1f} | {moved / 1e6:.1f} |"
                    f" {1e3 * median(seconds):.0f} | {text} |")
    return "\n".join(rows)


def counted(cache_class):
    """The class, with a report of the bytes that its layers hold and load. The rows that are loaded
    for a token are on the device one layer at a time."""
    class Layer(cache_class.Layer):
        largest = total = 0

        def load(self, rows):
            kv = super().load(rows)
            self.largest, self.total = max(self.largest, kv.nbytes), self.total + kv.nbytes
            return kv

        def held(self) -> int:
            return sum(x.nbytes for name, x in vars(self).items()
                       if name != "host" and isinstance(x, torch.Tensor))

    def report(cache) -> dict:
        largest = max(layer.largest for layer in cache.layers)
        return {"device_kv_bytes": largest + sum(layer.held() for layer in cache.layers),
                "loaded_bytes": sum(layer.total for layer in cache.layers)}

    return type("Cache", (cache_class,), {"Layer": Layer, "report": report})


def check_all(cache_class, args):
    """Yield what is found of the steps, and then of the question if they are right."""
    right = True
    for result in check_steps(cache_class, args):
        right = right and result.status == "right"
        yield result
    if right and not args.quick:
        yield check_question(cache_class, args)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="course.capstone", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--step", type=int, choices=STEPS, help="check this step alone")
    parser.add_argument("--quick", action="store_true", help="without the example question")
    parser.add_argument("--json", action="store_true",
                        help="for a grader: a line of JSON for each step, and for the question")
    parser.add_argument("--limit", type=float, default=300,
                        help="seconds for a step, and for the question")
    parser.add_argument("--measure", action="store_true",
                        help="check nothing, but compare bytes and times with the project's cache")
    return parser.parse_args(arguments)


def main(arguments=None) -> int:
    args = parse(arguments)
    try:
        if not 0 < args.limit <= 10**6:
            raise ValueError(f"limit is {args.limit:g}, must be above 0 and at most 1000000")
        cache_class = load(args.file, "Cache")
        if not isinstance(getattr(cache_class, "Layer", None), type):
            raise ValueError(f"{args.file}: Cache is no class with a class Layer in it")
        if args.measure:
            print(measure(cache_class, args.file))
            return 0
        statuses = set()
        for result in check_all(cache_class, args):
            statuses.add(result.status)
            print(shown(result, args.json), flush=True)
    except (ValueError, OSError) as error:
        print(f"course.capstone: {error}", file=sys.stderr)
        return 2
    return 0 if statuses == {"right"} else 1


if __name__ == "__main__":
    sys.exit(main())

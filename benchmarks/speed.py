"""Time and memory against the length of the prompt, next to what the hardware allows.

    python -m benchmarks.speed --data walden --lengths 1024,3900,7500 --compare transformers
    python -m benchmarks.speed --config llama-3.1-8b --lengths 4096,32768,131072 --cuda-graph

With a model's own weights the text is `--data`, and its continuation is read token by token, so
that every method does the same. A `--config` has random weights, made on the device, and the text
is random tokens in sentences of 8 to 42: its times are real, its hit rate is not.

`ttft` is making the cache, reading the prompt and choosing a token, the median of `--repeats`. `ms`
is the median over `--new-tokens` of every repeat, in brackets percentiles 10 and 90, and what
llama.cpp says itself. The methods take turns; a turn of another implementation is a process of its
own. The floor is the time to read the weights and what the device holds of the cache once: their
bytes over the bandwidth of a large copy, measured first. What comes from the host, `load`, is not
in it. `host KV` is what is stored there; PyTorch rounds pinned memory up to a power of two. Stage
times, and what a token calls on a CPU or runs on a GPU (`--operators`), are of tokens after those.
"""

import json
import random
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from timeit import repeat

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks import TOP, data, llamacpp, pictures, plain_parser, rival, tables, with_status
from benchmarks.engine import greedy, numbers, provenance
from benchmarks.methods import KNOWN, settings_of
from benchmarks.methods.sentences import SentenceKV
from benchmarks.rows import write
from generate import make_cache, next_logits, prefill
from model import Llama
from segment import SentenceStream, token_spans
from sentencekv import SentenceKVConfig
from support.compiled import GraphedDecode, check_compiler, check_cuda_graph, compile_layers
from support.document import read_text
from support.prompts import check_positions
from support.timer import StageTimer, watch_stages
from weights.checkpoint import load_model, pick_device, pick_dtype
from weights.config import parse_config
from weights.models import model_folder
from weights.tokenizer import Tokenizer

WARM_UP = 4  # tokens that are not timed
GRAPHED, COMPILED = "sentencekv, graph", "sentencekv, compiled"
BOTH = "sentencekv, compiled, graph"
CONFIGS = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))


def random_model(name: str, device, dtype) -> Llama:
    """A real shape, its weights drawn on the device itself."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return Llama(parse_config(CONFIGS[name])).requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def read_data(args, n_tokens: int) -> tuple[list[int], list[str]]:
    """So many tokens of a text, and their pieces. ValueError if it is shorter."""
    tokenizer = Tokenizer(args.model)
    ids = tokenizer.encode("\n\n".join(map(read_text, args.data)), add_bos=True)[:n_tokens]
    if len(ids) < n_tokens:
        raise ValueError(f"--data has {len(ids)} tokens, {n_tokens} are needed")
    return ids, tokenizer.pieces(ids)


def random_text(n_words: int, n_tokens: int) -> tuple[list[int], list[str]]:
    """As `read_data`: any tokens, in sentences of 8 to 42."""
    draw, pieces = random.Random(0), []
    ids = [draw.randrange(n_words) for _ in range(n_tokens)]
    while len(pieces) < n_tokens:
        pieces += [" word"] * (draw.randrange(8, 43) - 1) + [".\n\n"]
    return ids, pieces[:n_tokens]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def bandwidth(device) -> float:
    """Bytes a second that a copy reads and writes; the median of 9 after a first."""
    size = 2**32 if device.type == "cuda" else 2**28
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))

    def copy():
        target.copy_(source)
        synchronize(device)

    return 2 * size / median(repeat(copy, number=1, repeat=10)[1:])


def weight_bytes(model) -> int:
    """Read for every token: all but the embeddings, of which it is one row."""
    weights = model.named_parameters(remove_duplicate=False)  # of a tied head, too
    return sum(weight.nbytes for name, weight in weights if name != "embed_tokens.weight")


class Ours:
    """This project's model with one of its caches."""

    def __init__(self, method, args, model, text, length):
        self.method, self.args, self.model, self.length = method, args, model, length
        (self.ids, self.pieces), self.device = text, model.embed_tokens.weight.device
        if method in (COMPILED, BOTH):
            self.model = compile_layers(model)
        named = {} if method == "full" or "," in method else settings_of(method)
        self.settings = SentenceKVConfig(**{
            "token_budget": args.token_budget, "keep_factor": args.keep_factor} | named)
        self.spans = token_spans(self.pieces[:length], self.settings.sentence_limit)
        self.forget()

    def forget(self):
        """Let go of the cache."""
        self.cache = self.decode = None

    def turn(self) -> dict:
        if self.device.type == "cuda":
            self.allocated = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        synchronize(self.device)
        return rival.measure(self, self.args.new_tokens + WARM_UP)

    def prefill(self):
        dtype = self.model.embed_tokens.weight.dtype
        self.cache = make_cache("full" if self.method == "full" else "sentencekv", self.settings,
                                self.model.config, len(self.ids), self.device, dtype)
        self.cache.expect(self.spans)
        prefill(self.model, self.cache, self.ids[: self.length], greedy)
        self.at, self.sentences = self.length, SentenceStream(self.settings.sentence_limit)
        self.decode = self.model.decode
        if self.method in (GRAPHED, BOTH):
            self.decode = GraphedDecode(self.model)
        synchronize(self.device)

    def step(self):
        greedy(next_logits(self.model, self.cache, self.sentences, self.ids[self.at],
                           self.pieces[self.at], self.decode))
        self.at += 1
        if self.at == self.length + WARM_UP and self.method != "full":
            self.cache.totals.restart()  # what comes from the host counts from here
        synchronize(self.device)

    def report(self) -> dict:
        """Also the bytes of the cache that are read for one token."""
        found = self.cache.report()
        parts = found["device_kv_parts"]
        found["read_bytes"] = (found["full_kv_bytes"] if self.method == "full" else
                               parts["slots"] + parts["sentence vectors"])
        if self.device.type == "cuda":
            found["peak_device_bytes"] = torch.cuda.max_memory_allocated() - self.allocated
        return found

    def details(self) -> dict:
        return {"stages_ms_per_token": self.stages(self.args.new_tokens),
                "operators": self.operators() if self.args.operators else {}}

    def stages(self, steps: int) -> dict:
        """Milliseconds a token, by stage. A graph and a compiled step have none."""
        if self.method in (GRAPHED, COMPILED, BOTH):
            return {}
        timer = StageTimer(self.device)
        watch_stages(timer, self.model, self.cache)
        for _ in range(steps):
            with timer("decode"):
                self.step()
        timer.unwatch()  # others measure the same model
        return {name: ms / steps for name, ms in timer.totals()["decode"].items()}

    def operators(self, steps: int = 4) -> dict:
        """Operator -> how often a token calls it, and its ms; on a GPU kernels, as the operators
        of a replayed graph are not called. The slowest first."""
        on_gpu = self.device.type == "cuda"
        kinds = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
        with profile(activities=kinds) as profiler:
            for _ in range(steps):
                self.step()
        found = {}
        for event in profiler.key_averages():
            us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found[event.key[:60]] = [event.count / steps, us / 1e3 / steps]
        return dict(sorted(found.items(), key=lambda item: -item[1][1]))


class Rival:
    """Another implementation, in a process of its own for each turn: see `benchmarks.rival`."""

    def __init__(self, method, args, model, text, length):
        weight, self.method = model.embed_tokens.weight, method
        self.request = {
            "kind": method.split()[0], "offloaded": method.endswith("offloaded"),
            "model": str(args.files.get(method, args.model)),
            "config": CONFIGS[args.config] if args.config else None,
            "device": str(weight.device), "dtype": str(weight.dtype)[6:], "ids": text[0],
            "length": length, "new_tokens": args.new_tokens + WARM_UP,
            "threads": torch.get_num_threads()}

    def turn(self) -> dict:
        done = subprocess.run([sys.executable, "-m", "benchmarks.rival"], cwd=TOP, text=True,
                              input=json.dumps(self.request), capture_output=True)
        if done.returncode:
            last = (done.stderr.strip() or f"ended with status {done.returncode}").splitlines()[-1]
            raise ValueError(f"{self.method}: {last}")
        return json.loads(done.stdout.splitlines()[-1])

    def forget(self):
        """Its process has ended."""

    def details(self) -> dict:
        return {"stages_ms_per_token": {}, "operators": {}}


def measure(subjects: list, args, weights: int, bytes_a_second: float) -> list[dict]:
    """A row for each subject. They take turns, so that a slow minute is shared out."""
    turns, rows = [[] for _ in subjects], []
    for turn, (subject, own) in product(range(args.repeats), zip(subjects, turns)):
        own.append(subject.turn())
        if turn == args.repeats - 1:
            row = summary(own, args.new_tokens, weights, bytes_a_second) | subject.details()
            number = sum(number for number, _ in row["operators"].values())
            rows.append(row | {"operators_per_token": number or None})
        subject.forget()  # before another has its cache
    return rows


def summary(turns: list[dict], n_tokens: int, weights: int, bytes_a_second: float) -> dict:
    """Of all turns of one subject: medians of times, and the bytes of the last."""
    def of_all(name):
        return [turn[name] for turn in turns if turn.get(name) is not None]

    last, tokens = turns[-1], [s for turn in turns for s in turn["tokens"][WARM_UP:]]
    tenths = quantiles(tokens, n=10, method="inclusive")
    own, read, loaded = of_all("own_ms_per_token"), last.get("read_bytes"), last.get("loaded_bytes")
    return {
        "ttft_ms": 1e3 * median(of_all("ttft")), "decode_ms_per_token": 1e3 * median(tokens),
        "decode_p10_ms": 1e3 * tenths[0], "decode_p90_ms": 1e3 * tenths[-1],
        "own_ms_per_token": median(own) if own else None,
        "floor_ms": None if read is None else 1e3 * (weights + read) / bytes_a_second,
        **{name: last.get(name) for name in
           ("device_kv_bytes", "host_kv_bytes", "full_kv_bytes", "hit_rate")},
        "loaded_bytes_per_token": None if loaded is None else loaded / n_tokens,
        "peak_device_bytes": max(of_all("peak_device_bytes"), default=None)}


def timing_parser(program: str, doc: str, lengths: list[int]):
    """With the options of `speed` and `scale`."""
    parser = plain_parser(program, doc)
    add = parser.add_argument
    add("--lengths", type=numbers(), default=lengths)
    add("--token-budget", type=int, default=SentenceKVConfig.token_budget)
    add("--new-tokens", type=int, default=32, help="tokens timed; as many again for the stages")
    add("--device", default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--out", type=Path, help="results: see benchmarks/rows.py")
    return parser


def parse(arguments):
    parser = timing_parser("speed", __doc__, [1024, 4096])
    add = parser.add_argument
    add("--model", type=Path, help="DIR, FILE.gguf or NAME (smollm2-135m-instruct)")
    add("--config", choices=CONFIGS, help="a real shape with random weights instead")
    add("--data", nargs="+", default=sorted((TOP / "examples").glob("*.txt")),
        help="files, or names of benchmarks/data.py (default: examples/)")
    add("--methods", type=lambda text: text.replace(";", " ").split(),
        default=["full", "sentencekv"], help="separated by blanks; sentencekv:name=value,... too")
    add("--compare", choices=["transformers", "llama.cpp"], action="append", default=[],
        help="another implementation, where installed; may be given twice")
    add("--keep-factor", type=float, default=SentenceKVConfig.keep_factor)
    add("--repeats", type=int, default=3)
    add("--cuda-graph", action="store_true", help=f"measure {GRAPHED!r} too")
    add("--compile", action="store_true", help=f"measure {COMPILED!r} too, and with a graph")
    add("--operators", action="store_true", help="profile a few tokens more, by operator or kernel")
    args = parser.parse_args(arguments)
    for name, least in (("new_tokens", 2), ("repeats", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, at least {least}")
    names = {method.partition(":")[0] for method in args.methods}
    settings = [name for name, known in KNOWN.items() if known.kind is SentenceKV]
    if unknown := names - {"full", *settings}:
        parser.error(f"--methods {', '.join(unknown)}: the choices are full, {', '.join(settings)}")
    return args


def asked_methods(args, device, dtype) -> list[str]:
    methods = list(args.methods)
    if args.cuda_graph:
        check_cuda_graph(device)
        methods.append(GRAPHED)
    if args.compile:
        check_compiler(device)
        methods += [COMPILED] + [BOTH] * args.cuda_graph
    if "transformers" in args.compare:
        methods += ["transformers"] + ["transformers offloaded"] * (device.type == "cuda")
    if "llama.cpp" in args.compare:
        if args.config or args.model or device.type != "cpu":
            raise ValueError("--compare llama.cpp is for the default model on a CPU")
        methods += llamacpp.methods(str(dtype)[6:])
    return methods


def run(args) -> tuple[dict, list[dict]]:
    """Provenance and rows."""
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    methods = asked_methods(args, device, dtype)
    room = 2 * args.new_tokens + 3 * WARM_UP
    if args.config:
        name, args.data, model = args.config, [], random_model(args.config, device, dtype)
    else:
        args.data = [data.find(str(name)) for name in args.data]
        name = args.model = model_folder(args.model)
        model = load_model(args.model, device, dtype)
        check_positions(max(args.lengths), room, model.config)
    place = tempfile.TemporaryDirectory()  # of llama.cpp's files, until this function ends
    args.files = {}
    if "llama.cpp" in args.compare:
        args.files = llamacpp.make_files(args.model, Path(place.name), str(dtype)[6:])
    asked = {"token_budget": str(args.token_budget), "keep_factor": str(args.keep_factor)}
    about = provenance("speed", asked, name, args.data, device, dtype)
    copied, rows = bandwidth(device), []
    about["copy_bytes_per_second"] = copied
    print("{model}, {dtype}, {machine}, torch {torch}".format(**about), f"budget"
          f" {args.token_budget}; a copy moves {copied / 1e9:.1f} GB/s", sep=", ")
    for length in tqdm(args.lengths, disable=None):
        text = (random_text(model.config.vocab_size, length + room) if args.config else
                read_data(args, length + room))
        subjects = [
            (Rival if method.split()[0] in rival.KINDS else Ours)(method, args, model, text, length)
            for method in methods]
        measured = measure(subjects, args, weight_bytes(model), copied)
        rows += [{"method": method, "length": length, **row}
                 for method, row in zip(methods, measured)]
        if args.out:
            write(args.out, about, rows)
    return about, rows


@with_status
def main(arguments=None):
    args = parse(arguments)
    about, rows = run(args)
    print(tables.times_of(rows), tables.stages(rows), *tables.operators(rows), sep="\n\n")
    if args.out:
        pictures.ms_by_length(about, rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())

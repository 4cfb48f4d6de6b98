"""Answer a prompt of several thousand tokens: `python generate.py --prompt file.txt`.

The loop comes first: prefill, then decode token by token. Then the sampler, the stage timer and the
command line. This file joins the others.
"""

import argparse
import json
import os
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

# For torch: waiting CPU threads sleep early. Busy waiting can delay the thread they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from tqdm import tqdm

from cache import SentenceKVCache, triton
from model import FullCache, LlamaConfig
from segment import SentenceStream, token_spans
from sentencekv import SCORES, SentenceKVConfig
from weights.checkpoint import load_config, load_model, pick_device, pick_dtype
from weights.download import download
from weights.tokenizer import Tokenizer

OTHER = "projections, MLP, norms"  # in the report: the time in no named stage
SETTINGS = {  # of SentenceKVConfig: the flags, and what --help says
    "token_budget": "tokens that a KV head attends to while decoding",
    "keep_factor": "keep this many times the budget of the prompt's tokens; paper: 1 to 5",
    "sink_tokens": "first tokens, always attended to; paper: 32",
    "secondary_sinks": "most tokens with very short keys, always attended to; paper: 0",
    "recent_window": "last tokens, always attended to",
    "score": f"score of a sentence, {' or '.join(SCORES)}; paper: mean_query",
    "query_decay": "each token multiplies the weight of earlier queries by it; paper: 1",
    "sentence_limit": "most tokens in a sentence; a longer one is cut",
}


def prefill(model, cache, ids: list[int], sample, timer=nullcontext, progress=iter) -> int:
    """Read the prompt into the cache. Returns the first token after it."""
    device = model.embed_tokens.weight.device
    with timer("prefill"):
        states = model.prefill(torch.tensor(ids, device=device), cache, progress)
        return sample(model.logits(states[-1:])[0])


def generate(model, cache, token: int, detokenize, sample, stop: set, max_new_tokens: int,
             sentence_limit: int, timer=nullcontext, decode=None):
    """Yield (token id, piece of text) from the first token on, including the one that ends it.

    `detokenize` is a `Tokenizer.detokenizer()`, `sample` a `sampler(...)`.
    """
    sentences = SentenceStream(sentence_limit)
    for count in range(1, max_new_tokens + 1):
        piece = detokenize(token)
        yield token, piece
        if token in stop or count == max_new_tokens:
            return
        with timer("decode"):
            token = sample(next_logits(model, cache, sentences, token, piece, decode))


def seal_finished(cache, sentences: SentenceStream, piece: str):
    """Seal the sentences that ended before `piece`, whose token is decoded next."""
    for length in sentences.push(piece):
        cache.seal(length)


def next_logits(model, cache, sentences, token: int, piece: str, decode=None) -> torch.Tensor:
    """Seal what ended before the token, then decode it. Returns the logits (V,) of the next one."""
    seal_finished(cache, sentences, piece)
    ids = torch.tensor([token], device=model.embed_tokens.weight.device)
    return model.logits((decode or model.decode)(ids, cache))[0]


def make_cache(name: str, config: SentenceKVConfig, model_config: LlamaConfig, spans: list,
               max_new_tokens: int, device, dtype, stage=nullcontext):
    """An empty cache for a prompt with these sentences: a FullCache if `name` is "full"."""
    if name == "full":
        return FullCache(model_config, spans[-1][1] + max_new_tokens, device, dtype, stage)
    return SentenceKVCache(config, model_config, spans, max_new_tokens, device, dtype, stage)


def sampler(temperature: float, top_p: float, seed: int, device):
    """A function from logits (V,) to a token id: the most likely one, or a sample."""
    generator = torch.Generator(device).manual_seed(seed)

    def sample(logits) -> int:
        if temperature == 0:
            return logits.argmax().item()
        probabilities, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities  # 0 for the most likely: it always stays
        probabilities[before >= top_p] = 0
        return order[probabilities.multinomial(1, generator=generator)].item()

    return sample


class GraphedDecode:
    """`Llama.decode` as one CUDA graph, replayed for every token: a token launches about a thousand
    kernels, and launching takes longer than running them. The graph repeats them on the same
    addresses, so it is captured again for another cache, and when the table of sentences grows."""

    def __init__(self, model):
        self.model = model
        self.ids = torch.zeros(1, dtype=torch.long, device=model.embed_tokens.weight.device)
        self.position = torch.zeros_like(self.ids)
        self.warm, self.graph, self.captured, self.states = False, None, None, None

    @torch.inference_mode()
    def __call__(self, ids: torch.Tensor, cache) -> torch.Tensor:
        self.ids.copy_(ids)
        self.position.fill_(cache.num_tokens)
        if not self.warm:  # kernels are compiled while the first token is decoded
            self.warm = True
            return self.model.decode(self.ids, cache)
        if self.captured != (cache, cache.table.capacity):
            self.captured, self.graph = (cache, cache.table.capacity), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.states = self.model.step(self.ids, self.position, cache)
        self.graph.replay()
        cache.advance(1)
        return self.states


class StageTimer:
    """Milliseconds by stage: CUDA events on a GPU, read once at the end; a clock on a CPU.

    A stage opened inside another is a part of it. Copies on another GPU stream are not counted.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.clock = "CUDA events" if self.cuda else "perf_counter"
        self.open, self.intervals = [], []

    def mark(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def __call__(self, name: str):
        self.open.append(name)
        path, start = tuple(self.open), self.mark()
        try:
            yield
        finally:
            self.open.pop()
            self.intervals.append((path, start, self.mark()))

    def totals(self) -> dict:
        """Stage -> {part: ms}, with OTHER and `total`."""
        if self.cuda:
            torch.cuda.synchronize()
        totals = {}
        for (name, *part), start, end in self.intervals:
            ms = start.elapsed_time(end) if self.cuda else (end - start) * 1e3
            stage, part = totals.setdefault(name, {}), part[0] if part else "total"
            stage[part] = stage.get(part, 0.0) + ms
        for stage in totals.values():
            stage[OTHER] = 2 * stage["total"] - sum(stage.values())  # the sum has the total once
        return totals


class Parser(argparse.ArgumentParser):
    def error(self, message):  # which would exit
        raise ValueError(message)


def options() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])

    def add(name, default, help, **how):
        help = f"{help} (%(default)s)"
        parser.add_argument(name, default=default, type=type(default), help=help, **how)

    parser.add_argument("--prompt", required=True, help="text file; - is standard input")
    parser.add_argument("--model", type=Path, help="Llama folder (SmolLM2-135M-Instruct)")
    add("--cache", "sentencekv", "where keys and values are kept", choices=("sentencekv", "full"))
    for name, help in SETTINGS.items():
        add("--" + name.replace("_", "-"), getattr(SentenceKVConfig, name), help)
    add("--max-new-tokens", 256, "write no more than this")
    add("--temperature", 0.0, "0 takes the most likely token")
    add("--top-p", 1.0, "nucleus sampling: up to this cumulative probability")
    add("--seed", 0, "random seed for sampling")
    add("--device", "auto", "auto, cpu, cuda, cuda:1, …")
    add("--dtype", "auto", "auto: bfloat16 where the hardware computes in it",
        choices=("auto", "float32", "bfloat16", "float16"))
    for name, help in (("--cuda-graph", "replay each token as one CUDA graph: faster, not timed"),
                       ("--raw", "no chat template: continue the text as it is"),
                       ("--json", "print the report as one JSON line, last")):
        parser.add_argument(name, action="store_true", help=help)
    return parser


def parse(arguments=None) -> argparse.Namespace:
    """Raises ValueError for a value that is out of range."""
    args = options().parse_args(arguments)
    for name, good in (("max_new_tokens", args.max_new_tokens >= 1),
                       ("temperature", args.temperature == 0 or 1e-3 <= args.temperature <= 1e3),
                       ("top_p", 0 < args.top_p <= 1), ("seed", 0 <= args.seed < 2**63)):
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} cannot be {getattr(args, name)}")
    if args.cuda_graph and args.cache == "full":
        raise ValueError("--cuda-graph needs --cache sentencekv: a full cache grows at every token")
    return args


def read_text(path: str | Path) -> str:
    """The text of a file, or of standard input for "-". ValueError if it is not UTF-8 or blank."""
    name = "standard input" if path == "-" else path
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is wrong") from None
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text.removesuffix("\n").removesuffix("\r")  # an editor's last newline


def check_cuda_graph(device: torch.device):
    if device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a GPU, --device is {device}")
    if triton is None:
        raise ValueError("--cuda-graph needs Triton, which this PyTorch came without")


def check_positions(n_prompt: int, n_new: int, config: LlamaConfig):
    """Raises ValueError if prompt and new tokens exceed the model's positions."""
    needed, positions = n_prompt + n_new, config.max_position_embeddings
    if needed > positions:
        raise ValueError(f"{n_prompt} prompt tokens + {n_new} new ones = {needed}, and the model"
                         f" has {positions} positions: shorten one or the other")


def stream(tokens, special: set) -> tuple[str, int, bool]:
    """Print the text as it is written. Returns it, its tokens, and whether Ctrl-C ended it."""
    text, count, interrupted = "", 0, False
    try:
        for token, piece in tokens:
            count += 1
            if token not in special:
                text += piece
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        interrupted = True
    print(flush=True)
    return text, count, interrupted


def run(args) -> int:
    config = SentenceKVConfig(**{name: getattr(args, name) for name in SETTINGS})
    text, device = read_text(args.prompt), pick_device(args.device)
    if args.cuda_graph:
        check_cuda_graph(device)
    dtype, folder = pick_dtype(args.dtype, device), args.model or download()
    tokenizer, timer = Tokenizer(folder), StageTimer(device)
    with timer("tokenize"):
        ids = tokenizer.prompt_ids(text, args.raw)
    with timer("segment"):
        spans = token_spans(tokenizer.pieces(ids), config.sentence_limit)
    model_config = load_config(folder)
    check_positions(len(ids), args.max_new_tokens, model_config)
    if max(ids) >= (size := model_config.vocab_size):
        raise ValueError(f"the prompt has token {max(ids)}, the vocabulary of the model {size}")
    stop, model = tokenizer.stop_tokens(), load_model(folder, device, dtype)
    cache = make_cache(args.cache, config, model_config, spans, args.max_new_tokens, device, dtype,
                       timer)
    sample, decode = sampler(args.temperature, args.top_p, args.seed, device), None
    progress = partial(tqdm, desc="prefill", unit="layer", leave=False, disable=None)
    first = prefill(model, cache, ids, sample, timer, progress)
    if args.cuda_graph:  # stages inside a graph cannot be timed
        cache.stage, decode = nullcontext, GraphedDecode(model)
    text, new_tokens, interrupted = stream(
        generate(model, cache, first, tokenizer.detokenizer(), sample, stop, args.max_new_tokens,
                 config.sentence_limit, timer, decode), tokenizer.special)
    report = {"text": text, "prompt_tokens": len(ids), "new_tokens": new_tokens,
              "sentences": len(spans), "sentence_limit": config.sentence_limit,
              **times(timer, max(new_tokens - 1, 0)), **cache.report(), "cache": args.cache,
              "clock": timer.clock, "device": str(device),
              "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    print_report(report)
    if args.json:
        print(json.dumps(report))
    return 130 if interrupted else 0


def times(timer: StageTimer, steps: int) -> dict:
    """Time to first token, from the prompt's text on, and time per token after it."""
    stages = {"decode": {"total": 0.0}} | timer.totals()
    ttft = sum(stages[name]["total"] for name in ("tokenize", "segment", "prefill"))
    return {"ttft_ms": ttft, "decode_ms_per_token": stages["decode"]["total"] / max(steps, 1),
            "decode_steps": steps, "stages_ms": stages}


def print_report(report: dict):
    """The tables for people, on standard error: standard output holds the answer alone."""
    stages, steps = report["stages_ms"], max(report["decode_steps"], 1)
    before, after = stages["prefill"], stages["decode"]
    rows = [("stage", "ttft ms", "decode ms/token")]
    rows += [(name, f"{stages[name]['total']:.1f}", "") for name in ("tokenize", "segment")]
    for name in [n for n in {**before, **after} if n not in (OTHER, "total")] + [OTHER]:
        rows.append((name, f"{before[name]:.1f}" if name in before else "",
                     f"{after[name] / steps:.2f}" if name in after else ""))
    rows.append(("total", f"{report['ttft_ms']:.1f}", f"{report['decode_ms_per_token']:.2f}"))
    sizes = {f"device: {name}": size for name, size in report["device_kv_parts"].items()}
    sizes |= {"device: everything": report["device_kv_bytes"], "host": report["host_kv_bytes"],
              "full cache": report["full_kv_bytes"], "selected in all": report["selected_bytes"],
              "loaded in all": report["loaded_bytes"]}
    rows.append(("\nmemory", "MiB", "of the full cache"))
    rows += [(name, f"{size / 2**20:.2f}", f"{size / report['full_kv_bytes']:.1%}")
             for name, size in sizes.items()]
    print("\n{prompt_tokens} prompt tokens in {sentences} sentences of at most {sentence_limit}"
          " tokens, {new_tokens} new tokens\n"
          "{cache} cache, {device}, {dtype}, torch {torch}, timed by {clock}\n".format(**report),
          *("{:<26}{:>14}{:>20}".format(*row) for row in rows), sep="\n", file=sys.stderr)
    if report["hit_rate"] is not None:
        print(f"{report['hit_rate']:.1%} of the selected rows were on the device", file=sys.stderr)


def main(arguments=None) -> int:
    try:
        return run(parse(arguments))
    except BrokenPipeError:  # whoever read our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        status, problem = 130, "interrupted"
    except (ValueError, OSError) as error:
        status, problem = 2, str(error)
    except RuntimeError as error:  # of the GPU, of pinned memory or of the CPU's allocator
        if not re.search("out of memory|can't allocate|not enough memory", str(error)):
            raise
        status, problem = 2, ("out of memory: a shorter prompt, a lower --token-budget or --dtype"
                              f" bfloat16 needs less ({str(error).splitlines()[0]})")
    print(f"generate.py: {problem}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    sys.exit(main())

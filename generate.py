"""Answer a prompt of several thousand tokens: `python generate.py --prompt file.txt`.

This file joins the others: text becomes tokens and sentences, the model reads them once and
writes one token after another, a cache decides what it attends to. It also measures, and it is
the command line. It knows nothing of what is inside a cache or the model.
"""

import argparse
import codecs
import json
import os
import re
import sys
import time
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path

# Read when torch is loaded: CPU threads soon stop spinning for each other and sleep. Where other
# programs run as well, one that spins holds up the very thread that it waits for.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import sentencepiece
import tokenizers
import torch
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tqdm import tqdm

from cache import FullCache, SentenceKVCache, triton
from model import GraphedDecode, load_config, load_model, read_json
from segment import SentenceStream, token_spans
from sentencekv import SCORES, SentenceKVConfig
from weights.download import download


class HuggingFaceTokens:
    """The tokens of a `tokenizer.json`."""

    def __init__(self, path: Path):
        self.model = tokenizers.Tokenizer.from_file(str(path))
        self.model.no_truncation()  # which a file may have been saved with
        self.model.no_padding()
        added = self.model.get_added_tokens_decoder()
        self.special = {index for index, token in added.items() if token.special}
        self.plain = {index: token.content for index, token in added.items()}
        self.name = self.model.id_to_token
        self.byte_of = byte_alphabet() if "ByteLevel" in repr(self.model.decoder) else None

    def encode(self, text: str, add_bos: bool) -> list[int]:
        return self.model.encode(text, add_special_tokens=add_bos).ids


class SentencePieceTokens:
    """The tokens of a Llama 2 style `tokenizer.model`."""

    def __init__(self, path: Path):
        self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.pieces = dict(enumerate(map(self.model.id_to_piece, range(len(self.model)))))
        added = read_optional(path.parent / "added_tokens.json")
        self.pieces |= {index: token for token, index in added.items()}
        self.special = {*filter(self.model.is_control, range(len(self.model))), *added.values()}
        self.plain = {}
        self.name = self.pieces.get
        self.byte_of = None

    def encode(self, text: str, add_bos: bool) -> list[int]:
        # The library does not look for `<s>` and `</s>` in text, where chat templates put them.
        ids = {self.name(index): index for index in self.special}
        parts = re.split(f"({'|'.join(map(re.escape, ids))})", text) if ids else [text]
        encoded = [self.model.bos_id()] if add_bos and self.model.bos_id() >= 0 else []
        for part in filter(None, parts):
            encoded += [ids[part]] if part in ids else self.model.encode(part)
        return encoded


def byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable character: which one stands for which.

    >>> byte_alphabet()["A"], byte_alphabet()["Ġ"]  # Ġ is a space, the 33rd unprintable byte
    (65, 32)
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


class Tokenizer:
    """Text to token ids and back, and the model's chat template."""

    def __init__(self, folder: Path):
        """Raises ValueError if `folder` holds no tokenizer, or one that cannot be read."""
        try:
            self.load(folder)
        except Exception as error:  # which is all that the two libraries promise to raise
            raise ValueError(f"no tokenizer in {folder}: {error}") from None

    def load(self, folder: Path):
        if (folder / "tokenizer.json").exists():
            self.tokens = HuggingFaceTokens(folder / "tokenizer.json")
        elif (folder / "tokenizer.model").exists():
            self.tokens = SentencePieceTokens(folder / "tokenizer.model")
        else:
            raise ValueError("neither tokenizer.json nor tokenizer.model is there")
        self.encode = self.tokens.encode
        self.special = self.tokens.special
        settings = read_optional(folder / "tokenizer_config.json")
        # A token is a string here or, in older files, a dict with its content.
        self.names = {key: value["content"] if isinstance(value, dict) else value
                      for key, value in settings.items() if key.endswith("_token") and value}
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {item["name"]: item["template"] for item in template}.get("default")
        if (folder / "chat_template.jinja").exists():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        self.chat_template = template

    def render_chat(self, message: str) -> str:
        """`message` as the user's turn, and the beginning of the model's. ValueError if it fails.

        A template comes with the weights, from anywhere: it runs in jinja2's sandbox.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        environment.filters["tojson"] = lambda value, **how: json.dumps(value, **how)
        try:
            return environment.from_string(self.chat_template).render(
                messages=[{"role": "user", "content": message}],
                add_generation_prompt=True, tools=None, documents=None, **self.names,
            )
        except Exception as error:  # it is somebody else's program
            raise ValueError(f"the model's chat template failed: {error}") from None

    def prompt_ids(self, text: str, raw: bool) -> list[int]:
        """Token ids of the prompt: through the chat template, or as it is with BOS before it."""
        if raw or self.chat_template is None:
            return self.encode(text, add_bos=True)
        return self.encode(self.render_chat(text), add_bos=False)

    def to_bytes(self, index: int) -> bytes:
        token = self.tokens.plain.get(index) or self.tokens.name(index) or ""
        if self.tokens.byte_of and index not in self.tokens.plain:
            return bytes(self.tokens.byte_of[character] for character in token)
        if byte := re.fullmatch("<0x(..)>", token):  # how sentencepiece spells a lone byte
            return bytes.fromhex(byte[1])
        return token.replace("▁", " ").encode()

    def reader(self):
        """A function from one token id after another to its piece, the text it adds.

        A token that only begins a character adds nothing; the one that ends it adds it whole. A
        special token reads as a paragraph break, so that no sentence crosses it.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def read(index: int) -> str:
            return "\n\n" if index in self.special else decoder.decode(self.to_bytes(index))

        return read

    def pieces(self, ids: list[int]) -> list[str]:
        return list(map(self.reader(), ids))


def refuse(message: str):
    raise TemplateError(message)


def read_optional(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


class StageTimer:
    """Milliseconds by stage: CUDA events on a GPU, read once at the end; a clock on the CPU.

    `with timer("prefill"):` opens a stage; one opened inside it is a part of it, and has no parts
    itself. On a GPU this is the time of the stream that computes: a copy that runs beside it
    costs nothing here.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.clock = "CUDA events" if self.cuda else "perf_counter"
        self.open, self.spans = [], []

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
            self.spans.append((path, start, self.mark()))

    def count(self, name: str) -> int:
        return sum(path == (name,) for path, _, _ in self.spans)

    def totals(self) -> dict:
        """Stage -> ms; a stage that has parts is a dict of them, with its `rest` and `total`."""
        if self.cuda:
            torch.cuda.synchronize()
        totals = {}
        for (name, *part), start, end in self.spans:
            ms = start.elapsed_time(end) if self.cuda else (end - start) * 1e3
            stage = totals.setdefault(name, {"rest": 0.0, "total": 0.0})
            shares = {part[0]: ms, "rest": -ms} if part else {"rest": ms, "total": ms}
            for key, share in shares.items():
                stage[key] = stage.get(key, 0.0) + share
        return totals


def make_chooser(temperature: float, top_p: float, seed: int, device):
    """A function from logits (V,) to the next token id: the likeliest, or a sample."""
    generator = torch.Generator(device).manual_seed(seed)

    def choose(logits) -> int:
        if temperature == 0:
            return logits.argmax().item()
        chances, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
        chances[chances.cumsum(-1) - chances >= top_p] = 0  # the likeliest is never cut off
        return order[chances.multinomial(1, generator=generator)].item()

    return choose


def read_first(model, cache, ids: list[int], choose, timer=nullcontext, progress=iter) -> int:
    """Read the prompt into the cache and choose the first token after it."""
    device = model.embed_tokens.weight.device
    with timer("prefill"):
        states = model.prefill(torch.tensor(ids, device=device), cache, progress)
        return choose(model.logits(states[-1:])[0])


def write_on(model, cache, token: int, read, choose, stop: set, max_new_tokens: int,
             sentence_limit: int, timer=nullcontext, decode=None):
    """Yield (token id, piece) from the first token on, the one in `stop` that ends it included.

    `read` and `choose` are a `Tokenizer.reader()` and a `make_chooser(...)`; `decode` stands in
    for `model.decode`.
    """
    sentences, decode = SentenceStream(sentence_limit), decode or model.decode
    device = model.embed_tokens.weight.device
    for count in range(1, max_new_tokens + 1):
        piece = read(token)
        yield token, piece
        if token in stop or count == max_new_tokens:
            return
        with timer("decode"):
            # The sentence that this token follows is sealed first: the token may ask for it.
            for length in sentences.push(piece):
                cache.end_sentence(length)
            states = decode(torch.tensor([token], device=device), cache)
            token = choose(model.logits(states)[0])


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def parse(arguments) -> argparse.Namespace:
    parser = Parser(description="Answer a long prompt with a Llama that remembers by sentence.")
    add = parser.add_argument
    defaults = SentenceKVConfig()
    add("--prompt", required=True, help="text file; - is standard input")
    add("--model", type=Path, help="Llama folder (default: SmolLM2-135M-Instruct, downloaded once)")
    add("--cache", choices=("sentencekv", "full"), default="sentencekv")
    add("--token-budget", type=int, default=defaults.token_budget,
        help="tokens attended to per KV head while decoding (%(default)s)")
    add("--keep-factor", type=float, default=defaults.keep_factor,
        help="keep so many budgets of tokens on the host; the paper: 1 to 5 (%(default)s: all)")
    add("--sink-tokens", type=int, default=defaults.sink_tokens, help="(%(default)s)")
    add("--recent-window", type=int, default=defaults.recent_window, help="(%(default)s)")
    add("--score", choices=SCORES, default=defaults.score, help="(%(default)s)")
    add("--max-new-tokens", type=int, default=256, help="(%(default)s)")
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    add("--top-p", type=float, default=1.0, help="sample among this share (%(default)s)")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (%(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    add("--cuda-graph", action="store_true",
        help="replay each token as one CUDA graph: faster, but its stages cannot be timed")
    add("--raw", action="store_true", help="no chat template: continue the text as it is")
    add("--json", action="store_true", help="print the report as one JSON line, last")
    args = parser.parse_args(arguments)
    for name, good in (("max_new_tokens", args.max_new_tokens >= 1),
                       ("temperature", args.temperature == 0 or 1e-3 <= args.temperature <= 1e3),
                       ("top_p", 0 < args.top_p <= 1), ("seed", 0 <= args.seed < 2**63)):
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} cannot be {getattr(args, name)}")
    if args.cuda_graph and args.cache == "full":
        raise ValueError("--cuda-graph needs --cache sentencekv: a full cache grows at every token")
    return args


def read_prompt(path: str) -> str:
    """The whole file, or standard input. ValueError if it is not UTF-8 text or is blank.

    The line end that editors put at the end of a file is left out: a model takes it for a sign.
    """
    name = "standard input" if path == "-" else path
    if path == "-" and sys.stdin is None:
        raise ValueError("standard input is closed")
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: byte {error.start} is wrong") from None
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror}") from None
    if not text.strip():
        raise ValueError(f"{name} is empty")
    return text.removesuffix("\n").removesuffix("\r")


def pick_device(name: str) -> torch.device:
    """The device of this name, made the current one. ValueError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", name):
        raise ValueError(f"--device {name} is not one of auto, cpu, cuda, cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        if device.index >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"--device {name}: this machine has {gpus} CUDA GPUs")
        torch.cuda.set_device(device)
    return device


def check_cuda_graph(device: torch.device):
    if device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a GPU, --device is {device}")
    if triton is None:
        raise ValueError("--cuda-graph needs Triton, which this PyTorch came without")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware computes in it, which others only emulate."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # from Ampere on
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32


def stop_tokens(folder: Path, tokenizer: Tokenizer) -> set[int]:
    """The ids that end an answer, wherever the folder's files name them."""
    name = tokenizer.names.get("eos_token")
    stop = {index for index in tokenizer.special if tokenizer.tokens.name(index) == name}
    for file in ("config.json", "generation_config.json"):
        ids = read_optional(folder / file).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if not all(isinstance(index, int) for index in ids):
            raise ValueError(f"{folder / file}: eos_token_id {ids} is no token, nor a list of them")
        stop |= set(ids)
    return stop


def check_fits(ids: list[int], max_new_tokens: int, folder: Path):
    config = load_config(folder)
    if not ids:
        raise ValueError("the tokenizer makes no token of the prompt")
    needed, positions = len(ids) + max_new_tokens, config.max_position_embeddings
    if needed > positions:
        raise ValueError(f"{len(ids)} prompt tokens + {max_new_tokens} new ones = {needed}, and the"
                         f" model has {positions} positions: shorten one or the other")
    if max(ids) >= config.vocab_size:
        raise ValueError(f"the tokenizer makes token {max(ids)}, the model has {config.vocab_size}")


def make_cache(args, config: SentenceKVConfig, model_config, spans, device, dtype, stage):
    if args.cache == "full":
        max_tokens = spans[-1][1] + args.max_new_tokens
        return FullCache(model_config, max_tokens, device, dtype, stage)
    return SentenceKVCache(config, model_config, spans, args.max_new_tokens, device, dtype, stage)


def write_out(tokens, special: set) -> tuple[str, int, bool]:
    """Print the text as it is made. Returns it, its tokens, and whether Ctrl-C ended it."""
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
    config = SentenceKVConfig(**{name: getattr(args, name) for name in (
        "token_budget", "keep_factor", "sink_tokens", "recent_window", "score")})
    prompt, device = read_prompt(args.prompt), pick_device(args.device)
    if args.cuda_graph:
        check_cuda_graph(device)
    dtype, folder = pick_dtype(args.dtype, device), args.model or download()
    tokenizer, timer = Tokenizer(folder), StageTimer(device)
    with timer("tokenize"):
        ids = tokenizer.prompt_ids(prompt, args.raw)
    with timer("segment"):
        spans = token_spans(tokenizer.pieces(ids), config.sentence_limit)
    check_fits(ids, args.max_new_tokens, folder)
    stop = stop_tokens(folder, tokenizer)
    model = load_model(folder, device, dtype)
    cache = make_cache(args, config, model.config, spans, device, dtype, timer)

    def progress(layers):  # of the prefill, on a terminal
        return tqdm(layers, "reading", unit="layer", leave=False, disable=None, file=sys.stderr)

    choose = make_chooser(args.temperature, args.top_p, args.seed, device)
    first = read_first(model, cache, ids, choose, timer, progress)
    decode = None
    if args.cuda_graph:
        cache.stage, decode = nullcontext, GraphedDecode(model, cache)
    text, new_tokens, interrupted = write_out(
        write_on(model, cache, first, tokenizer.reader(), choose, stop,
                 args.max_new_tokens, config.sentence_limit, timer, decode),
        tokenizer.special,
    )
    report = {"text": text, "prompt_tokens": len(ids), "new_tokens": new_tokens,
              "sentences": len(spans), **times(timer), **cache.report(),
              "cache": args.cache, "clock": timer.clock, "device": str(device),
              "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}
    print_report(report)
    if args.json:
        print(json.dumps(report))
    return 130 if interrupted else 0


def times(timer: StageTimer) -> dict:
    """Time to the first token, from the prompt's text on, and per token after it."""
    stages, steps = timer.totals(), timer.count("decode")
    decode = stages.get("decode", {"total": 0.0})["total"]
    first = sum(stages[name]["total"] for name in ("tokenize", "segment", "prefill"))
    return {"ttft_ms": first, "decode_ms_per_token": decode / max(steps, 1),
            "decode_steps": steps, "stages_ms": stages}


def print_report(report: dict):
    """The tables for people, on standard error: standard output holds the answer alone."""
    def line(*cells):
        print("{:<24}{:>14}{:>20}".format(*cells), file=sys.stderr)

    stages, steps = report["stages_ms"], max(report["decode_steps"], 1)
    before, after = stages.get("prefill", {}), stages.get("decode", {})
    print(f"\n{report['prompt_tokens']} prompt tokens in {report['sentences']} sentences,"
          f" {report['new_tokens']} new tokens", file=sys.stderr)
    print(f"{report['cache']} cache, {report['device']}, {report['dtype']},"
          f" torch {report['torch']}, timed by {report['clock']}\n", file=sys.stderr)
    line("stage", "first token ms", "then ms a token")
    for name in ("tokenize", "segment"):
        line(name, f"{stages[name]['total']:.1f}", "")
    for name in [n for n in {**before, **after} if n not in ("rest", "total")] + ["rest"]:
        line("the rest" if name == "rest" else name,
             f"{before[name]:.1f}" if name in before else "",
             f"{after[name] / steps:.2f}" if name in after else "")
    line("total", f"{report['ttft_ms']:.1f}", f"{report['decode_ms_per_token']:.2f}")
    line("\nmemory", "MiB", "of the full cache")
    full = report["full_kv_bytes"]
    sizes = {f"device: {name}": size for name, size in report["device_kv_parts"].items()}
    sizes |= {"device: everything": report["device_kv_bytes"], "host": report["host_kv_bytes"],
              "full cache": full, "loaded from the host": report["loaded_bytes"]}
    for name, size in sizes.items():
        line(name, f"{size / 2**20:.2f}", f"{size / max(full, 1):.1%}")
    if report["hit_rate"] is not None:
        print(f"{report['hit_rate']:.1%} of the selected rows were on the device already",
              file=sys.stderr)


def main(arguments=None) -> int:
    try:
        return run(parse(arguments))
    except BrokenPipeError:  # whoever read our output has had enough
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

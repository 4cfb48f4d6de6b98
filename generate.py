"""Answer a prompt of several thousand tokens: `python generate.py --prompt file.txt`.

The loop comes first: prefill, then decode token by token. Then the sampler, a session
that reads a text once and answers questions about it, and the command line. This file joins
the others.
"""

import argparse
import json
import math
import os
import re
import signal
import sys
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

from support import environment  # first of all: torch reads the variables that it sets

if __name__ == "__main__":
    environment.end_at_interrupt()

import torch
from tqdm import tqdm

from cache import SentenceKVCache, triton
from model import FullCache, GraphedDecode, LlamaConfig
from segment import SentenceStream, split_at_sentences, token_spans
from sentencekv import SCORES, SentenceKVConfig
from support.document import Document, identity_of, load_document, read_text, save_document
from support.timer import OTHER, StageTimer, times
from support.trace import Trace
from weights.checkpoint import fingerprint, load_config, load_model, pick_device, pick_dtype
from weights.download import download
from weights.parallel import RANK, RANKS, added_up, agreed, join_ranks, leave_ranks
from weights.tokenizer import Tokenizer

MEMORY = "out of memory|can't allocate|not enough memory|unable to mmap"  # in a RuntimeError
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


def prefill(model, cache, ids: list[int], sample, timer=nullcontext, progress=iter,
            part_ends=()) -> int:
    """Read a text into the cache, in parts if it is long. Returns the first token after it."""
    ids = torch.tensor(ids, device=model.embed_tokens.weight.device)
    with timer("prefill"):
        for part in ids.tensor_split(part_ends):
            states = model.prefill(part, cache, progress)
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
    """A function from logits (V,) to a token id: the most likely one, or a sample. It raises
    FloatingPointError if the greatest logit is not finite; NaN counts as greater than all."""
    generator = torch.Generator(device).manual_seed(seed)

    def sample(logits) -> int:
        greatest, token = (x.item() for x in logits.max(dim=-1))
        if not math.isfinite(greatest):
            raise FloatingPointError
        if temperature == 0:
            return token
        probabilities, order = (logits.float() / temperature).softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[1:][before[1:] >= top_p] = 0  # the most likely one always stays
        return order[probabilities.multinomial(1, generator=generator)].item()

    return sample


class Session:
    """A model and the cache of what it has read: it reads texts, and writes answers after them."""

    def __init__(self, args, config: SentenceKVConfig, tokenizer: Tokenizer, model, max_tokens):
        self.args, self.config, self.tokenizer, self.model = args, config, tokenizer, model
        self.weight, self.max_tokens = model.embed_tokens.weight, max_tokens
        self.timer, self.stop = StageTimer(self.weight.device), tokenizer.stop_tokens()
        self.decode = GraphedDecode(model) if args.cuda_graph else None
        self.new_sampler = partial(sampler, args.temperature, args.top_p, args.seed,
                                   self.weight.device)
        self.sample = self.new_sampler()
        self.cache = None
        self.ids, self.spans = [], []  # all tokens in the cache; sentences of the texts among them
        self.written = []  # tokens of the answer
        self.unread = []  # the last token written, unless it ended the answer: it is read next
        self.trace = Trace() if args.trace or args.show_sentences else None

    def begin(self, spans: list):
        """The first text has these sentences."""
        self.cache = make_cache(
            self.args.cache, self.config, self.model.config, spans, self.max_tokens - spans[-1][1],
            self.weight.device, self.weight.dtype, self.timer)
        if self.trace or self.args.save:
            self.cache.positions = []

    def read(self, ids: list[int]) -> int:
        """Read a text, the first or a later one. Returns the first token after it."""
        with self.timer("segment"):
            spans = token_spans(self.tokenizer.pieces(ids), self.config.sentence_limit)
            self.cache.expect(spans) if self.cache else self.begin(spans)
        n = self.cache.num_tokens
        self.spans = self.spans + [(start + n, end + n) for start, end in spans]
        self.ids = self.ids + ids
        self.cache.stage = self.timer
        progress = partial(tqdm, desc="prefill", unit="layer", leave=False, disable=None)
        return prefill(self.model, self.cache, ids, self.next_token, self.timer, progress,
                       split_at_sentences(spans, self.args.prefill_chunk))

    def go_back(self, document: Document):
        """Go on from the end of a document, read before or loaded: forget what came after it."""
        if self.cache is None:
            self.begin(document.spans)
        self.cache.restore(document.snapshot, document.release)
        self.ids, self.spans, self.unread = document.ids, document.spans, []
        self.sample = self.new_sampler()

    def answer(self, tokens, question: str | None = None, stopped=None) -> dict:
        """Read what `tokens()` returns, print the answer until `stopped()`, return a report."""
        with self.timer("tokenize"):
            ids = self.unread + tokens()
        n_before = self.cache.num_tokens if self.cache else 0
        check_prompt(ids, n_before, 1, self.model.config)
        n_prompt = n_before + len(ids)
        new = self.written = []
        first = self.read(ids)
        if self.args.cuda_graph or self.args.compile:  # their stages cannot be timed
            self.cache.stage = nullcontext
        with nullcontext(stopped) if stopped else interrupts() as stopped:
            text = self.write(first, self.max_tokens - n_prompt, stopped)
        came = agreed(stopped())
        self.unread = [] if new[-1] in self.stop else [new[-1]]
        report = {} if question is None else {"question": question}
        report |= {
            "text": text, "interrupted": bool(came), "signal": came,
            "prompt_tokens": n_prompt, "new_tokens": len(new), "sentences": len(self.spans),
            "sentence_limit": self.config.sentence_limit, **times(self.timer, len(new) - 1),
            **added_up(self.cache.report()), "cache": self.args.cache, "clock": self.timer.clock,
            "device": str(self.weight.device),
            "dtype": str(self.weight.dtype).removeprefix("torch."), "torch": torch.__version__}
        if self.trace:
            pieces = self.tokenizer.pieces(self.ids + new)
            self.trace.add(question or "", self.cache, pieces, self.spans, report)
            report["most_attended"] = self.trace.most_attended()
        self.ids = self.ids + new[:-1]  # the cache has not seen the last
        return report

    def write(self, first: int, room: int, stopped) -> str:
        """Print an answer from its first token on, until `stopped()`. Returns its text."""
        pairs = generate(
            self.model, self.cache, first, self.tokenizer.detokenizer(), self.next_token, self.stop,
            min(self.args.max_new_tokens, room), self.config.sentence_limit, self.timer,
            self.decode)
        if self.trace:
            pairs = self.trace.watch(self.cache, pairs)
        text = ""
        try:
            for token, piece in pairs:
                self.written.append(token)
                if token not in self.tokenizer.special:
                    text += piece
                    print(piece, end="", flush=True)
                if agreed(stopped()):
                    break
        finally:
            print(flush=True)
        return text

    def next_token(self, logits) -> int:
        """Raises ValueError if the logits are not finite, with the layer where that begins. It is
        found by reading all tokens again, so that nothing has to be checked before."""
        try:
            return self.sample(logits)
        except FloatingPointError:
            finite, ids = [], torch.tensor(self.ids + self.written, device=self.weight.device)
            cache = FullCache(self.model.config, len(ids), self.weight.device, self.weight.dtype)
            hooks = [block.register_forward_hook(
                lambda block, inputs, out: finite.append(bool(out.isfinite().all())))
                for block in self.model.layers]
            self.model.prefill(ids, cache)
            for hook in hooks:
                hook.remove()
        where = f"from layer {finite.index(False)} on" if False in finite else "after its layers"
        raise ValueError(f"the model computes numbers that are not finite {where}: its weights are"
                         f" broken, or --dtype {str(self.weight.dtype)[6:]} is too narrow for them")


@contextmanager
def interrupts():
    """In here Ctrl-C and SIGTERM raise nothing: the function that this yields gives the signal that
    came first, or 0."""
    came, kinds = [], (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda number, _: came.append(number)) for kind in kinds]
    try:
        yield lambda: came[0] if came else 0
    finally:
        for kind, handler in zip(kinds, before):
            signal.signal(kind, handler)


def run(args) -> int:
    config = SentenceKVConfig(**{name: getattr(args, name) for name in SETTINGS})
    device = pick_device(join_ranks(args.device) if RANKS > 1 else args.device)
    if args.cuda_graph:
        check_cuda_graph(device)
    if args.compile:
        check_compiler(device)
    folder, dtype = args.model or download(), pick_dtype(args.dtype, device)
    tokenizer, model_config = Tokenizer(folder, args.special_tokens), load_config(folder)
    document, protected = None, config.protected_tokens
    if args.save or args.load:
        identity = identity_of(fingerprint(folder), config, dtype)
    if args.load:
        document = load_document(args.load, identity, protected, model_config.kv_shape, device)
    text = document.text if document else read_text(args.prompt)
    if document:
        tokenizer.now = document.now
    if args.chat:
        tokenizer.turn_ids("?")  # refuses a model that cannot go on

    def prompt(question: str = "") -> list[int]:
        return tokenizer.prompt_ids(f"{text}\n\n{question}" if question else text, args.raw)

    prompts = [prompt(clean(question)) for question in args.ask or [""]]
    most = max(map(len, prompts)) + args.max_new_tokens
    if args.chat:
        most = model_config.max_position_embeddings
    for ids in prompts:
        check_prompt(ids, 0, 1 if args.chat else args.max_new_tokens, model_config)
    model = load_model(folder, device, dtype)
    if args.compile:
        model.compile_step()
    session = Session(args, config, tokenizer, model, most)
    if not (args.ask or args.chat or args.save or args.load):
        return finish(session, session.answer(prompt))
    if document is None:  # what a prompt with a question and one without have in common
        ids = os.path.commonprefix([prompt()[:-1], prompt("?")])
        document = read_document(session, text, ids)
    if args.save:
        save_document(args.save, document, identity, protected)
    return (chat if args.chat else ask)(session, document, prompt)


def read_document(session: Session, text: str, ids: list[int]) -> Document:
    """Read what the prompts of all questions begin with."""
    if not ids:
        raise ValueError("the text is too short to be read before the questions")
    session.read(ids)
    say(f"{len(ids)} tokens in {len(session.spans)} sentences, read in"
        f" {session.timer.totals()['prefill']['total'] / 1e3:.1f} s")
    return Document(text, ids, session.spans, session.cache.snapshot(), session.tokenizer.now)


def ask(session: Session, document: Document, prompt) -> int:
    """Answer each question as if it were the only one."""
    for question in map(clean, session.args.ask or [""]):
        session.go_back(document)
        if question:
            print(f"\n> {question}", flush=True)
        if status := finish(session, session.answer(lambda: document.rest(prompt(question)),
                                                    question)):
            return status
    return 0


def chat(session: Session, document: Document, prompt) -> int:
    """Answer questions from the terminal. All earlier ones and their answers stay in the cache."""
    session.go_back(document)
    tokens = lambda question: document.rest(prompt(question))
    while True:
        try:
            if question := clean(input("\n> ")).strip():
                with interrupts() as stopped:
                    report = session.answer(lambda: tokens(question), question, stopped)
                tokens = session.tokenizer.turn_ids
                finish(session, report)
        except KeyboardInterrupt:
            pass
        except EOFError:
            print()
            return 0
        except ValueError as error:  # there is no room left
            say(f"generate.py: {error}")
            session.timer.totals()  # the times of what was refused


def clean(text: str) -> str:
    """Replace lone surrogates: a command line can hold bytes that are not UTF-8."""
    return text.encode(errors="replace").decode()


def finish(session: Session, report: dict) -> int:
    """Print times and memory, and write the trace. Returns the exit status."""
    if "question" in report:
        say("{ttft_ms:.0f} ms to the first token, {decode_ms_per_token:.1f} ms/token".format(
            **report))
    else:
        print_report(report)
    if session.args.show_sentences:
        say("\nattention  place  sentences of the text that received most")
        for sentence in report["most_attended"]:
            say("{share:9.1%} {place:6.0%}  {text}".format(**sentence))
        if not report["most_attended"]:
            say("none: nothing was selected")
    if session.args.json:
        print(json.dumps(report))
    if session.args.trace:
        session.trace.write(session.args.trace)
        say(f"\n{session.args.trace} shows what the answer attended to")
    return 128 + report["signal"] if report["interrupted"] else 0


def say(*lines):
    """Print for people, on standard error. Where that is closed or full, the answer is not lost."""
    try:
        print(*lines, sep="\n", file=sys.stderr)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")


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
    say("\n{prompt_tokens} prompt tokens in {sentences} sentences of at most {sentence_limit}"
        " tokens, {new_tokens} new tokens\n"
        "{cache} cache, {device}, {dtype}, torch {torch}, timed by {clock}\n".format(**report),
        *("{:<26}{:>14}{:>20}".format(*row) for row in rows))
    if report["hit_rate"] is not None:
        say(f"{report['hit_rate']:.1%} of the selected rows were on the device")


class Parser(argparse.ArgumentParser):
    def error(self, message):  # which would exit
        raise ValueError(message)


def options() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])

    def add(name, default, help, **how):
        help = f"{help} (%(default)s)"
        parser.add_argument(name, default=default, type=type(default), help=help, **how)

    parser.add_argument("--prompt", metavar="FILE", help="text file; - is standard input")
    parser.add_argument("--ask", action="append", default=[], metavar="QUESTION",
                        help="about the text, which is read once; may be given several times")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep what was read of it")
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on from it: no --prompt")
    parser.add_argument("--trace", type=Path, metavar="FILE",
                        help="write a page of what each token attends to; or its data, .json")
    parser.add_argument("--model", type=Path, help="Llama folder (SmolLM2-135M-Instruct)")
    add("--cache", "sentencekv", "where keys and values are kept", choices=("sentencekv", "full"))
    for name, help in SETTINGS.items():
        add("--" + name.replace("_", "-"), getattr(SentenceKVConfig, name), help)
    add("--prefill-chunk", 8192, "tokens read at a time: fewer take less memory, and more time")
    add("--max-new-tokens", 256, "write no more than this")
    add("--temperature", 0.0, "0 takes the most likely token")
    add("--top-p", 1.0, "nucleus sampling: up to this cumulative probability")
    add("--seed", 0, "random seed for sampling")
    add("--device", "auto", "auto, cpu, cuda, cuda:1, …")
    add("--dtype", "auto", "auto: bfloat16 where the hardware computes in it",
        choices=("auto", "float32", "bfloat16", "float16"))
    for name, help in (("--cuda-graph", "replay each token as one CUDA graph: faster, not timed"),
                       ("--compile", "compile a layer's step while decoding begins: faster later"),
                       ("--raw", "no chat template: continue the text as it is"),
                       ("--special-tokens", "special tokens spelled in the prompt are not text"),
                       ("--chat", "questions from the terminal; Ctrl-C ends an answer, Ctrl-D all"),
                       ("--show-sentences", "print the sentences that received most attention"),
                       ("--debug", "show where an error of the program is raised"),
                       ("--json", "print the report of each answer as one JSON line, last")):
        parser.add_argument(name, action="store_true", help=help)
    return parser


def parse(arguments=None) -> argparse.Namespace:
    """Raises ValueError for a value that is out of range."""
    args = options().parse_args(arguments)
    for name, good in (("max_new_tokens", args.max_new_tokens >= 1),
                       ("prefill_chunk", args.prefill_chunk >= 1),
                       ("temperature", args.temperature == 0 or 1e-3 <= args.temperature <= 1e3),
                       ("top_p", 0 < args.top_p <= 1), ("seed", 0 <= args.seed < 2**63)):
        if not good:
            raise ValueError(f"--{name.replace('_', '-')} cannot be {getattr(args, name)}")
    for wrong, message in (
        ((args.prompt is None) == (args.load is None), "either --prompt or --load is needed"),
        ((args.ask or args.chat) and args.raw, "--ask and --chat need a chat template, not --raw"),
        (not all(map(str.strip, args.ask)), "--ask is empty"),
        (args.chat and (args.ask or args.prompt == "-"),
         "--chat takes questions from standard input: no --ask and no --prompt -"),
        (args.chat and sys.stdin is None, "standard input is closed"),
        (args.cache == "full" and (args.save or args.load), "--save and --load need --cache"
         " sentencekv"),
        *((path and (path.is_dir() or not os.access(path.parent, os.W_OK)), f"cannot write {path}")
          for path in (args.save, args.trace)),
        (args.trace and str(args.trace) in map(str, (args.prompt, args.save, args.load)),
         f"--trace would replace {args.trace}"),
        (args.cache == "full" and (args.trace or args.show_sentences),
         "a full cache selects nothing: there is nothing to show"),
        *((getattr(args, name) and wrong, f"--{name.replace('_', '-')} {message}")
          for name in ("cuda_graph", "compile")
          for wrong, message in (
              (args.trace or args.show_sentences,
               "is not for --trace and --show-sentences: they look into every step"),
              (args.cache == "full", "needs --cache sentencekv: a full cache grows at every token")
          )),
        (RANKS > 1 and args.compile, "--compile is for a single process"),
        (RANKS > 1 and (args.chat or args.save or args.load or args.trace or args.show_sentences
                        or args.prompt == "-"), "of several processes each reads --prompt FILE;"
         " --chat, --save, --load, --trace and --show-sentences need a single one")):
        if wrong:
            raise ValueError(message)
    return args


def check_cuda_graph(device: torch.device):
    if device.type != "cuda":
        raise ValueError(f"--cuda-graph needs a GPU, --device is {device}")
    if triton is None:
        raise ValueError("--cuda-graph needs Triton, which this PyTorch came without")


def check_compiler(device: torch.device):
    """Raises ValueError if `torch.compile` does not work here."""
    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except Exception as error:  # of PyTorch, of Triton or of the machine
        problem = f"{error}".partition("\n")[0] or type(error).__name__
        raise ValueError(f"--compile needs a compiler: {problem}") from None


def check_positions(n_prompt: int, n_new: int, config: LlamaConfig):
    """Raises ValueError if prompt and new tokens exceed the model's positions."""
    needed, positions = n_prompt + n_new, config.max_position_embeddings
    if needed > positions:
        raise ValueError(f"{n_prompt} prompt tokens + {n_new} new ones = {needed}, and the model"
                         f" has {positions} positions: shorten one or the other")


def check_prompt(ids: list[int], n_before: int, n_new: int, config: LlamaConfig):
    """Raises ValueError if `n_before` tokens leave no room, or a token has no embedding."""
    check_positions(n_before + len(ids), n_new, config)
    if max(ids) >= config.vocab_size:
        raise ValueError(f"the prompt has token {max(ids)}, the vocabulary of the model"
                         f" {config.vocab_size}")


def main(arguments=None) -> int:
    """Returns the exit status: 0 answered, 1 an error of the program (--debug shows where), 2 an
    error of the user or of the machine, 130 after Ctrl-C, 141 if whoever reads the answer has
    closed it, 143 after SIGTERM. A signal while it answers ends the answer: its report is printed.
    """
    arguments = sys.argv[1:] if arguments is None else list(map(str, arguments))
    try:
        return run(parse(arguments))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        status, problem = 130, "interrupted"
    except (ValueError, OSError) as error:
        status, problem = 2, str(error)
    except (RuntimeError, MemoryError) as error:  # of the GPU, of pinned memory or of the CPU
        status, problem = 2, f"{error}".partition("\n")[0]
        if isinstance(error, RuntimeError) and not re.search(MEMORY, problem):
            status, problem = 1, unexpected(error, arguments)
        else:
            problem = ("out of memory: a shorter prompt, a lower --token-budget or --dtype"
                       f" bfloat16 needs less ({problem})")
    except Exception as error:
        status, problem = 1, unexpected(error, arguments)
    say(f"generate.py: {problem}")
    return status


def unexpected(error: Exception, arguments: list) -> str:
    if "--debug" in arguments:
        raise error
    return f"{type(error).__name__}: {error} (an error of this program: --debug shows where)"


if __name__ == "__main__":
    environment.raise_at_interrupt()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` is still run
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr), ("stdin", sys.stdin)):
        if stream is not None:
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character
        elif name != "stdin":  # it is closed
            setattr(sys, name, open(os.devnull, "w"))
    (leave_ranks if RANKS > 1 else sys.exit)(main())

"""One prefill for all methods: the model, its prompts, and the caches that write from them.

A prompt is read once, and what every layer computed of it is replayed into a cache for each method
and budget. A method may carry settings of SentenceKVConfig, and the unit that it remembers by:
`sentencekv:score=votes,keep_factor=3,unit=chunk16`. On the CPU, in float32.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import TOP, data, plain_parser
from benchmarks.methods import PUBLISHED, SHAPE, class_of, make_cache, settings_of, try_out
from benchmarks.methods.base import Evicting, MethodCache, Recording, forget_shared
from benchmarks.rows import Results, by_method, columns_of, differences
from generate import prefill, seal_finished
from model import rope_table
from segment import SentenceStream, token_spans
from sentencekv import SentenceKVConfig
from support.prompts import check_positions
from weights.checkpoint import fingerprint, load_model
from weights.models import model_folder
from weights.tokenizer import Tokenizer

CODE = ("*.py", "support", "weights", "benchmarks/*.py", "benchmarks/needles.json",
        "benchmarks/methods")
AUTHORS_ENDS = {".", "!", "?", "..."}  # tokens that end a sentence in the authors' code


@dataclass(frozen=True)
class Method:
    """One way to remember, at one budget."""

    spec: str  # as it was asked for
    budget: int

    @property
    def sentence_limit(self) -> int:
        default = getattr(class_of(self.spec), "sentence_limit", SentenceKVConfig.sentence_limit)
        return settings_of(self.spec).get("sentence_limit", default)

    @property
    def row_budget(self) -> int | None:
        return self.budget if class_of(self.spec).budgeted else None

    def new_cache(self, model, pieces: list[str], max_new_tokens: int):
        unit = settings_of(self.spec).get("unit", "sentence")
        spans = units(pieces, unit, self.sentence_limit)
        return make_cache(self.spec, model.config, self.budget, spans, max_new_tokens)


def units(pieces: list[str], unit: str, limit: int) -> list[tuple[int, int]]:
    """The prompt in sentences of at most `limit` tokens, in chunks (`chunkN`: N tokens each), or
    with an end after every mark of the authors' code (`authors`)."""
    if unit == "sentence":
        return token_spans(pieces, limit)
    if unit.startswith("chunk"):
        ends = [*range(int(unit[5:]), len(pieces), int(unit[5:]))]
    elif unit == "authors":
        ends = [i for i, piece in enumerate(pieces, 1) if piece in AUTHORS_ENDS]
    else:
        raise ValueError(f"unit {unit!r} is not sentence, chunkN or authors")
    ends = sorted({*ends, len(pieces)})
    return list(zip([0, *ends], ends))


class Writer:
    """One method's cache, and the tokens written with it."""

    def __init__(self, method: Method, cache, detokenize):
        self.method, self.cache, self.detokenize = method, cache, detokenize
        self.sentences = SentenceStream(method.sentence_limit)
        self.tokens, self.pieces = [], []

    def read_on(self, token: int):
        """Take the token that is decoded next."""
        piece = self.detokenize(token)
        self.tokens.append(token)
        self.pieces.append(piece)
        seal_finished(self.cache, self.sentences, piece)

    def row(self, **result) -> dict:
        """Of a file of results. `device` is a share of what the full cache has there."""
        costs = {name: round(value, 1) for name, value in self.cache.cost()._asdict().items()}
        costs["device"] = round(costs["device"] / self.cache.num_tokens, 4)
        return {"method": self.method.spec, "budget": self.method.row_budget, **result, **costs}


@torch.inference_mode()
def decode_together(model, writers: list[Writer]) -> torch.Tensor:
    """Logits (M, vocab) after each writer's last token: `Llama.decode` with M caches, all at the
    same position. Each attends for itself; the weights are read once for all."""
    def attend(attention, layer, x):
        qkv = (heads.split(1, dim=1) for heads in attention.qkv(x, rope))
        return attention.o_proj(torch.cat([
            attention.attend(q, *writer.cache.layers[layer].decode(q, k, v))
            for writer, q, k, v in zip(writers, *qkv)]))

    x = model.embed_tokens(torch.tensor([writer.tokens[-1] for writer in writers]))
    position = torch.tensor([writers[0].cache.num_tokens])
    rope = rope_table(model.config, position, x.dtype)
    for layer, block in enumerate(model.layers):
        x = x + attend(block.self_attn, layer, block.input_layernorm(x))
        x = x + block.mlp(block.post_attention_layernorm(x))
    for writer in writers:
        writer.cache.advance(1)
    return model.logits(model.norm(x))


def greedy(logits) -> int:
    return logits.argmax().item()


class Bench:
    """A model with its tokenizer, and prompts read once for all methods."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer(folder)
        self.model = load_model(folder, torch.device("cpu"), torch.float32)
        self.stop = self.tokenizer.stop_tokens()
        self.folder = folder

    def prompt_ids(self, example) -> list[int]:
        return self.tokenizer.prompt_ids(example.message, not example.chat, example.prefix)

    def record(self, ids: list[int]) -> tuple[Recording, int]:
        """What the layers computed of the prompt, and the token that comes first after it."""
        forget_shared()
        recording = Recording()
        return recording, prefill(self.model, recording, ids, greedy)

    def writers(self, recording, pieces: list[str], max_new_tokens: int, methods: list[Method]):
        """Yield lists of at most 10 writers that have read the prompt: their caches take memory."""
        for first in range(0, len(methods), 10):
            yield [Writer(m, recording.replay(m.new_cache(self.model, pieces, max_new_tokens)),
                          self.tokenizer.detokenizer()) for m in methods[first : first + 10]]

    def answers(self, ids: list[int], max_new_tokens: int, methods: list[Method],
                n_document: int | None = None):
        """Yield a `Writer` for every method, when its answer to one prompt is written. Full
        attention reads the prompt, or its first `n_document` tokens: then each method reads the
        others, the question, token by token."""
        n_read = len(ids) if n_document is None else n_document
        room = len(ids) - n_read + max_new_tokens
        check_positions(len(ids), max_new_tokens, self.model.config)
        recording, first = self.record(ids[:n_read])
        pieces = self.tokenizer.pieces(ids)[:n_read]
        for writers in self.writers(recording, pieces, room, methods):
            tokens = [first] * len(writers)
            for token in ids[n_read:]:
                for writer in writers:
                    writer.read_on(token)
                tokens = decode_together(self.model, writers).argmax(dim=-1).tolist()
            for writer in writers:
                writer.tokens, writer.pieces = [], []
            yield from self.write(writers, tokens, max_new_tokens)

    def write(self, writers: list[Writer], tokens: list[int], max_new_tokens: int) -> list[Writer]:
        """All writers go on from their first tokens, until each has ended its answer."""
        live = writers
        for n_left in reversed(range(max_new_tokens)):
            for writer, token in zip(live, tokens):
                writer.read_on(token)
            live = [writer for writer in live if n_left and writer.tokens[-1] not in self.stop]
            if live:
                tokens = decode_together(self.model, live).argmax(dim=-1).tolist()
        return writers

    def document_length(self, example, ids: list[int]) -> int:
        """So many tokens of a prompt do not depend on its last line, the question."""
        text = example.message.rpartition("\n")[0].rstrip()
        if not text:
            raise ValueError(f"{example.task}, row {example.index + 1}: has one line, no question")
        other = self.tokenizer.prompt_ids(text, not example.chat)
        return len(os.path.commonprefix([ids, other]))

    def requests(self, questions: list, methods: list[Method]):
        """Yield (question, `Writer`) for every question of one document and every method."""
        prompts = [self.prompt_ids(example) for example in questions]
        n = min(self.document_length(questions[0], prompts[0]), len(os.path.commonprefix(prompts)))
        room = max(map(len, prompts)) - n + questions[0].max_new_tokens
        pieces = self.tokenizer.pieces(prompts[0])[:n]
        seen = self.record(prompts[0])[0].document_and_last_queries(n)
        blind, caches = self.record(prompts[0][:n])[0], []
        for method in methods:
            cache = method.new_cache(self.model, pieces, room)
            sees = isinstance(cache, Evicting) and cache.sees == "question"
            (seen if sees else blind).replay(cache)
            if sees:
                cache.forget_window()
            caches.append(cache)
        for example, ids in zip(questions, prompts):
            writers, tokens = [], []
            for method, cache in zip(methods, caches):
                if isinstance(cache, MethodCache):
                    cache = cache.fork()
                else:
                    cache.truncate(n)
                writers.append(Writer(method, cache, self.tokenizer.detokenizer()))
                rest = self.tokenizer.pieces(ids[n:])
                cache.expect(token_spans(rest, method.sentence_limit))
                tokens.append(prefill(self.model, cache, ids[n:], greedy))
            yield from zip([example] * len(writers), self.write(writers, tokens,
                                                                example.max_new_tokens))

    def text(self, writer: Writer) -> str:
        pairs = zip(writer.tokens, writer.pieces)
        return "".join(piece for token, piece in pairs if token not in self.tokenizer.special)

    def losses(self, ids: list[int], n_prompt: int, methods: list[Method]):
        """Yield (`Writer`, mean NLL of the tokens after the prompt), read one by one."""
        recording, _ = self.record(ids[:n_prompt])
        pieces = self.tokenizer.pieces(ids)[:n_prompt]
        for readers in self.writers(recording, pieces, len(ids) - n_prompt, methods):
            losses = []
            for i in range(n_prompt, len(ids) - 1):
                for reader in readers:
                    reader.read_on(ids[i])
                losses.append(-decode_together(self.model, readers).log_softmax(-1)[:, ids[i + 1]])
            yield from zip(readers, torch.stack(losses).mean(dim=0).tolist())


def haystack(bench: Bench, text: str, n_tokens: int) -> list[str]:
    """Paragraphs from the middle of a book that have about so many tokens."""
    paragraphs = [p.strip() for p in text.replace("\r\n", "\n").split("\n\n") if p.strip()]
    taken, count = [], 0
    for paragraph in paragraphs[len(paragraphs) // 3 :]:
        count += len(bench.tokenizer.encode(paragraph, add_bos=False)) + 1
        if count > n_tokens:
            break
        taken.append(paragraph)
    return taken


def numbers(kind=int):
    return lambda text: [kind(part) for part in text.split(",")]


def parser(program: str, doc: str):
    """With the options of every program of quality."""
    made = plain_parser(program, doc)
    made.set_defaults(program=program)
    add = made.add_argument
    add("--data", nargs="+", required=True, help="files, or names of benchmarks/data.py")
    add("--model", type=Path, help="DIR, FILE.gguf or NAME (smollm2-135m-instruct)")
    add("--methods", help="separated by blanks or semicolons",
        default=" ".join(("full", "sentencekv", "published", *PUBLISHED)))
    add("--budgets", type=numbers(), default=[128, 256])
    add("--limit", type=int, help="the first so many rows of every file, documents, or passages")
    add("--pair", metavar="METHOD", help="show also by how much each method differs from this one")
    add("--out", type=Path, help="results: see benchmarks/rows.py. What is there is not done again")
    return made


def asked_methods(args) -> list[Method]:
    """What has no budget is run once. A class from a file is tried out."""
    methods = []
    for spec in dict.fromkeys(args.methods.replace(";", " ").split()):
        sees = settings_of(spec).get("sees")
        if sees and (sees != "nothing" or args.program != "requests"):
            raise ValueError(f"method {spec!r}: sees=nothing is for requests")
        if ".py:" in spec:
            try_out(spec)
        methods += [Method(spec, budget) for budget in sorted({*args.budgets})
                    if budget == max(args.budgets) or class_of(spec).budgeted]
    for method in methods:
        method.new_cache(SimpleNamespace(config=SHAPE), ["."], 1)  # are its settings possible?
    return methods


def commit() -> str:
    """The last that changed the code that measures, and whether it has changed since."""
    def git(*arguments):
        return subprocess.run(["git", *arguments, "--", *CODE], cwd=TOP, text=True,
                              capture_output=True).stdout.strip()

    try:
        found = git("log", "-1", "--format=%h") or "not in a repository"
        if git("status", "--porcelain"):
            changes = hashlib.sha256(git("diff", "HEAD").encode()).hexdigest()
            return f"{found} and changes {changes[:8]}"
        return found
    except OSError:
        return "without git"


def machine_name(device=torch.device("cpu")) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{torch.get_num_threads()} threads of {cpu}"


def provenance(program: str, asked: dict, model: Path | str, files: list[Path],
               device=torch.device("cpu"), dtype=torch.float32) -> dict:
    """The first line of a file of results. `asked` are the options that choose what is asked; a
    model that is a name has random weights."""
    names = [path.name for path in files]
    if len({*names}) < len(names):
        raise ValueError(f"two files have one name: {', '.join(names)}")
    real = isinstance(model, Path)
    options = [" ".join(option.split()) for option in sys.argv[1:]]
    return {"command": shlex.join(["python", "-m", f"benchmarks.{program}", *options]),
            "commit": commit(), "torch": torch.__version__, "dtype": str(dtype)[6:],
            "machine": machine_name(device), "model": model.name if real else model,
            "model_sha256": fingerprint(model) if real else "random weights",
            "inputs": {path.name: data.digest_of(path) for path in files}, "asked": asked}


def run(args, asked: tuple, work, overall: str | None):
    """Let `work(args, bench, methods, results)` measure what is missing, and print a table."""
    args.data = [data.find(name) for name in args.data]
    methods, bench = asked_methods(args), Bench(model_folder(args.model))
    chosen = {name: str(getattr(args, name)) for name in asked}
    own = {method.spec.partition(".py:")[0] + ".py" for method in methods if ".py:" in method.spec}
    files = [*args.data, *map(Path, sorted(own))]
    results = Results(args.out, provenance(args.program, chosen, bench.folder, files))
    work(args, bench, methods, results)
    columns = columns_of(results.rows, overall)
    print(by_method(columns))
    if args.pair:
        if args.pair not in {row["method"] for row in results.rows}:
            raise ValueError(f"--pair {args.pair}: there are no rows of this method")
        print(f"\nThe difference from `{args.pair}`, prompt by prompt:\n")
        print(by_method([c._replace(rows=differences(c.rows, args.pair)) for c in columns]))

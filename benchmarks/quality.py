"""What each method still answers, side by side on one prefill.

    python -m benchmarks.quality ruler --data RULER.jsonl --methods "full snapkv sentencekv"
    python -m benchmarks.quality ruler --generate single,vt --data BOOK.txt --length 4000
    python -m benchmarks.quality needle --data BOOK.txt --lengths 1000,2000,4000 --depths 0,.5,1
    python -m benchmarks.quality longbench --data QASPER.jsonl
    python -m benchmarks.quality perplexity --data BOOK.txt --length 3000 --new-tokens 256
    python -m benchmarks.quality recall --data BOOK.txt --length 3000 --new-tokens 64
    python -m benchmarks.quality jaccard --data BOOK.txt --length 3000
    python -m benchmarks.quality sinks --data BOOK.txt --length 3000
    python -m benchmarks.quality requests --data BOOK.txt --count 12 --budgets 256,512
    python -m benchmarks.quality leaderboard

The prompt is read once, and its keys and values are replayed into a cache for every method and
budget. A method may carry settings of SentenceKVConfig, and the unit that it remembers by:
`sentencekv:score=votes,keep_factor=3,unit=chunk16`. Results go to --out, one JSON line each; what
is there already is not done again. Runs on the CPU in float32.

`requests` asks eight questions of one document, each as if it were the only one after it. Methods
that choose what to keep once choose it for the first question; with `sees=nothing` for none.
`leaderboard` measures nothing: it makes a table and a picture of what was measured.
"""

import argparse
import json
import math
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from benchmarks import tasks
from benchmarks.methods import (
    METHODS,
    SENTENCE_METHODS,
    cost,
    has_budget,
    make_cache,
    reads_on,
    settings_of,
    split,
    try_out,
)
from benchmarks.methods.base import (
    Evicting,
    MethodCache,
    NumberedLayer,
    Recording,
    forget_shared,
    window_attention,
)
from benchmarks.rows import at_every_budget, differences, table
from benchmarks.segmentation import authors_spans
from cache import NO_ROW, SentenceKVCache
from generate import prefill, seal_finished
from model import FullCache, LlamaConfig, rope_table
from segment import SentenceStream, token_spans
from sentencekv import SentenceKVConfig, find_secondary_sinks
from support.document import read_text
from support.prompts import check_positions
from weights.checkpoint import load_model
from weights.models import model_folder
from weights.tokenizer import Tokenizer


THIRD = Fraction(1, 3)
# Run when asked for:
STUDIES = ("plain", "last_query", "sentencekv_16bit", "sentencekv_4bit", "two_level",
           "boxes", "two_vectors", "two_bit_keys", "best_sentences", "best_tokens")


@dataclass(frozen=True)
class Method:
    """One way to remember, at one budget."""

    spec: str  # as it was asked for
    budget: int

    @property
    def name(self) -> str:
        return split(self.spec)[0]

    @property
    def settings(self) -> dict:
        return settings_of(self.spec)

    @property
    def sentence_limit(self) -> int:
        return self.settings.get("sentence_limit", SentenceKVConfig.sentence_limit)

    def new_cache(self, model, pieces: list[str], max_new_tokens: int):
        settings = self.settings
        settings.pop("sees", None)
        if "unit" in settings and self.name not in SENTENCE_METHODS:
            raise ValueError(f"method {self.name!r} remembers by no unit")
        spans = units(pieces, settings.pop("unit", "sentence"), self.sentence_limit)
        return make_cache(self.name, model.config, self.budget, spans, max_new_tokens, **settings)


def units(pieces: list[str], unit: str, limit: int) -> list[tuple[int, int]]:
    """The prompt in sentences of at most `limit` tokens, or in what they are compared with.

    `chunkN`: N tokens each; `mergedN`: sentences joined until they have N tokens; `authors`: the
    rule of the authors' code.
    """
    if unit == "sentence":
        return token_spans(pieces, limit)
    if unit.startswith("chunk"):
        size = int(unit[5:])
        ends = [*range(size, len(pieces), size)]
    elif unit.startswith("merged"):
        ends, start = [], 0
        for a, b in token_spans(pieces, limit):
            if b - start >= int(unit[6:]):
                ends, start = [*ends, b], b
    elif unit == "authors":
        return authors_spans(pieces)
    else:
        raise ValueError(f"unit {unit!r} is not sentence, chunkN, mergedN or authors")
    ends = sorted({*ends, len(pieces)})
    return list(zip([0, *ends], ends))


class Writer:
    """One method's cache, the tokens written with it, and the seconds that the cache took."""

    def __init__(self, method: Method, cache, detokenize):
        self.method, self.cache, self.detokenize = method, cache, detokenize
        self.sentences = SentenceStream(method.sentence_limit)
        self.tokens, self.pieces, self.seconds = [], [], 0.0

    def read_on(self, token: int):
        """Take the token that is decoded next."""
        piece = self.detokenize(token)
        self.tokens.append(token)
        self.pieces.append(piece)
        with self.clock():
            seal_finished(self.cache, self.sentences, piece)

    @contextmanager
    def clock(self):
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start

    def attend(self, attention, layer: int, q, k, v):
        with self.clock():
            return attention.attend(q, *self.cache.layers[layer].decode(q, k, v))

    def advance(self):
        with self.clock():
            self.cache.advance(1)

    def cost(self) -> dict:
        return {name: round(value, 1) for name, value in cost(self.cache)._asdict().items()}


@torch.inference_mode()
def decode_together(model, writers: list[Writer]) -> torch.Tensor:
    """Logits (M, vocab) after each writer's last token: `Llama.decode` with M caches.

    All are at the same position. Each attends for itself; the weights are read once for all.
    """
    def attend(attention, layer, x):
        qkv = (heads.split(1, dim=1) for heads in attention.qkv(x, rope))
        return attention.o_proj(torch.cat([
            writer.attend(attention, layer, *one) for writer, *one in zip(writers, *qkv)]))

    x = model.embed_tokens(torch.tensor([writer.tokens[-1] for writer in writers]))
    position = torch.tensor([writers[0].cache.num_tokens])
    rope = rope_table(model.config, position, x.dtype)
    for layer, block in enumerate(model.layers):
        x = x + attend(block.self_attn, layer, block.input_layernorm(x))
        x = x + block.mlp(block.post_attention_layernorm(x))
    for writer in writers:
        writer.advance()
    return model.logits(model.norm(x))


def batched(methods: list[Method]):
    """So many at a time that their caches fit into memory."""
    return [methods[i : i + 10] for i in range(0, len(methods), 10)]


class Bench:
    """A model with its tokenizer, and prompts read once for all methods."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer(folder)
        self.model = load_model(folder, torch.device("cpu"), torch.float32)
        self.stop = self.tokenizer.stop_tokens()
        self.name = folder.name

    def prompt_ids(self, example) -> list[int]:
        return self.tokenizer.prompt_ids(example.message, not example.chat, example.prefix)

    def record(self, ids: list[int]) -> tuple[Recording, int]:
        """What the layers computed of the prompt, and the token that comes first after it."""
        forget_shared()
        recording = Recording()
        first = prefill(self.model, recording, ids, lambda logits: logits.argmax().item())
        return recording, first

    def answers(self, ids: list[int], max_new_tokens: int, methods: list[Method]):
        """Yield a `Writer` for every method, when its answer to one prompt is written."""
        check_positions(len(ids), max_new_tokens, self.model.config)
        recording, first = self.record(ids)
        pieces = self.tokenizer.pieces(ids)
        for group in batched(methods):
            writers = [Writer(m, recording.replay(m.new_cache(self.model, pieces, max_new_tokens)),
                              self.tokenizer.detokenizer()) for m in group]
            yield from self.write(writers, [first] * len(writers), max_new_tokens)

    def requests(self, questions: list, methods: list[Method]):
        """Yield (question, `Writer`) for every question of one document and every method."""
        prompts = [self.prompt_ids(example) for example in questions]
        text = questions[0].message.rpartition("\n\n")[0]
        n = len(os.path.commonprefix([*prompts, self.tokenizer.prompt_ids(text)]))
        pieces = self.tokenizer.pieces(prompts[0])[:n]
        seen = self.record(prompts[0])[0].document_and_last_queries(n)
        blind, caches = self.record(prompts[0][:n])[0], []
        for method in methods:
            cache = method.new_cache(self.model, pieces, len(prompts[0]) - n + 99)
            sees = isinstance(cache, Evicting) and method.settings.get("sees") != "nothing"
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
                tokens.append(self.read_question(cache, ids[n:], method))
            yield from zip([example] * len(writers), self.write(writers, tokens,
                                                                example.max_new_tokens))

    def read_question(self, cache, ids: list[int], method: Method) -> int:
        """Returns the first token of the answer."""
        cache.expect(token_spans(self.tokenizer.pieces(ids), method.sentence_limit))
        states = self.model.prefill(torch.tensor(ids), cache)
        return self.model.logits(states[-1:])[0].argmax().item()

    def write(self, writers: list[Writer], tokens: list[int], max_new_tokens: int) -> list[Writer]:
        """All writers go on from their first tokens, until each has ended its answer."""
        live = writers
        for _ in range(max_new_tokens):
            for writer, token in zip(live, tokens):
                writer.read_on(token)
            live = [w for w in live if w.tokens[-1] not in self.stop]
            if not live or len(live[0].tokens) == max_new_tokens:
                break
            tokens = decode_together(self.model, live).argmax(dim=-1).tolist()
        return writers

    def text(self, writer: Writer) -> str:
        pairs = zip(writer.tokens, writer.pieces)
        return "".join(piece for token, piece in pairs if token not in self.tokenizer.special)

    def losses(self, ids: list[int], n_prompt: int, methods: list[Method]):
        """Yield (`Writer`, mean NLL of the tokens after the prompt), read one by one."""
        recording, _ = self.record(ids[:n_prompt])
        pieces = self.tokenizer.pieces(ids)
        for group in batched(methods):
            readers = [Writer(m, recording.replay(
                m.new_cache(self.model, pieces[:n_prompt], len(ids) - n_prompt)),
                self.tokenizer.detokenizer()) for m in group]
            losses = []
            for i in range(n_prompt, len(ids) - 1):
                for reader in readers:
                    reader.read_on(ids[i])
                losses.append(-decode_together(self.model, readers).log_softmax(-1)[:, ids[i + 1]])
            yield from zip(readers, torch.stack(losses).mean(dim=0).tolist())

    def recall(self, ids: list[int], n_prompt: int, methods: list[Method]):
        """Yield (method, layer, share of the attention mass, relative error of the output).

        The full cache writes; every method is shown the same queries and asked what it would
        attend to. Means over the tokens after the prompt.
        """
        recording, _ = self.record(ids[:n_prompt])
        pieces = self.tokenizer.pieces(ids)
        caches = [m.new_cache(self.model, pieces[:n_prompt], len(ids) - n_prompt) for m in methods]
        witness = Witness(self.model.config, len(ids), [recording.replay(c) for c in caches])
        recording.replay(witness)
        sentences = [SentenceStream(method.sentence_limit) for method in methods]
        for token, piece in zip(ids[n_prompt:], pieces[n_prompt:]):
            for cache, stream in zip(caches, sentences):
                seal_finished(cache, stream, piece)
            self.model.decode(torch.tensor([token]), witness)
        for method, seen in zip(methods, witness.seen):
            for layer, pairs in enumerate(seen):
                yield method, layer, mean(m for m, _ in pairs), mean(e for _, e in pairs)

    def jaccard(self, ids: list[int], methods: list[Method]):
        """Yield (method, layer, Jaccard similarity of its choice with the next layer's).

        The mean over KV heads of |A ∩ B| / |A ∪ B| for the positions chosen of the prompt, when
        its last token is the one that asks. ChunkKV chooses in every layer here.
        """
        recording, first = self.record(ids)
        pieces = self.tokenizer.pieces(ids)
        for method in methods:
            cache = method.new_cache(self.model, pieces, 1)
            cache.reuse = 1
            self.model.decode(torch.tensor([first]), recording.replay(cache))
            chosen = [[set(head.tolist()) - {NO_ROW} for head in layer]
                      for layer in chosen_by(cache)]
            for layer, (here, there) in enumerate(pairwise(chosen)):
                yield method, layer, mean(len(a & b) / len(a | b) for a, b in zip(here, there))


    def sinks(self, ids: list[int], config: SentenceKVConfig):
        """Yield (layer, secondary sinks of a head, attention that they get, and that sinks get).

        Means over heads; attention is that of the last 32 queries, as a share of all of it.
        """
        recording, _ = self.record(ids)
        for layer, (q, k, _) in enumerate(recording.qkv):
            secondary = find_secondary_sinks(k, config)  # (H_kv, T)
            attention = window_attention(q, k, 32, 1) / 32  # (H_kv, T - 32): no sink is later
            yield (layer, secondary.sum(dim=-1).float().mean().item(),
                   (attention * secondary[:, :-32]).sum(dim=-1).mean().item(),
                   attention[:, : config.sink_tokens].sum(dim=-1).mean().item())


def chosen_by(cache) -> list:
    """For every layer the positions (H_kv, n) that were chosen of the prompt."""
    if isinstance(cache, SentenceKVCache):
        if cache.config.keep_factor != math.inf or cache.config.secondary_sinks:
            raise ValueError("jaccard needs keep_factor=inf,secondary_sinks=0: else rows are no"
                             " positions")
        return [layer.slot_row.masked_fill(layer.slot_place == 0, NO_ROW)  # without the sinks
                for layer in cache.layers]
    if getattr(cache, "kept_at", [None])[0] is None:
        raise ValueError(f"{type(cache).__name__} chooses no tokens of the prompt once and for all")
    return cache.kept_at


class Witness:
    """A full cache that also asks other caches what they would have attended to."""

    def __init__(self, config, n_tokens, others):
        self.full, self.others = FullCache(config, n_tokens, "cpu", torch.float32), others
        self.layers = [NumberedLayer(self, number) for number in range(len(self.full.layers))]
        self.seen = [[[] for _ in self.layers] for _ in others]

    num_tokens = property(lambda self: self.full.num_tokens)

    def prefill(self, layer, *qkv):
        return self.full.layers[layer].prefill(*qkv)

    def advance(self, n_tokens):
        decoding = self.full.num_tokens > 0
        self.full.advance(n_tokens)
        for other in self.others if decoding else ():
            other.advance(n_tokens)

    def decode(self, layer, q, k, v):
        full = self.full.layers[layer].decode(q, k, v)
        mass, output = attend(q, *full)
        for other, seen in zip(self.others, self.seen):
            part, theirs = attend(q, *other.layers[layer].decode(q, k, v))
            error = ((theirs - output).norm() / output.norm()).item()
            seen[layer].append(((part - mass).exp().mean().item(), error))
        return full


def attend(q, keys, values, mask):
    """Log of the unnormalised attention mass (H_kv, G), and the output (H_kv, G, D)."""
    grouped = q.view(len(keys), -1, q.shape[-1])
    logits = grouped @ keys.mT / math.sqrt(q.shape[-1])  # (H_kv, G, n)
    if mask is not None:  # True where to attend, or log of what a key counts for
        logits = logits + (mask.log() if mask.dtype == torch.bool else mask)
    return logits.logsumexp(dim=-1), logits.softmax(dim=-1) @ values


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


def examples(args, bench: Bench) -> list[tasks.Example]:
    if args.task == "longbench":
        return [e for path in args.data for e in tasks.longbench_file(path)]
    if args.task == "ruler" and not args.generate:
        return [e for path in args.data for e in tasks.ruler_file(path)]
    text = "\n\n".join(map(read_text, args.data))
    if args.task == "needle":
        return [*tasks.needle_grid(lambda n: haystack(bench, text, n), args.lengths, args.depths)]
    unknown = set(args.generate) - set(tasks.FAMILIES)
    if unknown:
        raise ValueError(f"--generate {', '.join(unknown)}: families are"
                         f" {', '.join(tasks.FAMILIES)}")
    paragraphs = haystack(bench, text, args.length)
    return [example for family in args.generate
            for example in tasks.ruler_generate(family, paragraphs, args.count, args.seed)]


class Results:
    """One JSON line for every result, and which of them are there already."""

    def __init__(self, path: Path | None):
        self.path, self.rows = path, []
        if path and path.exists() and path.stat().st_size:
            needed = ("task", "index", "method", "budget", "score")
            self.rows = [row for _, row in tasks.read_rows(path, *needed)]

    def missing(self, task: str, index: int, methods: list[Method]) -> list[Method]:
        done = {(r["task"], r["index"], r["method"], r["budget"]) for r in self.rows}
        return [m for m in methods if (task, index, m.spec, m.budget) not in done]

    def add(self, **row):
        self.rows.append(row)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def run_answers(args, bench, methods, results):
    todo, per_task = [], {}
    for example in examples(args, bench):
        task = example.task.split()[0]  # the places of a needle are one task
        per_task[task] = per_task.get(task, 0) + 1
        if args.limit is None or per_task[task] <= args.limit:
            todo.append(example)
    for example in tqdm(todo, unit="prompt", disable=None):
        left = results.missing(example.task, example.index, methods)
        if not left:
            continue
        try:
            ids = bench.prompt_ids(example)
            for writer in bench.answers(ids, example.max_new_tokens, left):
                text, method = bench.text(writer), writer.method
                results.add(task=example.task, index=example.index, method=method.spec,
                            budget=method.budget, score=example.score(text), text=text,
                            answers=example.answers, **writer.cost(), model=bench.name)
        except ValueError as error:
            if "positions" not in str(error):
                raise
            print(f"{example.task}, row {example.index + 1}: {error}", file=sys.stderr)


def book_tokens(args, bench) -> list[tuple[str, list[int]]]:
    """(name, ids) of each passage: `--length` tokens of a book from each of `--places` on, and the
    new ones after them. The passage at a third of it is called by the book's name alone."""
    if args.new_tokens < 2:
        raise ValueError(f"--new-tokens is {args.new_tokens}, must be at least 2")
    books = []
    for path in args.data[: args.limit]:
        text, wanted = read_text(path), args.length + args.new_tokens
        for place in args.places:
            start = int(len(text) * place)
            ids = bench.tokenizer.encode(text[start : start + 8 * wanted], add_bos=True)[:wanted]
            if len(ids) < args.length + 2:
                raise ValueError(f"{path} has {len(ids)} tokens after {place} of it, and needs at"
                                 f" least {args.length + 2}: --length and two to read on")
            check_positions(args.length, len(ids) - args.length, bench.model.config)
            books.append((path.stem if place == THIRD else f"{path.stem} {place}", ids))
    return books


def run_requests(args, bench, methods, results):
    methods = [m for m in methods if reads_on(m.name)]
    paragraphs = haystack(bench, "\n\n".join(map(read_text, args.data)), args.length)
    for questions in tqdm(list(tasks.requests(paragraphs, args.count, args.seed)),
                          unit="document", disable=None):
        left = results.missing(questions[-1].task, questions[-1].index, methods)
        for example, writer in bench.requests(questions, left) if left else ():
            text, method = bench.text(writer), writer.method
            results.add(task=example.task, index=example.index, method=method.spec,
                        budget=method.budget, score=example.score(text), text=text,
                        answers=example.answers, model=bench.name)


def run_perplexity(args, bench, methods, results):
    for name, ids in tqdm(book_tokens(args, bench), unit="book", disable=None):
        task = f"nll {name}"
        left = results.missing(task, args.length, methods)
        for reader, loss in bench.losses(ids, args.length, left) if left else ():
            results.add(task=task, index=args.length, method=reader.method.spec,
                        budget=reader.method.budget, score=loss, **reader.cost(),
                        new_tokens=len(ids) - args.length, model=bench.name)


def run_recall(args, bench, methods, results):
    methods = [m for m in methods if m.name != "full"]
    for name, ids in tqdm(book_tokens(args, bench), unit="book", disable=None):
        left = results.missing(f"mass {name}", 0, methods)
        for method, layer, mass, error in bench.recall(ids, args.length, left) if left else ():
            for kind, value in (("mass", mass), ("error", error)):
                results.add(task=f"{kind} {name}", index=layer, method=method.spec,
                            budget=method.budget, score=value, model=bench.name)


def run_jaccard(args, bench, methods, results):
    for name, ids in book_tokens(args, bench):
        task = f"jaccard {name}"
        left = results.missing(task, 0, methods)
        for method, layer, similarity in bench.jaccard(ids[: args.length], left) if left else ():
            results.add(task=task, index=layer, method=method.spec, budget=method.budget,
                        score=similarity, model=bench.name)


def run_sinks(args, bench, methods, results):
    config = SentenceKVConfig()
    for name, ids in book_tokens(args, bench):
        if any(row["task"] == f"count {name}" for row in results.rows):
            continue
        for layer, *values in bench.sinks(ids[: args.length], config):
            for kind, value in zip(("count", "secondary", "first"), values):
                results.add(task=f"{kind} {name}", index=layer, method="full", budget=0,
                            score=value, model=bench.name)


def parse(arguments):
    parser = argparse.ArgumentParser(prog="benchmarks.quality", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def numbers(kind):
        return lambda text: [kind(part) for part in text.split(",")]

    add = parser.add_argument
    add("task", choices=("ruler", "needle", "longbench", "perplexity", "recall", "jaccard",
                          "sinks", "requests", "leaderboard"))
    add("--data", type=Path, nargs="+", default=[], help="task files, or books as haystacks")
    add("--model", type=Path, help="DIR, FILE.gguf or NAME (smollm2-135m-instruct)")
    add("--methods", help="separated by blanks or semicolons; default: all",
        default=" ".join(m for m in METHODS if m not in STUDIES))
    add("--budgets", type=numbers(int), default=[96, 192, 384, 768])
    add("--limit", type=int, help="so many rows of every task, or books")
    add("--generate", type=lambda text: text.split(","), default=[], help="RULER families to make")
    add("--count", type=int, default=25, help="rows of every family that is made")
    add("--seed", type=int, default=0, help="of what is made")
    add("--length", type=int, default=3000, help="tokens of the haystack or the book")
    add("--lengths", type=numbers(int), default=[1000, 2000, 4000])
    add("--depths", type=numbers(float), default=[0.0, 0.25, 0.5, 0.75, 1.0])
    add("--places", type=numbers(Fraction), default=[THIRD], help="of passages in a book, 0 to 1")
    add("--new-tokens", type=int, default=256, help="read after a book's first tokens")
    add("--pair", metavar="METHOD", help="show also by how much each method differs from this one")
    add("--out", type=Path, help="results, one JSON line each; a table and a picture beside it")
    return parser.parse_args(arguments)


def asked_methods(args) -> list[Method]:
    """What has no budget is run once, under the largest. A class from a file is tried out."""
    methods = []
    for spec in args.methods.replace(";", " ").split():
        name = split(spec)[0]
        methods += [Method(spec, b) for b in args.budgets
                    if b == max(args.budgets) or has_budget(name)]
        if name not in METHODS:
            try_out(spec)
    for method in methods:
        method.new_cache(_Shape, ["."], 1)
    return methods


class _Shape:
    """Just enough of a model to find out whether a method's settings are possible."""

    config = LlamaConfig(1, 1, 1, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                         head_dim=1, max_position_embeddings=1)


def main(arguments=None) -> int:
    args = parse(arguments)
    try:
        if args.task == "leaderboard":
            from benchmarks import leaderboard  # it draws: only here

            print(leaderboard.make())
            return 0
        if not args.data:
            raise ValueError(f"{args.task} needs --data")
        methods, results = asked_methods(args), Results(args.out)
        bench = Bench(model_folder(args.model))
        run = {"perplexity": run_perplexity, "recall": run_recall, "jaccard": run_jaccard,
               "sinks": run_sinks, "requests": run_requests}.get(args.task, run_answers)
        run(args, bench, methods, results)
        percent = args.task in ("ruler", "needle", "longbench", "requests")
        rows = at_every_budget(results.rows)
        report = table(rows, percent, above_full=args.task == "perplexity")
        if args.pair:
            report += (f"\n\nThe difference from `{args.pair}`, prompt by prompt:\n\n"
                       + table(differences(rows, args.pair), percent))
        print(report)
        if args.out and results.rows:
            args.out.with_suffix(".md").write_text(report + "\n", encoding="utf-8")
            if args.task in ("ruler", "needle", "perplexity", "sinks"):
                from benchmarks import plots

                plots.BY_TASK[args.task](results.rows, args.out.with_suffix(".png"))
    except (ValueError, OSError) as error:
        print(f"benchmarks.quality: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

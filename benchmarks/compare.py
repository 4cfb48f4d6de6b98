"""One prompt, every method: what it answers, what it attends to, what it holds.

    python -m benchmarks.compare --prompt examples/walden_house.txt --budget 256

The full cache writes an answer, and at every token of it each method is shown the same queries:
`mass` is the share of the full cache's attention that goes to the tokens within its budget, `error`
the relative error of its output, the means of all layers. Keys that a method makes up attract
attention, too, so its mass may be no share. Held, elsewhere and read are as in `methods.base.Cost`.
"""

import math
import sys
from pathlib import Path
from statistics import mean

import torch

from benchmarks import plain_parser, with_status
from benchmarks.engine import Bench, Method, Writer, asked_methods
from benchmarks.methods import METHODS
from benchmarks.rows import markdown
from model import FullCache, FullLayer
from support.document import read_text
from weights.models import model_folder


class Witness(FullLayer):
    """A layer of the full cache that also asks other caches what theirs would have attended to."""

    def __init__(self, kv, others: list):
        super().__init__(kv)
        self.others, self.seen = others, [[] for _ in others]  # (mass, error) of each token

    def decode(self, q, k, v):
        full = super().decode(q, k, v)
        mass, output = attend(q, *full)
        for other, seen in zip(self.others, self.seen):
            part, theirs = attend(q, *other.decode(q, k, v))
            error = ((theirs - output).norm() / output.norm()).item()
            seen.append(((part - mass).exp().mean().item(), error))
        return full


def attend(q, keys, values, mask):
    """Log of the unnormalised attention mass (H_kv, G), and the output (H_kv, G, D)."""
    grouped = q.view(len(keys), -1, q.shape[-1])
    logits = grouped @ keys.mT / math.sqrt(q.shape[-1])  # (H_kv, G, n)
    if mask is not None:  # True where to attend, or log of what a key counts for
        logits = logits + (mask.log() if mask.dtype == torch.bool else mask)
    return logits.logsumexp(dim=-1), logits.softmax(dim=-1) @ values


def attention(bench: Bench, ids: list[int], n_prompt: int, methods: list[Method]):
    """Yield (method, mass, error), the means of the tokens after the prompt and of all layers."""
    recording, _ = bench.record(ids[:n_prompt])
    pieces = bench.tokenizer.pieces(ids)[:n_prompt]
    writers = [writer for group in bench.writers(recording, pieces, len(ids) - n_prompt, methods)
               for writer in group]
    full = FullCache(bench.model.config, len(ids), "cpu", torch.float32)
    caches = [writer.cache for writer in writers]
    full.layers = [Witness(layer.kv, others) for layer, *others in zip(
        full.layers, *(cache.layers for cache in caches))]
    recording.replay(full)
    for token in ids[n_prompt:]:
        for writer in writers:
            writer.read_on(token)
        bench.model.decode(torch.tensor([token]), full)
        for cache in caches:
            cache.advance(1)
    for i, method in enumerate(methods):
        seen = [pair for layer in full.layers for pair in layer.seen[i]]
        yield method, *map(mean, zip(*seen))


def measure(bench: Bench, ids: list[int], max_new_tokens: int, methods: list[Method]) -> list[dict]:
    """What each method answers, attends to and holds: a row for each."""
    full = Method("full", methods[0].budget)
    writers: dict[Method, Writer] = {
        writer.method: writer for writer in bench.answers(ids, max_new_tokens, [full, *methods])}
    others = [method for method in methods if method.spec != "full"]
    seen = {full.spec: (1.0, 0.0)}
    for method, *values in attention(bench, [*ids, *writers[full].tokens], len(ids), others):
        seen[method.spec] = values
    rows = []
    for method in methods:
        mass, error = seen[method.spec]
        answer = " ".join(bench.text(writers[method]).split())
        rows.append(writers[method].row(mass=mass, error=error, answer=answer))
    return rows


def table(rows: list[dict]) -> str:
    return markdown(
        ["method", "attention mass", "output error", "held", "elsewhere", "read", "device",
         "answer"],
        ([row["method"], f"{row['mass']:.1%}" if row["mass"] < 1.001 else "no share",
          f"{row['error']:.3f}", *(f"{row[name]:.0f}" for name in ("held", "elsewhere", "read")),
          f"{row['device']:.1%}", row["answer"].replace("|", "/")] for row in rows))


@with_status
def main(arguments=None):
    parser = plain_parser("compare", __doc__)
    add = parser.add_argument
    add("--prompt", required=True)
    add("--model", type=Path)
    add("--budget", type=int, default=256)
    add("--max-new-tokens", type=int, default=48)
    add("--methods", default=" ".join(METHODS))
    args = parser.parse_args(arguments)
    args.budgets, args.program = [args.budget], "compare"
    prompt, methods = read_text(args.prompt), asked_methods(args)
    bench = Bench(model_folder(args.model))
    ids = bench.tokenizer.prompt_ids(prompt)
    print(table(measure(bench, ids, args.max_new_tokens, methods)))


if __name__ == "__main__":
    sys.exit(main())

"""Resident memory while a long text is read, and when a saved document is asked a question.

    python -m benchmarks.memory --lengths 2000,4000,8000 --chunks 512,2048,100000
    python -m benchmarks.memory --lengths 8000 --document FILE

Every line is a process of its own. `peak` is the most that reading took beside the weights, `left`
what it takes afterwards: mostly the rows on the host. Tokens are random. With `--document` the text
(of the first length) is saved in FILE; another process loads it, reads 20 tokens and writes
32. Linux, CPU.
"""

import argparse
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import torch

from cache import SentenceKVCache
from generate import generate, prefill, sampler
from support.prompts import split_at_sentences
from sentencekv import SentenceKVConfig
from support.document import (Document, identity_of, load_document, restore, save_document,
                              snapshot, want_positions)
from weights.checkpoint import fingerprint, load_model
from weights.models import model_folder

CPU, N_NEW = torch.device("cpu"), 32


def resident(name: str = "VmRSS") -> float:
    """MiB; `VmHWM` is the most since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def sentences(n_tokens: int) -> list:
    return [(start, min(start + 12, n_tokens)) for start in range(0, n_tokens, 12)]


def random_ids(n_tokens: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 40000, (n_tokens,), generator=generator).tolist()


def read(model, config, n_tokens: int, chunk: int):
    """The cache after so many random tokens."""
    spans = sentences(n_tokens)
    cache = SentenceKVCache(config, model.config, n_tokens + 100, CPU, torch.float32)
    want_positions(cache)
    cache.expect(spans)
    prefill(model, cache, random_ids(n_tokens), greedy(),
            part_ends=split_at_sentences(spans, chunk))
    return cache


def greedy():
    return sampler(0.0, 1.0, 0, CPU)


def measure_reading(folder: Path, n_tokens: int, chunk: int, document: Path | None):
    model, config = load_model(folder, CPU, torch.float32), SentenceKVConfig(token_budget=512)
    read(model, config, 100, chunk)
    before = resident()
    forget_peak()
    start = time.perf_counter()
    cache = read(model, config, n_tokens, chunk)
    print(f"| {n_tokens} | {min(chunk, n_tokens)} | {time.perf_counter() - start:.1f} |"
          f" {resident('VmHWM') - before:.0f} | {resident() - before:.0f} |")
    if document:
        saved = Document("-", random_ids(n_tokens), sentences(n_tokens), datetime.now())
        save_document(document, saved, snapshot(cache),
                      identity_of(fingerprint(folder), config, torch.float32),
                      config.protected_tokens)


def measure_loading(folder: Path, document: Path):
    model, config = load_model(folder, CPU, torch.float32), SentenceKVConfig(token_budget=512)
    read(model, config, 100, 100)
    identity = identity_of(fingerprint(folder), config, torch.float32)
    before, start = resident(), time.perf_counter()
    loaded = load_document(document, identity, config.protected_tokens, model.config, CPU)
    cache = SentenceKVCache(config, model.config, len(loaded.ids) + 100, CPU, torch.float32)
    restore(cache, loaded.kept, loaded.release)
    print(f"file: {document.stat().st_size / 2**20:.0f} MiB")
    print(f"loaded after {time.perf_counter() - start:.2f} s, {resident() - before:.0f} MiB")
    forget_peak()
    start = time.perf_counter()
    cache.expect(sentences(20))
    token = prefill(model, cache, random_ids(20), greedy())
    print(f"a question read after {time.perf_counter() - start:.2f} s, at most"
          f" {resident('VmHWM') - before:.0f} MiB, then {resident() - before:.0f} MiB")
    for _ in generate(model, cache, token, lambda token: " word", greedy(), set(), N_NEW, 16):
        pass
    print(f"{N_NEW} tokens written: {resident() - before:.0f} MiB")


def main():
    parser = argparse.ArgumentParser(prog="benchmarks.memory", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--lengths", type=numbers, default=[2000, 4000, 8000])
    parser.add_argument("--chunks", type=numbers, default=[512, 2048, 100000])
    parser.add_argument("--document", type=Path)
    parser.add_argument("--model", type=Path, help="DIR, FILE.gguf or NAME (smollm2-135m-instruct)")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    folder = model_folder(args.model)
    if args.one == "load":
        measure_loading(folder, args.document)
    elif args.one:
        measure_reading(folder, args.lengths[0], args.chunks[0], args.document)
    else:
        print("| tokens | chunk | s | peak MiB | left MiB |\n|---|---|---|---|---|", flush=True)
        jobs = [(n, chunk, "read") for n in args.lengths for chunk in args.chunks]
        if args.document:
            jobs = [(args.lengths[0], args.chunks[0], "read"), (0, 0, "load")]
        for n, chunk, what in jobs:
            command = [sys.executable, "-m", "benchmarks.memory", "--one", what, "--lengths",
                       str(n), "--chunks", str(chunk), "--model", str(folder)]
            # Without this, glibc keeps freed blocks of less than 32 MiB, and the peak is a matter
            # of chance.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
            subprocess.run(command + ["--document", str(args.document)] * bool(args.document),
                           check=True, env=environment)


if __name__ == "__main__":
    main()

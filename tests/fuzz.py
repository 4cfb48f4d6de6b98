"""Attack the program with files and texts of strangers: `python tests/fuzz.py --cases 100000`.

Each case is a number: its random choices follow from it, so a failure can be repeated with
`--first N --cases 1`. Folders are copies of tiny models with a few spoiled values or bytes; they
are read, and a short text is answered. Texts go through segmentation and the tokenizers. Strange
tokenizers encode a text and make it text again. Saved documents are spoiled, half of them with
checksums that fit again; they are loaded, and a question is answered. Good outcomes are `done` and
`refused` (one ValueError, in one line). Bad ones are `error`, `died` and `slow`, with the case.

Cases run in a process of their own, with limits of memory and time. pytest runs a small part.
"""

import argparse
import importlib
import json
import math
import os
import random
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "tests" / "reference"
SECONDS, MOST_MEMORY = 20, 4 * 2**30  # of one case, bytes of a worker beyond what it begins with
VALUES = [None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**64, 10**30, 1.5, -0.0, 1e-30, 1e308,
          math.nan, math.inf, "", "8", "x" * 10_000, "\ud800", "../..", [], [1], [[]], {}, {"a": 1},
          "LlamaForCausalLM", "<|im_end|>", "{{ 1", [None], 10**400]
PIECES = ["Dr. ", "3.5 ", "Why? ", "。", "《", "！", "\n", "\n\n", " ", "\t", "• ", "1. ", "2. ",
          "e.g. ", "...", "\"", "»", "<|im_end|>", "<s>", "</s>", "\u202e", "\x00", "\ufdd0", "é",
          "e\u0301", "👩‍👩‍👧", "שלום", "สวัสดี", "नमस्ते। ", "a", "The ", "U.S. ", "{", "}",
          "<", ">", "\r", "\r\n", "\f", "\x85", "\u2028", "\u2029", "\nAda: ", "\n[10:03] <b> ",
          "a,b,", "\n– ", "\n(a) ", "\n4.2 The", "\nINFO ", "\nat a.b(c)", "\nx = 1",
          ", and of the old mill", "Fig. [3]", "ch. IV "]


def spoil_json(value, choose: random.Random):
    """A copy of a JSON value in which one value, somewhere, is another or absent."""
    if isinstance(value, dict) and value and choose.random() < 0.9:
        name = choose.choice([*value])
        if choose.random() < 0.15:
            return {k: v for k, v in value.items() if k != name}
        if choose.random() < 0.1:
            return value | {choose.choice(["eos_token", "rope_scaling", "head_dim", "added_tokens",
                                           "chat_template", "quantization_config", "sliding_window",
                                           "layer_types", "clip_qkv", "rope_parameters"]):
                            choose.choice(VALUES)}
        return value | {name: spoil_json(value[name], choose)}
    if isinstance(value, list) and value and choose.random() < 0.9:
        i = choose.randrange(len(value))
        return [*value[:i], spoil_json(value[i], choose), *value[i + 1 :]]
    return choose.choice(VALUES)


def spoil_bytes(data: bytes, choose: random.Random) -> bytes:
    data, kind = bytearray(data), choose.random()
    if kind < 0.3:
        return bytes(data[: choose.randrange(len(data) + 1)])
    for _ in range(choose.choice([1, 3, 20])):
        place = choose.randrange(min(len(data), choose.choice([16, 200, len(data)])) or 1)
        data[place : place + 1] = bytes(choose.choice([[choose.randrange(256)], [], [255, 254]]))
    return bytes(data)


def spoil(folder: Path, choose: random.Random):
    """Change one to three files of a model folder."""
    for _ in range(choose.choice([1, 1, 2, 3])):
        path = choose.choice(sorted(folder.iterdir()))
        if path.suffix == ".json" and choose.random() < 0.85:
            try:
                value = spoil_json(json.loads(path.read_text()), choose)
                text = json.dumps(value)
            except (ValueError, RecursionError):  # spoiled before
                text = "[" * choose.choice([1, 10**5])
            path.write_text(text)
        elif choose.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(spoil_bytes(path.read_bytes(), choose))


def folder_case(choose: random.Random, base: Path, folder: Path):
    import torch

    from weights.checkpoint import load_model
    from weights.contents import check_folder
    from weights.tokenizer import Tokenizer

    shutil.copytree(base, folder)
    spoil(folder, choose)
    tokenizer = Tokenizer(check_folder(folder))
    model = load_model(folder, torch.device("cpu"), torch.float32)
    tokenizer.stop_tokens()
    ids = tokenizer.prompt_ids("Hi. It is late! Who <s>slept?")
    answer(model, tokenizer, ids)


def answer(model, tokenizer, ids: list):
    """Read a prompt and write three tokens, as generate.py does."""
    import torch

    import generate
    from sentencekv import SentenceKVConfig
    from support.prompts import check_prompt

    check_prompt(ids, 0, 3, model.config)
    config = SentenceKVConfig(token_budget=64)
    cache = generate.make_cache("sentencekv", config, model.config, len(ids) + 3, "cpu",
                                torch.float32)
    read_and_write(model, tokenizer, cache, ids)


def read_and_write(model, tokenizer, cache, ids: list):
    """Read a first or later text into the cache, and write three tokens."""
    import generate
    from segment import token_spans

    cache.expect(token_spans(tokenizer.pieces(ids), cache.config.sentence_limit))
    try:
        sample = generate.sampler(0.0, 1.0, 0, "cpu")
        first = generate.prefill(model, cache, ids, sample)
        list(generate.generate(model, cache, first, tokenizer.detokenizer(), sample, set(), 3, 16))
    except FloatingPointError:
        raise ValueError("numbers that are not finite") from None


def spoil_document(data: bytes, tensors: dict, others: list[dict], metadata: dict,
                   choose: random.Random) -> bytes:
    """The bytes of a document's file, of which these are the tensors, in which bytes, the header,
    a tensor or a value of the metadata is another. `others` are tensors of other documents."""
    from safetensors.torch import save

    kind = choose.random()
    if kind < 0.3:
        return spoil_bytes(data, choose)
    if kind < 0.5:
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(spoil_json(json.loads(data[8:size]), choose)).encode()
        header += b" " * choose.choice([0, -len(header) % 8])
        return len(header).to_bytes(8, "little") + header + data[size:]
    tensors, metadata = {**tensors}, {**metadata}
    for _ in range(choose.choice([1, 1, 2])):
        if choose.random() < 0.15:
            metadata = spoil_metadata(metadata, choose)
        else:
            spoil_tensors(tensors, others, choose)
    return save({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, metadata)


def spoil_metadata(metadata: dict, choose: random.Random) -> dict:
    name = choose.choice([*metadata, "more"])
    value = choose.choice([None, *VALUES, "9" * 5000, "-1", " 32", "\u0663", "2024-02-30"])
    text = str(value).encode(errors="replace").decode() if value is not None else None
    return {k: v for k, v in (metadata | {name: text}).items() if v is not None}


def spoil_tensors(tensors: dict, others: list[dict], choose: random.Random):
    """Change one of these tensors: its place, its type and shape, or its values."""
    import torch

    name, other = choose.choice([*tensors]), choose.choice([*tensors])
    tensor, kind = tensors[name], choose.random()
    if kind < 0.1:
        del tensors[name]
    elif kind < 0.2:
        tensors[choose.choice(["x", "2.rows", "0.rows.rows", "00.rows", "\n", ""])] = tensor
    elif kind < 0.35:
        tensors[name], tensors[other] = tensors[other], tensor
    elif kind < 0.5:
        tensors[name] = choose.choice(others).get(name, tensor)
    elif kind < 0.6:
        tensors[name] = tensor.to(getattr(torch, choose.choice(
            "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split())))
    elif kind < 0.75:
        tensors[name] = choose.choice([
            lambda t: t.flatten(), lambda t: t[None], lambda t: t.T, lambda t: t.flatten()[:0],
            lambda t: t.flatten()[:1], lambda t: t[:-1] if t.dim() else t,
            lambda t: torch.cat([t, t]) if t.dim() else t,
            lambda t: t.flatten()[0] if t.numel() else t])(tensor)
    else:
        tensors[name] = with_other_values(tensor, choose)


def with_other_values(tensor, choose: random.Random):
    """The tensor with one value, or all of them, changed."""
    import torch

    tensor = tensor.clone()
    if tensor.dtype == torch.bool:  # changed before
        return tensor.logical_not()
    if choose.random() < 0.3:
        return choose.choice([lambda t: t + 1, lambda t: t * 0, lambda t: t - 1, lambda t: t * 2,
                              lambda t: t.flip(-1) if t.dim() else t])(tensor)
    limits = torch.finfo if tensor.is_floating_point() else torch.iinfo
    low, high = limits(tensor.dtype).min, limits(tensor.dtype).max
    values = [0, 1, 2, 3, 255, 300, low, high, high // 2 if isinstance(high, int) else math.nan]
    value = min(max(choose.choice(values), low), high)
    flat = tensor.view(-1)
    for _ in range(choose.choice([1, 1, 3]) if len(flat) else 0):
        flat[choose.randrange(len(flat))] = value
    return tensor


def write_documents(place: Path) -> tuple:
    """A tiny model, its tokenizer, and documents that were saved: the bytes of the file, its
    tensors, its metadata, and the settings."""
    import torch
    from conftest import TEXT, write_tiny_folder
    from safetensors import safe_open
    from safetensors.torch import load

    from sentencekv import SentenceKVConfig
    from weights.checkpoint import load_model
    from weights.tokenizer import Tokenizer

    folder, documents = write_tiny_folder(place / "model"), []
    model, tokenizer = load_model(folder, torch.device("cpu"), torch.float32), Tokenizer(folder)
    for text in (TEXT, TEXT[50:200], TEXT * 2, "A"):
        for keep_factor, bits in ((math.inf, 16), (math.inf, 8), (2, 16)):
            config = SentenceKVConfig(64, keep_factor=keep_factor, kv_bits=bits)
            path = place / "document"
            write_document(path, text, model, tokenizer, config)
            data = path.read_bytes()
            with safe_open(path, "pt") as file:
                documents.append((data, load(data), file.metadata(), config))
    return model, tokenizer, documents


def write_document(path: Path, text: str, model, tokenizer, config):
    from datetime import datetime

    import torch

    import generate
    from segment import token_spans
    from support.document import (Document, identity_of, save_document, snapshot, want_positions)

    ids = tokenizer.prompt_ids(text, raw=True)
    spans = token_spans(tokenizer.pieces(ids), config.sentence_limit)
    cache = generate.make_cache("sentencekv", config, model.config, len(ids) + 100, "cpu",
                                torch.float32)
    want_positions(cache)
    cache.expect(spans)
    model.prefill(torch.tensor(ids), cache)
    save_document(path, Document(text, ids, spans, datetime(2024, 2, 29)), snapshot(cache),
                  identity_of("model", config, torch.float32), config.protected_tokens)


def document_case(choose: random.Random, made: tuple, folder: Path):
    import torch

    import generate
    from support.document import identity_of, load_document, restore

    model, tokenizer, documents = made
    data, tensors, metadata, config = choose.choice(documents)
    spoilt = spoil_document(data, tensors, [tensors for _, tensors, *_ in documents], metadata,
                            choose)
    folder.mkdir()
    path = folder / "document"
    path.write_bytes(spoilt)
    fits = choose.random() < 0.5 and fit_checksums(path)
    document = load_document(path, identity_of("model", config, torch.float32),
                             config.protected_tokens, model.config, torch.device("cpu"))
    assert fits or spoilt == data, "a change that was not found"
    rest = document.rest(tokenizer.prompt_ids(f"{document.text}\n\nWho slept?", raw=True))
    cache = generate.make_cache("sentencekv", config, model.config, len(document.ids) + 30, "cpu",
                                torch.float32)
    restore(cache, document.kept, document.release)
    read_and_write(model, tokenizer, cache, rest)
    document.check_unchanged()


def fit_checksums(path: Path) -> bool:
    """Make the checksums of a spoiled document fit. False if it has no place for them."""
    from support.mapped import add_checksums

    try:
        add_checksums(path)
    except Exception:
        return False
    return True


def text_case(choose: random.Random, tokenizers: list):
    from segment import sentence_ends, token_spans

    text = "".join(choose.choice(PIECES) * choose.choice([1, 1, 1, 2, 20])
                   for _ in range(choose.choice([1, 3, 10, 30])))
    ends = sentence_ends(text)
    assert ends == sorted(set(ends)) and (not text or ends[-1] == len(text))
    tokenizer = choose.choice(tokenizers)
    for raw in (True, False):
        ids = tokenizer.prompt_ids(text, raw)
        spelled = [i for i in ids if i in tokenizer.special]
        own = [i for i in tokenizer.prompt_ids("x", raw) if i in tokenizer.special]
        assert spelled == own, "a special token of the text is none of the template's"
        limit = choose.choice([1, 2, 16, 128])
        spans = token_spans(tokenizer.pieces(ids), limit)
        assert spans[0][0] == 0 and spans[-1][1] == len(ids)
        assert all(a < b <= a + limit for a, b in spans)
        assert all(x[1] == y[0] for x, y in zip(spans, spans[1:]))


NAMES = ["<end>", "<|im_end|>", "<END>", "</s>", "<", ">", "a", "  ", "", "\n", "é", "user", "<x",
         "<x>", "x>", "\ufde0", "▁", "Ġ", "<0x41>", "日本", "<" * 40]
PATTERNS = [{"String": "a"}, {"String": " "}, {"String": "<"}, {"String": ""}, {"Regex": "\\s+"},
            {"Regex": "(a+)+$"}, {"Regex": "(?:a|a){22}[b-c]"}, {"Regex": "."}, {"Regex": "("},
            {"Regex": "(?=e)"}, {"Regex": "\\p{L}+|\\d"}, {"Regex": "(.*)\\1"}, {"Regex": "[<>]"}]
SPLITS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


def any_normalizer(choose: random.Random) -> dict:
    kind = choose.choice(["Replace"] * 3 + ["Lowercase", "NFKC", "NFD", "StripAccents", "Strip",
                                            "Prepend", "Nmt", "ByteLevel", "Sequence",
                                            "BertNormalizer", "Precompiled"])
    return {"type": kind, "pattern": choose.choice(PATTERNS), "content": choose.choice(NAMES),
            "normalizers": [any_normalizer(choose) for _ in range(choose.choice([1, 2, 30]))
                            if kind == "Sequence" and choose.random() < 0.6],
            "prepend": choose.choice(NAMES), "strip_left": True, "strip_right": True,
            "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": True, "precompiled_charsmap": choose.choice(["", "AAAA", "/////w=="])}


def any_pre_tokenizer(choose: random.Random) -> dict:
    kind = choose.choice(["Split"] * 3 + ["ByteLevel"] * 2 + [
        "Whitespace", "WhitespaceSplit", "Punctuation", "Digits", "Metaspace", "Sequence",
        "CharDelimiterSplit", "BertPreTokenizer", "UnicodeScripts"])
    return {"type": kind, "pattern": choose.choice(PATTERNS), "behavior": choose.choice(SPLITS),
            "invert": choose.random() < 0.3, "add_prefix_space": choose.random() < 0.3,
            "trim_offsets": True, "use_regex": choose.random() < 0.7, "individual_digits": True,
            "replacement": choose.choice("▁_a"), "prepend_scheme": choose.choice(
                ["always", "never", "first"]), "split": True, "delimiter": choose.choice("ae "),
            "pretokenizers": [any_pre_tokenizer(choose) for _ in range(2) if kind == "Sequence"]}


def any_added_token(choose: random.Random, index: int) -> dict:
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": choose.choice([index, index, index, 0, 65, 10**6]),
            "content": choose.choice(NAMES)} | {name: choose.random() < 0.4 for name in flags}


def any_model(choose: random.Random, model: dict) -> dict:
    """Its own BPE, with merges that make names, or another kind of model with its vocabulary."""
    vocabulary = dict(model["vocab"])
    for name in choose.sample(NAMES, choose.choice([0, 2, 6])):
        vocabulary.setdefault(name, len(vocabulary))
    kind = choose.choice(["BPE"] * 3 + ["WordLevel", "WordPiece", "Unigram"])
    if kind == "Unigram":
        pieces = [[token, -choose.random()] for token in vocabulary]
        return {"type": kind, "vocab": pieces, "unk_id": choose.choice([0, None, 10**6]),
                "byte_fallback": choose.random() < 0.3}
    if kind == "BPE":
        letters = [c for c in vocabulary if len(c) == 1]
        merges = [[choose.choice(letters), choose.choice(letters)] for _ in range(9)]
        vocabulary |= {a + b: len(vocabulary) + i for i, (a, b) in enumerate(merges)
                       if a + b not in vocabulary}
        return model | {"vocab": vocabulary, "merges": merges + [["<", "x"], ["<x", ">"]] * (
            "<x" in vocabulary and "<x>" in vocabulary)}
    return {"type": kind, "vocab": vocabulary, "unk_token": choose.choice(["<", "<x>", "absent"]),
            "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}


def tokenizer_case(choose: random.Random, base: Path, folder: Path):
    """A strange tokenizer in the process that the program gives it. No text becomes special."""
    from weights.token_settings import CONTROL
    from weights.tokenizer import Tokenizer

    shutil.copytree(base, folder)
    path, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    if config.exists():  # whose numbers may be others here
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"added_tokens_decoder": None}))
    if choose.random() < 0.6:
        values["normalizer"] = any_normalizer(choose)
    if choose.random() < 0.4:
        values["pre_tokenizer"] = any_pre_tokenizer(choose)
    if choose.random() < 0.3:
        values["decoder"] = choose.choice([None, any_normalizer(choose), {"type": "Fuse"}])
    if choose.random() < 0.4:
        values["model"] = any_model(choose, values["model"])
    values["added_tokens"] += [any_added_token(choose, 257 + i)
                               for i in range(choose.choice([0, 1, 3]))]
    path.write_text(json.dumps(spoil_json(values, choose) if choose.random() < 0.1 else values))
    tokenizer = Tokenizer(folder)
    text = "".join(choose.choice(PIECES + NAMES) * choose.choice([1, 1, 20]) for _ in range(20))
    guards = {index for name, index in tokenizer.guards.items() if CONTROL.match(name)}
    for raw in (True, False):
        ids, own = tokenizer.prompt_ids(text, raw), tokenizer.prompt_ids("x", raw)
        spelled, own = ([i for i in found if i in guards] for found in (ids, own))
        assert spelled == own, "a special token of the text is none of the template's"
        pieces, piece = tokenizer.pieces(ids), tokenizer.detokenizer()
        assert [piece(index) for index in ids[:20]] == pieces[:20]


def write_folders(place: Path) -> list[Path]:
    """Whole model folders to be spoiled: with and without a template, in shards, sentencepiece,
    and the architectures beside Llama."""
    from dataclasses import replace

    from conftest import TINY, write_llama2_tokenizer, write_tiny_folder

    plain, chat, shards, llama2 = (place / name for name in ("plain", "chat", "shards", "llama2"))
    for folder in (plain, chat):
        write_tiny_folder(folder)
    write_tiny_folder(llama2, replace(TINY, vocab_size=320))
    (chat / "tokenizer_config.json").write_text(json.dumps({
        "eos_token": "<end>", "add_bos_token": True, "additional_special_tokens": ["<a>"],
        "chat_template": "{% for m in messages %}{{ m.role }}: <|x|>{{ m.content }}<end>"
        "{% endfor %}assistant: ",
        "added_tokens_decoder": {"257": {"content": "<a>"}, "258": {"content": "<|x|>"}}}))
    shutil.copytree(REFERENCE / "tiny_head_dim_sharded", shards)
    tokenizer = json.loads((plain / "tokenizer.json").read_text())
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "_"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    (shards / "tokenizer.json").write_text(json.dumps(tokenizer))
    (llama2 / "tokenizer.json").unlink()
    write_llama2_tokenizer(llama2)
    (llama2 / "added_tokens.json").write_text('{"<extra>": 310}')
    (llama2 / "special_tokens_map.json").write_text('{"eos_token": {"content": "<extra>"}}')
    near = [place / f"tiny_{name}" for name in ("qwen2_yarn", "qwen3", "mistral", "llama_linear")]
    for folder in near:
        shutil.copytree(REFERENCE / folder.name, folder)
        shutil.copy(plain / "tokenizer.json", folder)
    return [plain, chat, shards, llama2, *near]


def worker(kind: str, first: int, last: int):
    """Run the cases and print an outcome for each."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import resource

    import torch

    from support import worker as others
    from weights import tokenizer

    if kind == "tokenizer":
        others.SECONDS = 1
    else:  # a process for each tokenizer would take most of the time
        others.Worker.start, others.Worker.call = lambda self: None, call_here
    torch.set_num_threads(1)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST_MEMORY,) * 2)
    with tempfile.TemporaryDirectory() as place:
        made = (write_documents if kind == "document" else write_folders)(Path(place))
        if kind == "text":
            made = [tokenizer.Tokenizer(folder) for folder in made]
        for number in range(first, last):
            choose, folder = random.Random(number), Path(place) / "case"
            print(json.dumps([number, "begun", ""]), flush=True)
            try:
                if kind == "text":
                    text_case(choose, made)
                elif kind == "document":
                    document_case(choose, made, folder)
                elif kind == "tokenizer":
                    tokenizer_case(choose, choose.choice(made[:2]), folder)
                else:
                    folder_case(choose, choose.choice(made), folder)
                outcome = "done", ""
            except ValueError as error:
                line = f"{error}"
                outcome = ("refused", line) if "\n" not in line else ("error", "two lines: " + line)
            except BaseException as error:
                outcome = "error", f"{type(error).__name__}: {error}"
            shutil.rmtree(folder, ignore_errors=True)
            print(json.dumps([number, outcome[0], outcome[1][:300]]), flush=True)


def call_here(worker, method: str, *args):
    """`Worker.call` without a process."""
    from support.worker import answer, outcome

    module, make, *values = worker.made_of
    if worker.process is None:
        make = getattr(importlib.import_module(module), make)
        worker.process = outcome(lambda: make(*values))
    reply = json.loads(answer(*worker.process, json.dumps([method, *args])))
    if "error" in reply:
        raise ValueError(reply["error"])
    return reply["result"]


def run(kind: str, first: int, n_cases: int, report=print) -> Counter:
    """Count the outcomes of cases, and report the bad ones."""
    counts, number, last = Counter(), first, first + n_cases
    while number < last:
        process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, str(number), str(last)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, bufsize=0)
        begun, pending = None, b""
        while True:
            ready, _, _ = select.select([process.stdout], [], [], SECONDS if begun else 120)
            chunk = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not chunk:
                break
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                case, outcome, text = json.loads(line)
                begun = case
                if outcome == "begun":
                    continue
                number, begun = case + 1, None
                counts[outcome] += 1
                if outcome == "error":
                    report(f"{kind} {case}: {text}")
        process.kill()
        process.wait()
        if number < last:  # it died, or was too slow
            if begun is None:
                raise RuntimeError("the worker does not begin")
            outcome = "died" if ready else "slow"
            counts[outcome] += 1
            report(f"{kind} {begun}: {outcome}")
            number = begun + 1
    return counts


def long_run(n_tokens: int) -> dict:
    """Write so many tokens with a tiny model. Check budget, positions and rows at every step."""
    import torch
    from conftest import TINY, random_llama, random_spans

    from cache import NO_ROW, SentenceKVCache
    from sentencekv import SentenceKVConfig
    from support.table import BLOCK

    model, config, choose = random_llama(), SentenceKVConfig(token_budget=96), random.Random(0)
    cache = SentenceKVCache(config, TINY, 200 + n_tokens, "cpu", torch.float32)
    cache.expect(random_spans(200))
    plan = cache.plan
    model.prefill(torch.arange(200), cache)
    first, times, open_tokens = cache.report(), [], 0
    fixed = first["device_kv_parts"]["slots"]
    for step in range(n_tokens):
        if open_tokens == choose.randint(1, config.sentence_limit) or open_tokens == 16:
            cache.seal(open_tokens)
            open_tokens = 0
        start = time.perf_counter()
        model.decode(torch.tensor([choose.randrange(TINY.vocab_size)]), cache)
        times.append((time.perf_counter() - start) * 1e3)
        open_tokens += 1
        assert cache.num_tokens == 201 + step == plan.n_rows == plan.open_row + open_tokens
        layer, head = cache.layers[choose.randrange(2)], choose.randrange(2)
        rows = layer.slot_row[head]
        held = rows[rows < NO_ROW]
        assert len(held) == len(held.unique()) and len(held) + plan.in_window.sum() <= 96
        slot = choose.randrange(len(rows))
        if (row := rows[slot].item()) < NO_ROW:
            kept = layer.host.read(row, row + 1)[head, 0]
            assert torch.equal(layer.slots[head, slot], kept)
        if plan.n_places % BLOCK == 0 and open_tokens == 1:
            assert cache.report()["device_kv_parts"]["slots"] == fixed
    last, tenth = cache.report(), n_tokens // 10
    return {"sentences": plan.n_places - 1,
            "device bytes": [first["device_kv_bytes"], last["device_kv_bytes"]],
            "host bytes": [first["host_kv_bytes"], last["host_kv_bytes"]],
            "ms a step, first and last tenth": [round(median(times[:tenth]), 2),
                                                round(median(times[-tenth:]), 2)]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each kind")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=["folder", "text", "tokenizer", "document"],
                        help="folder, text, tokenizer, document; long: an answer of so many"
                        " tokens")
    args = parser.parse_args()
    if "long" in args.kinds:
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        print(f"long: {args.cases} tokens, {long_run(args.cases)}")
    for kind in set(args.kinds) - {"long"}:
        start = time.perf_counter()
        counts = run(kind, args.first, args.cases)
        print(f"{kind}: {dict(counts)} in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main()

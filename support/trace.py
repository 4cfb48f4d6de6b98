"""Which sentences every written token attends to: recorded, and written as a page or as JSON.

    python generate.py --prompt file.txt --trace page.html

A `.json` file holds the object that is in the page, too. Positions count the tokens of the document
and of all after it. The document is the first text that was read.

    format         "sentencekv trace 1"
    settings       of the method, by name
    pieces         the text of each token of the document
    ends           of each of its sentences: the position after its last token
    sinks          how many first tokens are always attended to
    secondary      [layer][head]: positions of the secondary sinks
    answers        one for each question:
        question   "" if the document holds it
        pieces     of all tokens after the document: earlier turns, the question, the answer
        ends       of the sentences among them that can be selected, as in the document
        n_written  how many of the pieces are the answer's
        windows    of each step, the first position that is attended to as recent
        shape      (steps, L, H_kv, S): S sentences, those of the document and then those after it
        rows       how many rows of each sentence a head selects. The first step holds numbers,
                   later steps the difference from the step before. Little-endian integers of
                   `bytes` bytes
        attention  (steps, L, H_kv, S + 3): the share of the attention that each sentence receives,
                   the mean of the head's queries. The last columns are all sinks, all secondary
                   sinks, and the recent tokens. A byte v stands for a share of (v / 255) ** 2
        report     times and bytes, as `generate.py --json` prints them

`rows` and `attention` are compressed by zlib, and written in base64. Step s chooses token s + 1 of
the answer. Prefill chooses token 0, and attends to everything.
"""

import base64
import json
import math
import os
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

TEMPLATE = Path(__file__).with_name("page.html")
MOST_NUMBERS = 2**27  # in `rows`, for a browser to unpack; later steps are left out


class Trace:
    """Records the answers of a session. Recording is a part of the decode time in a report."""

    def __init__(self):
        self.data = {"format": "sentencekv trace 1", "answers": []}
        self.steps = []  # of the last answer: rows (L, H_kv, S) and attention (L, H_kv, S + 3)
        self.windows, self.n_written = [], 0
        self.attention = None  # uint8 (steps, L, H_kv, S + 3), by sentence of the document

    def watch(self, cache, written):
        """Yield what `generate` yields, and keep what the cache selected for each token."""
        self.steps, self.windows, self.n_written, n_numbers = [], [], 0, 0
        dtype = torch.uint8 if cache.config.sentence_limit < 256 else torch.int32
        with attention_weights(cache) as weights:
            for token in written:
                rows = cache.table.n_resident[..., : cache.table.n_sentences]  # (L, H_kv, S)
                n_numbers += rows.numel()
                if weights and n_numbers < MOST_NUMBERS:
                    shares = received(cache, weights.pop())
                    self.steps.append((rows.to("cpu", dtype), to_bytes(shares).cpu()))
                    self.windows.append(cache.attended_from(cache.num_tokens))
                self.n_written += 1
                yield token

    def add(self, question: str, cache, pieces: list[str], spans: list, report: dict):
        """Add the answer that was watched. `pieces` are those of all tokens that were read and
        written, `spans` (start, end) the sentences of all texts that were read."""
        table, n_rows = cache.table, cache.host.first.shape[1]
        positions = torch.stack(tuple(cache.positions)).long()  # (L, H_kv, N), of the document
        n_tokens = int(positions.max()) + 1
        ends = torch.tensor([end for _, end in spans if end <= n_tokens])
        bounds = table.bounds[..., : table.n_sentences + 1].cpu()
        n_first = int((bounds[..., :-1] < n_rows).sum(dim=-1).max())  # entries of the document
        sentence_of = number_entries(bounds, positions, ends, n_first)
        n_sentences = len(ends) + table.n_sentences - n_first
        shape = (len(self.steps), *sentence_of.shape[:2], n_sentences)
        selected = torch.zeros(shape, dtype=self.steps[0][0].dtype if self.steps else torch.uint8)
        self.attention = torch.zeros(*shape[:3], n_sentences + 3, dtype=torch.uint8)
        for step, (rows, shares) in enumerate(self.steps):
            here = sentence_of[..., : rows.shape[-1]]
            selected[step].scatter_add_(-1, here, rows)
            self.attention[step].scatter_add_(-1, here, shares[..., :-3])
            self.attention[step, ..., -3:] = shares[..., -3:]

        settings = asdict(cache.config)
        if cache.config.keep_factor == math.inf:
            settings["keep_factor"] = "inf"  # JSON has no infinity
        counts = table.n_secondary[..., 0].tolist()
        secondary = [[positions[layer, head, :n].tolist() for head, n in enumerate(heads)]
                     for layer, heads in enumerate(counts)]
        self.data |= {"settings": settings, "pieces": pieces[:n_tokens], "ends": ends.tolist(),
                      "sinks": cache.n_sinks, "secondary": secondary}
        self.data["answers"].append({
            "question": question, "pieces": pieces[n_tokens:], "n_written": self.n_written,
            "ends": (bounds[0, 0, n_first + 1 :] - n_rows + n_tokens).tolist(),
            "windows": self.windows, "shape": list(shape), "bytes": selected.element_size(),
            "rows": pack(np.diff(selected.numpy(), axis=0, prepend=np.uint8(0))),
            "attention": pack(self.attention.numpy()), "report": report})

    def most_attended(self, n: int = 5) -> list[dict]:
        """The `n` sentences of the document that received most attention while the last answer was
        written: the mean share of the recorded steps, in the second half of the layers. In the
        first half attention often goes to the same tokens, whatever the question is."""
        pieces, ends = self.data["pieces"], self.data["ends"]
        starts, half = [0, *ends], self.attention.shape[1] // 2
        shares = torch.zeros(len(ends))
        for step in self.attention[:, half:, :, : len(ends)]:
            shares += (step / 255).square().mean(dim=(0, 1)) / len(self.attention)
        best = [s for s in shares.argsort(descending=True)[:n].tolist() if shares[s] > 0]
        return [{"share": shares[s].item(), "place": starts[s] / len(pieces),
                 "text": one_line("".join(pieces[starts[s] : ends[s]]))} for s in best]

    def write(self, path: Path):
        """Write a page, or JSON if the name ends in .json. Write another file first and rename it,
        so that the file is never half written. ValueError if it cannot be written."""
        text = json.dumps(self.data)
        if path.suffix != ".json":  # a "<" could end the element that the data are in
            data = text.replace("<", r"\u003c")
            text = TEMPLATE.read_text(encoding="utf-8").replace("{{trace}}", data)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise ValueError(f"cannot write {path}: {error.strerror}") from None
        finally:
            part.unlink(missing_ok=True)


def number_entries(bounds, positions, ends, n_first: int) -> torch.Tensor:
    """Which sentence each entry of the table is. A head has no entry for a sentence of the document
    of which it keeps nothing. After these `n_first` entries, all heads have the same sentences.

    bounds (L, H_kv, S + 1) and positions (L, H_kv, N) of rows, ends of the document's sentences
    -> (L, H_kv, S)
    """
    first_rows = bounds[..., :-1].clamp(max=positions.shape[-1] - 1)
    sentence_of = torch.searchsorted(ends, positions.gather(-1, first_rows), right=True)
    sentence_of[..., n_first:] = len(ends) + torch.arange(sentence_of.shape[-1] - n_first)
    return sentence_of


@contextmanager
def attention_weights(cache):
    """In here each token's attention weights (L, H_kv, n_slots) are appended to this list: the mean
    of the queries of a group. They are computed once more for it, for all layers together."""
    weights, queries, decode = [], [], cache.decode
    layers, kv_heads, n_slots, _, dim = cache.slots.shape

    def watched(layer, q, k, v):
        queries.append(q / math.sqrt(dim))
        out = decode(layer, q, k, v)
        if len(queries) == layers:
            grouped = torch.stack(queries).view(layers, kv_heads, -1, dim)
            logits = (cache.slots[:, :, :, 0] @ grouped.mT).mT.float()  # faster than q @ k.mT
            logits = logits.masked_fill(~cache.mask, -math.inf)  # (L, H_kv, G, n_slots)
            weights.append(logits.softmax(dim=-1).mean(dim=2))
            queries.clear()
        return out

    cache.decode = watched
    try:
        yield weights
    finally:
        cache.decode = decode


def received(cache, weights: torch.Tensor) -> torch.Tensor:
    """The share of each sentence of the table, of all sinks, of all secondary sinks, and of the
    recent tokens: attention weights (L, H_kv, n_slots) -> (L, H_kv, S + 3)"""
    n = cache.table.n_sentences
    place = torch.full(weights.shape, n + 2, device=weights.device)
    place[..., cache.sink_slot : cache.recent_slot] = n
    is_secondary = cache.slot_row < cache.table.n_secondary
    # An empty slot can name any sentence of the table's capacity. Its weight is 0.
    place[..., : cache.n_row_slots] = cache.slot_sentence.masked_fill(
        is_secondary, n + 1).clamp(max=n + 2)
    return weights.new_zeros(*weights.shape[:2], n + 3).scatter_add_(-1, place, weights)


def to_bytes(shares: torch.Tensor) -> torch.Tensor:
    """As the field `attention` holds them. The root leaves small shares more of the 255 steps."""
    return shares.sqrt().mul(255).round().byte()


def pack(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode()


def one_line(text: str) -> str:
    """Without line ends and control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

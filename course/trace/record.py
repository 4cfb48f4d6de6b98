"""Which sentences every written token asked for: recorded, and written as a page or as JSON.

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
        pieces     of all tokens after the document: the question, and at the end the answer
        ends       of the sentences among them that can be asked for, as in the document
        n_written  how many of the pieces are the answer's
        windows    of each step, the first position that is attended to as recent
        shape      (steps, L, H_kv, S): S sentences, those of the document and then those after it
        rows       how many rows of each sentence a head selects in a step: the difference from the
                   step before it, each number in `bytes` bytes, the lowest first
        attention  (steps, L, H_kv, S + 3): what each sentence receives, the mean of the head's
                   queries, and in the last columns what all sinks, secondary sinks and recent
                   tokens receive. A byte v stands for a share of (v / 255) ** 2
        report     times and bytes, as `generate.py --json` prints them

`rows` and `attention` are compressed by zlib, and written in base64. A step chooses a token of the
answer. The first token has none: reading chooses it, which attends to everything.
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
MOST_NUMBERS = 2**28  # in `rows`, for a browser to unpack; later steps are left out


class Trace:
    """Records the answers of a session."""

    def __init__(self):
        self.data = {"format": "sentencekv trace 1", "answers": []}

    def watch(self, cache, written):
        """Yield what `generate` yields, and keep what the cache selected for each token."""
        self.rows, self.attention, self.windows, self.n_written = [], [], [], 0
        n_numbers, dtype = 0, torch.uint8 if cache.config.sentence_limit < 256 else torch.int32
        with attention_weights(cache) as weights:
            for token in written:
                rows = cache.table.n_resident[..., : cache.table.n_sentences]  # (L, H_kv, S)
                n_numbers += rows.numel()
                if weights and n_numbers < MOST_NUMBERS:
                    self.rows.append(rows.to("cpu", dtype))
                    self.attention.append(received(cache, torch.stack(weights)).cpu())
                    self.windows.append(cache.attended_from(cache.num_tokens))
                weights.clear()
                self.n_written += 1
                yield token

    def add(self, question: str, cache, pieces: list[str], spans: list, report: dict):
        """Add the answer that was watched. `pieces` are those of all tokens that were read and
        written, `spans` (start, end) the sentences of all texts that were read."""
        table, n_rows = cache.table, cache.host.first.shape[1]
        positions = torch.stack(tuple(cache.positions)).long()  # (L, H_kv, N), of the document
        n_tokens = int(positions.max()) + 1
        ends = torch.tensor([end for _, end in spans if end <= n_tokens])
        # A head has no sentence of which it keeps nothing, so sentence s of the table need not be
        # number s of the document. After the document all heads have the same sentences.
        bounds = table.bounds[..., : table.n_sentences + 1].cpu()
        first_rows = bounds[..., :-1].clamp(max=n_rows - 1)
        number = torch.searchsorted(ends, positions.gather(-1, first_rows), right=True)
        n_first = int((bounds[..., :-1] < n_rows).sum(dim=-1).max())  # of the document
        n_sentences = len(ends) + table.n_sentences - n_first
        number[..., n_first:] = torch.arange(len(ends), n_sentences)
        shape = (len(self.rows), *number.shape[:2], n_sentences)
        self.selected = torch.zeros(shape, dtype=self.rows[0].dtype if self.rows else torch.uint8)
        self.shares = torch.zeros(*shape[:3], n_sentences + 3)
        for step, (rows, attention) in enumerate(zip(self.rows, self.attention)):
            here = number[..., : rows.shape[-1]]
            self.selected[step].scatter_add_(-1, here, rows)
            self.shares[step].scatter_add_(-1, here, attention[..., :-3])
            self.shares[step, ..., -3:] = attention[..., -3:]
        settings = asdict(cache.config)
        if cache.config.keep_factor == math.inf:
            settings["keep_factor"] = "inf"  # JSON has no infinity
        secondary = [[row[:n].tolist() for row, n in zip(*layer)]
                     for layer in zip(positions, table.n_secondary[..., 0].tolist())]
        self.data |= {"settings": settings, "pieces": pieces[:n_tokens], "ends": ends.tolist(),
                      "sinks": cache.n_sinks, "secondary": secondary}
        self.data["answers"].append({
            "question": question, "pieces": pieces[n_tokens:], "n_written": self.n_written,
            "ends": (bounds[0, 0, n_first + 1 :] - n_rows + n_tokens).tolist(),
            "windows": self.windows, "shape": list(shape), "bytes": self.selected.element_size(),
            "rows": pack(np.diff(self.selected.numpy(), axis=0, prepend=np.uint8(0))),
            "attention": pack((self.shares.sqrt() * 255).round().byte().numpy()),
            "report": report})

    def most_asked(self, n: int = 5) -> list[dict]:
        """The `n` sentences of the document that received most attention while the last answer was
        written: the mean share of all its steps, in the second half of the layers. In the first
        half attention often goes to the same tokens whatever is asked."""
        pieces, ends = self.data["pieces"], self.data["ends"]
        shares = self.shares[:, self.shares.shape[1] // 2 :, :, : len(ends)]
        shares = shares.mean(dim=(0, 1, 2)) if len(shares) else torch.zeros(0)
        best = [s for s in shares.argsort(descending=True)[:n].tolist() if shares[s] > 0]
        return [{"share": shares[s].item(), "place": (start := ([0] + ends)[s]) / len(pieces),
                 "text": clean("".join(pieces[start : ends[s]]))} for s in best]

    def write(self, path: Path):
        """Write a page, or JSON if the name ends so. Beside and renamed: never half a file."""
        text = json.dumps(self.data)
        if path.suffix != ".json":  # a "<" could end the element that the data are in
            data = text.replace("<", r"\u003c")
            text = TEMPLATE.read_text(encoding="utf-8").replace("{{trace}}", data)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def attention_weights(cache):
    """In here each layer's `decode` appends its attention weights (H_kv, n_slots) to this list: the
    mean of the queries of a group."""
    weights, decode = [], cache.decode

    def watched(layer, q, k, v):
        keys, values, mask = decode(layer, q, k, v)
        logits = q.view(len(k), -1, q.shape[-1]) @ keys.mT / math.sqrt(q.shape[-1])
        logits = logits.float().masked_fill_(~mask, -math.inf)  # (H_kv, G, n_slots)
        weights.append(logits.softmax(dim=-1).mean(dim=1))
        return keys, values, mask

    cache.decode = watched
    try:
        yield weights
    finally:
        del cache.decode  # the instance's: the method of the class is there again


def received(cache, weights: torch.Tensor) -> torch.Tensor:
    """What each sentence of the table receives, and all sinks, secondary sinks and recent tokens:
    attention weights (L, H_kv, n_slots) -> (L, H_kv, S + 3)"""
    n = cache.table.n_sentences
    place = torch.full(weights.shape, n + 2, device=weights.device)
    place[..., cache.sink_slot : cache.recent_slot] = n
    is_secondary = cache.slot_row < cache.table.n_secondary
    place[..., : cache.n_row_slots] = cache.slot_sentence.masked_fill(is_secondary, n + 1)
    return weights.new_zeros(*weights.shape[:2], n + 3).scatter_add_(-1, place, weights)


def clean(text: str) -> str:
    """On one line, and without control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def pack(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode()

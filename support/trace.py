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
        full_attention  with --trace-full: what `attention` would be if all tokens were attended to.
                   A full cache has read the same tokens, those of the answer too
        report     times and bytes, as `generate.py --json` prints them

These three are compressed by zlib, and written in base64. Step s chooses token s + 1 of the answer.
Prefill chooses token 0, and attends to everything.
"""

import base64
import json
import math
import zlib
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from support.outputs import replacing

TEMPLATE = Path(__file__).with_name("page.html")
MOST_NUMBERS = 2**27  # in `rows`, for a browser to unpack; later steps are left out


class Trace:
    """Records the answers of a session. Recording is a part of the decode time in a report.

    For `add_full` it needs the model, and the class `model.FullCache`.
    """

    def __init__(self, cache, model=None, full_cache_class=None):
        self.cache, self.data = cache, {"format": "sentencekv trace 1", "answers": []}
        self.model, self.full_cache_class, self.full_cache = model, full_cache_class, None
        self.steps = []  # of the last answer: rows (L, H_kv, S) and attention (L, H_kv, S + 3)
        self.windows, self.n_written = [], 0
        self.attention = None  # uint8 (steps, L, H_kv, S + 3), by sentence of the document
        for layer in cache.layers:
            layer.host.wants_positions = True

    def watch(self, written):
        """Yield what `generate` yields, and keep what the cache selected for each token."""
        self.steps, self.windows, self.n_written, n_numbers = [], [], 0, 0
        plan, layers = self.cache.plan, self.cache.layers
        dtype = torch.uint8 if plan.config.sentence_limit < 256 else torch.int32

        def summarise(i, weights):
            return received(layers[i], weights), plan.window_start()

        with watched_layers(layers, summarise) as shares:
            for token in written:
                rows = torch.stack([layer.n_resident[:, 1 : plan.n_places] for layer in layers])
                n_numbers += rows.numel()  # rows (L, H_kv, S)
                if shares and n_numbers < MOST_NUMBERS:
                    attention = to_bytes(torch.stack([share for share, _ in shares]))
                    self.steps.append((rows.to("cpu", dtype), attention.cpu()))
                    self.windows.append(shares[0][1] + plan.n_dropped)
                shares.clear()
                self.n_written += 1
                yield token

    def add(self, question: str, pieces: list[str], spans: list, report: dict):
        """Add the answer that was watched. `pieces` are those of all tokens that were read and
        written, `spans` (start, end) the sentences of all texts that were read."""
        cache, plan = self.cache, self.cache.plan
        n_tokens, n_places = cache.first_text  # of the document
        positions = torch.stack([layer.host.positions for layer in cache.layers]).long()
        ends = torch.tensor([end for _, end in spans if end <= n_tokens])
        starts = torch.stack([layer.starts[:, 1 : plan.n_places] for layer in cache.layers])
        sentence_of = number_places(starts.long().cpu(), positions, ends, n_places - 1)
        n_sentences = len(ends) + plan.n_places - n_places
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
        secondary = [[places[: end - plan.n_first_sinks].tolist()  # place 0 is all sinks
                      for places, end in zip(positions[i], layer.ends[:, 0].tolist())]
                     for i, layer in enumerate(cache.layers)]
        later_ends = cache.layers[0].ends[0, n_places : plan.n_places] + plan.n_dropped
        self.data |= {"settings": settings, "pieces": pieces[:n_tokens], "ends": ends.tolist(),
                      "sinks": plan.n_first_sinks, "secondary": secondary}
        self.data["answers"].append({
            "question": question, "pieces": pieces[n_tokens:], "n_written": self.n_written,
            "ends": later_ends.tolist(), "windows": self.windows, "shape": list(shape),
            "bytes": selected.element_size(),
            "rows": pack(np.diff(selected.numpy(), axis=0, prepend=np.uint8(0))),
            "attention": pack(self.attention.numpy()), "report": report})

    def add_full(self, ids: list[int], max_tokens: int, part_size: int, progress=iter):
        """Record what a full cache attends to while the last answer is written: all `ids` that were
        read and written are read again, the answer's one by one. The full cache has room for
        `max_tokens`, for later answers too. At most `part_size` tokens are read at a time.
        `progress` wraps the layers, and then the answer's steps. What it raises ends this, and
        nothing is recorded."""
        answer, n_read = self.data["answers"][-1], len(ids) - self.n_written
        ids = torch.tensor(ids, device=self.model.embed_tokens.weight.device)
        self.read_again(ids[:n_read], max_tokens, part_size, progress)
        columns = self.columns_of(len(ids), answer["ends"]).to(ids.device)
        attention, window = torch.zeros_like(self.attention), 0
        n_columns = attention.shape[-1]

        def summarise(i, weights):
            column = columns[i, :, : weights.shape[-1]].clone()
            column[:, window:] = n_columns - 1  # recent
            return add_up(weights, column, n_columns)

        with watched_layers(self.full_cache.layers, summarise) as shares:
            for step in progress(range(len(attention))):
                window, token = self.windows[step], ids[n_read + step]
                self.model.decode(token[None], self.full_cache)
                attention[step] = to_bytes(torch.stack(shares)).cpu()
                shares.clear()
        answer["full_attention"] = pack(attention.numpy())

    def read_again(self, ids: torch.Tensor, max_tokens: int, part_size: int, progress):
        """Read a text into the full cache: the document only the first time."""
        weight = self.model.embed_tokens.weight
        self.full_cache = self.full_cache or self.full_cache_class(
            self.model.config, max_tokens, weight.device, weight.dtype)
        start = min(self.full_cache.num_tokens, len(self.data["pieces"]))
        self.full_cache.truncate(start)
        part_ends = tuple(range(part_size, len(ids) - start, part_size))
        self.model.prefill(ids[start:], self.full_cache, progress, part_ends)

    def columns_of(self, n_tokens: int, later_ends: list[int]) -> torch.Tensor:
        """The column of the field `attention` that each token belongs to while it is not recent,
        (L, H_kv, T). Those that are in no sentence yet count as recent."""
        ends = torch.tensor(self.data["ends"] + later_ends)
        column = torch.searchsorted(ends, torch.arange(n_tokens), right=True)
        column[column == len(ends)] = len(ends) + 2
        column[: self.data["sinks"]] = len(ends)
        secondary = self.data["secondary"]
        columns = column.repeat(len(secondary), len(secondary[0]), 1)
        for layer, heads in enumerate(secondary):
            for head, positions in enumerate(heads):
                columns[layer, head, positions] = len(ends) + 1
        return columns

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
        """Write a page, or JSON if the name ends in .json. ValueError if it cannot be written."""
        text = json.dumps(self.data)
        if path.suffix != ".json":  # a "<" could end the element that the data are in
            data = text.replace("<", r"\u003c")
            text = TEMPLATE.read_text(encoding="utf-8").replace("{{trace}}", data)
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")


def number_places(starts, positions, ends, n_first: int) -> torch.Tensor:
    """Which sentence each place of the table is. A head that keeps nothing of a sentence of the
    document has no place for it, or an empty one (`support/reuse.py`). After these `n_first`
    places, all heads have the same sentences.

    starts (L, H_kv, S) and positions (L, H_kv, N) of rows, ends of the document's sentences
    -> (L, H_kv, S)
    """
    first_rows = starts.clamp(max=positions.shape[-1] - 1)
    sentence_of = torch.searchsorted(ends, positions.gather(-1, first_rows), right=True)
    sentence_of[..., n_first:] = len(ends) + torch.arange(sentence_of.shape[-1] - n_first)
    return sentence_of


@contextmanager
def watched_layers(layers, summarise):
    """In here each layer appends, for a token, what `summarise(i, weights)` makes of layer i's
    attention weights (H_kv, n): of all keys that the layer returned, the mean of the head's
    queries."""
    shares = []

    def watched(i, decode):
        def decode_and_note(q, k, v):
            keys, values, mask = decode(q, k, v)
            grouped = q.view(len(k), -1, q.shape[-1]) / math.sqrt(q.shape[-1])  # (H_kv, G, D)
            logits = (keys @ grouped.mT.to(keys.dtype)).mT.float()  # faster than q @ k.mT
            if mask is not None:
                logits = logits.masked_fill(~mask, -math.inf)
            shares.append(summarise(i, logits.softmax(dim=-1).mean(dim=1)))
            return keys, values, mask
        return decode_and_note

    for i, layer in enumerate(layers):
        layer.decode = watched(i, layer.decode)
    try:
        yield shares
    finally:
        for layer in layers:
            del layer.decode  # the method of the class is there again


def received(layer, weights: torch.Tensor) -> torch.Tensor:
    """The share of each sentence of the table, of the first tokens, of the secondary sinks, and of
    the recent tokens: attention weights of all slots (H_kv, n_slots) -> (H_kv, S + 3)"""
    n = layer.plan.n_places - 1
    sentence = torch.full(weights.shape, n + 2, device=weights.device)
    n_secondary = layer.ends[:, :1] - layer.plan.n_first_sinks  # the first rows, in place 0
    sink = torch.where(layer.slot_row < n_secondary, n + 1, n)
    # An empty slot can name any place of the table's capacity. Its weight is 0.
    sentence[:, : sink.shape[1]] = torch.where(
        layer.slot_place == 0, sink, (layer.slot_place - 1).clamp(max=n + 2))
    return add_up(weights, sentence, n + 3)


def add_up(weights: torch.Tensor, columns: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Weights (H_kv, n), and the column of each -> (H_kv, n_columns)"""
    return weights.new_zeros(len(weights), n_columns).scatter_add_(-1, columns, weights)


def to_bytes(shares: torch.Tensor) -> torch.Tensor:
    """As the field `attention` holds them. The root leaves small shares more of the 255 steps."""
    return shares.sqrt().mul(255).round().byte()


def pack(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(numbers.tobytes(), 9)).decode()


def one_line(text: str) -> str:
    """Without line ends and control characters, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

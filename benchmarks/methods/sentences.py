"""SentenceKV itself, and what it could know: sentences by every key in place of a vector.

Two classes here have layers with another score. Place 0 of a layer's table stands for all sinks,
which are selected whatever their score is. All but `sentencekv` have 16 bits a channel: these
classes take rows and vectors as they are, and do not unpack them.
"""

import math
from statistics import mean

import torch
import torch.nn.functional as F

from benchmarks.methods.base import Cost
from cache import NO_ROW, LayerCache, SentenceKVCache
from sentencekv import SentenceKVConfig

# `published` has the authors' settings: 32 sinks are their code's, the paper has none; the paper's
# keep_factor is 1 to 5. But its sentences, its one choice per KV head and its sinks, the first
# tokens, are those of this project. `plain` has the Gaussian score, and keeps everything.
PLAIN = {"query_decay": 1.0, "secondary_sinks": 0, "sentence_limit": 128, "kv_bits": 16}
LAST_QUERY = {"query_decay": 0.0, "kv_bits": 16}
VARIANTS = {  # of SentenceKV: label, settings
    "sentencekv": ("SentenceKV, ours", {}),
    "sentencekv_16bit": ("SentenceKV, ours, 16 bits", {"kv_bits": 16}),
    "published": ("SentenceKV as published, r = 2",
                  PLAIN | {"score": "mean_query", "sink_tokens": 32, "keep_factor": 2.0}),
    "plain": ("SentenceKV, Gaussian score alone", PLAIN),
    "last_query": ("SentenceKV, last query", LAST_QUERY),
}


class SentenceKV(SentenceKVCache):
    """`cache.SentenceKVCache` with what a method needs besides. Settings are those of
    SentenceKVConfig, and what the prompt is cut into: `spans` are such units."""

    budgeted = reads_on = True
    unit = "sentence"  # see `engine.units`

    def __init__(self, model_config, budget, spans, max_new_tokens, unit=unit, **settings):
        if {"score", "reuse_layers"} & settings.keys() and self.Layer is not LayerCache:
            raise ValueError(f"method {self.name!r} has a score of its own, in each layer")
        super().__init__(SentenceKVConfig(token_budget=budget, **settings), model_config,
                         spans[-1][1] + max_new_tokens, "cpu", torch.float32)
        self.expect(spans)
        packing = self.layers[0].packing
        self.token_bytes = 4 * packing.dim  # of 16 bits a channel
        # Tokens of 16 bits that take as much as a row: one that was written, one of the prompt.
        self.row = packing.width / (2 * packing.dim) if packing.bits == 8 else 1.0
        self.prompt_row = self.row

    def cost(self) -> Cost:
        """As in bfloat16. On the device are the slots, and what `index` says."""
        layer, plan = self.layers[0], self.plan
        in_slots = torch.stack([layer.slot_row < NO_ROW for layer in self.layers]).sum(dim=-1)
        held = plan.in_window.sum().item() + in_slots.float().mean().item()
        held = self.row * min(held, self.config.token_budget)  # the next window can be longer
        n_first, (index, table) = len(layer.host.first), self.index()
        n_rows = n_first * self.prompt_row + (plan.open_row - n_first) * self.row
        marks = sum(x[0].nbytes for x in (layer.slot_row, layer.slot_place, layer.slot_missing))
        device = layer.slots.shape[1] * self.row + marks / self.token_bytes
        device += 4 * (layer.packing.bits == 8)  # mean and deviation, in 32 bits
        return Cost(held, n_rows + index, held + index, device + table)

    def index(self) -> tuple:
        """Tokens that are read to choose: of each sentence, vector and variance. And tokens on the
        device: a table without spare places."""
        vector, n_places = self.row / 2, self.plan.n_places
        with_vectors = mean("vectors" in layer.TABLE for layer in self.layers)
        place = mean(map(place_bytes, self.layers))
        return (with_vectors * (n_places - 1) * (vector + 2 / self.token_bytes),
                n_places * (with_vectors * vector + place / self.token_bytes))


def place_bytes(layer) -> float:
    """Of one place in the table of a KV head, without its vector."""
    tables = [getattr(layer, name) for name in layer.TABLE if name != "vectors"]
    return sum(table[:, :1].nbytes for table in tables) / layer.host.heads


class BestSentences(SentenceKV):
    """The ceiling of a choice of sentences: ranked by this token's mean attention to their rows.

    It reads every key, which no method may; a choice of whole sentences can hardly do better.
    """

    name, label, own_settings = "best_sentences", "best sentences", LAST_QUERY
    key = 1 / 2  # tokens of 16 bits that take as much as what is known of a key

    def index(self):
        return (self.key * self.plan.open_row,) * 2

    class Layer(LayerCache):
        def __init__(self, *args):
            super().__init__(*args)
            self.seen = None  # keys (H_kv, N, D), side by side: reading them is faster

        def keys(self):
            """What is known of the keys of all rows that are in sentences (H_kv, N, D)."""
            n_rows = self.plan.open_row
            if self.seen is None or self.seen.shape[1] != n_rows:
                self.seen = self.known(self.host.read(0, n_rows)[:, :, 0]).contiguous()
            return self.seen

        def known(self, keys):
            """What is known of keys (H_kv, N, D): here everything."""
            return keys

        def truncate(self, n_places: int):
            super().truncate(n_places)
            self.seen = None  # another text can have as many rows

        def score(self, q):
            """What a row that may be selected receives from one token's queries: the mean of each
            sentence."""
            logits = (q @ self.keys().mT).float() / math.sqrt(q.shape[-1])  # (H_kv, G, N)
            total = F.pad(logits.softmax(-1).mean(dim=1).double().cumsum(-1), (1, 0))
            end_rows = self.plan.select_end.clamp(self.starts, self.ends)
            received = total.gather(-1, end_rows) - total.gather(-1, self.starts.long())
            return (received / (end_rows - self.starts).clamp(min=1)).float()


class TwoBitKeys(BestSentences):
    """SentenceKV that knows every key at 2 bits a channel, in place of a vector a sentence.

    A sentence's score is the attention that its rows would receive. It shows what a vector gives
    away. These keys take an eighth of those of 16 bits.
    """

    name, label, own_settings = "two_bit_keys", "2-bit keys", {"kv_bits": 16}
    key = 1 / 16

    class Layer(BestSentences.Layer):
        # The four levels that lose least of a Gaussian channel, and where they meet, in deviations.
        levels = torch.tensor([-1.51, -0.453, 0.453, 1.51])
        edges = torch.tensor([-0.982, 0.0, 0.982])

        def prefill(self, q, k, v):
            if self.plan.num_tokens == 0:  # each (H_kv, 1, D)
                self.mean, self.deviation = k.mean(dim=1, keepdim=True), k.std(dim=1, keepdim=True)
            return super().prefill(q, k, v)

        def known(self, keys):
            level = torch.bucketize(((keys - self.mean) / self.deviation).contiguous(), self.edges)
            return self.mean + self.deviation * self.levels[level]

"""SentenceKV itself, and what it could know: sentences by other vectors or by every key.

`sentencekv` is `cache.SentenceKVCache`. The classes here have layers with another score. Place 0 of
a layer's table stands for all sinks, which are selected whatever their score is: a score computes
it with lengths of 0, or leaves it at 0. All but `sentencekv` have 16 bits a channel: these classes
take rows and vectors as they are, and do not unpack them.
"""

import math
from statistics import mean

import torch
import torch.nn.functional as F

from benchmarks.methods.base import Cost
from cache import NO_ROW, LayerCache, SentenceKVCache

# `published` has the authors' settings: 32 sinks are their code's, the paper has none; the paper's
# keep_factor is 1 to 5. But its sentences, its one choice per KV head and its sinks, the first
# tokens, are those of this project. `plain` has the Gaussian score, and keeps everything.
PLAIN = {"query_decay": 1.0, "secondary_sinks": 0, "sentence_limit": 128, "kv_bits": 16}
LAST_QUERY = {"query_decay": 0.0, "kv_bits": 16}
VARIANTS = {  # of SentenceKVCache: label, settings
    "sentencekv": ("SentenceKV, ours", {}),
    "sentencekv_16bit": ("SentenceKV, ours, 16 bits", {"kv_bits": 16}),
    "published": ("SentenceKV as published, r = 2",
                  PLAIN | {"score": "mean_query", "sink_tokens": 32, "keep_factor": 2.0}),
    "plain": ("SentenceKV, Gaussian score alone", PLAIN),
    "last_query": ("SentenceKV, last query", LAST_QUERY),
}


def cost(cache: SentenceKVCache) -> Cost:
    """On the device are the slots, and the table of sentences or what a layer has in its place. The
    table has no spare places here. Bytes are counted as in bfloat16."""
    layer, plan = cache.layers[0], cache.plan
    packing = layer.packing
    in_slots = torch.stack([layer.slot_row < NO_ROW for layer in cache.layers]).sum(dim=-1)
    held = plan.in_window.sum().item() + in_slots.float().mean().item()
    held = min(held, cache.config.token_budget)  # the next token's window can be one longer
    packed = packing.width / (2 * packing.dim) if packing.bits == 8 else 1.0  # size of a row
    n_first = len(layer.host.first)  # rows of the prompt, which may take fewer bits
    n_rows = n_first * getattr(layer, "row_size", packed) + (plan.open_row - n_first) * packed

    token, n_sentences = 4 * packing.dim, plan.n_places - 1  # bytes of 16 bits a channel
    marks = sum(x[0].nbytes for x in (layer.slot_row, layer.slot_place, layer.slot_missing))
    device = layer.slots.shape[1] * packed + marks / token
    device += 4 * (packing.bits == 8)  # mean and deviation, in 32 bits
    if hasattr(layer, "index_tokens"):
        index = layer.index_tokens()
        device += index
    else:  # a vector and a variance of 16 bits, which are read
        with_vectors = mean("vectors" in layer.TABLE for layer in cache.layers)
        index = with_vectors * n_sentences * (packed / 2 + 2 / token)
        place = mean(map(place_bytes, cache.layers))
        device += plan.n_places * (with_vectors * packed / 2 + place / token)
    return Cost(held * packed, n_rows + index, held * packed + index, device)


def place_bytes(layer) -> float:
    """Of one place in the table of a KV head, without its vector."""
    tables = [getattr(layer, name) for name in layer.TABLE if name != "vectors"]
    return sum(table[:, :1].nbytes for table in tables) / layer.host.heads


class BestSentences(SentenceKVCache):
    """The ceiling of a choice of sentences: ranked by this token's mean attention to their rows.

    It reads every key, which no method may; a choice of whole sentences can hardly do better.
    """

    name, label, own_settings = "best_sentences", "best sentences", LAST_QUERY

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

        def index_tokens(self):
            return self.plan.open_row / 2

        def score(self, q):
            """What a row that may be selected receives from one token's queries: the mean of each
            sentence."""
            logits = (q @ self.keys().mT).float() / math.sqrt(q.shape[-1])  # (H_kv, G, N)
            total = F.pad(logits.softmax(-1).mean(dim=1).double().cumsum(-1), (1, 0))
            end_rows = self.plan.select_end.clamp(self.starts, self.ends)
            received = total.gather(-1, end_rows) - total.gather(-1, self.starts.long())
            return (received / (end_rows - self.starts).clamp(min=1)).float()


class TwoBitKeys(SentenceKVCache):
    """SentenceKV that knows every key at 2 bits a channel, in place of a vector a sentence.

    A sentence's score is the attention that its rows would receive. It shows what a vector gives
    away. These keys take an eighth of those of 16 bits.
    """

    name, label, own_settings = "two_bit_keys", "2-bit keys", {"kv_bits": 16}

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

        def index_tokens(self):
            return self.plan.open_row / 16

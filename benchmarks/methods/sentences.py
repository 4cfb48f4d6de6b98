"""SentenceKV itself, and what it could know: sentences by other vectors or by every key.

`sentencekv` is `cache.SentenceKVCache`. The classes here differ from it in the score alone.
"""

import math

import torch
import torch.nn.functional as F

from benchmarks.methods.base import in_tokens
from cache import SentenceKVCache, SentenceTable
from sentencekv import gaussian


def index_tokens(cache) -> float:
    """What a SentenceKVCache reads in order to choose, in tokens of a KV head."""
    if hasattr(cache, "index_tokens"):
        return cache.index_tokens()
    table, n = cache.table, cache.table.n_sentences
    return in_tokens([table.vectors[:, :, :n], table.variances[:, :, :n]], cache.host.kv_shape)


class TwoVectors(SentenceKVCache):
    """SentenceKV with a second vector a sentence: its key k* that is farthest from the mean.

    The attention that the sentence receives is taken for (n - 1) exp(Gaussian) + exp(q · k*), of n
    keys; the score is again that of one token. Sentences that are alike differ in a token or two.
    Mean and variance are still those of all n keys.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.farthest = list(torch.zeros_like(self.table.vectors))  # of each layer (H_kv, S, D)
        self.table.put = self.put

    def index_tokens(self):
        table, n = self.table, self.table.n_sentences
        return in_tokens([table.vectors[:, :, :n], table.vectors[:, :, :n],
                          table.variances[:, :, :n]], self.host.kv_shape)

    def put(self, layer, keys, bounds):
        SentenceTable.put(self.table, layer, keys, bounds)
        first = self.table.n_sentences
        new = slice(first, first + bounds.shape[-1] - 1)
        stored = self.stored(layer)
        stored[:, new] = self.choose(keys, bounds, self.table.vectors[layer, :, new])
        self.farthest[layer] = stored

    def stored(self, layer):
        """The second vectors, as many as the table has places."""
        more = self.table.capacity - self.farthest[layer].shape[1]
        return F.pad(self.farthest[layer], (0, 0, 0, more))

    @staticmethod
    def choose(keys, bounds, vectors):
        """keys (H_kv, N, D), bounds (H_kv, S + 1), vectors (H_kv, S, D) -> (H_kv, S, D)"""
        rows = torch.arange(keys.shape[1]).expand(len(keys), -1).contiguous()
        sentence = torch.searchsorted(bounds.contiguous(), rows, right=True)  # from 1; 0: none
        means = F.pad(vectors, (0, 0, 1, 0))
        distances = (keys - means.gather(1, sentence[..., None].expand_as(keys))).norm(dim=-1)
        order = distances.argsort(dim=-1, descending=True, stable=True)
        order = order.gather(-1, sentence.gather(-1, order).argsort(dim=-1, stable=True))
        first = order.gather(-1, bounds[:, :-1].clamp(max=keys.shape[1] - 1))  # farthest of each
        return keys.gather(1, first[..., None].expand_as(vectors))

    def score(self, layer, q):
        table = self.table
        lengths, q = table.lengths[layer].unsqueeze(1), q / math.sqrt(q.shape[-1])
        squared_norms = q.square().sum(dim=-1, keepdim=True)
        others = q @ table.vectors[layer].mT + squared_norms * table.variances[layer, :, None] / 2
        farthest = (q @ self.stored(layer).mT).masked_fill(lengths == 0, -math.inf)
        attention = torch.logaddexp(others + (lengths - 1).clamp(min=0).log(), farthest).softmax(-1)
        return attention.sum(dim=1) / table.lengths[layer].clamp(min=1)


class TwoLevel(SentenceKVCache):
    """SentenceKV that scores paragraphs first, 16 sentences each, and then the sentences of the
    best 4 alone. Other sentences receive nothing from this token.

    A paragraph's Gaussian has the mean and the variance of all its keys. A version for speed would
    read one vector a paragraph, and those of 64 sentences; this one scores all, and sets others to
    0.
    """

    paragraph, n_best = 16, 4

    def index_tokens(self):
        n_vectors = self.table.n_sentences / self.paragraph + self.n_best * self.paragraph
        return n_vectors * (self.host.kv_shape[-1] + 1) / (2 * self.host.kv_shape[-1])

    def score(self, layer, q):
        table, more = self.table, -self.table.capacity % self.paragraph
        lengths = table.lengths[layer].float()

        def total(x):  # over each paragraph, (H_kv, S, n) -> (H_kv, P, n)
            x = F.pad(x * lengths.unsqueeze(-1), (0, 0, 0, more))
            return x.unflatten(1, (-1, self.paragraph)).sum(dim=2)

        counts = total(torch.ones_like(lengths).unsqueeze(-1))  # (H_kv, P, 1)
        vectors, squares = table.vectors[layer].float(), table.vectors[layer].float().square()
        squares = squares.mean(dim=-1, keepdim=True) + table.variances[layer].unsqueeze(-1)
        means = total(vectors) / counts.clamp(min=1)
        variances = total(squares) / counts.clamp(min=1) - means.square().mean(-1, keepdim=True)
        scores = gaussian(q.float(), means, variances.squeeze(-1), counts.squeeze(-1))
        first = scores.topk(min(self.n_best, scores.shape[1]), dim=-1).indices  # (H_kv, n)
        sentence = torch.arange(table.capacity) // self.paragraph
        is_first = (sentence[None, :, None] == first[:, None]).any(dim=-1)
        return super().score(layer, q) * is_first


class BestSentences(SentenceKVCache):
    """The ceiling of a choice of sentences: ranked by this token's mean attention to their rows.

    It reads every key, which no method may; a choice of whole sentences can hardly do better.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = {}  # layer -> keys (H_kv, N, D), side by side: reading them is faster

    def keys(self, layer):
        n = int(layer)
        if n not in self.seen or self.seen[n].shape[1] != self.table.n_rows:
            keys = self.host.read(n, 0, self.table.n_rows)[:, :, 0]
            self.seen[n] = self.known(n, keys).contiguous()
        return self.seen[n]

    def known(self, layer, keys):
        """What is known of all keys (H_kv, N, D): here everything."""
        return keys

    def index_tokens(self):
        return self.table.n_rows / 2

    def restore(self, snapshot, release=None):
        super().restore(snapshot, release)
        self.seen = {}

    def score(self, layer, q):
        """What a retrievable row of each sentence receives from one token's queries, the mean."""
        logits = (q @ self.keys(layer).mT).float() / math.sqrt(q.shape[-1])  # (H_kv, G, N)
        total = F.pad(logits.softmax(-1).mean(dim=1).double().cumsum(-1), (1, 0))
        starts, lengths = self.table.starts[layer], self.table.n_retrievable[layer]
        received = total.gather(-1, starts + lengths) - total.gather(-1, starts)
        return (received / lengths.clamp(min=1)).float()


class TwoBitKeys(BestSentences):
    """SentenceKV that knows every key at 2 bits a channel, in place of a vector a sentence.

    A sentence's score is the attention that its rows would receive. It shows what a vector gives
    away. These keys take an eighth of those of 16 bits.
    """

    # The four levels that lose least of a Gaussian channel, and where they meet, in deviations.
    levels, edges = torch.tensor([-1.51, -0.453, 0.453, 1.51]), torch.tensor([-0.982, 0.0, 0.982])

    def prefill(self, layer, q, k, v):
        if self.num_tokens == 0:
            if layer == 0:
                self.channels = []  # for each layer mean and deviation (H_kv, 1, D)
            self.channels.append((k.mean(dim=1, keepdim=True), k.std(dim=1, keepdim=True)))
        return super().prefill(layer, q, k, v)

    def known(self, layer, keys):
        mean, deviation = self.channels[layer]
        level = torch.bucketize(((keys - mean) / deviation).contiguous(), self.edges)
        return mean + deviation * self.levels[level]

    def index_tokens(self):
        return self.table.n_rows / 16

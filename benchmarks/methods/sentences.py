"""SentenceKV itself, and what it could know: sentences by other vectors or by every key.

`sentencekv` is `cache.SentenceKVCache`. The classes here have layers with another score. Place 0 of
a layer's table stands for all sinks, which are selected whatever their score is: a score computes
it with lengths of 0, or leaves it at 0.
"""

import math

import torch
import torch.nn.functional as F

from cache import LayerCache, SentenceKVCache
from sentencekv import gaussian
from support.bits import SCALE_BYTES


def index_tokens(layer) -> float:
    """What a layer of a SentenceKVCache reads in order to choose, in tokens of a KV head."""
    if hasattr(layer, "index_tokens"):
        return layer.index_tokens()
    return vectors_in_tokens(layer, layer.plan.n_places - 1)


def vectors_of(layer) -> torch.Tensor:
    """The sentence vectors of a layer (H_kv, P, D), not packed."""
    return layer.packing.unpack(layer.vectors)


def vectors_in_tokens(layer, n_vectors: float) -> float:
    """So many vectors, each with a variance of 16 bits, in tokens of a KV head."""
    return n_vectors * (packed_share(layer.packing) / 2 + 1 / (2 * layer.packing.dim))


def packed_share(packing) -> float:
    """The bytes of a packed vector, as a part of one with 16 bits a channel."""
    return (packing.dim + SCALE_BYTES) / (2 * packing.dim) if packing.bits == 8 else 1.0


class TwoVectors(SentenceKVCache):
    """SentenceKV with a second vector a sentence: its key k* that is farthest from the mean.

    The attention that the sentence receives is taken for (n - 1) exp(Gaussian) + exp(q · k*), of n
    keys; the score is again that of one token. Sentences that are alike differ in a token or two.
    Mean and variance are still those of all n keys.
    """

    class Layer(LayerCache):
        """Also on the device: farthest (H_kv, S, D), the second vectors."""

        TABLE = (*LayerCache.TABLE, "farthest")

        def __init__(self, *args):
            super().__init__(*args)
            self.farthest = torch.zeros_like(vectors_of(self))

        def index_tokens(self):
            return vectors_in_tokens(self, self.plan.n_places - 1) + (self.plan.n_places - 1) / 2

        def add_sentences(self, keys, bounds, *rest, **named):
            super().add_sentences(keys, bounds, *rest, **named)
            first = self.plan.n_places
            places = slice(first, first + bounds.shape[-1] - 1)
            self.farthest[:, places] = self.choose(keys, bounds, vectors_of(self)[:, places])

        @staticmethod
        def choose(keys, bounds, vectors):
            """keys (H_kv, N, D), bounds (H_kv, S + 1), vectors (H_kv, S, D) -> (H_kv, S, D)"""
            rows = torch.arange(keys.shape[1]).expand(len(keys), -1).contiguous()
            # Of each row, from 1; 0 if it is in no sentence.
            sentence = torch.searchsorted(bounds.contiguous(), rows, right=True)
            means = F.pad(vectors, (0, 0, 1, 0))
            distances = (keys - means.gather(1, sentence[..., None].expand_as(keys))).norm(dim=-1)
            order = distances.argsort(dim=-1, descending=True, stable=True)
            order = order.gather(-1, sentence.gather(-1, order).argsort(dim=-1, stable=True))
            farthest = order.gather(-1, bounds[:, :-1].clamp(max=keys.shape[1] - 1))
            return keys.gather(1, farthest[..., None].expand_as(vectors))

        def score(self, q):
            lengths, q = self.lengths.unsqueeze(1), q / math.sqrt(q.shape[-1])
            squared_norms = q.square().sum(dim=-1, keepdim=True)
            others = q @ vectors_of(self).mT + squared_norms * self.variances.unsqueeze(1) / 2
            farthest = (q @ self.farthest.mT).masked_fill(lengths == 0, -math.inf)
            others = others + (lengths - 1).clamp(min=0).log()
            attention = torch.logaddexp(others, farthest).softmax(dim=-1)
            return attention.sum(dim=1) / self.lengths.clamp(min=1)


class TwoLevel(SentenceKVCache):
    """SentenceKV that scores paragraphs first, 16 sentences each, and then the sentences of the
    best 4 alone. Other sentences receive nothing from this token.

    A paragraph's Gaussian has the mean and the variance of all its keys. A version for speed would
    read one vector a paragraph, and those of 64 sentences; this one scores all, and sets others to
    0.
    """

    class Layer(LayerCache):
        paragraph, n_best = 16, 4

        def index_tokens(self):
            n_paragraphs = (self.plan.n_places - 1) / self.paragraph
            return vectors_in_tokens(self, n_paragraphs + self.n_best * self.paragraph)

        def score(self, q):
            lengths, vectors = self.lengths[:, 1:], vectors_of(self)[:, 1:].float()  # (H_kv, S, D)
            n_sentences = lengths.shape[1]

            def total(x):  # over each paragraph, (H_kv, S, n) -> (H_kv, P, n)
                x = F.pad(x * lengths.unsqueeze(-1), (0, 0, 0, -n_sentences % self.paragraph))
                return x.unflatten(1, (-1, self.paragraph)).sum(dim=2)

            counts = total(torch.ones_like(lengths).unsqueeze(-1))  # (H_kv, P, 1)
            squares = vectors.square().mean(dim=-1, keepdim=True) + self.variances[:, 1:, None]
            means = total(vectors) / counts.clamp(min=1)
            variances = total(squares) / counts.clamp(min=1) - means.square().mean(-1, keepdim=True)
            scores = gaussian(q.float(), means, variances.squeeze(-1), counts.squeeze(-1))
            first = scores.topk(min(self.n_best, scores.shape[1]), dim=-1).indices  # (H_kv, n)
            sentence = torch.arange(n_sentences) // self.paragraph
            is_first = (sentence[None, :, None] == first[:, None]).any(dim=-1)
            return super().score(q) * F.pad(is_first, (1, 0))


class BestSentences(SentenceKVCache):
    """The ceiling of a choice of sentences: ranked by this token's mean attention to their rows.

    It reads every key, which no method may; a choice of whole sentences can hardly do better.
    """

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
            received = total.gather(-1, end_rows) - total.gather(-1, self.starts)
            return (received / (end_rows - self.starts).clamp(min=1)).float()


class TwoBitKeys(SentenceKVCache):
    """SentenceKV that knows every key at 2 bits a channel, in place of a vector a sentence.

    A sentence's score is the attention that its rows would receive. It shows what a vector gives
    away. These keys take an eighth of those of 16 bits.
    """

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

"""SentenceKV itself, and what it could know: sentences by other vectors or by every key.

`sentencekv` is `cache.SentenceKVCache`. The classes here have layers with another score. Place 0 of
a layer's table stands for all sinks, which are selected whatever their score is: a score computes
it with lengths of 0, or leaves it at 0. All but `sentencekv` have 16 bits a channel (`SETTINGS`):
these classes take rows and vectors as they are, and do not unpack them.
"""

import math

import torch
import torch.nn.functional as F

from cache import LayerCache, SentenceKVCache
from sentencekv import gaussian


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
    return packing.width / (2 * packing.dim) if packing.bits == 8 else 1.0


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


class GroupedLayer(LayerCache):
    """Looks at groups of 16 sentences first, and then into a few of them. The sentences of the
    others receive nothing from this token. A version for speed would read one or two vectors a
    group, and those of the sentences in open groups; this one scores all, and sets others to 0."""

    group = 16

    def score(self, q):
        n_sentences = self.lengths.shape[1] - 1  # without place 0

        def grouped(x):  # (H_kv, P, n) -> (H_kv, groups, 16, n)
            return F.pad(x[:, 1:], (0, 0, 0, -n_sentences % self.group)).unflatten(
                1, (-1, self.group))

        is_open = self.open_groups(q.float(), grouped(vectors_of(self).float()),
                                   grouped(self.lengths.unsqueeze(-1)),
                                   grouped(self.variances.unsqueeze(-1)))  # (H_kv, groups)
        is_open = is_open.repeat_interleave(self.group, dim=1)[:, :n_sentences]
        return super().score(q) * F.pad(is_open, (1, 0))

    def open_groups(self, q, vectors, lengths, variances):
        """Which groups to look into: q (H_kv, G, D), the others (H_kv, groups, 16, n)."""
        raise NotImplementedError


def best(scores, n: int):
    """True where the n largest scores of a head are."""
    first = scores.topk(min(n, scores.shape[1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, first, True)


class TwoLevel(SentenceKVCache):
    """SentenceKV that scores paragraphs first, 16 sentences each, and then the sentences of the
    best 4 alone. A paragraph's Gaussian has the mean and the variance of all its keys.
    """

    class Layer(GroupedLayer):
        n_best = 4

        def index_tokens(self):
            n_paragraphs = (self.plan.n_places - 1) / self.group
            return vectors_in_tokens(self, n_paragraphs + self.n_best * self.group)

        def open_groups(self, q, vectors, lengths, variances):
            counts = lengths.sum(dim=2)  # (H_kv, groups, 1)
            squares = vectors.square().mean(dim=-1, keepdim=True) + variances
            means = (vectors * lengths).sum(dim=2) / counts.clamp(min=1)
            variances = (squares * lengths).sum(dim=2) / counts.clamp(min=1)
            variances = variances - means.square().mean(-1, keepdim=True)
            return best(gaussian(q, means, variances.squeeze(-1), counts.squeeze(-1)), self.n_best)


class Boxes(SentenceKVCache):
    """SentenceKV that looks into a quarter of the groups: those whose box allows the largest q · k.
    A box has the least and the greatest number of each channel of its sentences' vectors, as a page
    of Quest has of its keys. The first group and the last one are always open.
    """

    class Layer(GroupedLayer):
        share = 0.25

        def index_tokens(self):
            n_sentences = self.plan.n_places - 1
            return vectors_in_tokens(self, 2 * n_sentences / self.group + self.share * n_sentences)

        def open_groups(self, q, vectors, lengths, variances):
            empty = lengths == 0
            low = vectors.masked_fill(empty, math.inf).amin(dim=2)  # (H_kv, groups, D)
            high = vectors.masked_fill(empty, -math.inf).amax(dim=2)
            is_used = ~empty.all(dim=2).squeeze(-1)  # (H_kv, groups)
            low, high = (x.masked_fill(~is_used.unsqueeze(-1), 0) for x in (low, high))
            bounds = q.clamp(min=0) @ high.mT + q.clamp(max=0) @ low.mT  # (H_kv, G, groups)
            bounds = bounds.amax(dim=1).masked_fill(~is_used, -math.inf)
            bounds[:, 0] = math.inf
            n_used = is_used.sum(dim=-1)
            bounds.scatter_(-1, n_used.clamp(min=1).unsqueeze(-1) - 1, math.inf)
            return best(bounds, math.ceil(self.share * int(n_used.max())))


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
            received = total.gather(-1, end_rows) - total.gather(-1, self.starts.long())
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

"""Layers that take over the choice of an earlier layer, as in ChunkKV (arXiv 2502.00299).

Of every n layers, the first is the *anchor*: it scores its sentences. The others, the *reuse
layers*, rank their sentences by the sum of the scores of the anchor's heads, and select from their
own rows. They hold no sentence vectors. In all these layers, sentence s has place s + 1.
"""

from functools import cache

import torch


def make_layers(Layer, plan, hosts, n: int) -> list:
    """One `Layer(plan, host)` for each host. With n > 1, layers 0, n, 2n, … are anchors."""
    if n == 1:
        return [Layer(plan, host) for host in hosts]
    AnchorLayer, ReuseLayer = layer_classes(Layer)
    layers = []
    for i, host in enumerate(hosts):
        if i % n == 0:
            layers.append(AnchorLayer(plan, host))
        else:
            layers.append(ReuseLayer(plan, host, layers[i - i % n]))
    return layers


@cache  # the same two classes for all layers: compiled code depends on the class
def layer_classes(Layer) -> tuple:
    """The classes of anchors and of reuse layers that are made of `Layer`."""
    return (type("AnchorLayer", (Anchor, InPlace, Layer), {}),
            type("ReuseLayer", (Reuse, InPlace, Layer), {}))


class InPlace:
    """In front of a `cache.LayerCache`: a sentence of which a head keeps nothing has a place, too.
    `DESCRIBED` are the tables that say what a sentence is."""

    def make_sentences(self, kv, kept, secondary):
        rows = super().make_sentences(kv, kept, secondary)
        place = places_of(kept, secondary, self.plan.sentence_ends)  # (H_kv, S)
        head, n = torch.arange(len(kept), device=kept.device)[:, None], place.shape[1] + 1
        for name in self.DESCRIBED:
            table = getattr(self, name)
            table[:, 1:n] = table[head, place]  # place 0 describes nothing
        # Where a sentence has no rows, it ends where the one before it ends.
        ends = self.ends[head, place].masked_fill(place == 0, 0)
        self.ends[:, 1:n] = torch.cat((self.ends[:, :1], ends), dim=1).cummax(dim=1).values[:, 1:]
        self.starts[:, 1:n] = self.ends[:, : n - 1]
        return rows


class Anchor:
    """It scores its sentences, and shares the sums over its heads."""

    DESCRIBED = ("vectors", "variances", "lengths")

    def __init__(self, plan, host):
        super().__init__(plan, host)
        self.shared = torch.zeros_like(self.scores[:1])  # (1, P), of the last token
        self.TABLE = *self.TABLE, "shared"

    def score(self, q):
        scores = super().score(q)
        known = scores.masked_fill(self.lengths == 0, 0)  # a head may keep nothing of a sentence
        self.shared.copy_(known.sum(dim=0, keepdim=True))  # not `=`: a CUDA graph reads it
        return scores


class Reuse:
    """It ranks its sentences by the sums of its anchor."""

    DESCRIBED = ("lengths",)

    def __init__(self, plan, host, anchor):
        super().__init__(plan, host)
        self.anchor = anchor
        self.TABLE = tuple(name for name in self.TABLE if name not in ("vectors", "variances"))
        del self.vectors, self.variances

    def add_vectors(self, places: slice, keys, bounds):
        """It has none."""

    def score(self, q):
        return self.anchor.shared.expand_as(self.scores)


def places_of(kept, secondary, sentence_ends) -> torch.Tensor:
    """The place of each sentence in the table of a head if those without rows have none: then 0.

    kept (H_kv, N) positions in reading order, secondary (H_kv, T) bool, sentence_ends (S,)
    -> (H_kv, S)

    >>> places_of(torch.tensor([[0, 1, 8, 9]]), torch.zeros(1, 10).bool(), torch.tensor([4, 7, 10]))
    tensor([[1, 0, 2]])
    """
    sentence = torch.bucketize(kept.contiguous(), sentence_ends, right=True)
    n_kept = torch.zeros(len(kept), len(sentence_ends), dtype=torch.long, device=kept.device)
    n_kept.scatter_add_(1, sentence, (~secondary.gather(1, kept)).long())
    return (n_kept > 0).cumsum(1) * (n_kept > 0)

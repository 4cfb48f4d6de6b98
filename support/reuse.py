"""Layers that take over the choice of an earlier layer, as in ChunkKV (arXiv 2502.00299).

Of every n layers, the first is the *anchor*: it scores its sentences. The others, the *reuse
layers*, rank their sentences by the anchor's scores, head by head, and select from their own rows.
They hold no sentence vectors.
"""

from functools import cache

import torch

LAST = -1e30  # the score of a sentence that the anchor's head has dropped


def make_layers(Layer, plan, hosts, n: int) -> list:
    """One `Layer(plan, host)` for each host. With n > 1, layers 0, n, 2n, … are anchors."""
    if n == 1:
        return [Layer(plan, host) for host in hosts]
    AnchorLayer, ReuseLayer = kinds(Layer)
    layers = []
    for i, host in enumerate(hosts):
        if i % n == 0:
            layers.append(AnchorLayer(plan, host))
        else:
            layers.append(ReuseLayer(plan, host, layers[i - i % n]))
    return layers


@cache  # a class for each anchor would be compiled for each
def kinds(Layer) -> tuple:
    return type("AnchorLayer", (Anchor, Layer), {}), type("ReuseLayer", (Reuse, Layer), {})


class Anchor:
    """Before a `cache.LayerCache`: it keeps its last token's scores for the layers after it."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.latest = torch.zeros_like(self.scores)
        self.TABLE = *self.TABLE, "latest"
        self.place_of = None  # while a text is read: of each sentence (H_kv, S), see `places_of`

    def make_sentences(self, kv, kept, secondary):
        self.place_of = places_of(kept, secondary, self.plan.sentence_ends)
        return super().make_sentences(kv, kept, secondary)

    def fill_window(self, first_row: int):
        self.place_of = None
        super().fill_window(first_row)

    def score(self, q):
        self.latest.copy_(super().score(q))  # not `=`: a CUDA graph uses the same tensor
        self.latest[:, 0] = LAST  # place 0 is no sentence
        return self.latest


class Reuse:
    """Before a `cache.LayerCache`: `anchor_place` (H_kv, P) is the place of each of its sentences
    in the anchor's table, 0 where the anchor's head has dropped it."""

    def __init__(self, plan, host, anchor):
        super().__init__(plan, host)
        self.anchor, self.anchor_place = anchor, torch.zeros_like(self.starts)
        held = [name for name in self.TABLE if name not in ("vectors", "variances")]
        self.TABLE = *held, "anchor_place"
        del self.vectors, self.variances

    def make_sentences(self, kv, kept, secondary):
        rows = super().make_sentences(kv, kept, secondary)
        place_of = places_of(kept, secondary, self.plan.sentence_ends)
        self.anchor_place.scatter_(1, place_of, self.anchor.place_of.to(self.anchor_place.dtype))
        self.anchor_place[:, 0] = 0
        return rows

    def add_vectors(self, places: slice, keys, bounds):
        """It has none. In later texts and in what is written, nothing is dropped: a sentence has
        the same place in all layers."""
        self.anchor_place[:, places] = torch.arange(places.start, places.stop, device=keys.device)

    def score(self, q):
        return self.anchor.latest.gather(1, self.anchor_place.long())


def places_of(kept, secondary, sentence_ends) -> torch.Tensor:
    """The place of each sentence in the table of a head, 0 if the head keeps nothing of it.

    kept (H_kv, N) positions in reading order, secondary (H_kv, T) bool, sentence_ends (S,)
    -> (H_kv, S)

    >>> places_of(torch.tensor([[0, 1, 8, 9]]), torch.zeros(1, 10).bool(), torch.tensor([4, 7, 10]))
    tensor([[1, 0, 2]])
    """
    sentence = torch.bucketize(kept.contiguous(), sentence_ends, right=True)
    n_kept = torch.zeros(len(kept), len(sentence_ends), dtype=torch.long, device=kept.device)
    n_kept.scatter_add_(1, sentence, (~secondary.gather(1, kept)).long())
    return (n_kept > 0).cumsum(1) * (n_kept > 0)

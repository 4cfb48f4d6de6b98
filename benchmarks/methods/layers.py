"""Layers: one layer's keys and values serve another."""

from itertools import combinations

import torch

from benchmarks.methods.base import Cost, MethodCache, PerLayer


class KVSharer(MethodCache):
    """Layers that share keys and values, the most unlike ones. 2410.18517.

    Unit: a layer. Score: the distance of two layers' keys and values, Euclidean, the mean over
    tokens of each; the most unlike pair first. Budget: 4 layers have none of their own; what is
    held follows from the text. Rest: the later layer's are dropped, and the earlier's serve. The
    paper ranks pairs once, on other texts, and keeps a pair only if the final hidden states stay
    similar. Here each prompt ranks its own, and nothing is tried. Departure: the prompt is read
    without sharing.
    """

    name, label = "kvsharer", "KVSharer"
    budgeted = False
    n_shared = 4
    kv: PerLayer  # (H_kv, n, 2, D); None: shared

    def prepare(self):
        self.source = list(range(self.n_layers))  # the layer whose kv each layer reads

    def prefill(self, layer, q, k, v):
        if self.source[layer] != layer:
            return self.kv[self.source[layer]].unbind(dim=2)
        kv = torch.stack((k, v), dim=2)
        if self.num_tokens > 0:
            kv = torch.cat((self.kv[layer], kv), dim=1)
        self.kv[layer] = kv
        return kv.unbind(dim=2)

    def advance(self, n_tokens):
        if self.num_tokens == 0:
            self.share()
        super().advance(n_tokens)

    def share(self):
        """A layer that serves others keeps its own, so there are no chains."""
        means = torch.stack([kv.float().mean(dim=1).flatten() for kv in self.kv])  # (L, 2 H_kv D)
        distances = torch.cdist(means, means)
        pairs = sorted(combinations(range(self.n_layers), 2), key=lambda pair: -distances[pair])
        left = min(self.n_shared, self.n_layers - 1)
        for earlier, later in pairs:
            alone = self.source[earlier] == earlier and later not in self.source[later + 1 :]
            if left and alone and self.source[later] == later:
                self.source[later], self.kv[later] = earlier, None
                left -= 1

    def attend_to(self, layer, q, k, v):
        return *self.prefill(layer, q, k, v), None

    def cost(self):
        held = self.num_tokens * len(set(self.source)) / self.n_layers
        return Cost(held, 0, self.num_tokens, held)

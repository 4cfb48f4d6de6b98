"""Estimate: what is not read still counts, by what is known of it."""

import math

import torch

from benchmarks.methods.base import Cost, best, take
from benchmarks.methods.retrieve import Clustered
from sentencekv import select_rows


class RetroInfer(Clustered):
    """Clusters in three zones: read, estimated, left out. 2505.02922.

    Unit: a k-means cluster of centred keys (10 steps), of 16 tokens in the mean. Score: softmax
    over clusters of q · mean key / √D, summed over the group's heads. Budget: 4 sinks, the latest
    33 to 64, an estimate for each of the next 23.2 % of the clusters (of half of what is left at
    most), which counts as a token, and the best clusters for the rest, the last one cut. Rest:
    estimated as so many tokens with the mean key and the mean value of the cluster, or left out;
    all is kept. Departures: the latest 32 tokens, not 64; the whole prompt is one segment, and
    every 32 written tokens are a cluster.
    """

    name, label = "retroinfer", "RetroInfer"
    local, per_cluster, steps, centred, estimated = 32, 16, 10, True, 0.232

    def find(self, layer, q, room):
        sizes, means = self.sizes[layer], self.means[layer]
        logits = q @ means[:, :, 0].mT / math.sqrt(q.shape[-1])  # (H_kv, G, C)
        shares = logits.softmax(dim=-1).sum(dim=1)
        n_estimated = min(round(self.estimated * shares.shape[-1]), room // 2)
        budget = torch.full((len(shares), 1), room - n_estimated)
        selected = select_rows(shares, sizes, budget)
        read, mask = self.members(layer, selected)
        # Of the cluster that is cut, the other tokens are estimated.
        left = sizes - selected
        next_best = best(shares.masked_fill(left == 0, -1.0), n_estimated)
        bias = left.gather(-1, next_best).float().log()[:, None]
        return torch.cat((read, take(means, next_best)), 1), torch.cat((mask, bias), dim=-1)

    def cost(self):
        """Mean values are kept on the device as well, and those of estimates are among what is
        held."""
        held, elsewhere, read, device = super().cost()
        return Cost(held, elsewhere + read - held, read, device + read - held)

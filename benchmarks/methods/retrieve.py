"""Retrieve: everything is kept, and each token chooses anew what it reads.

What stands for a unit, in place of its keys, is read for every token: that is the index.
"""

import math

import torch
import torch.nn.functional as F

from benchmarks.methods.base import (Cost, Full, MethodCache, Paged, PerLayer, append, shared, sums,
                                     take, token_attention)
from model import FullLayer
from sentencekv import select_rows


class Quest(Paged):
    """Pages ranked by an upper bound of q · k. 2406.10774.

    Unit: 16 tokens. Score: the bound that follows from the smallest and the largest value of each
    channel, the mean of the group's heads. Budget: pages, with the one being filled; the paper
    reads the first two layers whole (`quest_dense`). Rest: kept.
    """

    name, label = "quest", "Quest"
    paper_dense = 2

    def summary(self, layer, keys):
        return torch.stack(keys.aminmax(dim=2))

    def scores(self, layer, q):
        bounds = (q[:, :, None] * self.summaries[layer][:, :, None]).amax(dim=0)  # (H_kv, G, P, D)
        return bounds.sum(dim=-1).mean(dim=1)


class ArkVale(Quest):
    """Quest with tighter bounds, the cuboid-mean. NeurIPS 2024.

    Unit: 32 tokens. Score: as in Quest, for a smaller box: in each channel, the middle ± the mean
    distance of the keys from it. Budget: pages, of them the first two, the latest two and the one
    being filled; the paper reads the first two layers whole (`arkvale_dense`). Rest: kept.
    """

    name, label = "arkvale", "ArkVale"
    page, first_pages, last_pages = 32, 2, 2

    def summary(self, layer, keys):
        smallest, largest = keys.aminmax(dim=2)
        middle = (smallest + largest) / 2
        radius = (keys - middle.unsqueeze(2)).abs().mean(dim=2)
        return torch.stack((middle + radius, middle - radius))

    def scores(self, layer, q):
        scores = super().scores(layer, q)
        scores[:, : self.first_pages] = math.inf
        scores[:, scores.shape[1] - self.last_pages :] = math.inf
        return scores


class ShadowKV(Paged):
    """Chunks by their mean key, the landmark, and outliers. 2410.21465, the choice alone.

    Unit: 8 tokens. Score: the chunk's share of a softmax over landmarks, the maximum over the
    group's heads. Budget: chunks, of them always the latest 4 and the outliers, whose keys are
    least like their landmark, 24 for 1,024 tokens (in the CPU variant of the authors' code). Rest:
    kept. Departures: keys are not of low rank; the local chunks are the latest, not the prompt's.
    """

    name, label = "shadowkv", "ShadowKV's chunks"
    page, local_chunks = 8, 4
    outliers: PerLayer  # (H_kv, n)

    def summary(self, layer, keys):
        return keys.mean(dim=2).unsqueeze(0)

    def prefill(self, layer, q, k, v):
        everything = super().prefill(layer, q, k, v)
        if self.num_tokens == 0:
            keys, landmarks = self.pages[layer][:, :, :, 0], self.summaries[layer][0]
            likeness = torch.cosine_similarity(keys, landmarks.unsqueeze(2), dim=-1).amin(dim=-1)
            earlier = likeness[:, : -self.local_chunks]
            n_outliers = round(self.budget * 24 / 1024)
            self.outliers[layer] = earlier.argsort(dim=-1, stable=True)[:, :n_outliers]
        return everything

    def scores(self, layer, q):
        logits = q @ self.summaries[layer][0].mT / math.sqrt(q.shape[-1])  # (H_kv, G, P)
        always = torch.zeros_like(logits[:, 0], dtype=torch.bool)
        always.scatter_(-1, self.outliers[layer], True)
        always[:, -self.local_chunks :] = True
        shares = logits.masked_fill(always.unsqueeze(1), -math.inf).softmax(dim=-1).amax(dim=1)
        return shares.masked_fill(always, math.inf)


class ActQKV(Paged):
    """Blocks by their best keys, asked by the queries that stand out. 2502.13542.

    Unit: 32 tokens, known by the mean of the 4 keys that match the block's mean query best. Score:
    the cosine with a probe, the mean of the last 32 queries, each weighted by the mean over
    channels of (q - μ)² / (σ² + mean(σ²) / 100), with mean and variance of all queries before.
    Budget: each layer has the first block and the one being filled. The others are shared by the
    entropy of the scores' softmax, divided by ln n, the mean over tokens and heads so far. Rest:
    kept. Departures: a query is the mean of its group, and each KV head has its own probe and
    choice, where the code joins heads; while decoding only.
    """

    name, label = "actqkv", "ActQKV"
    reads_on = False
    page, best_keys = 32, 4
    queries: PerLayer  # (H_kv, page, D), the mean of a group
    moments: PerLayer  # count, sum and sum of squares of all queries
    entropy: PerLayer  # sum, count

    def prefill(self, layer, q, k, v):
        q = q.unflatten(0, (len(k), -1)).mean(dim=1)  # (H_kv, T, D)
        self.moments[layer] = q.shape[1], q.sum(1, keepdim=True), q.square().sum(1, keepdim=True)
        self.queries[layer], self.entropy[layer] = q, (0.0, 0)
        everything = super().prefill(layer, q, k, v)
        self.queries[layer] = q[:, -self.page :]
        return everything

    def summary(self, layer, keys):
        n_tokens, dim = keys.shape[1] * self.page, keys.shape[-1]
        queries = self.queries[layer][:, :n_tokens].reshape(keys.shape)  # those of the keys' tokens
        match = keys @ queries.mean(dim=2).unsqueeze(-1)  # (H_kv, P, page, 1)
        chosen = match.topk(self.best_keys, dim=2).indices.expand(-1, -1, -1, dim)
        return keys.gather(2, chosen).mean(dim=2).unsqueeze(0)

    def attend_to(self, layer, q, k, v):
        answer = super().attend_to(layer, q, k, v)
        query = q.unflatten(0, (len(k), -1)).mean(dim=1)
        self.queries[layer] = torch.cat((self.queries[layer], query), dim=1)[:, -self.page :]
        count, total, squares = self.moments[layer]
        self.moments[layer] = count + 1, total + query, squares + query.square()
        return answer

    def index(self):
        """What stands for the blocks, and the queries of the probe."""
        return [*self.summaries, *self.queries]

    def scores(self, layer, q):
        count, total, squares = self.moments[layer]
        mean = total / count
        queries = torch.cat((self.queries[layer], q.mean(dim=1, keepdim=True)), 1)[:, -self.page :]
        variance = squares / count - mean.square()
        steady = variance + variance.mean(dim=-1, keepdim=True) / 100
        weights = ((queries - mean).square() / steady.clamp(min=1e-12)).mean(dim=-1, keepdim=True)
        weights = weights + 1e-12  # queries that are all alike count alike
        probe = (weights * queries).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True)
        scores = torch.cosine_similarity(probe, self.summaries[layer][0], dim=-1)  # (H_kv, P)
        shares = scores.softmax(dim=-1)
        entropy = -(shares * shares.log()).sum(dim=-1).mean().item()
        total, count = self.entropy[layer]
        self.entropy[layer] = total + entropy / math.log(max(scores.shape[-1], 2)), count + 1
        scores[:, :1] = math.inf
        return scores

    def layer_budget(self, layer):
        """Blocks are whole, so the mean is a little less than the budget."""
        means = [max(total, 1e-9) / max(count, 1) for total, count in self.entropy]
        if self.entropy[-1][1] == 0:  # at the first token, not all layers are known
            means = [1.0] * self.n_layers
        n_shared = (self.budget // self.page - 2) * self.n_layers  # blocks
        return self.page * (2 + int(max(n_shared, 0) * means[layer] / sum(means)))


@shared
def k_means(k, first: int, last: int, n_clusters: int, steps: int, centred: bool):
    """The cluster (H_kv, n) of each of the n keys in k (H_kv, T, D) from `first` to `last`, by
    cosine. The first centroids are keys at equal distances in the text. `centred`: keys are
    compared without their mean.
    """
    keys = k[:, first:last]
    points = F.normalize(keys - keys.mean(dim=1, keepdim=True) if centred else keys, dim=-1)
    centroids = points[:, torch.arange(n_clusters) * keys.shape[1] // max(n_clusters, 1)]
    cluster = torch.zeros(keys.shape[:2], dtype=torch.long)
    for _ in range(steps if n_clusters else 0):
        cluster = (points @ centroids.mT).argmax(dim=-1)
        centroids = F.normalize(sums(points, cluster, n_clusters), dim=-1)
    return cluster


class Clustered(MethodCache):
    """The prompt's keys in clusters, of any tokens. Always attended to are the sinks, the latest
    `local` tokens, and up to `fresh` more, which then become one cluster."""

    keeps_all = True
    sinks, local, fresh, per_cluster, steps, centred = 4, 0, 32, 80, 20, False
    first: PerLayer  # (H_kv, sinks, 2, D)
    clustered: PerLayer  # (H_kv, n, 2, D), cluster by cluster
    sizes: PerLayer  # (H_kv, C) tokens of each cluster
    means: PerLayer  # (H_kv, C, 2, D) their mean key and mean value
    recent: PerLayer  # (H_kv, n, 2, D)

    def prefill(self, layer, q, k, v):
        """The prompt, or a text after it, which attends to everything and makes no cluster."""
        if self.num_tokens > 0:
            self.recent[layer] = append(self.recent[layer], k, v)
            everything = self.first[layer], self.clustered[layer], self.recent[layer]
            return torch.cat(everything, dim=1).unbind(dim=2)
        kv, sinks = torch.stack((k, v), dim=2), min(self.sinks, k.shape[1])
        last = max(k.shape[1] - self.local, sinks)
        n_clusters = math.ceil((last - sinks) / self.per_cluster)
        cluster = k_means(k, sinks, last, n_clusters, self.steps, self.centred)
        self.first[layer], self.recent[layer], kv = kv[:, :sinks], kv[:, last:], kv[:, sinks:last]
        self.clustered[layer] = take(kv, cluster.argsort(dim=-1, stable=True))
        sizes = sums(torch.ones(*cluster.shape, 1), cluster, n_clusters)  # (H_kv, C, 1)
        means = sums(kv.flatten(2), cluster, n_clusters) / sizes.clamp(min=1)
        self.sizes[layer], self.means[layer] = sizes.squeeze(-1).long(), means.unflatten(2, (2, -1))
        return k, v

    def attend_to(self, layer, q, k, v):
        while self.recent[layer].shape[1] >= self.local + self.fresh:
            self.add_cluster(layer)
        self.recent[layer] = append(self.recent[layer], k, v)
        always = torch.cat((self.first[layer], self.recent[layer]), dim=1)
        room = max(self.layer_budget(layer) - always.shape[1], 0)
        found, bias = self.find(layer, q.view(len(k), -1, q.shape[-1]), room)
        keys, values = torch.cat((found, always), dim=1).unbind(dim=2)
        return keys, values, F.pad(bias, (0, always.shape[1]))

    def add_cluster(self, layer):
        """Of the oldest recent tokens."""
        kv = self.recent[layer][:, : self.fresh]
        self.recent[layer] = self.recent[layer][:, self.fresh :]
        self.clustered[layer] = torch.cat((self.clustered[layer], kv), dim=1)
        self.sizes[layer] = F.pad(self.sizes[layer], (0, 1), value=self.fresh)
        mean = kv.mean(dim=1, keepdim=True)
        self.means[layer] = torch.cat((self.means[layer], mean), dim=1)

    def find(self, layer, q, room: int):
        """For q (H_kv, G, D), at most `room` more: kv (H_kv, n, 2, D) and, for the mask, log of
        what each counts for, (H_kv, 1, n)."""
        raise NotImplementedError

    def members(self, layer, selected):
        """The first `selected` (H_kv, C) tokens of each cluster, and their mask, as in `find`."""
        n_tokens = selected.sum(dim=-1, keepdim=True)  # (H_kv, 1)
        number = torch.arange(n_tokens.amax()).expand(len(selected), -1).contiguous()
        ends = selected.cumsum(dim=-1)
        cluster = torch.searchsorted(ends, number, right=True).clamp(max=selected.shape[1] - 1)
        starts = self.sizes[layer].cumsum(dim=-1) - self.sizes[layer]
        row = (starts - (ends - selected)).gather(-1, cluster) + number
        seen = number < n_tokens
        return take(self.clustered[layer], row * seen), seen.float().log()[:, None]

    def index(self):
        return [means[:, :, 0] for means in self.means]


class ClusterKV(Clustered):
    """Clusters of like keys, not of neighbours. 2412.03213.

    Unit: a k-means cluster of a KV head (by cosine, 20 steps), one for 80 tokens. Score: q · mean
    key, the mean of the group's heads. Budget: the sinks, the tokens written since the last
    cluster, and the best clusters until it is full, the last one cut; the paper reads the first two
    layers whole (`clusterkv_dense`). Rest: kept. Departures: 4 sinks, not 16; every 32 written
    tokens are a cluster, where the code makes 8 clusters from 320.
    """

    name, label = "clusterkv", "ClusterKV"
    paper_dense = 2

    def find(self, layer, q, room):
        scores = (q @ self.means[layer][:, :, 0].mT).mean(dim=1)  # (H_kv, C)
        budget = torch.full((len(scores), 1), room)
        return self.members(layer, select_rows(scores, self.sizes[layer], budget))


class BestTokens(Full):
    """The ceiling of any choice of tokens.

    Unit: token. Score: the attention of this very token, the mean of the group's heads; it is known
    only when every key has been read. Budget: the same in all heads. Rest: kept.
    """

    name, label, budgeted = "best_tokens", "best tokens", True

    def __init__(self, model_config, budget, spans, max_new_tokens):
        super().__init__(model_config, budget, spans, max_new_tokens)
        self.budget = budget
        self.layers = [BestTokensLayer(layer.kv, budget) for layer in self.layers]

    def cost(self):
        held = min(self.budget, self.num_tokens)
        read = held / 2 + self.num_tokens / 2  # values of the chosen, and all keys
        return Cost(held, self.num_tokens - held, read, read)


class BestTokensLayer(FullLayer):
    def __init__(self, kv, budget: int):
        super().__init__(kv)
        self.budget = budget

    def decode(self, q, k, v):
        keys, values, _ = super().decode(q, k, v)
        n = min(self.budget, keys.shape[1])
        chosen = token_attention(q, keys).topk(n, dim=-1).indices
        return take(keys, chosen), take(values, chosen), None

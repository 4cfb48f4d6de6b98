"""Merge: what is not kept whole is joined with others, and counts for as many."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.methods.base import Evicting, PerLayer, attention_received, best, sums, take
from benchmarks.methods.evict_prompt import SnapKV


class KVMerger(SnapKV):
    """Runs of like neighbours become one token. 2407.08454.

    Unit: a run of neighbours of a head, joined where cosines of neighbouring keys are highest.
    Score: attention from the last 32 queries. Budget: besides the window, a quarter for the best
    tokens, which stay as they are; the rest is the number of runs of the others, neighbours among
    themselves, in place of the paper's limit ε of the cosine. Rest: merged with weights exp(-|k_p -
    k|² / 2σ²), p the token of the run with the best score; the merged token counts as often as its
    run is long. Departures: σ is 5, where the paper computes it from the data; the count is a bias
    of the softmax, where the paper multiplies the value; cosines are those of neighbours, not with
    p.
    """

    name, label = "kvmerger", "KVMerger"
    reads_on = False
    pool, sigma, whole = 1, 5.0, 4

    def choose(self, layer, kv, score, rooms):
        n_tokens, room = score.shape[1], int(rooms[0])
        n_whole = n_tokens if n_tokens <= room else room // self.whole
        whole, others = best(score, n_tokens).tensor_split([n_whole], dim=1)
        others = others.sort(dim=-1).values
        merged, counts = self.merge(take(kv, others), score.gather(-1, others), room - n_whole)
        self.kept_at[layer], self.kept[layer] = whole, torch.cat((take(kv, whole), merged), dim=1)
        self.bias[layer] = F.pad(counts.log(), (n_whole, 0))

    def merge(self, kv, score, n_runs: int):
        """kv (H_kv, n, 2, D), score (H_kv, n) -> the runs (H_kv, n_runs, 2, D), the best first, and
        how long they are (H_kv, n_runs)."""
        if kv.shape[1] == 0 or n_runs <= 0:
            return kv[:, :0], score[:, :0]
        keys = kv[:, :, 0].float()
        likeness = torch.cosine_similarity(keys[:, 1:], keys[:, :-1], dim=-1)
        cuts = likeness.argsort(dim=-1, stable=True)[:, : n_runs - 1]
        is_first = torch.zeros_like(score, dtype=torch.long).scatter_(-1, cuts + 1, 1)
        run = is_first.cumsum(dim=-1)  # (H_kv, n)
        total = partial(sums, group=run, n_groups=n_runs)
        most = score.new_zeros(len(score), n_runs).scatter_reduce_(1, run, score, "amax")
        is_pivot = (score == most.gather(-1, run)).float().unsqueeze(-1)
        pivot = total(keys * is_pivot) / total(is_pivot).clamp(min=1)  # the mean, if two are best
        distance = (keys - take(pivot, run)).square().sum(dim=-1, keepdim=True)
        weights = (-distance / (2 * self.sigma**2)).exp()
        merged = total(weights * kv.flatten(2)) / total(weights).clamp(min=1e-30)
        order = best(total(score.unsqueeze(-1)).squeeze(-1), n_runs)
        counts = total(torch.ones_like(weights)).squeeze(-1)
        merged = take(merged.unflatten(-1, (2, -1)), order).to(kv.dtype)
        return merged, counts.gather(-1, order)


class LESS(Evicting):
    """H2O's choice at the prompt's end, and a small state of what it drops. 2402.09398, untrained.

    Unit: token, and 8 random features. Score: attention received from all queries. Budget: half of
    it the latest, 8 for the state. Rest: of a dropped k, v, each feature φ_r(k) is added to z_r and
    φ_r(k) v to H_r; a query q attends to the state as to 8 tokens with values H_r / z_r that count
    φ_r(q) z_r. The paper trains φ for each layer. Here it is random and positive, and right in the
    mean only: φ_r(x) = exp(w_r · x - |x|²/2) / √8, x = k / D^¼ or q / D^¼. Departure: only tokens
    that are dropped at the end of the prompt join the state, none later.
    """

    name, label = "less", "LESS, untrained"
    reads_on = False
    features = 8
    state: PerLayer  # z (H_kv, R) as its log, H / z (H_kv, R, D)

    def prepare(self):
        self.window, self.dim = self.budget // 2, self.model_config.head_dim
        generator = torch.Generator().manual_seed(0)
        self.random = torch.randn(self.features, self.dim, generator=generator)

    def layer_budget(self, layer):
        return self.budget - self.features

    def importance(self, layer, q, k, v):
        return attention_received(q, k)

    def log_features(self, x):
        """x (..., D), a query or a key -> log φ (..., R)"""
        x = x.float() / self.dim**0.25
        return x @ self.random.T - x.square().sum(dim=-1, keepdim=True) / 2 - math.log(
            self.features) / 2

    def choose(self, layer, kv, score, rooms):
        super().choose(layer, kv, score, rooms)
        kept = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, self.kept_at[layer], True)
        keys, values = kv.unbind(dim=2)
        logs = self.log_features(keys).masked_fill(kept.unsqueeze(-1), -math.inf)
        log_z = logs.logsumexp(dim=1)  # (H_kv, R)
        shares = (logs - log_z.unsqueeze(1)).exp().nan_to_num()  # nothing dropped: 0
        self.state[layer] = log_z, shares.mT @ values.float()

    def attend_to(self, layer, q, k, v):
        keys, values, mask = super().attend_to(layer, q, k, v)
        log_z, means = self.state[layer]
        bias = self.log_features(q.view(len(k), -1, self.dim)) + log_z.unsqueeze(1)  # (H_kv, G, R)
        mask = keys.new_zeros(1, 1, keys.shape[1]) if mask is None else mask.float().log()
        mask = torch.cat((mask.expand(*bias.shape[:2], -1), bias), dim=-1)
        keys = F.pad(keys, (0, 0, 0, self.features))
        return keys, torch.cat((values, means.to(values)), dim=1), mask

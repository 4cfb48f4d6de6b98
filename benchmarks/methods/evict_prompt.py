"""Evict after the prompt: a score of each token decides once what stays.

All are `Evicting`. The last 32 queries of the prompt are the observation window.
"""

import math

import torch
import torch.nn.functional as F

from benchmarks.methods.base import Evicting, shared, window_attention
from model import apply_rope, rope_table


class StreamingLLM(Evicting):
    """The first 4 tokens and the latest. 2309.17453.

    Unit: token. Score: none, the position. Budget: the same in all heads. Rest: dropped.
    Departure: positions are not renumbered.
    """

    name, label = "streamingllm", "StreamingLLM"
    sinks = 4

    def importance(self, layer, q, k, v):
        position = torch.arange(k.shape[1], dtype=torch.float32)
        position[: self.sinks] = math.inf
        return position.expand(len(k), -1)

    def least_kept(self, totals):
        return torch.full_like(totals, self.sinks)


class L2Norm(Evicting):
    """The shortest keys. 2406.11430.

    Unit: token. Score: the key's norm, the smaller the better. Budget: the same in all heads; the
    paper leaves the first two layers whole (`l2norm_dense`). Rest: dropped.
    """

    name, label = "l2norm", "L2-norm"
    paper_dense = 2

    def importance(self, layer, q, k, v):
        return -k.float().norm(dim=-1)


class SnapKV(Evicting):
    """What the end of the prompt attends to. 2404.14469.

    Unit: token. Score: attention from the prompt's last 32 queries, the largest of 7 neighbours.
    Budget: the same in all heads. Rest: dropped.
    """

    name, label = "snapkv", "SnapKV"
    pool = 7

    def importance(self, layer, q, k, v):
        return window_attention(q, k, self.window, self.pool)


class ChunkKV(SnapKV):
    """SnapKV in chunks. 2502.00299.

    Unit: 10 tokens of all heads. Score: the sum of SnapKV's scores, without pooling. Budget: the
    same in all heads; every second layer takes the choice of the one before. Rest: dropped.
    """

    name, label = "chunkkv", "ChunkKV"
    pool, chunk, reuse = 1, 10, 2

    def by_unit(self, scores):
        chosen = [at_places(score.split(self.chunk, dim=1), self.score_of)
                  for score in scores[:: self.reuse]]
        return [chosen[layer // self.reuse].expand(self.n_kv_heads, -1)
                for layer in range(self.n_layers)]

    def score_of(self, chunk):
        """One number for a chunk (H_kv, n), which can be short."""
        return chunk.sum(dim=0).sum()


def at_places(units, score_of):
    """The score of each unit (..., n) at the places of its tokens."""
    return torch.cat([score_of(unit).expand(unit.shape[-1]) for unit in units])


class WindowKV(ChunkKV):
    """Windows of neighbours, chosen once for a group of layers. 2503.17922 (its code's QA mode).

    Unit: 8 tokens of all heads. Score: attention from the last 32 queries, the mean of a window's 4
    best tokens, then of the heads. Budget: falls in a straight line from the first group of 6
    layers, 2B - 8B/14, to the last, 8B/14, where B is without the window; all layers of a group
    take the choice of its first. Rest: dropped. Departure: no classifier chooses the mode.
    """

    name, label = "windowkv", "WindowKV"
    chunk, reuse, best_tokens = 8, 6, 4

    def score_of(self, window):
        highest = window.topk(min(self.best_tokens, window.shape[1])).values
        return highest.mean(dim=1).mean()

    def layer_budget(self, layer):
        """The groups' mean is the budget, except for what the last group's size changes."""
        room, last = self.budget - self.window, 8 / 14 * (self.budget - self.window)
        n_groups = math.ceil(self.n_layers / self.reuse)
        step = 2 * (room - last) / max(n_groups - 1, 1)
        first = 2 * room - last if n_groups > 1 else room
        return self.window + int(first - step * (layer // self.reuse))


class ShotKV(SnapKV):
    """Whole examples of a few-shot prompt; here whole sentences, so an analogue. 2502.01941.

    Unit: a sentence of all heads and layers. Score: the mean of its tokens' attention from the last
    32 queries, over heads and layers. Budget: the same in all heads; the best shots until it is
    full, the last one cut. Rest: dropped. The abstract does not say which queries score, nor how;
    written tokens are dropped by age here.
    """

    name, label = "shotkv", "ShotKV"
    pool, sentence_limit = 1, 128  # the sentences have at most so many tokens

    def by_unit(self, scores):
        received = torch.stack(scores).mean(dim=(0, 1))  # (n,)
        shots = received.tensor_split([end for _, end in self.spans if end < len(received)])
        means = at_places(shots, torch.mean)
        return [means.expand(self.n_kv_heads, -1)] * self.n_layers


@shared
def expected_attention(q, k, config, ahead: int = 512):
    """What the next tokens pay to each token but the first 4, if their queries are Gaussian before
    RoPE, (H_kv, T - 4).

    Mean and covariance are those of the prompt's queries, without the first 4. Both are turned by
    the mean rotation of the next `ahead` positions.
    """
    dim, n_tokens = q.shape[-1], q.shape[1]
    cos, sin = rope_table(config, torch.arange(n_tokens + ahead), q.dtype)
    unturned = apply_rope(q, cos[:n_tokens], -sin[:n_tokens])[:, 4:]  # (H, T - 4, D)
    mean = unturned.mean(dim=1, keepdim=True)
    covariance = (unturned - mean).mT @ (unturned - mean) / unturned.shape[1]  # (H, D, D)
    later = cos[n_tokens:].mean(dim=0), sin[n_tokens:].mean(dim=0)
    mean = apply_rope(mean, *later)
    covariance = apply_rope(apply_rope(covariance, *later).mT, *later)  # R Σ Rᵀ
    keys = k[:, 4:].repeat_interleave(len(q) // len(k), dim=0)  # (H, T - 4, D)
    logits = (mean @ keys.mT).squeeze(1) / math.sqrt(dim)
    logits += ((keys @ covariance) * keys).sum(dim=-1) / (2 * dim)
    return logits.softmax(dim=-1).unflatten(0, (len(k), -1)).mean(dim=1)


class ExpectedAttention(Evicting):
    """What later tokens are expected to attend to. 2510.00636.

    Unit: token. Score: the attention of Gaussian queries, times the length of the value; the first
    4 tokens always. Budget: the same in all heads. Rest: dropped. Departure: the last 32 stay.
    """

    name, label = "expected_attention", "Expected Attention"

    def importance(self, layer, q, k, v):
        scores = expected_attention(q, k, self.model_config) * v[:, 4:].norm(dim=-1)
        return F.pad(scores, (4, 0), value=math.inf)

"""Channels: not only fewer tokens, but less of each key."""

import torch

from benchmarks.methods.base import PerLayer
from benchmarks.methods.evict_prompt import SnapKV


class ThinK(SnapKV):
    """SnapKV that also drops channels of keys. 2407.21018.

    Unit: a channel of a KV head, for all kept tokens but the latest. Score: the mean square of the
    last 32 queries times that of the prompt's keys. Budget: 60 % of the channels, so that a kept
    token takes about 80 % of the bytes, and more tokens fit. Rest: a dropped channel counts as 0.
    Written keys are whole.
    """

    name, label = "think", "ThinK"
    keep = 0.6
    dropped: PerLayer  # (H_kv, D) bool

    def prepare(self):
        dim = self.model_config.head_dim
        self.n_kept = round(self.keep * dim)
        self.kept_size = (1 + self.n_kept / dim) / 2

    def importance(self, layer, q, k, v):
        queries = q[:, -self.window :].unflatten(0, (len(k), -1))
        scores = queries.square().mean(dim=(1, 2)) * k.square().mean(dim=1)  # (H_kv, D)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        dropped = order[:, self.n_kept :]
        self.dropped[layer] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, dropped, True)
        return super().importance(layer, q, k, v)

    def shrink(self, layer, kv):
        keys, values = kv.unbind(dim=2)
        return torch.stack((keys.masked_fill(self.dropped[layer][:, None], 0), values), dim=2)

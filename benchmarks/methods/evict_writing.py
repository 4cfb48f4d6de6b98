"""Evict while writing: every new token may push out another, by what its query attends to."""

import math

import torch
import torch.nn.functional as F

from benchmarks.methods.base import (MethodCache, PerLayer, append, attention_received, best,
                                     group_logits, latest_attention, take, token_attention)


class Writing(MethodCache):
    """What is kept is cut to the budget again for every token that is written."""

    reads_on = False
    kept: PerLayer  # (H_kv, n, 2, D)


class H2O(Writing):
    """Heavy hitters and the latest. 2306.14048.

    Unit: token. Score: attention received from all queries so far. Budget: the same in all heads,
    half of it for the latest tokens. Rest: dropped, one for every new token.
    """

    name, label = "h2o", "H2O"
    received: PerLayer  # (H_kv, n) by each of the kept, the latest last

    def prepare(self):
        self.latest = self.budget // 2

    def prefill(self, layer, q, k, v):
        received, n_earlier = attention_received(q, k), max(k.shape[1] - self.latest, 0)
        heavy = best(received[:, :n_earlier], self.budget - self.latest)
        latest = torch.arange(n_earlier, k.shape[1]).expand(len(k), -1)
        kept = torch.cat((heavy, latest), dim=1)
        self.kept[layer] = take(torch.stack((k, v), dim=2), kept)
        self.received[layer] = received.gather(-1, kept)
        return k, v

    def attend_to(self, layer, q, k, v):
        kv, received = self.make_room(self.kept[layer], self.received[layer])
        self.kept[layer] = append(kv, k, v)
        keys, values = self.kept[layer].unbind(dim=2)
        self.received[layer] = F.pad(received, (0, 1)) + token_attention(q, keys)
        return keys, values, None

    def bookkeeping(self):
        return self.received

    def make_room(self, kv, received):
        """Forget each head's least attended token that is not among the latest."""
        n_tokens = kv.shape[1]
        if n_tokens < self.budget:
            return kv, received
        victim = received[:, : n_tokens + 1 - self.latest].argmin(dim=-1, keepdim=True)
        left = torch.arange(n_tokens - 1)
        left = left + (left >= victim)  # (H_kv, n - 1)
        return take(kv, left), take(received, left)


class MorphKV(Writing):
    """What the last few tokens attend to, asked anew at every step. 2503.00979 (`sum_fused`).

    Unit: token. Score: logits of the 32 queries before the new token's, summed over a group; their
    softmax over the older tokens, summed over the queries. Budget: the same in all heads, 32 of it
    for the latest besides the new one. Rest: dropped, one for every new token; after prefill the
    prompt is cut to the budget.
    """

    name, label = "morphkv", "MorphKV"
    latest = 32
    queries: PerLayer  # (H, latest, D)

    def prefill(self, layer, q, k, v):
        self.queries[layer] = q[:, -self.latest :]
        self.kept[layer] = self.fit(layer, torch.stack((k, v), dim=2))
        return k, v

    def attend_to(self, layer, q, k, v):
        self.kept[layer] = append(self.fit(layer, self.kept[layer]), k, v)
        self.queries[layer] = torch.cat((self.queries[layer], q), dim=1)[:, -self.latest :]
        return *self.kept[layer].unbind(dim=2), None

    def fit(self, layer, kv):
        """The best of kv, with the latest, in order: one place of the budget is left."""
        n_tokens, size = kv.shape[1], self.budget - 1
        n_latest = min(self.latest, size, n_tokens)
        logits = group_logits(self.queries[layer], kv[:, : n_tokens - n_latest, 0]).sum(dim=1)
        scores = logits.softmax(dim=-1).sum(dim=1)  # (H_kv, n)
        older = best(scores, size - n_latest).sort(dim=-1).values
        latest = torch.arange(n_tokens - n_latest, n_tokens).expand(len(kv), -1)
        return take(kv, torch.cat((older, latest), dim=1))

    def index(self):
        """The queries that are kept to ask with."""
        return self.queries


class CORM(Writing):
    """Tokens that none of the last 256 queries found important. 2404.15949.

    Unit: token of a head. Score: whether attention at step t was at least 1/t in one of the last
    256 queries. Budget: none; the latest 256 stay, and what is held follows. Rest: dropped, after
    it was attended to. Not in the abstract, chosen here: the prompt is cut once, by its last 256
    queries; a token stays if one head of the group needs it; t counts the dropped as well.
    """

    name, label = "corm", "CORM"
    budgeted = False
    latest = 256
    needed: PerLayer  # (H_kv, n) the last t that needed each of the kept; -1: dropped, and zero

    def prefill(self, layer, q, k, v):
        attention = latest_attention(q, k, self.latest)  # (H_kv, G, W, T)
        t = torch.arange(k.shape[1])[-attention.shape[2] :, None]  # of each query, from 0
        important = (attention >= 1 / (t + 1)).any(dim=1)  # (H_kv, W, T)
        needed = torch.where(important, t, -1).amax(dim=1)  # (H_kv, T)
        needed[:, -len(t) :] = needed[:, -len(t) :].maximum(t.T)  # the latest stay
        self.forget(layer, torch.stack((k, v), dim=2), needed)
        return k, v

    def bookkeeping(self):
        return self.needed

    def forget(self, layer, kv, needed):
        """Make the dropped zero, and cut off those that no head holds."""
        held = (needed >= 0).any(dim=0)
        kv, self.needed[layer] = kv[:, held], needed[:, held]
        self.kept[layer] = kv.masked_fill((self.needed[layer] < 0)[..., None, None], 0)

    def attend_to(self, layer, q, k, v):
        t = self.num_tokens  # of this token, from 0
        kv = append(self.kept[layer], k, v)
        needed = F.pad(self.needed[layer], (0, 1), value=t)
        seen = (needed >= 0)[:, None]
        attention = group_logits(q, kv[:, :, 0]).masked_fill(~seen[:, None], -math.inf).softmax(-1)
        important = (attention >= 1 / (t + 1)).any(dim=1).squeeze(1)  # (H_kv, n)
        needed = needed.masked_fill(important, t)
        # The latest count as needed when they were written: one rule for both.
        self.forget(layer, kv, needed.masked_fill(needed <= t - self.latest, -1))
        return *kv.unbind(dim=2), seen


class CascadingKV(Writing):
    """Buffers that each take every second token that falls out of the one before. 2406.17808.

    Unit: token. Score: mean attention so far. Budget: the same in all heads, in sinks and N equal
    buffers; once all are full, the i-th takes a token in every 2^i-th step. In other steps the
    token replaces the newest one there if it scores no lower, and is dropped if it does not. Rest:
    falls out of the last buffer. Departures: 4 sinks, not 64; keys keep their positions; scores of
    the prompt's tokens are means over the whole prompt; the score is the mean of the group's heads.
    """

    name, label = "cascading", "Cascading KV"
    sinks, buffers = 4, 4
    scores: PerLayer  # (H_kv, n) attention received, and
    counts: PerLayer  # (H_kv, n) from how many queries
    order: PerLayer  # for every buffer (H_kv, m) of n, the oldest first

    def prepare(self):
        self.size = (self.budget - self.sinks) // self.buffers

    def prefill(self, layer, q, k, v):
        self.kept[layer] = torch.stack((k, v), dim=2)
        self.scores[layer] = attention_received(q, k)
        self.counts[layer] = torch.arange(k.shape[1], 0, -1.0).expand(len(k), -1)
        return k, v

    def advance(self, n_tokens):
        if self.num_tokens == 0:  # the prompt's tokens come one by one, for all layers at once
            means = torch.cat(self.scores) / torch.cat(self.counts)  # (L * H_kv, T)
            buffers = [torch.empty(len(means), 0, dtype=torch.long)] * self.buffers
            for position in range(self.sinks, n_tokens):
                token = torch.full((len(means), 1), position)
                buffers = self.push(buffers, token, means, position)
            parts = [buffer.split(self.n_kv_heads) for buffer in buffers]
            for layer, order in enumerate(zip(*parts)):
                self.compact(layer, order)
        super().advance(n_tokens)

    def push(self, buffers, token, means, position: int) -> list:
        """Put `token` (n, 1) into the first of buffers (n, m), what falls out into the next."""
        buffers, filling = list(buffers), buffers[-1].shape[1] < self.size
        for i, buffer in enumerate(buffers):
            if buffer.shape[1] < self.size:
                buffers[i] = torch.cat((buffer, token), dim=1)
                break
            if (position - self.sinks) % 2**i and not filling:
                newest = buffer[:, -1:]
                better = means.gather(1, token) >= means.gather(1, newest)
                buffers[i] = torch.cat((buffer[:, :-1], token.where(better, newest)), dim=1)
                break
            buffers[i], token = torch.cat((buffer[:, 1:], token), dim=1), buffer[:, :1]
        return buffers

    def bookkeeping(self):
        return [*self.scores, *self.counts]

    def compact(self, layer, order):
        """Keep the sinks and what is in the buffers, and forget the others."""
        n_sinks = min(self.sinks, self.kept[layer].shape[1])
        sinks = torch.arange(n_sinks).expand(self.n_kv_heads, -1)
        left = torch.cat((sinks, *order), dim=1)
        for held in (self.kept, self.scores, self.counts):
            held[layer] = take(held[layer], left)
        places = torch.arange(n_sinks, left.shape[1]).expand(len(left), -1)
        self.order[layer] = places.split([buffer.shape[1] for buffer in order], dim=1)

    def attend_to(self, layer, q, k, v):
        self.kept[layer] = append(self.kept[layer], k, v)
        self.scores[layer] = F.pad(self.scores[layer], (0, 1))
        self.counts[layer] = F.pad(self.counts[layer], (0, 1), value=1e-9)  # it had no query yet
        new = torch.full((len(k), 1), self.kept[layer].shape[1] - 1)
        means = self.scores[layer] / self.counts[layer]
        self.compact(layer, self.push(self.order[layer], new, means, self.num_tokens))
        keys, values = self.kept[layer].unbind(dim=2)
        self.scores[layer] = self.scores[layer] + token_attention(q, keys)
        self.counts[layer] = self.counts[layer] + 1
        return keys, values, None

"""Budgets: how many tokens each layer and each head keeps, at the same mean."""

import torch
import torch.nn.functional as F

from benchmarks.methods.base import (WHOLE, Evicting, PerLayer, attention_received, best,
                                     group_logits, latest_attention)
from benchmarks.methods.evict_prompt import SnapKV, StreamingLLM
from model import apply_rope, rope_table


def best_by_row(scores, n):
    """How many of the n highest of all scores (R, m) are in each row (R,)."""
    order = scores.flatten().argsort(descending=True, stable=True)[:n]
    return (order // max(scores.shape[1], 1)).bincount(minlength=len(scores))


class PyramidKV(SnapKV):
    """SnapKV with fewer tokens from layer to layer. 2406.02069.

    Unit and score: as in SnapKV. Budget: falls in a straight line to a twentieth of the mean (β =
    20 of the paper). Rest: dropped.
    """

    name, label = "pyramidkv", "PyramidKV"

    def layer_budget(self, layer):
        room = self.budget - self.window
        last = room // 20
        step = (2 * room - 2 * last) / max(self.n_layers - 1, 1)
        return self.window + round(2 * room - last - step * layer)


class AdaKV(SnapKV):
    """SnapKV whose heads share a layer's budget. 2407.11550.

    Unit and score: as in SnapKV. Budget: all tokens of a layer's heads are ranked together, and a
    head gets as many as are among the best; this counts 80 %, the even budget 20 % (α), rounded
    down. Rest: dropped.
    """

    name, label = "adakv", "Ada-KV"
    reads_on = False
    evenly = 0.2

    def budgets(self, scores):
        rooms = []
        for score, even in zip(scores, super().budgets(scores)):
            places = best_by_row(score, int(even.sum()))
            rooms.append(((1 - self.evenly) * places + self.evenly * even).long())
        return self.spread(rooms)


class PrefixKV(Evicting):
    """Each layer keeps the tokens with the same share of its attention. 2412.03409.

    Unit: token of all heads. Score: attention received from all queries, the mean of the heads.
    Budget: of a layer, as many of its best tokens as have the share p of the attention, the first 4
    always; p is chosen to meet the budget. Rest: dropped. The paper finds the layers' budgets once,
    on other texts; here each prompt has its own (its profile mode).
    """

    name, label = "prefixkv", "PrefixKV"

    def importance(self, layer, q, k, v):
        scores = attention_received(q, k).mean(dim=0)
        shares = scores / scores.sum()
        shares[:4] += 2  # they are best; `budgets` takes it away again
        return shares.expand(len(k), -1)

    def budgets(self, scores):
        """A token is kept if the better tokens of its layer have a share below p. So all tokens are
        sorted by that share."""
        total = sum(int(rooms[0]) for rooms in super().budgets(scores))
        shares = torch.stack([score[0] for score in scores]).sort(descending=True).values  # (L, n)
        shares = shares.where(shares < 2, shares - 2)
        better = shares.cumsum(dim=1) - shares
        better[:, :4] = -1
        return self.spread([n.expand(self.n_kv_heads) for n in best_by_row(-better, total)])


class DBudgetKV(SnapKV):
    """The fewest tokens that keep 99 % of the last query's attention. 2502.16886.

    Unit: token. Score: attention from the last 32 queries, without pooling. Budget: none; a layer
    keeps the fewest tokens whose attention from the last query, as a vector, has at least 99 % of
    the length of all of it, the mean of the heads; the first two layers stay whole, and grow. Rest:
    dropped; while writing, other layers do not grow.
    """

    name, label = "dbudgetkv", "DBudgetKV"
    budgeted = False
    pool, dense_layers, tolerance = 1, 2, 0.01
    rows: PerLayer  # (H, T) the last query's attention

    def importance(self, layer, q, k, v):
        self.rows[layer] = latest_attention(q, k, 1).flatten(0, 2)
        return super().importance(layer, q, k, v)

    def budgets(self, scores):
        rows, self.rows = self.rows, []
        fewest = [self.fewest(score, row) for score, row in zip(scores, rows)]
        fewest[: self.dense_layers] = [WHOLE] * min(self.dense_layers, len(fewest))
        return [torch.full((self.n_kv_heads,), n) for n in fewest]

    def fewest(self, score, row) -> int:
        """Tokens besides the window, for a layer's score (H_kv, n) and row (H, T)."""
        order = best(score, score.shape[1]).repeat_interleave(len(row) // len(score), dim=0)
        window = row[:, score.shape[1] :].square().sum(dim=-1, keepdim=True)
        squares = torch.cat((window, row.gather(-1, order).square()), dim=-1).cumsum(dim=-1)
        enough = squares.sqrt().mean(dim=0) >= (1 - self.tolerance) * row.norm(dim=-1).mean()
        return int(enough.int().argmax()) if enough.any() else score.shape[1]


class KVCompress(Evicting):
    """Blocks of one head's tokens, the cheapest of all layers first. 2410.00161.

    Unit: 16 tokens of a head that have neighbouring scores. Score: the sum of squared attention
    from the last 32 queries, over a group, the largest of 7 neighbours; a block costs its largest.
    Budget: over all layers and heads. Rest: dropped, block by block; while writing token by token,
    and nothing is ranked again (the paper's continual mode). Departure: a head's tokens are cut
    into blocks from the best one down, where the code cuts from the worst one up.
    """

    name, label = "kvcompress", "KV-Compress"
    reads_on = False
    block = 16

    def importance(self, layer, q, k, v):
        received = latest_attention(q, k, self.window).square().sum(dim=(1, 2))  # (H_kv, T)
        earlier = received[:, : max(k.shape[1] - self.window, 0)]
        return F.max_pool1d(earlier, 7, stride=1, padding=3) if earlier.numel() else earlier

    def budgets(self, scores):
        n_blocks = sum(int(rooms.sum()) for rooms in super().budgets(scores)) // self.block
        costs = torch.stack([score.sort(dim=-1, descending=True).values[:, :: self.block]
                             for score in scores])  # (L, H_kv, blocks)
        kept = self.block * best_by_row(costs.flatten(0, 1), n_blocks)
        return self.spread(list(kept.view(costs.shape[:2])))


class DuoHeads(StreamingLLM):
    """A few heads keep everything, the others the first and latest tokens. After 2410.10819.

    Unit: a KV head of a layer. Score: how far back the mean query looks at mean keys, both before
    RoPE; the paper trains a gate for each head instead, which is DuoAttention. Budget: as many
    heads as fit keep the whole prompt, the others 4 sinks and the latest 32 tokens; what is left is
    shared out to all. Rest: dropped, while writing the oldest that is no sink.
    """

    name, label = "duo_heads", "DuoAttention's split, untrained"
    reads_on = False
    positions = 500
    looks: PerLayer  # (H_kv,) how far back each head looks

    def importance(self, layer, q, k, v):
        self.looks[layer] = self.look_back(q, k)
        return super().importance(layer, q, k, v)

    def look_back(self, q, k):
        """From 0, all attention on the latest token, to 1, all on the first. (H_kv,)"""
        n_tokens, n = k.shape[1], self.positions
        cos, sin = rope_table(self.model_config, torch.arange(max(n_tokens, n)), q.dtype)
        mean_q, mean_k = (apply_rope(x, cos[:n_tokens], -sin[:n_tokens]).mean(dim=1, keepdim=True)
                          for x in (q, k))
        query = apply_rope(mean_q, cos[n - 1 : n], sin[n - 1 : n])  # at the last of n positions
        keys = apply_rope(mean_k.expand(-1, n, -1), cos[:n], sin[:n])
        return group_logits(query, keys).softmax(dim=-1).cumsum(dim=-1).mean(dim=(1, 2, 3))

    def budgets(self, scores):
        n_tokens, looks = scores[0].shape[1], torch.cat(self.looks)  # (L * H_kv,)
        self.looks = []
        spare = (self.budget - self.window - self.sinks) * len(looks)
        n_whole = max(spare, 0) // max(n_tokens - self.sinks, 1)
        rooms = torch.full_like(looks, self.sinks, dtype=torch.long)
        rooms[looks.argsort(descending=True, stable=True)[:n_whole]] = n_tokens
        return self.spread(list(rooms.view(self.n_layers, -1)))

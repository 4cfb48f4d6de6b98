"""A cache of slow heads, for a model that reads one text or several: what `cache.SentenceKVCache`
must compute.

It has what a model and a session need of a cache (see `model.FullCache`): `expect` before each
text, `prefill` or `decode` of each layer and `advance` after all layers, and `seal` when a written
sentence has ended.
"""

from collections import Counter
from functools import partial

import torch
from oracle import SlowHead
from torch.nn.utils.rnn import pad_sequence


class RoundedHead(SlowHead):
    """A head that remembers in 8 bits. Each channel is moved and scaled, so that in the first text
    it has mean 0 and deviation 1. Then a key, a value and a sentence's mean key are whole steps,
    127 of them up to the largest channel. A text that is being read is not rounded yet."""

    def prefill(self, q, k, v):
        super().prefill(q, k, v)
        kv = torch.stack((k, v), dim=1)  # (T, 2, D)
        self.mean, self.deviation = kv.mean(0), (kv - kv.mean(0)).square().mean(0).sqrt() + 0.001
        self.kv = {i: self.rounded(row, self.mean, self.deviation) for i, row in self.kv.items()}

    def append(self, k, v):
        kv = self.rounded(torch.stack((k, v)), self.mean, self.deviation)
        super().append(*kv)

    def keys_of(self, span) -> torch.Tensor:
        """All keys of a sentence are moved by the same, so that their mean is rounded. Their
        variance stays."""
        keys = super().keys_of(span)
        return keys + self.rounded(keys.mean(0), self.mean[0], self.deviation[0]) - keys.mean(0)

    def rounded(self, x, mean, deviation) -> torch.Tensor:
        """Each of the vectors x (..., D)."""
        x = (x - mean) / deviation
        step = (x.abs().amax(-1, keepdim=True) / 127).bfloat16().to(x)
        return mean + deviation * step * (x / step.clamp(min=1e-30)).round()


class SlowLayer:
    """The KV heads of one layer. `prefill` and `decode` get q (H, T, D), k and v (H_kv, T, D)."""

    def __init__(self, config, n_kv_heads: int, spans: list):
        kind = RoundedHead if config.kv_bits == 8 else SlowHead
        self.heads = [kind(config, spans) for _ in range(n_kv_heads)]

    def prefill(self, q, k, v) -> tuple:
        """Read a whole text. Returns keys and values (H_kv, n, D): those kept of earlier texts, and
        those of this one. A text after the first is kept whole."""
        if self.heads[0].n_tokens == 0:
            for head, *qkv in zip(self.heads, q.unflatten(0, (len(k), -1)), k, v):
                head.prefill(*qkv)
            return k, v
        earlier = torch.stack([torch.stack([*head.kv.values()]) for head in self.heads])
        for head, keys, values in zip(self.heads, k, v):
            for key, value in zip(keys, values):
                head.append(key, value)
        kv = torch.cat((earlier, torch.stack((k, v), dim=2)), dim=1)  # (H_kv, n, 2, D)
        return kv.unbind(dim=2)

    def keep(self):
        """Nothing to do: `prefill` reads whole texts."""

    def decode(self, q, k, v) -> tuple:
        """Take one token, T = 1. Returns keys and values (H_kv, n, D), and a mask (H_kv, 1, n):
        False at the end of a head that attends to fewer than n tokens."""
        grouped = q[:, 0].unflatten(0, (len(k), -1))  # (H_kv, G, D)
        kv = [head.decode(*qkv) for head, *qkv in zip(self.heads, grouped, k[:, 0], v[:, 0])]
        mask = [torch.ones(len(x), dtype=torch.bool, device=x.device) for x in kv]
        keys, values = pad_sequence(kv, batch_first=True).unbind(dim=2)
        return keys, values, pad_sequence(mask, batch_first=True).unsqueeze(1)


def order_of(anchors: list, head: SlowHead) -> list:
    """The sentences of which a head keeps a token, by the sum of their scores in the heads of
    another layer."""
    totals = Counter()
    for anchor in anchors:
        totals.update(anchor.scores())
    return sorted(filter(head.tokens_of, head.spans), key=lambda span: -totals[span])


class SlowSentenceKV:
    """The cache of all layers. Of `reuse_layers` layers, the first ranks the sentences for all."""

    def __init__(self, config, model_config):
        self.num_tokens, self.spans = 0, []
        n_layers, n_kv_heads, _ = model_config.kv_shape
        self.layers = [SlowLayer(config, n_kv_heads, self.spans) for _ in range(n_layers)]
        for i, layer in enumerate(self.layers):
            anchor = self.layers[i - i % config.reuse_layers]
            if anchor is not layer:
                for head in layer.heads:
                    head.best_sentences = partial(order_of, anchor.heads, head)

    @property
    def heads(self) -> dict:
        """(layer, KV head) -> SlowHead."""
        return {(i, j): head for i, layer in enumerate(self.layers)
                for j, head in enumerate(layer.heads)}

    def expect(self, spans):
        """The next text has these sentences, (start, end) in its tokens. A sentence that is being
        written ends here."""
        n_written = self.num_tokens - (self.spans[-1][1] if self.spans else 0)
        if n_written > 0:
            self.seal(n_written)
        # `+=` changes the list itself, which all heads share.
        self.spans += [(self.num_tokens + start, self.num_tokens + end) for start, end in spans]

    def advance(self, n_tokens: int):
        self.num_tokens += n_tokens

    def seal(self, length: int):
        """The next `length` written tokens are a sentence."""
        start = self.spans[-1][1]
        self.spans.append((start, start + length))
        for head in self.heads.values():
            head.queries.clear()

"""SentenceKV as a slow reference: lists and loops, all keys and values in one place. Read it first,
with `sentencekv.SentenceKVConfig` beside it.

A *sentence* is a span (start, end) of token positions. A Llama computes, in each layer, queries q
(H, T, D), keys k and values v (H_kv, T, D) of T tokens; H // H_kv query heads share a KV head. The
methods that the model calls (documented in `model.FullCache`): `prefill` gets the whole prompt,
`decode` one token, `advance` counts tokens, and `seal` ends the sentence being written. A test that
runs a model with this class shows what `cache.SentenceKVCache` must compute.
"""

import math
from contextlib import nullcontext

import torch


class SlowSentenceKV:
    stage = nullcontext  # stage(name) times a stage: not here

    def __init__(self, config, model_config, spans):
        self.config, self.spans = config, list(spans)
        self.n_prompt, self.layers = spans[-1][1], range(model_config.num_hidden_layers)
        self.kv = [[] for _ in range(model_config.num_hidden_layers)]  # [layer][position] -> (k, v)
        self.kept = {}  # (layer, KV head) -> positions kept of the prompt
        self.secondary = {}  # (layer, KV head) -> positions of secondary sinks
        self.queries = [[] for _ in self.kv]  # [layer], of the sentence being written
        self.num_tokens = 0
        self.selected = []  # positions selected, for every token, layer and head

    def expect(self, spans):
        """The next text to read has these sentences."""
        start = self.spans[-1][1]
        if self.num_tokens > start:
            self.seal(self.num_tokens - start)
        self.spans += [(self.num_tokens + a, self.num_tokens + b) for a, b in spans]
        self.queries = [[] for _ in self.kv]

    def prefill(self, layer, q, k, v):
        """A whole text. Its tokens attend to all that is kept and, causally, to themselves."""
        n_tokens = k.shape[1]
        self.kv[layer] += [(k[:, i], v[:, i]) for i in range(n_tokens)]
        if self.num_tokens > 0:
            return self.known(layer, 0, len(k)), self.known(layer, 1, len(k))
        for head in range(len(k)):
            self.secondary[layer, head] = secondary = self.shortest(k[head])
            self.kept[layer, head] = self.keep(q, k, head, n_tokens, secondary)
        return k, v

    def known(self, layer, part, n_heads):
        """Keys (part 0) or values (1) of all tokens but those that prefill dropped."""
        heads = []
        for head in range(n_heads):
            heads.append(torch.stack([
                kv[part][head] for i, kv in enumerate(self.kv[layer])
                if i >= self.n_prompt or i in self.kept[layer, head]]))
        return torch.stack(heads)

    def shortest(self, keys):
        """The positions of a head's shortest keys, if they are much shorter than most."""
        norms, config = [key.norm().item() for key in keys], self.config
        median = sorted(norms)[(len(norms) - 1) // 2]
        earlier = range(config.sink_tokens, len(norms) - config.protected_tokens)
        short = sorted((norms[i], i) for i in earlier if norms[i] < config.secondary_ratio * median)
        return {i for _, i in short[: config.secondary_sinks]}

    def keep(self, q, k, head, n_tokens, secondary):
        """⌊r · τ⌋ positions: all sinks, the last tokens, and then those that the last queries of
        the prompt attend to most."""
        config = self.config
        n_kept = min(n_tokens, config.keep_factor * config.token_budget)
        if n_kept == n_tokens:
            return set(range(n_tokens))
        received = torch.zeros(n_tokens)
        group = len(q) // len(k)
        window = config.observation_window
        for i in range(n_tokens - window, n_tokens):
            for query_head in range(head * group, (head + 1) * group):
                logits = k[head, : i + 1] @ q[query_head, i] / math.sqrt(q.shape[-1])
                received[: i + 1] += logits.softmax(0).cpu() / group
        earlier = received[: n_tokens - window]
        pooled = [max(earlier[max(0, i - 3) : i + 4]) for i in range(len(earlier))]
        last = max(window, config.recent_window)
        kept = set(range(config.sink_tokens)) | set(range(n_tokens - last, n_tokens)) | secondary
        for i in sorted(range(len(pooled)), key=lambda i: -pooled[i]):
            if len(kept) < int(n_kept):
                kept.add(i)
        return kept

    def advance(self, n_tokens):
        self.num_tokens += n_tokens

    def seal(self, length):
        start = self.spans[-1][1]
        self.spans.append((start, start + length))
        self.queries = [[] for _ in self.kv]

    def tokens_of(self, span, layer, head):
        """Kept positions of a sentence. What the model writes itself is kept whole. A secondary
        sink is in no sentence: it is attended to anyway."""
        kept = self.kept[layer, head] - self.secondary[layer, head]
        return [i for i in range(*span) if i >= self.n_prompt or i in kept]

    def decode(self, layer, q, k, v):
        """Keys and values of the positions that each head attends to, and a mask."""
        self.kv[layer].append((k[:, 0], v[:, 0]))
        self.queries[layer].append(q[:, 0])
        attended = [self.attended(layer, head, len(q) // len(k)) for head in range(len(k))]
        longest = max(map(len, attended))
        keys, values = k.new_zeros(2, len(k), longest, k.shape[-1])
        mask = torch.zeros(len(k), 1, longest, dtype=torch.bool, device=k.device)
        for head, positions in enumerate(attended):
            for j, i in enumerate(positions):
                keys[head, j], values[head, j] = (x[head] for x in self.kv[layer][i])
                mask[head, 0, j] = True
        return keys, values, mask

    def attended(self, layer, head, group):
        """Positions: all sinks, the best sentences within the budget, the recent window."""
        config, n = self.config, self.num_tokens + 1
        sinks = list(range(min(config.sink_tokens, self.n_prompt)))
        secondary = sorted(self.secondary[layer, head])
        room = config.token_budget - config.sink_tokens
        # The recent window, or the whole open sentence if longer, or its end if it is too long.
        start = min(n - config.recent_window, self.spans[-1][1])
        start = max(start, n - room + config.secondary_sinks, len(sinks))
        recent = list(range(start, n))
        selected = [i for span in self.ranking(layer, head, group)
                    for i in self.tokens_of(span, layer, head) if len(sinks) <= i < start]
        selected = selected[: room - len(recent) - len(secondary)]
        self.selected.append(selected)
        assert len(sinks + secondary + selected + recent) <= config.token_budget
        return sinks + secondary + selected + recent

    def ranking(self, layer, head, group):
        """The sentences of which this head keeps a token that is no secondary sink, best first."""
        ours = slice(head * group, (head + 1) * group)
        queries = torch.stack(self.queries[layer])[:, ours]  # (n, G, D)
        spans = [s for s in self.spans if self.tokens_of(s, layer, head)]
        keys = [torch.stack([self.kv[layer][i][0][head] for i in self.tokens_of(s, layer, head)])
                for s in spans]
        vectors = torch.stack([k.mean(0) for k in keys])
        weights = torch.tensor([self.config.query_decay**i for i in reversed(range(len(queries)))])
        weights = weights.to(queries.device)  # an older query counts less
        if self.config.score == "mean_query":
            scores = vectors @ (weights @ queries.mean(dim=1))
        else:
            scores = weights @ self.attention_of(queries, vectors, keys)
        return [spans[i] for i in scores.argsort(descending=True, stable=True).tolist()]

    def attention_of(self, queries, vectors, keys):
        """The scores `sentencekv.gaussian` and `benchmarks.scores.votes`."""
        lengths = torch.tensor([float(len(k)) for k in keys], device=vectors.device)
        logits = queries @ vectors.T / math.sqrt(vectors.shape[-1])  # (n, G, S)
        if self.config.score == "gaussian":
            variances = torch.stack([k.var(0, correction=0).mean() for k in keys])
            logits += queries.square().sum(-1, keepdim=True) * variances / (2 * vectors.shape[-1])
        attention = (logits + lengths.log()).softmax(-1)
        if self.config.score == "gaussian":
            attention /= lengths
        return attention.sum(dim=1)  # (n, S)

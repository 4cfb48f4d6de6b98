"""SentenceKV (arXiv 2504.00970v2) as a slow reference, in lists and loops. Read it first, with
`sentencekv.SentenceKVConfig` beside it.

    SlowHead  the method, for one KV head: prefill, then decode
    SCORES    how well sentences match a query

A *sentence* is a span (start, end) of token positions. Shapes: T tokens of a text, D channels, G
query heads that share a KV head, S sentences. `tests/slow_cache.py` makes a cache of these heads
for a whole model: tests compare `cache.SentenceKVCache` with it.
"""

import math

import torch


class SlowHead:
    """SentenceKV for one KV head and the query heads that share it. `prefill` reads the prompt.
    Then `decode` takes one token at a time. `spans` are the sentences that have ended, the same
    list for all heads. When one more has ended, the caller adds it there and clears `queries`.
    This can be some tokens late: an end is not always seen at once."""

    def __init__(self, config, spans: list):
        self.config, self.spans, self.n_tokens = config, spans, 0
        self.kv = {}  # position -> key and value (2, D), of all kept tokens
        self.first_sinks = []  # positions of the first tokens, always attended to
        self.secondary = []  # positions of the secondary sinks, always attended to
        self.queries = []  # (G, D) of each token of the sentence being written
        self.selected = []  # for each decoded token, the positions that it selected

    # Section 4.1: which tokens of the prompt are kept?
    def prefill(self, q, k, v):
        """Read the prompt: q (G, T, D), k and v (T, D)."""
        self.n_tokens = len(k)
        self.first_sinks = list(range(min(self.config.sink_tokens, len(k))))
        self.secondary = self.shortest_keys(k)
        self.kv = {i: torch.stack((k[i], v[i])) for i in self.most_important(q, k)}

    def shortest_keys(self, k) -> list:
        """The positions of the secondary sinks: the shortest keys, if these are much shorter than
        the median. Much attention goes to them, whatever is asked: see `find_secondary_sinks`."""
        config, norms = self.config, [key.float().norm().item() for key in k]
        median = sorted(norms)[(len(norms) - 1) // 2]  # as `torch.median`
        others = range(config.sink_tokens, len(k) - config.protected_tokens)
        short = sorted((norms[i], i) for i in others if norms[i] < config.secondary_ratio * median)
        return sorted(i for _, i in short[: config.secondary_sinks])

    def most_important(self, q, k) -> list:
        """The ⌊r · τ⌋ positions to keep: all sinks, the last tokens, and then those that receive
        the most attention from the last queries of the prompt."""
        n_tokens, n_kept = len(k), self.config.n_kept(len(k))
        if n_kept == n_tokens:
            return list(range(n_tokens))
        observed, received = self.config.observation_window, torch.zeros(n_tokens)  # (T,)
        for i in range(n_tokens - observed, n_tokens):
            for query in q[:, i]:
                logits = k[: i + 1] @ query / math.sqrt(len(query))
                received[: i + 1] += logits.softmax(0).cpu() / len(q)
        earlier = received[: n_tokens - observed]
        # A neighbour of an important token is important, too: the greatest of 7 tokens counts.
        pooled = [max(earlier[max(0, i - 3) : i + 4]) for i in range(len(earlier))]
        last = range(n_tokens - self.config.protected_tokens, n_tokens)
        kept = {*self.first_sinks, *self.secondary, *last}
        for i in sorted(range(len(pooled)), key=lambda i: -pooled[i]):
            if len(kept) < n_kept:
                kept.add(i)
        return sorted(kept)

    # Section 4.2: which tokens does the next one attend to?
    def decode(self, q, k, v) -> torch.Tensor:
        """Take one token: q (G, D), k and v (D). Returns the keys and values (n, 2, D) that it
        attends to."""
        self.append(k, v)
        self.queries.append(q)
        return torch.stack([self.kv[i] for i in self.attended()])

    def attended(self) -> list:
        """The positions of all sinks, of the best sentences within the budget, of the window."""
        all_sinks, window = self.first_sinks + self.secondary, self.window()
        room = self.config.token_budget - len(all_sinks) - len(window)
        selected = [i for i in self.ranked() if i not in all_sinks and i not in window][:room]
        self.selected.append(selected)
        attended = all_sinks + selected + window
        assert len(attended) == len(set(attended)) <= self.config.token_budget
        return attended

    def ranked(self) -> list:
        """The kept positions of all sentences, those of the best one first."""
        return [i for span in self.best_sentences() for i in self.tokens_of(span)]

    def append(self, k, v):
        """Add a token that is written, or of a later text: it is never dropped."""
        self.kv[self.n_tokens] = torch.stack((k, v))
        self.n_tokens += 1

    def window(self) -> list:
        """The last positions: the recent window, or the open sentence, which is being written, if
        that is longer. If it does not fit the budget, its last tokens. All heads share one window.
        So it leaves room for the largest number of sinks that a head can have."""
        config = self.config
        n_written = self.n_tokens - self.spans[-1][1]
        most = config.token_budget - config.sink_tokens - config.secondary_sinks
        length = min(max(config.recent_window, n_written), most)
        return list(range(max(self.n_tokens - length, len(self.first_sinks)), self.n_tokens))

    def best_sentences(self) -> list:
        """The sentences of which a token is kept, those with the highest scores first."""
        scores = self.scores()
        return sorted(scores, key=scores.get, reverse=True)

    def scores(self) -> dict:
        """How well each of these sentences matches the one that is being written."""
        spans = [span for span in self.spans if self.tokens_of(span)]
        keys = [self.keys_of(span) for span in spans]
        scores = SCORES[self.config.score](torch.stack(self.queries), keys)  # (n, S)
        ages = reversed(range(len(self.queries)))  # an older query counts less
        weights = torch.tensor([self.config.query_decay**age for age in ages])  # (n,)
        return dict(zip(spans, (weights.to(scores) @ scores).tolist()))

    def keys_of(self, span) -> torch.Tensor:
        """The kept keys of a sentence (m, D)."""
        return torch.stack([self.kv[i][0] for i in self.tokens_of(span)])

    def tokens_of(self, span) -> list:
        """The kept positions of a sentence. A secondary sink is in no sentence."""
        return [i for i in range(*span) if i in self.kv and i not in self.secondary]


# A score: from the queries (n, G, D) of n tokens, and a list of the keys (m, D) of each of S
# sentences, how well each sentence matches each token (n, S). `sentencekv.py` computes the same
# from a vector for each sentence.
def mean_query(q, keys: list) -> torch.Tensor:
    """The paper's score: the mean query of the heads, times the mean key of the sentence."""
    return q.mean(1) @ torch.stack([k.mean(0) for k in keys]).T


def gaussian(q, keys: list) -> torch.Tensor:
    """The attention that a token of each sentence receives on average, among all these sentences,
    if the keys of a sentence are Gaussian with the same variance in all channels.

    The attention to a key is proportional to exp x, x = q · k / √D. A normal x has E[exp x] =
    exp(mean + variance / 2): its mean is q · µ / √D, its variance |q|² σ² / D. The m keys of a
    sentence receive m times this, so log m is added. One of them receives 1 / m of the sum.
    """
    dim, lengths = q.shape[-1], torch.tensor([len(k) for k in keys]).to(q)  # (S,)
    means = torch.stack([k.mean(0) for k in keys])  # (S, D)
    variances = torch.stack([k.var(0, correction=0).mean() for k in keys])  # (S,)
    logits = q @ means.T / math.sqrt(dim)  # (n, G, S)
    logits += q.square().sum(-1, keepdim=True) * variances / (2 * dim)
    attention = (logits + lengths.log()).softmax(-1).sum(1)  # of the G heads
    return attention / lengths


SCORES = {"mean_query": mean_query, "gaussian": gaussian}
